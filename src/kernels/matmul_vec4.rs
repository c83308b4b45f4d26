//! Matrix product with a large tile of the result per workgroup and 16-byte loads, for many rows.

use super::{Problem as _, matmul, product, trips};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul_vec4",
    source: include_str!("../../shaders/matmul_vec4.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WG_X, WG_Y): an invocation owns 8 × 8 results. Multiples of 4, since the shader moves quads about in groups of 8.
const TUNINGS: &[(u32, u32)] = &[(8, 8), (16, 16)];

/// Workgroups of 256 that a discrete GPU needs to be busy; with fewer, smaller tiles spread the work further.
const FULL: u64 = 128;

/// The same sizes as `matmul`'s, for operands that are [`matmul::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl Problem {
    /// Workgroups of a tuning.
    fn tiles(&self, index: usize) -> u64 {
        let (wg_x, wg_y) = TUNINGS[index];
        product(&[self.0.cols.div_ceil(8 * wg_x), self.0.rows.div_ceil(8 * wg_y), self.0.batch])
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_vec4(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software => 1,
            AdapterClass::Integrated | AdapterClass::Apple => 0,
            AdapterClass::Discrete if self.tiles(1) >= FULL => 1,
            AdapterClass::Discrete => 0,
        };
        let (wg_x, wg_y) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "inner", self.0.inner, 16)?;
        let mut overrides = self.0.switches();
        overrides.extend([("WG_X", wg_x.into()), ("WG_Y", wg_y.into())]);
        Plan {
            overrides,
            grid: [self.0.cols.div_ceil(8 * wg_x), self.0.rows.div_ceil(8 * wg_y), self.0.batch],
            tiles: [0; 3],
            workgroup_size: wg_x * wg_y,
            workgroup_bytes: 4 * 16 * (8 * wg_x + 8 * wg_y),
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds one product to a recording.
///
/// # Errors
/// As [`matmul::encode`], and operands that do not suit 16-byte loads.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
