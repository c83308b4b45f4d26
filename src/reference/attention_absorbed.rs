//! Attention over the latent cache itself: queries carry `kv_b_proj`'s key rows, values are latents.

use std::ops::Range;

use super::Partial;
use super::attention_prefill::{exponentials, weighted_sum};
use super::matmul::dot;

/// `s_j = scale · (a · c_j + q_R · k_R_j)`, values `Σ_j exp(s_j − max) c_j`, over the rows of each split.
///
/// `a` `[tokens, n_head, d_latent]` are the absorbed queries `W_K[h]ᵀ q_C[h]`, `q_rope` `[tokens, n_head, d_rope]`,
/// `latent` `[rows, d_latent]`, `k_rope` `[rows, d_rope]`, `splits` `[splits]`: a token and the rows that this split of
/// it covers. The width of the result is `d_latent`: `W_V[h]` is applied after the splits are combined.
#[expect(clippy::too_many_arguments, reason = "one argument per input of the kernel")]
pub fn attention_absorbed(
    a: &[f64],
    q_rope: &[f64],
    latent: &[f64],
    k_rope: &[f64],
    splits: &[(usize, Range<usize>)],
    n_head: usize,
    d_latent: usize,
    d_rope: usize,
    scale: f64,
) -> Partial {
    let latent_row = |row: usize| &latent[row * d_latent..][..d_latent];
    let rope_row = |row: usize| &k_rope[row * d_rope..][..d_rope];
    let mut partial = Partial { values: Vec::new(), max: Vec::new(), sum: Vec::new() };
    for (token, rows) in splits {
        for head in token * n_head..(token + 1) * n_head {
            let (a, q_rope) = (&a[head * d_latent..][..d_latent], &q_rope[head * d_rope..][..d_rope]);
            let score = |row: usize| scale * (dot(a, latent_row(row)) + dot(q_rope, rope_row(row)));
            let scores: Vec<f64> = rows.clone().map(score).collect();
            let (max, weights, sum) = exponentials(&scores, f64::from(f32::MIN));
            partial.values.extend(weighted_sum(&weights, rows.clone().map(latent_row), d_latent));
            partial.max.push(max);
            partial.sum.push(sum);
        }
    }
    partial
}

/// [`attention_absorbed`](attention_absorbed()) of queries that are rounded to f16: all of a head, `a` and `q_rope`, in units of
/// the power of two below its largest element, so that the rounding is 2⁻¹¹ of that element at most, whatever its size.
#[expect(clippy::too_many_arguments, reason = "one argument per input of the kernel")]
pub fn attention_absorbed_of_halves(
    a: &[f64],
    q_rope: &[f64],
    latent: &[f64],
    k_rope: &[f64],
    splits: &[(usize, Range<usize>)],
    n_head: usize,
    d_latent: usize,
    d_rope: usize,
    scale: f64,
) -> Partial {
    let (mut a, mut q_rope) = (a.to_vec(), q_rope.to_vec());
    for head in 0..a.len() / d_latent.max(1) {
        let (a, q_rope) = (&mut a[head * d_latent..][..d_latent], &mut q_rope[head * d_rope..][..d_rope]);
        let unit = unit_of_halves(a.iter().chain(&*q_rope));
        for value in a.iter_mut().chain(q_rope) {
            *value = half::f16::from_f64(*value / unit).to_f64() * unit;
        }
    }
    attention_absorbed(&a, &q_rope, latent, k_rope, splits, n_head, d_latent, d_rope, scale)
}

/// The power of two below the largest of some numbers, as f32 knows it; of numbers below its smallest normal one, that one.
pub(super) fn unit_of_halves<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    let largest = values.fold(0f32, |most, value| most.max(value.abs() as f32));
    let exponent = (largest.to_bits() & 0x7f80_0000).clamp(0x0080_0000, 0x7e80_0000);
    f64::from(f32::from_bits(exponent))
}
