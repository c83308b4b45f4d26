//! Attention over the latents with one absorbed query per distinct token id: the gate at `up_projected`.

use super::frame::{Frame, Partials};
use super::layer::DecodePath;
use super::lists::{GateRows, Grouped, Lists};
use super::project::Hidden;
use super::step::Table;
use super::widths::gated_segments;
use crate::config::{GateConfig, GateNorm};
use crate::device::Region;
use crate::error::Result;
use crate::kernels::{attention_grouped, cache_append, gate_project, gate_statistics, group_ids, word_scatter};
use crate::storage::Storage;

/// Gate rows as the grouped kernels bind them: resident ones, then others.
struct GateSource {
    gates: Region,
    resident: u32,
    storage: Storage,
    more: Region,
    more_storage: Storage,
}

impl Frame<'_> {
    /// Updates the lists of the cache, once for all layers, and projects the gate rows that the layer keeps.
    pub fn begin(&mut self) -> Result<()> {
        let (Some(lists), step) = (self.cache.lists(), self.step) else { return Ok(()) };
        self.fill_table()?;
        if self.recording.once((step.identity(), 0)) {
            let op = word_scatter::WordScatter { count: step.lists.patches.len() as u32, words: lists.layout.words };
            let args = word_scatter::Args { patches: &self.table(Table::Patches), words: &Region::from(&lists.buffer) };
            self.recording.add_own(&op, args)?;
        }
        let (Some(pool), Some(gate)) = (&self.cached.pool, self.layer.config.up_projected_gate()) else {
            return Ok(());
        };
        let y_storage = self.cache.options().storage;
        let width = self.layer.widths.d_kv();
        let fills = step.lists.fills.0.len() as u32;
        if fills == 0 {
            return Ok(());
        }
        let op = gate_project::GateProject {
            targets: true,
            y_rows: (pool.size / y_storage.sized(width.into())) as u32,
            ..self.gate_project(gate, fills, width, y_storage)
        };
        self.project_gates(&op, &self.table(Table::FillIds), &self.table(Table::FillRows), pool)
    }

    /// The projection of the gate rows of listed ids.
    pub fn gate_project(
        &self,
        gate: &GateConfig,
        rows: u32,
        width: u32,
        y_storage: Storage,
    ) -> gate_project::GateProject {
        gate_project::GateProject {
            rows,
            width,
            d_gate: self.layer.widths.d_gate,
            vocab_size: gate.vocab_size,
            first_id: 0,
            ids: true,
            targets: false,
            y_rows: rows,
            storage: self.layer.storage,
            y_storage,
        }
    }

    pub fn project_gates(
        &mut self,
        op: &gate_project::GateProject,
        ids: &Region,
        targets: &Region,
        y: &Region,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let (gate_embedding, gate_b_proj) = (&weights.embedding, &weights.b_proj);
        self.recording.add_own(op, gate_project::Args { gate_embedding, gate_b_proj, ids, targets, y })
    }

    /// Gate rows for the grouped kernels; projected ones are those of the first pass.
    fn gate_source(&self, lists: &Lists) -> GateSource {
        let (cache_storage, weights_storage) = (self.cache.options().storage, self.layer.storage);
        let more = self.workspace.group_gates.clone();
        match (lists.layout.mode, &self.layer.table, &self.cached.pool) {
            (GateRows::Pool { rows }, _, Some(pool)) => GateSource {
                gates: pool.clone(),
                resident: rows,
                storage: cache_storage,
                more,
                more_storage: cache_storage,
            },
            (GateRows::Table, Some(table), _) => GateSource {
                gates: table.low.clone(),
                resident: table.rows,
                storage: weights_storage,
                more: table.high.clone().unwrap_or_else(|| self.absent.clone()),
                more_storage: weights_storage,
            },
            _ => GateSource {
                gates: self.absent.clone(),
                resident: 0,
                storage: cache_storage,
                more,
                more_storage: Storage::F32,
            },
        }
    }

    /// Whether this step measures the norm of the new tokens' keys and values. Their latents are then kept as the cache has them,
    /// so rounded where it is f16: statistics must match the keys and values of the cached latents, as in a prefill.
    pub fn measures(&self) -> bool {
        let normed = self.layer.config.up_projected_gate().is_some_and(|gate| gate.norm != GateNorm::None);
        normed && self.step.path == DecodePath::Absorbed && self.step.grouped().is_some()
    }

    pub fn attend_grouped(&mut self, grouped: &Grouped, out: Hidden<'_>) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        let (Some(lists), Some(gate)) = (self.cache.lists(), layer.config.up_projected_gate()) else { return Ok(()) };
        let table = Region::from(&lists.buffer);
        let source = self.gate_source(lists);
        let cached = self.sole_part();
        let pass_groups = if grouped.projected { lists.layout.pass_groups.min(grouped.groups) } else { grouped.groups };
        for pass_index in 0..grouped.passes {
            let first_group = pass_index * pass_groups;
            let groups = pass_groups.min(grouped.groups - first_group);
            let more = match (lists.layout.mode, grouped.projected) {
                (GateRows::Table, _) => gate.vocab_size - source.resident,
                (_, true) => groups + step.tokens,
                // A gate row that is not read: a pool then has one pipeline, whether a step projects rows or not.
                (_, false) => 1,
            };
            if grouped.projected {
                let op = group_ids::GroupIds {
                    tokens: step.tokens,
                    first_group,
                    groups,
                    n_sequence: step.n_sequence,
                    table: lists.layout.table,
                    list_words: lists.layout.words,
                };
                let args = group_ids::Args {
                    token_ids: &self.ids(),
                    token_rows: &self.table(Table::GateRows),
                    lists: &table,
                    ids: &workspace.group_ids,
                };
                // With one pass the list is the same for every layer.
                if grouped.passes > 1 || self.recording.once((step.identity(), 1)) {
                    self.recording.add_own(&op, args)?;
                }
                self.project_rows(gate, groups + step.tokens, &source)?;
            }
            if pass_index == 0 && self.measures() {
                self.measure(gate, &source, more, groups)?;
            }
            let op = attention_grouped::AttentionGrouped {
                tokens: step.tokens,
                most_tokens: step.most_tokens,
                n_sequence: step.n_sequence,
                entries: grouped.entries,
                partials: grouped.partials,
                most_partials: workspace.grouped_partials,
                n_head: layer.widths.n_head,
                widths: layer.widths.grouped(),
                tiling: grouped.tiling,
                table: lists.layout.table,
                list_words: lists.layout.words,
                cache_rows: cached.rows,
                rope_byte: cached.rope_key.offset,
                statistics_byte: cached.statistics.as_ref().map_or(0, |statistics| statistics.offset),
                resident: source.resident,
                gates_storage: source.storage,
                more,
                more_storage: source.more_storage,
                first_group,
                groups,
                pass_index,
                passes: grouped.passes,
                activation: gate.activation,
                norm: gate.norm,
                scale: layer.config.scale() as f32,
                expected_groups: grouped.expected_groups,
                expected_positions: step.expected_positions,
                cache_storage: self.cache.options().storage,
                storage: layer.storage,
            };
            let args = attention_grouped::Args {
                q: &workspace.q,
                kv_b_proj: &layer.weights.kv_b_proj,
                affine: self.gate_weights()?.affine.as_ref().unwrap_or(&self.absent),
                gates: &source.gates,
                gates_more: &source.more,
                cache: &cached.whole,
                lists: &table,
                partial: &workspace.grouped,
            };
            self.recording.add_own(&op, args)?;
        }
        self.project_partials(&self.group_partials(grouped), out)
    }

    /// Statistics of the new tokens' norm, from their keys and values.
    fn measure(&mut self, gate: &GateConfig, source: &GateSource, more: u32, more_first: u32) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        let (q, kept) = (&workspace.q, 4 * u64::from(layer.widths.kept(step.tokens)));
        let kept = &Region::new(&q.buffer, kept, q.size.saturating_sub(kept));
        let d_latent = layer.widths.d_latent;
        // Few have been made by the append.
        let made = cache_append::keeps_values(step.tokens, d_latent);
        if !made {
            let op = self.linear(step.tokens, d_latent, layer.widths.d_kv());
            self.product(&op, kept, &layer.weights.kv_b_proj, None, &workspace.kv)?;
        }
        let op = gate_statistics::GateStatistics {
            tokens: step.tokens,
            segments: gated_segments(&layer.config, gate),
            resident: source.resident,
            more,
            more_first,
            cache_rows: self.sole_part().rows,
            eps: gate.norm_eps as f32,
            activation: gate.activation,
            norm: gate.norm,
            storage: source.storage,
            more_storage: source.more_storage,
        };
        let args = gate_statistics::Args {
            kv: if made { kept } else { &workspace.kv },
            gates: &source.gates,
            gates_more: &source.more,
            rows: &self.table(Table::GateRows),
            slots: &self.table(Table::Slots),
            statistics: self.sole_part().statistics.as_ref().unwrap_or(&self.absent),
        };
        self.recording.add_own(&op, args)
    }

    fn group_partials(&self, grouped: &Grouped) -> Partials {
        let (workspace, widths) = (self.workspace, &self.layer.widths);
        let partial = &workspace.grouped;
        let softmax = 4 * attention_grouped::softmax_word(workspace.grouped_partials, widths.n_head, widths.d_value);
        Partials {
            values: Region::new(&partial.buffer, 0, softmax),
            softmax: Region::new(&partial.buffer, softmax, partial.size.saturating_sub(softmax)),
            ranges: self.table(Table::GroupedRanges),
            count: grouped.partials,
        }
    }

    /// Gate rows of the ids that a pass has listed, into the workspace.
    fn project_rows(&mut self, gate: &GateConfig, rows: u32, source: &GateSource) -> Result<()> {
        let workspace = self.workspace;
        if source.resident > 0 {
            let op = self.gate_project(gate, rows, self.layer.widths.d_kv(), source.more_storage);
            let absent = self.absent.clone();
            return self.project_gates(&op, &workspace.group_ids, &absent, &workspace.group_gates);
        }
        // All of them: the matrix product is the faster one.
        self.look_up(gate, rows, &workspace.group_ids, &workspace.group_embeddings)?;
        let op = self.linear(rows, self.layer.widths.d_gate, self.layer.widths.d_kv());
        let b_proj = &self.gate_weights()?.b_proj;
        self.product(&op, &workspace.group_embeddings, b_proj, None, &workspace.group_gates)
    }
}
