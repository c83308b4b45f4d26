//! Writes latents and rotary keys of new tokens to their rows of the latent cache.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, narrow, nonzero, product, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Storage, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "cache_append",
    source: include_str!("../../shaders/cache_append.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("latent"),
        Binding::read("rope_key"),
        Binding::read("rotations"),
        Binding::read("slots"),
        Binding::write("cache"),
    ],
    params_size: size_of::<Params>(),
    tunings: LINEAR_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
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
    rope_cache: u32,
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
    /// Rotates the keys: pairs (2i, 2i+1) when true, (i, i + d_rope/2) when false; `None` leaves them as they are.
    pub interleave: Option<bool>,
    /// Byte of `cache` where the rotary keys begin, behind the latents.
    pub rope_byte: u64,
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
        let words = self.row_words(self.d_latent) + self.row_words(self.d_rope);
        let latents = product(&[self.cache_rows, self.row_words(self.d_latent), 4]);
        if self.rope_byte < latents || !self.rope_byte.is_multiple_of(4) {
            let problem = format!("rotary keys begin at byte {}, latents take {latents}", self.rope_byte);
            return Err(Error::problem(SPEC.name, problem));
        }
        if self.interleave.is_some() && !self.d_rope.is_multiple_of(2) {
            return Err(Error::problem(SPEC.name, format!("d_rope is {}, must be even", self.d_rope)));
        }
        let rotate = match self.interleave {
            None => 0.0,
            Some(true) => 1.0,
            Some(false) => 2.0,
        };
        let overrides = vec![("STORAGE_F16", self.storage.constant()), ("ROTATE", rotate)];
        linear_plan(SPEC.name, product(&[self.tokens, words]), overrides, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32, rows as in [`Problem`].
    pub latent: &'a Region,
    /// f32, rows as in [`Problem`].
    pub rope_key: &'a Region,
    /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; `Kernels::absent` where nothing is rotated.
    pub rotations: &'a Region,
    /// `[tokens]` u32 rows of the cache, all different.
    pub slots: &'a Region,
    /// `[cache_rows, pitch of d_latent]`, then at `rope_byte` `[cache_rows, pitch of d_rope]`, in `storage`, written.
    pub cache: &'a Region,
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
    let cache = Bound { region: args.cache, bytes: p.rope_byte + product(&[p.cache_rows, rope_words, 4]) };
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
            // Within a binding, so words are counted in 32 bits.
            rope_cache: (p.rope_byte / 4) as u32,
        },
        &[
            words(args.latent, end(p.latent_offset, p.latent_row, p.d_latent)),
            words(args.rope_key, if p.d_rope == 0 { 0 } else { end(p.rope_offset, p.rope_row, p.d_rope) }),
            words(args.rotations, if p.interleave.is_some() { product(&[p.tokens, p.d_rope]) } else { 0 }),
            words(args.slots, p.tokens.into()),
            cache,
        ],
    )
}
