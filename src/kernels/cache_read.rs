//! Reads a tile of cached latents, with their cache rows and gate embeddings, for the kernels that rebuild keys and values.

use bytemuck::{Pod, Zeroable};

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_nonzero};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        first_row: u32, rows: u32, d_latent: u32, latent_pitch: u32, n_sequence: u32, d_gate: u32, table_row: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[cache_rows, pitch of d_latent]` in `storage`.
        latent_cache: Read,
        /// `[cache_rows]` u32 token ids; not bound without a table.
        id_cache: Read,
        /// `[n_sequence]` [`SequenceRow`], ascending.
        sequences: Read,
        /// `[vocab_size, pitch of d_gate]` in the table's storage; not bound without a table.
        gate_embedding: Read,
        /// `[rows, d_latent]` f32, written.
        latent: Write,
        /// `[rows, d_gate]` f32, written; not bound without a table.
        embedding: Write,
        /// `[rows]` u32 cache rows, `u32::MAX` past a sequence's end; written.
        slots: Write,
    }
}

/// The table of gate embeddings, each padded to 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Table {
    /// Width of an embedding.
    pub d_gate: u32,
    /// Embeddings of the table; the caller has checked that every id is below it.
    pub vocab_size: u32,
    /// Its storage.
    pub storage: Storage,
}

impl Table {
    fn row(&self) -> u32 {
        self.storage.row_pitch(self.d_gate)
    }
}

/// One entry of the sequence table of a step, which numbers the cache rows of all sequences one after another.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct SequenceRow {
    /// First row in the step's numbering, a multiple of the split length.
    pub first_row: u32,
    /// Cache row of position 0.
    pub first_slot: u32,
    /// Tokens, those of this step included.
    pub length: u32,
    /// First new token of the sequence, in the step's numbering of new tokens.
    pub token: u32,
}

/// A tile of cache rows to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheRead {
    /// First row of the tile, in the step's numbering.
    pub first_row: u32,
    /// Rows of the tile.
    pub rows: u32,
    /// Cache rows.
    pub cache_rows: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// Entries of the sequence table; at least 1.
    pub n_sequence: u32,
    /// The embedding of each cached token id is read too.
    pub table: Option<Table>,
    /// Storage of the cache.
    pub storage: Storage,
}

impl CacheRead {
    fn d_gate(&self) -> u32 {
        self.table.map_or(0, |table| table.d_gate)
    }
}

impl Op for CacheRead {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "cache_read";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("d_latent", self.d_latent), ("d_gate", self.d_gate()), ("", 0), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])
    }

    fn params(&self, _: &Plan) -> Params {
        let CacheRead { first_row, rows, d_latent, n_sequence, table, storage, .. } = *self;
        let (latent_pitch, table_row) = (storage.row_pitch(d_latent), table.map_or(0, |table| table.row()));
        Params { first_row, rows, d_latent, latent_pitch, n_sequence, d_gate: self.d_gate(), table_row }
    }

    fn bytes(&self) -> Args<u64> {
        let CacheRead { rows, cache_rows, d_latent, n_sequence, table, storage, .. } = *self;
        let of_table = |table: Table| table.storage.sized(product(&[table.vocab_size, table.row()]));
        Args {
            latent_cache: storage.sized(product(&[cache_rows, storage.row_pitch(d_latent)])),
            id_cache: words(if table.is_some() { cache_rows.into() } else { 0 }),
            sequences: words(product(&[n_sequence, 4])),
            gate_embedding: table.map_or(0, of_table),
            latent: words(product(&[rows, d_latent])),
            embedding: words(product(&[rows, self.d_gate()])),
            slots: words(rows.into()),
        }
    }

    fn cost(&self) -> Cost {
        let CacheRead { rows, cache_rows, d_latent, n_sequence, table, storage, .. } = *self;
        let cached = rows.min(cache_rows);
        Cost::of(
            &[],
            &[
                times(storage.bytes(), &[cached, d_latent]),
                times(16, &[n_sequence]),
                times(4, &[rows, d_latent]),
                times(4, &[rows]),
                // One id per cache row, each embedding once at most.
                table.map_or(0, |table| {
                    let ids = times(4, &[cached]);
                    let read = times(table.storage.bytes(), &[cached.min(table.vocab_size), table.d_gate]);
                    ids.saturating_add(read).saturating_add(times(4, &[rows, table.d_gate]))
                }),
            ],
        )
    }
}

pub(crate) const ELEMENTS: Variant<CacheRead> = Variant::<CacheRead>::new(
    ("cache_read", include_str!("../../shaders/cache_read.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| {
        let table = op.table.map_or(Storage::F32, |table| table.storage);
        let elements = product(&[op.rows, op.d_latent + op.d_gate()]);
        Ok(Draft::elements(LINEAR_WORKGROUPS[setting], elements)
            .with([("STORAGE_F16", op.storage.constant()), ("TABLE_F16", table.constant())]))
    },
    anything,
);

crate::vary!(Table { d_gate, vocab_size, storage });
crate::vary!(CacheRead { first_row, rows, cache_rows, d_latent, n_sequence, table, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for CacheRead {
    fn samples() -> Vec<Self> {
        let tables = [None, Some(Storage::F32), Some(Storage::F16)];
        let of = |rows, table: Option<Storage>, storage| {
            let table = table.map(|storage| Table { d_gate: 2, vocab_size: 7, storage });
            CacheRead { first_row: 0, rows, cache_rows: rows, d_latent: 3, n_sequence: 1, table, storage }
        };
        let stored = |rows| Storage::ALL.into_iter().flat_map(move |s| tables.map(|table| of(rows, table, s)));
        crate::sample::ELEMENTS.into_iter().flat_map(stored).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        let op = CacheRead {
            first_row: 0,
            rows: 10,
            cache_rows: 6,
            d_latent: 5,
            n_sequence: 2,
            table: Some(Table { d_gate: 3, vocab_size: 50, storage: Storage::F32 }),
            storage: Storage::F16,
        };
        // In: 6 rows of cache (10 are asked for) · (5·2 + 4), table 2·16, 6 embeddings of 3·4. Out: 10 · (5·4 + 3·4 + 4).
        vec![(op, Cost { flops: 0, bytes: 84 + 32 + 72 + 360 })]
    }
}
