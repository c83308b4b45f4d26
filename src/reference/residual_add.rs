//! Adds to the residual stream.

/// `y = stream + factor · delta`; all of one length.
pub fn residual_add(stream: &[f64], delta: &[f64], factor: f64) -> Vec<f64> {
    stream.iter().zip(delta).map(|(stream, delta)| stream + factor * delta).collect()
}
