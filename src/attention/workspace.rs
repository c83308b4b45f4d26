//! Buffers for the intermediate results of a step, shared by all layers: a cache owns them.

use super::cache::CacheOptions;
use super::layout::ListLayout;
use super::lists::GateRows;
use super::step::MOST_DECODED;
use super::widths::Widths;
use crate::adapter::PlanContext;
use crate::config::{AttentionConfig, GateNorm, GateSite};
use crate::device::{Kernels, Region};
use crate::error::Result;
use crate::kernels::attention_absorbed::workgroups;
use crate::kernels::attention_decode::{SPLIT, SPLITS, most_partials};
use crate::kernels::attention_grouped::softmax_word;
use crate::kernels::attention_prefill;
use crate::kernels::matmul::FEW_ROWS;
use crate::storage::{product, words};

/// Most keys per dispatch of the prefill kernels: their loops stay within the limit.
pub(super) const MOST_TILE_ROWS: u32 = 1 << 19;

/// Intermediate results of one step. Layers share them, and so do steps in flight on one queue, since commands run in order.
#[derive(Debug)]
pub(super) struct Workspace<T = Region> {
    pub max_tokens: u32,
    pub tile_rows: u32,
    pub decode_tokens: u32,
    /// `[tokens, queries or their rank, d_latent, d_rope]`
    pub down: T,
    /// `[tokens, q rank]`
    pub normed: T,
    /// `[tokens, queries]`, then, where the norm of a gate is measured, the latents `[tokens, d_latent]` as cached, or their keys
    /// and values.
    pub q: T,
    pub gate_rows: T,
    pub gate: T,
    pub tile_latent: T,
    pub tile_slots: T,
    pub kv: T,
    pub kv_gated: T,
    pub softmax: T,
    pub values: T,
    pub absorbed: T,
    pub partial_values: T,
    pub partial_softmax: T,
    pub combined: T,
    pub lse: T,
    pub group_ids: T,
    pub group_embeddings: T,
    pub group_gates: T,
    /// Partial results of the grouped attention: values, then (m, l).
    pub grouped: T,
    /// Most partial results of the grouped attention.
    pub grouped_partials: u32,
    bytes: u64,
}

impl Workspace<()> {
    /// Bytes of all buffers, each checked against the device's limits.
    ///
    /// # Errors
    /// [`Error::Limit`](crate::Error::Limit) of the first over a limit.
    pub fn check(
        context: &PlanContext,
        config: &AttentionConfig,
        widths: &Widths,
        options: &CacheOptions,
        lists: Option<&ListLayout>,
    ) -> Result<u64> {
        Self::placed(context, config, widths, options, lists, |what, extents, needed| {
            context.check_binding(needed, || format!("workspace `{what}` of {extents:?} words"))
        })
        .map(|workspace| workspace.bytes)
    }
}

impl Workspace {
    /// Allocates the buffers for steps on a cache.
    ///
    /// # Errors
    /// No memory left, or a lost device.
    pub fn new(
        kernels: &Kernels,
        config: &AttentionConfig,
        widths: &Widths,
        options: &CacheOptions,
        lists: Option<&ListLayout>,
    ) -> Result<Self> {
        Self::placed(kernels.context(), config, widths, options, lists, |what, _, needed| {
            kernels.allocate(&format!("egmla.workspace.{what}"), needed).map(|buffer| Region::from(&buffer))
        })
    }

    /// Every buffer, for the checks to poison.
    #[cfg(feature = "check")]
    pub fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        [
            &self.down,
            &self.normed,
            &self.q,
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
}

impl<T> Workspace<T> {
    /// A workspace whose buffers `place` makes from name, extents and bytes.
    fn placed(
        context: &PlanContext,
        config: &AttentionConfig,
        widths: &Widths,
        options: &CacheOptions,
        lists: Option<&ListLayout>,
        mut place: impl FnMut(&'static str, &[u32], u64) -> Result<T>,
    ) -> Result<Self> {
        let n_head = widths.n_head;
        let CacheRows { padded, splits, short } = CacheRows::of(options);
        let tile_rows =
            options.tile_rows.max(1).checked_next_multiple_of(SPLIT).unwrap_or(padded).min(padded).min(MOST_TILE_ROWS);
        let tokens = options.new_tokens();
        let decode_tokens = options.decode_tokens.clamp(1, MOST_DECODED);
        let decoding = product(&[options.batch, decode_tokens]).min(tokens.into()) as u32;
        let [longest, shortest] = [splits, short].map(|splits| u64::from(splits) * u64::from(decode_tokens));
        let partials =
            most_partials(context, workgroups(n_head), decoding, longest, shortest).min(u32::MAX.into()) as u32;
        let slices = attention_prefill::slices(widths.d_value);
        let absorbable = config.up_projected_gate().is_none();
        let (gate_rows, gate_width, d_gate) = match &config.gate {
            None => (0, 0, 0),
            Some(gate) if gate.site == GateSite::Latent => (tokens, widths.d_latent, widths.d_gate),
            Some(_) => (tile_rows, widths.d_kv(), widths.d_gate),
        };
        // Gate rows that are not resident: those of a pass's groups, then of the new tokens.
        let projected = match lists {
            Some(lists) if lists.mode != GateRows::Table => lists.pass_groups + decoding,
            _ => 0,
        };
        let recompute = lists.is_some_and(|lists| lists.mode == GateRows::Recompute);
        let grouped_partials = match (lists, &config.gate) {
            (Some(lists), Some(gate)) => lists.most_partials(gate.vocab_size, decode_tokens),
            _ => 0,
        };
        let grouped_partials = u32::try_from(grouped_partials).unwrap_or(u32::MAX);
        let of_pairs = product(&[grouped_partials, n_head, 2]);
        let grouped = softmax_word(grouped_partials, n_head, widths.d_value).saturating_add(of_pairs);
        let grouped = if lists.is_some() { u32::try_from(grouped).unwrap_or(u32::MAX) } else { 0 };
        let measured = config.up_projected_gate().is_some_and(|gate| gate.norm != GateNorm::None);
        let of_latents = product(&[decoding, widths.d_latent]).max(product(&[decoding.min(FEW_ROWS), widths.d_kv()]));
        let kept = if measured { of_latents.saturating_add(widths.kept(decoding).into()) } else { 0 };
        let queries = u32::try_from(product(&[tokens, widths.queries()]).max(kept)).unwrap_or(u32::MAX);
        let partial_width = if absorbable { widths.d_value.max(widths.d_latent) } else { widths.d_value };

        let mut bytes = 0;
        let mut allocate = |what: &'static str, extents: &[u32]| {
            // The smallest buffer of `Kernels::allocate`.
            let needed = words(product(extents)).max(16);
            bytes += needed;
            place(what, extents, needed)
        };
        let on = |condition: bool, extent: u32| if condition { extent } else { 0 };
        let mut workspace = Workspace {
            max_tokens: tokens,
            tile_rows,
            decode_tokens,
            down: allocate("down", &[tokens, widths.down()])?,
            normed: allocate("normed", &[tokens, widths.rank])?,
            q: allocate("q", &[queries])?,
            gate_rows: allocate("gate_rows", &[gate_rows, d_gate])?,
            gate: allocate("gate", &[gate_rows, gate_width])?,
            tile_latent: allocate("tile_latent", &[tile_rows, widths.d_latent])?,
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
            grouped_partials,
            bytes: 0,
        };
        workspace.bytes = bytes;
        Ok(workspace)
    }
}

/// The cache's rows as the steps number them.
pub(super) struct CacheRows {
    pub padded: u32,
    pub splits: u32,
    /// As splits of the shortest length.
    pub short: u32,
}

impl CacheRows {
    pub fn of(options: &CacheOptions) -> Self {
        let splits = product(&[options.batch, options.capacity.div_ceil(SPLIT)]).min(u32::MAX as u64 / SPLIT as u64);
        let shortest = SPLITS[SPLITS.len() - 1];
        let short = product(&[options.batch, options.capacity.div_ceil(shortest)]).min(u32::MAX.into());
        CacheRows { padded: splits as u32 * SPLIT, splits: splits as u32, short: short as u32 }
    }
}
