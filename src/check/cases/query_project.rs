//! Cases of `query_project`: one token and several, latents that end anywhere in a load, heads with and without a rotary part.

use super::{SEED, each_variant, spread, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::config::RopeConfig;
use crate::kernels::query_project;
use crate::random::Random;
use crate::reference;
use crate::storage::{Storage, padded_width};

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (tokens, rank, n_head, d_nope, d_rope) in [
            (1, 1, 1, 8, 0),
            (1, 8, 3, 0, 8),
            (1, 131, 5, 16, 8),
            (1, 1536, 3, 24, 64),
            (2, 63, 1, 8, 8),
            (4, 264, 9, 8, 16),
            (5, 257, 3, 40, 8),
            (8, 512, 2, 64, 64),
            (9, 72, 7, 0, 16),
        ] {
            for size in [1.0, 1e-12, 1e12] {
                let padded = padded_width(rank);
                let op = query_project::QueryProject {
                    tokens,
                    rank: padded,
                    rank_used: rank,
                    x_row: padded + 12,
                    n_head,
                    d_nope,
                    d_rope,
                    eps: 1e-6,
                    storage,
                };
                let of_size = if size == 1.0 { String::new() } else { format!("_of_{size:e}") };
                let id = format!("{tokens}x{rank}_to_{n_head}x{d_nope}+{d_rope}{of_size}/{}", storage.name());
                let tolerance = Tolerance::sums(&[rank as usize, rank as usize, 2]);
                each_variant(cases, id, op, tolerance, move |lab, launch| {
                    let mut random = Random::new(SEED);
                    let columns = n_head * (d_nope + d_rope);
                    let mut values = random.values((tokens * op.x_row) as usize, size);
                    values.chunks_mut(op.x_row as usize).for_each(|row| row[rank as usize..padded as usize].fill(0.0));
                    let row = |token: u32| widen(&values[(token * op.x_row) as usize..][..rank as usize]);
                    let x_dense: Vec<f64> = (0..tokens).flat_map(row).collect();
                    let (scales, matrix) =
                        (random.values(rank as usize, 1.0), random.values((columns * rank) as usize, 1.0));
                    let parts = [rank];
                    let weight = lab.stored(&spread(&scales, &parts, || 0.0), storage)?.0;
                    let w = lab.stored(&spread(&matrix, &parts, || 0.0), storage)?.0;
                    let positions: Vec<u32> = (0..tokens).map(|token| 700 * token + 3).collect();
                    let turns = reference::rotations(&RopeConfig::default(), d_rope as usize, &positions);
                    let turns_f32 = turns.iter().flatten().map(|&value| value as f32).chain([0.0; 4]);
                    let rotations = lab.floats(&turns_f32.collect::<Vec<_>>())?;
                    let (x, q) = (lab.floats(&values)?, lab.output((tokens * columns) as usize)?);
                    let args = query_project::Args {
                        x: &x.region,
                        weight: &weight.region,
                        w: &w.region,
                        rotations: &rotations.region,
                        q: &q.region,
                    };
                    launch.run(lab, args)?;
                    let (scales, matrix) = (pack(&scales, storage).1, pack(&matrix, storage).1);
                    let heads = (n_head as usize, (d_nope + d_rope) as usize, d_rope as usize);
                    let expected = reference::query_project(&x_dense, &scales, &matrix, &turns, heads, 1e-6);
                    Ok(vec![lab.compare(&q, &expected, tolerance)?])
                });
            }
        }
    }
}
