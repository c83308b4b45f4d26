//! Cases of `value_project`: one split, several and none, latents of one to many loads, heads behind others' weights.

use super::{SEED, each_variant, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::kernels::value_project;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    // One split, several, none, a token whose splits are all empty, and more splits than a workgroup has teams.
    let ranges = [0..1, 1..6, 6..6, 6..8, 8..75];
    let splits = 75;
    for storage in Storage::ALL {
        for (n_head, d_latent, d_value, spread) in [
            (1, 8, 1, 3.0),
            (3, 16, 7, 3.0),
            (9, 72, 33, 3.0),
            (2, 264, 8, 3.0),
            (1, 512, 130, 3.0),
            (2, 2048, 17, 3.0),
            (3, 64, 64, 1e4),
        ] {
            let w_offset = 8 * d_latent;
            let w_head = (8 + d_value) * d_latent;
            let op = value_project::ValueProject {
                tokens: ranges.len() as u32,
                n_head,
                d_latent,
                d_value,
                splits,
                w_offset,
                w_head,
                storage,
            };
            let ranges = ranges.clone();
            let far = if spread > 3.0 { "_maxima_far_apart" } else { "" };
            let id = format!("h{n_head}_{d_latent}_to_{d_value}{far}/{}", storage.name());
            let tolerance = Tolerance::sums(&[67, d_latent as usize]);
            each_variant(cases, id, op, move |lab, launch| {
                let mut random = Random::new(SEED);
                let (heads, width) = (n_head as usize, d_latent as usize);
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
                let weights = random.values((n_head * w_head) as usize, 1.0);
                let w = lab.stored(&weights, storage)?.0;
                let values = lab.output(ranges.len() * heads * d_value as usize)?;
                let args = value_project::Args {
                    partial_values: &partial_values.region,
                    partial_softmax: &partial_softmax.region,
                    ranges: &range_table.region,
                    w: &w.region,
                    values: &values.region,
                };
                launch.run(lab, args)?;
                let packed = pack(&weights, storage).1;
                let of_values: Vec<f64> =
                    packed.chunks(w_head as usize).flat_map(|head| head[w_offset as usize..].to_vec()).collect();
                let sizes = (heads, width, d_value as usize);
                let expected = reference::value_project(&partial, &ranges, &of_values, sizes);
                Ok(vec![lab.compare(&values, &expected, tolerance)?])
            });
        }
    }
}
