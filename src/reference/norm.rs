//! Norms over the last axis.

/// `y = x / √(mean x² + eps) · weight`, per row of `width`.
///
/// `x` `[rows, width]`, `weight` `[width]` (absent: 1); returns `[rows, width]`.
pub fn rms_norm(x: &[f64], weight: Option<&[f64]>, width: usize, eps: f64) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let mean_square = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
        let rho = 1.0 / (mean_square + eps).sqrt();
        y.extend(row.iter().enumerate().map(|(i, x)| x * rho * weight.map_or(1.0, |weight| weight[i])));
    }
    y
}

/// `y = (x − mean) / √(var + eps) · weight + bias`, per row of `width`; `var` is the mean squared deviation.
///
/// `x` `[rows, width]`, `weight` `[width]` (absent: 1), `bias` `[width]` (absent: 0); returns `[rows, width]`.
pub fn layer_norm(x: &[f64], weight: Option<&[f64]>, bias: Option<&[f64]>, width: usize, eps: f64) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let rho = 1.0 / (variance + eps).sqrt();
        y.extend(row.iter().enumerate().map(|(i, x)| {
            (x - mean) * rho * weight.map_or(1.0, |weight| weight[i]) + bias.map_or(0.0, |bias| bias[i])
        }));
    }
    y
}
