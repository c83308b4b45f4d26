//! Writes new cache rows, and makes queries of a low rank.

use super::{matmul, rms_norm, rope};

/// `cache[slots[i]] = rows[i]`: `cache` `[capacity, width]`, `rows` `[tokens, width]`, `slots` `[tokens]`.
pub fn cache_append(cache: &mut [f64], rows: &[f64], width: usize, slots: &[u32]) {
    for (i, &slot) in slots.iter().enumerate() {
        cache[slot as usize * width..][..width].copy_from_slice(&rows[i * width..][..width]);
    }
}

/// `q = RoPE(RMSNorm(x) wᵀ)`, the last `d_rope` elements of each head rotated, pairs side by side.
///
/// `x` `[tokens, rank]`, `weight` `[rank]`, `w` `[n_head · d_head, rank]`, `rotations` `[tokens, d_rope / 2]`; returns
/// `[tokens, n_head, d_head]`.
pub fn low_rank_queries(
    x: &[f64],
    weight: &[f64],
    w: &[f64],
    rotations: &[[f64; 2]],
    (n_head, d_head, d_rope): (usize, usize, usize),
    eps: f64,
) -> Vec<f64> {
    let rank = weight.len();
    let normed = rms_norm(x, Some(weight), rank, eps);
    let mut q = matmul(&normed, w, None, x.len() / rank, rank, n_head * d_head);
    rope(&mut q, rotations, n_head, d_head, d_rope, true);
    q
}
