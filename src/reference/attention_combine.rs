//! Combines the splits of one token's attention into one result.

use std::ops::Range;

use super::{Attended, Partial};

/// `M = max_s max_s`, `L = Σ_s sum_s exp(max_s − M)`, `o = Σ_s exp(max_s − M) values_s / L`, `lse = M + ln L`.
///
/// `partial` holds `[splits, n_head]` and `[splits, n_head, d_value]`; `ranges` `[tokens]`: the splits of each token.
/// Without any key `o` is 0 and `lse` is −∞, for which the GPU kernel writes the lowest finite f32.
pub fn attention_combine(partial: &Partial, ranges: &[Range<usize>], n_head: usize, d_value: usize) -> Attended {
    let mut attended = Attended { values: Vec::new(), lse: Vec::new() };
    for range in ranges {
        for head in 0..n_head {
            let splits = range.clone().map(|split| split * n_head + head).filter(|&split| partial.sum[split] != 0.0);
            let max = splits.clone().map(|split| partial.max[split]).fold(f64::NEG_INFINITY, f64::max);
            let mut values = vec![0.0; d_value];
            let mut sum = 0.0;
            for split in splits {
                let factor = (partial.max[split] - max).exp();
                sum += factor * partial.sum[split];
                for (value, part) in values.iter_mut().zip(&partial.values[split * d_value..][..d_value]) {
                    *value += factor * part;
                }
            }
            let divisor = if sum == 0.0 { 1.0 } else { sum };
            attended.values.extend(values.iter().map(|value| value / divisor));
            attended.lse.push(max + sum.ln());
        }
    }
    attended
}
