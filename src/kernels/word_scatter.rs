//! Writes single words: the changes of one step to the group lists of a cache.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { count: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[count, 2]` u32: word and value.
        patches: Read,
        /// `[words]` u32, written at the patches.
        words: Write,
    }
}

/// Words to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WordScatter {
    /// Patches.
    pub count: u32,
    /// Words of the buffer; the caller has checked that every patch is below it.
    pub words: u32,
}

impl Op for WordScatter {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "word_scatter";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn params(&self, _: &Plan) -> Params {
        Params { count: self.count }
    }

    fn bytes(&self) -> Args<u64> {
        Args { patches: words(2 * u64::from(self.count)), words: words(self.words.into()) }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[], &[times(12, &[self.count])])
    }
}

pub(crate) const ELEMENTS: Variant<WordScatter> = Variant::<WordScatter>::new(
    ("word_scatter", include_str!("../../shaders/word_scatter.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.count.into())),
    anything,
);

crate::vary!(WordScatter { count, words });

#[cfg(feature = "check")]
impl crate::sample::Sampled for WordScatter {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|count| WordScatter { count, words: count }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // A patch of 8 bytes, a word written.
        vec![(WordScatter { count: 11, words: 99 }, Cost { flops: 0, bytes: 132 })]
    }
}
