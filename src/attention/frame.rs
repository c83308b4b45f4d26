//! One layer of a step while it is recorded: the state that its stages share.

use super::cache::LatentCache;
use super::layer::Attention;
use super::layout::{CachePart, LayerCache};
use super::parts::StepPart;
use super::step::{PartTable, Step, Table};
use super::weights::GateWeights;
use super::widths::gated_segments;
use super::workspace::Workspace;
use crate::config::{GateConfig, GateNorm};
use crate::device::Region;
use crate::error::Result;
use crate::kernels::attention_grouped::beta_element;
use crate::kernels::matmul::{self, Matmul};
use crate::kernels::{gate, gather};
use crate::recording::Recording;
use crate::storage::Storage;

/// Placement of latents in a buffer.
#[derive(Clone, Copy)]
pub(super) struct Latents<'a> {
    pub region: &'a Region,
    /// First element.
    pub offset: u32,
    /// Elements from one latent to the next.
    pub row: u32,
}

/// Target of the gate's norm statistics.
#[derive(Clone, Copy)]
pub(super) struct Statistics<'a> {
    /// Cache row of each, `u32::MAX` for none.
    pub slots: &'a Region,
    pub to: &'a Region,
    pub rows: u32,
}

/// Partial results of an attention over splits.
pub(super) struct Partials {
    pub values: Region,
    /// (m, l) of each.
    pub softmax: Region,
    /// First split and splits of each token.
    pub ranges: Region,
    pub count: u32,
}

pub(super) struct Frame<'a> {
    pub layer: &'a Attention,
    pub cache: &'a LatentCache,
    /// The layer's part of the cache.
    pub cached: &'a LayerCache,
    pub step: &'a Step,
    pub workspace: &'a Workspace,
    /// The step's tables in the recording's buffers.
    pub tables: Region,
    pub recording: &'a mut Recording,
    /// Bound in place of absent buffers.
    pub absent: Region,
}

impl<'a> Frame<'a> {
    /// A product with weights of the layer.
    pub fn product(&mut self, op: &Matmul, x: &Region, w: &Region, bias: Option<&Region>, y: &Region) -> Result<()> {
        let op = Matmul { bias: bias.is_some(), ..*op };
        let bias = bias.unwrap_or(&self.absent);
        self.recording.add_own(&op, matmul::Args { x, w, bias, y })
    }

    /// Dense `y [rows, cols] = x [rows, inner] · wᵀ`.
    pub fn linear(&self, rows: u32, inner: u32, cols: u32) -> Matmul {
        Matmul::linear(rows, inner, cols, false, self.layer.storage)
    }

    pub fn table(&self, table: Table) -> Region {
        self.step.table(&self.tables, table)
    }

    /// A table that every part of the cache has.
    pub fn table_of(&self, part: &StepPart, table: PartTable) -> Region {
        self.step.table_of(part, &self.tables, table)
    }

    /// The layer's rows in a part of the cache.
    pub fn part(&self, part: &StepPart) -> &'a CachePart {
        &self.cached.parts[part.index]
    }

    /// The layer's rows where the kernels of a path bind them all: such a cache has one part.
    pub fn sole_part(&self) -> &'a CachePart {
        &self.cached.parts[0]
    }

    pub fn ids(&self) -> Region {
        self.table(Table::Ids)
    }

    pub fn gate_weights(&self) -> Result<&'a GateWeights<Region>> {
        self.layer.gate_weights()
    }

    /// Embeddings of ids: `[rows, d_gate]`.
    pub fn look_up(&mut self, gate: &GateConfig, rows: u32, ids: &Region, y: &Region) -> Result<()> {
        let width = self.layer.widths.d_gate;
        let (vocab_size, storage) = (gate.vocab_size, self.layer.storage);
        let op = gather::Gather { rows, width, table_row: width, first_id: 0, vocab_size, storage };
        self.recording.add_own(&op, gather::Args { table: &self.gate_weights()?.embedding, ids, y })
    }

    /// `y = Norm(x ⊙ act(gate_b_proj · embeddings))` in `y_storage`, with the embeddings in the workspace.
    pub fn gate(
        &mut self,
        config: &GateConfig,
        rows: u32,
        x: Latents<'_>,
        statistics: Option<Statistics<'_>>,
        (y, y_storage): (&Region, Storage),
    ) -> Result<()> {
        let (workspace, weights) = (self.workspace, self.gate_weights()?);
        let segments = gated_segments(&self.layer.config, config);
        let op = self.linear(rows, self.layer.widths.d_gate, segments.width());
        self.product(&op, &workspace.gate_rows, &weights.b_proj, None, &workspace.gate)?;
        let op = gate::Gate {
            rows,
            segments,
            x_offset: x.offset,
            x_row: x.row,
            eps: config.norm_eps as f32,
            activation: config.activation,
            norm: config.norm,
            statistics_rows: statistics.map_or(0, |statistics| statistics.rows),
            storage: self.layer.storage,
            y_storage,
        };
        let absent = &self.absent;
        let weight = weights.affine.as_ref().unwrap_or(absent);
        let beta = self.layer.storage.sized(beta_element(segments.width()).into());
        let bias = match config.norm {
            GateNorm::LayerNorm => &Region::new(&weight.buffer, beta, weight.size.saturating_sub(beta)),
            GateNorm::RmsNorm | GateNorm::None => absent,
        };
        let (slots, to) = statistics.map_or((absent, absent), |statistics| (statistics.slots, statistics.to));
        let args = gate::Args { x: x.region, g: &workspace.gate, weight, bias, slots, y, statistics: to };
        self.recording.add_own(&op, args)
    }
}
