//! Attention over expanded keys and values that are halves, as the inputs of cooperative matrices are.

use std::ops::Range;

use super::{Attended, Heads};

/// [`attention_prefill`](super::attention_prefill()) of `f16(scale · q)`, `f16(kv)` and `f16(k_rope)`, with a scale of 1. The
/// product `scale · q` is a number of f32 before it is one of f16. Weights are not rounded here.
pub fn attention_prefill_cooperative(
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
    super::attention_prefill(&q, &kv, &k_rope, visible, heads, 1.0)
}
