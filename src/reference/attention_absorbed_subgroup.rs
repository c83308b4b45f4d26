//! Attention over the latent cache itself: a kernel of its own, with the meaning of `attention_absorbed`.

use std::ops::Range;

use super::Partial;

/// The same definition as [`attention_absorbed`](super::attention_absorbed()).
#[expect(clippy::too_many_arguments, reason = "one argument per input of the kernel")]
pub fn attention_absorbed_subgroup(
    a: &[f64],
    q_rope: &[f64],
    latent: &[f64],
    k_rope: &[f64],
    splits: &[(usize, Range<usize>)],
    n_head: usize,
    d_latent: usize,
    d_rope: usize,
    scale: f64,
) -> Partial {
    super::attention_absorbed(a, q_rope, latent, k_rope, splits, n_head, d_latent, d_rope, scale)
}
