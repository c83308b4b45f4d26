//! Residual connection, in place.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "residual_add",
    source: include_str!("../../shaders/residual_add.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("delta"), Binding::write("stream")],
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
    elements: u32,
}

/// `stream += delta` over this many elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Elements.
    pub elements: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        linear_plan(SPEC.name, self.elements.into(), Vec::new(), context, tuning)
    }
}

/// Buffers of one dispatch, each `[elements]` f32.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// Added.
    pub delta: &'a Region,
    /// Read and written.
    pub stream: &'a Region,
}

/// Adds one residual connection to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or `delta` in the buffer of `stream`.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let elements = u64::from(problem.elements);
    let bound = [words(args.delta, elements), words(args.stream, elements)];
    recording.push(&SPEC, &plan, &Params { elements: problem.elements }, &bound)
}
