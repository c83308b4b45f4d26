//! Attention over expanded keys and values.

use std::ops::Range;

use super::matmul::dot;

/// Result of attention.
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `Σ_j softmax(s)_j v_j` `[tokens, n_head, d_value]`; zeros where nothing is visible.
    pub values: Vec<f64>,
    /// `ln Σ_j exp(s_j)` `[tokens, n_head]`; −∞ where nothing is visible.
    pub lse: Vec<f64>,
}

/// Head count and widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_head: usize,
    /// Heads of keys and values; divides `n_head`.
    pub n_kv_head: usize,
    /// Content part of query and key.
    pub d_nope: usize,
    /// Rotary part of query and key.
    pub d_rope: usize,
    /// Value width.
    pub d_value: usize,
}

impl Heads {
    /// Width of a query head.
    pub fn d_query(self) -> usize {
        self.d_nope + self.d_rope
    }

    /// Width of a head of `kv`.
    pub fn d_kv(self) -> usize {
        self.d_nope + self.d_value
    }

    /// Where `kv` has the key of a row for a query head: groups of query heads share a key and a value.
    fn kv_start(self, row: usize, head: usize) -> usize {
        (row * self.n_kv_head + head / (self.n_head / self.n_kv_head)) * self.d_kv()
    }
}

/// `s_j = scale · (q_C · k_C_j + q_R · k_R_j)` over the visible rows, `o = Σ_j softmax(s)_j v_j`, per token and head.
///
/// `q` `[tokens, n_head, d_nope + d_rope]`, `kv` `[rows, n_kv_head, d_nope + d_value]`, `k_rope` `[rows, d_rope]`,
/// `visible` `[tokens]`: the rows that each token attends to.
pub fn attention_prefill(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    visible: &[Range<usize>],
    heads: Heads,
    scale: f64,
) -> Attended {
    let mut values = Vec::with_capacity(visible.len() * heads.n_head * heads.d_value);
    let mut lse = Vec::with_capacity(visible.len() * heads.n_head);
    for (token, rows) in visible.iter().enumerate() {
        for head in 0..heads.n_head {
            let query = &q[(token * heads.n_head + head) * heads.d_query()..][..heads.d_query()];
            let scores = scores(query, kv, k_rope, head, rows.clone(), heads, scale);
            let (max, mut weights, sum) = exponentials(&scores, f64::NEG_INFINITY);
            weights.iter_mut().for_each(|weight| *weight /= sum);
            values.extend(weighted_sum(&weights, rows.clone().map(|row| value(kv, row, head, heads)), heads.d_value));
            lse.push(max + sum.ln());
        }
    }
    Attended { values, lse }
}

/// The scores of one query head against some rows.
pub(super) fn scores(
    query: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    head: usize,
    rows: Range<usize>,
    heads: Heads,
    scale: f64,
) -> Vec<f64> {
    let (q_nope, q_rope) = query.split_at(heads.d_nope);
    let key_nope = |row: usize| &kv[heads.kv_start(row, head)..][..heads.d_nope];
    let key_rope = |row: usize| &k_rope[row * heads.d_rope..][..heads.d_rope];
    rows.map(|row| scale * (dot(q_nope, key_nope(row)) + dot(q_rope, key_rope(row)))).collect()
}

/// The value of one row and head.
pub(super) fn value(kv: &[f64], row: usize, head: usize, heads: Heads) -> &[f64] {
    &kv[heads.kv_start(row, head) + heads.d_nope..][..heads.d_value]
}

/// The largest score (at least `lowest`), `exp(score − max)` of each, and their sum.
pub(super) fn exponentials(scores: &[f64], lowest: f64) -> (f64, Vec<f64>, f64) {
    let max = scores.iter().copied().fold(lowest, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum = weights.iter().fold(0.0, |sum, weight| sum + weight);
    (max, weights, sum)
}

/// `Σ_j weights[j] · rows[j]`, of `width` values.
pub(super) fn weighted_sum<'a>(weights: &[f64], rows: impl Iterator<Item = &'a [f64]>, width: usize) -> Vec<f64> {
    let mut total = vec![0.0; width];
    for (weight, row) in weights.iter().zip(rows) {
        for (total, x) in total.iter_mut().zip(row) {
            *total += weight * x;
        }
    }
    total
}

/// [`attention_prefill`](attention_prefill()) of `f16(scale · q)`, `f16(kv)` and `f16(k_rope)`, with a scale of 1. The
/// product `scale · q` is a number of f32 before it is one of f16. Weights are not rounded here.
pub fn attention_prefill_of_halves(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    visible: &[Range<usize>],
    heads: Heads,
    scale: f64,
) -> Attended {
    let half = |value: f64| half::f16::from_f32(value as f32).to_f64();
    let q: Vec<f64> = q.iter().map(|value| half(scale * value)).collect();
    let kv: Vec<f64> = kv.iter().copied().map(half).collect();
    let k_rope: Vec<f64> = k_rope.iter().copied().map(half).collect();
    attention_prefill(&q, &kv, &k_rope, visible, heads, 1.0)
}
