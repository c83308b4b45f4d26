//! The embedding gate: product with the activated gate, then the norm.

use crate::config::{Activation, GateNorm};

/// Gated rows and what their norm subtracted and multiplied by.
#[derive(Debug, Clone, PartialEq)]
pub struct Gated {
    /// `Norm(x ⊙ act(g))` `[rows, width]`.
    pub values: Vec<f64>,
    /// (μ, ρ) of every row: layer_norm `(mean, 1/√(var + eps))`, rms_norm `(0, 1/√(mean square + eps))`, none `(0, 1)`.
    pub statistics: Vec<[f64; 2]>,
}

/// The activation of one gate value.
pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Identity => x,
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::OnePlus => 1.0 + x,
    }
}

/// `y = x ⊙ act(g)`, then `(y − μ) · ρ · weight + bias` with μ and ρ of the row.
///
/// `x` and `g` `[rows, width]`, where `g` is `gate_b_proj e` before its activation; `weight` `[width]` (absent: 1),
/// `bias` `[width]` (absent: 0).
#[expect(clippy::too_many_arguments, reason = "one argument per input of the kernel")]
pub fn gate(
    x: &[f64],
    g: &[f64],
    activation: Activation,
    norm: GateNorm,
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
    width: usize,
    eps: f64,
) -> Gated {
    let product: Vec<f64> = x.iter().zip(g).map(|(x, &g)| x * activate(activation, g)).collect();
    let statistics: Vec<[f64; 2]> = product.chunks_exact(width).map(|row| statistics(norm, row, eps)).collect();
    let mut values = Vec::with_capacity(product.len());
    for (row, [mu, rho]) in product.chunks_exact(width).zip(&statistics) {
        values.extend(
            row.iter().enumerate().map(|(i, y)| {
                (y - mu) * rho * weight.map_or(1.0, |weight| weight[i]) + bias.map_or(0.0, |bias| bias[i])
            }),
        );
    }
    Gated { values, statistics }
}

/// (μ, ρ) of one row.
fn statistics(norm: GateNorm, row: &[f64], eps: f64) -> [f64; 2] {
    let mean_square = |mu: f64| row.iter().map(|y| (y - mu).powi(2)).sum::<f64>() / row.len() as f64;
    match norm {
        GateNorm::LayerNorm => {
            let mu = row.iter().sum::<f64>() / row.len() as f64;
            [mu, 1.0 / (mean_square(mu) + eps).sqrt()]
        }
        GateNorm::RmsNorm => [0.0, 1.0 / (mean_square(0.0) + eps).sqrt()],
        GateNorm::None => [0.0, 1.0],
    }
}
