//! Gate rows of token ids, before the activation.

use super::{gather, matmul};

/// `y[r] = b_proj · table[ids[r]]`: `table` `[vocab, d_gate]`, `b_proj` `[width, d_gate]`; returns `[rows, width]`.
pub fn gate_project(table: &[f64], b_proj: &[f64], ids: &[u32], d_gate: usize) -> Vec<f64> {
    matmul(&gather(table, d_gate, ids), b_proj, None, ids.len(), d_gate, b_proj.len() / d_gate)
}
