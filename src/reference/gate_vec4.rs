//! The embedding gate: a kernel of its own, with the meaning of `gate`.

use super::Gated;
use crate::config::{Activation, GateNorm};

/// The same definition as [`gate`](super::gate()): `y = x ⊙ act(g)`, then `(y − μ) · ρ · weight + bias`.
#[expect(clippy::too_many_arguments, reason = "one argument per input of the kernel")]
pub fn gate_vec4(
    x: &[f64],
    g: &[f64],
    activation: Activation,
    norm: GateNorm,
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
    width: usize,
    eps: f64,
) -> Gated {
    super::gate(x, g, activation, norm, weight, bias, width, eps)
}
