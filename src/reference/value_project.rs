//! From the partial results of the absorbed path to values.

use std::ops::Range;

use super::{Partial, attention_combine, matmul};

/// `o[h] = W_V[h] S[h]` with the splits of each token combined to `S`.
///
/// `partial` and `ranges` as in [`attention_combine`](attention_combine()), values of width `d_latent`; `w`
/// `[n_head, d_value, d_latent]`; returns `[tokens, n_head, d_value]`.
pub fn value_project(
    partial: &Partial,
    ranges: &[Range<usize>],
    w: &[f64],
    (n_head, d_latent, d_value): (usize, usize, usize),
) -> Vec<f64> {
    let combined = attention_combine(partial, ranges, n_head, d_latent).values;
    let heads = combined.chunks(d_latent).zip(w.chunks(d_value * d_latent).cycle());
    heads.flat_map(|(latent, w)| matmul(latent, w, None, 1, d_latent, d_value)).collect()
}
