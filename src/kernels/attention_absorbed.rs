//! Attention of few queries per sequence straight over the cached latents, split over the cache.

use bytemuck::{Pod, Zeroable};

use super::attention_decode::SPLIT;
use super::{Problem as _, narrow, nonzero, product, words};
use crate::error::{Error, Result};
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
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
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

impl Problem {
    /// Whether rows of the queries, like those of the cache, begin on 16-byte boundaries.
    pub fn aligned(&self) -> bool {
        [self.d_latent, self.d_nope, self.d_rope].iter().all(|width| width.is_multiple_of(4))
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        narrow(kernel, &[("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_latent", self.d_latent)])?;
        nonzero(kernel, &[("n_head", self.n_head), ("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])
    }

    pub(super) fn validate_aligned(&self, kernel: &'static str) -> Result<()> {
        self.validate(kernel)?;
        if self.aligned() {
            return Ok(());
        }
        let Problem { d_latent, d_nope, d_rope, .. } = self;
        let widths = format!("d_latent {d_latent}, d_nope {d_nope} and d_rope {d_rope} must be multiples of 4");
        Err(Error::problem(kernel, widths))
    }

    /// 16-byte loads of a cache row of this width.
    pub(super) fn loads(&self, width: u32) -> u32 {
        self.storage.row_loads(width)
    }

    pub(super) fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            d_latent: self.d_latent,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            n_sequence: self.n_sequence,
            latent_loads: self.loads(self.d_latent),
            rope_loads: self.loads(self.d_rope),
            scale: self.scale,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 7] {
        let cache = |region, width: u32| {
            let elements = product(&[self.cache_rows, self.storage.row_pitch(width)]);
            Bound { region, bytes: elements.saturating_mul(self.storage.bytes()) }
        };
        [
            words(args.absorbed, product(&[self.tokens, self.n_head, self.d_latent])),
            words(args.q, product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            cache(args.latent_cache, self.d_latent),
            cache(args.rope_cache, self.d_rope),
            words(args.sequences, product(&[self.n_sequence, 8])),
            words(args.partial_values, product(&[self.partials, self.n_head, self.d_latent])),
            words(args.partial_softmax, product(&[self.partials, self.n_head, 2])),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
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
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 4 * heads * (8 * CHUNK + SPLIT + workgroup_size),
        }
        .tiled(SPEC.name, &context.limits)
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
    recording.push(&SPEC, &plan, &problem.params(&plan), &problem.bound(&args))
}
