//! Products of cooperative matrices of 16 × 16 in registers, for the rate of an adapter.

use bytemuck::{Pod, Zeroable};

use super::{COOPERATIVE_FEATURES, Problem as _, product, trips, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "roofline_cooperative",
    source: include_str!("../../shaders/roofline_cooperative.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("x"), Binding::write("y")],
    params_size: size_of::<Params>(),
    tunings: 1,
    features: COOPERATIVE_FEATURES,
    cooperative: Cooperative::BY_16,
    subgroup: 0,
};

/// Rows and columns of a matrix.
pub const SIDE: u32 = 16;

/// Matrices of `x`: two left factors, four right ones.
pub const FACTORS: u32 = 6;

/// Matrices of `y` that a group writes: as many products a trip.
pub const PRODUCTS: u32 = 8;

/// Uniform parameters, as in the shader; `roofline_cooperative_8` has the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    pub(super) groups: u32,
    pub(super) trips: u32,
}

/// Eight sums of `trips` equal products, `groups` times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Workgroups, each of a subgroup.
    pub groups: u32,
    /// Trips of the loop; below 65 535.
    pub trips: u32,
}

/// The plan of the kernel with matrices of `side`.
pub(super) fn plan(
    problem: &Problem,
    spec: &'static KernelSpec,
    side: u32,
    context: &PlanContext,
    tuning: Tuning,
) -> Result<Plan> {
    tuning.choose(spec.name, spec.tunings, 0)?;
    trips(spec.name, "trips", problem.trips, 1)?;
    let workgroup_size = context.widest_subgroup();
    Plan {
        overrides: vec![("WORKGROUP", workgroup_size.into())],
        grid: fold_grid(spec.name, problem.groups.into(), &context.limits)?,
        tiles: [0; 3],
        workgroup_size,
        workgroup_bytes: (2 * FACTORS + 4 * PRODUCTS) * side * side,
    }
    .checked(spec.name, &context.limits)
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        plan(self, &SPEC, SIDE, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[6, SIDE, SIDE]` f32, rounded to f16.
    pub x: &'a Region,
    /// `[groups, 8, SIDE, SIDE]` f32, written.
    pub y: &'a Region,
}

/// Adds one dispatch to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, `x` in the buffer of `y`, or a device without the matrices.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { groups, trips } = *problem;
    let matrices = |count| product(&[count, SIDE, SIDE]);
    let bound = [words(args.x, matrices(FACTORS)), words(args.y, matrices(groups.saturating_mul(PRODUCTS)))];
    recording.push(&SPEC, &plan, &Params { groups, trips }, &bound)
}
