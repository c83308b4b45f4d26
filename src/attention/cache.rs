//! The latent cache of a model: what EG-MLA and MLA keep of every past token.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Workspace;
use super::step::{Step, StepInput};
use crate::config::{AttentionConfig, GateNorm};
use crate::error::{Error, Result};
use crate::kernel::{Kernels, Recording, Region};
use crate::kernels::{cache_copy, product};
use crate::plan::{Storage, Tuning};

/// Extents of a [`LatentCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Layers that share it.
    pub n_layer: u32,
    /// Sequences.
    pub batch: u32,
    /// Tokens of each sequence.
    pub capacity: u32,
    /// How latents and rotary keys are stored.
    pub storage: Storage,
}

#[derive(Debug)]
pub(super) struct LayerCache {
    pub latent: wgpu::Buffer,
    pub rope_key: wgpu::Buffer,
    pub statistics: Option<wgpu::Buffer>,
}

/// Latents, rotary keys, and for the gate at `up_projected` token ids and norm statistics, of `batch` sequences of up to
/// `capacity` tokens, for every layer of a model. Sequence s holds cache rows `[s·capacity, s·capacity + length)`.
///
/// Lengths live on the host: an append that does not fit is an error before anything is recorded, and rolling back costs
/// nothing on the device.
#[derive(Debug)]
pub struct LatentCache {
    kernels: Kernels,
    config: AttentionConfig,
    options: CacheOptions,
    layers: Vec<LayerCache>,
    ids: Option<wgpu::Buffer>,
    lengths: Vec<u32>,
    /// Tells caches apart, so that a step planned on one is refused by another.
    identity: u64,
    /// Counts changes of the lengths, so that a step planned before a change is refused after it.
    generation: u64,
}

impl LatentCache {
    /// Allocates the cache.
    ///
    /// # Errors
    /// Extents of 0 or over 2^31 rows, a buffer over the device's limits, or no memory left.
    pub fn new(kernels: &Kernels, config: &AttentionConfig, options: CacheOptions) -> Result<Self> {
        config.validate()?;
        for (what, extent) in [
            ("layers of the cache", options.n_layer),
            ("sequences of the cache", options.batch),
            ("capacity of the cache", options.capacity),
        ] {
            if extent == 0 {
                return Err(Error::Empty { what });
            }
        }
        let rows = product(&[options.batch, options.capacity]);
        let most = (1 << 31) - 1;
        if rows > most {
            return Err(Error::OutOfRange { what: "batch × capacity of the cache", found: rows, limit: most });
        }
        let limits = &kernels.context().limits;
        // Refused before anything is allocated, since the kernels bind a layer's cache whole.
        let bytes = |what: &str, needed: u64| {
            let allowed = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
            if needed > allowed {
                let what = format!("{what} of {} sequences × {} tokens", options.batch, options.capacity);
                return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
            }
            Ok(needed)
        };
        let stored = |width: u32| u64::from(options.storage.row_pitch(width)) * options.storage.bytes() * rows;
        let latent = bytes("latent cache", stored(config.d_latent))?;
        let rope_key = bytes("rotary key cache", stored(config.d_rope))?;
        let statistics = bytes("norm statistics", rows * 8)?;
        let gate = config.up_projected_gate();
        let has_statistics = gate.is_some_and(|gate| gate.norm != GateNorm::None);
        let layers = (0..options.n_layer)
            .map(|_| {
                Ok(LayerCache {
                    latent: kernels.allocate("egmla.cache.latent", latent)?,
                    rope_key: kernels.allocate("egmla.cache.rope_key", rope_key)?,
                    statistics: has_statistics
                        .then(|| kernels.allocate("egmla.cache.statistics", statistics))
                        .transpose()?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        static IDENTITIES: AtomicU64 = AtomicU64::new(0);
        Ok(LatentCache {
            kernels: kernels.clone(),
            config: config.clone(),
            options,
            layers,
            ids: gate.is_some().then(|| kernels.allocate("egmla.cache.ids", rows * 4)).transpose()?,
            lengths: vec![0; options.batch as usize],
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed),
            generation: 0,
        })
    }

    /// Extents it was made with.
    pub fn options(&self) -> CacheOptions {
        self.options
    }

    /// The attention that it caches for.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The kernels that it was made with.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Tokens that each sequence holds.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&LayerCache> {
        self.layers.get(layer).ok_or(Error::OutOfRange {
            what: "layer of the cache",
            found: layer as u64,
            limit: self.layers.len() as u64 - 1,
        })
    }

    pub(super) fn ids(&self) -> Option<Region> {
        self.ids.as_ref().map(Region::from)
    }

    /// Every buffer, for the checks to poison.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.layers
            .iter()
            .flat_map(|layer| [Some(&layer.latent), Some(&layer.rope_key), layer.statistics.as_ref()])
            .flatten()
            .chain(&self.ids)
    }

    pub(super) fn rows(&self) -> u32 {
        self.options.batch * self.options.capacity
    }

    pub(super) fn stamp(&self) -> (u64, u64) {
        (self.identity, self.generation)
    }

    /// Checks new tokens and uploads what every layer needs to know of them. The cache is not changed.
    ///
    /// # Errors
    /// [`Error::CacheFull`], [`Error::TokenId`], a wrong number of counts or ids, or no new token at all.
    pub fn plan_step(&self, input: StepInput<'_>) -> Result<Step> {
        Step::plan(self, input)
    }

    /// Makes the tokens of a recorded step part of the cache.
    ///
    /// # Errors
    /// [`Error::StaleStep`] when the step was planned on another cache or before another change of this one.
    pub fn commit(&mut self, step: &Step) -> Result<()> {
        if step.stamp() != self.stamp() {
            return Err(Error::StaleStep);
        }
        self.lengths.copy_from_slice(step.lengths_after());
        self.generation += 1;
        Ok(())
    }

    fn check_sequence(&self, sequence: usize) -> Result<()> {
        if sequence >= self.lengths.len() {
            let limit = self.lengths.len() as u64 - 1;
            return Err(Error::OutOfRange { what: "sequence of the cache", found: sequence as u64, limit });
        }
        Ok(())
    }

    /// Rolls a sequence back to its first `length` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when there is no such sequence or it is shorter.
    pub fn truncate(&mut self, sequence: usize, length: u32) -> Result<()> {
        self.check_sequence(sequence)?;
        let limit = self.lengths[sequence];
        if length > limit {
            let found = length.into();
            return Err(Error::OutOfRange { what: "length to truncate to", found, limit: limit.into() });
        }
        self.lengths[sequence] = length;
        self.generation += 1;
        Ok(())
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        self.lengths.fill(0);
        self.generation += 1;
    }

    /// Records the copy of one sequence over another, in every layer; `to` then has the length of `from`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when there is no such sequence; what recording refuses. The cache is then unchanged.
    pub fn copy_sequence(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        self.check_sequence(from)?;
        self.check_sequence(to)?;
        if from == to {
            return Ok(());
        }
        let mark = recording.mark();
        let copied = self.record_copy(recording, from, to);
        if copied.is_err() {
            recording.rewind(mark);
        } else {
            self.lengths[to] = self.lengths[from];
            self.generation += 1;
        }
        copied
    }

    fn record_copy(&self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        let stored =
            |width: u32| (u64::from(self.options.storage.row_pitch(width)) * self.options.storage.bytes() / 4) as u32;
        let length = self.lengths[from];
        let mut copy = |buffer: &wgpu::Buffer, row_words: u32| {
            let first = |sequence: usize| product(&[sequence as u32, self.options.capacity, row_words]);
            // Every cache buffer is within a binding, so word indices fit 32 bits.
            let problem = cache_copy::Problem {
                words: length * row_words,
                from_word: first(from) as u32,
                to_word: first(to) as u32,
            };
            cache_copy::encode(recording, &problem, &buffer.into(), Tuning::Auto)
        };
        for layer in &self.layers {
            copy(&layer.latent, stored(self.config.d_latent))?;
            copy(&layer.rope_key, stored(self.config.d_rope))?;
            if let Some(statistics) = &layer.statistics {
                copy(statistics, 2)?;
            }
        }
        self.ids.as_ref().map_or(Ok(()), |ids| copy(ids, 1))
    }

    /// Bytes allocated on the device, by purpose, together with a workspace.
    pub fn memory(&self, workspace: &Workspace) -> MemoryReport {
        let sum = |of: fn(&LayerCache) -> u64| self.layers.iter().map(of).sum();
        MemoryReport {
            latent: sum(|layer| layer.latent.size()),
            rope_key: sum(|layer| layer.rope_key.size()),
            ids: self.ids.as_ref().map_or(0, wgpu::Buffer::size),
            statistics: sum(|layer| layer.statistics.as_ref().map_or(0, wgpu::Buffer::size)),
            workspace: workspace.bytes(),
        }
    }
}

/// Bytes on the device, by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryReport {
    /// Cached latents of all layers.
    pub latent: u64,
    /// Cached rotary keys of all layers.
    pub rope_key: u64,
    /// Cached token ids, shared by the layers.
    pub ids: u64,
    /// Cached norm statistics of all layers.
    pub statistics: u64,
    /// Intermediate results of one step, shared by the layers.
    pub workspace: u64,
}

impl MemoryReport {
    /// The lines of the report: name and bytes.
    pub fn lines(&self) -> [(&'static str, u64); 5] {
        [
            ("latent", self.latent),
            ("rope key", self.rope_key),
            ("token ids", self.ids),
            ("norm statistics", self.statistics),
            ("workspace", self.workspace),
        ]
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.lines().iter().map(|(_, bytes)| bytes).sum()
    }
}
