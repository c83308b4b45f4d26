//! Matrix product in registers alone, rows of `x` shared by subgroup shuffles: for adapters without fast workgroup memory.

use super::{Problem as _, matmul, trips};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul_subgroup",
    source: include_str!("../../shaders/matmul_subgroup.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: 4,
    cooperative: Cooperative::NONE,
};

/// Columns of a workgroup of eight invocations; its rows are 8.
const TUNINGS: &[u32] = &[32];

/// The same sizes as `matmul`'s, for operands that are [`matmul::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_vec4(SPEC.name)?;
        let cols = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, 0))?];
        trips(SPEC.name, "inner", self.0.inner, 4)?;
        let mut overrides = self.0.switches();
        overrides.push(("SPREAD", if context.subgroup_min_size >= 8 { 8.0 } else { 4.0 }));
        Plan {
            overrides,
            // Rows along x: workgroups that start one after another read the same weights.
            grid: [self.0.rows.div_ceil(8), self.0.cols.div_ceil(cols), self.0.batch],
            tiles: [0; 3],
            workgroup_size: 8,
            workgroup_bytes: 0,
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds one product to a recording.
///
/// # Errors
/// As [`matmul::encode`], and operands that do not suit 16-byte loads or a device without subgroups.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
