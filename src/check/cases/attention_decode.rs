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

/// One case.
#[derive(Clone, Copy)]
struct Sizes<'a> {
    lengths: &'a [u32],
    /// Most query tokens per sequence.
    most: u32,
    widths: Widths,
    n_kv_head: usize,
    /// Of the rope cache, and of keys and values.
    storages: (Storage, Storage),
    extreme: Extreme,
    split: u32,
    /// Unused elements behind each row of keys and values.
    slack: u32,
}

impl<'a> Sizes<'a> {
    /// One query token of each sequence, every head with keys and values of its own.
    fn new(lengths: &'a [u32], widths: Widths, storages: (Storage, Storage)) -> Self {
        let (n_kv_head, extreme) = (widths.0, Extreme::Plain);
        Sizes { lengths, most: 1, widths, n_kv_head, storages, extreme, split: SPLIT, slack: 0 }
    }
}

/// Query heads and heads of keys and values: groups of 1 to 63, some no whole workgroups of them.
const GROUPS: [(usize, usize); 10] =
    [(3, 1), (9, 3), (12, 6), (16, 1), (16, 4), (20, 4), (63, 1), (63, 9), (128, 8), (9, 1)];

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        let both = (storage, storage);
        for (name, lengths, widths) in few_sizes() {
            let (n_head, d_nope, d_rope, d_value) = widths;
            let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
            // Rebuilt keys and values are f32, cached ones either.
            for kv_storage in Storage::ALL {
                if in_whole_loads(widths, storage, kv_storage) {
                    let id = format!("{id}_kv_{}", kv_storage.name());
                    decode(cases, id, Sizes::new(lengths, widths, (storage, kv_storage)));
                }
            }
        }
        let widths = (3, 16, 8, 16);
        // Speculative decoding: candidates that see each other, across the border of a split.
        for most in [2, 16] {
            let sizes = Sizes { most, ..Sizes::new(&[258, 1, 40, 511], widths, both) };
            decode(cases, format!("q{most}/{}", storage.name()), sizes);
        }
        // Shorter splits, with lengths around theirs.
        for split in SPLITS {
            let lengths = [split - 1, 1, split + 1, 320, 2 * split];
            let sizes = Sizes { most: 2, split, ..Sizes::new(&lengths, (5, 16, 8, 40), both) };
            decode(cases, format!("split_{split}/{}", storage.name()), sizes);
        }
        for extreme in Extreme::ALL {
            let sizes = Sizes { extreme, ..Sizes::new(&[300, 1, 255], widths, both) };
            decode(cases, format!("{}/{}", extreme.name(), storage.name()), sizes);
        }
        // Groups of query heads over the same keys and values, in rows that are apart or not.
        let group = |(n_head, n_kv_head): (usize, usize)| {
            let slack = 8 * (n_kv_head as u32 % 2);
            Sizes { most: 2, n_kv_head, slack, ..Sizes::new(&[2, 300, 65], (n_head, 16, 8, 40), both) }
        };
        for (n_head, n_kv_head) in GROUPS {
            decode(cases, format!("gqa_{n_head}_{n_kv_head}/{}", storage.name()), group((n_head, n_kv_head)));
        }
        decode(cases, format!("gqa_split_64/{}", storage.name()), Sizes { split: 64, ..group((9, 3)) });
        for extreme in Extreme::ALL {
            let id = format!("gqa_{}/{}", extreme.name(), storage.name());
            decode(cases, id, Sizes { extreme, most: 1, ..group((9, 3)) });
        }
    }
}

/// Whether rows of these widths are whole 16-byte loads, as the kernel asks.
fn in_whole_loads((_, d_nope, d_rope, d_value): Widths, storage: Storage, kv_storage: Storage) -> bool {
    let whole = |width: usize, storage: Storage| width.is_multiple_of(16 / storage.bytes() as usize);
    whole(d_nope, kv_storage) && whole(d_value, kv_storage) && whole(d_rope, storage)
}

fn decode(cases: &mut Vec<Case>, id: String, sizes: Sizes<'_>) {
    let Sizes { lengths, most, widths, n_kv_head, storages, extreme, split, slack } = sizes;
    let ((n_head, d_nope, d_rope, d_value), (storage, kv_storage)) = (widths, storages);
    let (d_query, d_kv) = (d_nope + d_rope, n_kv_head * (d_nope + d_value));
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
        n_kv_head: n_kv_head as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        d_value: d_value as u32,
        kv_first: 0,
        kv_rows: SPLIT,
        kv_pitch: d_kv as u32 + slack,
        cache_rows: batch.cache_rows,
        scale,
        storage,
        kv_storage,
    };
    each_variant(cases, id, op, move |lab, launch| {
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
                let tile = batch.tile(&kv_values, d_kv, first, rows);
                let apart = |row: &[f32]| [row, &vec![f32::NAN; slack as usize]].concat();
                let spread: Vec<f32> = tile.chunks(d_kv).flat_map(apart).collect();
                Ok((first, rows, lab.stored(&spread, kv_storage)?.0))
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
        let heads = reference::Heads { n_head, n_kv_head, d_nope, d_rope, d_value };
        let (q, kv) = (widen(&q_values), pack(&kv_values, kv_storage).1);
        let expected = reference::attention_decode(&q, &kv, &rope_kept, &splits(&batch, split), heads, scale.into());
        extreme.check_scores(launch.variant.spec.name, &expected.max)?;
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    });
}
