//! The latent cache of a model: what EG-MLA and MLA keep of every past token.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Workspace;
use super::lists::{GateRows, Lists};
use super::step::{Step, StepInput};
use super::weights::{Axis, Upload};
use super::widths::Widths;
use crate::config::{AttentionConfig, GateNorm};
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::cache_copy;
use crate::recording::Recording;
use crate::storage::{Storage, padded, product};
use crate::weights::HostTensor;

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
    /// Where the absorbed decode takes gate rows from; matters for the gate at `up_projected` alone.
    pub gate_rows: GateRows,
}

/// One layer's latents, rotary keys and statistics, in one buffer one after another: one binding for kernels that need all.
#[derive(Debug)]
pub(super) struct LayerCache {
    pub whole: Region,
    pub latent: Region,
    pub rope_key: Region,
    pub statistics: Option<Region>,
    pub pool: Option<Region>,
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
    widths: Widths,
    options: CacheOptions,
    layers: Vec<LayerCache>,
    lists: Option<Lists>,
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
        let widths = Widths::of(config)?;
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
        let context = kernels.context();
        // Refused before anything is allocated, since the kernels bind a layer's cache whole.
        let bytes = |what: &str, needed: u64| {
            let what = || format!("{what} of {} sequences × {} tokens", options.batch, options.capacity);
            context.check_binding(needed, what).map(|()| needed)
        };
        let stored = |width: u32| options.storage.sized(width.into()).saturating_mul(rows);
        let gate = config.up_projected_gate();
        let has_statistics = gate.is_some_and(|gate| gate.norm != GateNorm::None);
        // Each part begins where a binding may begin.
        let alignment = u64::from(context.limits.min_storage_buffer_offset_alignment.max(16));
        let latent = bytes("latent cache", stored(widths.d_latent))?;
        let rope_byte = padded(latent, alignment);
        let rope_key = stored(widths.d_rope);
        let statistics_byte = padded(rope_byte.saturating_add(rope_key.max(16)), alignment);
        let statistics = if has_statistics { (rows * 8).next_multiple_of(16) } else { 0 };
        let whole = bytes("latent cache with rotary keys and statistics", statistics_byte.saturating_add(statistics))?;
        let pool = match (gate, options.gate_rows) {
            (Some(_), GateRows::Pool { rows }) => {
                let needed = options.storage.sized(product(&[rows, widths.d_kv()]));
                context.check_binding(needed, || format!("a pool of {rows} gate rows"))?;
                Some(needed)
            }
            _ => None,
        };
        let lists = gate
            .map(|gate| {
                let extents = (options.batch, options.capacity);
                Lists::new(kernels, &widths, options.gate_rows, extents, gate.vocab_size)
            })
            .transpose()?;
        let layers = (0..options.n_layer)
            .map(|_| {
                let buffer = kernels.allocate("egmla.cache.layer", whole)?;
                let pool = pool.map(|bytes| kernels.allocate("egmla.cache.gate_rows", bytes)).transpose()?;
                Ok(LayerCache {
                    whole: Region::from(&buffer),
                    latent: Region::new(&buffer, 0, latent),
                    rope_key: Region::new(&buffer, rope_byte, rope_key.max(16)),
                    statistics: has_statistics.then(|| Region::new(&buffer, statistics_byte, statistics)),
                    pool: pool.as_ref().map(Region::from),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        static IDENTITIES: AtomicU64 = AtomicU64::new(0);
        Ok(LatentCache {
            kernels: kernels.clone(),
            config: config.clone(),
            widths,
            options,
            layers,
            lists,
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

    pub(super) fn widths(&self) -> &Widths {
        &self.widths
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
        self.lists.as_ref().map(Lists::ids)
    }

    pub(super) fn lists(&self) -> Option<&Lists> {
        self.lists.as_ref()
    }

    /// Distinct token ids that each sequence holds; empty unless the gate is at `up_projected`.
    pub fn distinct_ids(&self) -> Vec<u32> {
        self.lists.as_ref().map_or_else(Vec::new, Lists::distinct)
    }

    /// Every buffer, for the checks to poison.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.layers
            .iter()
            .flat_map(|layer| [Some(&layer.whole.buffer), layer.pool.as_ref().map(|pool| &pool.buffer)])
            .flatten()
            .chain(self.lists.as_ref().map(|lists| &lists.buffer))
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
        if step.stamp() != self.stamp() || !step.holds(self.lists.as_ref()) {
            return Err(Error::StaleStep);
        }
        step.commit(self.lists.as_ref());
        self.lengths.copy_from_slice(step.lengths_after());
        self.generation += 1;
        Ok(())
    }

    /// Fills the one sequence of a one-layer cache with tokens of these ids and latents from `value`, of order 1: what a
    /// prefill would leave there, without its time. For benches: the numbers are finite and mean nothing.
    pub(crate) fn fill(&mut self, ids: &[u32], mut value: impl FnMut() -> f32) -> Result<()> {
        let mut rows = |width: u32| (0..ids.len() * width as usize).map(|_| value()).collect::<Vec<_>>();
        let (latent, rope_key) = (rows(self.config.d_latent), rows(self.config.d_rope));
        // μ = 0, ρ = 1 in every row.
        self.fill_with(ids, &latent, &rope_key, &vec![[0.0, 1.0]; ids.len()])
    }

    /// Fills the one sequence of a one-layer cache with tokens of these ids, latents `[tokens, d_latent]`, rotated keys
    /// `[tokens, d_rope]` and norm statistics `[tokens]`: what a prefill of them would leave there.
    ///
    /// # Errors
    /// Another cache than that, counts that differ, more tokens than it holds, or no memory left.
    pub(crate) fn fill_with(
        &mut self,
        ids: &[u32],
        latent: &[f32],
        rope_key: &[f32],
        statistics: &[[f32; 2]],
    ) -> Result<()> {
        let CacheOptions { batch, capacity, storage, .. } = self.options;
        let (batch, found) = (u64::from(batch), ids.len() as u64);
        if batch != 1 || self.layers.len() != 1 {
            return Err(Error::Count { what: "sequences × layers to fill", expected: 1, found: batch });
        }
        if found > capacity.into() {
            return Err(Error::CacheFull { sequence: 0, length: 0, added: found, capacity });
        }
        let (d_latent, d_rope) = (self.config.d_latent, self.config.d_rope);
        let tokens = ids.len();
        for (what, expected, found) in [
            ("latents to fill with", tokens * d_latent as usize, latent.len()),
            ("rotary keys to fill with", tokens * d_rope as usize, rope_key.len()),
            ("statistics to fill with", tokens, statistics.len()),
        ] {
            if expected != found {
                return Err(Error::Count { what, expected: expected as u64, found: found as u64 });
            }
        }
        // The rows to the capacity stay 0: nothing reads them before they are written.
        let rows = |name: &str, columns: Axis, values: &[f32]| {
            let (name, shape) = (name.to_owned(), vec![tokens, values.len() / tokens.max(1)]);
            let tensor = HostTensor { name, shape, data: values.to_vec() };
            Upload::matrix(&tensor, Axis::whole(tokens as u32), columns).stored(storage)
        };
        let rope = Axis::default().rotary(d_rope, self.config.rope.interleave);
        let kernels = &self.kernels;
        if let Some(layer) = self.layers.first_mut() {
            let mut bytes = vec![0; layer.whole.size as usize];
            let mut put = |region: &Region, part: &[u8]| {
                bytes[region.offset as usize..][..part.len()].copy_from_slice(part);
            };
            put(&layer.latent, &rows("latents", Axis::padded(d_latent), latent)?);
            put(&layer.rope_key, &rows("rotary keys", rope, rope_key)?);
            if let Some(of_layer) = &layer.statistics {
                put(of_layer, bytemuck::cast_slice(statistics));
            }
            let buffer = kernels.upload("egmla.cache.layer", &bytes)?;
            let regions = [&mut layer.whole, &mut layer.latent, &mut layer.rope_key];
            regions.into_iter().chain(&mut layer.statistics).for_each(|region| region.buffer = buffer.clone());
        }
        if let Some(lists) = &mut self.lists {
            lists.fill(kernels, ids)?;
        }
        self.lengths.fill(ids.len() as u32);
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
        if let Some(lists) = &self.lists {
            lists.truncate(sequence as u32, length);
        }
        self.lengths[sequence] = length;
        self.generation += 1;
        Ok(())
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        if let Some(lists) = &self.lists {
            lists.reset();
        }
        self.lengths.fill(0);
        self.generation += 1;
    }

    /// Records the copy of one sequence over another, in every layer; `to` then has the length of `from`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when there is no such sequence; what recording refuses. The cache is then unchanged.
    pub fn copy_sequence(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the cache", "recording")?;
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
            if let Some(lists) = &self.lists {
                lists.copy(from as u32, to as u32);
            }
            self.lengths[to] = self.lengths[from];
            self.generation += 1;
        }
        copied
    }

    fn record_copy(&self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        let stored = |width: u32| (self.options.storage.sized(width.into()) / 4) as u32;
        let length = self.lengths[from];
        let mut copy = |region: &Region, row_words: u32| {
            let first = |sequence: usize| product(&[sequence as u32, self.options.capacity, row_words]);
            // Every cache buffer is within a binding, so word indices fit 32 bits.
            let problem = cache_copy::CacheCopy {
                words: length * row_words,
                from_word: first(from) as u32,
                to_word: first(to) as u32,
            };
            recording.add(&problem, cache_copy::Args { cache: region })
        };
        for layer in &self.layers {
            copy(&layer.latent, stored(self.widths.d_latent))?;
            copy(&layer.rope_key, stored(self.widths.d_rope))?;
            if let Some(statistics) = &layer.statistics {
                copy(statistics, 2)?;
            }
        }
        let Some(lists) = &self.lists else { return Ok(()) };
        for (from_word, to_word, words) in lists.copies(from as u32, to as u32, length) {
            let problem = cache_copy::CacheCopy { words, from_word, to_word };
            recording.add(&problem, cache_copy::Args { cache: &Region::from(&lists.buffer) })?;
        }
        Ok(())
    }

    /// Bytes allocated on the device, by purpose, together with a workspace.
    pub fn memory(&self, workspace: &Workspace) -> MemoryReport {
        let sum = |of: fn(&LayerCache) -> u64| self.layers.iter().map(of).sum();
        MemoryReport {
            latent: sum(|layer| layer.latent.size),
            rope_key: sum(|layer| layer.rope_key.size),
            lists: self.lists.as_ref().map_or(0, Lists::bytes),
            statistics: sum(|layer| layer.statistics.as_ref().map_or(0, |statistics| statistics.size)),
            gate_rows: sum(|layer| layer.pool.as_ref().map_or(0, |pool| pool.size)),
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
    /// Token ids and group lists, shared by the layers.
    pub lists: u64,
    /// Cached norm statistics of all layers.
    pub statistics: u64,
    /// Gate rows that are kept: the pools of all layers, or their tables ([`super::Attention::gate_table_bytes`]) where the
    /// caller has added them.
    pub gate_rows: u64,
    /// Intermediate results of one step, shared by the layers.
    pub workspace: u64,
}

impl MemoryReport {
    /// The lines of the report: name and bytes.
    pub fn lines(&self) -> [(&'static str, u64); 6] {
        [
            ("latent", self.latent),
            ("rope key", self.rope_key),
            ("token ids and groups", self.lists),
            ("norm statistics", self.statistics),
            ("gate rows", self.gate_rows),
            ("workspace", self.workspace),
        ]
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.lines().iter().map(|(_, bytes)| bytes).sum()
    }
}
