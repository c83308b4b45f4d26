//! Causal attention of many queries over a tile of rebuilt keys and values, with a running softmax.
//!
//! The shader reads and writes 16 bytes at once. [`encode`] hands widths that are not multiples of 4 to
//! [`super::attention_prefill_rows`], which has the same meaning, query tiles and state.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, attention_prefill_rows, narrow, nonzero, product, trips, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning};

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
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (ROWS, CHUNK, VALUE_ROWS): 8 lanes share 4 queries, ROWS times.
pub(super) const TUNINGS: &[(u32, u32, u32)] = &[(8, 8, 16), (16, 4, 8), (4, 8, 8)];

/// Lanes that share a row of 4 queries.
const LANES: u32 = 8;

/// Keys of a block.
const TILE_KV: u32 = 32;

/// Keys of a trip of `attention_prefill_rows`; the other kernels take as many or more.
const LEAST_KEYS: u32 = 16;

/// Value columns of a workgroup: 8 lanes of 4 times 4.
pub(super) const SLICE: u32 = 128;

/// Uniform parameters, as in the shader; `attention_prefill_rows` has the same.
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
    first: u32,
    last: u32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
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

/// Index into [`TUNINGS`].
pub(super) fn setting(context: &PlanContext, tuning: Tuning) -> Result<usize> {
    let auto = match context.class {
        AdapterClass::Discrete => 1,
        AdapterClass::Software | AdapterClass::Integrated | AdapterClass::Apple => 0,
    };
    tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))
}

/// Most queries of a [`QueryTile`].
///
/// # Errors
/// A forced tuning that does not exist.
pub fn tile_q(context: &PlanContext, tuning: Tuning) -> Result<u32> {
    Ok(TUNINGS[setting(context, tuning)?].0 * 4)
}

/// Slices of the value width, each with its own (m, l) in the softmax state.
///
/// # Errors
/// A forced tuning that does not exist.
pub fn slices(context: &PlanContext, tuning: Tuning, d_value: u32) -> Result<u32> {
    setting(context, tuning)?;
    Ok(d_value.div_ceil(SLICE))
}

impl Problem {
    /// Whether every row of every tensor begins on a 16-byte boundary.
    pub fn aligned(&self) -> bool {
        [self.d_nope, self.d_rope, self.d_value].iter().all(|width| width.is_multiple_of(4))
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        narrow(kernel, &[("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_value", self.d_value)])?;
        nonzero(kernel, &[("n_head", self.n_head), ("d_value", self.d_value), ("n_sequence", self.n_sequence)])?;
        // The fewest keys that one of the kernels takes in a trip.
        trips(kernel, "kv_rows", self.kv_rows, LEAST_KEYS)?;
        if self.d_nope == 0 && self.d_rope == 0 {
            return Err(Error::problem(kernel, "d_nope and d_rope are both 0"));
        }
        Ok(())
    }

    pub(super) fn validate_aligned(&self, kernel: &'static str) -> Result<()> {
        self.validate(kernel)?;
        if self.aligned() {
            return Ok(());
        }
        let Problem { d_nope, d_rope, d_value, .. } = self;
        let widths = format!("d_nope {d_nope}, d_rope {d_rope} and d_value {d_value} must be multiples of 4");
        Err(Error::problem(kernel, widths))
    }

    pub(super) fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            kv_first: self.kv_first,
            kv_rows: self.kv_rows,
            rope_pitch: self.storage.row_pitch(self.d_rope),
            scale: self.scale,
            first: self.first.into(),
            last: self.last.into(),
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 7] {
        let rope_pitch = self.storage.row_pitch(self.d_rope);
        // A binding of 16-byte elements holds one at least, be it unused.
        let least = if self.aligned() { 16 } else { 0 };
        [
            words(args.q, product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            words(args.kv, product(&[self.kv_rows, self.n_head, self.d_nope + self.d_value]).max(least / 4)),
            Bound {
                region: args.rope_cache,
                bytes: product(&[self.cache_rows, rope_pitch]).saturating_mul(self.storage.bytes()).max(least),
            },
            words(args.queries, product(&[self.query_tiles, 4])),
            words(args.sequences, product(&[self.n_sequence, 4])),
            words(args.values, product(&[self.tokens, self.n_head, self.d_value])),
            words(args.softmax, product(&[self.tokens, self.n_head, self.d_value.div_ceil(SLICE), 2])),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate_aligned(SPEC.name)?;
        let (rows, chunk, value_rows) = TUNINGS[setting(context, tuning)?];
        let columns = self.d_value.min(SLICE).div_ceil(LANES * 4);
        let staged = (rows * 4 + TILE_KV) * (chunk + 1) + TILE_KV * (rows + 1);
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("ROWS", rows.into()),
                ("CHUNK", chunk.into()),
                ("VALUE_ROWS", value_rows.into()),
                ("COLUMNS", columns.into()),
            ],
            grid: [self.query_tiles, self.n_head, self.d_value.div_ceil(SLICE)],
            tiles: [0; 3],
            workgroup_size: rows * LANES,
            workgroup_bytes: 16 * staged,
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
    pub q: &'a Region,
    /// `[kv_rows, n_head, d_nope + d_value]` f32: gated and normed where the model says so.
    pub kv: &'a Region,
    /// `[cache_rows, pitch of d_rope]` in `storage`; without `d_rope` any region of 16 bytes.
    pub rope_cache: &'a Region,
    /// `[query_tiles]` [`QueryTile`].
    pub queries: &'a Region,
    /// `[n_sequence]` [`super::cache_read::SequenceRow`].
    pub sequences: &'a Region,
    /// `[tokens, n_head, d_value]` f32: the running sums, normalised by the last tile.
    pub values: &'a Region,
    /// `[tokens, n_head, slices, 2]` f32, of [`slices`]: running maximum and sum. lse = m + ln l.
    pub softmax: &'a Region,
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    if !problem.aligned() {
        return attention_prefill_rows::encode(recording, &attention_prefill_rows::Problem(*problem), args, tuning);
    }
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(&plan), &problem.bound(&args))
}
