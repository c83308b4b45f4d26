//! [`super::attention_prefill`] by cooperative matrices of 16 × 16: the same problem, arguments, query tiles and state.
//!
//! Queries, keys, values and weights are rounded to f16, sums and the softmax are f32: for caches in f16 only, whose rounding
//! is as coarse. A score is off by about 2⁻¹¹ of its terms, a weight by 2⁻¹¹ of itself. Queries, keys and values beyond
//! ±65 504 become infinite, as in any f16.

use super::attention_prefill::{Args, Params, SLICE, TUNINGS, setting, tile_q};
use super::{COOPERATIVE_FEATURES, Problem as _, attention_prefill, matmul_cooperative};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_prefill_cooperative",
    source: include_str!("../../shaders/attention_prefill_cooperative.wgsl"),
    bindings: attention_prefill::SPEC.bindings,
    params_size: size_of::<Params>(),
    // The query tiles of attention_prefill, one setting for each of its.
    tunings: TUNINGS.len(),
    features: COOPERATIVE_FEATURES,
    cooperative: Cooperative::BY_16,
    subgroup: 0,
};

/// Queries, and keys, of a workgroup at a time.
const TILE: u32 = 32;

/// The same problem, with an f16 cache and widths that are multiples of 4.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_prefill::Problem);

/// The plan of either kernel; their staged halves take the same room.
pub(super) fn plan(
    problem: &attention_prefill::Problem,
    spec: &'static KernelSpec,
    context: &PlanContext,
    tuning: Tuning,
) -> Result<Plan> {
    problem.validate_aligned(spec.name)?;
    if problem.storage != Storage::F16 {
        return Err(Error::problem(spec.name, "the cache must be stored in f16"));
    }
    tuning.choose(spec.name, spec.tunings, setting(context, Tuning::Auto)?)?;
    let parts = tile_q(context, tuning)?.div_ceil(TILE);
    let workgroup_size = matmul_cooperative::workgroup_size(context).max(TILE);
    // Value columns of a subgroup; half of them where that is enough.
    let columns = if problem.d_value <= SLICE / 2 { SLICE / 8 } else { SLICE / 4 };
    Plan {
        overrides: vec![("WORKGROUP", workgroup_size.into()), ("PARTS", parts.into()), ("COLUMNS", columns.into())],
        grid: [problem.query_tiles.saturating_mul(parts), problem.n_head, problem.d_value.div_ceil(SLICE)],
        tiles: [0; 3],
        workgroup_size,
        // Staged halves of 64 columns, scores, maxima, factors and marks, one word more.
        workgroup_bytes: 2 * 2 * TILE * (64 + 8) + 4 * TILE * (TILE + 4) + 4 * (workgroup_size + 2 * TILE + 1),
    }
    .tiled(spec.name, &context.limits)
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        plan(&self.0, &SPEC, context, tuning)
    }
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, an input that is also an output, or a device without the matrices.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
