//! Statistics of the gate's norm.

use super::gate;
use crate::config::{Activation, GateNorm};

/// (μ, ρ) of every row of `kv ⊙ act(g)`, `[rows, width]` each.
pub fn gate_statistics(
    kv: &[f64],
    g: &[f64],
    activation: Activation,
    norm: GateNorm,
    width: usize,
    eps: f64,
) -> Vec<[f64; 2]> {
    gate(kv, g, activation, norm, None, None, width, eps).statistics
}
