//! Multiply-adds, for the bench of arithmetic.

/// For every x the sum of twelve chains: the k-th begins as `x + k` and takes `4 · iterations` steps `z ← a · z + b`.
pub fn roofline_fma(x: &[f64], iterations: usize, a: f64, b: f64) -> Vec<f64> {
    let chain = |start: f64| (0..4 * iterations).fold(start, |z, _| a * z + b);
    x.iter().map(|x| (0..12).map(|k| chain(x + f64::from(k))).sum()).collect()
}
