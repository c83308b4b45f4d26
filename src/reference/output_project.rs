//! From partial results to the output of a layer.

use std::ops::Range;

use super::{Partial, attention_combine, matmul};

/// `y = S wᵀ + bias` with the splits of each token combined to `S`.
///
/// `partial` and `ranges` as in [`attention_combine`](attention_combine()); `w` `[columns, n_head · d_value]`; returns
/// `[tokens, columns]`.
pub fn output_project(
    partial: &Partial,
    ranges: &[Range<usize>],
    w: &[f64],
    bias: Option<&[f64]>,
    (n_head, d_value, columns): (usize, usize, usize),
) -> Vec<f64> {
    let combined = attention_combine(partial, ranges, n_head, d_value).values;
    matmul(&combined, w, bias, ranges.len(), n_head * d_value, columns)
}
