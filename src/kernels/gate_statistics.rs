//! Statistics of the gate's norm for new tokens: what the grouped decode needs of their keys and values.

use bytemuck::{Pod, Zeroable};

use super::norm_vec4::{ROW_LANES, row_lanes};
use super::{MOST_TRIPS, Problem as _, attention_grouped, nonzero, product, trips, words};
use crate::config::{Activation, GateNorm};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "gate_statistics",
    source: include_str!("../../shaders/gate_statistics.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("kv"),
        Binding::read("gates"),
        Binding::read("gates_more"),
        Binding::read("rows"),
        Binding::read("slots"),
        Binding::write("statistics"),
    ],
    params_size: size_of::<Params>(),
    tunings: ROW_LANES.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Index into [`ROW_LANES`]: 64 invocations a row.
const WIDE: usize = 2;

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    tokens: u32,
    width: u32,
    gate_pitch: u32,
    more_pitch: u32,
    resident: u32,
    more_first: u32,
    eps: f32,
}

/// Tokens to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// New tokens.
    pub tokens: u32,
    /// Elements that the norm spans.
    pub width: u32,
    /// Rows of `gates`; further rows are those of `gates_more`.
    pub resident: u32,
    /// Rows of `gates_more` that are bound.
    pub more: u32,
    /// Row of `gates_more` of the first token.
    pub more_first: u32,
    /// Rows of the cache.
    pub cache_rows: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Applied to the gate rows.
    pub activation: Activation,
    /// `layer_norm` or `rms_norm`: without a norm there are no statistics.
    pub norm: GateNorm,
    /// How `gates` is stored.
    pub storage: Storage,
    /// How `gates_more` is stored.
    pub more_storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.width)])?;
        if self.norm == GateNorm::None {
            return Err(Error::problem(SPEC.name, "there are no statistics without a norm"));
        }
        // One invocation walks a row alone where that is fast, unless its loop would be too long.
        let auto = match row_lanes(context, self.width) {
            0 if self.width > MOST_TRIPS => WIDE,
            other => other,
        };
        let auto = context.auto(SPEC.name, auto);
        let (workgroup, lanes) = ROW_LANES[tuning.choose(SPEC.name, ROW_LANES.len(), auto)?];
        trips(SPEC.name, "width", self.width, lanes)?;
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("MORE_F16", self.more_storage.constant()),
                ("SOURCES", attention_grouped::sources(self.resident, self.more)),
                ("ACTIVATION", f64::from(self.activation as u32)),
                ("NORM", f64::from(self.norm as u32)),
                ("WORKGROUP", workgroup.into()),
                ("LANES", lanes.into()),
            ],
            grid: fold_grid(SPEC.name, self.tokens.div_ceil(workgroup / lanes).into(), &context.limits)?,
            tiles: [0; 3],
            workgroup_size: workgroup,
            workgroup_bytes: 16 * if lanes == 1 { 1 } else { workgroup },
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, width]` f32: keys and values before the gate.
    pub kv: &'a Region,
    /// `[resident, pitch of width]` in `storage`: gate rows before their activation.
    pub gates: &'a Region,
    /// `[more, pitch of width]` in `more_storage`.
    pub gates_more: &'a Region,
    /// `[tokens]` u32 gate rows; `u32::MAX` for row `more_first + t` of `gates_more`.
    pub rows: &'a Region,
    /// `[tokens]` u32 rows of the cache.
    pub slots: &'a Region,
    /// `[cache_rows, 2]` f32 (μ, ρ), written at the slots.
    pub statistics: &'a Region,
}

/// Adds the statistics of new tokens to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let (gate_pitch, more_pitch) = (p.storage.row_pitch(p.width), p.more_storage.row_pitch(p.width));
    let stored = |region, rows: u32, pitch: u32, storage: Storage| Bound {
        region,
        bytes: product(&[rows, pitch]).saturating_mul(storage.bytes()),
    };
    recording.push(
        &SPEC,
        &plan,
        &Params {
            tokens: p.tokens,
            width: p.width,
            gate_pitch,
            more_pitch,
            resident: p.resident,
            more_first: p.more_first,
            eps: p.eps,
        },
        &[
            words(args.kv, product(&[p.tokens, p.width])),
            stored(args.gates, p.resident, gate_pitch, p.storage),
            stored(args.gates_more, p.more, more_pitch, p.more_storage),
            words(args.rows, p.tokens.into()),
            words(args.slots, p.tokens.into()),
            words(args.statistics, product(&[p.cache_rows, 2])),
        ],
    )
}
