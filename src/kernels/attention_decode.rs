//! Attention of one query per sequence over rebuilt or cached keys and values, split over the cache.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, narrow, nonzero, product, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning, padded};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_decode",
    source: include_str!("../../shaders/attention_decode.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("q"),
        Binding::read("kv"),
        Binding::read("rope_cache"),
        Binding::read("sequences"),
        Binding::write("partial_values"),
        Binding::write("partial_softmax"),
    ],
    params_size: size_of::<Params>(),
    tunings: WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Rows of the cache that one workgroup attends to, here and in `attention_absorbed`.
pub const SPLIT: u32 = 256;

const WORKGROUPS: &[u32] = &[64, 128, 256];

/// One line of the sequence table of a decode step: [`super::cache_read::SequenceRow`], and where results go.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct DecodeSequence {
    /// First row in the step's numbering, a multiple of [`SPLIT`].
    pub first_row: u32,
    /// Cache row of position 0.
    pub first_slot: u32,
    /// Tokens, those of this step included.
    pub length: u32,
    /// Row of the sequence's first query token in the step's activations.
    pub token: u32,
    /// Query tokens: each sees those before it.
    pub tokens: u32,
    /// First partial result: query token i's split s is partial result `partial + i · splits + s`.
    pub partial: u32,
    /// Splits of the sequence.
    pub splits: u32,
    /// Fills the line up.
    pub unused: u32,
}

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,
    n_sequence: u32,
    rope_pitch: u32,
    scale: f32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

/// Attention over one tile of keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows of `q`.
    pub tokens: u32,
    /// Most query tokens of a sequence.
    pub most_tokens: u32,
    /// Partial results: splits times query tokens, summed over the sequences.
    pub partials: u32,
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
    /// First row of the key tile in the step's numbering; a multiple of [`SPLIT`].
    pub kv_first: u32,
    /// Rows of the key tile; a multiple of [`SPLIT`].
    pub kv_rows: u32,
    /// Rows of the rope cache.
    pub cache_rows: u32,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// How the rope cache is stored.
    pub storage: Storage,
    /// How keys and values are stored.
    pub kv_storage: Storage,
}

impl Problem {
    /// Whether every row is a whole number of 16-byte loads.
    pub fn in_vec4(&self) -> bool {
        let load = |storage: Storage| 16 / storage.bytes() as u32;
        let of_kv = [self.d_nope, self.d_value].iter().all(|width| width.is_multiple_of(load(self.kv_storage)));
        of_kv && self.d_rope.is_multiple_of(load(self.storage))
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        narrow(kernel, &[("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_value", self.d_value)])?;
        nonzero(kernel, &[("n_head", self.n_head), ("d_value", self.d_value), ("n_sequence", self.n_sequence)])?;
        for (what, rows) in [("kv_first", self.kv_first), ("kv_rows", self.kv_rows)] {
            if !rows.is_multiple_of(SPLIT) {
                return Err(Error::problem(kernel, format!("{what} is {rows}, not a multiple of {SPLIT}")));
            }
        }
        Ok(())
    }

    pub(super) fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            kv_first: self.kv_first,
            n_sequence: self.n_sequence,
            rope_pitch: self.storage.row_pitch(self.d_rope),
            scale: self.scale,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    /// The bindings, in which a rope cache that is not read takes `least` bytes.
    pub(super) fn bound<'a>(&self, args: &Args<'a>, least: u64) -> [Bound<'a>; 6] {
        let rope = product(&[self.cache_rows, self.storage.row_pitch(self.d_rope)]);
        let kv = product(&[self.kv_rows, self.n_head, self.d_nope + self.d_value]);
        [
            words(args.q, product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            Bound { region: args.kv, bytes: padded(kv.saturating_mul(self.kv_storage.bytes()), 4) },
            Bound { region: args.rope_cache, bytes: rope.saturating_mul(self.storage.bytes()).max(least) },
            words(args.sequences, product(&[self.n_sequence, 8])),
            words(args.partial_values, product(&[self.partials, self.n_head, self.d_value])),
            words(args.partial_softmax, product(&[self.partials, self.n_head, 2])),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
        let workgroup_size = WORKGROUPS[tuning.choose(SPEC.name, WORKGROUPS.len(), context.auto(SPEC.name, 0))?];
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("KV_F16", self.kv_storage.constant()),
                ("WORKGROUP", workgroup_size.into()),
                ("SPLIT", SPLIT.into()),
            ],
            grid: [self.kv_rows / SPLIT, self.n_head, self.most_tokens],
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 4 * (SPLIT + workgroup_size),
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch. A tile writes the partial results of its own splits.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
    pub q: &'a Region,
    /// `[kv_rows, n_head, d_nope + d_value]` in `kv_storage`.
    pub kv: &'a Region,
    /// `[cache_rows, pitch of d_rope]` in `storage`; without a rotary key any region of 16 bytes.
    pub rope_cache: &'a Region,
    /// `[n_sequence]` [`DecodeSequence`].
    pub sequences: &'a Region,
    /// `[partials, n_head, d_value]` f32, written.
    pub partial_values: &'a Region,
    /// `[partials, n_head, 2]` f32 (m, l), written.
    pub partial_softmax: &'a Region,
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(&plan), &problem.bound(&args, 0))
}
