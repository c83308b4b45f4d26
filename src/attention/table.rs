//! Gate rows of a whole vocabulary.

use super::layer::Attention;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::gate_project;
use crate::recording::Recording;
use crate::storage::Storage;

/// Gate rows before their activation, in one shard or two.
#[derive(Debug)]
pub(super) struct GateTable {
    /// Rows of the first shard.
    pub rows: u32,
    pub low: Region,
    pub high: Option<Region>,
}

/// Rows that a dispatch projects, so that none runs for long: any number of tiles begins where a binding may.
const TILE: u32 = 4096;

impl GateTable {
    /// Allocates a table of `vocab` rows of `width` elements, all zeros.
    pub fn new(kernels: &Kernels, vocab: u32, width: u32, storage: Storage) -> Result<Self> {
        let row_bytes = storage.sized(width.into());
        // Each shard holds whole rows: two may hold less than two bindings.
        let shard = (kernels.context().largest_binding() / row_bytes.max(1)).min(vocab.into()) as u32;
        let (needed, allowed) = (row_bytes.saturating_mul(vocab.into()), 2 * row_bytes * u64::from(shard));
        if needed > allowed {
            let what = format!("a gate table of {vocab} rows of {row_bytes} bytes, in two bindings");
            return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
        }
        let allocate = |rows: u32| {
            kernels.allocate("egmla.gate_table", row_bytes * u64::from(rows)).map(|buffer| Region::from(&buffer))
        };
        let high = (shard < vocab).then(|| allocate(vocab - shard)).transpose()?;
        Ok(GateTable { rows: shard, low: allocate(shard)?, high })
    }

    pub fn bytes(&self) -> u64 {
        self.low.size + self.high.as_ref().map_or(0, |high| high.size)
    }
}

impl Attention {
    /// Records the projection of every id's gate row, for caches with [`GateRows::Table`](super::GateRows::Table); the gate at
    /// `up_projected` alone. The dispatches must run before the first decode step does.
    ///
    /// # Errors
    /// No gate at `up_projected`; a table over two bindings, with both numbers, before anything is allocated; no memory left; a
    /// recording of another device. The recording and the layer are then as they were.
    pub fn load_gate_table(&mut self, recording: &mut Recording) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        self.reserve_gate_table()?;
        let mark = recording.mark();
        let recorded = self.project_gate_table(recording);
        if recorded.is_err() {
            recording.rewind(mark);
            self.table = None;
        }
        recorded
    }

    /// Allocates the gate table, all zeros.
    pub(crate) fn reserve_gate_table(&mut self) -> Result<()> {
        let Some(gate) = self.config.up_projected_gate() else {
            return Err(Error::Unsupported {
                what: "a gate table without a gate at `up_projected`".to_owned(),
                instead: "use `GateRows::Recompute`, which asks for nothing",
            });
        };
        self.table = Some(GateTable::new(&self.kernels, gate.vocab_size, self.widths.d_kv(), self.storage)?);
        Ok(())
    }

    fn project_gate_table(&self, recording: &mut Recording) -> Result<()> {
        let (Some(gate), Some(table)) = (self.config.up_projected_gate(), &self.table) else { return Ok(()) };
        let (vocab_size, width) = (gate.vocab_size, self.widths.d_kv());
        let row_bytes = self.storage.sized(width.into());
        let (weights, absent) = (self.gate_weights()?, self.kernels.absent());
        let mut first = 0;
        while first < vocab_size {
            let (to, from, end) = match &table.high {
                Some(high) if first >= table.rows => (high, table.rows, vocab_size),
                _ => (&table.low, 0, table.rows),
            };
            let rows = TILE.min(end - first);
            let y = Region::new(&to.buffer, row_bytes * u64::from(first - from), row_bytes * u64::from(rows));
            let op = gate_project::GateProject {
                rows,
                width,
                d_gate: self.widths.d_gate,
                vocab_size,
                first_id: first,
                ids: false,
                targets: false,
                y_rows: rows,
                storage: self.storage,
                y_storage: self.storage,
            };
            let args = gate_project::Args {
                gate_embedding: &weights.embedding,
                gate_b_proj: &weights.b_proj,
                ids: &absent,
                targets: &absent,
                y: &y,
            };
            recording.add(&op, args)?;
            first += rows;
        }
        Ok(())
    }

    /// Bytes of the gate table; 0 before [`Attention::load_gate_table`].
    pub fn gate_table_bytes(&self) -> u64 {
        self.table.as_ref().map_or(0, GateTable::bytes)
    }
}
