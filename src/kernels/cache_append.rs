//! Writes new tokens to their rows of the latent cache.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, narrow, nonzero, product, words};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{LINEAR_WORKGROUPS, Plan, PlanContext, Storage, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "cache_append",
    source: include_str!("../../shaders/cache_append.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("latent"),
        Binding::read("rope_key"),
        Binding::read("ids"),
        Binding::read("slots"),
        Binding::write("latent_cache"),
        Binding::write("rope_cache"),
        Binding::write("id_cache"),
    ],
    params_size: size_of::<Params>(),
    tunings: LINEAR_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
};

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    tokens: u32,
    d_latent: u32,
    latent_offset: u32,
    latent_row: u32,
    latent_words: u32,
    d_rope: u32,
    rope_offset: u32,
    rope_row: u32,
    rope_words: u32,
}

/// Tokens to append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// New tokens.
    pub tokens: u32,
    /// Rows of the cache; the caller has checked that every slot is below it.
    pub cache_rows: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// First element of `latent`.
    pub latent_offset: u32,
    /// From one row of `latent` to the next.
    pub latent_row: u32,
    /// Width of the rotary key; may be 0.
    pub d_rope: u32,
    /// First element of `rope_key`.
    pub rope_offset: u32,
    /// From one row of `rope_key` to the next.
    pub rope_row: u32,
    /// Token ids are cached too.
    pub with_ids: bool,
    /// How the cache is stored.
    pub storage: Storage,
}

impl Problem {
    fn row_words(&self, width: u32) -> u32 {
        (u64::from(self.storage.row_pitch(width)) * self.storage.bytes() / 4) as u32
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        narrow(SPEC.name, &[("d_latent", self.d_latent), ("d_rope", self.d_rope)])?;
        nonzero(SPEC.name, &[("d_latent", self.d_latent)])?;
        let words = self.row_words(self.d_latent) + self.row_words(self.d_rope) + 1;
        let overrides = vec![("STORAGE_F16", self.storage.constant()), ("WITH_IDS", flag(self.with_ids))];
        linear_plan(SPEC.name, product(&[self.tokens, words]), overrides, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32, rows as in [`Problem`].
    pub latent: &'a Region,
    /// f32, rotated, rows as in [`Problem`].
    pub rope_key: &'a Region,
    /// `[tokens]` u32; `Kernels::absent` when ids are not cached.
    pub ids: &'a Region,
    /// `[tokens]` u32 rows of the cache, all different.
    pub slots: &'a Region,
    /// `[cache_rows, pitch of d_latent]` in `storage`, written.
    pub latent_cache: &'a Region,
    /// `[cache_rows, pitch of d_rope]` in `storage`, written.
    pub rope_cache: &'a Region,
    /// `[cache_rows]` u32, written when ids are cached; `Kernels::sink` otherwise.
    pub id_cache: &'a Region,
}

/// Adds one append to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let (latent_words, rope_words) = (p.row_words(p.d_latent), p.row_words(p.d_rope));
    let end = |offset: u32, row: u32, width: u32| {
        u64::from(offset) + product(&[p.tokens.saturating_sub(1), row]) + u64::from(width)
    };
    let ids = |count: u32| if p.with_ids { u64::from(count) } else { 0 };
    let cache = |region, words: u32| Bound { region, bytes: product(&[p.cache_rows, words, 4]) };
    recording.push(
        &SPEC,
        &plan,
        &Params {
            tokens: p.tokens,
            d_latent: p.d_latent,
            latent_offset: p.latent_offset,
            latent_row: p.latent_row,
            latent_words,
            d_rope: p.d_rope,
            rope_offset: p.rope_offset,
            rope_row: p.rope_row,
            rope_words,
        },
        &[
            words(args.latent, end(p.latent_offset, p.latent_row, p.d_latent)),
            words(args.rope_key, if p.d_rope == 0 { 0 } else { end(p.rope_offset, p.rope_row, p.d_rope) }),
            words(args.ids, ids(p.tokens)),
            words(args.slots, p.tokens.into()),
            cache(args.latent_cache, latent_words),
            cache(args.rope_cache, rope_words),
            words(args.id_cache, ids(p.cache_rows)),
        ],
    )
}
