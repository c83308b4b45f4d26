//! The cache of keys and values per head of a model.

use super::batch::{Batch, Extents, Numbering, pitch};
use super::cache::CacheOptions;
use super::gqa::GqaAttention;
use super::layout::MemoryReport;
use super::step::{MOST_DECODED, Step};
use super::workspace::{CacheRows, MOST_TILE_ROWS};
use crate::adapter::PlanContext;
use crate::config::GqaConfig;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_decode::{SPLIT, most_partials, workgroups};
use crate::kernels::attention_prefill;
use crate::storage::{padded_width, product, words};

/// Widths as shaders see them: heads padded with zeros to [`UNIT`](crate::storage::UNIT) elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadWidths {
    pub hidden: u32,
    pub n_head: u32,
    pub n_kv_head: u32,
    pub head_dim: u32,
}

impl HeadWidths {
    /// The widths of a configuration that has been validated.
    ///
    /// # Errors
    /// Padded widths that 32 bits do not index.
    pub fn of(config: &GqaConfig) -> Result<Self> {
        let GqaConfig { hidden_size, n_head, n_kv_head, head_dim, .. } = *config;
        let head_dim = padded_width(head_dim);
        let heads = u64::from(n_head) + 2 * u64::from(n_kv_head);
        if heads * u64::from(head_dim) >= 1 << 31 {
            return Err(Error::config("num_attention_heads", "the padded heads of a token are 2^31 elements or more"));
        }
        Ok(HeadWidths { hidden: padded_width(hidden_size), n_head, n_kv_head, head_dim })
    }

    /// Width of the queries of a token, and of its values.
    pub fn queries(&self) -> u32 {
        self.n_head * self.head_dim
    }

    /// Width of the keys and values of a token.
    pub fn kv(&self) -> u32 {
        2 * self.n_kv_head * self.head_dim
    }

    /// Width of queries, keys and values of a token.
    pub fn row(&self) -> u32 {
        self.queries() + self.kv()
    }
}

/// Intermediate results of one step. Layers share them, and so do steps in flight on one queue, since commands run in order.
#[derive(Debug)]
pub(super) struct HeadsWorkspace<T = Region> {
    max_tokens: u32,
    decode_tokens: u32,
    /// `[tokens, n_head + 2 · n_kv_head, head_dim]`: queries, keys, values.
    pub row: T,
    /// `[tokens, n_head, head_dim]`, rotated.
    pub q: T,
    pub values: T,
    pub softmax: T,
    pub partial_values: T,
    pub partial_softmax: T,
    pub lse: T,
    bytes: u64,
}

impl<T> HeadsWorkspace<T> {
    /// A workspace whose buffers `place` makes from name, extents and bytes.
    fn placed(
        context: &PlanContext,
        widths: &HeadWidths,
        options: &CacheOptions,
        mut place: impl FnMut(&'static str, &[u32], u64) -> Result<T>,
    ) -> Result<Self> {
        let HeadWidths { n_head, n_kv_head, head_dim, .. } = *widths;
        let CacheRows { splits, short, .. } = CacheRows::of(options);
        let tokens = options.new_tokens();
        let decode_tokens = options.decode_tokens.clamp(1, MOST_DECODED);
        let decoding = product(&[options.batch, decode_tokens]).min(tokens.into()) as u32;
        let [longest, shortest] = [splits, short].map(|splits| u64::from(splits) * u64::from(decode_tokens));
        let groups = workgroups(context, n_head, n_kv_head);
        let partials = most_partials(context, groups, decoding, longest, shortest).min(u32::MAX.into()) as u32;
        let slices = attention_prefill::slices(head_dim);
        let mut bytes = 0;
        let mut allocate = |what: &'static str, extents: &[u32]| {
            // The smallest buffer of `Kernels::allocate`.
            let needed = words(product(extents)).max(16);
            bytes += needed;
            place(what, extents, needed)
        };
        let workspace = HeadsWorkspace {
            max_tokens: tokens,
            decode_tokens,
            row: allocate("row", &[tokens, widths.row()])?,
            q: allocate("q", &[tokens, widths.queries()])?,
            values: allocate("values", &[tokens, widths.queries()])?,
            softmax: allocate("softmax", &[tokens, n_head, slices, 2])?,
            partial_values: allocate("partial_values", &[partials, widths.queries()])?,
            partial_softmax: allocate("partial_softmax", &[partials, n_head, 2])?,
            lse: allocate("lse", &[decoding, n_head])?,
            bytes: 0,
        };
        Ok(HeadsWorkspace { bytes, ..workspace })
    }
}

/// Cache rows of a layer, cut into buffers that one binding holds: the parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// Of the whole layer.
    rows: u32,
    /// Of each part but the last, a multiple of [`SPLIT`].
    pub part_rows: u32,
    pub row_bytes: u64,
}

impl Parts {
    /// # Errors
    /// Extents of 0 or over 2^31 cache rows; [`SPLIT`] rows over a binding.
    fn new(context: &PlanContext, widths: &HeadWidths, options: &CacheOptions) -> Result<Self> {
        options.check_extents(pitch(options.capacity, Numbering::InPlace))?;
        let rows = options.batch * pitch(options.capacity, Numbering::InPlace);
        let row_bytes = options.storage.sized(widths.kv().into());
        let split_bytes = row_bytes.saturating_mul(SPLIT.into());
        context.check_binding(split_bytes, || format!("keys and values of {SPLIT} cache rows"))?;
        let splits = (context.largest_binding() / split_bytes).min(u64::from(MOST_TILE_ROWS / SPLIT)) as u32;
        Ok(Parts { rows, part_rows: splits * SPLIT, row_bytes })
    }

    fn bytes(&self) -> u64 {
        self.row_bytes * u64::from(self.rows)
    }

    /// First row and number of rows of each.
    fn each(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let Parts { rows, part_rows, .. } = *self;
        (0..rows).step_by(part_rows as usize).map(move |first| (first, part_rows.min(rows - first)))
    }
}

impl CacheOptions {
    /// Bytes of a cache of keys and values per head on a device, by purpose, before it is made.
    ///
    /// # Errors
    /// As [`KvCache::new`], for extents and limits.
    pub fn memory_of_heads(&self, context: &PlanContext, config: &GqaConfig) -> Result<MemoryReport> {
        config.validate()?;
        config.rope.check_length(self.capacity as usize)?;
        let widths = HeadWidths::of(config)?;
        let parts = Parts::new(context, &widths, self)?;
        let workspace = HeadsWorkspace::placed(context, &widths, self, |what, extents, needed| {
            context.check_binding(needed, || format!("workspace `{what}` of {extents:?} words"))
        })?;
        Ok(MemoryReport {
            keys_and_values: parts.bytes().saturating_mul(self.n_layer.into()),
            workspace: workspace.bytes,
            ..MemoryReport::default()
        })
    }
}

/// Rotated keys, and values, of every layer of a model, for `batch` sequences of up to `capacity` tokens. A sequence begins at a
/// multiple of [`SPLIT`] cache rows, so that steps number rows as the cache does and nothing is copied for a step. Where one
/// binding does not hold a layer's rows, they are cut into buffers of whole splits.
///
/// Lengths live on the host: a full cache is an error before anything is recorded, and rolling back costs nothing on the device.
#[derive(Debug)]
pub struct KvCache {
    pub(super) kernels: Kernels,
    pub(super) config: GqaConfig,
    pub(super) widths: HeadWidths,
    pub(super) options: CacheOptions,
    pub(super) parts: Parts,
    /// The parts of each.
    pub(super) layers: Vec<Vec<Region>>,
    workspace: HeadsWorkspace,
    pub(super) batch: Batch,
    memory: MemoryReport,
}

impl KvCache {
    /// Allocates a cache for a layer, or for several of its configuration. `tile_rows` and `decode_path` of the options are those of
    /// latents: nothing is rebuilt here, and there is one path.
    ///
    /// # Errors
    /// Extents of 0 or over 2^31 cache rows; a capacity beyond [`RopeConfig::check_length`](crate::config::RopeConfig::check_length); a
    /// buffer over the device's limits, before any is allocated; no memory left.
    pub fn new(attention: &GqaAttention, options: CacheOptions) -> Result<Self> {
        let GqaAttention { kernels, config, widths, .. } = attention;
        KvCache::with(kernels, config, widths, options)
    }

    /// The same by the layers' configuration.
    pub(super) fn with(
        kernels: &Kernels,
        config: &GqaConfig,
        widths: &HeadWidths,
        options: CacheOptions,
    ) -> Result<Self> {
        let context = kernels.context();
        let memory = options.memory_of_heads(context, config)?;
        let parts = Parts::new(context, widths, &options)?;
        let workspace = HeadsWorkspace::placed(context, widths, &options, |what, _, needed| {
            kernels.allocate(&format!("egmla.workspace.{what}"), needed).map(|buffer| Region::from(&buffer))
        })?;
        let part = |(_, rows)| {
            let buffer = kernels.allocate("egmla.cache.layer", u64::from(rows) * parts.row_bytes)?;
            Ok(Region::from(&buffer))
        };
        let layer = |_| parts.each().map(part).collect::<Result<Vec<_>>>();
        let layers = (0..options.n_layer).map(layer).collect::<Result<Vec<_>>>()?;
        let extents = Extents {
            batch: options.batch,
            capacity: options.capacity,
            pitch: pitch(options.capacity, Numbering::InPlace),
            part_rows: u32::MAX,
            numbering: Numbering::InPlace,
            max_tokens: workspace.max_tokens,
            decode_tokens: workspace.decode_tokens,
            groups: workgroups(context, widths.n_head, widths.n_kv_head),
        };
        Ok(KvCache {
            kernels: kernels.clone(),
            config: config.clone(),
            widths: *widths,
            options,
            parts,
            layers,
            workspace,
            batch: Batch::new(extents, &config.rope, config.head_dim),
            memory,
        })
    }

    /// The extents.
    pub fn options(&self) -> CacheOptions {
        self.options
    }

    /// The layers' configuration.
    pub fn config(&self) -> &GqaConfig {
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

    /// Most new tokens of a step: `max_tokens` of the options, or every cache row of a smaller cache.
    pub fn max_tokens(&self) -> u32 {
        self.batch.max_tokens
    }

    /// Makes the tokens of a step part of the cache. Call it once all layers are recorded.
    ///
    /// # Errors
    /// [`Error::StaleStep`] for a step of another cache, or after a change of the cache.
    pub fn commit(&mut self, step: Step) -> Result<()> {
        self.batch.check_stamp(&step)?;
        self.batch.commit(step);
        Ok(())
    }

    /// Rolls a sequence back to its first `length` tokens.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` for a sequence that does not exist or is shorter.
    pub fn truncate(&mut self, sequence: usize, length: u32) -> Result<()> {
        self.batch.check_truncation(sequence, length)?;
        self.batch.settle();
        self.batch.lengths[sequence] = length;
        Ok(())
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        self.batch.settle();
        self.batch.lengths.fill(0);
    }

    /// Bytes allocated on the device, by purpose.
    pub fn memory(&self) -> MemoryReport {
        self.memory
    }

    pub(super) fn workspace(&self) -> &HeadsWorkspace {
        &self.workspace
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&[Region]> {
        self.layers.get(layer).map(Vec::as_slice).ok_or(Error::Argument(ArgumentError::OutOfRange {
            what: "layer of the cache",
            found: layer as u64,
            limit: self.layers.len() as u64 - 1,
        }))
    }

    /// The bindings that hold rows of a step, first to last.
    pub(super) fn tiles<'a>(&'a self, step: &Step, layer: &'a [Region]) -> impl Iterator<Item = Tile> + 'a {
        let row_bytes = self.parts.row_bytes;
        // The first sequence that has new tokens, from its first row on.
        let begin = step.appended.first().map_or(0, |new| new.start / self.batch.pitch * self.batch.pitch);
        let end = step.rows;
        self.parts.each().zip(layer).filter_map(move |((part, rows), region)| {
            let first = part.max(begin);
            let bound = (part + rows).checked_sub(first).filter(|&bound| bound > 0 && first < end)?;
            let [offset, size] = [first - part, bound].map(|rows| u64::from(rows) * row_bytes);
            let region = Region::new(&region.buffer, region.offset + offset, size);
            Some(Tile { first, rows: bound.min(end - first), bound, region })
        })
    }
}

/// Cache rows of a layer in one binding.
pub(super) struct Tile {
    /// First cache row.
    pub first: u32,
    /// Rows that the step looks at.
    pub rows: u32,
    /// Rows of the binding.
    pub bound: u32,
    pub region: Region,
}
