//! The copy that benches measure memory by.

/// `y = x`
pub fn roofline_copy(x: &[f64]) -> Vec<f64> {
    x.to_vec()
}
