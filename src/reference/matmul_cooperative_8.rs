//! `y = f16(x) wᵀ + bias`: a kernel of its own, with the meaning of `matmul_cooperative`.

/// The same definition as [`matmul_cooperative`](super::matmul_cooperative()).
pub fn matmul_cooperative_8(
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    rows: usize,
    inner: usize,
    cols: usize,
) -> Vec<f64> {
    super::matmul_cooperative(x, w, bias, rows, inner, cols)
}
