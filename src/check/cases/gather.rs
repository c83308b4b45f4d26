//! Cases of `gather`: the last row of a table, and rows that it does not have.

use super::{SEED, each_variant};
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
            let op = Gather { rows, width, table_row: width, vocab_size, storage };
            let id = format!("{rows}x{width}/{}", storage.name());
            each_variant(cases, id, op, Tolerance::EXACT, move |lab, launch| {
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
    }
}
