//! The elementwise product of a SwiGLU.

/// `y = silu(gate) ⊙ up` with `silu(x) = x / (1 + e^-x)`; all of one length.
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}
