//! Cases of `cache_read`: a tile that begins and ends inside a sequence's padding, with token ids and without.

use super::batch::{Batch, cache_rows, compare_numbers};
use super::{SEED, each_variant};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::{CacheRead, cache_read};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (d_latent, d_rope, with_ids) in [(1, 0, true), (5, 2, false), (32, 16, true), (63, 6, true), (8, 64, false)]
        {
            let id = format!("{d_latent}+{d_rope}/{}", storage.name());
            read(cases, id, d_latent, with_ids, storage);
        }
    }
}

fn read(cases: &mut Vec<Case>, id: String, d_latent: u32, with_ids: bool, storage: Storage) {
    let batch = Batch::new(&[(0, 3), (0, 1), (0, SPLIT + 2)], 40);
    // A tile that begins inside the first sequence's padding and ends inside the last's.
    let (first_row, rows) = (2, batch.rows - 5);
    // In the other storage, rows padded.
    let (d_gate, vocab) = (5, 40);
    let table_storage = if storage == Storage::F32 { Storage::F16 } else { Storage::F32 };
    let op = CacheRead {
        first_row,
        rows,
        cache_rows: batch.cache_rows,
        d_latent,
        n_sequence: batch.sequences.len() as u32,
        table: with_ids.then_some(cache_read::Table { d_gate, vocab_size: vocab, storage: table_storage }),
        storage,
    };
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let slots = batch.slots();
        let (rounded, kept) = {
            let values = random.values(slots.len() * d_latent as usize, 1.0);
            (values.clone(), pack(&values, storage).1)
        };
        let latent_cache = lab.words(&cache_rows(&rounded, d_latent, &slots, batch.cache_rows, storage))?;
        let embeddings = random.values((vocab * d_gate) as usize, 1.0);
        let every: Vec<u32> = (0..vocab).collect();
        let gate_embedding = lab.words(&cache_rows(&embeddings, d_gate, &every, vocab, table_storage))?;
        let embeddings = pack(&embeddings, table_storage).1;
        let ids = random.ids(batch.cache_rows as usize, vocab);
        let id_cache = lab.words(&ids)?;
        let sequences = lab.words(bytemuck::cast_slice(&batch.sequences))?;
        let latent = lab.output((rows * d_latent) as usize)?;
        let (embedding, slot_out) = (lab.output((rows * d_gate) as usize)?, lab.output(rows as usize)?);
        let args = cache_read::Args {
            latent_cache: &latent_cache.region,
            id_cache: &id_cache.region,
            sequences: &sequences.region,
            gate_embedding: &gate_embedding.region,
            latent: &latent.region,
            embedding: &embedding.region,
            slots: &slot_out.region,
        };
        launch.run(lab, args)?;
        // Every row of the tile: its place among the valid rows, if it is one.
        let place: Vec<Option<usize>> = (first_row..first_row + rows).map(|row| batch.place(row)).collect();
        let row_slots: Vec<u32> = place.iter().map(|place| place.map_or(u32::MAX, |place| slots[place])).collect();
        let expected: Vec<f64> = place
            .iter()
            .flat_map(|place| match place {
                Some(place) => reference::cache_read(&kept, d_latent as usize, &[*place as u32]),
                None => vec![0.0; d_latent as usize],
            })
            .collect();
        let mut comparisons =
            vec![lab.compare(&latent, &expected, Tolerance::EXACT)?, compare_numbers(lab, &slot_out, &row_slots)?];
        if with_ids {
            let embedding_of = |&slot: &u32| match slot {
                u32::MAX => vec![0.0; d_gate as usize],
                slot => reference::gather(&embeddings, d_gate as usize, &[ids[slot as usize]]),
            };
            let expected: Vec<f64> = row_slots.iter().flat_map(embedding_of).collect();
            comparisons.push(lab.compare(&embedding, &expected, Tolerance::EXACT)?);
        }
        Ok(comparisons)
    });
}
