//! FLOPs and bytes of a whole layer, for a decode step by either path and a prefill, by the rules of [`Cost`]; the time of a
//! decode step by the rules of [`Rates`](crate::low_level::Rates), and the path that takes less of it; and the cache elements of a
//! token.

use std::ops::Add;

use super::layer::DecodePath;
use super::widths::{self, gated_segments};
use crate::adapter::PlanContext;
use crate::config::{AttentionConfig, GateConfig, GateNorm};
use crate::cost::{Cost, times};
use crate::kernels::attention_decode::{SPLIT, split_length};
use crate::kernels::attention_grouped::{self, Tiling, Widths};
use crate::kernels::attention_prefill::QUERY_TILES;
use crate::kernels::cache_append::{Kept, LatentGate, LowRank, Queries, keeps_values};
use crate::kernels::cache_read::Table;
use crate::kernels::matmul::{FEW_ROWS, Layout};
use crate::kernels::norm::Kind;
use crate::kernels::{
    AttentionAbsorbed, AttentionCombine, AttentionDecode, AttentionGrouped, AttentionPrefill, CacheAppend, CacheRead,
    Gate, GateProject, GateStatistics, Gather, Matmul, Norm, OutputProject, Rope, ValueProject, attention_absorbed,
    value_project,
};
use crate::op::{Op, choose};
use crate::rates::Time;
use crate::storage::{Segments, Storage, product};

/// The work of a decode step: what its new tokens attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeWork {
    /// New tokens.
    pub tokens: u32,
    /// Cache rows that are attended to, the new ones included.
    pub rows: u32,
    /// Pairs of a new token and a cache row that it sees.
    pub positions: u64,
    /// Distinct token ids of each new token's sequence, summed over the new tokens.
    pub groups: u64,
    /// Ids whose gate rows are projected at this step; 0 if all are resident.
    pub projected: u32,
    /// Parts of the cache that hold the rows, each in a binding of its own.
    pub parts: u32,
    /// Storage of the cache.
    pub cache_storage: Storage,
}

impl DecodeWork {
    /// One new token after `cached − 1` others, with `groups` distinct ids among them all.
    pub fn one(cached: u32, groups: u32, projected: u32, cache_storage: Storage) -> Self {
        DecodeWork {
            tokens: 1,
            rows: cached,
            positions: cached.into(),
            groups: groups.into(),
            projected,
            parts: 1,
            cache_storage,
        }
    }

    /// Rows of a part, if all have the same.
    fn part_rows(&self) -> u32 {
        self.rows.div_ceil(self.parts.max(1))
    }

    /// The same with counts rounded up to four binary digits: a choice made for it stands while they grow by an eighth.
    pub(super) fn rounded(self) -> Self {
        let wide = |count: u64| {
            let unit = 1 << (64 - count.leading_zeros()).saturating_sub(4);
            count.checked_next_multiple_of(unit).unwrap_or(count)
        };
        let narrow = |count: u32| u32::try_from(wide(count.into())).unwrap_or(count);
        DecodeWork {
            rows: narrow(self.rows),
            positions: wide(self.positions),
            groups: wide(self.groups),
            projected: narrow(self.projected),
            ..self
        }
    }
}

/// What the dispatches of a path add up to.
trait Tally {
    /// Their sum.
    type Sum: Add<Output = Self::Sum> + Default;

    /// How a step is cut into dispatches and workgroups.
    fn cut(&self) -> Cut;

    /// A dispatch and the work that its sizes do not tell.
    fn with<O: Op>(&self, op: &O, further: Cost) -> Self::Sum;

    /// The sum, `count` times.
    fn times(sum: Self::Sum, count: u32) -> Self::Sum;

    /// A dispatch.
    fn of<O: Op>(&self, op: &O) -> Self::Sum {
        self.with(op, Cost::default())
    }
}

/// How a step is cut into dispatches and workgroups.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// Cache rows of a partial result.
    split: u32,
    /// Cache rows whose keys and values are rebuilt at once.
    tile_rows: u32,
    /// Groups of a workgroup, and of a partial result.
    tiling: Tiling,
}

/// FLOPs and bytes, whatever the device: longest splits, one tile, one partial result per sixteen groups.
struct Counted;

impl Tally for Counted {
    type Sum = Cost;

    fn cut(&self) -> Cut {
        Cut { split: SPLIT, tile_rows: u32::MAX, tiling: Tiling { groups: 4, span: 4 } }
    }

    fn with<O: Op>(&self, op: &O, further: Cost) -> Cost {
        op.cost() + further
    }

    fn times(Cost { flops, bytes }: Cost, count: u32) -> Cost {
        Cost { flops: flops.saturating_mul(count.into()), bytes: bytes.saturating_mul(count.into()) }
    }
}

/// Microseconds of the plans that a device would run.
struct Timed<'a> {
    context: &'a PlanContext,
    cut: Cut,
}

impl Tally for Timed<'_> {
    type Sum = Time;

    fn cut(&self) -> Cut {
        self.cut
    }

    fn with<O: Op>(&self, op: &O, further: Cost) -> Time {
        match choose(op, self.context) {
            Ok((_, plan)) => self.context.class.time(O::NAME, op.cost() + further, &plan),
            Err(_) => Time::NEVER,
        }
    }

    fn times(Time { us, dispatches }: Time, count: u32) -> Time {
        Time { us: us * f64::from(count), dispatches: dispatches.saturating_mul(count) }
    }
}

/// Time of a decode step through one whole layer by a path, as [`Rates`](crate::low_level::Rates) has it: dispatches that all
/// layers share are not counted. [`DecodePath::Auto`] is the path with less of it. `tile_rows` is that of
/// [`CacheOptions`](super::CacheOptions), `storage` that of the weights.
///
/// Infinite where no shader of the device can run the path.
pub fn decode_time(
    context: &PlanContext,
    config: &AttentionConfig,
    work: &DecodeWork,
    path: DecodePath,
    tile_rows: u32,
    storage: Storage,
) -> Time {
    // Plans are those of the padded widths.
    let Ok(config) = widths::padded(config) else { return Time::NEVER };
    let tiling = attention_grouped::tiling(context, grouped_widths(&config));
    let tally = |tiling| {
        let split = split_length(context, work.positions, attention_absorbed::workgroups(config.n_head));
        Timed { context, cut: Cut { split, tile_rows: tile_rows.max(SPLIT), tiling } }
    };
    let expanded = || {
        // Not used by this path.
        let tally = tally(Tiling { groups: 1, span: 1 });
        whole(&tally, &config, work, expanded(&tally, &config, work, storage), storage)
    };
    let absorbed = || match (config.up_projected_gate(), tiling) {
        (Some(_), Err(_)) => Time::NEVER,
        (_, tiling) => {
            let tally = tally(tiling.unwrap_or(Tiling { groups: 1, span: 1 }));
            whole(&tally, &config, work, absorbed(&tally, &config, work, storage), storage)
        }
    };
    match path {
        DecodePath::Expanded => expanded(),
        DecodePath::Absorbed => absorbed(),
        DecodePath::Auto => {
            let (absorbed, expanded) = (absorbed(), expanded());
            if absorbed.us < expanded.us { absorbed } else { expanded }
        }
    }
}

/// The path that takes less time by [`decode_time`]: what [`DecodePath::Auto`] takes.
pub fn faster_path(
    context: &PlanContext,
    config: &AttentionConfig,
    work: &DecodeWork,
    tile_rows: u32,
    storage: Storage,
) -> DecodePath {
    let [absorbed, expanded] = [DecodePath::Absorbed, DecodePath::Expanded]
        .map(|path| decode_time(context, config, work, path, tile_rows, storage).us);
    if absorbed < expanded { DecodePath::Absorbed } else { DecodePath::Expanded }
}

/// One new token of one sequence through one whole layer, keys and values rebuilt from the cache.
///
/// `cached` tokens are attended to, the new one included. The sum of the layer's dispatches over all cache rows, without padding:
/// each weight counts once, however many tiles read it. Weights and cache in `storage`.
pub fn decode_expanded(config: &AttentionConfig, cached: u32, storage: Storage) -> Cost {
    let work = DecodeWork::one(cached, 0, 0, storage);
    whole(&Counted, config, &work, expanded(&Counted, config, &work, storage), storage)
}

/// One new token of one sequence through one whole layer, over the cached latents themselves.
///
/// `cached` tokens of `groups` distinct ids are attended to, the new one included; the gate rows of `projected` ids are
/// projected first. The two matter with the gate at `up_projected` alone. Otherwise as [`decode_expanded`].
pub fn decode_absorbed(config: &AttentionConfig, cached: u32, groups: u32, projected: u32, storage: Storage) -> Cost {
    let work = DecodeWork::one(cached, groups, projected, storage);
    whole(&Counted, config, &work, absorbed(&Counted, config, &work, storage), storage)
}

/// A path's part of a step, up to the partial results.
struct Attended<T: Tally> {
    sum: T::Sum,
    /// Those of values, not combined yet.
    partials: Option<u32>,
    /// The append leaves something of the latents, by which the new tokens are measured.
    measured: bool,
}

fn combined(config: &AttentionConfig, work: &DecodeWork, attended: Attended<Counted>, storage: Storage) -> Cost {
    let Attended { sum, partials, measured } = attended;
    let kv = if measured && keeps_values(work.tokens, config.d_latent) { config.d_kv() } else { 0 };
    let kept = Cost {
        flops: times(2, &[work.tokens, config.d_latent, kv]),
        bytes: times(storage.bytes(), &[config.d_latent, kv]),
    };
    sum + kept + partials.map_or(Cost::default(), |p| merged(&Counted, work.tokens, config.n_head, config.d_value, p))
}

/// A whole layer: projections of the new tokens, a path, the output.
fn whole<T: Tally>(
    tally: &T,
    config: &AttentionConfig,
    work: &DecodeWork,
    attended: Attended<T>,
    storage: Storage,
) -> T::Sum {
    let DecodeWork { tokens, .. } = *work;
    let AttentionConfig { hidden_size: columns, n_head, d_value, attention_bias: bias, .. } = *config;
    let before = projections(tally, config, tokens, attended.measured, storage) + attended.sum;
    let output = |sum: T::Sum| sum + linear(tally, tokens, n_head * d_value, columns, bias, storage);
    let Some(splits) = attended.partials else { return output(before) };
    let both = OutputProject { tokens, n_head, d_value, columns, splits, bias, storage };
    if both.pays() {
        return before + tally.of(&both);
    }
    output(before + merged(tally, tokens, n_head, d_value, splits))
}

/// The expanded path's part of a step: keys and values of `work.rows` cache rows for `rows · D · (d_latent + d_gate)` multiply-adds,
/// the second term only with the gate at `up_projected`, and the attention over them.
pub fn attend_expanded(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    combined(config, work, expanded(&Counted, config, work, storage), storage)
}

fn expanded<T: Tally>(tally: &T, config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Attended<T> {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let Cut { split, tile_rows, .. } = tally.cut();
    let partials = partials(work, split);
    let tile = |rows: u32, further: Cost| {
        let attention = AttentionDecode {
            tokens: work.tokens,
            most_tokens: 1,
            partials,
            split,
            n_sequence: 1,
            n_head,
            n_kv_head: n_head,
            d_nope,
            d_rope,
            d_value,
            kv_first: 0,
            kv_rows: rows.checked_next_multiple_of(SPLIT).unwrap_or(rows),
            kv_pitch: n_head.saturating_mul(d_nope.saturating_add(d_value)),
            cache_rows: rows,
            scale: config.scale() as f32,
            storage: work.cache_storage,
            kv_storage: Storage::F32,
        };
        rebuilding(tally, config, rows, work.cache_storage, storage) + tally.with(&attention, further)
    };
    // Tiles end where a part ends.
    let tile_rows = tile_rows.min(work.part_rows()).max(1);
    // The last tile, then the whole ones before it.
    let last = work.rows.saturating_sub(1) % tile_rows + 1;
    let mut sum = tile(last.min(work.rows), further(work, times(2, &[n_head, d_nope + d_rope + d_value])));
    let whole = work.rows.saturating_sub(last) / tile_rows;
    if whole > 0 {
        sum = sum + T::times(tile(tile_rows, Cost::default()), whole);
    }
    Attended { sum, partials: Some(partials), measured: false }
}

/// The absorbed path's part of a step: `positions · n_head · (2·d_latent + d_rope)` multiply-adds, and `D · d_latent` for
/// every new token, or, with the gate at `up_projected`, for every distinct id of its sequence; there the new tokens' own keys
/// and values for their statistics, and `D · d_gate` for every gate row that is not resident.
pub fn attend_absorbed(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    combined(config, work, absorbed(&Counted, config, work, storage), storage)
}

fn absorbed<T: Tally>(tally: &T, config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Attended<T> {
    match config.up_projected_gate() {
        Some(gate) => attend_grouped(tally, config, gate, work, storage),
        None => Attended { sum: attend_one_group(tally, config, work, storage), partials: None, measured: false },
    }
}

/// Keys and values of `cached` tokens, from their latents.
fn rebuilding<T: Tally>(
    tally: &T,
    config: &AttentionConfig,
    cached: u32,
    cache_storage: Storage,
    storage: Storage,
) -> T::Sum {
    let (d_latent, d_kv) = (config.d_latent, config.d_kv());
    let read = CacheRead {
        first_row: 0,
        rows: cached,
        cache_rows: cached,
        d_latent,
        n_sequence: 1,
        table: config.up_projected_gate().map(|gate| Table {
            d_gate: gate.d_gate,
            vocab_size: gate.vocab_size,
            storage,
        }),
        storage: cache_storage,
    };
    let gated = config.up_projected_gate().map_or(T::Sum::default(), |gate| {
        let statistics_rows = if gate.norm == GateNorm::None { 0 } else { cached };
        gated(tally, gate, cached, gated_segments(config, gate), statistics_rows, storage)
    });
    tally.of(&read) + linear(tally, cached, d_latent, d_kv, false, storage) + gated
}

/// Partial results of the kernels that split the cache by rows.
fn partials(work: &DecodeWork, split: u32) -> u32 {
    u32::try_from(work.positions.div_ceil(split.into())).unwrap_or(u32::MAX)
}

/// The work of positions beyond those that a single token sees.
fn further(work: &DecodeWork, position: u64) -> Cost {
    Cost { flops: work.positions.saturating_sub(work.rows.into()).saturating_mul(position), bytes: 0 }
}

fn attend_one_group<T: Tally>(tally: &T, config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> T::Sum {
    let AttentionConfig { n_head, d_latent, d_nope, d_rope, d_value, .. } = *config;
    let head_weights = (d_nope + d_value).saturating_mul(d_latent);
    let one_a_head = |x: Layout, w: Layout, inner: u32, cols: u32| {
        let (w, batch) = (Layout { batch: head_weights, ..w }, n_head);
        Matmul { batch, x, w, ..Matmul::linear(work.tokens, inner, cols, false, storage) }
    };
    let queries = Layout { offset: 0, row: n_head * config.d_query(), inner: 1, batch: config.d_query() };
    let latents = Layout { offset: 0, row: n_head.saturating_mul(d_latent), inner: 1, batch: d_latent };
    let across = Layout { offset: 0, row: 1, inner: d_latent, batch: 0 };
    let split = tally.cut().split;
    // A dispatch per part of the cache.
    let (parts, rows) = (work.parts.max(1), work.part_rows());
    let partials = partials(work, split);
    let attention = AttentionAbsorbed {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        split,
        splits: rows.div_ceil(split),
        partials: partials.div_ceil(parts),
        n_head,
        d_latent,
        d_nope,
        d_rope,
        cache_rows: rows,
        scale: config.scale() as f32,
        weights: storage,
        storage: work.cache_storage,
    };
    let position = times(4, &[n_head, d_latent]) + times(2, &[n_head, d_rope]);
    let attended = tally.of(&one_a_head(queries, across, d_nope, d_latent))
        + tally.with(&attention, further(work, position))
        + T::times(tally.of(&attention), parts - 1);
    if value_project::pays(work.tokens, partials, d_latent) {
        let (tokens, splits, w_offset, w_head) = (work.tokens, partials, d_nope.saturating_mul(d_latent), head_weights);
        let values = ValueProject { tokens, n_head, d_latent, d_value, splits, w_offset, w_head, storage };
        return attended + tally.of(&values);
    }
    attended
        + merged(tally, work.tokens, n_head, d_latent, partials)
        + tally.of(&one_a_head(latents, Layout::dense(d_latent), d_latent, d_value))
}

fn grouped_widths(config: &AttentionConfig) -> Widths {
    let AttentionConfig { d_latent, d_nope, d_rope, d_value, .. } = *config;
    Widths { d_latent, d_nope, d_rope, d_value }
}

fn attend_grouped<T: Tally>(
    tally: &T,
    config: &AttentionConfig,
    gate: &GateConfig,
    work: &DecodeWork,
    storage: Storage,
) -> Attended<T> {
    let (n_head, d_kv) = (config.n_head, config.d_kv());
    let projected = if work.projected > 0 { work.projected.saturating_add(work.tokens) } else { 0 };
    let resident = if projected > 0 { 0 } else { gate.vocab_size };
    let more_storage = if projected > 0 { Storage::F32 } else { storage };
    let rows = Gather {
        rows: projected,
        width: gate.d_gate,
        table_row: gate.d_gate,
        first_id: 0,
        vocab_size: gate.vocab_size,
        storage,
    };
    let statistics = GateStatistics {
        tokens: work.tokens,
        segments: gated_segments(config, gate),
        resident,
        more: projected,
        more_first: 0,
        cache_rows: work.rows,
        eps: 0.0,
        activation: gate.activation,
        norm: gate.norm,
        storage: if projected > 0 { Storage::F32 } else { storage },
        more_storage,
    };
    let tiling = tally.cut().tiling;
    // One partial result per entry.
    let partials = u32::try_from(work.groups.div_ceil(tiling.entry_groups().into())).unwrap_or(u32::MAX);
    let attention = AttentionGrouped {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        entries: partials,
        partials,
        most_partials: partials,
        n_head,
        widths: grouped_widths(config),
        tiling,
        table: 0,
        list_words: 0,
        cache_rows: work.rows,
        rope_byte: 0,
        statistics_byte: 0,
        resident,
        gates_storage: storage,
        more: projected,
        more_storage,
        first_group: 0,
        groups: 0,
        pass_index: 0,
        passes: 1,
        activation: gate.activation,
        norm: gate.norm,
        scale: config.scale() as f32,
        expected_groups: work.groups,
        expected_positions: work.positions,
        cache_storage: work.cache_storage,
        storage,
    };
    let measured = match gate.norm {
        GateNorm::None => T::Sum::default(),
        // Keys and values of few are made by the append.
        _ if keeps_values(work.tokens, config.d_latent) => tally.of(&statistics),
        _ => linear(tally, work.tokens, config.d_latent, d_kv, false, storage) + tally.of(&statistics),
    };
    let sum =
        tally.of(&rows) + linear(tally, projected, gate.d_gate, d_kv, false, storage) + measured + tally.of(&attention);
    Attended { sum, partials: Some(partials), measured: gate.norm != GateNorm::None }
}

/// A product; none without rows.
fn linear<T: Tally>(tally: &T, rows: u32, inner: u32, cols: u32, bias: bool, storage: Storage) -> T::Sum {
    if rows == 0 { T::Sum::default() } else { tally.of(&Matmul::linear(rows, inner, cols, bias, storage)) }
}

fn merged<T: Tally>(tally: &T, tokens: u32, n_head: u32, width: u32, splits: u32) -> T::Sum {
    tally.of(&AttentionCombine { tokens, n_head, width, splits })
}

/// `tokens` new tokens of one sequence without a past through one whole layer.
///
/// A query sees itself and the tokens before it, `tokens · (tokens + 1) / 2` pairs; otherwise as [`decode_expanded`].
pub fn prefill(config: &AttentionConfig, tokens: u32, storage: Storage) -> Cost {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let attention = AttentionPrefill {
        tokens,
        query_tiles: 1,
        tile_q: QUERY_TILES[0],
        n_sequence: 1,
        n_head,
        n_kv_head: n_head,
        d_nope,
        d_rope,
        d_value,
        kv_first: 0,
        kv_rows: tokens,
        cache_rows: tokens,
        first: true,
        last: true,
        scale: config.scale() as f32,
        weights: storage,
        storage,
        kv: Storage::F32,
    };
    let output = linear(&Counted, tokens, n_head * d_value, config.hidden_size, config.attention_bias, storage);
    projections(&Counted, config, tokens, false, storage)
        + output
        + rebuilding(&Counted, config, tokens, storage, storage)
        + causal(&attention)
}

/// Cost of a causal prefill attention: one sequence without a past, in one tile.
pub fn causal(problem: &AttentionPrefill) -> Cost {
    let Cost { flops, bytes } = problem.cost();
    // (tokens² + tokens) / 2 of tokens² pairs; one for a single token.
    let one = flops / u64::from(problem.tokens.max(1));
    Cost { flops: (flops.saturating_add(one)) / 2, bytes }
}

/// The projection of embeddings, and the gate itself.
fn gated<T: Tally>(
    tally: &T,
    config: &GateConfig,
    rows: u32,
    segments: Segments,
    statistics_rows: u32,
    storage: Storage,
) -> T::Sum {
    let gate = Gate {
        rows,
        segments,
        x_offset: 0,
        x_row: segments.width(),
        eps: config.norm_eps as f32,
        activation: config.activation,
        norm: config.norm,
        statistics_rows,
        storage,
        y_storage: Storage::F32,
    };
    linear(tally, rows, config.d_gate, segments.used(), false, storage) + tally.of(&gate)
}

/// New tokens on every path: queries, latents and rotary keys into the cache.
fn projections<T: Tally>(tally: &T, config: &AttentionConfig, tokens: u32, measured: bool, storage: Storage) -> T::Sum {
    let AttentionConfig { hidden_size, n_head, d_latent, d_nope, d_rope, attention_bias: bias, .. } = *config;
    let d_q = n_head * config.d_query();
    let d_kv_a = d_latent + d_rope;
    let down = match config.d_q_latent {
        // All down projections are one product.
        None => linear(tally, tokens, hidden_size, d_q + d_kv_a, bias || config.q_proj_bias, storage),
        Some(rank) => {
            let down = linear(tally, tokens, hidden_size, rank + d_kv_a, bias, storage);
            if tokens <= FEW_ROWS { down } else { down + low_rank_queries(tally, config, rank, tokens, storage) }
        }
    };
    let latent_gate = config.latent_gate().map_or(T::Sum::default(), |gate| {
        let (width, vocab_size) = (gate.d_gate, gate.vocab_size);
        if tokens <= FEW_ROWS {
            return tally.of(&GateProject {
                rows: tokens,
                width: d_latent,
                d_gate: width,
                vocab_size,
                first_id: 0,
                ids: true,
                targets: false,
                y_rows: tokens,
                storage,
                y_storage: Storage::F32,
            });
        }
        let table = Gather { rows: tokens, width, table_row: width, first_id: 0, vocab_size, storage };
        tally.of(&table) + linear(tally, tokens, width, d_latent, false, storage)
    });
    let queries = config.d_q_latent.unwrap_or(d_q);
    let low_rank = config.d_q_latent.map(|rank| LowRank { rank, used: rank, weight: 0, eps: 0.0 });
    let of_append = if low_rank.is_some() && tokens > FEW_ROWS { 0 } else { n_head };
    let append = CacheAppend {
        tokens,
        cache_rows: tokens,
        row: queries + d_kv_a,
        latent_offset: queries,
        d_latent,
        latent_used: d_latent,
        rope_offset: queries + d_latent,
        d_rope,
        rotate: true,
        queries: Queries { n_head: of_append, offset: 0, d_nope, low_rank: low_rank.filter(|_| of_append > 0) },
        norm: Some(0.0),
        gate: config.latent_gate().map(|gate| LatentGate {
            activation: gate.activation,
            norm: gate.norm,
            eps: gate.norm_eps as f32,
        }),
        kept: measured.then(|| Kept {
            // Behind the queries; a binding holds them.
            first: tokens.saturating_mul(d_q).saturating_add(3) & !3,
            columns: if keeps_values(tokens, d_latent) { config.d_kv() } else { 0 },
        }),
        rope_byte: product(&[tokens, storage.row_loads(d_latent), 16]),
        weights: storage,
        storage,
    };
    down + latent_gate + tally.of(&append)
}

/// Many queries of their latents, normed and rotated.
fn low_rank_queries<T: Tally>(tally: &T, config: &AttentionConfig, rank: u32, tokens: u32, storage: Storage) -> T::Sum {
    let AttentionConfig { n_head, d_latent, d_nope, d_rope, .. } = *config;
    let (x_row, eps) = (rank + d_latent + d_rope, 0.0);
    let (head_stride, token_stride) = (config.d_query(), n_head * config.d_query());
    let rotated = Rope { tokens, n_head, d_rope, offset: d_nope, token_stride, head_stride, interleave: true };
    let (x_offset, kind, bias) = (0, Kind::Rms, false);
    let normed = Norm { rows: tokens, width: rank, x_offset, x_row, eps, kind, bias, storage };
    let projected = tally.of(&normed) + linear(tally, tokens, rank, token_stride, false, storage);
    if d_rope == 0 { projected } else { projected + tally.of(&rotated) }
}

/// An entry of the cache table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLine {
    /// Width of the cached latent; `None` for multi-head attention, which caches keys and values.
    pub rank: Option<u32>,
    /// Cached elements of one token over all layers, as the papers count them: no ids, no statistics, no padding.
    pub elements: u64,
}

impl CacheLine {
    /// Saving against `other`, in per cent.
    pub fn saving(&self, other: &CacheLine) -> f64 {
        100.0 * (1.0 - self.elements as f64 / other.elements as f64)
    }
}

/// Cached elements per token: multi-head attention with `n_head` heads of `d_head`, then a latent of each rank beside one
/// rotary key. MLA and EG-MLA of one rank cache the same.
pub fn cache_table(n_layer: u32, n_head: u32, d_head: u32, d_rope: u32, ranks: &[u32]) -> Vec<CacheLine> {
    let heads = CacheLine { rank: None, elements: times(2, &[n_layer, n_head, d_head]) };
    let latent = |&rank: &u32| {
        let width = u64::from(rank) + u64::from(d_rope);
        CacheLine { rank: Some(rank), elements: u64::from(n_layer).saturating_mul(width) }
    };
    std::iter::once(heads).chain(ranks.iter().map(latent)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::AdapterClass;
    use crate::config::{Activation, GateSite};
    use crate::kernels::attention_decode::SPLITS;
    use crate::op::Op;
    use crate::sample::Sampled as _;

    fn config(gate: Option<GateSite>) -> AttentionConfig {
        AttentionConfig {
            hidden_size: 96,
            n_head: 3,
            d_latent: 32,
            d_nope: 16,
            d_rope: 8,
            d_value: 24,
            gate: gate.map(|site| GateConfig {
                vocab_size: 1000,
                d_gate: 10,
                tied: false,
                site,
                activation: Activation::Identity,
                norm: GateNorm::LayerNorm,
                norm_eps: 1e-5,
            }),
            ..AttentionConfig::default()
        }
    }

    /// FLOPs that each cached token adds, over a whole split.
    fn slope(cost: impl Fn(u32) -> Cost) -> u64 {
        cost(1024 + SPLIT).flops - cost(1024).flops
    }

    #[test]
    fn expanded_decode_rebuilds_keys_and_values() {
        // D = 3 · (16 + 24) = 120. A split adds 3 · (2·24 + 5) to the combine.
        let split = u64::from(SPLIT);
        let attention = 2 * 3 * (16 + 8 + 24);
        let mla = slope(|cached| decode_expanded(&config(None), cached, Storage::F32));
        assert_eq!(mla, split * (2 * 120 * 32 + attention) + 159);
        let latent = slope(|cached| decode_expanded(&config(Some(GateSite::Latent)), cached, Storage::F32));
        assert_eq!(latent, mla);
        // T · D · (d_latent + d_gate) multiply-adds, and the gate itself: 8 FLOPs per element, 4 per token.
        let gated = slope(|cached| decode_expanded(&config(Some(GateSite::UpProjected)), cached, Storage::F32));
        assert_eq!(gated, split * (2 * 120 * (32 + 10) + 8 * 120 + 4 + attention) + 159);
    }

    #[test]
    fn absorbed_decode_meets_the_latents() {
        // T · n_head · (2·d_latent + d_rope) multiply-adds; a split adds 3 · (2·32 + 5) to the combine.
        let absorbed = |cached| decode_absorbed(&config(None), cached, 0, 0, Storage::F32);
        assert_eq!(slope(absorbed), u64::from(SPLIT) * 2 * 3 * (2 * 32 + 8) + 207);
        // Cache bytes: every latent and every rotary key once; a split's partial results written and read.
        let bytes = absorbed(1024 + SPLIT).bytes - absorbed(1024).bytes;
        assert_eq!(bytes, u64::from(SPLIT) * (32 + 8) * 4 + 2 * 3 * (32 * 4 + 8));
    }

    /// The paper's 120M attention, with the gate at `up_projected`.
    fn paper() -> AttentionConfig {
        let gate = config(Some(GateSite::UpProjected)).gate;
        let gate = gate.map(|gate| GateConfig { vocab_size: 50_304, d_gate: 256, ..gate });
        AttentionConfig {
            hidden_size: 768,
            n_head: 12,
            d_latent: 64,
            d_nope: 64,
            d_rope: 64,
            d_value: 64,
            gate,
            ..config(None)
        }
    }

    /// EG-MLA absorbed with a table: 98 304 multiply-adds per distinct id and 2 304 per position, every cache row read once.
    #[test]
    fn grouped_decode_costs_its_groups_and_its_positions() {
        let work =
            |cached, groups| attend_absorbed(&paper(), &DecodeWork::one(cached, groups, 0, Storage::F16), Storage::F16);
        let (few, more, longer) = (work(8192, 1600), work(8192, 1616), work(8448, 1600));
        // Sixteen groups more: their multiply-adds, and one more partial result to combine, 12 · (2·64 + 5).
        assert_eq!(more.flops - few.flops, 16 * 2 * 98_304 + 1596);
        assert_eq!(longer.flops - few.flops, 256 * 2 * 2_304);
        // A cache row of 128 halves, its statistics and its place in a list.
        assert_eq!(longer.bytes - few.bytes, 256 * (256 + 8 + 4));
        let (groups, cached) = (1640, 8192);
        let (grouped, _) = AttentionGrouped::counted()[0];
        let attention = Op::cost(&AttentionGrouped {
            n_head: 12,
            widths: Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 },
            expected_groups: groups,
            expected_positions: cached,
            ..grouped
        });
        assert!(attention.flops <= 2 * (98_304 * groups + 2_304 * cached));
        // An f32 cache has 256 bytes more per cache row.
        let wide = attend_absorbed(&paper(), &DecodeWork::one(cached as u32, 1600, 0, Storage::F32), Storage::F16);
        assert_eq!(wide.bytes - few.bytes, cached * 256);
        // Projecting the gate rows first costs 1536 · 256 multiply-adds each, the new token's among them.
        let projected = DecodeWork::one(8192, 1600, 1600, Storage::F16);
        let projected = attend_absorbed(&paper(), &projected, Storage::F16).flops - few.flops;
        assert_eq!(projected, 1601 * 2 * 1536 * 256);
    }

    /// With all ids different and a wide latent, rebuilding is cheaper; with the ids of text it never is.
    #[test]
    fn the_cheaper_path_depends_on_how_many_ids_differ() {
        let wide = AttentionConfig { d_latent: 512, ..paper() };
        let flops = |config: &AttentionConfig, groups| {
            let work = DecodeWork::one(4096, groups, groups, Storage::F16);
            let absorbed = attend_absorbed(config, &work, Storage::F16).flops;
            (absorbed, attend_expanded(config, &work, Storage::F16).flops)
        };
        let (absorbed, expanded) = flops(&wide, 4096);
        assert!(absorbed > expanded, "{absorbed} {expanded}");
        for config in [wide, paper()] {
            let (absorbed, expanded) = flops(&config, 1050);
            assert!(2 * absorbed < expanded, "{absorbed} {expanded}");
        }
    }

    /// Splits are chosen by what fills a device: that is what the model of time says, too.
    #[test]
    fn no_other_split_length_is_much_faster() {
        let config = AttentionConfig { d_latent: 256, gate: None, ..paper() };
        for class in AdapterClass::ALL {
            let mut context = PlanContext::webgpu_defaults(class);
            context.features = wgpu::Features::SUBGROUP;
            (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
            for (tokens, cached) in
                [1, 32].into_iter().flat_map(|t| [64, 256, 1024, 4096, 8192, 32_768].map(|c| (t, c)))
            {
                let work = DecodeWork { tokens, ..DecodeWork::one(tokens * cached, 0, 0, Storage::F16) };
                let chosen = split_length(&context, work.positions, attention_absorbed::workgroups(config.n_head));
                for path in [expanded, absorbed] {
                    let time = |split| {
                        let cut = Cut { split, tile_rows: 1024, tiling: Tiling { groups: 1, span: 1 } };
                        let timed = Timed { context: &context, cut };
                        whole(&timed, &config, &work, path(&timed, &config, &work, Storage::F16), Storage::F16).us
                    };
                    let best = SPLITS.map(time).into_iter().fold(f64::INFINITY, f64::min);
                    assert!(time(chosen) <= 1.15 * best, "{class:?}, {tokens} × {cached}: {chosen}");
                }
            }
        }
    }

    #[test]
    fn a_choice_stands_while_the_work_is_about_the_same() {
        let rounded = |count| DecodeWork::one(count, count, 0, Storage::F16).rounded();
        assert_eq!(rounded(4097), rounded(4608));
        assert_ne!(rounded(4608), rounded(4609));
        for count in [0, 1, 15, 16, 17, 4097, u32::MAX] {
            let DecodeWork { rows, positions, groups, .. } = rounded(count);
            assert!(rows >= count && u64::from(rows) <= u64::from(count) * 9 / 8, "{count} became {rows}");
            assert!(positions >= count.into() && groups == positions);
        }
    }

    #[test]
    fn a_whole_layer_counts_its_projections() {
        // A first token, by hand. q 96·72, rope 6·4 pairs · (3 heads + 1 key), kv_a 96·40, norm 4·32 + 3,
        // o 72·96.
        let shared = 2 * 96 * 72 + 6 * 4 * 4 + 2 * 96 * 40 + 131 + 2 * 72 * 96;
        // W_K 3·16·32, one key 3·(2·32 + 8), combine 3·(2·32 + 5) + 3·(32 + 1), without lse, W_V 3·32·24.
        let absorbed = 2 * 3 * 16 * 32 + 2 * 3 * 72 + 207 + 99 + 2 * 3 * 32 * 24;
        assert_eq!(decode_absorbed(&config(None), 1, 0, 0, Storage::F32).flops, shared + absorbed);
        // kv_b 32·120, one key 3·48, combine 3·(2·24 + 5) + 3·(24 + 1), without lse.
        let expanded = 2 * 32 * 120 + 2 * 3 * 48 + 159 + 75;
        assert_eq!(decode_expanded(&config(None), 1, Storage::F32).flops, shared + expanded);
        // Every weight once: f16 halves weights and cache, and nothing else. Elements: q, kv_a, norm, kv_b, o, and the
        // new cache row, which the append writes and the attention reads (40 elements each).
        let f32 = decode_absorbed(&config(None), 1, 0, 0, Storage::F32).bytes;
        let f16 = decode_absorbed(&config(None), 1, 0, 0, Storage::F16).bytes;
        assert_eq!(f32 - f16, 2 * (96 * 72 + 96 * 40 + 32 + 32 * 120 + 72 * 96 + 40 + 40));
    }

    #[test]
    fn prefill_counts_each_causal_pair_once() {
        // One token is a decode step of a first token, without the combine of its one split: 159 + 75.
        let config = config(Some(GateSite::UpProjected));
        let one = prefill(&config, 1, Storage::F32).flops;
        assert_eq!(one, decode_expanded(&config, 1, Storage::F32).flops - 159 - 75);
        // 64 tokens: 64 times the rest of it, and 64 · 65 / 2 pairs in place of one.
        let pair = 2 * 3 * (16 + 8 + 24);
        assert_eq!(prefill(&config, 64, Storage::F32).flops, 64 * (one - pair) + 64 * 65 / 2 * pair);
    }

    #[test]
    fn absorbed_decode_is_far_cheaper_on_long_caches() {
        // DeepSeek-V2-Lite's attention over 4096 tokens: rebuilding costs 40 to 200 times as much.
        let lite = AttentionConfig {
            hidden_size: 2048,
            n_head: 16,
            d_latent: 512,
            d_nope: 128,
            d_rope: 64,
            d_value: 128,
            ..config(None)
        };
        let expanded = decode_expanded(&lite, 4096, Storage::F16).flops;
        let absorbed = decode_absorbed(&lite, 4096, 0, 0, Storage::F16).flops;
        assert!((40..200).contains(&(expanded / absorbed)), "{expanded} / {absorbed}");
    }

    #[test]
    fn cache_table_prints_the_papers_figures() {
        let table = cache_table(12, 12, 64, 64, &[256, 64, 16]);
        let elements: Vec<_> = table.iter().map(|line| (line.rank, line.elements)).collect();
        assert_eq!(elements, [(None, 18432), (Some(256), 3840), (Some(64), 1536), (Some(16), 960)]);
        assert!((table[2].saving(&table[0]) - 91.666_667).abs() < 1e-5);
        assert!((table[2].saving(&table[1]) - 60.0).abs() < 1e-9);
        // The same count as the configuration's own.
        let paper = AttentionConfig { n_head: 12, d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64, ..config(None) };
        assert_eq!(12 * u64::from(paper.cache_elements()), table[2].elements);
        assert_eq!(12 * u64::from(paper.mha_cache_elements()), table[0].elements);
    }
}
