//! Attention over expanded keys and values, in splits that `attention_combine` combines.

use std::ops::Range;

use super::Heads;
use super::attention_prefill::{exponentials, scores, value, weighted_sum};

/// Attention over parts of the rows, not yet divided by the sum of the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Partial {
    /// `Σ_j exp(s_j − max) v_j` `[splits, n_head, width]`; zeros for an empty split.
    pub values: Vec<f64>,
    /// The largest score `[splits, n_head]`; the lowest finite f32 for an empty split.
    pub max: Vec<f64>,
    /// `Σ_j exp(s_j − max)` `[splits, n_head]`; 0 for an empty split.
    pub sum: Vec<f64>,
}

/// `s_j = scale · (q_C · k_C_j + q_R · k_R_j)` over the rows of each split.
///
/// `q` `[tokens, n_head, d_nope + d_rope]`, `kv` `[rows, n_kv_head, d_nope + d_value]`, `k_rope` `[rows, d_rope]`,
/// `splits` `[splits]`: a token and the rows that this split of it covers. The width of the result is `d_value`.
pub fn attention_decode(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    splits: &[(usize, Range<usize>)],
    heads: Heads,
    scale: f64,
) -> Partial {
    let mut partial = Partial { values: Vec::new(), max: Vec::new(), sum: Vec::new() };
    for (token, rows) in splits {
        for head in 0..heads.n_head {
            let query = &q[(token * heads.n_head + head) * heads.d_query()..][..heads.d_query()];
            let scores = scores(query, kv, k_rope, head, rows.clone(), heads, scale);
            let (max, weights, sum) = exponentials(&scores, f64::from(f32::MIN));
            let values = rows.clone().map(|row| value(kv, row, head, heads));
            partial.values.extend(weighted_sum(&weights, values, heads.d_value));
            partial.max.push(max);
            partial.sum.push(sum);
        }
    }
    partial
}
