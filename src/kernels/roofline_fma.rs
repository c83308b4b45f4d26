//! Multiply-adds in registers, for the f32 rate of an adapter.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, trips, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "roofline_fma",
    source: include_str!("../../shaders/roofline_fma.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("x"), Binding::write("y")],
    params_size: size_of::<Params>(),
    tunings: LINEAR_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Multiply-adds of a trip: four on each of twelve chains.
pub const FMA_PER_TRIP: u32 = 48;

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    elements: u32,
    trips: u32,
    a: f32,
    b: f32,
}

/// Twelve chains of `4 · trips` steps `z ← a · z + b` for every element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Elements.
    pub elements: u32,
    /// Trips of the loop.
    pub trips: u32,
    /// Factor of a step; below 1 in size, or the chains grow without bound.
    pub a: f32,
    /// Summand of a step.
    pub b: f32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        trips(SPEC.name, "trips", self.trips, 1)?;
        linear_plan(SPEC.name, self.elements.into(), Vec::new(), context, tuning)
    }
}

/// Buffers of one dispatch, each `[elements]` f32.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// Where the chains begin.
    pub x: &'a Region,
    /// Their sums, written.
    pub y: &'a Region,
}

/// Adds one dispatch to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or `x` in the buffer of `y`.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { elements, trips, a, b } = *problem;
    let bound = [words(args.x, elements.into()), words(args.y, elements.into())];
    recording.push(&SPEC, &plan, &Params { elements, trips, a, b }, &bound)
}
