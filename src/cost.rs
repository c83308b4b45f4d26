//! FLOPs and bytes of every kernel and of a layer's decode step, as benches and reports print them.
//!
//! Counting rules:
//!
//! - A multiply-add is 2 FLOPs; any other addition, multiplication, division, comparison, root, exponential, logarithm or
//!   tanh is 1; a change of sign is none. What the formula in the shader's header needs is counted, not what a schedule
//!   computes twice.
//! - Attention counts the multiply-adds of its two products, as the literature does: its softmax is not counted.
//! - Bytes are compulsory traffic: each input element that takes part is read once, each output element is written once,
//!   and what changes in place is both. Weights and caches count at their storage size, everything else at 4 bytes.
//! - A cached latent counts once: MLA's values are a part of its keys.
//! - Where a [`Problem`] does not know how much of its input takes part, the count is the bound that follows from its sizes:
//!   `attention_prefill` knows neither positions nor lengths, so it counts every query with every row of the key tile
//!   (one sequence without a past computes about half of that, a ragged batch less); `cache_read`, `attention_decode` and
//!   `attention_absorbed` count the padded rows of a step, but never more than the cache has; `gather` counts a table row
//!   for every id, but never more than the table has.
//! - Counts saturate instead of overflowing.

use std::iter::Sum;
use std::ops::Add;

use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::matmul::Layout;
use crate::kernels::{
    attention_absorbed, attention_absorbed_stream, attention_absorbed_subgroup, attention_decode,
    attention_decode_vec4, attention_grouped, attention_grouped_subgroup, attention_merge, attention_prefill,
    attention_prefill_cooperative, attention_prefill_cooperative_8, attention_prefill_rows, attention_prefill_subgroup,
    cache_append, cache_append_vec4, cache_copy, cache_read, gate, gate_rows, gate_statistics, gate_vec4, gather,
    group_ids, matmul, matmul_cooperative, matmul_cooperative_8, matmul_subgroup, matmul_vec4, matvec, matvec_subgroup,
    matvec_vec4, norm, norm_vec4, product, residual_add, roofline_cooperative, roofline_cooperative_8, roofline_copy,
    roofline_fma, rope, swiglu, word_scatter,
};
use crate::plan::Storage;

#[cfg(doc)]
use crate::kernels::Problem;

/// Work of a dispatch, or of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes of compulsory memory traffic.
    pub bytes: u64,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops.saturating_add(other.flops), bytes: self.bytes.saturating_add(other.bytes) }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Add::add)
    }
}

/// What a kernel's `Problem` costs.
pub trait Costed {
    /// FLOPs and bytes, by the rules of this module.
    fn cost(&self) -> Cost;
}

/// `factor` for every element of these extents.
fn times(factor: u64, extents: &[u32]) -> u64 {
    product(extents).saturating_mul(factor)
}

fn cost(flops: &[u64], bytes: &[u64]) -> Cost {
    let sum = |terms: &[u64]| terms.iter().fold(0, |total: u64, &term| total.saturating_add(term));
    Cost { flops: sum(flops), bytes: sum(bytes) }
}

/// Zero where something is switched off.
fn when(on: bool, count: u64) -> u64 {
    if on { count } else { 0 }
}

impl Costed for matmul::Problem {
    fn cost(&self) -> Cost {
        let matmul::Problem { rows, inner, cols, batch, bias, storage, .. } = *self;
        // A stride of 0 means that every product of the batch reads the same operand.
        let matrices = |layout: Layout| if layout.batch == 0 { batch.min(1) } else { batch };
        cost(
            &[times(2, &[rows, inner, cols, batch]), when(bias, times(1, &[rows, cols, batch]))],
            &[
                times(4, &[rows, inner, matrices(self.x)]),
                times(storage.bytes(), &[cols, inner, matrices(self.w)]),
                when(bias, times(storage.bytes(), &[cols])),
                times(4, &[rows, cols, batch]),
            ],
        )
    }
}

impl Costed for matmul_cooperative::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matmul_cooperative_8::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matmul_subgroup::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matmul_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matvec::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matvec_subgroup::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for matvec_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for norm::Problem {
    fn cost(&self) -> Cost {
        let norm::Problem { rows, width, second, kind, bias, storage, .. } = *self;
        let (whole, segments) = (width.saturating_add(second), if second > 0 { 2 } else { 1 });
        // Square and sum, scale, weight; LayerNorm also sums and centres.
        let (element, row) = match kind {
            norm::Kind::Rms => (4, 3),
            norm::Kind::Layer => (6, 4),
        };
        cost(
            &[times(element + u64::from(bias), &[rows, whole]), times(row, &[rows, segments])],
            &[times(8, &[rows, whole]), times(storage.bytes() * (1 + u64::from(bias)), &[whole])],
        )
    }
}

impl Costed for norm_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for rope::Problem {
    fn cost(&self) -> Cost {
        let rope::Problem { tokens, n_head, d_rope, .. } = *self;
        // Four products and two sums a pair. cos and sin are read once a token, whatever the heads.
        cost(
            &[times(3, &[tokens, n_head, d_rope])],
            &[times(4, &[tokens, d_rope]), times(8, &[tokens, n_head, d_rope])],
        )
    }
}

impl Costed for gather::Problem {
    fn cost(&self) -> Cost {
        let gather::Problem { rows, width, vocab_size, storage, .. } = *self;
        let table = times(storage.bytes(), &[rows.min(vocab_size), width]);
        cost(&[], &[table, times(4, &[rows]), times(4, &[rows, width])])
    }
}

impl Costed for gate::Problem {
    fn cost(&self) -> Cost {
        let gate::Problem { rows, width, activation, norm, statistics_rows, storage, .. } = *self;
        let activation = activated(activation);
        // As in `norm`; the affine part of layer_norm has a bias.
        let (element, row, affine) = match norm {
            GateNorm::LayerNorm => (7, 4, 2),
            GateNorm::RmsNorm => (4, 3, 1),
            GateNorm::None => (0, 0, 0),
        };
        cost(
            &[times(activation + 1 + element, &[rows, width]), times(row, &[rows])],
            &[
                times(12, &[rows, width]),
                times(affine * storage.bytes(), &[width]),
                // A slot read and (μ, ρ) written.
                when(statistics_rows > 0, times(12, &[rows])),
            ],
        )
    }
}

impl Costed for gate_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for cache_append::Problem {
    fn cost(&self) -> Cost {
        let cache_append::Problem { tokens, d_latent, d_rope, interleave, queries, storage, .. } = *self;
        let rotated = if interleave.is_some() { d_rope } else { 0 };
        // The padding of a cache row is written too.
        let written = [d_latent, d_rope].map(|width| times(storage.bytes(), &[tokens, storage.row_pitch(width)]));
        cost(
            &[times(3, &[tokens, rotated]), times(3, &[tokens, queries.n_head, rotated])],
            &[
                times(4, &[tokens, rotated]),
                times(8, &[tokens, queries.n_head, rotated]),
                times(4, &[tokens, d_latent]),
                times(4, &[tokens, d_rope]),
                times(4, &[tokens]),
                written[0],
                written[1],
            ],
        )
    }
}

impl Costed for cache_append_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for cache_copy::Problem {
    fn cost(&self) -> Cost {
        cost(&[], &[times(8, &[self.words])])
    }
}

impl Costed for cache_read::Problem {
    fn cost(&self) -> Cost {
        let cache_read::Problem { rows, cache_rows, d_latent, n_sequence, table, storage, .. } = *self;
        let cached = rows.min(cache_rows);
        cost(
            &[],
            &[
                times(storage.bytes(), &[cached, d_latent]),
                times(16, &[n_sequence]),
                times(4, &[rows, d_latent]),
                times(4, &[rows]),
                // An id a row, each embedding once at most.
                table.map_or(0, |table| {
                    let ids = times(4, &[cached]);
                    let read = times(table.storage.bytes(), &[cached.min(table.vocab_size), table.d_gate]);
                    ids.saturating_add(read).saturating_add(times(4, &[rows, table.d_gate]))
                }),
            ],
        )
    }
}

impl Costed for attention_prefill::Problem {
    fn cost(&self) -> Cost {
        let attention_prefill::Problem { tokens, n_head, d_nope, d_rope, d_value, kv_rows, storage, .. } = *self;
        // The state is written by every tile and read by all but the first. One (m, l) a query and head: a schedule that
        // splits the value width keeps more.
        let state = if self.first { 1 } else { 2 };
        cost(
            &[
                times(2, &[tokens, kv_rows, n_head, d_nope]),
                times(2, &[tokens, kv_rows, n_head, d_rope]),
                times(2, &[tokens, kv_rows, n_head, d_value]),
            ],
            &[
                times(4, &[tokens, n_head, d_nope]),
                times(4, &[tokens, n_head, d_rope]),
                times(4, &[kv_rows, n_head, d_nope]),
                times(4, &[kv_rows, n_head, d_value]),
                times(storage.bytes(), &[kv_rows.min(self.cache_rows), d_rope]),
                times(16, &[self.query_tiles]),
                times(16, &[self.n_sequence]),
                times(4 * state, &[tokens, n_head, d_value]),
                times(8 * state, &[tokens, n_head]),
            ],
        )
    }
}

impl Costed for attention_prefill_cooperative::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_prefill_cooperative_8::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_prefill_rows::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_prefill_subgroup::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_decode::Problem {
    fn cost(&self) -> Cost {
        let attention_decode::Problem { tokens, n_head, d_nope, d_rope, d_value, kv_rows, storage, kv_storage, .. } =
            *self;
        // A row belongs to one sequence, and so meets that one's queries.
        let rows = kv_rows.min(self.cache_rows);
        let met = rows.saturating_mul(self.most_tokens);
        let splits = kv_rows.div_ceil(SPLIT).saturating_mul(self.most_tokens);
        cost(
            &[times(2, &[met, n_head, d_nope]), times(2, &[met, n_head, d_rope]), times(2, &[met, n_head, d_value])],
            &[
                times(4, &[tokens, n_head, d_nope]),
                times(4, &[tokens, n_head, d_rope]),
                times(kv_storage.bytes(), &[rows, n_head, d_nope]),
                times(kv_storage.bytes(), &[rows, n_head, d_value]),
                times(storage.bytes(), &[rows, d_rope]),
                times(32, &[self.n_sequence]),
                times(4, &[splits, n_head, d_value]),
                times(8, &[splits, n_head]),
            ],
        )
    }
}

impl Costed for attention_decode_vec4::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_absorbed::Problem {
    fn cost(&self) -> Cost {
        let attention_absorbed::Problem { tokens, splits, n_head, d_latent, d_rope, storage, .. } = *self;
        let rows = splits.saturating_mul(SPLIT).min(self.cache_rows);
        let met = rows.saturating_mul(self.most_tokens);
        cost(
            &[times(4, &[met, n_head, d_latent]), times(2, &[met, n_head, d_rope])],
            &[
                times(4, &[tokens, n_head, d_latent]),
                times(4, &[tokens, n_head, d_rope]),
                times(storage.bytes(), &[rows, d_latent]),
                times(storage.bytes(), &[rows, d_rope]),
                times(32, &[self.n_sequence]),
                times(4, &[self.partials, n_head, d_latent]),
                times(8, &[self.partials, n_head]),
            ],
        )
    }
}

impl Costed for attention_absorbed_stream::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_absorbed_subgroup::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for attention_merge::Problem {
    fn cost(&self) -> Cost {
        let attention_merge::Problem { tokens, n_head, width, splits } = *self;
        cost(
            &[
                // A split: the maximum, its weight e^(m_s − m), its part of l, its part of the values.
                times(2, &[splits, n_head, width]),
                times(5, &[splits, n_head]),
                // A query: times 1 / l; lse.
                times(1, &[tokens, n_head, width]),
                times(3, &[tokens, n_head]),
            ],
            &[
                times(4, &[splits, n_head, width]),
                times(8, &[splits, n_head]),
                times(8, &[tokens]),
                times(4, &[tokens, n_head, width]),
                times(4, &[tokens, n_head]),
            ],
        )
    }
}

impl Costed for attention_grouped::Problem {
    fn cost(&self) -> Cost {
        let attention_grouped::Problem { tokens, n_head, widths, met_groups, met_positions, .. } = *self;
        let attention_grouped::Widths { d_latent, d_nope, d_rope, d_value } = widths;
        let of_head = |width: u32, other: u32| u64::from(width) + u64::from(other);
        let kv = |factor: u64| times(factor, &[n_head]).saturating_mul(of_head(d_nope, d_value));
        let d_kv = kv(1);
        // The caller's count of groups and positions, per query token; the bytes are those of one token's.
        let once = |met: u64| met / u64::from(tokens.max(1));
        let row = u64::from(d_latent) + u64::from(d_rope);
        let statistics = if self.norm == GateNorm::None { 0 } else { 8 };
        let gate_bytes = if self.resident > 0 { self.gates_storage } else { self.more_storage }.bytes();
        let affine = match self.norm {
            GateNorm::None => 0,
            GateNorm::RmsNorm => d_kv,
            GateNorm::LayerNorm => kv(2),
        };
        let each = |count: u64, size: u64| count.saturating_mul(size);
        cost(
            &[
                // Absorb and fold of every group, score and sum of every position.
                each(met_groups, kv(2).saturating_mul(d_latent.into())),
                each(met_positions, times(4, &[n_head, d_latent]).saturating_add(times(2, &[n_head, d_rope]))),
            ],
            &[
                times(4, &[tokens, n_head]).saturating_mul(of_head(d_nope, d_rope)),
                kv(self.storage.bytes()).saturating_mul(d_latent.into()),
                each(affine, self.storage.bytes()),
                each(once(met_groups), d_kv.saturating_mul(gate_bytes)),
                // A header of every group, a position of every row, the row itself and its statistics.
                each(once(met_groups), 32),
                each(once(met_positions), 4 + statistics + row * self.cache_storage.bytes()),
                times(4, &[self.partials, n_head, d_value]),
                times(8, &[self.partials, n_head]),
            ],
        )
    }
}

impl Costed for attention_grouped_subgroup::Problem {
    fn cost(&self) -> Cost {
        self.0.cost()
    }
}

impl Costed for gate_rows::Problem {
    fn cost(&self) -> Cost {
        let gate_rows::Problem { rows, width, d_gate, vocab_size, ids, targets, storage, y_storage, .. } = *self;
        cost(
            &[times(2, &[rows, width, d_gate])],
            &[
                times(storage.bytes(), &[rows.min(vocab_size), d_gate]),
                times(storage.bytes(), &[width, d_gate]),
                when(ids, times(4, &[rows])),
                when(targets, times(4, &[rows])),
                times(y_storage.bytes(), &[rows, y_storage.row_pitch(width)]),
            ],
        )
    }
}

impl Costed for gate_statistics::Problem {
    fn cost(&self) -> Cost {
        let gate_statistics::Problem { tokens, width, activation, norm, storage, .. } = *self;
        // Product, then mean and variance, or the mean square alone.
        let (element, row) = match norm {
            GateNorm::LayerNorm => (5, 4),
            _ => (3, 3),
        };
        cost(
            &[times(activated(activation) + element, &[tokens, width]), times(row, &[tokens])],
            &[times(4 + storage.bytes(), &[tokens, width]), times(16, &[tokens])],
        )
    }
}

impl Costed for group_ids::Problem {
    fn cost(&self) -> Cost {
        let group_ids::Problem { tokens, rows, n_sequence, .. } = *self;
        // Two words of a header and the id written; id and row of a token and the id written.
        cost(&[], &[times(12, &[rows]), times(12, &[tokens]), times(64, &[n_sequence])])
    }
}

impl Costed for word_scatter::Problem {
    fn cost(&self) -> Cost {
        cost(&[], &[times(12, &[self.count])])
    }
}

/// FLOPs of an activation.
fn activated(activation: Activation) -> u64 {
    match activation {
        Activation::Identity => 0,
        Activation::Tanh | Activation::OnePlus => 1,
        Activation::Sigmoid | Activation::Silu => 3,
    }
}

impl Costed for roofline_cooperative::Problem {
    fn cost(&self) -> Cost {
        matrices(self, roofline_cooperative::SIDE)
    }
}

impl Costed for roofline_cooperative_8::Problem {
    fn cost(&self) -> Cost {
        matrices(&self.0, roofline_cooperative_8::SIDE)
    }
}

/// Products of square matrices in registers.
fn matrices(problem: &roofline_cooperative::Problem, side: u32) -> Cost {
    let roofline_cooperative::Problem { groups, trips } = *problem;
    cost(
        &[times(2, &[groups, trips, roofline_cooperative::PRODUCTS, side, side, side])],
        &[
            times(4, &[roofline_cooperative::FACTORS, side, side]),
            times(4, &[groups, roofline_cooperative::PRODUCTS, side, side]),
        ],
    )
}

impl Costed for roofline_copy::Problem {
    fn cost(&self) -> Cost {
        cost(&[], &[times(8, &[self.words])])
    }
}

impl Costed for roofline_fma::Problem {
    fn cost(&self) -> Cost {
        // The chains' beginnings (12 additions) and their sum (11) are counted too.
        let steps = times(2 * u64::from(roofline_fma::FMA_PER_TRIP), &[self.elements, self.trips]);
        cost(&[steps, times(23, &[self.elements])], &[times(8, &[self.elements])])
    }
}

impl Costed for swiglu::Problem {
    fn cost(&self) -> Cost {
        cost(&[times(4, &[self.elements])], &[times(12, &[self.elements])])
    }
}

impl Costed for residual_add::Problem {
    fn cost(&self) -> Cost {
        cost(&[times(1, &[self.elements])], &[times(12, &[self.elements])])
    }
}

/// What the new tokens of a decode step attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeWork {
    /// New tokens.
    pub tokens: u32,
    /// Cached rows that are attended to, the new ones included.
    pub rows: u32,
    /// Pairs of a new token and a row that it sees.
    pub positions: u64,
    /// Distinct token ids of each new token's sequence, summed over the new tokens.
    pub groups: u64,
    /// Ids whose gate rows are projected at this step: none where the rows of all are resident.
    pub projected: u32,
    /// How the cache is stored.
    pub cache_storage: Storage,
}

impl DecodeWork {
    /// One new token behind `cached − 1` others, `groups` distinct ids among them all.
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
/// `cached` tokens are attended to, the new one included. The sum of the layer's dispatches with every row needed and none of
/// the padding: each weight counts once, however many tiles read it. Weights and cache in `storage`.
pub fn decode_expanded(config: &AttentionConfig, cached: u32, storage: Storage) -> Cost {
    projections(config, 1, storage) + attend_expanded(config, &DecodeWork::one(cached, 0, 0, storage), storage)
}

/// One new token of one sequence through one whole layer, straight over the cached latents.
///
/// `cached` tokens of `groups` distinct ids are attended to, the new one included; the gate rows of `projected` ids are
/// projected first. The two matter with the gate at `up_projected` alone. Otherwise as [`decode_expanded`].
pub fn decode_absorbed(config: &AttentionConfig, cached: u32, groups: u32, projected: u32, storage: Storage) -> Cost {
    let work = DecodeWork::one(cached, groups, projected, storage);
    projections(config, 1, storage) + attend_absorbed(config, &work, storage)
}

/// The expanded path's part of a step: keys and values of `work.rows` rows for `rows · D · (d_latent + d_gate)` multiply-adds,
/// the second term only with the gate at `up_projected`, and the attention over them.
pub fn attend_expanded(config: &AttentionConfig, work: &DecodeWork, storage: Storage) -> Cost {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let rows = work.rows;
    let splits = rows.div_ceil(SPLIT).saturating_mul(work.tokens);
    let attention = attention_decode::Problem {
        tokens: work.tokens,
        most_tokens: 1,
        partials: splits,
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
    let read = cache_read::Problem {
        first_row: 0,
        rows: cached,
        cache_rows: cached,
        d_latent,
        n_sequence: 1,
        table: config.up_projected_gate().map(|gate| cache_read::Table {
            d_gate: gate.d_gate,
            vocab_size: gate.vocab_size,
            storage,
        }),
        storage: cache_storage,
    };
    let gated = config.up_projected_gate().map_or(Cost::default(), |gate| {
        let statistics_rows = if gate.norm == GateNorm::None { 0 } else { cached };
        gated(gate, cached, d_kv, statistics_rows, storage)
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
        matmul::Problem {
            batch: n_head,
            x: layout,
            w: layout,
            ..matmul::Problem::linear(work.tokens, inner, cols, false, storage)
        }
    };
    let splits = work.rows.div_ceil(SPLIT);
    let partials = splits.saturating_mul(work.tokens);
    let attention = attention_absorbed::Problem {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        splits,
        partials,
        n_head,
        d_latent,
        d_nope,
        d_rope,
        cache_rows: work.rows,
        scale: config.scale() as f32,
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
    let rows = gather::Problem {
        rows: projected,
        width: gate.d_gate,
        table_row: gate.d_gate,
        vocab_size: gate.vocab_size,
        storage,
    };
    let statistics = gate_statistics::Problem {
        tokens: work.tokens,
        width: d_kv,
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
    // One partial result for sixteen groups: what an item has in software; on a GPU it has fewer.
    let partials = u32::try_from(work.groups.div_ceil(16)).unwrap_or(u32::MAX);
    let attention = attention_grouped::Problem {
        tokens: work.tokens,
        most_tokens: 1,
        n_sequence: 1,
        items: partials,
        partials,
        n_head,
        widths: attention_grouped::Widths {
            d_latent: config.d_latent,
            d_nope: config.d_nope,
            d_rope: config.d_rope,
            d_value,
        },
        tiling: attention_grouped::Tiling { groups: 4, run: 4 },
        table: 0,
        list_words: 0,
        cache_rows: work.rows,
        rope_byte: 0,
        statistics_byte: 0,
        resident,
        gates_storage: storage,
        more: projected,
        more_storage,
        first_row: 0,
        rows: 0,
        pass_index: 0,
        passes: 1,
        activation: gate.activation,
        norm: gate.norm,
        scale: config.scale() as f32,
        met_groups: work.groups,
        met_positions: work.positions,
        cache_storage: work.cache_storage,
        storage,
    };
    // What an f16 cache has made of the latents is read back.
    let cached = gather::Problem {
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
    matmul::Problem::linear(rows, inner, cols, bias, storage).cost()
}

fn merged(tokens: u32, n_head: u32, width: u32, splits: u32) -> Cost {
    attention_merge::Problem { tokens, n_head, width, splits }.cost()
}

/// `tokens` new tokens of one sequence without a past through one whole layer.
///
/// A query meets itself and the tokens before it, `tokens · (tokens + 1) / 2` pairs; otherwise as [`decode_expanded`].
pub fn prefill(config: &AttentionConfig, tokens: u32, storage: Storage) -> Cost {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let attention = attention_prefill::Problem {
        tokens,
        query_tiles: 1,
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
        storage,
    };
    projections(config, tokens, storage) + rebuilding(config, tokens, storage, storage) + causal(&attention)
}

/// What a prefill attention costs when no query meets a key behind it: one sequence without a past, in one tile.
pub fn causal(problem: &attention_prefill::Problem) -> Cost {
    let Cost { flops, bytes } = problem.cost();
    // Of tokens² pairs, (tokens² + tokens) / 2; a token alone has one.
    let one = flops / u64::from(problem.tokens.max(1));
    Cost { flops: (flops.saturating_add(one)) / 2, bytes }
}

/// The projection of embeddings, and the gate itself.
fn gated(config: &GateConfig, rows: u32, width: u32, statistics_rows: u32, storage: Storage) -> Cost {
    let gate = gate::Problem {
        rows,
        width,
        x_offset: 0,
        x_row: width,
        eps: config.norm_eps as f32,
        activation: config.activation,
        norm: config.norm,
        statistics_rows,
        storage,
    };
    linear(rows, config.d_gate, width, false, storage) + gate.cost()
}

/// What every path does for new tokens: queries, latents and rotary keys into the cache, outputs.
fn projections(config: &AttentionConfig, tokens: u32, storage: Storage) -> Cost {
    let AttentionConfig { hidden_size, n_head, d_latent, d_rope, attention_bias: bias, .. } = *config;
    let d_q = n_head * config.d_query();
    let rms = |width: u32| {
        let (x_offset, x_row, eps) = (0, width, 0.0);
        let (kind, second, bias) = (norm::Kind::Rms, 0, false);
        norm::Problem { rows: tokens, width, second, x_offset, x_row, eps, kind, bias, storage }.cost()
    };
    let d_kv_a = d_latent + d_rope;
    let down = match config.d_q_latent {
        None => linear(tokens, hidden_size, d_q, false, storage) + linear(tokens, hidden_size, d_kv_a, bias, storage),
        // Both go down in one product.
        Some(rank) => {
            linear(tokens, hidden_size, rank + d_kv_a, bias, storage)
                + rms(rank)
                + linear(tokens, rank, d_q, false, storage)
        }
    };
    let latent_gate = config.latent_gate().map_or(Cost::default(), |gate| {
        let (width, vocab_size) = (gate.d_gate, gate.vocab_size);
        let table = gather::Problem { rows: tokens, width, table_row: width, vocab_size, storage };
        table.cost() + gated(gate, tokens, d_latent, 0, storage)
    });
    let append = cache_append::Problem {
        tokens,
        cache_rows: tokens,
        d_latent,
        latent_offset: 0,
        latent_row: d_latent,
        d_rope,
        rope_offset: 0,
        rope_row: d_rope,
        interleave: Some(config.rope.interleave),
        queries: cache_append::Queries { n_head, offset: 0, row: d_q, head: config.d_query() },
        rope_byte: 0,
        storage,
    };
    down + rms(d_latent)
        + latent_gate
        + append.cost()
        + linear(tokens, n_head * config.d_value, hidden_size, bias, storage)
}

/// A line of the cache table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLine {
    /// Width of the cached latent; `None` for multi-head attention, which caches keys and values.
    pub rank: Option<u32>,
    /// Cached elements of one token over all layers, as the papers count them: no ids, no statistics, no padding.
    pub elements: u64,
}

impl CacheLine {
    /// How much less than `other` it caches, in per cent.
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
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::{GateSite, RopeConfig};
    use crate::kernels::{Problem, REGISTRY};

    fn grouped() -> attention_grouped::Problem {
        attention_grouped::Problem {
            tokens: 2,
            most_tokens: 2,
            n_sequence: 1,
            items: 2,
            partials: 4,
            n_head: 3,
            widths: attention_grouped::Widths { d_latent: 8, d_nope: 6, d_rope: 4, d_value: 7 },
            tiling: attention_grouped::Tiling { groups: 4, run: 1 },
            table: 0,
            list_words: 99,
            cache_rows: 20,
            rope_byte: 320,
            statistics_byte: 640,
            resident: 0,
            gates_storage: Storage::F16,
            more: 5,
            more_storage: Storage::F32,
            first_row: 0,
            rows: 5,
            pass_index: 0,
            passes: 1,
            activation: Activation::Identity,
            norm: GateNorm::LayerNorm,
            scale: 1.0,
            met_groups: 10,
            met_positions: 40,
            cache_storage: Storage::F16,
            storage: Storage::F16,
        }
    }

    /// One problem of every kernel with its FLOPs and bytes, counted by hand.
    fn by_hand() -> Vec<(&'static str, Cost, (u64, u64))> {
        fn entry<P: Problem + Costed>(problem: P, flops: u64, bytes: u64) -> (&'static str, Cost, (u64, u64)) {
            (P::SPEC.name, problem.cost(), (flops, bytes))
        }
        let f16 = Storage::F16;
        let product = matmul::Problem::linear(2, 3, 5, true, f16);
        let by_matrices = roofline_cooperative::Problem { groups: 3, trips: 5 };
        let prefill = attention_prefill::Problem {
            tokens: 4,
            query_tiles: 1,
            n_sequence: 1,
            n_head: 2,
            d_nope: 3,
            d_rope: 2,
            d_value: 5,
            kv_first: 7,
            kv_rows: 7,
            cache_rows: 20,
            first: false,
            last: true,
            scale: 1.0,
            storage: f16,
        };
        let absorbed = attention_absorbed::Problem {
            tokens: 1,
            most_tokens: 1,
            n_sequence: 1,
            splits: 2,
            partials: 2,
            n_head: 3,
            d_latent: 8,
            d_nope: 6,
            d_rope: 4,
            cache_rows: 300,
            scale: 1.0,
            storage: f16,
        };
        let decode = attention_decode::Problem {
            tokens: 1,
            most_tokens: 1,
            partials: 1,
            n_sequence: 1,
            n_head: 2,
            d_nope: 3,
            d_rope: 2,
            d_value: 5,
            kv_first: 256,
            kv_rows: 256,
            cache_rows: 1000,
            scale: 1.0,
            storage: f16,
            kv_storage: Storage::F32,
        };
        vec![
            // 2 splits of 256 rows, but only 300 rows of cache: 300 · 3 heads · (2·8 + 4) multiply-adds.
            // In: absorbed 3·8·4, q_R 3·4·4, latents 300·8·2, keys 300·4·2, table 32. Out: 2·3·(8·4 + 8).
            entry(absorbed, 2 * 300 * 3 * 20, 96 + 48 + 4800 + 2400 + 32 + 240),
            entry(attention_absorbed_stream::Problem(absorbed), 2 * 300 * 3 * 20, 96 + 48 + 4800 + 2400 + 32 + 240),
            entry(attention_absorbed_subgroup::Problem(absorbed), 2 * 300 * 3 * 20, 96 + 48 + 4800 + 2400 + 32 + 240),
            // 256 rows · 2 heads · (3 + 2 + 5) multiply-adds.
            // In: q 2·5·4, kv 256·2·8·4, keys 256·2·2, table 32. Out: 1·2·(5·4 + 8).
            entry(decode, 2 * 256 * 2 * 10, 40 + 16384 + 1024 + 32 + 56),
            // Keys and values in f16 are half of that.
            entry(
                attention_decode_vec4::Problem(attention_decode::Problem { kv_storage: f16, ..decode }),
                2 * 256 * 2 * 10,
                40 + 8192 + 1024 + 32 + 56,
            ),
            // 2 query tokens that meet 5 groups and 20 positions each: 10 · 3 · (6 + 7) · 8 and 40 · 3 · (2·8 + 4).
            // In: q 2·3·10·4, W 39·8·2, γ and β 2·39·2, 5 gate rows 39·4, 5 headers 32, 20 rows of 12·2 + 8 + 4.
            // Out: 4·3·(7·4 + 8).
            entry(grouped(), 2 * (10 * 3 * 13 * 8 + 40 * 3 * 20), 240 + 624 + 156 + 5 * 156 + 160 + 20 * 36 + 432),
            entry(
                attention_grouped_subgroup::Problem(grouped()),
                2 * (10 * 3 * 13 * 8 + 40 * 3 * 20),
                240 + 624 + 156 + 5 * 156 + 160 + 20 * 36 + 432,
            ),
            // 4 splits · 3 heads · (2·10 + 5) + 2 queries · 3 heads · (10 + 3).
            // In: 12·(40 + 8) + 2·8. Out: 6·(40 + 4).
            entry(attention_merge::Problem { tokens: 2, n_head: 3, width: 10, splits: 4 }, 300 + 78, 576 + 16 + 264),
            // The bound: 4 queries · 7 keys · 2 heads · (3 + 2 + 5) multiply-adds. A second tile reads its state.
            // In: q 4·2·5·4, kv 7·2·8·4, keys 7·2·2, tables 16 + 16, state 4·2·(5·4 + 8). Out: the state again.
            entry(prefill, 2 * 4 * 7 * 2 * 10, 160 + 448 + 28 + 32 + 224 + 224),
            entry(attention_prefill_cooperative::Problem(prefill), 2 * 4 * 7 * 2 * 10, 160 + 448 + 28 + 32 + 224 + 224),
            entry(
                attention_prefill_cooperative_8::Problem(prefill),
                2 * 4 * 7 * 2 * 10,
                160 + 448 + 28 + 32 + 224 + 224,
            ),
            entry(attention_prefill_rows::Problem(prefill), 2 * 4 * 7 * 2 * 10, 160 + 448 + 28 + 32 + 224 + 224),
            entry(attention_prefill_subgroup::Problem(prefill), 2 * 4 * 7 * 2 * 10, 160 + 448 + 28 + 32 + 224 + 224),
            // 3 pairs of 6. In: 3·(5 + 2)·4, cos and sin 3·2·4, slots 3·4. Out: rows of 8 and 8 halves.
            entry(
                cache_append::Problem {
                    tokens: 3,
                    cache_rows: 9,
                    d_latent: 5,
                    latent_offset: 0,
                    latent_row: 5,
                    d_rope: 2,
                    rope_offset: 0,
                    rope_row: 2,
                    interleave: Some(true),
                    queries: cache_append::Queries::default(),
                    rope_byte: 144,
                    storage: f16,
                },
                18,
                24 + 84 + 12 + 3 * 32,
            ),
            // A pair of 2 heads a token more than of keys: 6 FLOPs a pair, read and written.
            entry(
                cache_append_vec4::Problem(cache_append::Problem {
                    tokens: 3,
                    cache_rows: 9,
                    d_latent: 8,
                    latent_offset: 0,
                    latent_row: 8,
                    d_rope: 8,
                    rope_offset: 0,
                    rope_row: 8,
                    interleave: Some(true),
                    queries: cache_append::Queries { n_head: 2, offset: 0, row: 16, head: 8 },
                    rope_byte: 144,
                    storage: f16,
                }),
                3 * 4 * 6 + 6 * 4 * 6,
                3 * (32 + 32 + 32 + 4 + 32) + 6 * 64,
            ),
            entry(cache_copy::Problem { words: 10, from_word: 0, to_word: 10 }, 0, 80),
            // In: 6 rows of cache (10 are asked for) · (5·2 + 4), table 2·16, 6 embeddings of 3·4. Out: 10 · (5·4 + 3·4 + 4).
            entry(
                cache_read::Problem {
                    first_row: 0,
                    rows: 10,
                    cache_rows: 6,
                    d_latent: 5,
                    n_sequence: 2,
                    table: Some(cache_read::Table { d_gate: 3, vocab_size: 50, storage: Storage::F32 }),
                    storage: f16,
                },
                0,
                84 + 32 + 72 + 360,
            ),
            // 3·7 · (sigmoid 3 + product 1 + layer_norm 7) + 3·4. Bytes: 3·7·(4 + 4 + 4), 2·7·2, 3·(4 + 8).
            entry(
                gate::Problem {
                    rows: 3,
                    width: 7,
                    x_offset: 0,
                    x_row: 7,
                    eps: 1e-5,
                    activation: Activation::Sigmoid,
                    norm: GateNorm::LayerNorm,
                    statistics_rows: 9,
                    storage: f16,
                },
                231 + 12,
                252 + 28 + 36,
            ),
            // 4·7·5 multiply-adds. Table rows 4·5·2, projection 7·5·2, ids and targets 4·4 each; out 4 rows of 8 floats.
            entry(
                gate_rows::Problem {
                    rows: 4,
                    width: 7,
                    d_gate: 5,
                    vocab_size: 50,
                    first_id: 0,
                    ids: true,
                    targets: true,
                    y_rows: 9,
                    storage: f16,
                    y_storage: Storage::F32,
                },
                280,
                40 + 70 + 32 + 128,
            ),
            // 3·7 · (sigmoid 3 + product, sums and squares 5) + 3·4. In: 3·7·(4 + 2), rows and slots 3·8. Out: 3·8.
            entry(
                gate_statistics::Problem {
                    tokens: 3,
                    width: 7,
                    resident: 4,
                    more: 0,
                    more_first: 0,
                    cache_rows: 9,
                    eps: 1e-5,
                    activation: Activation::Sigmoid,
                    norm: GateNorm::LayerNorm,
                    storage: f16,
                    more_storage: f16,
                },
                168 + 12,
                126 + 48,
            ),
            // A product an element; x, g and y.
            entry(
                gate_vec4::Problem(gate::Problem {
                    rows: 3,
                    width: 8,
                    x_offset: 0,
                    x_row: 8,
                    eps: 1e-5,
                    activation: Activation::Identity,
                    norm: GateNorm::None,
                    statistics_rows: 0,
                    storage: f16,
                }),
                24,
                288,
            ),
            // Table rows 4·6·2, ids 4·4, out 4·6·4.
            entry(gather::Problem { rows: 4, width: 6, table_row: 8, vocab_size: 50, storage: f16 }, 0, 48 + 16 + 96),
            // 3 rows and 3 tokens of 12 bytes, a line of the table.
            entry(
                group_ids::Problem { tokens: 3, first_row: 0, rows: 3, n_sequence: 1, table: 0, list_words: 99 },
                0,
                36 + 36 + 64,
            ),
            // 2·3·5 multiply-adds and 2·5 additions. x 2·3·4, w 5·3·2, bias 5·2, y 2·5·4.
            entry(product, 60 + 10, 24 + 30 + 10 + 40),
            entry(matmul_cooperative::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matmul_cooperative_8::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matmul_subgroup::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matmul_vec4::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matvec::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matvec_subgroup::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            entry(matvec_vec4::Problem(product), 60 + 10, 24 + 30 + 10 + 40),
            // LayerNorm with bias: 2·5·7 + 2·4. In and out 2·5·8, weight and bias 5·4.
            entry(
                norm::Problem {
                    rows: 2,
                    width: 5,
                    second: 0,
                    x_offset: 0,
                    x_row: 5,
                    eps: 1e-5,
                    kind: norm::Kind::Layer,
                    bias: true,
                    storage: f16,
                },
                70 + 8,
                80 + 20,
            ),
            // RMSNorm of two segments: 2·(8 + 16)·4 + 2·2·3. In and out 2·24·8, weights 24·2.
            entry(
                norm_vec4::Problem(norm::Problem {
                    rows: 2,
                    width: 8,
                    second: 16,
                    x_offset: 0,
                    x_row: 24,
                    eps: 1e-5,
                    kind: norm::Kind::Rms,
                    bias: false,
                    storage: f16,
                }),
                192 + 12,
                384 + 48,
            ),
            entry(residual_add::Problem { elements: 11 }, 11, 132),
            // 3 groups · 5 trips · 8 products of 16 · 16 · 16 multiply-adds. x 6·16·16·4, y 3·8·16·16·4; then with 8 for 16.
            entry(by_matrices, 2 * 3 * 5 * 8 * 4096, 6144 + 24576),
            entry(roofline_cooperative_8::Problem(by_matrices), 2 * 3 * 5 * 8 * 512, 1536 + 6144),
            entry(roofline_copy::Problem { words: 12 }, 0, 96),
            // 3 elements · (5 trips · 48 multiply-adds, 12 chains begun and 11 additions).
            entry(roofline_fma::Problem { elements: 3, trips: 5, a: 0.5, b: 0.5 }, 3 * (2 * 5 * 48 + 23), 24),
            // 2·3·2 pairs of 6. Rotations 2·4·4, values 2·3·4 read and written.
            entry(
                rope::Problem {
                    tokens: 2,
                    n_head: 3,
                    d_rope: 4,
                    offset: 0,
                    token_stride: 12,
                    head_stride: 4,
                    interleave: true,
                },
                72,
                32 + 192,
            ),
            entry(swiglu::Problem { elements: 11 }, 44, 132),
            // A patch of 8 bytes, a word written.
            entry(word_scatter::Problem { count: 11, words: 99 }, 0, 132),
        ]
    }

    #[test]
    fn every_kernel_costs_what_is_counted_by_hand() {
        for (kernel, cost, (flops, bytes)) in by_hand() {
            assert_eq!(cost, Cost { flops, bytes }, "{kernel}");
        }
    }

    #[test]
    fn every_kernel_of_the_registry_has_a_cost() {
        let costed: Vec<_> = by_hand().iter().map(|(kernel, ..)| *kernel).collect();
        let registered: Vec<_> = REGISTRY.iter().map(|spec| spec.name).collect();
        assert_eq!(costed, registered);
    }

    #[test]
    fn switches_change_the_count() {
        let gate = |activation, norm, statistics_rows| {
            let (x_offset, x_row, storage) = (0, 10, Storage::F32);
            gate::Problem { rows: 1, width: 10, x_offset, x_row, eps: 1e-5, activation, norm, statistics_rows, storage }
                .cost()
        };
        assert_eq!(gate(Activation::Identity, GateNorm::None, 0), Cost { flops: 10, bytes: 120 });
        assert_eq!(gate(Activation::OnePlus, GateNorm::None, 0).flops, 20);
        assert_eq!(gate(Activation::Silu, GateNorm::RmsNorm, 0), Cost { flops: 10 * 8 + 3, bytes: 160 });
        assert_eq!(gate(Activation::Identity, GateNorm::RmsNorm, 1).bytes, 172);
        let dense = matmul::Problem::linear(4, 8, 16, false, Storage::F32);
        let f16 = matmul::Problem { storage: Storage::F16, ..dense };
        assert_eq!(dense.cost().bytes - f16.cost().bytes, 8 * 16 * 2);
        // A batch that shares its weights reads them once.
        let shared = matmul::Problem { batch: 3, x: Layout { batch: 32, ..dense.x }, ..dense };
        assert_eq!(shared.cost(), Cost { flops: 3 * 1024, bytes: 3 * 128 + 512 + 3 * 256 });
        let empty = matmul::Problem::linear(0, 8, 16, true, Storage::F32);
        assert_eq!(empty.cost().flops, 0);
    }

    #[test]
    fn costs_add_and_saturate() {
        let one = Cost { flops: 1, bytes: 2 };
        assert_eq!([one, one, one].into_iter().sum::<Cost>(), Cost { flops: 3, bytes: 6 });
        let most = Cost { flops: u64::MAX, bytes: u64::MAX };
        assert_eq!(most + one, most);
        let huge = matmul::Problem::linear(u32::MAX, u32::MAX, u32::MAX, true, Storage::F32);
        assert_eq!(huge.cost().flops, u64::MAX);
    }

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
        // D = 3 · (16 + 24) = 120. A split adds 3 · (2·24 + 5) to the merge.
        let split = u64::from(SPLIT);
        let attention = 2 * 3 * (16 + 8 + 24);
        let mla = slope(|cached| decode_expanded(&config(None), cached, Storage::F32));
        assert_eq!(mla, split * (2 * 120 * 32 + attention) + 159);
        let latent = slope(|cached| decode_expanded(&config(Some(GateSite::Latent)), cached, Storage::F32));
        assert_eq!(latent, mla);
        // T · D · (d_latent + d_gate) multiply-adds, and the gate itself: 8 FLOPs an element, 4 a row.
        let gated = slope(|cached| decode_expanded(&config(Some(GateSite::UpProjected)), cached, Storage::F32));
        assert_eq!(gated, split * (2 * 120 * (32 + 10) + 8 * 120 + 4 + attention) + 159);
    }

    #[test]
    fn absorbed_decode_meets_the_latents() {
        // T · n_head · (2·d_latent + d_rope) multiply-adds; a split adds 3 · (2·32 + 5) to the merge.
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

    /// EG-MLA absorbed with a table: 98 304 multiply-adds a distinct id and 2 304 a position, every cached row read once.
    #[test]
    fn grouped_decode_costs_its_groups_and_its_positions() {
        let work =
            |cached, groups| attend_absorbed(&paper(), &DecodeWork::one(cached, groups, 0, Storage::F16), Storage::F16);
        let (few, more, longer) = (work(8192, 1600), work(8192, 1616), work(8448, 1600));
        // Sixteen groups more: their multiply-adds, and one more partial result to merge, 12 · (2·64 + 5).
        assert_eq!(more.flops - few.flops, 16 * 2 * 98_304 + 1596);
        assert_eq!(longer.flops - few.flops, 256 * 2 * 2_304);
        // A row of 128 halves, its statistics and its place in a list.
        assert_eq!(longer.bytes - few.bytes, 256 * (256 + 8 + 4));
        let (groups, cached) = (1640, 8192);
        let attention = Costed::cost(&attention_grouped::Problem {
            n_head: 12,
            widths: attention_grouped::Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 },
            met_groups: groups,
            met_positions: cached,
            ..grouped()
        });
        assert!(attention.flops <= 2 * (98_304 * groups + 2_304 * cached));
        // An f32 cache has 256 bytes more a row, and the new token's latent need not be read back from it.
        let wide = attend_absorbed(&paper(), &DecodeWork::one(cached as u32, 1600, 0, Storage::F32), Storage::F16);
        assert_eq!(wide.bytes - few.bytes, cached * 256 - (64 * 2 + 4 + 64 * 4));
        // Projecting the gate rows first costs 1536 · 256 multiply-adds each, the new token's among them.
        let projected = DecodeWork::one(8192, 1600, 1600, Storage::F16);
        let projected = attend_absorbed(&paper(), &projected, Storage::F16).flops - few.flops;
        assert_eq!(projected, 1601 * 2 * 1536 * 256);
    }

    /// Where all ids differ and the latent is wide, rebuilding is cheaper; with the ids of text it never is.
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
        // One token behind nothing, by hand. q 96·72, rope 6·4 pairs · (3 heads + 1 key), kv_a 96·40, norm 4·32 + 3,
        // o 72·96.
        let shared = 2 * 96 * 72 + 6 * 4 * 4 + 2 * 96 * 40 + 131 + 2 * 72 * 96;
        // W_K 3·16·32, one key 3·(2·32 + 8), merge 3·(2·32 + 5) + 3·(32 + 3), W_V 3·32·24.
        let absorbed = 2 * 3 * 16 * 32 + 2 * 3 * 72 + 207 + 105 + 2 * 3 * 32 * 24;
        assert_eq!(decode_absorbed(&config(None), 1, 0, 0, Storage::F32).flops, shared + absorbed);
        // kv_b 32·120, one key 3·48, merge 3·(2·24 + 5) + 3·(24 + 3).
        let expanded = 2 * 32 * 120 + 2 * 3 * 48 + 159 + 81;
        assert_eq!(decode_expanded(&config(None), 1, Storage::F32).flops, shared + expanded);
        // Every weight once: f16 halves weights and cache, and nothing else. Elements: q, kv_a, norm, kv_b, o, and the
        // new row of the cache, which is written by the append and read by the attention (40 elements both times).
        let f32 = decode_absorbed(&config(None), 1, 0, 0, Storage::F32).bytes;
        let f16 = decode_absorbed(&config(None), 1, 0, 0, Storage::F16).bytes;
        assert_eq!(f32 - f16, 2 * (96 * 72 + 96 * 40 + 32 + 32 * 120 + 72 * 96 + 40 + 40));
    }

    #[test]
    fn prefill_counts_each_causal_pair_once() {
        // One token is a decode step behind nothing, without the merge of its one split: 159 + 81.
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

    #[test]
    fn counts_of_sizes_that_no_device_holds_saturate() {
        let most = u32::MAX;
        let table = cache_read::Table { d_gate: most, vocab_size: most, storage: Storage::F32 };
        let read = cache_read::Problem {
            first_row: 0,
            rows: most,
            cache_rows: most,
            d_latent: most,
            n_sequence: most,
            table: Some(table),
            storage: Storage::F32,
        };
        assert_eq!(read.cost().bytes, u64::MAX);
        let widths = attention_grouped::Widths { d_latent: most, d_nope: most, d_rope: most, d_value: most };
        let grouped = attention_grouped::Problem {
            tokens: most,
            most_tokens: most,
            n_sequence: most,
            items: most,
            partials: most,
            n_head: most,
            widths,
            tiling: attention_grouped::Tiling { groups: most, run: most },
            table: most,
            list_words: most,
            cache_rows: most,
            rope_byte: u64::MAX,
            statistics_byte: u64::MAX,
            resident: most,
            gates_storage: Storage::F32,
            more: most,
            more_storage: Storage::F32,
            first_row: most,
            rows: most,
            pass_index: most,
            passes: most,
            activation: Activation::Identity,
            norm: GateNorm::LayerNorm,
            scale: 1.0,
            met_groups: u64::MAX,
            met_positions: u64::MAX,
            cache_storage: Storage::F32,
            storage: Storage::F32,
        };
        assert_eq!(grouped.cost(), Cost { flops: u64::MAX, bytes: u64::MAX });
        assert_eq!(grouped.tiling.item_groups(), u32::MAX);
        let gate = gate_rows::Problem {
            rows: most,
            width: most,
            d_gate: most,
            vocab_size: most,
            first_id: 0,
            ids: true,
            targets: true,
            y_rows: most,
            storage: Storage::F16,
            y_storage: Storage::F16,
        };
        assert_eq!(gate.cost().bytes, u64::MAX);
    }
}
