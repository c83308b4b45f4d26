//! Cases of `cache_append`: keys rotated and not, inputs with gaps, and the rounding of latents to f16.

use super::batch::{row_words, unpack};
use super::{Launch, SEED, each_able, each_variant, widen};
use crate::adapter::AdapterClass;
use crate::check::compare::{Comparison, Tolerance};
use crate::check::guarded::Guarded;
use crate::check::{Case, Lab, name_of, not_run, outcome};
use crate::config::RopeConfig;
use crate::error::Result;
use crate::kernels::{CacheAppend, cache_append};
use crate::op::Op as _;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (d_latent, d_rope, rotate) in
            [(8, 0, true), (16, 8, false), (8, 16, true), (72, 24, true), (512, 64, true), (32, 80, true)]
        {
            let how = if rotate { "turned" } else { "as_they_are" };
            let id = format!("{d_latent}+{d_rope}_{how}/{}", storage.name());
            append(cases, id, d_latent, d_rope, rotate, storage);
        }
    }
    halves(cases);
}

/// Four elements stand between rows, and four words before the rotary keys of the cache.
fn append(cases: &mut Vec<Case>, id: String, d_latent: u32, d_rope: u32, rotate: bool, storage: Storage) {
    let step = 4;
    // WGSL does not say how pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    // The rotation's own error in f32 is that of two products and a sum.
    let tolerance = match storage {
        Storage::F32 => Tolerance::sums(&[2]),
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    let slots = [4, 0, 6, 1, 9];
    let tokens = slots.len() as u32;
    let cached = 11;
    let row = d_latent + d_rope + step;
    // Heads of queries, each behind a content part, in rows that stand apart.
    let (n_head, d_nope) = (3, 2 * step);
    let queries = cache_append::Queries {
        n_head,
        offset: step + d_nope,
        row: n_head * (d_nope + d_rope) + step,
        head: d_nope + d_rope,
    };
    // The rotary keys begin a little behind the latents.
    let [latent_words, rope_words] = [d_latent, d_rope].map(|width| cached as usize * row_words(width, storage));
    let rope_word = latent_words + 4;
    let op = CacheAppend {
        tokens,
        cache_rows: cached,
        d_latent,
        latent_offset: 0,
        latent_row: row,
        d_rope,
        rope_offset: d_latent,
        rope_row: row,
        rotate,
        queries,
        rope_byte: 4 * rope_word as u64,
        storage,
    };
    each_variant(cases, id, op, tolerance, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut values = random.values((tokens * row) as usize, 1.0);
        // Beyond f16: stored as its largest value.
        values[0] = 1e6;
        // NaN stays NaN: a clamp would hide it.
        values[((tokens - 1) * row) as usize] = f32::NAN;
        let source = lab.floats(&values)?;
        let slot_words = lab.words(&slots)?;
        let turns = reference::rotations(&RopeConfig::default(), d_rope as usize, &[3, 0, 70, 1, 4000]);
        // Some more where there is none: a binding holds something.
        let turns_f32 = turns.iter().flatten().map(|&value| value as f32).chain([0.0; 4]);
        let rotations = lab.floats(&turns_f32.collect::<Vec<_>>())?;
        let q_values = random.values((step + tokens * queries.row) as usize, 1.0);
        let q = lab.floats(&q_values)?;
        let cache = Guarded::poisoned_as(lab.kernels, "cache", rope_word + rope_words, storage)?;
        let args = cache_append::Args {
            latent: &source.region,
            rope_key: &source.region,
            rotations: &rotations.region,
            slots: &slot_words.region,
            cache: &cache.region,
            q: &q.region,
        };
        launch.run(lab, args)?;
        let mut comparisons = Vec::new();
        let words = lab.read(&cache)?;
        for (first_word, first, width) in [(0, 0, d_latent), (rope_word, d_latent, d_rope)] {
            let got = unpack(first_word, cached, width, storage);
            let largest = match storage {
                Storage::F32 => f32::MAX,
                Storage::F16 => 65504.0,
            };
            let mut new: Vec<f64> = (0..tokens)
                .flat_map(|token| values[(token * row + first) as usize..][..width as usize].to_vec())
                .map(|value| value.clamp(-largest, largest).into())
                .collect();
            if rotate && first > 0 {
                reference::rope(&mut new, &turns, 1, d_rope as usize, d_rope as usize, true);
            }
            let mut expected = vec![f64::NAN; (cached * width) as usize];
            reference::cache_append(&mut expected, &new, width as usize, &slots);
            comparisons.push(lab.compare_views(&[(&words, got)], &expected, tolerance));
        }
        let mut expected = widen(&q_values);
        if rotate {
            for (token, turn) in turns.chunks((d_rope as usize / 2).max(1)).enumerate().take(tokens as usize) {
                for head in 0..n_head as usize {
                    let at = queries.offset as usize + token * queries.row as usize + head * queries.head as usize;
                    let part = &mut expected[at..at + d_rope as usize];
                    reference::rope(part, turn, 1, d_rope as usize, d_rope as usize, true);
                }
            }
        }
        // Without anything to rotate the queries are not bound.
        if op.bytes().q > 0 {
            comparisons.push(lab.compare(&q, &expected, Tolerance::sums(&[2]))?);
        }
        Ok(comparisons)
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
        latent_offset: 0,
        latent_row: width,
        d_rope: 0,
        rope_offset: 0,
        rope_row: 4,
        rotate: false,
        queries: cache_append::Queries::default(),
        rope_byte: 2 * u64::from(width),
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
            let of = |tuning| {
                Ok(outcome(name_of(tuning), Tolerance::EXACT, halve(lab, Launch { op, variant, tuning }, &values)?))
            };
            lab.settings(variant.spec.tunings).map(of).collect()
        },
    );
}

fn halve(lab: &Lab<'_>, launch: Launch<CacheAppend>, values: &[f32]) -> Result<Vec<Comparison>> {
    let integers = lab.kernels.context().class == AdapterClass::Software;
    let source = lab.floats(values)?;
    let (slots, nothing) = (lab.words(&[0])?, lab.floats(&[0.0; 4])?);
    let cache = Guarded::poisoned_as(lab.kernels, "cache", values.len() / 2 + 4, Storage::F16)?;
    let args = cache_append::Args {
        latent: &source.region,
        rope_key: &nothing.region,
        rotations: &nothing.region,
        slots: &slots.region,
        cache: &cache.region,
        q: &lab.floats(&[0.0; 4])?.region,
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
    Ok(vec![Comparison { relative_error: 0.0, verdict }])
}
