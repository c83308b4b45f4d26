//! One attention layer on the device.

use serde::{Deserialize, Serialize};

use super::cache::LatentCache;
use super::cost;
use super::frame::Frame;
use super::lists::GateRows;
use super::project::Hidden;
use super::step::{Mode, Step, StepInput};
use super::table::GateTable;
use super::weights::{GateWeights, LayerWeights};
use super::widths::Widths;
use super::workspace::Workspace;
use crate::config::AttentionConfig;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::attention_grouped;
use crate::recording::Recording;
use crate::storage::Storage;
use crate::weights::AttentionWeights;

/// How a decode step attends to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodePath {
    /// Whichever of the two does less work for the step at hand, by [`crate::attention::cost`].
    #[default]
    Auto,
    /// Keys and values are rebuilt from the cache, tile by tile: every configuration.
    Expanded,
    /// The query is taken through the key projection and meets the latents themselves: once for MLA and the gate at `latent`,
    /// once per distinct token id for the gate at `up_projected`.
    Absorbed,
}

/// `prefill` and `decode` commit a step after one layer: on a cache of several, the others would never see its tokens.
fn one_layer(cache: &LatentCache) -> Result<()> {
    let what = "layers of the cache (with several, use plan_step, forward and commit)";
    match cache.options().n_layer {
        1 => Ok(()),
        found => Err(Error::Count { what, expected: 1, found: found.into() }),
    }
}

/// One attention layer: configuration and weights in device memory.
#[derive(Debug)]
pub struct Attention {
    pub(super) kernels: Kernels,
    pub(super) config: AttentionConfig,
    pub(super) widths: Widths,
    pub(super) storage: Storage,
    pub(super) weights: LayerWeights<Region>,
    pub(super) table: Option<GateTable>,
}

impl Attention {
    /// Uploads a layer's weights.
    ///
    /// # Errors
    /// A configuration that contradicts itself or the weights; a tensor over the device's binding limit, before anything is
    /// allocated; a weight beyond f16's range with f16 storage; no memory left, or a lost device.
    pub fn new(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        storage: Storage,
    ) -> Result<Self> {
        weights.check(config)?;
        Ok(Attention {
            kernels: kernels.clone(),
            config: config.clone(),
            widths: Widths::of(config)?,
            storage,
            weights: LayerWeights::upload(kernels, config, weights, storage)?,
            table: None,
        })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// [`Attention::new`] has checked that a gate in the configuration has its weights.
    pub(super) fn gate_weights(&self) -> Result<&GateWeights<Region>> {
        self.weights.gate.as_ref().ok_or(Error::Empty { what: "the gate's weights" })
    }

    /// The decode path that `path` stands for in a step on a cache: `Auto` is the one with fewer FLOPs by [`crate::attention::cost`].
    ///
    /// # Errors
    /// `Absorbed` where the device's workgroup memory holds no head of these widths, or where the cache wants gate rows from a
    /// table that was not loaded.
    pub fn decode_path(&self, path: DecodePath, cache: &LatentCache, step: &Step) -> Result<DecodePath> {
        let possible = || -> Result<()> {
            let Some(lists) = cache.lists() else { return Ok(()) };
            attention_grouped::tiling(self.kernels.context(), self.widths.grouped())?;
            if lists.mode == GateRows::Table && self.gate_table_bytes() == 0 {
                return Err(Error::Unsupported {
                    what: "gate rows from a table that was not loaded".to_owned(),
                    instead: "record `Attention::load_gate_table` first",
                });
            }
            Ok(())
        };
        match path {
            DecodePath::Expanded => Ok(DecodePath::Expanded),
            DecodePath::Absorbed => possible().map(|()| DecodePath::Absorbed),
            DecodePath::Auto if possible().is_err() => Ok(DecodePath::Expanded),
            DecodePath::Auto => {
                let work = self.work(cache, step);
                let absorbed = cost::attend_absorbed(&self.config, &work, self.storage).flops;
                let expanded = cost::attend_expanded(&self.config, &work, self.storage).flops;
                Ok(if absorbed <= expanded { DecodePath::Absorbed } else { DecodePath::Expanded })
            }
        }
    }

    /// What a decode step attends to.
    fn work(&self, cache: &LatentCache, step: &Step) -> cost::DecodeWork {
        let grouped = step.grouped();
        cost::DecodeWork {
            tokens: step.tokens,
            rows: step.used_rows,
            positions: step.expected_positions,
            groups: grouped.map_or(0, |grouped| grouped.expected_groups),
            projected: match grouped {
                Some(grouped) if grouped.projected => grouped.groups,
                _ => 0,
            },
            cache_storage: cache.options().storage,
        }
    }

    /// Plans, records and commits new tokens of a cache of one layer; any number a sequence.
    ///
    /// The tokens count as cached from here on: a caller whose submission fails later takes them back with
    /// [`LatentCache::truncate`].
    ///
    /// `hidden` and `out` are `[tokens, hidden_size]` f32: sequence 0's new tokens, then sequence 1's, and so on.
    ///
    /// # Errors
    /// What [`LatentCache::plan_step`] and [`Attention::forward`] refuse; recording and cache are then unchanged.
    #[expect(clippy::too_many_arguments, reason = "the buffers and the tokens are what a step is")]
    pub fn prefill(
        &self,
        recording: &mut Recording,
        cache: &mut LatentCache,
        workspace: &Workspace,
        counts: &[u32],
        token_ids: Option<&[u32]>,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        one_layer(cache)?;
        let step = cache.plan_step(StepInput { mode: Mode::Prefill, counts, token_ids })?;
        self.forward(recording, cache, 0, &step, workspace, DecodePath::Auto, hidden, out)?;
        cache.commit(&step)
    }

    /// Plans, records and commits up to [`MOST_DECODED`](super::MOST_DECODED) new tokens of each sequence, on a cache of one layer.
    ///
    /// `hidden` and `out` are `[tokens, hidden_size]` f32.
    ///
    /// # Errors
    /// As [`Attention::prefill`].
    #[expect(clippy::too_many_arguments, reason = "the buffers, the tokens and the path are what a step is")]
    pub fn decode(
        &self,
        recording: &mut Recording,
        cache: &mut LatentCache,
        workspace: &Workspace,
        counts: &[u32],
        token_ids: Option<&[u32]>,
        path: DecodePath,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        one_layer(cache)?;
        let step = cache.plan_step(StepInput { mode: Mode::Decode, counts, token_ids })?;
        self.forward(recording, cache, 0, &step, workspace, path, hidden, out)?;
        cache.commit(&step)
    }

    /// Records this layer's part of a step: appends the new tokens to layer `layer` of the cache's buffers and writes the
    /// attention's output. The cache's lengths change with [`LatentCache::commit`].
    ///
    /// `hidden` and `out` are `[step.tokens(), hidden_size]` f32, in different buffers.
    ///
    /// # Errors
    /// Objects of another device, a step of another cache, more tokens than the workspace holds, a path that is not supported,
    /// or what a kernel refuses. The recording is then as it was.
    #[expect(clippy::too_many_arguments, reason = "the buffers, the step and the path are what a layer needs")]
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        path: DecodePath,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        let width = self.config.hidden_size;
        let (hidden, out) = (Hidden { region: hidden, width }, Hidden { region: out, width });
        self.forward_rows(recording, cache, layer, step, workspace, path, hidden, out)
    }

    /// [`Attention::forward`] with rows of any width from `hidden_size` to that with its padding.
    #[expect(clippy::too_many_arguments, reason = "as forward")]
    pub(crate) fn forward_rows(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        path: DecodePath,
        hidden: Hidden<'_>,
        out: Hidden<'_>,
    ) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        recording.kernels().same_device(cache.kernels(), "the cache", "recording")?;
        recording.kernels().same_device(&workspace.kernels, "the workspace", "recording")?;
        if step.stamp() != cache.stamp() {
            return Err(Error::StaleStep);
        }
        if cache.config() != &self.config {
            return Err(Error::config("(attention)", "the cache was made for another configuration"));
        }
        if step.tokens > workspace.max_tokens {
            return Err(Error::OutOfRange {
                what: "new tokens of a step (the workspace's max_tokens)",
                found: step.tokens.into(),
                limit: workspace.max_tokens.into(),
            });
        }
        // No dispatch binds both, but a caller who passes one buffer twice would lose the input.
        if hidden.region.buffer == out.region.buffer {
            return Err(Error::Aliased { kernel: "attention", first: "hidden", second: "out" });
        }
        if step.mode == Mode::Decode && step.most_tokens > workspace.decode_tokens {
            return Err(Error::OutOfRange {
                what: "new tokens of a sequence (the workspace's decode_tokens)",
                found: step.most_tokens.into(),
                limit: workspace.decode_tokens.into(),
            });
        }
        let path = match step.mode {
            Mode::Prefill => DecodePath::Expanded,
            Mode::Decode => self.decode_path(path, cache, step)?,
        };
        let mark = recording.mark();
        let absent = self.kernels.absent();
        let cached = cache.layer(layer)?;
        let frame = Frame { layer: self, cache, cached, step, workspace, recording, absent };
        let recorded = frame.record(path, hidden, out);
        if recorded.is_err() {
            recording.rewind(mark);
        }
        recorded
    }
}

impl Frame<'_> {
    fn record(mut self, path: DecodePath, hidden: Hidden<'_>, out: Hidden<'_>) -> Result<()> {
        self.begin()?;
        let latents = self.project(hidden)?;
        let latents = self.append(latents)?;
        match (path, self.step.grouped()) {
            (DecodePath::Absorbed, Some(grouped)) => self.attend_grouped(latents, grouped)?,
            (DecodePath::Absorbed, None) => self.attend_absorbed()?,
            _ => self.attend_expanded()?,
        }
        self.project_out(out)
    }
}
