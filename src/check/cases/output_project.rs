//! Cases of `output_project`: one split, several and none, values of one to many loads, outputs that end within a tile.

use super::{SEED, each_variant, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::kernels::output_project;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    // One split, several, none, a token whose splits are all empty, and many splits.
    let ranges = [0..1, 1..6, 6..6, 6..8, 8..75];
    let splits = 75;
    for storage in Storage::ALL {
        for (n_head, d_value, columns, spread, bias) in [
            (1, 8, 1, 3.0, false),
            (3, 16, 7, 3.0, true),
            (9, 72, 130, 3.0, false),
            (2, 264, 8, 3.0, true),
            (12, 64, 257, 3.0, true),
            (16, 128, 17, 3.0, false),
            (3, 64, 64, 1e4, true),
        ] {
            let op = output_project::OutputProject {
                tokens: ranges.len() as u32,
                n_head,
                d_value,
                columns,
                splits,
                bias,
                storage,
            };
            let ranges = ranges.clone();
            let far = if spread > 3.0 { "_maxima_far_apart" } else { "" };
            let id = format!("h{n_head}_{d_value}_to_{columns}{far}/{}", storage.name());
            let tolerance = Tolerance::sums(&[67, (n_head * d_value) as usize + 1]);
            each_variant(cases, id, op, move |lab, launch| {
                let mut random = Random::new(SEED);
                let (heads, width) = (n_head as usize, d_value as usize);
                let rows = splits as usize * heads;
                let mut partial = reference::Partial {
                    values: widen(&random.values(rows * width, 1.0)),
                    max: widen(&random.values(rows, spread)),
                    sum: random.values(rows, 1.0).iter().map(|value| f64::from(value.abs() + 1.0)).collect(),
                };
                let empty = 6 * heads..8 * heads;
                partial.values[empty.start * width..empty.end * width].fill(0.0);
                partial.max[empty.clone()].fill(f32::MIN.into());
                partial.sum[empty].fill(0.0);
                let state: Vec<f32> =
                    partial.max.iter().zip(&partial.sum).flat_map(|(&max, &sum)| [max as f32, sum as f32]).collect();
                let single: Vec<f32> = partial.values.iter().map(|&value| value as f32).collect();
                let (partial_values, partial_softmax) = (lab.floats(&single)?, lab.floats(&state)?);
                let lines: Vec<u32> =
                    ranges.iter().flat_map(|range| [range.start as u32, range.len() as u32]).collect();
                let range_table = lab.words(&lines)?;
                let weights = random.values(columns as usize * heads * width, 1.0);
                let addends = random.values(columns as usize, 1.0);
                let (w, b) = (lab.stored(&weights, storage)?.0, lab.stored(&addends, storage)?.0);
                let y = lab.output(ranges.len() * columns as usize)?;
                let args = output_project::Args {
                    partial_values: &partial_values.region,
                    partial_softmax: &partial_softmax.region,
                    ranges: &range_table.region,
                    w: &w.region,
                    bias: &b.region,
                    y: &y.region,
                };
                launch.run(lab, args)?;
                let (weights, addends) = (pack(&weights, storage).1, pack(&addends, storage).1);
                let of_bias = bias.then_some(&addends[..]);
                let sizes = (heads, width, columns as usize);
                let expected = reference::output_project(&partial, &ranges, &weights, of_bias, sizes);
                Ok(vec![lab.compare(&y, &expected, tolerance)?])
            });
        }
    }
}
