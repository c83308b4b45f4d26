//! Copy of a buffer, for the memory rate of an adapter.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "roofline_copy",
    source: include_str!("../../shaders/roofline_copy.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("x"), Binding::write("y")],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, EACH)
const TUNINGS: &[(u32, u32)] = &[(256, 1), (256, 4), (64, 16)];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    vectors: u32,
}

/// `y = x` over this many words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// 32-bit words; a multiple of 4.
    pub words: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        if !self.words.is_multiple_of(4) {
            return Err(Error::problem(SPEC.name, format!("{} words, not a multiple of 4", self.words)));
        }
        let (workgroup_size, each) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, 0))?];
        let groups = (self.words / 4).div_ceil(workgroup_size * each);
        Plan {
            overrides: vec![("WORKGROUP", workgroup_size.into()), ("EACH", each.into())],
            grid: fold_grid(SPEC.name, groups.into(), &context.limits)?,
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 0,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch, each `[words]` u32.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// Read.
    pub x: &'a Region,
    /// Written.
    pub y: &'a Region,
}

/// Adds one copy to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or `x` in the buffer of `y`.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let bound = [words(args.x, problem.words.into()), words(args.y, problem.words.into())];
    recording.push(&SPEC, &plan, &Params { vectors: problem.words / 4 }, &bound)
}
