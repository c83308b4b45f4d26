//! Reads a tile of cached latents, ids and cache rows, for the kernels that rebuild keys and values.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, narrow, nonzero, product, words};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Storage, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "cache_read",
    source: include_str!("../../shaders/cache_read.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("latent_cache"),
        Binding::read("id_cache"),
        Binding::read("sequences"),
        Binding::write("latent"),
        Binding::write("ids"),
        Binding::write("slots"),
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
    first_row: u32,
    rows: u32,
    d_latent: u32,
    latent_pitch: u32,
    n_sequence: u32,
}

/// One line of the sequence table of a step: the sequences' rows stand one after another in one numbering.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct SequenceRow {
    /// First row in the step's numbering, a multiple of the split length.
    pub first_row: u32,
    /// Cache row of position 0.
    pub first_slot: u32,
    /// Tokens, those of this step included.
    pub length: u32,
    /// Row of the sequence's first new token in the step's activations.
    pub token: u32,
}

/// A tile of rows to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// First row of the tile, in the step's numbering.
    pub first_row: u32,
    /// Rows of the tile.
    pub rows: u32,
    /// Rows of the cache.
    pub cache_rows: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// Lines of the sequence table; at least 1.
    pub n_sequence: u32,
    /// Token ids are read too.
    pub with_ids: bool,
    /// How the cache is stored.
    pub storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        narrow(SPEC.name, &[("d_latent", self.d_latent)])?;
        nonzero(SPEC.name, &[("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])?;
        let overrides = vec![("STORAGE_F16", self.storage.constant()), ("WITH_IDS", flag(self.with_ids))];
        linear_plan(SPEC.name, product(&[self.rows, self.d_latent]), overrides, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[cache_rows, pitch of d_latent]` in `storage`.
    pub latent_cache: &'a Region,
    /// `[cache_rows]` u32; `Kernels::absent` when ids are not read.
    pub id_cache: &'a Region,
    /// `[n_sequence]` [`SequenceRow`], ascending.
    pub sequences: &'a Region,
    /// `[rows, d_latent]` f32, written.
    pub latent: &'a Region,
    /// `[rows]` u32, written when ids are read.
    pub ids: &'a Region,
    /// `[rows]` u32 rows of the cache, `u32::MAX` past a sequence's end; written.
    pub slots: &'a Region,
}

/// Adds one read to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { first_row, rows, cache_rows, d_latent, n_sequence, with_ids, storage } = *problem;
    let latent_pitch = storage.row_pitch(d_latent);
    let ids = |count: u32| if with_ids { u64::from(count) } else { 0 };
    let cache_bytes = product(&[cache_rows, latent_pitch]).saturating_mul(storage.bytes());
    recording.push(
        &SPEC,
        &plan,
        &Params { first_row, rows, d_latent, latent_pitch, n_sequence },
        &[
            Bound { region: args.latent_cache, bytes: cache_bytes },
            words(args.id_cache, ids(cache_rows)),
            words(args.sequences, product(&[n_sequence, 4])),
            words(args.latent, product(&[rows, d_latent])),
            words(args.ids, ids(rows)),
            words(args.slots, rows.into()),
        ],
    )
}
