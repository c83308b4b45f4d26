//! Causal attention of many queries over a tile of rebuilt keys and values, with a running softmax.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, narrow, nonzero, product, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{AdapterClass, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_prefill",
    source: include_str!("../../shaders/attention_prefill.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("q"),
        Binding::read("kv"),
        Binding::read("rope_cache"),
        Binding::read("queries"),
        Binding::read("sequences"),
        Binding::write("values"),
        Binding::write("softmax"),
    ],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
};

/// (WORKGROUP, LANES, CHUNK)
const TUNINGS: &[(u32, u32, u32)] = &[(64, 4, 16), (128, 4, 8), (32, 4, 16), (32, 2, 32)];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,
    kv_rows: u32,
    rope_pitch: u32,
    scale: f32,
}

/// A run of consecutive queries of one sequence, at most [`tile_q`] long.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct QueryTile {
    /// Row of the first query in the step's activations.
    pub first_token: u32,
    /// Queries; at least 1.
    pub count: u32,
    /// Position of the first query in its sequence.
    pub position: u32,
    /// Line of the sequence table.
    pub sequence: u32,
}

/// Attention of every query over one key tile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows of `q`.
    pub tokens: u32,
    /// Lines of the query table.
    pub query_tiles: u32,
    /// Lines of the sequence table.
    pub n_sequence: u32,
    /// Query heads.
    pub n_head: u32,
    /// Content part of query and key.
    pub d_nope: u32,
    /// Rotary part.
    pub d_rope: u32,
    /// Value width.
    pub d_value: u32,
    /// First row of the key tile in the step's numbering.
    pub kv_first: u32,
    /// Rows of the key tile.
    pub kv_rows: u32,
    /// Rows of the rope cache.
    pub cache_rows: u32,
    /// Start from the empty state: the first key tile.
    pub first: bool,
    /// Normalise: the last key tile.
    pub last: bool,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// How the rope cache is stored.
    pub storage: Storage,
}

fn setting(context: &PlanContext, tuning: Tuning) -> Result<(u32, u32, u32)> {
    let auto = match context.class {
        AdapterClass::Software => 2,
        AdapterClass::Integrated | AdapterClass::Discrete | AdapterClass::Apple => 0,
    };
    Ok(TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), auto)?])
}

/// Most queries of a [`QueryTile`].
///
/// # Errors
/// A forced tuning that does not exist.
pub fn tile_q(context: &PlanContext, tuning: Tuning) -> Result<u32> {
    let (workgroup, lanes, _) = setting(context, tuning)?;
    Ok(workgroup / lanes)
}

/// Slices of the value width, each with its own (m, l) in the softmax state.
///
/// # Errors
/// A forced tuning that does not exist.
pub fn slices(context: &PlanContext, tuning: Tuning, d_value: u32) -> Result<u32> {
    let (_, lanes, _) = setting(context, tuning)?;
    Ok(d_value.div_ceil(lanes * 16))
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        narrow(SPEC.name, &[("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_value", self.d_value)])?;
        nonzero(SPEC.name, &[("n_head", self.n_head), ("d_value", self.d_value), ("n_sequence", self.n_sequence)])?;
        if self.d_nope == 0 && self.d_rope == 0 {
            return Err(Error::problem(SPEC.name, "d_nope and d_rope are both 0"));
        }
        let (workgroup_size, lanes, chunk) = setting(context, tuning)?;
        let (tile_q, tile_kv, slice) = (workgroup_size / lanes, lanes * 8, lanes * 16);
        let staged = tile_q * (chunk + 1) + tile_kv * (chunk + 1) + tile_q * (tile_kv + 1) + tile_kv * slice;
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("FIRST", flag(self.first)),
                ("LAST", flag(self.last)),
                ("WORKGROUP", workgroup_size.into()),
                ("LANES", lanes.into()),
                ("CHUNK", chunk.into()),
            ],
            grid: [self.query_tiles, self.n_head, self.d_value.div_ceil(slice)],
            workgroup_size,
            workgroup_bytes: 4 * staged,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
    pub q: &'a Region,
    /// `[kv_rows, n_head, d_nope + d_value]` f32: gated and normed where the model says so.
    pub kv: &'a Region,
    /// `[cache_rows, pitch of d_rope]` in `storage`.
    pub rope_cache: &'a Region,
    /// `[query_tiles]` [`QueryTile`].
    pub queries: &'a Region,
    /// `[n_sequence]` [`super::cache_read::SequenceRow`].
    pub sequences: &'a Region,
    /// `[tokens, n_head, d_value]` f32: the running sums, normalised by the last tile.
    pub values: &'a Region,
    /// `[tokens, n_head, slices, 2]` f32: running maximum and sum. lse = m + ln l.
    pub softmax: &'a Region,
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let rope_pitch = p.storage.row_pitch(p.d_rope);
    recording.push(
        &SPEC,
        &plan,
        &Params {
            n_head: p.n_head,
            d_nope: p.d_nope,
            d_rope: p.d_rope,
            d_value: p.d_value,
            kv_first: p.kv_first,
            kv_rows: p.kv_rows,
            rope_pitch,
            scale: p.scale,
        },
        &[
            words(args.q, product(&[p.tokens, p.n_head, p.d_nope + p.d_rope])),
            words(args.kv, product(&[p.kv_rows, p.n_head, p.d_nope + p.d_value])),
            Bound {
                region: args.rope_cache,
                bytes: product(&[p.cache_rows, rope_pitch]).saturating_mul(p.storage.bytes()),
            },
            words(args.queries, product(&[p.query_tiles, 4])),
            words(args.sequences, product(&[p.n_sequence, 4])),
            words(args.values, product(&[p.tokens, p.n_head, p.d_value])),
            words(args.softmax, product(&[p.tokens, p.n_head, plan.grid[2], 2])),
        ],
    )
}
