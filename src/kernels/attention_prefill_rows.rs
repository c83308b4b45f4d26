//! [`super::attention_prefill`] for any widths: the same problem, arguments, query tiles and state.

use super::attention_prefill::{Args, Params, SLICE, TUNINGS, setting, tile_q};
use super::{Problem as _, attention_prefill};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_prefill_rows",
    source: include_str!("../../shaders/attention_prefill_rows.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("q"),
        Binding::read("kv"),
        Binding::read("rope_cache"),
        Binding::read("queries"),
        Binding::read("sequences"),
        Binding::write("values"),
        Binding::write("softmax"),
    ],
    params_size: size_of::<Params>(),
    // The query tiles of attention_prefill, one setting for each of its.
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Queries of an invocation.
const ROWS: u32 = 8;

/// The same problem.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_prefill::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate(SPEC.name)?;
        tuning.choose(SPEC.name, SPEC.tunings, setting(context, Tuning::Auto)?)?;
        let workgroup_size = tile_q(context, tuning)?.div_ceil(ROWS);
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.0.storage.constant()),
                ("WORKGROUP", workgroup_size.into()),
                ("SLICE", SLICE.into()),
            ],
            grid: [self.0.query_tiles, self.0.n_head, self.0.d_value.div_ceil(SLICE)],
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 0,
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args))
}
