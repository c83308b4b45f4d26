//! Cases of `attention_prefill`: ragged batches and chunks behind a past, widths around a slice, and the extremes.

use super::batch::{Batch, Widths, cache_rows};
use super::extreme::{Extreme, attention_tolerance};
use super::{Launch, SEED, each_able, held, rounds_to_halves, widen};
use crate::adapter::Tuning;
use crate::check::compare::{Comparison, HALF_ROUNDOFF, Tolerance};
use crate::check::view::{Reading, View};
use crate::check::{Case, Lab, name_of, outcome, pack};
use crate::error::Result;
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_prefill::{QUERY_TILES, tile_q};
use crate::kernels::{AttentionPrefill, attention_prefill};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

/// One case: sequences of (cached before, new) tokens.
#[derive(Clone, Copy)]
struct Sizes {
    lengths: &'static [(u32, u32)],
    widths: Widths,
    n_kv_head: usize,
    storage: Storage,
    kv: Storage,
    extreme: Extreme,
    first_has_no_keys: bool,
}

pub(super) fn cases(cases: &mut Vec<Case>) {
    const SEQUENCES: [(&str, &[(u32, u32)]); 6] = [
        ("t1", &[(0, 1)]),
        ("t33", &[(0, 33)]),
        ("ragged", &[(0, 1), (0, 31), (0, 17), (0, 65)]),
        ("chunk", &[(40, 9), (0, 5), (300, 18)]),
        ("t300", &[(0, 300)]),
        ("tiles", &[(0, 7), (0, 8), (0, 15), (0, 16), (3, 32), (0, 63), (1, 64)]),
    ];
    let every = SEQUENCES.map(|(name, _)| name);
    let (f32, f16) = (&[Storage::F32][..], &[Storage::F16][..]);
    let mut add = |names: &[&str], widths: Widths, storages: &[Storage]| {
        let (n_head, d_nope, d_rope, d_value) = widths;
        for (name, lengths) in SEQUENCES.into_iter().filter(|(name, _)| names.contains(name)) {
            for &storage in storages {
                let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
                let extreme = Extreme::Plain;
                let (kv, first_has_no_keys) = (Storage::F32, false);
                let sizes = Sizes { lengths, widths, n_kv_head: n_head, storage, kv, extreme, first_has_no_keys };
                add_case(cases, id.clone(), sizes);
                // In halves, where heads are whole loads.
                if storage == Storage::F16 && d_nope.is_multiple_of(8) && d_value.is_multiple_of(8) {
                    add_case(cases, format!("{id}_kv_f16"), Sizes { kv: Storage::F16, ..sizes });
                }
            }
        }
    };
    // Every width meets the chunk, every sequence the plain width; the rest would repeat both.
    add(&every, (3, 16, 8, 16), &Storage::ALL);
    for widths in [(1, 8, 4, 8), (2, 0, 8, 16), (63, 4, 4, 4)] {
        add(&["chunk"], widths, &Storage::ALL);
    }
    add(&["chunk"], (9, 4, 12, 32), f32);
    // Two to eight fours of value columns per lane, then a second slice; rows longer than a chunk.
    for widths in [(1, 36, 0, 36), (2, 64, 32, 80), (1, 128, 64, 128), (3, 8, 4, 132)] {
        add(&["chunk", "ragged"], widths, f32);
    }
    // Wide values and narrow ones, one and several chunks of queries and keys, a second slice.
    for widths in [(9, 4, 12, 32), (2, 0, 8, 68), (1, 60, 0, 64), (1, 128, 64, 128), (3, 8, 4, 132)] {
        add(&["chunk", "ragged"], widths, f16);
    }
    for storage in Storage::ALL {
        let plain = Sizes {
            lengths: &[(0, 40), (70, 1)],
            widths: (2, 16, 8, 16),
            n_kv_head: 2,
            storage,
            kv: Storage::F32,
            extreme: Extreme::Plain,
            first_has_no_keys: false,
        };
        for extreme in Extreme::ALL {
            add_case(cases, format!("{}/{}", extreme.name(), storage.name()), Sizes { extreme, ..plain });
        }
        let sizes = Sizes { lengths: &[(0, 5), (0, 9)], first_has_no_keys: true, ..plain };
        add_case(cases, format!("first_has_no_keys/{}", storage.name()), sizes);
        // Groups of query heads over the same keys and values.
        for (n_head, n_kv_head) in [(3, 1), (9, 3), (16, 4), (14, 2), (16, 1)] {
            let sizes = Sizes { widths: (n_head, 16, 8, 16), n_kv_head, lengths: &[(40, 9), (0, 33)], ..plain };
            add_case(cases, format!("gqa_{n_head}_{n_kv_head}/{}", storage.name()), sizes);
        }
    }
    let (n_head, n_kv_head) = (9, 3);
    let plain = Sizes {
        lengths: &[(0, 40), (70, 1)],
        widths: (n_head, 16, 8, 16),
        n_kv_head,
        storage: Storage::F16,
        kv: Storage::F16,
        extreme: Extreme::Plain,
        first_has_no_keys: false,
    };
    for extreme in Extreme::ALL {
        add_case(cases, format!("{}/f16_kv_f16", extreme.name()), Sizes { extreme, ..plain });
    }
}

fn add_case(cases: &mut Vec<Case>, id: String, sizes: Sizes) {
    let Sizes { lengths, widths: (n_head, d_nope, d_rope, d_value), n_kv_head, storage, kv, extreme, .. } = sizes;
    let batch = Batch::new(lengths, 3);
    let op = AttentionPrefill {
        tokens: batch.tokens,
        query_tiles: 1,
        tile_q: QUERY_TILES[0],
        n_sequence: batch.sequences.len() as u32,
        n_head: n_head as u32,
        n_kv_head: n_kv_head as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        d_value: d_value as u32,
        kv_first: 0,
        kv_rows: batch.rows,
        cache_rows: batch.cache_rows,
        first: true,
        last: true,
        scale: ((d_nope + d_rope) as f32).sqrt().recip(),
        weights: storage,
        storage,
        kv,
    };
    // Queries are scaled before they are halves, where these are 0 or have few digits left.
    let lost = matches!(extreme, Extreme::Denormals | Extreme::Largest);
    each_able(
        cases,
        id,
        op,
        |spec| !(lost && rounds_to_halves(spec)),
        move |lab, variant| {
            let of_scores = attention_tolerance(d_nope + d_rope, batch.slots().len(), extreme.spread());
            // The reference rounds what the kernel rounds, but for the weights: each is off by at most 2⁻¹¹ of itself, and so are,
            // as errors of random signs, their sums. The scores alone make lse.
            let halves = rounds_to_halves(&variant.spec);
            let tolerance = if halves { Tolerance { relative: of_scores.relative + HALF_ROUNDOFF } } else { of_scores };
            // Tables are made for a query tile: the device's with every setting that takes it, then each other one.
            let device = lab.kernels.context();
            let tiled = |tile_q| AttentionPrefill { tile_q, ..op };
            let own = tiled(tile_q(device));
            let fits = |tuning| variant.plan(&own, device, tuning).is_ok();
            let of_own = lab
                .settings(variant.spec.tunings)
                .map(
                    |tuning| {
                        if tuning == Tuning::Auto { (tuning, held(variant, &own, device)) } else { (tuning, tuning) }
                    },
                )
                .filter(|&(of, tuning)| of == Tuning::Auto || fits(tuning))
                .map(|(of, tuning)| (name_of(of), own, tuning));
            let others = QUERY_TILES.into_iter().filter(|&tile| tile != own.tile_q);
            let others = others.map(|tile| (format!("tile_{tile}"), tiled(tile), held(variant, &tiled(tile), device)));
            let of = |(name, op, tuning)| {
                let launch = Launch { op, variant, tuning };
                Ok(outcome(name, prefill(lab, launch, sizes, [tolerance, of_scores])?))
            };
            of_own.chain(others).map(of).collect()
        },
    );
}

fn prefill(
    lab: &Lab<'_>,
    launch: Launch<AttentionPrefill>,
    sizes: Sizes,
    [tolerance, of_scores]: [Tolerance; 2],
) -> Result<Vec<Comparison>> {
    let Sizes { lengths, widths, n_kv_head, storage, kv, extreme, first_has_no_keys } = sizes;
    let (n_head, d_nope, d_rope, d_value) = widths;
    let batch = Batch::new(lengths, 3);
    let slots = batch.slots();
    let (mut table, mut visible) = (batch.sequences.clone(), batch.visible());
    if first_has_no_keys {
        table[0].length = 0;
        visible[..batch.counts[0] as usize].fill(0..0);
    }
    let (d_query, d_kv) = (d_nope + d_rope, n_kv_head * (d_nope + d_value));
    let mut random = Random::new(SEED);
    let mut q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
    let mut kv_values = random.values(slots.len() * d_kv, 1.0);
    let mut rope_values = random.values(slots.len() * d_rope, 1.0);
    extreme.of_queries(&mut q_values);
    extreme.of_keys(&mut kv_values, d_kv, kv);
    extreme.of_keys(&mut rope_values, d_rope, storage);
    let (kv_kept, rope_kept) = (pack(&kv_values, kv).1, pack(&rope_values, storage).1);
    let q = lab.floats(&q_values)?;
    let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
    // A binding holds 16 bytes, also without a rotary part.
    let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
    let sequences = lab.words(bytemuck::cast_slice(&table))?;
    let tiles = batch.query_tiles(launch.op.tile_q);
    let queries = lab.words(bytemuck::cast_slice(&tiles))?;
    let slices = attention_prefill::slices(d_value as u32) as usize;
    let values = lab.output(batch.tokens as usize * n_head * d_value)?;
    let softmax = lab.output(batch.tokens as usize * n_head * slices * 2)?;
    // Key tiles of 1.5 splits: the last one is shorter.
    let tile_rows = SPLIT + SPLIT / 2;
    let kv_tiles = (0..batch.rows)
        .step_by(tile_rows as usize)
        .map(|first| {
            let rows = tile_rows.min(batch.rows - first);
            Ok((first, rows, lab.stored(&batch.tile(&kv_values, d_kv, first, rows), kv)?.0))
        })
        .collect::<Result<Vec<_>>>()?;
    lab.launch(|recording| {
        for (first, rows, kv) in &kv_tiles {
            let op = AttentionPrefill {
                query_tiles: tiles.len() as u32,
                kv_first: *first,
                kv_rows: *rows,
                first: *first == 0,
                last: first + rows == batch.rows,
                ..launch.op
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
            launch.of(op).add(recording, args)?;
        }
        Ok(())
    })?;
    let heads = reference::Heads { n_head, n_kv_head, d_nope, d_rope, d_value };
    let attend = if launch.of_halves() { reference::attention_prefill_of_halves } else { reference::attention_prefill };
    let expected = attend(&widen(&q_values), &kv_kept, &rope_kept, &visible, heads, launch.op.scale.into());
    let state = lab.read(&softmax)?;
    let counts = [batch.tokens as usize * n_head, 1];
    let lse = View { reading: Reading::LogSumExp, first: 0, counts, strides: [2 * slices, 1] };
    let values = lab.compare(&values, &expected.values, tolerance)?;
    Ok(vec![values, lab.compare_views(&[(&state, lse)], &expected.lse, of_scores)])
}
