//! Hostile memory: outputs that begin as NaN, between guard words that must survive.

use crate::device::{Kernels, Region};
use crate::error::{Error, KernelError, Result};
use crate::readback;
use crate::storage::Storage;

/// A quiet NaN with a payload: fills outputs before a launch, and the guard words around every buffer.
pub const POISON: u32 = 0x7fc0_dead;

/// Two f16 NaNs in a word.
const POISON_F16: u32 = 0x7ead_7ead;

/// Words before and after; a multiple of every device's storage offset alignment (256 bytes).
pub const GUARD_WORDS: usize = 64;

/// A region between guard words.
#[derive(Debug)]
pub struct Guarded {
    /// The region to bind.
    pub region: Region,
    words: usize,
}

impl Guarded {
    /// A region that holds `content`.
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub fn filled(kernels: &Kernels, label: &str, content: &[u32]) -> Result<Self> {
        let mut all = vec![POISON; GUARD_WORDS];
        all.extend_from_slice(content);
        all.resize(all.len() + GUARD_WORDS, POISON);
        let buffer = kernels.upload(label, bytemuck::cast_slice(&all))?;
        let region = Region::new(&buffer, 4 * GUARD_WORDS as u64, 4 * content.len() as u64);
        Ok(Guarded { region, words: content.len() })
    }

    /// A region of NaN.
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub fn poisoned(kernels: &Kernels, label: &str, words: usize) -> Result<Self> {
        Self::filled(kernels, label, &vec![POISON; words])
    }

    /// A region of NaN in the given storage.
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub fn poisoned_as(kernels: &Kernels, label: &str, words: usize, storage: Storage) -> Result<Self> {
        let poison = match storage {
            Storage::F32 => POISON,
            Storage::F16 => POISON_F16,
        };
        Self::filled(kernels, label, &vec![poison; words])
    }

    /// Reads the region back.
    ///
    /// # Errors
    /// A guard word that changed, or a lost device.
    pub fn read(&self, kernels: &Kernels) -> Result<Vec<u32>> {
        let whole = Region::from(&self.region.buffer);
        let bytes = readback::wait(readback::read(kernels, &[&whole]))?;
        let all: Vec<u32> = bytes.iter().flat_map(|bytes| bytemuck::pod_collect_to_vec::<u8, u32>(bytes)).collect();
        let end = GUARD_WORDS + self.words;
        let guards = (0..GUARD_WORDS).chain(end..end + GUARD_WORDS);
        match guards.into_iter().find(|&word| all.get(word) != Some(&POISON)) {
            None => Ok(all[GUARD_WORDS..end].to_vec()),
            Some(word) => Err(Error::Kernel(KernelError::Problem {
                kernel: "check",
                problem: format!("a guard word was overwritten, {} words from the buffer's first", word as i64 - 64),
            })),
        }
    }

    /// Words between the guards.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Reads the region back as f32.
    ///
    /// # Errors
    /// As [`Guarded::read`].
    pub fn read_f32(&self, kernels: &Kernels) -> Result<Vec<f32>> {
        Ok(self.read(kernels)?.into_iter().map(f32::from_bits).collect())
    }
}
