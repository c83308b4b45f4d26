//! `y = f16(x) wᵀ + bias`: the inputs of cooperative matrices are halves.

/// [`matmul`](super::matmul()) of `x` rounded to f16: `y[m, n] = Σ_k f16(x[m, k]) · w[n, k] + bias[n]`.
pub fn matmul_cooperative(
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    rows: usize,
    inner: usize,
    cols: usize,
) -> Vec<f64> {
    let halves: Vec<f64> = x.iter().map(|&value| half::f16::from_f64(value).to_f64()).collect();
    super::matmul(&halves, w, bias, rows, inner, cols)
}
