//! Matrix product by cooperative matrices of 16 × 16, f16 weights and f32 sums, for many rows.
//!
//! `x` is rounded to f16 before it is multiplied: for f16 weights only, whose rounding is as coarse. Values of `x` beyond
//! ±65 504 become infinite, as in any f16.

use super::{COOPERATIVE_FEATURES, Problem as _, flag, matmul, trips};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul_cooperative",
    source: include_str!("../../shaders/matmul_cooperative.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: COOPERATIVE_FEATURES,
    subgroup: 0,
    cooperative: Cooperative::BY_16,
};

/// FRAGMENTS: matrices along each side of a subgroup's tile, of which a workgroup has 2 × 2.
const TUNINGS: &[u32] = &[4, 2];

/// Workgroups of the larger tile that keep a GPU busy; with fewer, smaller tiles spread the work further.
const FULL: u64 = 128;

/// Fours of `x`, and of `w`, that a step stages, whatever the tile.
const QUADS: u32 = 512;

/// The same sizes as `matmul`'s, with f16 storage, for operands that are [`matmul::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

/// The plan of the kernel that multiplies matrices of `side`, 16 or 8.
pub(super) fn plan(
    problem: &matmul::Problem,
    spec: &'static KernelSpec,
    side: u32,
    context: &PlanContext,
    tuning: Tuning,
) -> Result<Plan> {
    problem.validate_vec4(spec.name)?;
    if problem.storage != Storage::F16 {
        return Err(Error::problem(spec.name, "weights must be stored in f16"));
    }
    let grid = |fragments: u32| {
        let tile = 2 * fragments * side;
        [problem.cols.div_ceil(tile), problem.rows.div_ceil(tile), problem.batch]
    };
    let auto = usize::from(super::product(&grid(TUNINGS[0])) < FULL);
    let fragments = TUNINGS[tuning.choose(spec.name, TUNINGS.len(), context.auto(spec.name, auto))?];
    let workgroup_size = workgroup_size(context);
    let tile = 2 * fragments * side;
    let tile_k = QUADS * 4 / tile;
    trips(spec.name, "inner", problem.inner, tile_k)?;
    Plan {
        overrides: vec![
            ("HAS_BIAS", flag(problem.bias)),
            ("WORKGROUP", workgroup_size.into()),
            ("FRAGMENTS", fragments.into()),
        ],
        grid: grid(fragments),
        tiles: [0; 3],
        workgroup_size,
        // Staged halves, and a matrix of sums for each subgroup.
        workgroup_bytes: 2 * 2 * tile * (tile_k + 8) + 4 * 4 * side * side,
    }
    .tiled(spec.name, &context.limits)
}

/// Invocations of four subgroups at least: whole ones, whatever their size.
pub(super) fn workgroup_size(context: &PlanContext) -> u32 {
    4 * context.widest_subgroup()
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        plan(&self.0, &SPEC, 16, context, tuning)
    }
}

/// Adds one product to a recording.
///
/// # Errors
/// As [`matmul::encode`], operands that do not suit 16-byte loads, f32 storage, or a device without the matrices.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
