//! Joins the splits of every query.

use bytemuck::{Pod, Zeroable};

use super::norm::ROW_WORKGROUPS;
use super::{Problem as _, nonzero, product, trips, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_merge",
    source: include_str!("../../shaders/attention_merge.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("partial_values"),
        Binding::read("partial_softmax"),
        Binding::read("ranges"),
        Binding::write("values"),
        Binding::write("lse"),
    ],
    params_size: size_of::<Params>(),
    tunings: ROW_WORKGROUPS.len(),
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
    width: u32,
}

/// Splits to join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Queries.
    pub tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Value width, or latent width of the absorbed path.
    pub width: u32,
    /// Splits of all queries.
    pub splits: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("n_head", self.n_head), ("width", self.width)])?;
        let workgroup_size =
            ROW_WORKGROUPS[tuning.choose(SPEC.name, ROW_WORKGROUPS.len(), context.auto(SPEC.name, 0))?];
        trips(SPEC.name, "width", self.width, workgroup_size)?;
        Plan {
            overrides: vec![("WORKGROUP", workgroup_size.into())],
            grid: fold_grid(SPEC.name, product(&[self.tokens, self.n_head]), &context.limits)?,
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 0,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[splits, n_head, width]` f32.
    pub partial_values: &'a Region,
    /// `[splits, n_head, 2]` f32 (m, l).
    pub partial_softmax: &'a Region,
    /// `[tokens, 2]` u32: first split and splits of each query.
    pub ranges: &'a Region,
    /// `[tokens, n_head, width]` f32, written; 0 for a query without any key.
    pub values: &'a Region,
    /// `[tokens, n_head]` f32, natural log of the sum of exponentials; the lowest f32 for a query without any key.
    pub lse: &'a Region,
}

/// Adds one merge to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { tokens, n_head, width, splits } = *problem;
    recording.push(
        &SPEC,
        &plan,
        &Params { tokens, n_head, width },
        &[
            words(args.partial_values, product(&[splits, n_head, width])),
            words(args.partial_softmax, product(&[splits, n_head, 2])),
            words(args.ranges, product(&[tokens, 2])),
            words(args.values, product(&[tokens, n_head, width])),
            words(args.lse, product(&[tokens, n_head])),
        ],
    )
}
