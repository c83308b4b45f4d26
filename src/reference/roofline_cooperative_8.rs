//! The products of halves that benches measure cooperative matrices by, of matrices of 8 × 8.

/// [`roofline_cooperative`](super::roofline_cooperative()) with a side of 8.
pub fn roofline_cooperative_8(x: &[f64], trips: usize) -> Vec<f64> {
    super::roofline_cooperative(x, 8, trips)
}
