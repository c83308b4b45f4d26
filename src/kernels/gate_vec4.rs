//! [`super::gate`] in 16-byte loads and stores.

use super::norm_vec4::row_lanes;
use super::{Problem as _, flag, gate, nonzero, trips};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning, fold_grid};

pub use super::gate::{Args, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "gate_vec4",
    source: include_str!("../../shaders/gate_vec4.wgsl"),
    bindings: gate::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES, ROWS): those of `norm_vec4`, then several rows an invocation.
const TUNINGS: &[(u32, u32, u32)] = &[(8, 1, 1), (64, 16, 1), (64, 64, 1), (256, 256, 1), (8, 1, 4)];

/// From this many rows on an invocation takes several: enough workgroups are left for every core.
const MANY_ROWS: u32 = 512;

/// The same sizes as `gate`'s, for operands that are [`gate::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub gate::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.0.width)])?;
        if !self.0.in_vec4() {
            return Err(Error::problem(SPEC.name, "rows must be whole 16-byte loads on 16-byte boundaries"));
        }
        let software = context.class == AdapterClass::Software;
        let auto = if software && self.0.rows >= MANY_ROWS { 4 } else { row_lanes(context, self.0.width) };
        let (workgroup, lanes, rows) =
            TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "width", self.0.width, 4 * lanes)?;
        let mut overrides = self.0.switches();
        overrides.extend([
            ("WORKGROUP", workgroup.into()),
            ("LANES", lanes.into()),
            ("ROWS", rows.into()),
            // A GPU has the row in its cache and arithmetic to spare.
            ("STASH", flag(software)),
        ]);
        let each = workgroup / lanes * rows;
        Plan {
            overrides,
            grid: fold_grid(SPEC.name, self.0.rows.div_ceil(each).into(), &context.limits)?,
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 16 * if lanes == 1 { 1 } else { workgroup },
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Adds one gate to a recording.
///
/// # Errors
/// As [`gate::encode`], and operands that do not suit 16-byte loads.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(), &problem.0.bound(&args))
}
