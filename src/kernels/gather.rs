//! Rows of an embedding table by token id.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, nonzero, product, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Storage, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "gather",
    source: include_str!("../../shaders/gather.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("table"), Binding::read("ids"), Binding::write("y")],
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
    rows: u32,
    width: u32,
    table_row: u32,
}

/// Rows to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Ids.
    pub rows: u32,
    /// Width of a table row.
    pub width: u32,
    /// Elements from one row of the table to the next.
    pub table_row: u32,
    /// Rows of the table; the caller has checked that every id is below it.
    pub vocab_size: u32,
    /// How the table is stored.
    pub storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.width), ("vocab_size", self.vocab_size)])?;
        if self.table_row < self.width {
            let (row, width) = (self.table_row, self.width);
            return Err(Error::problem(SPEC.name, format!("rows of {width} elements begin every {row}")));
        }
        let overrides = vec![("STORAGE_F16", self.storage.constant())];
        linear_plan(SPEC.name, product(&[self.rows, self.width]), overrides, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[vocab_size, table_row]` in `storage`.
    pub table: &'a Region,
    /// `[rows]` u32; `u32::MAX` for a row of zeros.
    pub ids: &'a Region,
    /// `[rows, width]` f32, written.
    pub y: &'a Region,
}

/// Adds one look-up to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or a table over the device's binding limit.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { rows, width, table_row, vocab_size, storage } = *problem;
    let table = Bound { region: args.table, bytes: product(&[vocab_size, table_row]).saturating_mul(storage.bytes()) };
    let y = words(args.y, product(&[rows, width]));
    recording.push(&SPEC, &plan, &Params { rows, width, table_row }, &[table, words(args.ids, rows.into()), y])
}
