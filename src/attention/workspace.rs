//! Buffers for the intermediate results of a step, shared by all layers.

use std::sync::atomic::{AtomicU64, Ordering};

use super::cache::LatentCache;
use super::lists::GateRows;
use super::step::MOST_DECODED;
use crate::config::GateSite;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_grouped::softmax_word;
use crate::kernels::attention_prefill;
use crate::storage::product;

/// Extents of a [`Workspace`].
///
/// Beside what these bound, decode keeps the partial results of every split of the cache until they are combined:
/// `n_head · max(d_value, d_latent) · 4` bytes per 256 cache rows (`d_value` alone with the gate at `up_projected`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkspaceOptions {
    /// Most new tokens of a step, over all sequences.
    pub max_tokens: u32,
    /// Cached rows whose keys and values are rebuilt at once, up to 2^19; rounded up to the split length. More rows mean fewer
    /// dispatches, fewer rows mean less memory.
    pub tile_rows: u32,
    /// Most new tokens of a sequence in a decode step, up to [`super::MOST_DECODED`]: each has partial results of its own.
    pub decode_tokens: u32,
}

impl WorkspaceOptions {
    /// Room for steps of up to `max_tokens` new tokens, keys and values rebuilt 1024 rows at a time, one new token a sequence
    /// in decode.
    pub fn new(max_tokens: u32) -> Self {
        WorkspaceOptions { max_tokens, tile_rows: 1024, decode_tokens: 1 }
    }
}

/// Keys that the prefill kernels walk in one dispatch without too long a loop.
const MOST_TILE_ROWS: u32 = 1 << 19;

static IDENTITIES: AtomicU64 = AtomicU64::new(1);

/// Intermediate results of one step. Layers use it one after another; a caller with several steps in flight on one queue
/// may share it too, since their commands run in order.
#[derive(Debug)]
pub struct Workspace {
    pub(super) kernels: Kernels,
    pub(super) max_tokens: u32,
    pub(super) tile_rows: u32,
    pub(super) decode_tokens: u32,
    /// `[tokens, q rank + d_latent + d_rope]`
    pub(super) down: Region,
    /// `[tokens, q rank + d_latent]`, each part where it is normed.
    pub(super) normed: Region,
    pub(super) q: Region,
    pub(super) latent_gated: Region,
    pub(super) gate_rows: Region,
    pub(super) gate: Region,
    pub(super) tile_latent: Region,
    pub(super) tile_slots: Region,
    pub(super) kv: Region,
    pub(super) kv_gated: Region,
    pub(super) softmax: Region,
    pub(super) values: Region,
    pub(super) absorbed: Region,
    pub(super) partial_values: Region,
    pub(super) partial_softmax: Region,
    pub(super) combined: Region,
    pub(super) lse: Region,
    pub(super) group_ids: Region,
    pub(super) group_embeddings: Region,
    pub(super) group_gates: Region,
    pub(super) grouped: Region,
    bytes: u64,
    identity: u64,
}

impl Workspace {
    /// Allocates a workspace for steps on `cache`.
    ///
    /// # Errors
    /// No token at all; a buffer over the device's limits, before any is allocated; no memory left, or a lost device.
    pub fn new(cache: &LatentCache, options: WorkspaceOptions) -> Result<Self> {
        let kernels = cache.kernels();
        // Every size is checked before the first buffer is made.
        Self::placed(cache, options, |_, _| Ok(kernels.absent()))?;
        Self::placed(cache, options, |what, needed| {
            kernels.allocate(&format!("egmla.workspace.{what}"), needed).map(|buffer| Region::from(&buffer))
        })
    }

    /// A workspace whose buffers `place` makes, by name and bytes.
    fn placed(
        cache: &LatentCache,
        options: WorkspaceOptions,
        mut place: impl FnMut(&'static str, u64) -> Result<Region>,
    ) -> Result<Self> {
        if options.max_tokens == 0 {
            return Err(Error::Empty { what: "the workspace (max_tokens is 0)" });
        }
        let kernels = cache.kernels();
        let config = cache.config();
        let widths = cache.widths();
        let n_head = widths.n_head;
        let CacheRows { padded, splits } = CacheRows::of(cache);
        let tile_rows =
            options.tile_rows.max(1).checked_next_multiple_of(SPLIT).unwrap_or(padded).min(padded).min(MOST_TILE_ROWS);
        let tokens = options.max_tokens.min(cache.rows());
        let decode_tokens = options.decode_tokens.clamp(1, MOST_DECODED);
        let decoding = product(&[cache.options().batch, decode_tokens]).min(tokens.into()) as u32;
        let partials = splits.saturating_mul(decode_tokens);
        let slices = attention_prefill::slices(widths.d_value);
        let absorbable = config.up_projected_gate().is_none();
        let (gate_rows, gate_width, d_gate) = match &config.gate {
            None => (0, 0, 0),
            Some(gate) if gate.site == GateSite::Latent => (tokens, widths.d_latent, widths.d_gate),
            Some(_) => (tile_rows, widths.d_kv(), widths.d_gate),
        };
        // Groups of a pass, then the new tokens: gate rows that are not resident.
        let lists = cache.lists();
        let projected = match lists {
            Some(lists) if lists.mode != GateRows::Table => lists.pass_groups + decoding,
            _ => 0,
        };
        let recompute = lists.is_some_and(|lists| lists.mode == GateRows::Recompute);
        let grouped = match (lists, &config.gate) {
            (Some(lists), Some(gate)) => {
                let partials = lists.most_partials(gate.vocab_size, decode_tokens);
                let partials = u32::try_from(partials).unwrap_or(u32::MAX);
                let words =
                    softmax_word(partials, n_head, widths.d_value).saturating_add(product(&[partials, n_head, 2]));
                u32::try_from(words).unwrap_or(u32::MAX)
            }
            _ => 0,
        };
        let latent_gate = config.latent_gate().is_some();
        let partial_width = if absorbable { widths.d_value.max(widths.d_latent) } else { widths.d_value };

        let mut bytes = 0;
        let mut allocate = |what: &'static str, extents: &[u32]| -> Result<Region> {
            let needed = product(extents).saturating_mul(4);
            let named = || format!("workspace `{what}` of {extents:?} words");
            kernels.context().check_binding(needed, named)?;
            let region = place(what, needed)?;
            bytes += region.size;
            Ok(region)
        };
        let on = |condition: bool, extent: u32| if condition { extent } else { 0 };
        let mut workspace = Workspace {
            kernels: kernels.clone(),
            max_tokens: tokens,
            tile_rows,
            decode_tokens,
            down: allocate("down", &[tokens, widths.down()])?,
            normed: allocate("normed", &[tokens, widths.rank + widths.d_latent])?,
            q: allocate("q", &[tokens, widths.queries()])?,
            latent_gated: allocate("latent_gated", &[on(latent_gate, tokens), widths.d_latent])?,
            gate_rows: allocate("gate_rows", &[gate_rows, d_gate])?,
            gate: allocate("gate", &[gate_rows, gate_width])?,
            tile_latent: allocate("tile_latent", &[tile_rows.max(on(!absorbable, decoding)), widths.d_latent])?,
            tile_slots: allocate("tile_slots", &[tile_rows])?,
            kv: allocate("kv", &[tile_rows.max(on(!absorbable, decoding)), widths.d_kv()])?,
            kv_gated: allocate("kv_gated", &[on(!absorbable, tile_rows), widths.d_kv()])?,
            softmax: allocate("softmax", &[tokens, n_head, slices, 2])?,
            values: allocate("values", &[tokens, widths.values()])?,
            absorbed: allocate("absorbed", &[on(absorbable, decoding), n_head, widths.d_latent])?,
            partial_values: allocate("partial_values", &[partials, n_head, partial_width])?,
            partial_softmax: allocate("partial_softmax", &[partials, n_head, 2])?,
            combined: allocate("combined", &[on(absorbable, decoding), n_head, widths.d_latent])?,
            lse: allocate("lse", &[decoding, n_head])?,
            group_ids: allocate("group_ids", &[projected])?,
            group_embeddings: allocate("group_embeddings", &[on(recompute, projected), d_gate])?,
            group_gates: allocate("group_gates", &[projected, widths.d_kv()])?,
            grouped: allocate("grouped", &[grouped])?,
            bytes: 0,
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed),
        };
        workspace.bytes = bytes;
        Ok(workspace)
    }

    /// Tells workspaces apart; never 0.
    pub(super) fn identity(&self) -> u64 {
        self.identity
    }

    /// Most new tokens of a step.
    pub fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    /// Every buffer, for the checks to poison.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        [
            &self.down,
            &self.normed,
            &self.q,
            &self.latent_gated,
            &self.gate_rows,
            &self.gate,
            &self.tile_latent,
            &self.tile_slots,
            &self.kv,
            &self.kv_gated,
            &self.softmax,
            &self.values,
            &self.absorbed,
            &self.partial_values,
            &self.partial_softmax,
            &self.combined,
            &self.lse,
            &self.group_ids,
            &self.group_embeddings,
            &self.group_gates,
            &self.grouped,
        ]
        .into_iter()
        .map(|region| &region.buffer)
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The cache's rows as the steps number them.
struct CacheRows {
    padded: u32,
    splits: u32,
}

impl CacheRows {
    fn of(cache: &LatentCache) -> Self {
        let options = cache.options();
        let splits = product(&[options.batch, options.capacity.div_ceil(SPLIT)]).min(u32::MAX as u64 / SPLIT as u64);
        CacheRows { padded: splits as u32 * SPLIT, splits: splits as u32 }
    }
}
