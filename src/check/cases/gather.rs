//! Cases of `gather`: the last row of a table, rows of zeros, and a shard of a table whose other rows stay as they were.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{Gather, gather};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (rows, width) in [(1, 1), (3, 7), (5, 64), (65, 33), (2, 257)] {
            let vocab_size = 19;
            let op = Gather { rows, width, table_row: width, first_id: 0, vocab_size, storage };
            let id = format!("{rows}x{width}/{}", storage.name());
            each_variant(cases, id, op, move |lab, launch| {
                let mut random = Random::new(SEED);
                let (table, mut kept) = lab.stored(&random.values((vocab_size * width) as usize, 1.0), storage)?;
                let mut id_values = random.ids(rows as usize, vocab_size);
                // The last row of the table, where an odd f16 count leaves half a word, and a row of zeros.
                id_values[0] = vocab_size - 1;
                if rows > 1 {
                    id_values[1] = u32::MAX;
                }
                let ids = lab.words(&id_values)?;
                let y = lab.output((rows * width) as usize)?;
                launch.run(lab, gather::Args { table: &table.region, ids: &ids.region, y: &y.region })?;
                kept.resize(kept.len() + width as usize, 0.0);
                let known: Vec<u32> = id_values.iter().map(|&id| id.min(vocab_size)).collect();
                let expected = reference::gather(&kept, width as usize, &known);
                Ok(vec![lab.compare(&y, &expected, Tolerance::EXACT)?])
            });
        }
        // Ids before the shard, of its first and its last row, behind it, and one that its first would wrap around to.
        let (first_id, vocab_size, width) = (6, 5, 9);
        let op = Gather { rows: 6, width, table_row: width, first_id, vocab_size, storage };
        each_variant(cases, format!("shard/{}", storage.name()), op, move |lab, launch| {
            let mut random = Random::new(SEED);
            let (table, kept) = lab.stored(&random.values((vocab_size * width) as usize, 1.0), storage)?;
            let before = random.values(6 * width as usize, 1.0);
            let ids = [first_id - 1, first_id, first_id + vocab_size - 1, first_id + vocab_size, u32::MAX - 1, 0];
            let (id_words, y) = (lab.words(&ids)?, lab.floats(&before)?);
            launch.run(lab, gather::Args { table: &table.region, ids: &id_words.region, y: &y.region })?;
            let mut expected = widen(&before);
            for (id, row) in ids.into_iter().zip(expected.chunks_mut(width as usize)) {
                if (first_id..first_id + vocab_size).contains(&id) {
                    row.copy_from_slice(&reference::gather(&kept, width as usize, &[id - first_id]));
                }
            }
            Ok(vec![lab.compare(&y, &expected, Tolerance::EXACT)?])
        });
    }
}
