//! Cases of `attention_prefill`: ragged batches and chunks behind a past, widths around a slice, and the extremes.

use super::batch::{Batch, Widths, cache_rows};
use super::extreme::{Extreme, attention_tolerance};
use super::{SEED, widen};
use crate::adapter::{Cooperative, Tuning};
use crate::check::compare::{HALF_ROUNDOFF, Tolerance};
use crate::check::view::{Reading, View};
use crate::check::{Case, Lab, Outcome, every_tuning, pack, skipped};
use crate::error::Result;
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_prefill::{QUERY_TILES, tile_q};
use crate::kernels::{AttentionPrefill, attention_prefill};
use crate::op::Variant;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    const SEQUENCES: [(&str, &[(u32, u32)]); 6] = [
        ("t1", &[(0, 1)]),
        ("t33", &[(0, 33)]),
        ("ragged", &[(0, 1), (0, 31), (0, 17), (0, 65)]),
        ("chunk", &[(40, 9), (0, 5), (300, 18)]),
        ("t300", &[(0, 300)]),
        ("tiles", &[(0, 7), (0, 8), (0, 15), (0, 16), (3, 32), (0, 63), (1, 64)]),
    ];
    let mut add =
        |variant: &'static Variant<AttentionPrefill>, names: &[&str], widths: Widths, storages: &[Storage]| {
            let (n_head, d_nope, d_rope, d_value) = widths;
            for (name, lengths) in SEQUENCES.into_iter().filter(|(name, _)| names.contains(name)) {
                for &storage in storages {
                    let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
                    cases.push(Case::new(variant.spec.name, id, move |lab| {
                        prefill(lab, variant, lengths, widths, storage, Extreme::Plain, false)
                    }));
                }
            }
        };
    let every = SEQUENCES.map(|(name, _)| name);
    for variant in [&attention_prefill::TILES, &attention_prefill::SUBGROUP] {
        // Every width with the chunk, every sequence with the plain width; the rest would repeat both.
        add(variant, &every, (3, 16, 8, 16), &Storage::ALL);
        for widths in [(1, 8, 4, 8), (9, 4, 12, 32), (2, 0, 8, 16), (63, 4, 4, 4)] {
            add(variant, &["chunk"], widths, &Storage::ALL);
        }
        // Two to eight fours of value columns a lane, then a second slice; rows longer than a chunk.
        for widths in [(1, 36, 0, 36), (2, 64, 32, 80), (1, 128, 64, 128), (3, 8, 4, 132)] {
            add(variant, &["chunk", "ragged"], widths, &[Storage::F32]);
        }
    }
    for variant in [&attention_prefill::COOPERATIVE, &attention_prefill::COOPERATIVE_8] {
        // Wide values and narrow ones, one and several chunks of queries and keys, a second slice.
        add(variant, &every, (3, 16, 8, 16), &[Storage::F16]);
        for widths in [(9, 4, 12, 32), (2, 0, 8, 68), (1, 60, 0, 64), (1, 128, 64, 128), (3, 8, 4, 132)] {
            add(variant, &["chunk", "ragged"], widths, &[Storage::F16]);
        }
    }
    for (variant, widths, storage) in [
        (&attention_prefill::TILES, (2, 16, 8, 16), Storage::F32),
        (&attention_prefill::SUBGROUP, (2, 16, 8, 16), Storage::F32),
        (&attention_prefill::COOPERATIVE, (2, 16, 8, 16), Storage::F16),
        (&attention_prefill::COOPERATIVE_8, (2, 16, 8, 16), Storage::F16),
    ] {
        let id = |what: &str| format!("{what}/{}", storage.name());
        for extreme in Extreme::ALL {
            // Queries are scaled before they are halves, where these are 0 or have few digits left.
            let halves = variant.spec.cooperative != Cooperative::NONE;
            if halves && matches!(extreme, Extreme::Denormals | Extreme::Largest) {
                continue;
            }
            cases.push(Case::new(variant.spec.name, id(extreme.name()), move |lab| {
                prefill(lab, variant, &[(0, 40), (70, 1)], widths, storage, extreme, false)
            }));
        }
        cases.push(Case::new(variant.spec.name, id("first_has_no_keys"), move |lab| {
            prefill(lab, variant, &[(0, 5), (0, 9)], widths, storage, Extreme::Plain, true)
        }));
    }
}

fn prefill(
    lab: &Lab<'_>,
    variant: &'static Variant<AttentionPrefill>,
    lengths: &[(u32, u32)],
    (n_head, d_nope, d_rope, d_value): Widths,
    storage: Storage,
    extreme: Extreme,
    first_has_no_keys: bool,
) -> Result<Vec<Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let batch = Batch::new(lengths, 3);
    let slots = batch.slots();
    let (mut table, mut visible) = (batch.sequences.clone(), batch.visible());
    if first_has_no_keys {
        table[0].length = 0;
        visible[..batch.counts[0] as usize].fill(0..0);
    }
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let of_scores = attention_tolerance(d_query, slots.len(), extreme.spread());
    // The reference rounds what the kernel rounds, but for the weights: each is off by at most 2⁻¹¹ of itself, and so are,
    // as errors of random signs, their sums. The scores alone make lse.
    let halves = variant.spec.cooperative != Cooperative::NONE;
    let tolerance = if halves { Tolerance { relative: of_scores.relative + HALF_ROUNDOFF } } else { of_scores };
    let auto = tile_q(lab.kernels.context());
    // Settings go by the query tile, but for the kernel that has settings of its own.
    let by_tile = variant.spec.name != attention_prefill::SUBGROUP.spec.name;
    let settings = if by_tile { QUERY_TILES.len() } else { variant.spec.tunings };
    every_tuning(settings, tolerance, |setting| {
        let (tile_q, tuning) = match setting {
            Tuning::Forced(index) if by_tile => (QUERY_TILES[index], Tuning::Auto),
            other => (auto, other),
        };
        let mut random = Random::new(SEED);
        let mut q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
        let mut kv_values = random.values(slots.len() * d_kv, 1.0);
        let mut rope_values = random.values(slots.len() * d_rope, 1.0);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut kv_values, d_kv, Storage::F32);
        extreme.of_keys(&mut rope_values, d_rope, storage);
        let rope_kept = pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        // A binding holds 16 bytes, also without a rotary part.
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&table))?;
        let tiles = batch.query_tiles(tile_q);
        let queries = lab.words(bytemuck::cast_slice(&tiles))?;
        let slices = attention_prefill::slices(d_value as u32) as usize;
        let values = lab.output(batch.tokens as usize * n_head * d_value)?;
        let softmax = lab.output(batch.tokens as usize * n_head * slices * 2)?;
        let scale = (d_query as f32).sqrt().recip();
        // Key tiles of 1.5 splits: the last one is shorter.
        let tile_rows = SPLIT + SPLIT / 2;
        let kv_tiles = (0..batch.rows)
            .step_by(tile_rows as usize)
            .map(|first| {
                let rows = tile_rows.min(batch.rows - first);
                Ok((first, rows, lab.floats(&batch.tile(&kv_values, d_kv, first, rows))?))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.launch(|recording| {
            for (first, rows, kv) in &kv_tiles {
                let problem = attention_prefill::AttentionPrefill {
                    tokens: batch.tokens,
                    query_tiles: tiles.len() as u32,
                    tile_q,
                    n_sequence: batch.sequences.len() as u32,
                    n_head: n_head as u32,
                    d_nope: d_nope as u32,
                    d_rope: d_rope as u32,
                    d_value: d_value as u32,
                    kv_first: *first,
                    kv_rows: *rows,
                    cache_rows: batch.cache_rows,
                    first: *first == 0,
                    last: first + rows == batch.rows,
                    scale,
                    weights: storage,
                    storage,
                };
                let args = attention_prefill::Args {
                    q: &q.region,
                    kv: &kv.region,
                    rope_cache: &rope_cache.region,
                    queries: &queries.region,
                    sequences: &sequences.region,
                    values: &values.region,
                    softmax: &softmax.region,
                };
                recording.add_variant(variant, &problem, args, tuning)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let attend = if halves { reference::attention_prefill_of_halves } else { reference::attention_prefill };
        let expected = attend(&widen(&q_values), &widen(&kv_values), &rope_kept, &visible, heads, scale.into());
        let state = lab.read(&softmax)?;
        let counts = [batch.tokens as usize * n_head, 1];
        let lse = View { reading: Reading::LogSumExp, first: 0, counts, strides: [2 * slices, 1] };
        let values = lab.compare(&values, &expected.values, tolerance)?;
        Ok(vec![values, lab.compare_views(&[(&state, lse)], &expected.lse, of_scores)])
    })
}
