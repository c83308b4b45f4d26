//! [`super::norm`] in 16-byte loads and stores.

use super::{Problem as _, norm, trips};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning, fold_grid};

pub use super::norm::{Args, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "norm_vec4",
    source: include_str!("../../shaders/norm_vec4.wgsl"),
    bindings: norm::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: ROW_LANES.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES) of the kernels whose invocations share a row in 16-byte loads; powers of two, as putting the parts of a
/// row together needs.
pub(super) const ROW_LANES: &[(u32, u32)] = &[(8, 1), (64, 16), (64, 64), (256, 256)];

/// Index into [`ROW_LANES`]: on a CPU every lane of a vector has a row of its own and nothing is put together; on a GPU
/// an invocation has a few loads.
pub(super) fn row_lanes(context: &PlanContext, width: u32) -> usize {
    match (context.class, width) {
        (AdapterClass::Software, _) => 0,
        (_, 0..256) => 1,
        (_, 256..2048) => 2,
        (_, 2048..) => 3,
    }
}

/// The same sizes as `norm`'s, for operands that are [`norm::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub norm::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate(SPEC.name)?;
        if !self.0.in_vec4() {
            return Err(Error::problem(SPEC.name, "segments must be whole 16-byte loads on 16-byte boundaries"));
        }
        let auto = row_lanes(context, self.0.width.max(self.0.second));
        let (workgroup, lanes) = ROW_LANES[tuning.choose(SPEC.name, ROW_LANES.len(), context.auto(SPEC.name, auto))?];
        [("width", self.0.width), ("second", self.0.second)]
            .into_iter()
            .try_for_each(|(name, width)| trips(SPEC.name, name, width, 4 * lanes))?;
        let mut overrides = self.0.switches();
        overrides.extend([("WORKGROUP", workgroup.into()), ("LANES", lanes.into())]);
        let each = u64::from(workgroup / lanes);
        Plan {
            overrides,
            grid: fold_grid(SPEC.name, self.0.segments().div_ceil(each), &context.limits)?,
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 16 * if lanes == 1 { 1 } else { workgroup },
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Adds one norm to a recording.
///
/// # Errors
/// As [`norm::encode`], and operands that do not suit 16-byte loads.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(), &problem.0.bound(&args))
}
