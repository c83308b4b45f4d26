//! Copy of a buffer: the adapter's memory rate.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, Grid, Plan};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { vectors: u32 }
}

crate::args! {
    /// Buffers of one dispatch, each `[words]` u32.
    pub struct Args {
        /// Read.
        x: Read,
        /// Written.
        y: Write,
    }
}

/// `y = x` over this many words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RooflineCopy {
    /// 32-bit words; a multiple of 4.
    pub words: u32,
}

impl Op for RooflineCopy {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "roofline_copy";
    const VARIANTS: &'static [Variant<Self>] = &[VECTORS];

    fn validate(&self) -> Result<(), String> {
        if !self.words.is_multiple_of(4) {
            return Err(format!("{} words, not a multiple of 4", self.words));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        Params { vectors: self.words / 4 }
    }

    fn bytes(&self) -> Args<u64> {
        let all = words(self.words.into());
        Args { x: all, y: all }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[], &[times(8, &[self.words])])
    }
}

/// (WORKGROUP, EACH): EACH vectors per invocation.
pub(crate) const VECTORS: Variant<RooflineCopy> = {
    const TUNINGS: &[(u32, u32)] = &[(256, 1), (256, 4), (64, 16)];
    Variant::<RooflineCopy>::new(
        ("roofline_copy", include_str!("../../shaders/roofline_copy.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (workgroup, each) = TUNINGS[setting];
            let grid = Grid::Folded { items: u64::from(op.words / 4), each: workgroup * each };
            Ok(Draft::new(workgroup, grid).with([("WORKGROUP", workgroup), ("EACH", each)]))
        },
        anything,
    )
};

crate::vary!(RooflineCopy { words });

#[cfg(feature = "check")]
impl crate::sample::Sampled for RooflineCopy {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|words| RooflineCopy { words: words.next_multiple_of(4) }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        vec![(RooflineCopy { words: 12 }, Cost { flops: 0, bytes: 96 })]
    }
}
