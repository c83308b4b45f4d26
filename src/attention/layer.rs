//! One attention layer on the device.

use serde::{Deserialize, Serialize};

use super::cache::LatentCache;
use super::frame::Frame;
use super::lists::GateRows;
use super::project::Hidden;
use super::step::{Mode, Step, StepTokens};
use super::table::GateTable;
use super::weights::{GateWeights, LayerWeights, TiedEmbedding};
use super::widths::Widths;
use crate::config::AttentionConfig;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::recording::Recording;
use crate::storage::Storage;
use crate::weights::AttentionWeights;

/// Path of a decode step over the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodePath {
    /// The one that takes less time in the step at hand, by [`decode_time`](crate::attention::cost::decode_time): fewer FLOPs
    /// may take more dispatches, or fill less of the device.
    #[default]
    Auto,
    /// Rebuilds keys and values from the cache, tile by tile. Serves every configuration.
    Expanded,
    /// Takes the query through the key projection and scores the latents themselves: once for MLA and the gate at `latent`,
    /// once per distinct token id for the gate at `up_projected`.
    Absorbed,
}

/// Storage of a layer's weights and source of its gate rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttentionOptions {
    /// Storage of the weights.
    pub storage: Storage,
    /// Source of gate rows in the absorbed decode; used by the gate at `up_projected` alone.
    pub gate_rows: GateRows,
}

/// New tokens of one layer with a cache of its own: those of sequence 0, then of sequence 1, and so on.
#[derive(Debug, Clone)]
pub struct Tokens<'a> {
    /// New tokens of each sequence of the cache; 0 leaves a sequence out.
    pub counts: &'a [u32],
    /// Their ids; needed with a gate.
    pub ids: Option<&'a [u32]>,
    /// `[tokens, hidden_size]` f32: the layer's input.
    pub hidden: Region,
    /// `[tokens, hidden_size]` f32, written; in another buffer than `hidden`.
    pub out: Region,
}

/// One attention layer: configuration and weights in device memory. Cloning clones handles, not the memory.
#[derive(Debug, Clone)]
pub struct Attention {
    pub(super) kernels: Kernels,
    pub(super) config: AttentionConfig,
    pub(super) widths: Widths,
    pub(super) storage: Storage,
    pub(super) weights: LayerWeights<Region>,
    pub(super) gate_rows: GateRows,
    pub(super) table: Option<GateTable>,
}

impl Attention {
    /// Uploads a layer's weights. With [`GateRows::Table`] the first recorded step also projects the table. A tied gate's weights
    /// must hold the model's token embedding: of several layers each would have its own, see [`Attention::with_tied_embedding`].
    ///
    /// # Errors
    /// A configuration that contradicts itself or the weights; a tensor over the device's binding limit, or a gate table over
    /// two bindings, before anything is allocated; a weight beyond f16's range with f16 storage; no memory left, or a lost
    /// device.
    pub fn new(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        options: AttentionOptions,
    ) -> Result<Self> {
        Self::of(kernels, config, weights, None, options)
    }

    /// The same with a tied gate that reads an embedding which other layers read, too; the weights are without one.
    ///
    /// # Errors
    /// As [`Attention::new`]; an embedding of another device, size or storage, or of a layer whose gate is not tied.
    pub fn with_tied_embedding(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        embedding: &TiedEmbedding,
        options: AttentionOptions,
    ) -> Result<Self> {
        let region = embedding.of_layer(kernels, config, options.storage)?;
        Self::of(kernels, config, weights, Some(region), options)
    }

    fn of(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        tied: Option<&Region>,
        options: AttentionOptions,
    ) -> Result<Self> {
        let AttentionOptions { storage, gate_rows } = options;
        match tied {
            None => weights.check(config)?,
            Some(_) => weights.check_own(config)?,
        }
        let widths = Widths::of(config)?;
        let (gate_rows, table) = match (config.up_projected_gate(), gate_rows) {
            (None, _) => (GateRows::Recompute, None),
            (Some(gate), GateRows::Table) => {
                (gate_rows, Some(GateTable::plan(kernels.context(), gate, &widths, storage)?))
            }
            (Some(_), GateRows::Recompute | GateRows::Pool { .. }) => (gate_rows, None),
        };
        Ok(Attention {
            kernels: kernels.clone(),
            config: config.clone(),
            widths,
            storage,
            weights: LayerWeights::upload(kernels, config, weights, tied, storage)?,
            gate_rows,
            table: table.map(|table| table.allocate(kernels)).transpose()?,
        })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Bytes of the gate table, with [`GateRows::Table`].
    pub fn gate_table_bytes(&self) -> u64 {
        self.table.as_ref().map_or(0, GateTable::bytes)
    }

    /// The same layer, planned by other kernels of its device.
    #[cfg(feature = "check")]
    pub(crate) fn with_kernels(&self, kernels: &Kernels) -> Self {
        Attention { kernels: kernels.clone(), ..self.clone() }
    }

    /// Marks the gate table as projected: for recordings that never run, and for benches, whose numbers mean nothing.
    #[cfg(feature = "check")]
    pub(crate) fn assume_table(&self) {
        if let Some(table) = &self.table {
            table.assume_filled();
        }
    }

    /// [`Attention::new`] has checked that a gate of the configuration has its weights.
    pub(super) fn gate_weights(&self) -> Result<&GateWeights<Region>> {
        self.weights.gate.as_ref().ok_or(Error::Argument(ArgumentError::Empty { what: "the gate's weights" }))
    }

    /// Records and commits any number of new tokens per sequence, on a cache of one layer.
    ///
    /// The tokens count as cached at once: if the submission fails later, roll them back with [`LatentCache::truncate`].
    ///
    /// # Errors
    /// As [`LatentCache::prepare`] and [`Attention::forward`]; recording and cache are then unchanged.
    pub fn prefill(&self, recording: &mut Recording, cache: &mut LatentCache, tokens: Tokens<'_>) -> Result<()> {
        self.advance(recording, cache, Mode::Prefill, tokens)
    }

    /// Records and commits up to [`MOST_DECODED`](super::MOST_DECODED) new tokens per sequence, on a cache of one layer.
    ///
    /// # Errors
    /// As [`Attention::prefill`].
    pub fn decode(&self, recording: &mut Recording, cache: &mut LatentCache, tokens: Tokens<'_>) -> Result<()> {
        self.advance(recording, cache, Mode::Decode, tokens)
    }

    fn advance(
        &self,
        recording: &mut Recording,
        cache: &mut LatentCache,
        mode: Mode,
        tokens: Tokens<'_>,
    ) -> Result<()> {
        cache.options().check_one_layer()?;
        let Tokens { counts, ids, hidden, out } = tokens;
        let step = cache.prepare(mode, StepTokens { counts, ids })?;
        self.forward(recording, cache, &step, 0, &hidden, &out)?;
        cache.commit(step)
    }

    /// Records this layer's part of a step: appends the new tokens to layer `layer` of the cache and writes the attention's
    /// output. [`LatentCache::commit`] then changes the cache's lengths.
    ///
    /// `hidden` and `out` are `[step.tokens(), hidden_size]` f32, in different buffers.
    ///
    /// # Errors
    /// Objects of another device, a step of another cache, a cache of another configuration, buffers that do not fit, or a kernel
    /// that cannot run. The recording is then unchanged.
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        step: &Step,
        layer: usize,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        let [hidden, out] = Hidden::of_caller(&self.kernels, step.tokens, self.config.hidden_size, [hidden, out])?;
        self.forward_rows(recording, cache, step, layer, hidden, out)
    }

    /// [`Attention::forward`] for checked buffers, at any width from `hidden_size` to its padded width.
    pub(crate) fn forward_rows(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        step: &Step,
        layer: usize,
        hidden: Hidden<'_>,
        out: Hidden<'_>,
    ) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        recording.kernels().same_device(cache.kernels(), "the cache", "recording")?;
        cache.batch.check_stamp(step)?;
        if cache.config() != &self.config || cache.gate_rows() != self.gate_rows {
            return Err(Error::config(
                "(attention)",
                "the cache was made for another configuration, or other gate rows",
            ));
        }
        let cached = cache.layer(layer)?;
        let mark = recording.mark();
        let (workspace, absent) = (cache.workspace(), self.kernels.absent());
        let tables = step.tables(recording)?;
        let frame = Frame { layer: self, cache, cached, step, workspace, tables, recording, absent };
        let recorded = frame.record(hidden, out);
        if recorded.is_err() {
            recording.rewind(mark);
        }
        recorded
    }
}

impl Frame<'_> {
    fn record(mut self, hidden: Hidden<'_>, out: Hidden<'_>) -> Result<()> {
        self.begin()?;
        self.project(hidden)?;
        self.append()?;
        match (self.step.path, self.step.grouped()) {
            (DecodePath::Absorbed, Some(grouped)) => self.attend_grouped(grouped, out),
            (DecodePath::Absorbed, None) => self.attend_absorbed(out),
            (DecodePath::Expanded | DecodePath::Auto, _) => self.attend_expanded(out),
        }
    }
}
