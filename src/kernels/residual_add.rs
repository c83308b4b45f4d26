//! Residual connection, in place.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything, hold};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_multiples};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { elements: u32, factor: f32 }
}

crate::args! {
    /// Buffers of one dispatch, each `[elements]` f32.
    pub struct Args {
        /// Added.
        delta: Read,
        /// Read and written.
        stream: Write,
    }
}

/// `stream += factor · delta`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResidualAdd {
    /// Elements.
    pub elements: u32,
    /// On what is added.
    pub factor: f32,
}

impl Op for ResidualAdd {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "residual_add";
    const VARIANTS: &'static [Variant<Self>] = &[VEC4, ELEMENTS];

    fn params(&self, _: &Plan) -> Params {
        Params { elements: self.elements, factor: self.factor }
    }

    fn bytes(&self) -> Args<u64> {
        let all = words(self.elements.into());
        Args { delta: all, stream: all }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[times(2, &[self.elements])], &[times(12, &[self.elements])])
    }
}

/// In 16-byte loads: a whole number of fours.
pub(crate) const VEC4: Variant<ResidualAdd> = Variant::<ResidualAdd>::new(
    ("residual_add_vec4", include_str!("../../shaders/residual_add_vec4.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| {
        check_multiples(4, &[("elements", op.elements)])?;
        Ok(Draft::elements(LINEAR_WORKGROUPS[setting], u64::from(op.elements) / 4))
    },
    |op, _, _| hold(&[(op.elements.is_multiple_of(4), "elements are whole fours")]),
)
.preferred(|op, _| op.elements.is_multiple_of(4));

pub(crate) const ELEMENTS: Variant<ResidualAdd> = Variant::<ResidualAdd>::new(
    ("residual_add", include_str!("../../shaders/residual_add.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.elements.into())),
    anything,
);

crate::vary!(ResidualAdd { elements, factor });

#[cfg(feature = "check")]
impl crate::sample::Sampled for ResidualAdd {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|elements| ResidualAdd { elements, factor: 1.0 }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        vec![(ResidualAdd { elements: 11, factor: 1.0 }, Cost { flops: 22, bytes: 132 })]
    }
}
