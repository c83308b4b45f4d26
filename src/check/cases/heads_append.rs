//! Cases of `heads_append`: groups of heads, with and without a norm, a cache of which a part is bound, values beyond a half, and NaN.

use super::batch::{row_words, unpack};
use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::check::guarded::Guarded;
use crate::config::RopeConfig;
use crate::kernels::heads_append::HeadsNorm;
use crate::kernels::{HeadsAppend, heads_append};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (n_head, n_kv_head, head_dim) in [(1, 1, 8), (3, 1, 24), (9, 3, 64), (5, 5, 16), (32, 8, 128)] {
            for first_slot in [0, 3] {
                append(cases, (n_head, n_kv_head, head_dim), first_slot, None, storage);
            }
            // Whole heads, and such as end with padding.
            for used in [head_dim, head_dim - 3] {
                append(cases, (n_head, n_kv_head, head_dim), 3, Some(HeadsNorm { used, eps: 1e-3 }), storage);
            }
        }
    }
}

fn append(
    cases: &mut Vec<Case>,
    (n_head, n_kv_head, head_dim): (u32, u32, u32),
    first_slot: u32,
    norm: Option<HeadsNorm>,
    storage: Storage,
) {
    // Rows on either side of those that are bound, where these do not begin with the first.
    let slots = [first_slot + 4, first_slot, 2, first_slot + 6, first_slot + 11];
    let (tokens, cache_rows) = (slots.len() as u32, 11);
    let op = HeadsAppend { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, norm, storage };
    // The rotation's own error in f32 is that of two products and a sum, behind that of a norm's sum. WGSL does not say how
    // pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    let exact = norm.map_or(Tolerance::sums(&[2]), |norm| Tolerance::sums(&[norm.used as usize, 2]));
    let tolerance = match storage {
        Storage::F32 => exact,
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    let normed = norm.map_or(String::new(), |norm| format!("_norm_{}", norm.used));
    let id = format!("{n_head}_{n_kv_head}x{head_dim}_from_{first_slot}{normed}/{}", storage.name());
    each_variant(cases, id, op, move |lab, launch| {
        let row = ((n_head + 2 * n_kv_head) * head_dim) as usize;
        let mut random = Random::new(SEED);
        let mut values = random.values(tokens as usize * row, 1.0);
        if let Some(HeadsNorm { used, .. }) = norm {
            // Heads of another size each, and their padding.
            for (head, values) in values.chunks_exact_mut(head_dim as usize).enumerate() {
                values.iter_mut().for_each(|value| *value *= 0.1 + head as f32);
                values[used as usize..].fill(0.0);
            }
        }
        let weights = random.values(2 * head_dim as usize, 1.0);
        let norms = lab.floats(&weights)?;
        let value0 = ((n_head + n_kv_head) * head_dim) as usize;
        // Beyond f16: stored as its largest value. NaN stays NaN: a clamp would hide it.
        values[value0] = 1e6;
        values[row + value0 + 1] = f32::NAN;
        let (x, slot_words) = (lab.floats(&values)?, lab.words(&slots)?);
        let turns = reference::rotations(&RopeConfig::default(), head_dim as usize, &[3, 0, 70, 1, 4000]);
        let rotations = lab.floats(&turns.iter().flatten().map(|&value| value as f32).collect::<Vec<_>>())?;
        let q = lab.output((tokens * n_head * head_dim) as usize)?;
        let width = 2 * n_kv_head * head_dim;
        let words = cache_rows as usize * row_words(width, storage);
        let cache = Guarded::poisoned_as(lab.kernels, "cache", words, storage)?;
        let args = heads_append::Args {
            x: &x.region,
            rotations: &rotations.region,
            slots: &slot_words.region,
            norms: &norms.region,
            q: &q.region,
            cache: &cache.region,
        };
        launch.run(lab, args)?;
        let mut whole = vec![f64::NAN; ((first_slot + cache_rows) * width) as usize];
        let heads = (n_head as usize, n_kv_head as usize, head_dim as usize);
        let weights = widen(&weights);
        let norm = norm.map(|norm| (&weights[..], norm.used as usize, f64::from(norm.eps)));
        let queries = reference::heads_append(&widen(&values), &turns, &slots, norm, &mut whole, heads);
        let largest = match storage {
            Storage::F32 => f64::from(f32::MAX),
            Storage::F16 => 65504.0,
        };
        let bound = &whole[(first_slot * width) as usize..];
        let expected: Vec<f64> = bound.iter().map(|value| value.clamp(-largest, largest)).collect();
        let words = lab.read(&cache)?;
        let got = unpack(0, cache_rows, width, storage);
        Ok(vec![lab.compare_views(&[(&words, got)], &expected, tolerance), lab.compare(&q, &queries, exact)?])
    });
}
