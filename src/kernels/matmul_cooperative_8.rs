//! [`super::matmul_cooperative`] with matrices of 8 × 8: Apple's GPUs have these.

use super::{COOPERATIVE_FEATURES, Problem as _, matmul, matmul_cooperative};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul_cooperative_8",
    source: include_str!("../../shaders/matmul_cooperative_8.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: matmul_cooperative::SPEC.tunings,
    features: COOPERATIVE_FEATURES,
    cooperative: Cooperative::BY_8,
    subgroup: 0,
};

/// The same problem as [`matmul_cooperative::Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        matmul_cooperative::plan(&self.0, &SPEC, 8, context, tuning)
    }
}

/// Adds one product to a recording.
///
/// # Errors
/// As [`matmul_cooperative::encode`].
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
