//! Norms over the last axis: a kernel of its own, with the meaning of `norm`.

/// The same definition as [`rms_norm`](super::rms_norm()): `y = x / √(mean x² + eps) · weight`, per row of `width`; the other is
/// [`layer_norm`](super::layer_norm()).
pub fn norm_vec4(x: &[f64], weight: Option<&[f64]>, width: usize, eps: f64) -> Vec<f64> {
    super::rms_norm(x, weight, width, eps)
}
