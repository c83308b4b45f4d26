//! Attention of one query per sequence straight over the cached latents, split over the cache.

use bytemuck::{Pod, Zeroable};

use super::attention_decode::SPLIT;
use super::{Problem as _, narrow, nonzero, product, words};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Plan, PlanContext, Storage, Tuning};

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
};

/// (WORKGROUP, CHUNK); WORKGROUP is at least `SPLIT / 4`.
const TUNINGS: &[(u32, u32)] = &[(64, 128), (128, 64), (256, 256)];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    n_sequence: u32,
    latent_pitch: u32,
    rope_pitch: u32,
    scale: f32,
}

/// Attention over the whole cache of every sequence of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows of `q`.
    pub tokens: u32,
    /// Lines of the sequence table.
    pub n_sequence: u32,
    /// Splits of all sequences: the step's rows over [`SPLIT`].
    pub splits: u32,
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
        let (workgroup_size, chunk) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), 0)?];
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("WORKGROUP", workgroup_size.into()),
                ("SPLIT", SPLIT.into()),
                ("CHUNK", chunk.into()),
            ],
            grid: [self.splits, self.n_head.div_ceil(4), 1],
            workgroup_size,
            workgroup_bytes: 16 * (chunk + SPLIT + workgroup_size),
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
    /// `[n_sequence]` [`super::cache_read::SequenceRow`].
    pub sequences: &'a Region,
    /// `[splits, n_head, d_latent]` f32, written.
    pub partial_values: &'a Region,
    /// `[splits, n_head, 2]` f32 (m, l), written.
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
            latent_pitch,
            rope_pitch,
            scale: p.scale,
        },
        &[
            words(args.absorbed, product(&[p.tokens, p.n_head, p.d_latent])),
            words(args.q, product(&[p.tokens, p.n_head, p.d_nope + p.d_rope])),
            cache(args.latent_cache, latent_pitch),
            cache(args.rope_cache, rope_pitch),
            words(args.sequences, product(&[p.n_sequence, 4])),
            words(args.partial_values, product(&[p.splits, p.n_head, p.d_latent])),
            words(args.partial_softmax, product(&[p.splits, p.n_head, 2])),
        ],
    )
}
