//! The latent cache of a model: what EG-MLA and MLA keep of every past token.

use super::batch::{Batch, Extents, Numbering};
use super::cost;
use super::layer::{Attention, DecodePath};
use super::layout::{CacheLayout, LayerCache, MemoryReport};
use super::lists::{GateRows, Lists};
use super::step::Step;
#[cfg(feature = "check")]
use super::weights::{Axis, Upload};
use super::widths::Widths;
use super::workspace::Workspace;
use crate::adapter::PlanContext;
use crate::config::AttentionConfig;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_absorbed::workgroups;
use crate::kernels::attention_grouped;
use crate::storage::Storage;
#[cfg(feature = "check")]
use crate::weights::HostTensor;

/// Extents of a [`LatentCache`], and of the buffers for intermediate results that it owns.
///
/// A decode step also keeps the partial results of every split of the cache until they are combined:
/// `n_head · max(d_value, d_latent) · 4` bytes per 256 cache rows (`d_value` alone with the gate at `up_projected`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Layers that share the cache.
    pub n_layer: u32,
    /// Sequences.
    pub batch: u32,
    /// Tokens that each sequence has room for.
    pub capacity: u32,
    /// Storage of latents and rotary keys.
    pub storage: Storage,
    /// Most new tokens of a step, over all sequences.
    pub max_tokens: u32,
    /// Most new tokens per sequence in a decode step, up to [`super::MOST_DECODED`]: each has its own partial results.
    pub decode_tokens: u32,
    /// Cache rows whose keys and values are rebuilt at once, up to 2^19, rounded up to the split length. More rows take fewer
    /// dispatches, fewer rows less memory.
    pub tile_rows: u32,
    /// Path of decode steps.
    pub decode_path: DecodePath,
}

impl CacheOptions {
    /// Bytes of such a cache on a device, by purpose, before it is made.
    ///
    /// # Errors
    /// As [`LatentCache::new`], for extents and limits.
    pub fn memory(&self, context: &PlanContext, config: &AttentionConfig, gate_rows: GateRows) -> Result<MemoryReport> {
        config.validate()?;
        let layout = CacheLayout::new(context, config, &Widths::of(config)?, self, gate_rows)?;
        Ok(layout.memory(self.n_layer))
    }
}

impl CacheOptions {
    /// Most new tokens of a step: no more than the cache holds.
    pub(crate) fn new_tokens(&self) -> u32 {
        self.max_tokens.min(self.batch.saturating_mul(self.capacity))
    }

    /// A commit after one layer would lose the others.
    pub(super) fn check_one_layer(&self) -> Result<()> {
        if self.n_layer == 1 {
            return Ok(());
        }
        let what = "layers of the cache (with several, use prepare, forward and commit)";
        Err(Error::Argument(ArgumentError::Count { what, expected: 1, found: self.n_layer.into() }))
    }
}

impl Default for CacheOptions {
    /// One layer and one sequence of up to 2048 tokens in f32, 512 new tokens in a step and one in a decode step.
    fn default() -> Self {
        CacheOptions {
            n_layer: 1,
            batch: 1,
            capacity: 2048,
            storage: Storage::F32,
            max_tokens: 512,
            decode_tokens: 1,
            tile_rows: 1024,
            decode_path: DecodePath::Auto,
        }
    }
}

/// Latents and rotary keys of every layer of a model, for `batch` sequences of up to `capacity` tokens; with the gate at
/// `up_projected` also token ids and norm statistics. Sequence s holds cache rows `[s·capacity, s·capacity + length)`; where one
/// binding does not hold a layer's rows, they are cut into parts of whole splits, and the capacity is rounded up to splits there.
///
/// Lengths live on the host: a full cache is an error before anything is recorded, and rolling back costs nothing on the device.
#[derive(Debug)]
pub struct LatentCache {
    pub(super) kernels: Kernels,
    pub(super) config: AttentionConfig,
    pub(super) widths: Widths,
    pub(super) options: CacheOptions,
    /// Storage of the layers' weights.
    pub(super) weights: Storage,
    pub(super) gate_rows: GateRows,
    layout: CacheLayout,
    pub(super) layers: Vec<LayerCache>,
    pub(super) lists: Option<Lists>,
    workspace: Workspace,
    pub(super) batch: Batch,
    /// The faster path of a decode step's work, as it was last decided.
    faster: Option<(cost::DecodeWork, DecodePath)>,
}

impl LatentCache {
    /// Allocates a cache for a layer, or for several of its configuration.
    ///
    /// # Errors
    /// Extents of 0 or over 2^31 cache rows; a buffer over the device's limits, or a layer's rows over one binding with the gate
    /// at `up_projected`, before any is allocated; no memory left.
    pub fn new(attention: &Attention, options: CacheOptions) -> Result<Self> {
        let Attention { kernels, config, storage, gate_rows, .. } = attention;
        LatentCache::with(kernels, config, (*storage, *gate_rows), options)
    }

    /// The same by the layers' storage of weights and source of gate rows.
    pub(super) fn with(
        kernels: &Kernels,
        config: &AttentionConfig,
        (weights, gate_rows): (Storage, GateRows),
        options: CacheOptions,
    ) -> Result<Self> {
        let widths = Widths::of(config)?;
        let layout = CacheLayout::new(kernels.context(), config, &widths, &options, gate_rows)?;
        let lists = layout.lists.map(|lists| Lists::new(kernels, lists)).transpose()?;
        let workspace = Workspace::new(kernels, config, &widths, &options, layout.lists.as_ref())?;
        let layers = (0..options.n_layer).map(|_| layout.allocate(kernels)).collect::<Result<Vec<_>>>()?;
        let extents = Extents {
            batch: options.batch,
            capacity: options.capacity,
            pitch: layout.pitch,
            part_rows: layout.part_rows,
            numbering: Numbering::Dense,
            max_tokens: workspace.max_tokens,
            decode_tokens: workspace.decode_tokens,
            groups: workgroups(widths.n_head),
        };
        Ok(LatentCache {
            kernels: kernels.clone(),
            config: config.clone(),
            widths,
            options,
            weights,
            gate_rows,
            layout,
            layers,
            lists,
            workspace,
            batch: Batch::new(extents, &config.rope, config.d_rope),
            faster: None,
        })
    }

    /// The extents.
    pub fn options(&self) -> CacheOptions {
        self.options
    }

    /// The layers' configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The kernels of its device.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Tokens that each sequence holds.
    pub fn lengths(&self) -> &[u32] {
        &self.batch.lengths
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&LayerCache> {
        self.layers.get(layer).ok_or(Error::Argument(ArgumentError::OutOfRange {
            what: "layer of the cache",
            found: layer as u64,
            limit: self.layers.len() as u64 - 1,
        }))
    }

    pub(super) fn ids(&self) -> Option<Region> {
        self.lists.as_ref().map(Lists::ids)
    }

    pub(super) fn lists(&self) -> Option<&Lists> {
        self.lists.as_ref()
    }

    pub(super) fn lists_mut(&mut self) -> Option<&mut Lists> {
        self.lists.as_mut()
    }

    pub(super) fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    pub(super) fn gate_rows(&self) -> GateRows {
        self.gate_rows
    }

    /// Sets the path of decode steps, from the next step on.
    pub fn set_decode_path(&mut self, path: DecodePath) {
        self.options.decode_path = path;
    }

    /// Most new tokens of a step: `max_tokens` of the options, or every cache row of a smaller cache.
    pub fn max_tokens(&self) -> u32 {
        self.workspace.max_tokens
    }

    /// The path of a step by the options: [`DecodePath::Auto`] is the one that takes less time by [`crate::attention::cost`], a
    /// choice that is kept while the step's work is about the same.
    ///
    /// # Errors
    /// [`DecodePath::Absorbed`] if the device's workgroup memory holds no head of these widths.
    pub(super) fn path_of(&mut self, step: &Step) -> Result<DecodePath> {
        match (self.options.decode_path, &self.lists) {
            (DecodePath::Expanded, _) | (DecodePath::Absorbed, None) => Ok(self.options.decode_path),
            (DecodePath::Absorbed, Some(_)) => {
                let tiling = attention_grouped::tiling(self.kernels.context(), self.widths.grouped());
                tiling.map(|_| DecodePath::Absorbed)
            }
            (DecodePath::Auto, _) => {
                let work = self.work(step).rounded();
                if let Some((_, path)) = self.faster.filter(|(known, _)| *known == work) {
                    return Ok(path);
                }
                let tile_rows = self.workspace.tile_rows;
                let path = cost::faster_path(self.kernels.context(), &self.config, &work, tile_rows, self.weights);
                self.faster = Some((work, path));
                Ok(path)
            }
        }
    }

    /// The work of a decode step.
    fn work(&self, step: &Step) -> cost::DecodeWork {
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
            parts: step.parts.len() as u32,
            cache_storage: self.options.storage,
        }
    }

    /// Distinct token ids that each sequence holds; empty unless the gate is at `up_projected`.
    pub fn distinct_ids(&self) -> Vec<u32> {
        self.lists.as_ref().map_or_else(Vec::new, Lists::distinct)
    }

    /// Every buffer, for the checks to poison.
    #[cfg(feature = "check")]
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.layers
            .iter()
            .flat_map(|layer| layer.parts.iter().map(|part| &part.whole).chain(&layer.pool))
            .map(|region| &region.buffer)
            .chain(self.lists.as_ref().map(|lists| &lists.buffer))
            .chain(self.workspace.buffers())
    }

    /// Marks a change of the state: steps made before it are stale, and their appended tokens are rolled back.
    pub(super) fn settle(&mut self) {
        if let Some(lists) = &mut self.lists {
            lists.settle();
        }
        self.batch.settle();
    }

    /// Makes the tokens of a step part of the cache. Call it once all layers are recorded.
    ///
    /// # Errors
    /// [`Error::StaleStep`] for a step of another cache, or after a change of the cache.
    pub fn commit(&mut self, step: Step) -> Result<()> {
        self.batch.check_stamp(&step)?;
        if let Some(lists) = &mut self.lists {
            lists.commit(&step.lists);
        }
        self.batch.commit(step);
        Ok(())
    }

    /// Fills the one sequence of a one-layer cache with tokens of these ids and latents from `value`, of order 1, in place of a
    /// prefill. For benches: the numbers are finite and mean nothing.
    #[cfg(feature = "check")]
    pub(crate) fn fill(&mut self, ids: &[u32], mut value: impl FnMut() -> f32) -> Result<()> {
        let mut rows = |width: u32| (0..ids.len() * width as usize).map(|_| value()).collect::<Vec<_>>();
        let (latent, rope_key) = (rows(self.config.d_latent), rows(self.config.d_rope));
        // μ = 0, ρ = 1 in every cache row.
        self.fill_with(ids, &latent, &rope_key, &vec![[0.0, 1.0]; ids.len()])
    }

    /// Fills the one sequence of a one-layer cache with tokens of these ids, latents `[tokens, d_latent]`, rotated keys
    /// `[tokens, d_rope]` and norm statistics `[tokens]`, as a prefill of them would.
    ///
    /// # Errors
    /// A cache of several sequences, layers or parts, counts that differ, more tokens than it has room for, or no memory left.
    #[cfg(feature = "check")]
    pub(crate) fn fill_with(
        &mut self,
        ids: &[u32],
        latent: &[f32],
        rope_key: &[f32],
        statistics: &[[f32; 2]],
    ) -> Result<()> {
        let CacheOptions { batch, capacity, storage, .. } = self.options;
        let (batch, found) = (u64::from(batch), ids.len() as u64);
        if batch != 1 || self.layers.len() != 1 || self.layout.n_part() != 1 {
            return Err(Error::Argument(ArgumentError::Count {
                what: "sequences × layers × parts to fill",
                expected: 1,
                found: batch * self.layers.len() as u64 * u64::from(self.layout.n_part()),
            }));
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
                return Err(Error::Argument(ArgumentError::Count {
                    what,
                    expected: expected as u64,
                    found: found as u64,
                }));
            }
        }
        // Cache rows past the last token stay 0: nothing reads them before they are written.
        let rows = |name: &str, columns: Axis, values: &[f32]| {
            let (name, shape) = (name.to_owned(), vec![tokens, values.len() / tokens.max(1)]);
            let tensor = HostTensor { name, shape, data: values.to_vec() };
            Upload::matrix(&tensor, Axis::whole(tokens as u32), columns).stored(storage)
        };
        let rope = Axis::default().rotary(d_rope, self.config.rope.interleave);
        let kernels = &self.kernels;
        if let Some(layer) = self.layers.iter_mut().flat_map(|layer| &mut layer.parts).next() {
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
        self.batch.lengths.fill(ids.len() as u32);
        self.batch.settle();
        Ok(())
    }

    /// Rolls a sequence back to its first `length` tokens.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` for a sequence that does not exist or is shorter.
    pub fn truncate(&mut self, sequence: usize, length: u32) -> Result<()> {
        self.batch.check_truncation(sequence, length)?;
        self.settle();
        if let Some(lists) = &mut self.lists {
            lists.truncate(sequence as u32, length);
        }
        self.batch.lengths[sequence] = length;
        Ok(())
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        self.settle();
        if let Some(lists) = &mut self.lists {
            lists.reset();
        }
        self.batch.lengths.fill(0);
    }

    /// Bytes allocated on the device, by purpose.
    pub fn memory(&self) -> MemoryReport {
        self.layout.memory(self.options.n_layer)
    }
}
