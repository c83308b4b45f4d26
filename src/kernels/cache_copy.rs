//! Copies the cache rows of one sequence over those of another, within one buffer.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { words: u32, from_word: u32, to_word: u32 }
}

crate::args! {
    /// The one buffer.
    pub struct Args {
        /// Read and written.
        cache: Write,
    }
}

/// Words to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheCopy {
    /// 32-bit words.
    pub words: u32,
    /// First word that is read.
    pub from_word: u32,
    /// First word that is written.
    pub to_word: u32,
}

impl Op for CacheCopy {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "cache_copy";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn validate(&self) -> Result<(), String> {
        let CacheCopy { words, from_word, to_word } = *self;
        if words > from_word.abs_diff(to_word) {
            return Err(format!("{words} words from {from_word} to {to_word} overlap"));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let CacheCopy { words, from_word, to_word } = *self;
        Params { words, from_word, to_word }
    }

    fn bytes(&self) -> Args<u64> {
        Args { cache: words(u64::from(self.from_word.max(self.to_word)) + u64::from(self.words)) }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[], &[times(8, &[self.words])])
    }
}

pub(crate) const ELEMENTS: Variant<CacheCopy> = Variant::<CacheCopy>::new(
    ("cache_copy", include_str!("../../shaders/cache_copy.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.words.into())),
    anything,
);

crate::vary!(CacheCopy { words, from_word, to_word });

#[cfg(feature = "check")]
impl crate::sample::Sampled for CacheCopy {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|words| CacheCopy { words, from_word: 0, to_word: words }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        vec![(CacheCopy { words: 10, from_word: 0, to_word: 10 }, Cost { flops: 0, bytes: 80 })]
    }
}
