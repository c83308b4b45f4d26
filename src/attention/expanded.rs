//! Attention over keys and values that are rebuilt from the cache, one tile of cache rows at a time.

use super::frame::{Frame, Latents, Partials, Statistics};
use super::parts::StepPart;
use super::project::{Hidden, combine};
use super::step::{Mode, PartTable, Table};
use crate::adapter::{Cooperative, PlanContext};
use crate::device::Region;
use crate::error::Result;
use crate::kernels::attention_prefill::AttentionPrefill;
use crate::kernels::matmul::Matmul;
use crate::kernels::{attention_decode, attention_prefill, cache_read};
use crate::op::{Op, choose};
use crate::storage::Storage;

/// Whether a kernel on cooperative matrices computes it.
fn by_matrices<O: Op>(op: &O, context: &PlanContext) -> bool {
    choose(op, context).is_ok_and(|(variant, _)| variant.spec.cooperative != Cooperative::NONE)
}

impl<'a> Frame<'a> {
    pub fn attend_expanded(&mut self, out: Hidden<'_>) -> Result<()> {
        let step = self.step;
        for part in &step.parts {
            let mut first = part.rows.start;
            while first < part.rows.end {
                let rows = self.workspace.tile_rows.min(part.rows.end - first);
                // The padding behind the last sequence is never read.
                let used = rows.min(step.used_rows - first);
                match step.mode {
                    Mode::Prefill => {
                        let op = self.prefill_of(part, first, rows, used);
                        let kv = self.rebuild(part, first, used, op.kv)?;
                        self.prefill_tile(part, &op, kv)?;
                    }
                    Mode::Decode => {
                        let kv = self.rebuild(part, first, used, Storage::F32)?;
                        self.decode_tile(part, first, rows, kv)?;
                    }
                }
                first += rows;
            }
        }
        match step.mode {
            Mode::Prefill => self.project_out(out),
            Mode::Decode => self.project_partials(&self.row_partials(), out),
        }
    }

    /// Attention of a prefill over a tile of which `used` rows are read. Keys and values are halves where matrices attend to them,
    /// which would round them for every tile of queries, and matrices make them, or the gate does.
    fn prefill_of(&self, part: &StepPart, kv_first: u32, kv_rows: u32, used: u32) -> AttentionPrefill {
        let (layer, step) = (self.layer, self.step);
        let op = AttentionPrefill {
            tokens: step.tokens,
            query_tiles: step.query_tiles,
            tile_q: step.tile_q,
            n_sequence: step.n_sequence,
            n_head: layer.widths.n_head,
            n_kv_head: layer.widths.n_head,
            d_nope: layer.widths.d_nope,
            d_rope: layer.widths.d_rope,
            d_value: layer.widths.d_value,
            kv_first,
            kv_rows,
            cache_rows: self.part(part).rows,
            first: kv_first == 0,
            last: kv_first + kv_rows == step.rows,
            scale: layer.config.scale() as f32,
            weights: layer.storage,
            storage: self.cache.options().storage,
            kv: Storage::F32,
        };
        let halves = AttentionPrefill { kv: Storage::F16, ..op };
        let made = Matmul { y_storage: Storage::F16, ..self.linear(used, layer.widths.d_latent, layer.widths.d_kv()) };
        let gated = layer.config.up_projected_gate().is_some();
        let context = self.recording.kernels().context();
        let of_halves = layer.storage == Storage::F16 && by_matrices(&halves, context);
        if of_halves && (gated || by_matrices(&made, context)) { halves } else { op }
    }

    fn prefill_tile(&mut self, part: &StepPart, op: &AttentionPrefill, kv: &Region) -> Result<()> {
        let workspace = self.workspace;
        let args = attention_prefill::Args {
            q: &workspace.q,
            kv,
            rope_cache: &self.part(part).rope_key,
            queries: &self.table(Table::Queries),
            sequences: &self.table_of(part, PartTable::Sequences),
            values: &workspace.values,
            softmax: &workspace.softmax,
        };
        self.recording.add_own(op, args)
    }

    fn decode_tile(&mut self, part: &StepPart, first: u32, kv_rows: u32, kv: &Region) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        let cached = self.part(part);
        let op = attention_decode::AttentionDecode {
            tokens: step.tokens,
            most_tokens: step.most_tokens,
            partials: step.partials,
            split: step.split,
            n_sequence: part.n_sequence,
            n_head: layer.widths.n_head,
            n_kv_head: layer.widths.n_head,
            d_nope: layer.widths.d_nope,
            d_rope: layer.widths.d_rope,
            d_value: layer.widths.d_value,
            // Its table counts from the part's first row.
            kv_first: first - part.rows.start,
            kv_rows,
            kv_pitch: layer.widths.d_kv(),
            cache_rows: cached.rows,
            scale: layer.config.scale() as f32,
            storage: self.cache.options().storage,
            kv_storage: Storage::F32,
        };
        let args = attention_decode::Args {
            q: &workspace.q,
            kv,
            rope_cache: &cached.rope_key,
            sequences: &self.table_of(part, PartTable::Decoding),
            partial_values: &workspace.partial_values,
            partial_softmax: &workspace.partial_softmax,
        };
        self.recording.add_own(&op, args)
    }

    /// Keys and values `[rows, n_head, d_nope + d_value]` of a tile in `storage`, gated and normed where the configuration says so:
    /// the gate reads f32.
    fn rebuild(&mut self, part: &StepPart, first_row: u32, rows: u32, storage: Storage) -> Result<&'a Region> {
        let (layer, workspace) = (self.layer, self.workspace);
        let cached = self.part(part);
        let widths = &layer.widths;
        let gate = layer.config.up_projected_gate();
        let op = cache_read::CacheRead {
            first_row,
            rows,
            cache_rows: cached.rows,
            d_latent: widths.d_latent,
            n_sequence: self.step.n_sequence,
            table: gate.map(|gate| cache_read::Table {
                d_gate: widths.d_gate,
                vocab_size: gate.vocab_size,
                storage: layer.storage,
            }),
            storage: self.cache.options().storage,
        };
        let gate_embedding = match gate {
            Some(_) => &self.gate_weights()?.embedding,
            None => &self.absent,
        };
        let args = cache_read::Args {
            latent_cache: &cached.latent,
            id_cache: &self.cache.ids().unwrap_or_else(|| self.absent.clone()),
            sequences: &self.table_of(part, PartTable::Sequences),
            gate_embedding,
            latent: &workspace.tile_latent,
            embedding: &workspace.gate_rows,
            slots: &workspace.tile_slots,
        };
        self.recording.add_own(&op, args)?;
        let y_storage = if gate.is_some() { Storage::F32 } else { storage };
        let op = Matmul { y_storage, ..self.linear(rows, widths.d_latent, widths.d_kv()) };
        self.product(&op, &workspace.tile_latent, &layer.weights.kv_b_proj, None, &workspace.kv)?;
        let Some(gate) = gate else { return Ok(&workspace.kv) };
        let statistics = cached.statistics.as_ref();
        let statistics = statistics.map(|to| Statistics { slots: &workspace.tile_slots, to, rows: cached.rows });
        let x = Latents { region: &workspace.kv, offset: 0, row: widths.d_kv() };
        self.gate(gate, rows, x, statistics, (&workspace.kv_gated, storage))?;
        Ok(&workspace.kv_gated)
    }

    /// Partial results of the kernels that split the cache by rows.
    pub fn row_partials(&self) -> Partials {
        Partials {
            values: self.workspace.partial_values.clone(),
            softmax: self.workspace.partial_softmax.clone(),
            ranges: self.table(Table::Ranges),
            count: self.step.partials,
        }
    }

    pub fn combine(&mut self, partials: &Partials, width: u32, values: &Region) -> Result<()> {
        let extents = (self.step.tokens, self.layer.widths.n_head, width);
        combine(self.recording, extents, partials, values, &self.workspace.lse)
    }
}
