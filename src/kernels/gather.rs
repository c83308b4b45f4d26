//! Looks embeddings up in a table by token id.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_nonzero};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { rows: u32, width: u32, table_row: u32, first_id: u32, vocab_size: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[vocab_size, table_row]` in `storage`.
        table: Read,
        /// `[rows]` u32; `u32::MAX` for a row of zeros.
        ids: Read,
        /// `[rows, width]` f32; rows of ids that the table does not hold stay as they are.
        y: Write,
    }
}

/// Embeddings to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gather {
    /// Ids.
    pub rows: u32,
    /// Width of an embedding.
    pub width: u32,
    /// Elements from one embedding of the table to the next.
    pub table_row: u32,
    /// Id of the table's first embedding: 0, but for the further shards of a table over one binding.
    pub first_id: u32,
    /// Embeddings of the table.
    pub vocab_size: u32,
    /// Storage of the table.
    pub storage: Storage,
}

impl Op for Gather {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "gather";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("width", self.width), ("vocab_size", self.vocab_size)])?;
        if self.table_row < self.width {
            return Err(format!("rows of {} elements begin every {}", self.width, self.table_row));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let Gather { rows, width, table_row, first_id, vocab_size, .. } = *self;
        Params { rows, width, table_row, first_id, vocab_size }
    }

    fn bytes(&self) -> Args<u64> {
        Args {
            table: self.storage.sized(product(&[self.vocab_size, self.table_row])),
            ids: words(self.rows.into()),
            y: words(product(&[self.rows, self.width])),
        }
    }

    fn cost(&self) -> Cost {
        let Gather { rows, width, vocab_size, storage, .. } = *self;
        let table = times(storage.bytes(), &[rows.min(vocab_size), width]);
        Cost::of(&[], &[table, times(4, &[rows]), times(4, &[rows, width])])
    }
}

pub(crate) const ELEMENTS: Variant<Gather> = Variant::<Gather>::new(
    ("gather", include_str!("../../shaders/gather.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| {
        let draft = Draft::elements(LINEAR_WORKGROUPS[setting], product(&[op.rows, op.width]));
        Ok(draft.with([("STORAGE_F16", op.storage.constant())]))
    },
    anything,
);

crate::vary!(Gather { rows, width, table_row, first_id, vocab_size, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Gather {
    fn samples() -> Vec<Self> {
        let op = Gather { rows: 0, width: 3, table_row: 3, first_id: 0, vocab_size: 7, storage: Storage::F32 };
        let of = |rows| Storage::ALL.map(|storage| Gather { rows, storage, ..op });
        crate::sample::ELEMENTS.into_iter().flat_map(of).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // Table rows 4·6·2, ids 4·4, out 4·6·4.
        let op = Gather { rows: 4, width: 6, table_row: 8, first_id: 0, vocab_size: 50, storage: Storage::F16 };
        vec![(op, Cost { flops: 0, bytes: 48 + 16 + 96 })]
    }
}
