//! [`super::attention_absorbed`] in a workgroup of one subgroup, without barriers: for adapters without fast workgroup memory.
//! The same problem, arguments and partial results.

use super::Problem as _;
use super::attention_absorbed::{self, Args, Params};
use super::attention_decode::SPLIT;
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_absorbed_subgroup",
    source: include_str!("../../shaders/attention_absorbed_subgroup.wgsl"),
    bindings: attention_absorbed::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: 4,
    cooperative: Cooperative::NONE,
};

/// Most lanes of a workgroup.
const TUNINGS: &[u32] = &[16, 8];

/// Heads of a workgroup.
const HEADS: u32 = 8;

/// The same problem, of widths that are [`attention_absorbed::Problem::aligned`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_absorbed::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_aligned(SPEC.name)?;
        let most = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, 0))?];
        let lanes = context.team(most);
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.0.storage.constant()),
                ("LANES", lanes.into()),
                ("SPLIT", SPLIT.into()),
            ],
            grid: [self.0.splits, self.0.n_head.div_ceil(HEADS), self.0.most_tokens],
            tiles: [0; 3],
            workgroup_size: lanes,
            workgroup_bytes: 4 * HEADS * SPLIT,
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds the attention over the latents to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, an input that is also an output, or a device without subgroups.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
