//! The embedding gate of EG-MLA: activation, modulation, norm, and the norm's statistics.

use bytemuck::{Pod, Zeroable};

use super::norm::ROW_WORKGROUPS;
use super::{Problem as _, flag, gate_vec4, nonzero, product, trips, words};
use crate::config::{Activation, GateNorm};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "gate",
    source: include_str!("../../shaders/gate.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("x"),
        Binding::read("g"),
        Binding::read("weight"),
        Binding::read("bias"),
        Binding::read("slots"),
        Binding::write("y"),
        Binding::write("statistics"),
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
    rows: u32,
    width: u32,
    x_offset: u32,
    x_row: u32,
    eps: f32,
}

/// Rows to gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows.
    pub rows: u32,
    /// Elements that the gate and its norm span.
    pub width: u32,
    /// First element of `x`.
    pub x_offset: u32,
    /// From one row of `x` to the next.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Applied to `g`.
    pub activation: Activation,
    /// Applied to the product.
    pub norm: GateNorm,
    /// Rows of the statistics buffer; 0 when none are written.
    pub statistics_rows: u32,
    /// How weight and bias are stored.
    pub storage: Storage,
}

impl Problem {
    /// Whether every row of every tensor is a whole number of 16-byte loads that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        [self.x_offset, self.x_row].iter().all(|step| step.is_multiple_of(4))
            && self.width.is_multiple_of(16 / self.storage.bytes() as u32)
    }

    pub(super) fn switches(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("STORAGE_F16", self.storage.constant()),
            ("ACTIVATION", f64::from(self.activation as u32)),
            ("NORM", f64::from(self.norm as u32)),
            ("WRITE_STATISTICS", flag(self.statistics_rows > 0)),
        ]
    }

    pub(super) fn params(&self) -> Params {
        let Problem { rows, width, x_offset, x_row, eps, .. } = *self;
        Params { rows, width, x_offset, x_row, eps }
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 7] {
        let Problem { rows, width, norm, statistics_rows, storage, .. } = *self;
        let x_end = u64::from(self.x_offset) + product(&[rows.saturating_sub(1), self.x_row]) + u64::from(width);
        // A binding of 16-byte elements holds one at least, be it unused.
        let least = if self.in_vec4() { 16 } else { 0 };
        let stored =
            |region, on: bool| Bound { region, bytes: if on { u64::from(width) * storage.bytes() } else { least } };
        let all = product(&[rows, width]);
        [
            words(args.x, x_end),
            words(args.g, all),
            stored(args.weight, norm != GateNorm::None),
            stored(args.bias, norm == GateNorm::LayerNorm),
            words(args.slots, if statistics_rows > 0 { rows.into() } else { 0 }),
            words(args.y, all),
            words(args.statistics, 2 * u64::from(statistics_rows)),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.width)])?;
        let workgroup_size =
            ROW_WORKGROUPS[tuning.choose(SPEC.name, ROW_WORKGROUPS.len(), context.auto(SPEC.name, 0))?];
        trips(SPEC.name, "width", self.width, workgroup_size)?;
        let mut overrides = self.switches();
        overrides.push(("WORKGROUP", workgroup_size.into()));
        Plan {
            overrides,
            grid: fold_grid(SPEC.name, self.rows.into(), &context.limits)?,
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 4 * workgroup_size,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32, rows as in [`Problem`]: keys and values, or latents.
    pub x: &'a Region,
    /// `[rows, width]` f32: the projected gate before its activation.
    pub g: &'a Region,
    /// `[width]` in `storage`; `Kernels::absent` without a norm.
    pub weight: &'a Region,
    /// `[width]` in `storage`; `Kernels::absent` unless the norm is `layer_norm`.
    pub bias: &'a Region,
    /// `[rows]` u32: the statistics row of each row, `u32::MAX` for none; `Kernels::absent` without statistics.
    pub slots: &'a Region,
    /// `[rows, width]` f32, written.
    pub y: &'a Region,
    /// `[statistics_rows, 2]` f32 (μ, ρ), written at the slots; `Kernels::sink` without statistics.
    pub statistics: &'a Region,
}

/// Adds one gate to a recording: with [`gate_vec4`] where the operands are [`Problem::in_vec4`] and no setting of this kernel
/// is forced.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    if tuning == Tuning::Auto && problem.in_vec4() {
        return gate_vec4::encode(recording, &gate_vec4::Problem(*problem), args, tuning);
    }
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(), &problem.bound(&args))
}
