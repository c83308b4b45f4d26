//! Writes single words: what one step changes in the group lists of a cache.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "word_scatter",
    source: include_str!("../../shaders/word_scatter.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("patches"), Binding::write("words")],
    params_size: size_of::<Params>(),
    tunings: LINEAR_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    count: u32,
}

/// Words to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Patches.
    pub count: u32,
    /// Words of the buffer; the caller has checked that every patch is below it.
    pub words: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        linear_plan(SPEC.name, self.count.into(), Vec::new(), context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[count, 2]` u32: word and value.
    pub patches: &'a Region,
    /// `[words]` u32, written at the patches.
    pub words: &'a Region,
}

/// Adds one scatter to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { count, words: of_buffer } = *problem;
    let bound = [words(args.patches, 2 * u64::from(count)), words(args.words, of_buffer.into())];
    recording.push(&SPEC, &plan, &Params { count }, &bound)
}
