//! Multiply-adds in registers: the adapter's f32 rate.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan};
use crate::storage::words;

/// Multiply-adds per iteration: four on each of twelve chains.
pub const FMA_PER_ITERATION: u32 = 48;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { elements: u32, iterations: u32, a: f32, b: f32 }
}

crate::args! {
    /// Buffers of one dispatch, each `[elements]` f32.
    pub struct Args {
        /// First values of the chains.
        x: Read,
        /// Their sums, written.
        y: Write,
    }
}

/// Twelve chains of `4 · iterations` steps `z ← a · z + b` for every element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RooflineFma {
    /// Elements.
    pub elements: u32,
    /// Iterations of the loop.
    pub iterations: u32,
    /// Factor of a step; below 1 in size, or the chains grow without bound.
    pub a: f32,
    /// Summand of a step.
    pub b: f32,
}

impl Op for RooflineFma {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "roofline_fma";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn params(&self, _: &Plan) -> Params {
        let RooflineFma { elements, iterations, a, b } = *self;
        Params { elements, iterations, a, b }
    }

    fn bytes(&self) -> Args<u64> {
        let all = words(self.elements.into());
        Args { x: all, y: all }
    }

    fn cost(&self) -> Cost {
        // The chains' beginnings (12 additions) and their sum (11) are counted too.
        let steps = times(2 * u64::from(FMA_PER_ITERATION), &[self.elements, self.iterations]);
        Cost::of(&[steps, times(23, &[self.elements])], &[times(8, &[self.elements])])
    }
}

pub(crate) const ELEMENTS: Variant<RooflineFma> = Variant::<RooflineFma>::new(
    ("roofline_fma", include_str!("../../shaders/roofline_fma.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| {
        Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.elements.into()).walks("iterations", op.iterations, 1))
    },
    anything,
);

crate::vary!(RooflineFma { elements, iterations, a, b });

#[cfg(feature = "check")]
impl crate::sample::Sampled for RooflineFma {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|elements| RooflineFma { elements, iterations: 2, a: 0.5, b: 0.5 }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // 3 elements · (5 iterations · 48 multiply-adds, 12 chains begun and 11 additions).
        let op = RooflineFma { elements: 3, iterations: 5, a: 0.5, b: 0.5 };
        vec![(op, Cost { flops: 3 * (2 * 5 * 48 + 23), bytes: 24 })]
    }
}
