//! [`super::attention_prefill_cooperative`] with matrices of 8 × 8: Apple's GPUs have these.

use super::attention_prefill::{Args, Params};
use super::{COOPERATIVE_FEATURES, Problem as _, attention_prefill, attention_prefill_cooperative};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_prefill_cooperative_8",
    source: include_str!("../../shaders/attention_prefill_cooperative_8.wgsl"),
    bindings: attention_prefill_cooperative::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: attention_prefill_cooperative::SPEC.tunings,
    features: COOPERATIVE_FEATURES,
    cooperative: Cooperative::BY_8,
    subgroup: 0,
};

/// The same problem as [`attention_prefill_cooperative::Problem`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_prefill::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        attention_prefill_cooperative::plan(&self.0, &SPEC, context, tuning)
    }
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// As [`attention_prefill_cooperative::encode`].
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
