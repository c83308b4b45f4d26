//! Cases of `attention_combine`: one split, several and none, and maxima far apart.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::check::view::{Reading, View};
use crate::kernels::{AttentionCombine, attention_combine};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let tolerance = Tolerance::sums(&[67]);
    // One split, several, none, a token whose splits are all empty, and more splits than a workgroup has teams.
    let ranges = [0..1, 1..6, 6..6, 6..8, 8..75];
    let splits = 75;
    // Maxima of a few, then of ±1e4: one split takes everything. Values of the largest f16 over few positions, and over many.
    let sizes = [(1, 4), (3, 16), (9, 68), (2, 132), (1, 512)].map(|(n_head, width)| (n_head, width, 3.0, 1.0));
    for (n_head, width, spread, size) in
        sizes.into_iter().chain([(3, 16, 1e4, 1.0), (3, 16, 3.0, 65_504.0), (3, 16, 0.0, 1e-39)])
    {
        let plain = spread == 3.0 && size == 1.0;
        let extreme = if plain { String::new() } else { format!("_maxima_{spread:e}_values_{size:e}") };
        let op = AttentionCombine {
            tokens: ranges.len() as u32,
            n_head: n_head as u32,
            width: width as u32,
            splits: splits as u32,
        };
        let ranges = ranges.clone();
        each_variant(cases, format!("h{n_head}_{width}{extreme}"), op, move |lab, launch| {
            let mut random = Random::new(SEED);
            let mut values = random.values(splits * n_head * width, size);
            // Below the smallest normal number an adapter may take 0 for every second value, as for all of them.
            if size < f32::MIN_POSITIVE {
                values.iter_mut().step_by(2).for_each(|value| *value /= size);
            }
            let mut partial = reference::Partial {
                values: widen(&values),
                max: widen(&random.values(splits * n_head, spread)),
                sum: random.values(splits * n_head, 1.0).iter().map(|value| f64::from(value.abs() + 1.0)).collect(),
            };
            let empty = 6 * n_head..8 * n_head;
            partial.values[empty.start * width..empty.end * width].fill(0.0);
            partial.max[empty.clone()].fill(f32::MIN.into());
            partial.sum[empty].fill(0.0);
            let state: Vec<f32> =
                partial.max.iter().zip(&partial.sum).flat_map(|(&max, &sum)| [max as f32, sum as f32]).collect();
            let single: Vec<f32> = partial.values.iter().map(|&value| value as f32).collect();
            let (partial_values, partial_softmax) = (lab.floats(&single)?, lab.floats(&state)?);
            let lines: Vec<u32> = ranges.iter().flat_map(|range| [range.start as u32, range.len() as u32]).collect();
            let range_table = lab.words(&lines)?;
            let out = lab.output(ranges.len() * n_head * width)?;
            let lse = lab.output(ranges.len() * n_head)?;
            let args = attention_combine::Args {
                partial_values: &partial_values.region,
                partial_softmax: &partial_softmax.region,
                ranges: &range_table.region,
                values: &out.region,
                lse: &lse.region,
            };
            launch.run(lab, args)?;
            let expected = reference::attention_combine(&partial, &ranges, n_head, width);
            // The kernel writes the lowest f32 where the reference says −∞.
            let got = lab.read(&lse)?;
            let marked = View::all(Reading::Marked, got.words.len());
            Ok(vec![
                lab.compare(&out, &expected.values, tolerance)?,
                lab.compare_views(&[(&got, marked)], &expected.lse, tolerance),
            ])
        });
    }
}
