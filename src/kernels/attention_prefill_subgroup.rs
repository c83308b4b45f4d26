//! [`super::attention_prefill`] with the work shared by subgroups: the same problem, arguments, query tiles and state.

use super::attention_prefill::{Args, Params, SLICE, tile_q};
use super::{Problem as _, attention_prefill, flag};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_prefill_subgroup",
    source: include_str!("../../shaders/attention_prefill_subgroup.wgsl"),
    bindings: attention_prefill::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: 4,
    cooperative: Cooperative::NONE,
};

/// (whether queries and keys go through workgroup memory, most teams of a workgroup). Query tiles are those of
/// `attention_prefill` for every one of them.
const TUNINGS: &[(bool, u32)] = &[(false, 1), (true, 8), (true, 4)];

/// Queries of a team.
const ROWS: u32 = 8;

/// Vectors of 4 elements that are staged at once.
const CHUNK: u32 = 4;

/// Widest team: with 16 lanes, 128 value columns are two vectors of 4 a lane.
const MOST_LANES: u32 = 16;

/// The same problem, of widths that are [`attention_prefill::Problem::aligned`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_prefill::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_aligned(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software => 0,
            AdapterClass::Discrete | AdapterClass::Integrated | AdapterClass::Apple => 1,
        };
        let (staged, most_teams) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        let lanes = context.team(MOST_LANES);
        let tile_teams = tile_q(context, Tuning::Auto)?.div_ceil(ROWS);
        let teams = most_teams.min(tile_teams);
        let parts = tile_teams.div_ceil(teams);
        let stage = if staged { (ROWS * teams + 4 * lanes) * (CHUNK + 1) } else { 1 };
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.0.storage.constant()),
                ("LANES", lanes.into()),
                ("TEAMS", teams.into()),
                ("PARTS", parts.into()),
                ("COLUMNS", self.0.d_value.min(SLICE).div_ceil(4 * lanes).into()),
                ("STAGED", flag(staged)),
                ("CHUNK", CHUNK.into()),
            ],
            grid: [self.0.query_tiles.saturating_mul(parts), self.0.n_head, self.0.d_value.div_ceil(SLICE)],
            tiles: [0; 3],
            workgroup_size: lanes * teams,
            workgroup_bytes: 16 * stage,
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, an input that is also an output, or a device without subgroups.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
