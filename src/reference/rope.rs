//! Rotary position embedding of the last part of every head.

use crate::config::RopeConfig;

/// `(cos, sin)` of `position · frequency_i`, both times the amplitude of the scaling (YaRN; 1 otherwise).
///
/// `positions` `[tokens]`; returns `[tokens, d_rope / 2]`.
pub fn rotations(rope: &RopeConfig, d_rope: usize, positions: &[u32]) -> Vec<[f64; 2]> {
    let frequencies = rope.frequencies(d_rope as u32);
    let amplitude = rope.amplitude();
    let mut rotations = Vec::with_capacity(positions.len() * frequencies.len());
    for &position in positions {
        rotations.extend(frequencies.iter().map(|frequency| {
            let (sin, cos) = (f64::from(position) * frequency).sin_cos();
            [amplitude * cos, amplitude * sin]
        }));
    }
    rotations
}

/// Multiplies queries `[tokens, row]` by the factors of their positions, which begin at `first`.
pub fn scale_queries(rope: &RopeConfig, values: &mut [f64], first: u32, row: usize) {
    for (query, position) in values.chunks_exact_mut(row).zip(first..) {
        query.iter_mut().for_each(|value| *value *= rope.query_factor(position));
    }
}

/// Rotates the last `d_rope` values of each head in place, pair by pair: `(x, y) → (x cos − y sin, x sin + y cos)`.
///
/// `values` `[tokens, n_head, d_head]`, `rotations` `[tokens, d_rope / 2]`. Pair i of the rotated part is
/// `(2i, 2i + 1)` with `interleave`, `(i, i + d_rope / 2)` without.
pub fn rope(values: &mut [f64], rotations: &[[f64; 2]], n_head: usize, d_head: usize, d_rope: usize, interleave: bool) {
    let pairs = d_rope / 2;
    let tokens = values.len() / (n_head * d_head).max(1);
    for row in 0..tokens * n_head {
        let part = &mut values[row * d_head + d_head - d_rope..][..d_rope];
        let rotations = &rotations[row / n_head * pairs..][..pairs];
        for (i, [cos, sin]) in rotations.iter().enumerate() {
            let (first, second) = if interleave { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
            let (x, y) = (part[first], part[second]);
            part[first] = x * cos - y * sin;
            part[second] = x * sin + y * cos;
        }
    }
}
