//! The gate table: gate rows of a whole vocabulary.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::frame::Frame;
use super::widths::Widths;
use crate::adapter::PlanContext;
use crate::config::GateConfig;
use crate::device::{Kernels, Region};
use crate::error::Result;
use crate::kernels::gate_project;
use crate::storage::Storage;

/// Gate rows before their activation, in one shard or two.
#[derive(Debug, Clone)]
pub(super) struct GateTable {
    /// Gate rows of the first shard.
    pub rows: u32,
    pub low: Region,
    pub high: Option<Region>,
    vocab_size: u32,
    row_bytes: u64,
    /// Set once a submission has projected every row.
    filled: Arc<AtomicBool>,
    identity: u64,
}

/// Sizes of a table.
pub(super) struct TablePlan {
    shard: u32,
    vocab_size: u32,
    row_bytes: u64,
}

/// Gate rows per dispatch, so that none runs for long; tiles begin at a binding's alignment.
const TILE: u32 = 4096;

static IDENTITIES: AtomicU64 = AtomicU64::new(0);

impl GateTable {
    /// Sizes of the table of a layer.
    ///
    /// # Errors
    /// A table over two bindings.
    pub fn plan(context: &PlanContext, gate: &GateConfig, widths: &Widths, storage: Storage) -> Result<TablePlan> {
        let (vocab_size, row_bytes) = (gate.vocab_size, storage.sized(widths.d_kv().into()));
        let half = row_bytes.saturating_mul(vocab_size.div_ceil(2).into());
        let what =
            || format!("half of a gate table of {vocab_size} rows of {row_bytes} bytes, which has two bindings,");
        context.check_binding(half, what)?;
        // Each shard holds whole gate rows.
        let shard = (context.largest_binding() / row_bytes.max(1)).min(vocab_size.into()) as u32;
        Ok(TablePlan { shard, vocab_size, row_bytes })
    }

    #[cfg(feature = "check")]
    pub fn assume_filled(&self) {
        self.filled.store(true, Ordering::Release);
    }

    pub fn bytes(&self) -> u64 {
        self.low.size + self.high.as_ref().map_or(0, |high| high.size)
    }
}

impl TablePlan {
    /// The table, all zeros.
    pub fn allocate(self, kernels: &Kernels) -> Result<GateTable> {
        let TablePlan { shard, vocab_size, row_bytes } = self;
        let allocate = |rows: u32| {
            kernels.allocate("egmla.gate_table", row_bytes * u64::from(rows)).map(|buffer| Region::from(&buffer))
        };
        Ok(GateTable {
            rows: shard,
            low: allocate(shard)?,
            high: (shard < vocab_size).then(|| allocate(vocab_size - shard)).transpose()?,
            vocab_size,
            row_bytes,
            filled: Arc::default(),
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed),
        })
    }
}

impl Frame<'_> {
    /// Projects the layer's gate table in every recording, until a finished submission has.
    pub fn fill_table(&mut self) -> Result<()> {
        let Some(table) = &self.layer.table else { return Ok(()) };
        if table.filled.load(Ordering::Acquire) || !self.recording.once((table.identity, u64::MAX)) {
            return Ok(());
        }
        let mut first = 0;
        while first < table.vocab_size {
            let (to, from, end) = match &table.high {
                Some(high) if first >= table.rows => (high, table.rows, table.vocab_size),
                _ => (&table.low, 0, table.rows),
            };
            let rows = TILE.min(end - first);
            let (offset, size) = (table.row_bytes * u64::from(first - from), table.row_bytes * u64::from(rows));
            let op = gate_project::GateProject {
                rows,
                width: self.layer.widths.d_kv(),
                d_gate: self.layer.widths.d_gate,
                vocab_size: table.vocab_size,
                first_id: first,
                ids: false,
                targets: false,
                y_rows: rows,
                storage: self.layer.storage,
                y_storage: self.layer.storage,
            };
            let absent = self.absent.clone();
            self.project_gates(&op, &absent, &absent, &Region::new(&to.buffer, offset, size))?;
            first += rows;
        }
        self.recording.on_done(&table.filled);
        Ok(())
    }
}
