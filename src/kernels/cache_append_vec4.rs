//! [`super::cache_append`] in 16-byte loads and stores.

use super::{Problem as _, cache_append, flag, product};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning, fold_grid};

pub use super::cache_append::{Args, Params, Queries};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "cache_append_vec4",
    source: include_str!("../../shaders/cache_append_vec4.wgsl"),
    bindings: cache_append::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES): LANES invocations share a row.
const TUNINGS: &[(u32, u32)] = &[(8, 1), (64, 16), (256, 16)];

/// The same sizes as `cache_append`'s, for operands that are [`cache_append::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub cache_append::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate(SPEC.name)?;
        if !self.0.in_vec4() {
            return Err(Error::problem(SPEC.name, "rows must be whole 16-byte loads on 16-byte boundaries"));
        }
        let software = context.class == AdapterClass::Software;
        let auto = if software { 0 } else { 1 };
        let (workgroup, lanes) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        // Tokens, then heads of tokens; indices have 32 bits, and a folded grid overshoots.
        let rows = u64::from(self.0.tokens).saturating_add(product(&[self.0.tokens, self.0.rotated_heads()]));
        if rows >= 1 << 31 {
            return Err(Error::problem(SPEC.name, format!("{rows} rows, must be below 2^31")));
        }
        let mut overrides = self.0.switches();
        overrides.extend([("WORKGROUP", workgroup.into()), ("LANES", lanes.into()), ("INTEGERS", flag(software))]);
        Plan {
            overrides,
            grid: fold_grid(SPEC.name, rows.div_ceil((workgroup / lanes).into()), &context.limits)?,
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 0,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Adds one append to a recording.
///
/// # Errors
/// As [`cache_append::encode`], and operands that do not suit 16-byte loads.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(), &problem.0.bound(&args))
}
