//! Copies the cache rows of a sequence from one cache to another, or from saved bytes.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { words: u32, from_word: u32, to_word: u32 }
}

crate::args! {
    /// Two buffers.
    pub struct Args {
        /// Read.
        source: Read,
        /// Written.
        sink: Write,
    }
}

/// Words to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheMove {
    /// 32-bit words.
    pub words: u32,
    /// First word that is read.
    pub from_word: u32,
    /// First word that is written.
    pub to_word: u32,
}

impl Op for CacheMove {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "cache_move";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn params(&self, _: &Plan) -> Params {
        let CacheMove { words, from_word, to_word } = *self;
        Params { words, from_word, to_word }
    }

    fn bytes(&self) -> Args<u64> {
        let end = |first: u32| words(u64::from(first) + u64::from(self.words));
        Args { source: end(self.from_word), sink: end(self.to_word) }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[], &[times(8, &[self.words])])
    }
}

pub(crate) const ELEMENTS: Variant<CacheMove> = Variant::<CacheMove>::new(
    ("cache_move", include_str!("../../shaders/cache_move.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.words.into())),
    anything,
);

crate::vary!(CacheMove { words, from_word, to_word });

#[cfg(feature = "check")]
impl crate::sample::Sampled for CacheMove {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|words| CacheMove { words, from_word: 0, to_word: words }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        vec![(CacheMove { words: 10, from_word: 0, to_word: 10 }, Cost { flops: 0, bytes: 80 })]
    }
}
