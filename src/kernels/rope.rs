//! Rotary position embedding, in place.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, product, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "rope",
    source: include_str!("../../shaders/rope.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("rotations"), Binding::write("values")],
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
    tokens: u32,
    n_head: u32,
    d_rope: u32,
    offset: u32,
    token_stride: u32,
    head_stride: u32,
}

/// What to rotate, in elements of `values`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Rows.
    pub tokens: u32,
    /// Heads of a row; 1 for the shared key.
    pub n_head: u32,
    /// Elements of a head that are rotated; even, may be 0.
    pub d_rope: u32,
    /// First element that is rotated.
    pub offset: u32,
    /// From one row to the next.
    pub token_stride: u32,
    /// From one head to the next.
    pub head_stride: u32,
    /// Pairs (2i, 2i+1) when true, (i, i + d_rope/2) when false.
    pub interleave: bool,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        if !self.d_rope.is_multiple_of(2) {
            return Err(Error::problem(SPEC.name, format!("d_rope is {}, must be even", self.d_rope)));
        }
        let elements = product(&[self.tokens, self.n_head, self.d_rope / 2]);
        linear_plan(SPEC.name, elements, vec![("INTERLEAVE", flag(self.interleave))], context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair, YaRN's amplitude included.
    pub rotations: &'a Region,
    /// f32, rotated in place.
    pub values: &'a Region,
}

/// Adds one rotation to a recording; nothing when `d_rope` is 0.
///
/// # Errors
/// What the plan refuses, or a region that is too small.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { tokens, n_head, d_rope, offset, token_stride, head_stride, .. } = *problem;
    let end = u64::from(offset)
        .saturating_add(product(&[tokens.saturating_sub(1), token_stride]))
        .saturating_add(product(&[n_head.saturating_sub(1), head_stride]))
        .saturating_add(d_rope.into());
    recording.push(
        &SPEC,
        &plan,
        &Params { tokens, n_head, d_rope, offset, token_stride, head_stride },
        &[words(args.rotations, product(&[tokens, d_rope])), words(args.values, end)],
    )
}
