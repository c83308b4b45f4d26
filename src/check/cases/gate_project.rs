//! Cases of `gate_project`: rows by id and in a row, to targets and in order, an id that is left out.

use super::batch::{row_words, unpack};
use super::{SEED, each_variant};
use crate::attention::groups::NO_ROW;
use crate::check::compare::Tolerance;
use crate::check::guarded::Guarded;
use crate::check::{Case, pack};
use crate::kernels::{GateProject, gate_project};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (rows, width, d_gate, ids, targets) in [
            (1, 1, 1, true, false),
            (3, 7, 5, true, true),
            (4, 64, 8, false, false),
            (9, 130, 33, true, true),
            (6, 33, 64, false, true),
            (38, 5, 6, true, false),
        ] {
            project(cases, (rows, width, d_gate), ids, targets, storage);
        }
    }
}

fn project(
    cases: &mut Vec<Case>,
    (rows, width, d_gate): (u32, u32, u32),
    with_ids: bool,
    with_targets: bool,
    storage: Storage,
) {
    let lists = if with_ids { "ids" } else { "all" };
    let id = format!("{rows}x{width}x{d_gate}_{lists}/{}", storage.name());
    let (vocab_size, first_id, y_rows) = (23, 4, rows + 3);
    // The other storage for the result: a pool is stored like the cache, not like the weights.
    let y_storage = if storage == Storage::F32 { Storage::F16 } else { Storage::F32 };
    let tolerance = match y_storage {
        Storage::F32 => Tolerance::sums(&[d_gate as usize]),
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    let op = GateProject {
        rows,
        width,
        d_gate,
        vocab_size,
        first_id,
        ids: with_ids,
        targets: with_targets,
        y_rows,
        storage,
        y_storage,
    };
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let padded = |values: &[f32], width: u32| {
            let pitch = storage.row_pitch(width) as usize;
            let rows: Vec<f32> =
                values.chunks(width as usize).flat_map(|row| [row, &vec![0.0; pitch - row.len()]].concat()).collect();
            pack(&rows, storage).0
        };
        let table = random.values((vocab_size * d_gate) as usize, 1.0);
        let b_proj = random.values((width * d_gate) as usize, 1.0);
        let mut ids = random.ids(rows as usize, vocab_size);
        ids[0] = vocab_size - 1;
        // The second row is left out.
        if rows > 1 {
            ids[1] = NO_ROW;
        }
        let targets: Vec<u32> = (0..rows).map(|row| (row * 2 + 1) % y_rows).collect();
        let unique = targets.iter().collect::<std::collections::HashSet<_>>().len() == targets.len();
        let targets = if unique { targets } else { (0..rows).rev().collect() };
        let embedding = lab.words(&padded(&table, d_gate))?;
        let projection = lab.words(&padded(&b_proj, d_gate))?;
        let (id_list, target_list) = (lab.words(&ids)?, lab.words(&targets)?);
        let y_words = row_words(width, y_storage);
        let y = Guarded::poisoned_as(lab.kernels, "y", y_rows as usize * y_words, y_storage)?;
        let args = gate_project::Args {
            gate_embedding: &embedding.region,
            gate_b_proj: &projection.region,
            ids: &id_list.region,
            targets: &target_list.region,
            y: &y.region,
        };
        launch.run(lab, args)?;
        let kept = |values: &[f32]| pack(values, storage).1;
        let mut expected = vec![f64::NAN; (y_rows * width) as usize];
        for row in 0..rows {
            let id = if with_ids { ids[row as usize] } else { first_id + row };
            let to = if with_targets { targets[row as usize] } else { row };
            if id != NO_ROW {
                let values = reference::gate_project(&kept(&table), &kept(&b_proj), &[id], d_gate as usize);
                expected[(to * width) as usize..][..width as usize].copy_from_slice(&values);
            }
        }
        let got = lab.read(&y)?;
        Ok(vec![lab.compare_views(&[(&got, unpack(0, y_rows, width, y_storage))], &expected, tolerance)])
    });
}
