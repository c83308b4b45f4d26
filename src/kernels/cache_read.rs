//! Reads a tile of cached latents, cache rows and gate embeddings, for the kernels that rebuild keys and values.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, narrow, nonzero, product, words};
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
        Binding::read("gate_embedding"),
        Binding::write("latent"),
        Binding::write("embedding"),
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
    d_gate: u32,
    table_row: u32,
}

/// The table of gate embeddings, rows padded to 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Width of an embedding.
    pub d_gate: u32,
    /// Rows of the table; the caller has checked that every id is below it.
    pub vocab_size: u32,
    /// How it is stored.
    pub storage: Storage,
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
    /// The embedding of each row's token id is read too.
    pub table: Option<Table>,
    /// How the cache is stored.
    pub storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        let d_gate = self.table.map_or(0, |table| table.d_gate);
        narrow(SPEC.name, &[("d_latent", self.d_latent), ("d_gate", d_gate)])?;
        nonzero(SPEC.name, &[("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])?;
        let table_storage = self.table.map_or(Storage::F32, |table| table.storage);
        let overrides = vec![("STORAGE_F16", self.storage.constant()), ("TABLE_F16", table_storage.constant())];
        linear_plan(SPEC.name, product(&[self.rows, self.d_latent + d_gate]), overrides, context, tuning)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[cache_rows, pitch of d_latent]` in `storage`.
    pub latent_cache: &'a Region,
    /// `[cache_rows]` u32 token ids; `Kernels::absent` without a table.
    pub id_cache: &'a Region,
    /// `[n_sequence]` [`SequenceRow`], ascending.
    pub sequences: &'a Region,
    /// `[vocab_size, pitch of d_gate]` in the table's storage; `Kernels::absent` without a table.
    pub gate_embedding: &'a Region,
    /// `[rows, d_latent]` f32, written.
    pub latent: &'a Region,
    /// `[rows, d_gate]` f32, written; `Kernels::sink` without a table.
    pub embedding: &'a Region,
    /// `[rows]` u32 rows of the cache, `u32::MAX` past a sequence's end; written.
    pub slots: &'a Region,
}

/// Adds one read to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { first_row, rows, cache_rows, d_latent, n_sequence, table, storage } = *problem;
    let latent_pitch = storage.row_pitch(d_latent);
    let cache_bytes = product(&[cache_rows, latent_pitch]).saturating_mul(storage.bytes());
    let d_gate = table.map_or(0, |table| table.d_gate);
    let table_row = table.map_or(0, |table| table.storage.row_pitch(d_gate));
    let table_bytes =
        table.map_or(0, |table| product(&[table.vocab_size, table_row]).saturating_mul(table.storage.bytes()));
    recording.push(
        &SPEC,
        &plan,
        &Params { first_row, rows, d_latent, latent_pitch, n_sequence, d_gate, table_row },
        &[
            Bound { region: args.latent_cache, bytes: cache_bytes },
            words(args.id_cache, if table.is_some() { cache_rows.into() } else { 0 }),
            words(args.sequences, product(&[n_sequence, 4])),
            Bound { region: args.gate_embedding, bytes: table_bytes },
            words(args.latent, product(&[rows, d_latent])),
            words(args.embedding, product(&[rows, d_gate])),
            words(args.slots, rows.into()),
        ],
    )
}
