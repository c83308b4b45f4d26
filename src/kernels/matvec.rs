//! Matrix product for few rows: every weight is read once for up to four rows. Any strides.

use super::{Problem as _, matmul, trips};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matvec",
    source: include_str!("../../shaders/matvec.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES): LANES invocations share a column.
const TUNINGS: &[(u32, u32)] = &[(64, 8), (64, 1), (128, 32), (256, 16)];

/// Most rows that [`crate::attention`] and the decoder give to this kernel and its kind rather than to `matmul`'s.
pub const MOST_ROWS: u32 = 8;

/// The same sizes as `matmul`'s, planned for few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software => 1,
            // Neighbouring columns stand side by side: neighbouring lanes read them.
            _ if self.0.w.row == 1 => 1,
            AdapterClass::Integrated | AdapterClass::Apple => 0,
            AdapterClass::Discrete => 2,
        };
        let (workgroup, lanes) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "inner", self.0.inner, lanes)?;
        let mut overrides = self.0.switches();
        overrides.extend([("WORKGROUP", workgroup.into()), ("LANES", lanes.into())]);
        Plan {
            overrides,
            grid: [self.0.cols.div_ceil(workgroup / lanes), self.0.rows.div_ceil(4), self.0.batch],
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
/// As [`matmul::encode`].
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
