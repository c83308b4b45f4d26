//! A copy, for the bench of memory.

/// `y = x`
pub fn roofline_copy(x: &[f64]) -> Vec<f64> {
    x.to_vec()
}
