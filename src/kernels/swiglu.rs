//! The elementwise product of a SwiGLU.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { elements: u32 }
}

crate::args! {
    /// Buffers of one dispatch, each `[elements]` f32.
    pub struct Args {
        /// Argument of silu.
        gate: Read,
        /// Its factor.
        up: Read,
        /// Written.
        y: Write,
    }
}

/// `y = silu(gate) ⊙ up` over this many elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swiglu {
    /// Elements.
    pub elements: u32,
}

impl Op for Swiglu {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "swiglu";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn params(&self, _: &Plan) -> Params {
        Params { elements: self.elements }
    }

    fn bytes(&self) -> Args<u64> {
        let all = words(self.elements.into());
        Args { gate: all, up: all, y: all }
    }

    fn cost(&self) -> Cost {
        Cost::of(&[times(4, &[self.elements])], &[times(12, &[self.elements])])
    }
}

pub(crate) const ELEMENTS: Variant<Swiglu> = Variant::<Swiglu>::new(
    ("swiglu", include_str!("../../shaders/swiglu.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.elements.into())),
    anything,
);

crate::vary!(Swiglu { elements });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Swiglu {
    fn samples() -> Vec<Self> {
        crate::sample::ELEMENTS.map(|elements| Swiglu { elements }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        vec![(Swiglu { elements: 11 }, Cost { flops: 44, bytes: 132 })]
    }
}
