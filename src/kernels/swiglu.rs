//! The inner product of a SwiGLU.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "swiglu",
    source: include_str!("../../shaders/swiglu.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("gate"), Binding::read("up"), Binding::write("y")],
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

/// `y = silu(gate) ⊙ up` over this many elements.
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
    /// Goes through silu.
    pub gate: &'a Region,
    /// Its factor.
    pub up: &'a Region,
    /// Written.
    pub y: &'a Region,
}

/// Adds one SwiGLU product to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let elements = u64::from(problem.elements);
    let bound = [words(args.gate, elements), words(args.up, elements), words(args.y, elements)];
    recording.push(&SPEC, &plan, &Params { elements: problem.elements }, &bound)
}
