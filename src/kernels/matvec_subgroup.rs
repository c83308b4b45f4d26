//! Matrix product for few rows in 16-byte loads, summed by subgroup operations.

use super::{Problem as _, matmul, trips};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matvec_subgroup",
    source: include_str!("../../shaders/matvec_subgroup.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: 4,
    cooperative: Cooperative::NONE,
};

/// Invocations that share four columns.
const TUNINGS: &[u32] = &[64, 32, 128];

/// The same sizes as `matmul`'s, for operands that are [`matmul::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_vec4(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software | AdapterClass::Apple => 1,
            AdapterClass::Integrated => 0,
            // A row that gives every invocation several loads.
            AdapterClass::Discrete => {
                if self.0.inner >= 4096 {
                    2
                } else {
                    0
                }
            }
        };
        let workgroup = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "inner", self.0.inner, 4 * workgroup)?;
        let mut overrides = self.0.switches();
        overrides.push(("WORKGROUP", workgroup.into()));
        Plan {
            overrides,
            grid: [self.0.cols.div_ceil(4), self.0.rows.div_ceil(4), self.0.batch],
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 16 * workgroup,
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
