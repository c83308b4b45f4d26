//! Tensors by name, from wherever a checkpoint keeps them: bytes in memory or files, read one tensor at a time.

mod folder;
mod fp8;
mod halves;
mod index;
mod layers;
mod quantised;
mod safetensors;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::error::{Error, Result, TensorError};
use crate::gguf;
use crate::weights::HostTensor;

pub use folder::model_folder;
pub use layers::LayerNumber;
#[cfg(feature = "decoder")]
pub(crate) use layers::layer_of;

/// What a file says of one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The element type, as the file calls it.
    pub dtype: String,
}

/// Where a checkpoint's tensors are.
pub(crate) trait Source: Send {
    /// Every tensor, by name.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// The elements of one tensor of the list, row-major, widened to f32.
    ///
    /// # Errors
    /// `TensorError::Type` for elements that are not read; a file that cannot be read any more.
    fn read(&self, name: &str) -> Result<Vec<f32>>;

    /// The file that holds a tensor, or would: errors name it. `None` in memory.
    fn file(&self, name: &str) -> Option<&Path>;
}

/// A checkpoint: tensors are taken by name, and it tracks those never asked for.
pub struct Checkpoint<'a> {
    source: Box<dyn Source + 'a>,
    taken: RefCell<BTreeSet<String>>,
    /// Rows and columns that share a factor of an fp8 tensor.
    block: [usize; 2],
    /// Whether matrices become halves.
    halves: bool,
}

impl<'a> Checkpoint<'a> {
    /// Reads the header of a safetensors file in memory.
    ///
    /// # Errors
    /// `DataError::Safetensors` when the bytes are truncated, no safetensors file, or name a tensor twice.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        Ok(Checkpoint::of(safetensors::Memory::new(bytes)?))
    }

    fn of(source: impl Source + 'a) -> Self {
        Checkpoint { source: Box::new(source), taken: RefCell::default(), block: fp8::BLOCK, halves: false }
    }

    /// The same with other blocks of fp8 weights than 128 × 128: rows and columns, from 1 on, as
    /// [`crate::config::weight_block_size`] reads them.
    pub fn with_block_size(mut self, block: [u32; 2]) -> Self {
        self.block = block.map(|extent| extent.max(1) as usize);
        self
    }

    /// The same with matrices of halves: one whose elements are not all bf16 is rounded to f16, as a device with f16 storage has it,
    /// by at most 2⁻¹¹ of an element, or 2⁻²⁵ where it is below 2⁻¹⁴. Vectors stay as they are.
    pub fn in_halves(mut self) -> Self {
        self.halves = true;
        self
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.source.tensors()
    }

    /// The files that hold tensors; none in memory.
    pub fn files(&self) -> BTreeSet<&Path> {
        self.tensors().keys().filter_map(|name| self.source.file(name)).collect()
    }

    /// Whether a tensor of that name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors().contains_key(name)
    }

    /// Takes one tensor and checks its shape: f32, f16, bf16, or fp8 (e4m3) times its factors, `NAME_scale_inv`, one for each block
    /// or one for the whole. NaN and infinities are kept, with a warning.
    ///
    /// # Errors
    /// `TensorError::Missing`, `TensorError::Shape`, `TensorError::Type` or `TensorError::Quantised`, and `OutOfF16Range` of one
    /// [in halves](Checkpoint::in_halves); in [`Error::File`] where there is a file.
    pub fn take(&self, name: &str, expected: &[usize]) -> Result<HostTensor> {
        let read = || {
            let mut data = self.read(name, expected)?;
            if self.halves && expected.len() == 2 {
                halves::round(name, &mut data)?;
            }
            Ok(data)
        };
        let data = read().map_err(|error| self.in_file(name, error))?;
        let non_finite = data.iter().filter(|value| !value.is_finite()).count();
        if non_finite > 0 {
            tracing::warn!("tensor `{name}` holds {non_finite} NaN or infinite values of {}", data.len());
        }
        Ok(HostTensor { name: name.to_owned(), shape: expected.to_vec(), data })
    }

    /// Counts a tensor as taken that will be: it must be there in this shape, and not quantised, but is not read.
    ///
    /// # Errors
    /// `TensorError::Missing`, `TensorError::Shape` or `TensorError::Quantised`; in [`Error::File`] where there is a file.
    #[cfg(feature = "convert")]
    pub(crate) fn claim(&self, name: &str, expected: &[usize]) -> Result<()> {
        let info = self.info(name, expected).map_err(|error| self.in_file(name, error))?;
        let mut taken = self.taken.borrow_mut();
        taken.insert(name.to_owned());
        if info.dtype == fp8::NAME {
            taken.insert(format!("{name}{}", fp8::SCALE));
        }
        Ok(())
    }

    fn read(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let info = self.info(name, expected)?;
        let mut values = self.source.read(name)?;
        if info.dtype == fp8::NAME {
            let factors = format!("{name}{}", fp8::SCALE);
            let found = self.tensors().get(&factors).map_or(&[0, 0][..], |found| &found.shape);
            let shape = fp8::scale_shape(name, expected, found, self.block)?;
            let type_of = &self.info(&factors, &shape)?.dtype;
            if type_of == fp8::NAME {
                let found = type_of.clone();
                return Err(Error::Tensor(TensorError::Type { name: factors, expected: "F32, F16 or BF16", found }));
            }
            fp8::scale(&mut values, expected, &self.source.read(&factors)?, self.block);
            self.taken.borrow_mut().insert(factors);
        }
        self.taken.borrow_mut().insert(name.to_owned());
        Ok(values)
    }

    /// A tensor that is there, not quantised, and has the shape.
    fn info(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo> {
        if let Some(problem) = quantised::problem(self.tensors(), name) {
            return Err(Error::Tensor(problem));
        }
        let (name, expected) = (name.to_owned(), expected.to_vec());
        match self.tensors().get(&name) {
            None => Err(Error::Tensor(TensorError::Missing { name, expected })),
            Some(info) if info.shape != expected => {
                Err(Error::Tensor(TensorError::Shape { name, expected, found: info.shape.clone() }))
            }
            Some(info) => Ok(info),
        }
    }

    /// Passes tensors over that were not taken, with one note that says why.
    pub(crate) fn pass_over(&self, why: &str, of: impl Fn(&str) -> bool) {
        let mut taken = self.taken.borrow_mut();
        let names: Vec<_> = self.tensors().keys().filter(|name| !taken.contains(*name) && of(name)).cloned().collect();
        match &names[..] {
            [] => {}
            [name] => tracing::warn!("passed over: tensor `{name}`, {why}"),
            [name, ..] => tracing::warn!("passed over: {} tensors, `{name}` the first, {why}", names.len()),
        }
        taken.extend(names);
    }

    /// Passes over what changes no result of any model.
    pub(crate) fn pass_over_harmless(&self, prefix: &str) {
        const ENDS: [&str; 3] = ["rotary_emb.inv_freq", ".k_scale", ".v_scale"];
        let harmless = |name: &str| name.starts_with(prefix) && ENDS.iter().any(|end| name.ends_with(end));
        self.pass_over("without effect here", harmless);
    }

    /// Refuses tensors under `prefix` that were never taken. Those that change no result in any model are passed over with a
    /// note: `rotary_emb.inv_freq`, which follows from the configuration, and `k_scale` and `v_scale`, of caches in 8 bits.
    ///
    /// # Errors
    /// `TensorError::Extra` with the first such name.
    pub fn refuse_rest(&self, prefix: &str) -> Result<()> {
        self.pass_over_harmless(prefix);
        let taken = self.taken.borrow();
        match self.tensors().iter().find(|(name, _)| name.starts_with(prefix) && !taken.contains(*name)) {
            None => Ok(()),
            Some((name, info)) => {
                let extra = TensorError::Extra { name: name.clone(), found: info.shape.clone() };
                Err(self.in_file(name, Error::Tensor(extra)))
            }
        }
    }

    /// The same error with the file of a tensor, unless it names one.
    fn in_file(&self, name: &str, error: Error) -> Error {
        match (self.source.file(name), error) {
            (Some(path), error) if !matches!(error, Error::File { .. }) => error.in_file(path),
            (_, error) => error,
        }
    }
}

impl Checkpoint<'static> {
    /// Opens a safetensors file, an index of shards (`….index.json`), a GGUF file, or a folder with `model.safetensors` or
    /// `model.safetensors.index.json`; a folder of Hugging Face's cache, or the name of a model in it, as [`model_folder`].
    /// Headers are read at once, a tensor when it is taken: a file that changed meanwhile is an error.
    ///
    /// # Errors
    /// [`Error::File`] with `DataError::Io`, or with what is wrong in a header or index.
    pub fn open(path: &Path) -> Result<Self> {
        let path = model_folder(path)?;
        if gguf::is_gguf(&path) {
            return Ok(Checkpoint::of(gguf::open(&path)?));
        }
        let files = if path.is_dir() {
            safetensors::Files::folder(&path)?
        } else if path.extension().is_some_and(|extension| extension == "json") {
            safetensors::Files::index(&path)?
        } else {
            safetensors::Files::open(&path)?
        };
        Ok(Checkpoint::of(files))
    }
}
