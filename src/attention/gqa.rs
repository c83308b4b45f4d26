//! One attention layer with keys and values per head on the device: MHA, GQA or MQA.
//!
//! ```text
//! hidden ─ q_proj, k_proj, v_proj ─ norm, rope ─▶ queries ─────────────▶ attention ─ o_proj ─ out
//!                                           └───▶ KvCache (key, value) ──▶┘
//! ```
//!
//! Four dispatches of a decode step: the projections as one product, `heads_append`, `attention_decode`, `output_project`; one
//! more where combining and projecting apart read less, and per further binding of cache rows.

use super::frame::Partials;
use super::kv_cache::{HeadWidths, HeadsWorkspace, KvCache, Tile};
use super::layer::Tokens;
use super::project::{Hidden, Output};
use super::step::{Mode, Step, StepTokens, Table};
use super::weights::{Axis, Shard, Upload};
use crate::adapter::PlanContext;
use crate::config::GqaConfig;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::matmul::{Layout, Matmul};
use crate::kernels::{attention_decode, attention_prefill, heads_append};
use crate::recording::Recording;
use crate::storage::Storage;
use crate::weights::{GqaWeights, HostTensor};

/// The weights of a layer: uploads to make, then regions of device memory.
#[derive(Debug, Clone)]
pub(super) struct HeadsWeights<T> {
    /// `q_proj`, `k_proj` and `v_proj`: fused if one binding holds them all.
    down: Vec<Shard<T>>,
    o_proj: Vec<Shard<T>>,
}

impl<T> HeadsWeights<T> {
    /// The same layer with every tensor mapped.
    fn map<U>(&self, of: impl Fn(&T) -> Result<U>) -> Result<HeadsWeights<U>> {
        let shards = |all: &[Shard<T>]| all.iter().map(|shard| shard.map(&of)).collect::<Result<_>>();
        Ok(HeadsWeights { down: shards(&self.down)?, o_proj: shards(&self.o_proj)? })
    }
}

impl<'a> HeadsWeights<Upload<'a>> {
    /// Placement of each tensor; the weights have been checked against the configuration.
    ///
    /// # Errors
    /// [`Error::Limit`] of the first tensor over the limit of a binding.
    pub fn plan(context: &PlanContext, config: &GqaConfig, weights: &'a GqaWeights, storage: Storage) -> Result<Self> {
        let widths = HeadWidths::of(config)?;
        let GqaConfig { n_head, n_kv_head, head_dim, .. } = *config;
        let hidden = || Axis::padded(config.hidden_size);
        let turned = |heads: u32| Axis::heads(heads, |axis| axis.rotary(head_dim, config.rope.interleave));
        let plain = |heads: u32| Axis::heads(heads, |axis| axis.part(head_dim));
        let shards = |first: u32, proj, bias: &'a Option<HostTensor>, rows: Axis, cols: Axis| {
            Shard::all(context, storage, first, (proj, bias.as_ref()), [rows, cols])
        };
        let keys = n_head * widths.head_dim;
        let values = keys + n_kv_head * widths.head_dim;
        let all = [
            shards(0, &weights.q_proj, &weights.q_bias, turned(n_head), hidden()),
            shards(keys, &weights.k_proj, &weights.k_bias, turned(n_kv_head), hidden()),
            shards(values, &weights.v_proj, &weights.v_bias, plain(n_kv_head), hidden()),
        ];
        let planned = HeadsWeights {
            down: Shard::fused(context, storage, all.into_iter().flatten().collect()),
            o_proj: shards(0, &weights.o_proj, &weights.o_bias, hidden(), plain(n_head)),
        };
        planned.map(|upload| upload.check(context, storage)).map(|_| planned)
    }
}

/// Checks every tensor against a device's limits, before any is allocated.
///
/// # Errors
/// [`Error::Limit`] of the first tensor over a limit.
#[cfg(feature = "decoder")]
pub(crate) fn check_gqa_weights(
    context: &PlanContext,
    config: &GqaConfig,
    weights: &GqaWeights,
    storage: Storage,
) -> Result<()> {
    HeadsWeights::plan(context, config, weights, storage).map(drop)
}

/// One attention layer with keys and values per head: configuration and weights in device memory. Cloning clones handles, not the
/// memory.
#[derive(Debug, Clone)]
pub struct GqaAttention {
    pub(super) kernels: Kernels,
    pub(super) config: GqaConfig,
    pub(super) widths: HeadWidths,
    storage: Storage,
    weights: HeadsWeights<Region>,
    /// `[2, head_dim]` f32: norms of queries and of keys.
    norms: Option<Region>,
}

impl GqaAttention {
    /// Uploads a layer's weights in `storage`.
    ///
    /// # Errors
    /// A configuration that contradicts itself or the weights; a tensor over the device's binding limit, before anything is
    /// allocated; a weight beyond f16's range with f16 storage; no memory left, or a lost device.
    pub fn new(kernels: &Kernels, config: &GqaConfig, weights: &GqaWeights, storage: Storage) -> Result<Self> {
        weights.check(config)?;
        let planned = HeadsWeights::plan(kernels.context(), config, weights, storage)?;
        let head = |norm| Upload::vector(norm, Axis::default().rotary(config.head_dim, config.rope.interleave));
        let norms = weights.q_norm.as_ref().zip(weights.k_norm.as_ref()).map(|(q, k)| head(q).and(head(k)));
        Ok(GqaAttention {
            kernels: kernels.clone(),
            config: config.clone(),
            widths: HeadWidths::of(config)?,
            storage,
            weights: planned.map(|upload| upload.upload(kernels, storage))?,
            norms: norms.map(|norms| norms.upload(kernels, Storage::F32)).transpose()?,
        })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &GqaConfig {
        &self.config
    }

    /// Records and commits any number of new tokens per sequence, on a cache of one layer.
    ///
    /// The tokens count as cached at once: if the submission fails later, roll them back with [`KvCache::truncate`].
    ///
    /// # Errors
    /// As [`KvCache::prepare`] and [`GqaAttention::forward`]; recording and cache are then unchanged.
    pub fn prefill(&self, recording: &mut Recording, cache: &mut KvCache, tokens: Tokens<'_>) -> Result<()> {
        self.advance(recording, cache, Mode::Prefill, tokens)
    }

    /// Records and commits up to [`MOST_DECODED`](super::MOST_DECODED) new tokens per sequence, on a cache of one layer.
    ///
    /// # Errors
    /// As [`GqaAttention::prefill`].
    pub fn decode(&self, recording: &mut Recording, cache: &mut KvCache, tokens: Tokens<'_>) -> Result<()> {
        self.advance(recording, cache, Mode::Decode, tokens)
    }

    fn advance(&self, recording: &mut Recording, cache: &mut KvCache, mode: Mode, tokens: Tokens<'_>) -> Result<()> {
        cache.options().check_one_layer()?;
        let Tokens { counts, ids, hidden, out } = tokens;
        let step = cache.prepare(mode, StepTokens { counts, ids })?;
        self.forward(recording, cache, &step, 0, &hidden, &out)?;
        cache.commit(step)
    }

    /// Records this layer's part of a step: appends the new tokens to layer `layer` of the cache and writes the attention's
    /// output. [`KvCache::commit`] then changes the cache's lengths.
    ///
    /// `hidden` and `out` are `[step.tokens(), hidden_size]` f32, in different buffers.
    ///
    /// # Errors
    /// Objects of another device, a step of another cache, a cache of another configuration, buffers that do not fit, or a kernel
    /// that cannot run. The recording is then unchanged.
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &KvCache,
        step: &Step,
        layer: usize,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        let [hidden, out] = Hidden::of_caller(&self.kernels, step.tokens, self.config.hidden_size, [hidden, out])?;
        self.forward_rows(recording, cache, step, layer, hidden, out)
    }

    /// [`GqaAttention::forward`] for checked buffers, at any width from `hidden_size` to its padded width.
    pub(crate) fn forward_rows(
        &self,
        recording: &mut Recording,
        cache: &KvCache,
        step: &Step,
        layer: usize,
        hidden: Hidden<'_>,
        out: Hidden<'_>,
    ) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        recording.kernels().same_device(cache.kernels(), "the cache", "recording")?;
        cache.batch.check_stamp(step)?;
        if cache.config() != &self.config {
            return Err(Error::config("(attention)", "the cache was made for another configuration"));
        }
        let cached = cache.layer(layer)?;
        let mark = recording.mark();
        let (workspace, absent) = (cache.workspace(), self.kernels.absent());
        let tables = step.tables(recording)?;
        let frame = HeadsFrame { layer: self, cache, cached, step, workspace, tables, recording, absent };
        let recorded = frame.record(hidden, out);
        if recorded.is_err() {
            recording.rewind(mark);
        }
        recorded
    }
}

/// One layer of a step while it is recorded.
struct HeadsFrame<'a> {
    layer: &'a GqaAttention,
    cache: &'a KvCache,
    /// The layer's parts of the cache.
    cached: &'a [Region],
    step: &'a Step,
    workspace: &'a HeadsWorkspace,
    /// The step's tables in the recording's buffers.
    tables: Region,
    recording: &'a mut Recording,
    /// Bound in place of absent buffers.
    absent: Region,
}

impl HeadsFrame<'_> {
    fn record(mut self, hidden: Hidden<'_>, out: Hidden<'_>) -> Result<()> {
        self.project(hidden)?;
        let tiles: Vec<_> = self.cache.tiles(self.step, self.cached).collect();
        self.append(&tiles)?;
        let (layer, workspace) = (self.layer, self.workspace);
        let output = Output {
            tokens: self.step.tokens,
            n_head: layer.widths.n_head,
            d_value: layer.widths.head_dim,
            storage: layer.storage,
            o_proj: &layer.weights.o_proj,
            values: &workspace.values,
            lse: &workspace.lse,
            absent: self.absent.clone(),
        };
        match self.step.mode {
            Mode::Prefill => {
                self.prefill(&tiles)?;
                output.project(self.recording, out)
            }
            Mode::Decode => {
                self.decode(&tiles)?;
                let partials = Partials {
                    values: workspace.partial_values.clone(),
                    softmax: workspace.partial_softmax.clone(),
                    ranges: self.table(Table::Ranges),
                    count: self.step.partials,
                };
                output.project_partials(self.recording, &partials, out)
            }
        }
    }

    fn table(&self, table: Table) -> Region {
        self.step.table(&self.tables, table)
    }

    /// Queries, keys and values of the new tokens, not rotated.
    fn project(&mut self, hidden: Hidden<'_>) -> Result<()> {
        let layer = self.layer;
        let op = Matmul {
            w: Layout::dense(layer.widths.hidden),
            ..Matmul::linear(self.step.tokens, hidden.width, layer.widths.row(), false, layer.storage)
        };
        Shard::product(&layer.weights.down, self.recording, &op, hidden.region, &self.workspace.row)
    }

    /// Appends keys and values to every binding that new tokens touch, and makes the queries.
    fn append(&mut self, tiles: &[Tile]) -> Result<()> {
        let (layer, step) = (self.layer, self.step);
        for Tile { first, bound, region, .. } in tiles {
            if !step.appended.iter().any(|new| new.start < first + bound && new.end > *first) {
                continue;
            }
            let op = heads_append::HeadsAppend {
                tokens: step.tokens,
                n_head: layer.widths.n_head,
                n_kv_head: layer.widths.n_kv_head,
                head_dim: layer.widths.head_dim,
                first_slot: *first,
                // All that is bound: the same from step to step.
                cache_rows: *bound,
                norm: layer
                    .config
                    .qk_norm_eps
                    .map(|eps| heads_append::HeadsNorm { used: layer.config.head_dim, eps: eps as f32 }),
                storage: self.cache.options().storage,
            };
            let args = heads_append::Args {
                x: &self.workspace.row,
                rotations: &self.table(Table::Rotations),
                slots: &self.table(Table::Slots),
                norms: layer.norms.as_ref().unwrap_or(&self.absent),
                q: &self.workspace.q,
                cache: region,
            };
            self.recording.add_own(&op, args)?;
        }
        let width = layer.widths.n_head * layer.widths.head_dim;
        step.scale_queries(self.recording, &self.tables, &self.workspace.q, width)
    }

    fn prefill(&mut self, tiles: &[Tile]) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        for (index, Tile { first: kv_first, rows: kv_rows, region: kv, .. }) in tiles.iter().enumerate() {
            let op = attention_prefill::AttentionPrefill {
                tokens: step.tokens,
                query_tiles: step.query_tiles,
                tile_q: step.tile_q,
                n_sequence: step.n_sequence,
                n_head: layer.widths.n_head,
                n_kv_head: layer.widths.n_kv_head,
                d_nope: layer.widths.head_dim,
                d_rope: 0,
                d_value: layer.widths.head_dim,
                kv_first: *kv_first,
                kv_rows: *kv_rows,
                cache_rows: 0,
                first: index == 0,
                last: index + 1 == tiles.len(),
                scale: layer.config.scale() as f32,
                weights: layer.storage,
                storage: Storage::F32,
                kv: self.cache.options().storage,
            };
            let args = attention_prefill::Args {
                q: &workspace.q,
                kv,
                rope_cache: &self.absent,
                queries: &self.table(Table::Queries),
                sequences: &self.table(Table::Sequences),
                values: &workspace.values,
                softmax: &workspace.softmax,
            };
            self.recording.add_own(&op, args)?;
        }
        Ok(())
    }

    fn decode(&mut self, tiles: &[Tile]) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        for Tile { first: kv_first, rows: kv_rows, region: kv, .. } in tiles {
            let op = attention_decode::AttentionDecode {
                tokens: step.tokens,
                most_tokens: step.most_tokens,
                partials: step.partials,
                split: step.split,
                n_sequence: step.n_sequence,
                n_head: layer.widths.n_head,
                n_kv_head: layer.widths.n_kv_head,
                d_nope: layer.widths.head_dim,
                d_rope: 0,
                d_value: layer.widths.head_dim,
                kv_first: *kv_first,
                kv_rows: *kv_rows,
                kv_pitch: layer.widths.kv(),
                cache_rows: step.rows,
                scale: layer.config.scale() as f32,
                storage: Storage::F32,
                kv_storage: self.cache.options().storage,
            };
            let args = attention_decode::Args {
                q: &workspace.q,
                kv,
                rope_cache: &self.absent,
                sequences: &self.table(Table::Decoding),
                partial_values: &workspace.partial_values,
                partial_softmax: &workspace.partial_softmax,
            };
            self.recording.add_own(&op, args)?;
        }
        Ok(())
    }
}
