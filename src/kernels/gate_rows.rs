//! Gate rows by token id, to be kept: a pool of recent ids, or a table of the whole vocabulary.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, nonzero, product, trips, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "gate_rows",
    source: include_str!("../../shaders/gate_rows.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("gate_embedding"),
        Binding::read("gate_b_proj"),
        Binding::read("ids"),
        Binding::read("targets"),
        Binding::write("y"),
    ],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// WORKGROUP.
const TUNINGS: &[u32] = &[64, 32, 8];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    rows: u32,
    width: u32,
    pitch: u32,
    y_words: u32,
    first_id: u32,
}

/// Rows to project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Rows.
    pub rows: u32,
    /// Elements of a gate row.
    pub width: u32,
    /// Elements of a table row.
    pub d_gate: u32,
    /// Rows of the table; the caller has checked that every id is below it.
    pub vocab_size: u32,
    /// Id of the first row, where no list of ids is given.
    pub first_id: u32,
    /// A list of ids is given.
    pub ids: bool,
    /// A list of target rows is given.
    pub targets: bool,
    /// Rows of `y`; the caller has checked that every target is below it.
    pub y_rows: u32,
    /// How table and projection are stored.
    pub storage: Storage,
    /// How `y` is stored.
    pub y_storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.width), ("d_gate", self.d_gate)])?;
        trips(SPEC.name, "d_gate", self.d_gate, 4)?;
        if !self.ids && u64::from(self.first_id) + u64::from(self.rows) > u64::from(self.vocab_size) {
            let (first, rows, vocab) = (self.first_id, self.rows, self.vocab_size);
            return Err(Error::problem(SPEC.name, format!("{rows} ids from {first} on, in a vocabulary of {vocab}")));
        }
        if !self.targets && self.rows > self.y_rows {
            return Err(Error::problem(SPEC.name, format!("{} rows into {}", self.rows, self.y_rows)));
        }
        let auto = match context.class {
            AdapterClass::Software => 2,
            _ => 0,
        };
        let workgroup_size = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        let [x, y, _] = fold_grid(SPEC.name, self.rows.div_ceil(4).into(), &context.limits)?;
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("Y_F16", self.y_storage.constant()),
                ("HAS_IDS", flag(self.ids)),
                ("HAS_TARGETS", flag(self.targets)),
                ("WORKGROUP", workgroup_size.into()),
            ],
            grid: [self.y_storage.row_pitch(self.width).div_ceil(4 * workgroup_size), x, y],
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
    /// `[vocab_size, pitch of d_gate]` in `storage`, padded with zeros.
    pub gate_embedding: &'a Region,
    /// `[width, pitch of d_gate]` in `storage`, padded with zeros.
    pub gate_b_proj: &'a Region,
    /// `[rows]` u32, `u32::MAX` to leave a row out; `Kernels::absent` without.
    pub ids: &'a Region,
    /// `[rows]` u32; `Kernels::absent` without.
    pub targets: &'a Region,
    /// `[y_rows, pitch of width]` in `y_storage`, written.
    pub y: &'a Region,
}

/// Adds one projection to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let (pitch, y_pitch) = (p.storage.row_pitch(p.d_gate), p.y_storage.row_pitch(p.width));
    let stored = |region, extents: &[u32]| Bound { region, bytes: product(extents).saturating_mul(p.storage.bytes()) };
    let list = |region, on: bool| words(region, if on { p.rows.into() } else { 0 });
    recording.push(
        &SPEC,
        &plan,
        &Params {
            rows: p.rows,
            width: p.width,
            pitch: p.storage.row_loads(p.d_gate),
            y_words: y_pitch / (4 / p.y_storage.bytes() as u32),
            first_id: p.first_id,
        },
        &[
            stored(args.gate_embedding, &[p.vocab_size, pitch]),
            stored(args.gate_b_proj, &[p.width, pitch]),
            list(args.ids, p.ids),
            list(args.targets, p.targets),
            Bound { region: args.y, bytes: product(&[p.y_rows, y_pitch]).saturating_mul(p.y_storage.bytes()) },
        ],
    )
}
