//! Matrix product for few rows in 16-byte loads: every weight is read once for up to four rows.

use super::{Problem as _, matmul, trips};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matvec_vec4",
    source: include_str!("../../shaders/matvec_vec4.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES): LANES invocations share four columns.
const TUNINGS: &[(u32, u32)] = &[(8, 1), (64, 16), (128, 32)];

/// The same sizes as `matmul`'s, for operands that are [`matmul::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate_vec4(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software => 0,
            AdapterClass::Integrated | AdapterClass::Apple => 1,
            AdapterClass::Discrete => 2,
        };
        let (workgroup, lanes) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "inner", self.0.inner, 4 * lanes)?;
        let mut overrides = self.0.switches();
        let single = f64::from(u8::from(self.0.rows == 1));
        overrides.extend([("WORKGROUP", workgroup.into()), ("LANES", lanes.into()), ("SINGLE", single)]);
        Plan {
            overrides,
            grid: [self.0.cols.div_ceil(4 * workgroup / lanes), self.0.rows.div_ceil(4), self.0.batch],
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 16 * if lanes == 1 { 1 } else { 4 * workgroup },
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
