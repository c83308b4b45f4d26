//! [`super::attention_absorbed`] in registers, each row read once: for GPUs with subgroups. The same problem, arguments and
//! partial results.

use super::Problem as _;
use super::attention_absorbed::{self, Args, Params};
use super::attention_decode::SPLIT;
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_absorbed_stream",
    source: include_str!("../../shaders/attention_absorbed_stream.wgsl"),
    bindings: attention_absorbed::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: 4,
    cooperative: Cooperative::NONE,
};

/// Most teams of a workgroup; each has [`HEADS`].
const TUNINGS: &[u32] = &[4, 1, 8];

/// Heads of a team.
const HEADS: u32 = 4;

/// Widest team.
const MOST_LANES: u32 = 32;

/// What a lane can keep of a row: 16-byte loads of the latent, words of the rotary key.
const MOST_LOADS: u32 = 4;
const MOST_WORDS: u32 = 16;

/// Below this many workgroups of one team a workgroup of several would leave cores of a GPU without work.
const FEW: u32 = 512;

/// The same problem, of widths that are [`attention_absorbed::Problem::aligned`] and that the lanes of a team can hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_absorbed::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        let problem = &self.0;
        problem.validate_aligned(SPEC.name)?;
        let teams_needed = problem.n_head.div_ceil(HEADS);
        let groups = problem.splits.saturating_mul(problem.most_tokens).saturating_mul(teams_needed);
        let auto = if groups < FEW { 1 } else { 0 };
        let most_teams = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        let teams = most_teams.min(teams_needed);
        // No more lanes than a row has loads.
        let row_loads = problem.loads(problem.d_latent);
        let lanes = context.team(MOST_LANES).min(row_loads.next_power_of_two().max(4));
        let loads = row_loads.div_ceil(lanes);
        let words = (problem.d_rope / if problem.storage == Storage::F16 { 2 } else { 1 }).div_ceil(lanes);
        if loads > MOST_LOADS || words > MOST_WORDS {
            let attention_absorbed::Problem { d_latent, d_rope, .. } = problem;
            let wide = format!("{lanes} lanes do not hold a row of d_latent {d_latent} and d_rope {d_rope}");
            return Err(Error::problem(SPEC.name, wide));
        }
        Plan {
            overrides: vec![
                ("STORAGE_F16", problem.storage.constant()),
                ("LANES", lanes.into()),
                ("TEAMS", teams.into()),
                ("LOADS", loads.into()),
                ("ROPE", words.into()),
                ("SPLIT", SPLIT.into()),
            ],
            grid: [problem.splits, teams_needed.div_ceil(teams), problem.most_tokens],
            tiles: [0; 3],
            workgroup_size: lanes * teams,
            workgroup_bytes: 0,
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
