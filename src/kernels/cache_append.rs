//! Writes latents and rotary keys of new tokens to their rows of the latent cache, and rotates keys and queries.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, cache_append_vec4, narrow, nonzero, product, words};
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
        Binding::write("q"),
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
    q_heads: u32,
    q_offset: u32,
    q_row: u32,
    q_head: u32,
}

/// Query heads that are rotated in place, in elements of `q`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Queries {
    /// Heads of a row; 0 for none.
    pub n_head: u32,
    /// First element that is rotated.
    pub offset: u32,
    /// From one token to the next.
    pub row: u32,
    /// From one head to the next.
    pub head: u32,
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
    /// Rotates keys and queries: pairs (2i, 2i+1) when true, (i, i + d_rope/2) when false; `None` leaves them as they are.
    pub interleave: Option<bool>,
    /// Queries to rotate.
    pub queries: Queries,
    /// Byte of `cache` where the rotary keys begin, behind the latents.
    pub rope_byte: u64,
    /// How the cache is stored.
    pub storage: Storage,
}

impl Problem {
    fn row_words(&self, width: u32) -> u32 {
        (u64::from(self.storage.row_pitch(width)) * self.storage.bytes() / 4) as u32
    }

    /// Whether every row of every tensor is a whole number of 16-byte loads and stores that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        let Queries { offset, row, head, .. } = self.queries;
        let steps = [self.latent_offset, self.latent_row, self.rope_offset, self.rope_row, offset, row, head];
        let store = 16 / self.storage.bytes() as u32;
        // With pairs apart, each half by itself.
        let half = if self.interleave == Some(false) { 2 } else { 1 };
        steps.iter().all(|step| step.is_multiple_of(4))
            && self.d_latent.is_multiple_of(store)
            && self.d_rope.is_multiple_of(half * store)
            && self.rope_byte.is_multiple_of(16)
    }

    /// Heads that are rotated.
    pub(super) fn rotated_heads(&self) -> u32 {
        if self.interleave.is_some() && self.d_rope > 0 { self.queries.n_head } else { 0 }
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        narrow(kernel, &[("d_latent", self.d_latent), ("d_rope", self.d_rope)])?;
        nonzero(kernel, &[("d_latent", self.d_latent)])?;
        let latents = product(&[self.cache_rows, self.row_words(self.d_latent), 4]);
        if self.rope_byte < latents || !self.rope_byte.is_multiple_of(4) {
            let problem = format!("rotary keys begin at byte {}, latents take {latents}", self.rope_byte);
            return Err(Error::problem(kernel, problem));
        }
        if self.interleave.is_some() && !self.d_rope.is_multiple_of(2) {
            return Err(Error::problem(kernel, format!("d_rope is {}, must be even", self.d_rope)));
        }
        Ok(())
    }

    pub(super) fn switches(&self) -> Vec<(&'static str, f64)> {
        let rotate = match self.interleave {
            None => 0.0,
            Some(true) => 1.0,
            Some(false) => 2.0,
        };
        vec![("STORAGE_F16", self.storage.constant()), ("ROTATE", rotate)]
    }

    pub(super) fn params(&self) -> Params {
        Params {
            tokens: self.tokens,
            d_latent: self.d_latent,
            latent_offset: self.latent_offset,
            latent_row: self.latent_row,
            latent_words: self.row_words(self.d_latent),
            d_rope: self.d_rope,
            rope_offset: self.rope_offset,
            rope_row: self.rope_row,
            rope_words: self.row_words(self.d_rope),
            // Within a binding, so words are counted in 32 bits.
            rope_cache: (self.rope_byte / 4) as u32,
            q_heads: self.rotated_heads(),
            q_offset: self.queries.offset,
            q_row: self.queries.row,
            q_head: self.queries.head,
        }
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 6] {
        let end = |offset: u32, row: u32, width: u32| {
            u64::from(offset) + product(&[self.tokens.saturating_sub(1), row]) + u64::from(width)
        };
        let Queries { offset, row, head, .. } = self.queries;
        let heads = self.rotated_heads();
        let q = end(offset, row, self.d_rope).saturating_add(product(&[heads.saturating_sub(1), head]));
        let cache = product(&[self.cache_rows, self.row_words(self.d_rope), 4]);
        let rotated = self.interleave.is_some() && self.d_rope > 0;
        // A binding of 16-byte elements holds one at least, be it unused.
        let least = if self.in_vec4() { 4 } else { 0 };
        let or_least = |used: bool, elements: u64| if used { elements } else { least };
        [
            words(args.latent, end(self.latent_offset, self.latent_row, self.d_latent)),
            words(args.rope_key, or_least(self.d_rope > 0, end(self.rope_offset, self.rope_row, self.d_rope))),
            words(args.rotations, or_least(rotated, product(&[self.tokens, self.d_rope]))),
            words(args.slots, self.tokens.into()),
            Bound { region: args.cache, bytes: self.rope_byte.saturating_add(cache) },
            words(args.q, or_least(heads > 0, q)),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
        let words = self.row_words(self.d_latent) + self.row_words(self.d_rope);
        let pairs = product(&[self.tokens, self.rotated_heads(), self.d_rope / 2]);
        let elements = product(&[self.tokens, words]).saturating_add(pairs);
        linear_plan(SPEC.name, elements, self.switches(), context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32, rows as in [`Problem`].
    pub latent: &'a Region,
    /// f32, rows as in [`Problem`].
    pub rope_key: &'a Region,
    /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; `Kernels::absent`, or any region of 16 bytes, where nothing is
    /// rotated.
    pub rotations: &'a Region,
    /// `[tokens]` u32 rows of the cache, all different.
    pub slots: &'a Region,
    /// `[cache_rows, pitch of d_latent]`, then at `rope_byte` `[cache_rows, pitch of d_rope]`, in `storage`, written.
    pub cache: &'a Region,
    /// f32, heads as in [`Queries`], rotated in place; `Kernels::sink` without.
    pub q: &'a Region,
}

/// Adds one append to a recording: with [`cache_append_vec4`] where the operands are [`Problem::in_vec4`] and no setting of this
/// kernel is forced.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    if tuning == Tuning::Auto && problem.in_vec4() {
        return cache_append_vec4::encode(recording, &cache_append_vec4::Problem(*problem), args, tuning);
    }
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(), &problem.bound(&args))
}
