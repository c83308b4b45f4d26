//! Sample problems of every operation, for the checks. The registry hands them out regardless of type, so no test, fuzz target or
//! table lists the operations a second time.

use std::fmt::Debug;

use crate::adapter::{PlanContext, Tuning};
use crate::config::{Activation, GateNorm};
use crate::cost::Cost;
use crate::device::Region;
use crate::error::Result;
use crate::op::{Buffers, Op, Spec, choose};
use crate::plan::Plan;
use crate::recording::Recording;
use crate::storage::Storage;

/// An operation with sample problems.
pub trait Sampled: Op + Vary {
    /// Problems around every tile size, and with every switch.
    fn samples() -> Vec<Self>;

    /// Problems with their cost, counted by hand.
    fn counted() -> Vec<(Self, Cost)>;
}

/// A value whose every number can be redrawn.
pub trait Vary {
    /// Replaces every number by one from `next`.
    fn vary(&mut self, next: &mut dyn FnMut() -> u32);
}

/// 0, 1, and the neighbourhood of every workgroup size; then sizes over one dimension of workgroups.
pub(crate) const ELEMENTS: [u32; 10] = [0, 1, 63, 64, 65, 255, 256, 257, 65_536 * 64, 65_536 * 256 + 1];

/// 0, 1, 2, and the neighbourhood of the limit of one dimension of workgroups.
pub(crate) const ROWS: [u32; 7] = [0, 1, 2, 65_535, 65_536, 131_071, 10_000_000];

/// 1, and the neighbourhood of the heads per workgroup.
pub(crate) const HEADS: [u32; 6] = [1, 3, 4, 5, 9, 63];

impl Vary for u32 {
    fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
        *self = next();
    }
}

impl Vary for u64 {
    fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
        *self = u64::from(next()) << 32 | u64::from(next());
    }
}

impl<T: Vary, const N: usize> Vary for [T; N] {
    fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
        self.iter_mut().for_each(|value| value.vary(next));
    }
}

/// No plan depends on it.
impl Vary for f32 {
    fn vary(&mut self, _: &mut dyn FnMut() -> u32) {}
}

impl Vary for bool {
    fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
        *self = next() % 2 == 1;
    }
}

impl<T: Vary + Default> Vary for Option<T> {
    fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
        let some = next() % 2 == 1;
        *self = some.then(|| {
            let mut value = T::default();
            value.vary(next);
            value
        });
    }
}

/// One of a few values.
macro_rules! vary_among {
    ($($of:ty: $all:expr),* $(,)?) => {
        $(impl Vary for $of {
            fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
                let all = $all;
                *self = all[next() as usize % all.len()];
            }
        })*
    };
}
vary_among!(
    Storage: Storage::ALL,
    Activation: Activation::ALL,
    GateNorm: GateNorm::ALL,
    crate::kernels::norm::Kind: [crate::kernels::norm::Kind::Rms, crate::kernels::norm::Kind::Layer],
);

/// A problem, whatever its type.
pub trait Sample: Debug + Send + Sync {
    /// Stem of its operation.
    fn operation(&self) -> &'static str;

    /// The shaders of its operation.
    fn shaders(&self) -> Vec<&'static Spec>;

    /// Widths that a shader may loop over element by element.
    fn widths(&self) -> [(&'static str, u32); 4];

    /// The plan of one of them.
    ///
    /// # Errors
    /// As planning.
    fn plan(&self, shader: usize, context: &PlanContext, tuning: Tuning) -> Result<Plan>;

    /// The first assumption of the shader that a plan breaks.
    ///
    /// # Errors
    /// Its words.
    fn assumes(&self, shader: usize, context: &PlanContext, plan: &Plan) -> Result<(), &'static str>;

    /// The shader that runs.
    ///
    /// # Errors
    /// As [`choose`].
    fn chosen(&self, context: &PlanContext) -> Result<(&'static Spec, Plan)>;

    /// Bytes of every binding.
    fn bytes(&self) -> Vec<u64>;

    /// FLOPs and bytes.
    fn cost(&self) -> Cost;

    /// Records it with one region bound to every name.
    ///
    /// # Errors
    /// As recording.
    fn record(&self, shader: usize, recording: &mut Recording, region: &Region, tuning: Tuning) -> Result<()>;
}

impl<O: Sampled> Sample for O {
    fn operation(&self) -> &'static str {
        O::NAME
    }

    fn shaders(&self) -> Vec<&'static Spec> {
        O::VARIANTS.iter().map(|variant| &variant.spec).collect()
    }

    fn widths(&self) -> [(&'static str, u32); 4] {
        Op::widths(self)
    }

    fn plan(&self, shader: usize, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        O::VARIANTS[shader].plan(self, context, tuning)
    }

    fn assumes(&self, shader: usize, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
        (O::VARIANTS[shader].assumes)(self, context, plan)
    }

    fn chosen(&self, context: &PlanContext) -> Result<(&'static Spec, Plan)> {
        choose(self, context).map(|(variant, plan)| (&variant.spec, plan))
    }

    fn bytes(&self) -> Vec<u64> {
        let mut bytes = Vec::new();
        Op::bytes(self).each(&mut |_, of_binding| bytes.push(of_binding));
        bytes
    }

    fn cost(&self) -> Cost {
        Op::cost(self)
    }

    fn record(&self, shader: usize, recording: &mut Recording, region: &Region, tuning: Tuning) -> Result<()> {
        recording.add_variant(&O::VARIANTS[shader], self, O::Args::all(region), tuning)
    }
}
