//! Rotates queries and keys of new tokens, and puts keys and values into their cache rows.

use super::{rms_norm, rope};

/// `q[t, h] = RoPE_t(N(x_q[t, h]))`, `cache[slots[t], g] = (RoPE_t(N(x_k[t, g])), x_v[t, g])`, pairs (2i, 2i + 1). N is the RMSNorm of
/// the first elements of a head, whose rest is 0, or nothing.
///
/// `x` `[tokens, n_head + 2 · n_kv_head, head_dim]`: queries, keys, values; `rotations` `[tokens, head_dim / 2]`; `slots` `[tokens]`;
/// `norm`: weights `[2, head_dim]` of queries and of keys, elements, eps;
/// `cache` `[rows, n_kv_head, 2, head_dim]`: slots beyond its rows are left out. Returns the queries `[tokens, n_head, head_dim]`.
pub fn heads_append(
    x: &[f64],
    rotations: &[[f64; 2]],
    slots: &[u32],
    norm: Option<(&[f64], usize, f64)>,
    cache: &mut [f64],
    (n_head, n_kv_head, head_dim): (usize, usize, usize),
) -> Vec<f64> {
    let kv_row = 2 * n_kv_head * head_dim;
    let mut queries = Vec::new();
    for (token, row) in x.chunks_exact((n_head + 2 * n_kv_head) * head_dim).enumerate() {
        let (turned, values) = row.split_at((n_head + n_kv_head) * head_dim);
        let mut turned = turned.to_vec();
        if let Some((weights, used, eps)) = norm {
            for (head, values) in turned.chunks_exact_mut(head_dim).enumerate() {
                let weight = &weights[if head < n_head { 0 } else { head_dim }..][..used];
                let normed = rms_norm(&values[..used], Some(weight), used, eps);
                values[..used].copy_from_slice(&normed);
            }
        }
        let turns = &rotations[token * head_dim / 2..][..head_dim / 2];
        rope(&mut turned, turns, n_head + n_kv_head, head_dim, head_dim, true);
        let (q, keys) = turned.split_at(n_head * head_dim);
        queries.extend_from_slice(q);
        let Some(target) = cache.get_mut(slots[token] as usize * kv_row..).and_then(|rest| rest.get_mut(..kv_row))
        else {
            continue;
        };
        let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (target, (key, value)) in target.chunks_exact_mut(2 * head_dim).zip(heads) {
            target[..head_dim].copy_from_slice(key);
            target[head_dim..].copy_from_slice(value);
        }
    }
    queries
}
