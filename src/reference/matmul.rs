//! `y = x wᵀ + bias`.

/// Linear layer: `y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]`.
///
/// `x` `[rows, inner]`, `w` `[cols, inner]` (checkpoint layout), `bias` `[cols]`; returns `[rows, cols]`.
pub fn matmul(x: &[f64], w: &[f64], bias: Option<&[f64]>, rows: usize, inner: usize, cols: usize) -> Vec<f64> {
    let mut y = Vec::with_capacity(rows * cols);
    for m in 0..rows {
        let x_row = &x[m * inner..][..inner];
        y.extend((0..cols).map(|n| dot(x_row, &w[n * inner..][..inner]) + bias.map_or(0.0, |bias| bias[n])));
    }
    y
}

/// `Σ_k a[k] · b[k]`, in eight running sums so that the compiler can vectorise it.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    debug_assert_eq!(a.len(), b.len());
    let (a_blocks, b_blocks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in a_blocks.zip(b_blocks) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + tail
}

/// [`matmul`](matmul()) of `x` rounded to f16: `y[m, n] = Σ_k f16(x[m, k]) · w[n, k] + bias[n]`.
pub fn matmul_of_halves(
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    rows: usize,
    inner: usize,
    cols: usize,
) -> Vec<f64> {
    let halves: Vec<f64> = x.iter().map(|&value| half::f16::from_f64(value).to_f64()).collect();
    matmul(&halves, w, bias, rows, inner, cols)
}
