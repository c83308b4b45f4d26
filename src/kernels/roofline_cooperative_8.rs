//! [`super::roofline_cooperative`] with matrices of 8 × 8.

use super::roofline_cooperative::{Args, FACTORS, PRODUCTS, Params};
use super::{COOPERATIVE_FEATURES, Problem as _, product, roofline_cooperative, words};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "roofline_cooperative_8",
    source: include_str!("../../shaders/roofline_cooperative_8.wgsl"),
    bindings: roofline_cooperative::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: 1,
    features: COOPERATIVE_FEATURES,
    cooperative: Cooperative::BY_8,
    subgroup: 0,
};

/// Rows and columns of a matrix.
pub const SIDE: u32 = 8;

/// The same problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub roofline_cooperative::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        roofline_cooperative::plan(&self.0, &SPEC, SIDE, context, tuning)
    }
}

/// Adds one dispatch to a recording.
///
/// # Errors
/// As [`roofline_cooperative::encode`].
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let roofline_cooperative::Problem { groups, trips } = problem.0;
    let matrices = |count| product(&[count, SIDE, SIDE]);
    let bound = [words(args.x, matrices(FACTORS)), words(args.y, matrices(groups.saturating_mul(PRODUCTS)))];
    recording.push(&SPEC, &plan, &Params { groups, trips }, &bound)
}
