//! Cases of `gate_statistics`: rows of both tables, of the further one alone, of the resident one alone.

use super::{SEED, each_variant, equal_rows, spread, widen};
use crate::attention::groups::NO_ROW;
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::config::{Activation, GateNorm};
use crate::kernels::{GateStatistics, gate_statistics};
use crate::random::Random;
use crate::reference;
use crate::storage::{Segments, Storage};

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        let sizes = [(1, 1, 1, 0), (3, 3, 2, 1), (4, 2, 24, 8), (9, 13, 6, 4), (6, 1, 0, 33), (38, 5, 0, 1)];
        for (rows, count, first, second) in sizes {
            let id = format!("{rows}x{count}x{first}+{second}/{}", storage.name());
            let segments = Segments { count, parts: [first, second] };
            measure(cases, id, rows, segments, storage, false);
        }
        // One element, and equal ones, have no spread.
        for (count, first, second) in [(1, 1, 0), (2, 70, 9)] {
            let id = format!("equal_3x{count}x{first}+{second}/{}", storage.name());
            measure(cases, id, 3, Segments { count, parts: [first, second] }, storage, true);
        }
    }
}

fn measure(cases: &mut Vec<Case>, id: String, tokens: u32, segments: Segments, storage: Storage, equal: bool) {
    let width = segments.used();
    let tolerance = Tolerance::sums(&[width as usize]);
    let (more_first, cached) = (2, tokens + 2);
    let of = move |norm, activation, resident, further| GateStatistics {
        tokens,
        segments,
        resident,
        more: if further { more_first + tokens } else { 0 },
        more_first,
        cache_rows: cached,
        eps: 1e-5,
        activation,
        norm,
        storage,
        more_storage: Storage::F32,
    };
    // Rows of both tables, of the further one alone, of the resident one alone.
    let all = [
        of(GateNorm::LayerNorm, Activation::Sigmoid, 5, true),
        of(GateNorm::RmsNorm, Activation::OnePlus, 0, true),
        of(GateNorm::LayerNorm, Activation::Silu, 5, false),
    ];
    each_variant(cases, id, all[0], move |lab, launch| {
        let mut comparisons = Vec::new();
        for op in all {
            let GateStatistics { norm, activation, resident, more: more_rows, .. } = op;
            let further = more_rows > 0;
            let mut random = Random::new(SEED);
            let mut kv_values = random.values((tokens * width) as usize, 1.0);
            // The content of the padding does not count.
            let pitched = |values: &[f32], storage: Storage| pack(&spread(values, &segments.parts, || 0.5), storage);
            let mut gate_values = random.values((resident * width) as usize, 1.0);
            let mut more_values = random.values((more_rows * width) as usize, 1.0);
            if equal {
                for values in [&mut kv_values, &mut gate_values, &mut more_values] {
                    equal_rows(values, width as usize);
                }
            }
            let gates = lab.words(&pitched(&gate_values, storage).0)?;
            let more = lab.words(&pitched(&more_values, Storage::F32).0)?;
            let kv = lab.floats(&spread(&kv_values, &segments.parts, || 7.0))?;
            let kept = pack(&gate_values, storage).1;
            // A resident row, then one of `gates_more` by number, then one by token.
            let row_of = |token: u32| match (resident, further) {
                (_, false) => token % resident,
                (0, true) => [1, NO_ROW][token as usize % 2],
                (_, true) => [token % resident, resident + 1, NO_ROW][token as usize % 3],
            };
            let rows: Vec<u32> = (0..tokens).map(row_of).collect();
            let slots: Vec<u32> = (0..tokens).map(|token| tokens + 1 - token).collect();
            let (row_list, slot_list) = (lab.words(&rows)?, lab.words(&slots)?);
            let (statistics, absent) = (lab.output(2 * cached as usize)?, lab.kernels.absent());
            let args = gate_statistics::Args {
                kv: &kv.region,
                gates: if resident == 0 { &absent } else { &gates.region },
                gates_more: if further { &more.region } else { &absent },
                rows: &row_list.region,
                slots: &slot_list.region,
                statistics: &statistics.region,
            };
            launch.of(op).run(lab, args)?;
            let more_values = widen(&more_values);
            let w = width as usize;
            let gate_of = |(token, &row): (usize, &u32)| match row {
                NO_ROW => more_values[(more_first as usize + token) * w..][..w].to_vec(),
                row if row < resident => kept[row as usize * w..][..w].to_vec(),
                row => more_values[(row - resident) as usize * w..][..w].to_vec(),
            };
            let g: Vec<f64> = rows.iter().enumerate().flat_map(gate_of).collect();
            let measured = reference::gate_statistics(&widen(&kv_values), &g, activation, norm, w, 1e-5);
            let mut expected = vec![f64::NAN; 2 * cached as usize];
            for (&slot, pair) in slots.iter().zip(measured) {
                expected[2 * slot as usize..][..2].copy_from_slice(&pair);
            }
            comparisons.push(lab.compare(&statistics, &expected, tolerance)?);
        }
        Ok(comparisons)
    });
}
