//! Bytes of a cache and of its parts: every limit is checked here, before anything is allocated.

use super::batch::{Numbering, pitch};
use super::cache::CacheOptions;
use super::groups;
use super::lists::GateRows;
use super::widths::Widths;
use super::workspace::Workspace;
use crate::adapter::PlanContext;
use crate::config::{AttentionConfig, GateNorm};
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_grouped::{SEQUENCE_WORDS, Tiling, tiling};
use crate::storage::{Storage, padded, product, words};

/// One layer's rows of a cache, in the order of its parts.
#[derive(Debug)]
pub(super) struct LayerCache {
    pub parts: Vec<CachePart>,
    pub pool: Option<Region>,
}

/// Latents, rotary keys and statistics in one buffer: one binding for kernels that need all.
#[derive(Debug)]
pub(super) struct CachePart {
    pub rows: u32,
    pub whole: Region,
    pub latent: Region,
    pub rope_key: Region,
    pub statistics: Option<Region>,
}

/// Offsets within the group lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ListLayout {
    pub mode: GateRows,
    pub batch: u32,
    pub capacity: u32,
    /// First word of the sequence table, after the token ids of all cache rows.
    pub table: u32,
    pub words: u32,
    /// Most groups whose gate rows are projected at once.
    pub pass_groups: u32,
    /// `None` if the device's workgroup memory holds no head of these widths.
    pub tiling: Option<Tiling>,
    pub region: groups::Layout,
}

impl ListLayout {
    fn new(
        context: &PlanContext,
        widths: &Widths,
        mode: GateRows,
        (batch, capacity): (u32, u32),
        vocab_size: u32,
    ) -> Result<Self> {
        let tiling = tiling(context, widths.grouped()).ok();
        let ids = product(&[batch, capacity]).next_multiple_of(64);
        let table_words = product(&[batch, SEQUENCE_WORDS]).next_multiple_of(64);
        let region = groups::Layout::new(capacity);
        let words = region
            .map_or(u64::MAX, |layout| ids.saturating_add(table_words).saturating_add(product(&[batch, layout.words])));
        let (needed, allowed) = (words.saturating_mul(4), context.largest_binding());
        let (Some(region), true) = (region, needed <= allowed) else {
            let what = format!("group lists of {batch} sequences × {capacity} tokens");
            return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
        };
        if matches!(mode, GateRows::Pool { rows: 0 }) {
            return Err(Error::Argument(ArgumentError::Empty { what: "the pool of gate rows" }));
        }
        let entry_groups = tiling.map_or(1, |tiling| tiling.entry_groups());
        // Distinct ids are bounded by the vocabulary; a sequence's groups fill whole entries.
        let most = product(&[batch, capacity.min(vocab_size).next_multiple_of(entry_groups)]);
        let row_bytes = product(&[widths.d_kv(), 4]);
        let room = (allowed / row_bytes.max(1)).min(4096).min(most);
        let pass_groups = (room as u32 / entry_groups * entry_groups).max(entry_groups);
        let (table, words) = (ids as u32, words as u32);
        Ok(ListLayout { mode, batch, capacity, table, words, pass_groups, tiling, region })
    }

    /// Word where the lists of a sequence begin.
    pub fn base(&self, sequence: u32) -> u32 {
        self.words - (self.batch - sequence) * self.region.words
    }

    /// Most partial results of a step of `tokens` query tokens per sequence.
    pub fn most_partials(&self, vocab_size: u32, tokens: u32) -> u64 {
        let Some(tiling) = self.tiling else { return 0 };
        let groups = self.capacity.min(vocab_size);
        let tiles = groups.div_ceil(tiling.entry_groups());
        let chunks = self.region.most_chunks();
        let rows = product(&[self.batch, groups.next_multiple_of(tiling.entry_groups())]);
        let passes = if self.mode == GateRows::Table { 1 } else { rows.div_ceil(self.pass_groups.into()).max(1) };
        let entries = u64::from(tiles) + passes * u64::from(chunks.div_ceil(tiling.span));
        product(&[self.batch, tokens]).saturating_mul(entries)
    }
}

/// Offsets within a part of a layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PartLayout {
    rows: u32,
    latent: u64,
    rope_byte: u64,
    rope_key: u64,
    statistics_byte: u64,
    statistics: u64,
}

impl PartLayout {
    /// Bytes of the buffer.
    fn whole(&self) -> u64 {
        self.statistics_byte.saturating_add(self.statistics)
    }

    fn allocate(&self, kernels: &Kernels) -> Result<CachePart> {
        let buffer = kernels.allocate("egmla.cache.layer", self.whole())?;
        Ok(CachePart {
            rows: self.rows,
            whole: Region::from(&buffer),
            latent: Region::new(&buffer, 0, self.latent),
            rope_key: Region::new(&buffer, self.rope_byte, self.rope_key),
            statistics: (self.statistics > 0).then(|| Region::new(&buffer, self.statistics_byte, self.statistics)),
        })
    }
}

/// What the parts of a layer's cache have of every row.
#[derive(Debug, Clone, Copy)]
struct RowWidths {
    latent: u32,
    rope_key: u32,
    /// Gated keys and values are normed.
    statistics: bool,
    storage: Storage,
    /// Of the beginning of a binding.
    alignment: u64,
}

impl RowWidths {
    /// A part of `rows` rows.
    fn part(&self, rows: u32) -> PartLayout {
        let stored = |width: u32| self.storage.sized(width.into()).saturating_mul(rows.into());
        let latent = stored(self.latent);
        let rope_byte = padded(latent, self.alignment);
        let rope_key = stored(self.rope_key).max(16);
        let statistics_byte = padded(rope_byte.saturating_add(rope_key), self.alignment);
        let statistics = if self.statistics { (u64::from(rows) * 8).next_multiple_of(16) } else { 0 };
        PartLayout { rows, latent, rope_byte, rope_key, statistics_byte, statistics }
    }

    /// Rows of the largest part that `bytes` hold, in whole splits, at least one.
    fn most_rows(&self, bytes: u64) -> u32 {
        let split = self.part(SPLIT).whole();
        (bytes / split.max(1)).clamp(1, u64::from((u32::MAX >> 1) / SPLIT)) as u32 * SPLIT
    }
}

/// Offsets within a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheLayout {
    /// Cache rows from one sequence to the next.
    pub pitch: u32,
    /// Cache rows of a part: see [`super::parts`].
    pub part_rows: u32,
    /// Parts before the last, all alike.
    full_parts: u32,
    full: PartLayout,
    last: PartLayout,
    /// Bytes of a layer's pool of gate rows.
    pool: Option<u64>,
    pub lists: Option<ListLayout>,
    /// Bytes of intermediate results.
    workspace: u64,
}

impl CacheLayout {
    /// # Errors
    /// Extents of 0 or over 2^31 cache rows; a buffer of the cache or of its intermediate results over the device's limits.
    pub fn new(
        context: &PlanContext,
        config: &AttentionConfig,
        widths: &Widths,
        options: &CacheOptions,
        gate_rows: GateRows,
    ) -> Result<Self> {
        config.rope.check_length(options.capacity as usize)?;
        let gate = config.up_projected_gate();
        let row = RowWidths {
            latent: widths.d_latent,
            rope_key: widths.d_rope,
            statistics: gate.is_some_and(|gate| gate.norm != GateNorm::None),
            storage: options.storage,
            alignment: u64::from(context.limits.min_storage_buffer_offset_alignment.max(16)),
        };
        let whole = row.part(options.check_extents(options.capacity)?);
        // Cut where one binding does not hold it; the absorbed decode of a gate on keys and values binds it whole.
        let cut = whole.whole() > context.largest_binding();
        if cut && gate.is_some() {
            let what = || {
                let CacheOptions { batch, capacity, .. } = options;
                format!("latent cache with rotary keys and statistics of {batch} sequences × {capacity} tokens")
            };
            context.check_binding(whole.whole(), what)?;
        }
        let (pitch, part_rows, full_parts, last) = if cut {
            let split = row.part(SPLIT).whole();
            context.check_binding(split, || format!("latents and rotary keys of {SPLIT} cache rows"))?;
            let pitch = pitch(options.capacity, Numbering::InPlace);
            let rows = options.check_extents(pitch)?;
            let part_rows = row.most_rows(context.largest_binding());
            let full_parts = (rows - 1) / part_rows;
            (pitch, part_rows, full_parts, row.part(rows - full_parts * part_rows))
        } else {
            (options.capacity, u32::MAX, 0, whole)
        };
        let full = if cut { row.part(part_rows) } else { whole };
        let pool = match (gate, gate_rows) {
            (Some(_), GateRows::Pool { rows }) => {
                let needed = options.storage.sized(product(&[rows, widths.d_kv()]));
                context.check_binding(needed, || format!("a pool of {rows} gate rows"))?;
                Some(needed)
            }
            _ => None,
        };
        let extents = (options.batch, options.capacity);
        let lists =
            gate.map(|gate| ListLayout::new(context, widths, gate_rows, extents, gate.vocab_size)).transpose()?;
        let workspace = Workspace::check(context, config, widths, options, lists.as_ref())?;
        Ok(CacheLayout { pitch, part_rows, full_parts, full, last, pool, lists, workspace })
    }

    /// Parts of a layer's cache.
    #[cfg(feature = "check")]
    pub fn n_part(&self) -> u32 {
        self.full_parts + 1
    }

    /// Bytes of a cache of `n_layer` layers.
    pub fn memory(&self, n_layer: u32) -> MemoryReport {
        let of_layers = |bytes: u64| bytes.saturating_mul(n_layer.into());
        let of_parts = |bytes: fn(&PartLayout) -> u64| {
            let full = bytes(&self.full).saturating_mul(self.full_parts.into());
            of_layers(full.saturating_add(bytes(&self.last)))
        };
        MemoryReport {
            latent: of_parts(|part| part.latent),
            rope_key: of_parts(|part| part.rope_key),
            keys_and_values: 0,
            lists: self.lists.map_or(0, |lists| words(lists.words.into())),
            statistics: of_parts(|part| part.statistics),
            gate_rows: of_layers(self.pool.unwrap_or(0)),
            workspace: self.workspace,
        }
    }

    /// One layer's part of the cache.
    pub fn allocate(&self, kernels: &Kernels) -> Result<LayerCache> {
        let full = (0..self.full_parts).map(|_| self.full);
        let parts = full.chain([self.last]).map(|part| part.allocate(kernels)).collect::<Result<_>>()?;
        let pool = self.pool.map(|bytes| kernels.allocate("egmla.cache.gate_rows", bytes)).transpose()?;
        Ok(LayerCache { parts, pool: pool.as_ref().map(Region::from) })
    }
}

impl CacheOptions {
    /// Cache rows of sequences `pitch` rows apart.
    ///
    /// # Errors
    /// Extents of 0 or over 2^31 cache rows.
    pub(super) fn check_extents(&self, pitch: u32) -> Result<u32> {
        for (what, extent) in [
            ("layers of the cache", self.n_layer),
            ("sequences of the cache", self.batch),
            ("capacity of the cache", self.capacity),
            ("step (max_tokens is 0)", self.max_tokens),
        ] {
            if extent == 0 {
                return Err(Error::Argument(ArgumentError::Empty { what }));
            }
        }
        let rows = product(&[self.batch, pitch]);
        let most = (1 << 31) - 1;
        if rows > most {
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "batch × capacity of the cache",
                found: rows,
                limit: most,
            }));
        }
        Ok(rows as u32)
    }
}

/// Bytes on the device, by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MemoryReport {
    /// Cached latents of all layers.
    pub latent: u64,
    /// Cached rotary keys of all layers.
    pub rope_key: u64,
    /// Cached keys and values per head of all layers.
    pub keys_and_values: u64,
    /// Token ids and group lists, shared by the layers.
    pub lists: u64,
    /// Cached norm statistics of all layers.
    pub statistics: u64,
    /// Kept gate rows: the pools of all layers, or their tables ([`super::Attention::gate_table_bytes`]) if the caller has
    /// added them.
    pub gate_rows: u64,
    /// Intermediate results of one step, shared by the layers.
    pub workspace: u64,
}

impl MemoryReport {
    /// The lines of the report: name and bytes.
    pub fn lines(&self) -> [(&'static str, u64); 7] {
        [
            ("latent", self.latent),
            ("rope key", self.rope_key),
            ("keys and values", self.keys_and_values),
            ("token ids and groups", self.lists),
            ("norm statistics", self.statistics),
            ("gate rows", self.gate_rows),
            ("workspace", self.workspace),
        ]
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.lines().iter().map(|(_, bytes)| bytes).sum()
    }
}
