//! FLOPs and bytes of a whole layer, for a decode step by either path and a prefill, by the rules of [`Cost`]; and the cache
//! elements of a token.

use super::widths::gated_segments;
use crate::config::{AttentionConfig, GateConfig, GateNorm};
use crate::cost::{Cost, times};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_grouped::{Tiling, Widths};
use crate::kernels::attention_prefill::QUERY_TILES;
use crate::kernels::cache_append::Queries;
use crate::kernels::cache_read::Table;
use crate::kernels::matmul::Layout;
use crate::kernels::norm::Kind;
use crate::kernels::{
    AttentionAbsorbed, AttentionCombine, AttentionDecode, AttentionGrouped, AttentionPrefill, CacheAppend, CacheRead,
    Gate, GateStatistics, Gather, Matmul, Norm,
};
use crate::op::Op as _;
use crate::storage::{Segments, Storage};

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
            cache_storage,
        }
    }
}

/// One new token of one sequence through one whole layer, keys and values rebuilt from the cache.
///
/// `cached` tokens are attended to, the new one included. The sum of the layer's dispatches over all cache rows, without padding:
/// each weight counts once, however many tiles read it. Weights and cache in `storage`.
pub fn decode_expanded(config: &AttentionConfig, cached: u32, storage: Storage) -> Cost {
    projections(config, 1, storage) + attend_expanded(config, &DecodeWork::one(cached, 0, 0, storage), storage)
}

/// One new token of one sequence through one whole layer, over the cached latents themselves.
///
/// `cached` tokens of `groups` distinct ids are attended to, the new one included; the gate rows of `projected` ids are
/// projected first. The two matter with the gate at `up_projected` alone. Otherwise as [`decode_expanded`].
pub fn decode_absorbed(config: &AttentionConfig, cached: u32, groups: u32, projected: u32, storage: Storage) -> Cost {
    let work = DecodeWork::one(cached, groups, projected, storage);
    projections(config, 1, storage) + attend_absorbed(config, &work, storage)
}

/// The expanded path's part of a step: keys and values of `work.rows` cache rows for `rows · D · (d_latent + d_gate)` multiply-adds,
/// the second term only with the gate at `up_projected`, and the attention over them.
pub fn attend_expanded(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let rows = work.rows;
    // Partial results as of the longest splits: shorter ones, which fill a device, are its business.
    let splits = rows.div_ceil(SPLIT).saturating_mul(work.tokens);
    let attention = AttentionDecode {
        tokens: work.tokens,
        most_tokens: 1,
        partials: splits,
        split: SPLIT,
        n_sequence: 1,
        n_head,
        d_nope,
        d_rope,
        d_value,
        kv_first: 0,
        kv_rows: rows,
        cache_rows: rows,
        scale: config.scale() as f32,
        storage: work.cache_storage,
        kv_storage: Storage::F32,
    };
    let further = Cost {
        flops: further_positions(work).saturating_mul(times(2, &[n_head, d_nope + d_rope + d_value])),
        bytes: 0,
    };
    rebuilding(config, rows, work.cache_storage, storage)
        + attention.cost()
        + further
        + merged(work.tokens, n_head, d_value, splits)
}

/// The absorbed path's part of a step: `positions · n_head · (2·d_latent + d_rope)` multiply-adds, and `D · d_latent` for
/// every new token, or, with the gate at `up_projected`, for every distinct id of its sequence; there the new tokens' own keys
/// and values for their statistics, and `D · d_gate` for every gate row that is not resident.
pub fn attend_absorbed(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    match config.up_projected_gate() {
        Some(gate) => attend_grouped(config, gate, work, storage),
        None => attend_one_group(config, work, storage),
    }
}

/// Keys and values of `cached` tokens, from their latents.
fn rebuilding(config: &AttentionConfig, cached: u32, cache_storage: Storage, storage: Storage) -> Cost {
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
    let gated = config.up_projected_gate().map_or(Cost::default(), |gate| {
        let statistics_rows = if gate.norm == GateNorm::None { 0 } else { cached };
        gated(gate, cached, gated_segments(config, gate), statistics_rows, storage)
    });
    read.cost() + linear(cached, d_latent, d_kv, false, storage) + gated
}

/// Positions beyond those that a single token sees.
fn further_positions(work: &DecodeWork) -> u64 {
    work.positions.saturating_sub(work.rows.into())
}

fn attend_one_group(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    let AttentionConfig { n_head, d_latent, d_nope, d_rope, d_value, .. } = *config;
    let one_a_head = |inner: u32, cols: u32| {
        let layout = Layout { batch: 1, ..Layout::dense(inner) };
        Matmul { batch: n_head, x: layout, w: layout, ..Matmul::linear(work.tokens, inner, cols, false, storage) }
    };
    let splits = work.rows.div_ceil(SPLIT);
    let partials = splits.saturating_mul(work.tokens);
    let attention = AttentionAbsorbed {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        split: SPLIT,
        splits,
        partials,
        n_head,
        d_latent,
        d_nope,
        d_rope,
        cache_rows: work.rows,
        scale: config.scale() as f32,
        weights: storage,
        storage: work.cache_storage,
    };
    let position = times(4, &[n_head, d_latent]) + times(2, &[n_head, d_rope]);
    one_a_head(d_nope, d_latent).cost()
        + attention.cost()
        + Cost { flops: further_positions(work).saturating_mul(position), bytes: 0 }
        + merged(work.tokens, n_head, d_latent, partials)
        + one_a_head(d_latent, d_value).cost()
}

fn attend_grouped(config: &AttentionConfig, gate: &GateConfig, work: &DecodeWork, storage: Storage) -> Cost {
    let (n_head, d_value, d_kv) = (config.n_head, config.d_value, config.d_kv());
    let projected = if work.projected > 0 { work.projected.saturating_add(work.tokens) } else { 0 };
    let resident = if projected > 0 { 0 } else { gate.vocab_size };
    let more_storage = if projected > 0 { Storage::F32 } else { storage };
    let rows =
        Gather { rows: projected, width: gate.d_gate, table_row: gate.d_gate, vocab_size: gate.vocab_size, storage };
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
    // One partial result per sixteen groups: an entry in software; fewer on a GPU.
    let partials = u32::try_from(work.groups.div_ceil(16)).unwrap_or(u32::MAX);
    let attention = AttentionGrouped {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        entries: partials,
        partials,
        most_partials: partials,
        n_head,
        widths: Widths { d_latent: config.d_latent, d_nope: config.d_nope, d_rope: config.d_rope, d_value },
        tiling: Tiling { groups: 4, span: 4 },
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
    // Latents rounded by an f16 cache are read back.
    let cached = Gather {
        rows: if work.cache_storage == Storage::F16 { work.tokens } else { 0 },
        width: config.d_latent,
        table_row: config.d_latent,
        vocab_size: work.rows,
        storage: work.cache_storage,
    };
    let own = linear(work.tokens, config.d_latent, d_kv, false, storage);
    let measured = when_normed(gate, cached.cost() + own + statistics.cost());
    let projection = if projected > 0 { linear(projected, gate.d_gate, d_kv, false, storage) } else { Cost::default() };
    rows.cost() + projection + measured + attention.cost() + merged(work.tokens, n_head, d_value, partials)
}

fn when_normed(gate: &GateConfig, cost: Cost) -> Cost {
    if gate.norm == GateNorm::None { Cost::default() } else { cost }
}

fn linear(rows: u32, inner: u32, cols: u32, bias: bool, storage: Storage) -> Cost {
    Matmul::linear(rows, inner, cols, bias, storage).cost()
}

fn merged(tokens: u32, n_head: u32, width: u32, splits: u32) -> Cost {
    AttentionCombine { tokens, n_head, width, splits }.cost()
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
    };
    projections(config, tokens, storage) + rebuilding(config, tokens, storage, storage) + causal(&attention)
}

/// Cost of a causal prefill attention: one sequence without a past, in one tile.
pub fn causal(problem: &AttentionPrefill) -> Cost {
    let Cost { flops, bytes } = problem.cost();
    // (tokens² + tokens) / 2 of tokens² pairs; one for a single token.
    let one = flops / u64::from(problem.tokens.max(1));
    Cost { flops: (flops.saturating_add(one)) / 2, bytes }
}

/// The projection of embeddings, and the gate itself.
fn gated(config: &GateConfig, rows: u32, segments: Segments, statistics_rows: u32, storage: Storage) -> Cost {
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
    };
    linear(rows, config.d_gate, segments.used(), false, storage) + gate.cost()
}

/// Cost of new tokens on every path: queries, latents and rotary keys into the cache, outputs.
fn projections(config: &AttentionConfig, tokens: u32, storage: Storage) -> Cost {
    let AttentionConfig { hidden_size, n_head, d_latent, d_rope, attention_bias: bias, .. } = *config;
    let d_q = n_head * config.d_query();
    let rms = |width: u32| {
        let (x_offset, x_row, eps) = (0, width, 0.0);
        let (kind, second, bias) = (Kind::Rms, 0, false);
        Norm { rows: tokens, width, second, x_offset, x_row, eps, kind, bias, storage }.cost()
    };
    let d_kv_a = d_latent + d_rope;
    let down = match config.d_q_latent {
        None => linear(tokens, hidden_size, d_q, false, storage) + linear(tokens, hidden_size, d_kv_a, bias, storage),
        // Both down projections are one product.
        Some(rank) => {
            linear(tokens, hidden_size, rank + d_kv_a, bias, storage)
                + rms(rank)
                + linear(tokens, rank, d_q, false, storage)
        }
    };
    let latent_gate = config.latent_gate().map_or(Cost::default(), |gate| {
        let (width, vocab_size) = (gate.d_gate, gate.vocab_size);
        let table = Gather { rows: tokens, width, table_row: width, vocab_size, storage };
        table.cost() + gated(gate, tokens, gated_segments(config, gate), 0, storage)
    });
    let append = CacheAppend {
        tokens,
        cache_rows: tokens,
        d_latent,
        latent_offset: 0,
        latent_row: d_latent,
        d_rope,
        rope_offset: 0,
        rope_row: d_rope,
        rotate: true,
        queries: Queries { n_head, offset: 0, row: d_q, head: config.d_query() },
        rope_byte: 0,
        storage,
    };
    down + rms(d_latent)
        + latent_gate
        + append.cost()
        + linear(tokens, n_head * config.d_value, hidden_size, bias, storage)
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
    use crate::config::{Activation, GateSite, RopeConfig};
    use crate::op::Op;
    use crate::sample::Sampled as _;

    fn config(gate: Option<GateSite>) -> AttentionConfig {
        AttentionConfig {
            hidden_size: 96,
            n_head: 3,
            d_latent: 32,
            d_q_latent: None,
            d_nope: 16,
            d_rope: 8,
            d_value: 24,
            attention_bias: false,
            gate: gate.map(|site| GateConfig {
                vocab_size: 1000,
                d_gate: 10,
                site,
                activation: Activation::Identity,
                norm: GateNorm::LayerNorm,
                norm_eps: 1e-5,
            }),
            rope: RopeConfig::default(),
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
        // An f32 cache has 256 bytes more per cache row, and the new token's latent need not be read back from it.
        let wide = attend_absorbed(&paper(), &DecodeWork::one(cached as u32, 1600, 0, Storage::F32), Storage::F16);
        assert_eq!(wide.bytes - few.bytes, cached * 256 - (64 * 2 + 4 + 64 * 4));
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

    #[test]
    fn a_whole_layer_counts_its_projections() {
        // A first token, by hand. q 96·72, rope 6·4 pairs · (3 heads + 1 key), kv_a 96·40, norm 4·32 + 3,
        // o 72·96.
        let shared = 2 * 96 * 72 + 6 * 4 * 4 + 2 * 96 * 40 + 131 + 2 * 72 * 96;
        // W_K 3·16·32, one key 3·(2·32 + 8), combine 3·(2·32 + 5) + 3·(32 + 3), W_V 3·32·24.
        let absorbed = 2 * 3 * 16 * 32 + 2 * 3 * 72 + 207 + 105 + 2 * 3 * 32 * 24;
        assert_eq!(decode_absorbed(&config(None), 1, 0, 0, Storage::F32).flops, shared + absorbed);
        // kv_b 32·120, one key 3·48, combine 3·(2·24 + 5) + 3·(24 + 3).
        let expanded = 2 * 32 * 120 + 2 * 3 * 48 + 159 + 81;
        assert_eq!(decode_expanded(&config(None), 1, Storage::F32).flops, shared + expanded);
        // Every weight once: f16 halves weights and cache, and nothing else. Elements: q, kv_a, norm, kv_b, o, and the
        // new cache row, which the append writes and the attention reads (40 elements each).
        let f32 = decode_absorbed(&config(None), 1, 0, 0, Storage::F32).bytes;
        let f16 = decode_absorbed(&config(None), 1, 0, 0, Storage::F16).bytes;
        assert_eq!(f32 - f16, 2 * (96 * 72 + 96 * 40 + 32 + 32 * 120 + 72 * 96 + 40 + 40));
    }

    #[test]
    fn prefill_counts_each_causal_pair_once() {
        // One token is a decode step of a first token, without the combine of its one split: 159 + 81.
        let config = config(Some(GateSite::UpProjected));
        let one = prefill(&config, 1, Storage::F32).flops;
        assert_eq!(one, decode_expanded(&config, 1, Storage::F32).flops - 159 - 81);
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
