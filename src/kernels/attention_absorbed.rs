//! Attention of few queries per sequence straight over the cached latents, split over the cache.

use bytemuck::{Pod, Zeroable};

use super::attention_decode::SPLIT;
use super::{Problem as _, narrow, nonzero, product, words};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_absorbed",
    source: include_str!("../../shaders/attention_absorbed.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("absorbed"),
        Binding::read("q"),
        Binding::read("latent_cache"),
        Binding::read("rope_cache"),
        Binding::read("sequences"),
        Binding::write("partial_values"),
        Binding::write("partial_softmax"),
    ],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// HEADS: heads of a workgroup.
const TUNINGS: &[u32] = &[4, 8];

/// 16-byte loads of a key whose query elements are staged at once.
const CHUNK: u32 = 8;

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    n_sequence: u32,
    latent_loads: u32,
    rope_loads: u32,
    scale: f32,
}

/// Attention over the whole cache of every sequence of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows of `q`.
    pub tokens: u32,
    /// Lines of the sequence table.
    pub n_sequence: u32,
    /// Most query tokens of a sequence.
    pub most_tokens: u32,
    /// Splits of all sequences: the step's rows over [`SPLIT`].
    pub splits: u32,
    /// Partial results: splits times query tokens, summed over the sequences.
    pub partials: u32,
    /// Query heads.
    pub n_head: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// Content part of `q`, which stands before its rotary part.
    pub d_nope: u32,
    /// Rotary part.
    pub d_rope: u32,
    /// Rows of the cache.
    pub cache_rows: u32,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// How the cache is stored.
    pub storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        narrow(SPEC.name, &[("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_latent", self.d_latent)])?;
        nonzero(SPEC.name, &[("n_head", self.n_head), ("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])?;
        // Eight heads read a row half as often, where they are not heads past the end.
        let of_sizes = if (self.n_head - 1) % 8 >= 4 { 1 } else { 0 };
        let heads = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, of_sizes))?];
        let workgroup_size = SPLIT / 4;
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("HEADS", heads.into()),
                ("CHUNK", CHUNK.into()),
                ("SPLIT", SPLIT.into()),
            ],
            grid: [self.splits, self.n_head.div_ceil(heads), self.most_tokens],
            workgroup_size,
            workgroup_bytes: 4 * heads * (8 * CHUNK + SPLIT + workgroup_size),
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, n_head, d_latent]` f32: `W_K[h]ᵀ q_C[h]`.
    pub absorbed: &'a Region,
    /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
    pub q: &'a Region,
    /// `[cache_rows, pitch of d_latent]` in `storage`.
    pub latent_cache: &'a Region,
    /// `[cache_rows, pitch of d_rope]` in `storage`.
    pub rope_cache: &'a Region,
    /// `[n_sequence]` [`super::attention_decode::DecodeSequence`].
    pub sequences: &'a Region,
    /// `[partials, n_head, d_latent]` f32, written.
    pub partial_values: &'a Region,
    /// `[partials, n_head, 2]` f32 (m, l), written.
    pub partial_softmax: &'a Region,
}

/// Adds the attention over the latents to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let (latent_pitch, rope_pitch) = (p.storage.row_pitch(p.d_latent), p.storage.row_pitch(p.d_rope));
    let per_load = 16 / p.storage.bytes() as u32;
    let cache =
        |region, pitch: u32| Bound { region, bytes: product(&[p.cache_rows, pitch]).saturating_mul(p.storage.bytes()) };
    recording.push(
        &SPEC,
        &plan,
        &Params {
            n_head: p.n_head,
            d_latent: p.d_latent,
            d_nope: p.d_nope,
            d_rope: p.d_rope,
            n_sequence: p.n_sequence,
            latent_loads: latent_pitch / per_load,
            rope_loads: rope_pitch / per_load,
            scale: p.scale,
        },
        &[
            words(args.absorbed, product(&[p.tokens, p.n_head, p.d_latent])),
            words(args.q, product(&[p.tokens, p.n_head, p.d_nope + p.d_rope])),
            cache(args.latent_cache, latent_pitch),
            cache(args.rope_cache, rope_pitch),
            words(args.sequences, product(&[p.n_sequence, 8])),
            words(args.partial_values, product(&[p.partials, p.n_head, p.d_latent])),
            words(args.partial_softmax, product(&[p.partials, p.n_head, 2])),
        ],
    )
}
