//! Cases of `cache_append`: keys rotated and not, latents normed and gated, inputs with gaps, queries of a low rank beside them, and
//! the rounding of latents to f16.

use super::batch::{row_words, unpack};
use super::{Launch, SEED, each_able, each_variant, equal_rows, spread, widen};
use crate::adapter::AdapterClass;
use crate::check::compare::{Comparison, Tolerance, UNIT_ROUNDOFF};
use crate::check::guarded::Guarded;
use crate::check::{Case, Lab, name_of, not_run, outcome, pack};
use crate::config::{Activation, GateNorm, RopeConfig};
use crate::error::Result;
use crate::kernels::{CacheAppend, cache_append};
use crate::op::Op as _;
use crate::random::Random;
use crate::reference;
use crate::storage::{Storage, padded_width};

/// Sizes of a case, and what happens to a latent on its way.
#[derive(Clone, Copy)]
struct Way {
    /// Elements of a latent without its padding.
    latent: u32,
    d_rope: u32,
    rotate: bool,
    normed: bool,
    gate: Option<(Activation, GateNorm)>,
    weights: Storage,
    storage: Storage,
    /// All elements of a latent, and of its gate, are equal.
    equal: bool,
}

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (latent, d_rope, rotate) in
            [(8, 0, true), (16, 8, false), (8, 16, true), (72, 24, true), (512, 64, true), (32, 80, true)]
        {
            let how = if rotate { "turned" } else { "as_they_are" };
            let id = format!("{latent}+{d_rope}_{how}/{}", storage.name());
            let (normed, gate, weights, equal) = (false, None, Storage::F32, false);
            append(cases, id, Way { latent, d_rope, rotate, normed, gate, weights, storage, equal });
        }
        // One element, latents that end anywhere in a load, whole ones, with weights of the other storage, too.
        for (latent, weights) in [1, 63, 131, 264, 512, 1000].into_iter().flat_map(|n| Storage::ALL.map(|s| (n, s))) {
            let way = Way { latent, d_rope: 8, rotate: true, normed: true, gate: None, weights, storage, equal: false };
            let id = |how: &str| format!("{how}_{latent}/{}_{}", weights.name(), storage.name());
            append(cases, id("normed"), way);
            append(cases, id("equal"), Way { equal: true, ..way });
            let gate = Some((Activation::Sigmoid, GateNorm::LayerNorm));
            append(cases, id("gated"), Way { gate, ..way });
            append(cases, id("equal_gated"), Way { gate, equal: true, ..way });
        }
        // Every activation, and every norm: each setting is a pipeline of its own, and `gate` has all pairs.
        for (activation, norm) in Activation::ALL.into_iter().flat_map(|a| GateNorm::ALL.map(|norm| (a, norm))) {
            let (usual, all) = (norm == GateNorm::LayerNorm, [false, true]);
            let normed = if usual { &all[1..] } else { &all[..] };
            for &normed in normed.iter().filter(|_| usual || activation == Activation::Sigmoid) {
                let (weights, gate) = (storage, Some((activation, norm)));
                let how = if normed { "normed_" } else { "" };
                let id = format!("{how}{activation:?}_{norm:?}_37/{}", storage.name());
                let (latent, d_rope, rotate, equal) = (37, 16, true, false);
                append(cases, id, Way { latent, d_rope, rotate, normed, gate, weights, storage, equal });
            }
        }
    }
    low_rank(cases);
    halves(cases);
}

/// Four elements stand between rows, and four words before the rotary keys of the cache.
fn append(cases: &mut Vec<Case>, id: String, way: Way) {
    let Way { latent, d_rope, rotate, normed, gate, weights, storage, equal } = way;
    let step = 4;
    let plain = !normed && gate.is_none();
    // WGSL does not say how pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    // The rotation's own error in f32 is that of two products and a sum; norms have their own sums.
    let sums = [(normed, latent as usize), (gate.is_some(), latent as usize)].map(|(on, n)| if on { n } else { 1 });
    let mut exact = Tolerance::sums(if plain { &[2] } else { &sums });
    if equal && gate.is_some() {
        // A product may be rounded for the mean and not for the result: its u of itself is divided by √eps.
        exact.relative += 4.0 * UNIT_ROUNDOFF / 1e-5f64.sqrt();
    }
    let tolerance = match storage {
        Storage::F32 => exact,
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) + if plain { 0.0 } else { exact.relative } },
    };
    let slots = [4, 0, 6, 1, 9];
    let tokens = slots.len() as u32;
    let cached = 11;
    let d_latent = padded_width(latent);
    // Heads of queries, each with a content part, then latent and key, in rows that stand apart.
    let (n_head, d_nope) = (3, 2 * step);
    let head = d_nope + d_rope;
    let queries = cache_append::Queries { n_head, offset: step, d_nope, low_rank: None };
    let latent_offset = step + n_head * head;
    let rope_offset = latent_offset + d_latent;
    let row = rope_offset + d_rope + step;
    // The rotary keys begin a little behind the latents.
    let [latent_words, rope_words] = [d_latent, d_rope].map(|width| cached as usize * row_words(width, storage));
    let rope_word = latent_words + 4;
    let op = CacheAppend {
        tokens,
        cache_rows: cached,
        row,
        latent_offset,
        d_latent,
        latent_used: latent,
        rope_offset,
        d_rope,
        rotate,
        queries,
        norm: normed.then_some(1e-6),
        gate: gate.map(|(activation, norm)| cache_append::LatentGate { activation, norm, eps: 1e-5 }),
        // Behind the queries and four elements more.
        kept: (!plain).then_some(cache_append::Kept { first: tokens * n_head * head + step, columns: 0 }),
        rope_byte: 4 * rope_word as u64,
        weights,
        storage,
    };
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut values = random.values((tokens * row) as usize, 1.0);
        let mut gates = random.values((tokens * latent) as usize, 1.0);
        if equal {
            equal_rows(&mut gates, latent as usize);
        }
        for token in 0..tokens {
            let latents = &mut values[(token * row + latent_offset) as usize..][..d_latent as usize];
            if equal {
                equal_rows(latents, d_latent as usize);
            }
            latents[latent as usize..].fill(0.0);
        }
        if plain {
            // Beyond f16: stored as its largest value.
            values[latent_offset as usize] = 1e6;
        }
        if latent == d_latent {
            // NaN stays NaN: a clamp would hide it. A norm spreads it over the padding, too.
            values[((tokens - 1) * row + latent_offset) as usize] = f32::NAN;
        }
        let source = lab.floats(&values)?;
        let slot_words = lab.words(&slots)?;
        let turns = reference::rotations(&RopeConfig::default(), d_rope as usize, &[3, 0, 70, 1, 4000]);
        // Some more where there is none: a binding holds something.
        let turns_f32 = turns.iter().flatten().map(|&value| value as f32).chain([0.0; 4]);
        let rotations = lab.floats(&turns_f32.collect::<Vec<_>>())?;
        let g = lab.floats(&spread(&gates, &[latent], || 0.5))?;
        let vectors = random.values(3 * latent as usize, 1.0);
        let used = launch.op.bytes().weight as usize / (weights.bytes() as usize * d_latent as usize);
        let used_vectors = &vectors[..used.max(1) * latent as usize];
        let weight = lab.stored(&spread(used_vectors, &[latent], || 0.0), weights)?.0;
        let cache = Guarded::poisoned_as(lab.kernels, "cache", rope_word + rope_words, storage)?;
        let kept = launch.op.kept.map_or(0, |_| step + tokens * d_latent);
        let q = lab.output((tokens * n_head * head + kept) as usize)?;
        let args = cache_append::Args {
            x: &source.region,
            weight: &weight.region,
            g: &g.region,
            rotations: &rotations.region,
            slots: &slot_words.region,
            cache: &cache.region,
            q: &q.region,
            w: &lab.kernels.absent(),
        };
        launch.run(lab, args)?;
        let part =
            |token: u32, first: u32, width: u32| widen(&values[(token * row + first) as usize..][..width as usize]);
        let mut rest = pack(used_vectors, weights).1;
        let mut next = || rest.drain(..latent as usize).collect::<Vec<_>>();
        let mut latents: Vec<f64> = (0..tokens).flat_map(|token| part(token, latent_offset, latent)).collect();
        if normed {
            latents = reference::rms_norm(&latents, Some(&next()), latent as usize, 1e-6);
        }
        if let Some((activation, norm)) = gate {
            let gamma = (norm != GateNorm::None).then(&mut next);
            let beta = (norm == GateNorm::LayerNorm).then(&mut next);
            let (gamma, beta, g) = (gamma.as_deref(), beta.as_deref(), widen(&gates));
            latents = reference::gate(&latents, &g, activation, norm, gamma, beta, latent as usize, 1e-5).values;
        }
        let latents = spread(&latents, &[latent], || 0.0);
        let mut keys: Vec<f64> = (0..tokens).flat_map(|token| part(token, rope_offset, d_rope)).collect();
        let mut heads: Vec<f64> = (0..tokens).flat_map(|token| part(token, step, n_head * head)).collect();
        if rotate {
            reference::rope(&mut keys, &turns, 1, d_rope as usize, d_rope as usize, true);
            for (token, turn) in turns.chunks((d_rope as usize / 2).max(1)).enumerate().take(tokens as usize) {
                for index in 0..n_head {
                    let at = ((token as u32 * n_head + index) * head + d_nope) as usize;
                    reference::rope(
                        &mut heads[at..at + d_rope as usize],
                        turn,
                        1,
                        d_rope as usize,
                        d_rope as usize,
                        true,
                    );
                }
            }
        }
        let largest = match storage {
            Storage::F32 => f64::from(f32::MAX),
            Storage::F16 => 65504.0,
        };
        let mut comparisons = Vec::new();
        let words = lab.read(&cache)?;
        for (first_word, new, width) in [(0, &latents, d_latent), (rope_word, &keys, d_rope)] {
            let got = unpack(first_word, cached, width, storage);
            let new: Vec<f64> = new.iter().map(|value| value.clamp(-largest, largest)).collect();
            let mut expected = vec![f64::NAN; (cached * width) as usize];
            reference::cache_append(&mut expected, &new, width as usize, &slots);
            comparisons.push(lab.compare_views(&[(&words, got)], &expected, tolerance));
        }
        let words = lab.read(&q)?;
        let queries = unpack(0, tokens, n_head * head, Storage::F32);
        comparisons.push(lab.compare_views(&[(&words, queries)], &heads, Tolerance::sums(&[2])));
        if let Some(kept) = op.kept {
            let kept = unpack(kept.first as usize, tokens, d_latent, Storage::F32);
            comparisons.push(lab.compare_views(&[(&words, kept)], &latents, tolerance));
        }
        Ok(comparisons)
    });
}

/// One token and several, latents of queries that end anywhere in a load, heads with and without a rotary part; latents of the cache
/// beside them, normed, too.
fn low_rank(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (tokens, rank, n_head, d_nope, d_rope) in [
            (1, 1, 1, 8, 0),
            (1, 8, 3, 0, 8),
            (1, 131, 5, 16, 8),
            (1, 1536, 3, 24, 64),
            (2, 63, 1, 8, 8),
            (4, 264, 9, 8, 16),
            (5, 257, 3, 40, 8),
            (8, 512, 2, 64, 64),
            (9, 72, 7, 0, 16),
        ] {
            for size in [1.0, 1e-12, 1e12] {
                project(cases, (tokens, rank), (n_head, d_nope, d_rope), size, storage);
            }
        }
    }
}

/// Latents of queries stand first in a row, four elements apart from the latent of the cache, of 20. Their keys and values are kept.
fn project(
    cases: &mut Vec<Case>,
    (tokens, rank): (u32, u32),
    (n_head, d_nope, d_rope): (u32, u32, u32),
    size: f32,
    storage: Storage,
) {
    let (latent, padded) = (20, padded_width(rank));
    let d_latent = padded_width(latent);
    let latent_offset = padded + 4;
    let rope_offset = latent_offset + d_latent;
    let row = rope_offset + d_rope;
    let columns = n_head * (d_nope + d_rope);
    let kv_columns = 36;
    let rope_word = tokens as usize * row_words(d_latent, storage);
    let low_rank = cache_append::LowRank { rank: padded, used: rank, weight: d_latent + 8, eps: 1e-6 };
    let op = CacheAppend {
        tokens,
        cache_rows: tokens,
        row,
        latent_offset,
        d_latent,
        latent_used: latent,
        rope_offset,
        d_rope,
        rotate: true,
        queries: cache_append::Queries { n_head, offset: 0, d_nope, low_rank: Some(low_rank) },
        norm: Some(1e-6),
        gate: None,
        kept: Some(cache_append::Kept { first: tokens * columns, columns: kv_columns }),
        rope_byte: 4 * rope_word as u64,
        weights: storage,
        storage,
    };
    let of_size = if size == 1.0 { String::new() } else { format!("_of_{size:e}") };
    let id = format!("{tokens}x{rank}_to_{n_head}x{d_nope}+{d_rope}{of_size}/{}", storage.name());
    let tolerance = Tolerance::sums(&[rank as usize, rank as usize, 2]);
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut values = random.values((tokens * row) as usize, 1.0);
        for of_token in values.chunks_mut(row as usize) {
            of_token[..rank as usize].iter_mut().for_each(|value| *value *= size);
            of_token[rank as usize..padded as usize].fill(0.0);
            of_token[(latent_offset + latent) as usize..rope_offset as usize].fill(0.0);
        }
        let part = |first: u32, width: u32| -> Vec<f64> {
            let of_token = |token: u32| widen(&values[(token * row + first) as usize..][..width as usize]);
            (0..tokens).flat_map(of_token).collect()
        };
        let [gamma, scales] = [latent, rank].map(|width| random.values(width as usize, 1.0));
        let [matrix, kv] = [(columns, rank), (kv_columns, latent)].map(|(n, k)| random.values((n * k) as usize, 1.0));
        let mut norms = spread(&gamma, &[latent], || 0.0);
        norms.resize(low_rank.weight as usize, f32::NAN);
        norms.extend(spread(&scales, &[rank], || 0.0));
        let weight = lab.stored(&norms, storage)?.0;
        let [w, kv_b_proj] =
            [(&matrix, rank), (&kv, latent)].map(|(tensor, k)| lab.stored(&spread(tensor, &[k], || 0.0), storage));
        let (w, kv_b_proj) = (w?.0, kv_b_proj?.0);
        let positions: Vec<u32> = (0..tokens).map(|token| 700 * token + 3).collect();
        let turns = reference::rotations(&RopeConfig::default(), d_rope as usize, &positions);
        let turns_f32 = turns.iter().flatten().map(|&value| value as f32).chain([0.0; 4]);
        let rotations = lab.floats(&turns_f32.collect::<Vec<_>>())?;
        let slots = lab.words(&(0..tokens).collect::<Vec<_>>())?;
        let (x, q) = (lab.floats(&values)?, lab.output((tokens * (columns + kv_columns)) as usize)?);
        let words = rope_word + tokens as usize * row_words(d_rope, storage);
        let cache = Guarded::poisoned_as(lab.kernels, "cache", words, storage)?;
        let args = cache_append::Args {
            x: &x.region,
            weight: &weight.region,
            g: &kv_b_proj.region,
            rotations: &rotations.region,
            slots: &slots.region,
            cache: &cache.region,
            q: &q.region,
            w: &w.region,
        };
        launch.run(lab, args)?;
        let [gamma, scales, matrix, kv] = [&gamma, &scales, &matrix, &kv].map(|values| pack(values, storage).1);
        let heads = (n_head as usize, (d_nope + d_rope) as usize, d_rope as usize);
        let queries = reference::low_rank_queries(&part(0, rank), &scales, &matrix, &turns, heads, 1e-6);
        let latents = reference::rms_norm(&part(latent_offset, latent), Some(&gamma), latent as usize, 1e-6);
        let mut keys = part(rope_offset, d_rope);
        reference::rope(&mut keys, &turns, 1, d_rope as usize, d_rope as usize, true);
        // As the cache has them.
        let rounding = match storage {
            Storage::F32 => 0.0,
            Storage::F16 => 2f64.powi(-10),
        };
        let single: Vec<f32> = latents.iter().map(|&value| value as f32).collect();
        let cached = pack(&single, storage).1;
        let values = reference::matmul(&cached, &kv, None, tokens as usize, latent as usize, kv_columns as usize);
        let appended = Tolerance { relative: rounding + Tolerance::sums(&[latent as usize, 2]).relative };
        let of_values =
            Tolerance { relative: rounding + Tolerance::sums(&[latent as usize, latent as usize]).relative };
        let (got, rows) = (lab.read(&q)?, lab.read(&cache)?);
        let largest = |value: &f64| if storage == Storage::F16 { value.clamp(-65504.0, 65504.0) } else { *value };
        let keys: Vec<f64> = keys.iter().map(largest).collect();
        let view = |first: usize, width: u32, storage| unpack(first, tokens, width, storage);
        Ok(vec![
            lab.compare_views(&[(&got, view(0, columns, Storage::F32))], &queries, tolerance),
            lab.compare_views(
                &[(&got, view((tokens * columns) as usize, kv_columns, Storage::F32))],
                &values,
                of_values,
            ),
            lab.compare_views(&[(&rows, view(0, d_latent, storage))], &spread(&latents, &[latent], || 0.0), appended),
            lab.compare_views(&[(&rows, view(rope_word, d_rope, storage))], &keys, appended),
        ])
    });
}

/// Rounding of latents to halves: of the two around a value, one is right. Integers round as IEEE 754 does, to the
/// nearest and of two to the even one; `pack2x16float` rounds as the driver does, and may take numbers below 2^-14 for 0.
fn halves(cases: &mut Vec<Case>) {
    let mut values = Vec::new();
    // Both neighbours, the tie and what lies beside it, in every binade from the smallest half to the largest.
    for exponent in -25..16 {
        let place = 2f32.powi((exponent - 10).max(-24));
        for step in [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 1022.5, 1023.5] {
            values.extend([1.0, -1.0].map(|sign| sign * (2f32.powi(exponent) + step * place)));
        }
    }
    // 65519.996 is the last that IEEE 754 rounds to 65504; what is beyond is stored so all the same.
    let ends = [0.0, -0.0, f32::MIN_POSITIVE, 1e-40, 65_504.0, 65_519.996, 65_520.0, 1e6, f32::MAX];
    values.extend(ends.iter().flat_map(|&end| [end, -end]));
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    values.resize(values.len().next_multiple_of(8), 0.0);
    let width = values.len() as u32;
    let op = CacheAppend {
        tokens: 1,
        cache_rows: 1,
        d_latent: width,
        row: width,
        latent_offset: 0,
        latent_used: width,
        d_rope: 0,
        rope_offset: 0,
        rotate: false,
        queries: cache_append::Queries::default(),
        norm: None,
        gate: None,
        kept: None,
        rope_byte: 2 * u64::from(width),
        weights: Storage::F32,
        storage: Storage::F16,
    };
    each_able(
        cases,
        "rounding/f16",
        op,
        |_| true,
        move |lab, variant| {
            if lab.capture.is_some() {
                return Ok(vec![not_run(
                    "two answers are right, which a table of expected values does not say".to_owned(),
                )]);
            }
            let of = |tuning| Ok(outcome(name_of(tuning), halve(lab, Launch { op, variant, tuning }, &values)?));
            lab.settings(variant.spec.tunings).map(of).collect()
        },
    );
}

fn halve(lab: &Lab<'_>, launch: Launch<CacheAppend>, values: &[f32]) -> Result<Vec<Comparison>> {
    let integers = lab.kernels.context().class == AdapterClass::Software;
    let source = lab.floats(values)?;
    let (slots, absent) = (lab.words(&[0])?, lab.kernels.absent());
    let cache = Guarded::poisoned_as(lab.kernels, "cache", values.len() / 2 + 4, Storage::F16)?;
    let args = cache_append::Args {
        x: &source.region,
        weight: &absent,
        g: &absent,
        rotations: &absent,
        slots: &slots.region,
        cache: &cache.region,
        q: &absent,
        w: &absent,
    };
    launch.run(lab, args)?;
    let got = unpack(0, 1, values.len() as u32, Storage::F16).apply(&lab.read(&cache)?.words);
    let right = |(&value, &got): (&f32, &f32)| {
        let bounded = if value.is_finite() { value.clamp(-65_504.0, 65_504.0) } else { value };
        let nearest = half::f16::from_f32(bounded);
        if integers || !value.is_finite() {
            return nearest.to_f32() == got && value.is_sign_negative() == got.is_sign_negative()
                || value.is_nan() && got.is_nan();
        }
        // One of the two halves around it.
        let place = 2f32.powi((bounded.abs().log2().floor() as i32).saturating_sub(10).max(-24));
        (got - bounded).abs() < place || bounded.abs() < 2f32.powi(-14) && got == 0.0
    };
    let wrong: Vec<_> = values.iter().zip(&got).filter(|&pair| !right(pair)).collect();
    let verdict = match wrong.first() {
        None => Ok(()),
        Some((value, got)) => Err(format!("{value:e} became {got:e} ({} such)", wrong.len())),
    };
    Ok(vec![Comparison { relative_error: 0.0, tolerance: 0.0, verdict }])
}
