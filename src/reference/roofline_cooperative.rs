//! Products of halves, for the bench of cooperative matrices.

/// `iterations · f16(x[i]) · f16(x[2 + j])` for i = 0, 1 and j = 0 … 3, with matrices `x` `[6, side, side]`; returns
/// `[2, 4, side, side]`.
pub fn roofline_cooperative(x: &[f64], side: usize, iterations: usize) -> Vec<f64> {
    let matrix = |index: usize| -> Vec<f64> {
        let values = &x[index * side * side..][..side * side];
        values.iter().map(|&value| half::f16::from_f64(value).to_f64()).collect()
    };
    let product = |left: Vec<f64>, right: Vec<f64>| {
        let element = |row: usize, column: usize| -> f64 {
            (0..side).map(|k| left[row * side + k] * right[k * side + column]).sum::<f64>() * iterations as f64
        };
        (0..side * side).map(|at| element(at / side, at % side)).collect::<Vec<_>>()
    };
    (0..8).flat_map(|at| product(matrix(at / 4), matrix(2 + at % 4))).collect()
}
