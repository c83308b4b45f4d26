//! Cases of `attention_decode`: ragged batches of one new token and of several, every pair of storages, and the extremes.

use super::batch::{Widths, cache_rows, compare_partials, decoding, few_new, few_sizes, splits};
use super::extreme::{Extreme, attention_tolerance};
use super::{SEED, each_variant, widen};
use crate::check::{Case, pack};
use crate::error::Result;
use crate::kernels::attention_decode::{SPLIT, SPLITS};
use crate::kernels::{AttentionDecode, attention_decode};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let plain = (Extreme::Plain, SPLIT);
    for storage in Storage::ALL {
        for (name, lengths, widths) in few_sizes() {
            let (n_head, d_nope, d_rope, d_value) = widths;
            let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
            // Rebuilt keys and values are f32, cached ones either.
            for kv_storage in Storage::ALL {
                if in_whole_loads(widths, storage, kv_storage) {
                    let id = format!("{id}_kv_{}", kv_storage.name());
                    decode(cases, id, lengths, 1, widths, (storage, kv_storage), plain);
                }
            }
        }
        // Speculative decoding: candidates that see each other, across the border of a split.
        for most in [2, 16] {
            let id = format!("q{most}/{}", storage.name());
            decode(cases, id, &[258, 1, 40, 511], most, (3, 16, 8, 16), (storage, storage), plain);
        }
        // Shorter splits, with lengths around theirs.
        for split in SPLITS {
            let (id, lengths) =
                (format!("split_{split}/{}", storage.name()), [split - 1, 1, split + 1, 320, 2 * split]);
            decode(cases, id, &lengths, 2, (5, 16, 8, 40), (storage, storage), (Extreme::Plain, split));
        }
        for extreme in Extreme::ALL {
            let id = format!("{}/{}", extreme.name(), storage.name());
            decode(cases, id, &[300, 1, 255], 1, (3, 16, 8, 16), (storage, storage), (extreme, SPLIT));
        }
    }
}

/// Whether rows of these widths are whole 16-byte loads, as the kernel asks.
fn in_whole_loads((_, d_nope, d_rope, d_value): Widths, storage: Storage, kv_storage: Storage) -> bool {
    let whole = |width: usize, storage: Storage| width.is_multiple_of(16 / storage.bytes() as usize);
    whole(d_nope, kv_storage) && whole(d_value, kv_storage) && whole(d_rope, storage)
}

fn decode(
    cases: &mut Vec<Case>,
    id: String,
    lengths: &[u32],
    most: u32,
    (n_head, d_nope, d_rope, d_value): Widths,
    (storage, kv_storage): (Storage, Storage),
    (extreme, split): (Extreme, u32),
) {
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let tolerance = attention_tolerance(d_query, split as usize, extreme.spread());
    let scale = (d_query as f32).sqrt().recip();
    let tile_rows = 2 * SPLIT;
    let batch = few_new(lengths, most);
    let op = AttentionDecode {
        tokens: batch.tokens,
        most_tokens: most,
        partials: splits(&batch, split).len() as u32,
        split,
        n_sequence: batch.sequences.len() as u32,
        n_head: n_head as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        d_value: d_value as u32,
        kv_first: 0,
        kv_rows: SPLIT,
        cache_rows: batch.cache_rows,
        scale,
        storage,
        kv_storage,
    };
    each_variant(cases, id, op, tolerance, move |lab, launch| {
        let slots = batch.slots();
        let mut random = Random::new(SEED);
        let mut q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
        let mut kv_values = random.values(slots.len() * d_kv, 1.0);
        let mut rope_values = random.values(slots.len() * d_rope, 1.0);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut kv_values, d_kv, kv_storage);
        extreme.of_keys(&mut rope_values, d_rope, storage);
        let rope_kept = pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        // A binding holds 16 bytes, also without a rotary part.
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&decoding(&batch, split)))?;
        let partials = splits(&batch, split).len() * n_head;
        let (values, softmax) = (lab.output(partials * d_value)?, lab.output(partials * 2)?);
        let kv_tiles = (0..batch.rows)
            .step_by(tile_rows as usize)
            .map(|first| {
                let rows = tile_rows.min(batch.rows - first);
                Ok((first, rows, lab.stored(&batch.tile(&kv_values, d_kv, first, rows), kv_storage)?.0))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.launch(|recording| {
            for (first, rows, kv) in &kv_tiles {
                let args = attention_decode::Args {
                    q: &q.region,
                    kv: &kv.region,
                    rope_cache: &rope_cache.region,
                    sequences: &sequences.region,
                    partial_values: &values.region,
                    partial_softmax: &softmax.region,
                };
                launch.of(AttentionDecode { kv_first: *first, kv_rows: *rows, ..op }).add(recording, args)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let (q, kv) = (widen(&q_values), pack(&kv_values, kv_storage).1);
        let expected = reference::attention_decode(&q, &kv, &rope_kept, &splits(&batch, split), heads, scale.into());
        extreme.check_scores(launch.variant.spec.name, &expected.max)?;
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    });
}
