//! Token ids whose gate rows a pass has to project: groups, then new tokens, where no resident row holds them.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, nonzero, words};
use crate::error::Result;
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "group_ids",
    source: include_str!("../../shaders/group_ids.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("token_ids"),
        Binding::read("token_rows"),
        Binding::read("lists"),
        Binding::write("ids"),
    ],
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
    first_row: u32,
    rows: u32,
    n_sequence: u32,
    table: u32,
}

/// Ids to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// New tokens.
    pub tokens: u32,
    /// First group, in the step's numbering.
    pub first_row: u32,
    /// Groups.
    pub rows: u32,
    /// Lines of the sequence table.
    pub n_sequence: u32,
    /// Word of the sequence table in `lists`.
    pub table: u32,
    /// Words of `lists`.
    pub list_words: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("n_sequence", self.n_sequence)])?;
        linear_plan(SPEC.name, u64::from(self.tokens) + u64::from(self.rows), Vec::new(), context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens]` u32.
    pub token_ids: &'a Region,
    /// `[tokens]` u32 resident gate rows, `u32::MAX` for none.
    pub token_rows: &'a Region,
    /// Group lists and sequence table.
    pub lists: &'a Region,
    /// `[rows + tokens]` u32, written.
    pub ids: &'a Region,
}

/// Adds one list to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { tokens, first_row, rows, n_sequence, table, list_words } = *problem;
    let bound = [
        words(args.token_ids, tokens.into()),
        words(args.token_rows, tokens.into()),
        words(args.lists, list_words.into()),
        words(args.ids, u64::from(rows) + u64::from(tokens)),
    ];
    recording.push(&SPEC, &plan, &Params { tokens, first_row, rows, n_sequence, table }, &bound)
}
