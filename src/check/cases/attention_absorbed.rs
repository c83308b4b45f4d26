//! Cases of `attention_absorbed`: ragged batches of one new token and of several, latents of every width, and the extremes.

use std::ops::Range;

use super::batch::{Batch, Widths, cache_rows, compare_softmax, decoding, few_new, few_sizes, row_words, splits};
use super::extreme::{Extreme, attention_tolerance};
use super::{Launch, SEED, each_able, fits, held, rounds_to_halves, widen};
use crate::adapter::Tuning;
use crate::check::compare::{Comparison, HALF_ROUNDOFF, Tolerance};
use crate::check::{Case, Lab, name_of, outcome, pack};
use crate::error::Result;
use crate::kernels::attention_decode::{DecodeSequence, SPLIT, SPLITS};
use crate::kernels::{AttentionAbsorbed, attention_absorbed};
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let named = |name: &str, (n_head, _, d_rope, d_latent): Widths, storage: Storage| {
        format!("{name}_h{n_head}_r{d_latent}+{d_rope}/{}", storage.name())
    };
    let plain = (Extreme::Plain, SPLIT);
    for storage in Storage::ALL {
        for (name, lengths, widths) in few_sizes() {
            absorbed(cases, named(name, widths, storage), lengths, 1, widths, storage, plain);
        }
        // Speculative decoding: candidates that see each other, across the border of a split.
        for most in [2, 16] {
            let id = format!("q{most}/{}", storage.name());
            absorbed(cases, id, &[258, 1, 40, 511], most, (3, 16, 8, 16), storage, plain);
        }
        for extreme in Extreme::ALL {
            let id = format!("{}/{}", extreme.name(), storage.name());
            absorbed(cases, id, &[300, 1, 255], 1, (3, 16, 8, 16), storage, (extreme, SPLIT));
        }
        // Shorter splits, with lengths around theirs.
        for split in SPLITS {
            let (id, lengths) =
                (format!("split_{split}/{}", storage.name()), [split - 1, 1, split + 1, 320, 2 * split]);
            absorbed(cases, id, &lengths, 2, (5, 16, 8, 36), storage, (Extreme::Plain, split));
        }
        // Heads on both sides of a matrix, and many.
        for n_head in [12, 16, 20, 63, 128] {
            let widths = (n_head, 4, 8, 40);
            absorbed(cases, named("heads", widths, storage), &[33, 258], 1, widths, storage, plain);
        }
        // Latents of one load to several per lane, of half a load more, of none left for the last lanes; without a rotary key.
        for widths in [(1, 4, 0, 4), (9, 8, 4, 100), (17, 4, 12, 64), (5, 16, 64, 128), (2, 64, 64, 256)] {
            absorbed(cases, named("wide", widths, storage), &[70, 3, 257], 2, widths, storage, plain);
        }
    }
    // A cache in two parts, with candidates on both sides of their border.
    for storage in Storage::ALL {
        parted(cases, format!("parts/{}", storage.name()), storage);
    }
    // The longest, then DeepSeek-V3's widths: the query is staged in several chunks.
    for (name, lengths, widths) in [("t32768", &[32_768], (3, 12, 8, 20)), ("t300", &[300], (17, 128, 64, 512))] {
        absorbed(cases, named(name, widths, Storage::F16), lengths, 1, widths, Storage::F16, plain);
    }
}

fn absorbed(
    cases: &mut Vec<Case>,
    id: String,
    lengths: &[u32],
    most: u32,
    widths: Widths,
    storage: Storage,
    setting: (Extreme, u32),
) {
    attend(cases, id, (few_new(lengths, most), most), widths, storage, setting, None);
}

/// Three sequences; the border is that of the second one's last split, within its three new tokens.
fn parted(cases: &mut Vec<Case>, id: String, storage: Storage) {
    let batch = few_new(&[40, 2 * SPLIT + 2, 3], 4);
    let border = batch.sequences[1].first_row + 2 * SPLIT;
    attend(cases, id, (batch, 4), (5, 16, 8, 36), storage, (Extreme::Plain, SPLIT), Some(border));
}

/// A range of the cache and its lines of the sequence table, of which it has `splits` splits.
struct Part {
    slots: Range<usize>,
    lines: Vec<DecodeSequence>,
    splits: u32,
}

/// The parts on both sides of a row of the step's numbering that the second sequence has: lines count from the first row of a part.
fn parts(batch: &Batch, split: u32, border: Option<u32>) -> Vec<Part> {
    let (lines, end) = (decoding(batch, split), batch.cache_rows as usize);
    let Some(border) = border else { return vec![Part { slots: 0..end, lines, splits: batch.rows / split }] };
    let slot = lines[1].first_slot + border - lines[1].first_row;
    let moved = lines[1..].iter().map(|&of| DecodeSequence {
        first_row: of.first_row.wrapping_sub(border),
        first_slot: of.first_slot.wrapping_sub(slot),
        ..of
    });
    let second = Part { slots: slot as usize..end, lines: moved.collect(), splits: (batch.rows - border) / split };
    vec![Part { slots: 0..slot as usize, lines: lines[..2].to_vec(), splits: border / split }, second]
}

fn attend(
    cases: &mut Vec<Case>,
    id: String,
    (batch, most): (Batch, u32),
    (n_head, d_nope, d_rope, d_latent): Widths,
    storage: Storage,
    (extreme, split): (Extreme, u32),
    border: Option<u32>,
) {
    let scale = ((d_latent + d_rope) as f32).sqrt().recip();
    let op = AttentionAbsorbed {
        tokens: batch.tokens,
        most_tokens: most,
        n_sequence: batch.sequences.len() as u32,
        split,
        splits: batch.rows / split,
        partials: splits(&batch, split).len() as u32,
        n_head: n_head as u32,
        d_latent: d_latent as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        cache_rows: batch.cache_rows,
        scale,
        weights: storage,
        storage,
    };
    let of_scores = attention_tolerance(d_latent + d_rope, split as usize, extreme.spread());
    let run =
        move |lab: &Lab<'_>, launch: Launch<AttentionAbsorbed>, tolerance: Tolerance| -> Result<Vec<Comparison>> {
            let slots = batch.slots();
            let mut random = Random::new(SEED);
            let tokens = batch.tokens as usize;
            let mut a_values = random.values(tokens * n_head * d_latent, 1.0);
            let mut q_values = random.values(tokens * n_head * (d_nope + d_rope), 1.0);
            let mut latent_values = random.values(slots.len() * d_latent, 1.0);
            let mut rope_values = random.values(slots.len() * d_rope, 1.0);
            extreme.of_queries(&mut a_values);
            extreme.of_queries(&mut q_values);
            extreme.of_keys(&mut latent_values, d_latent, storage);
            extreme.of_keys(&mut rope_values, d_rope, storage);
            let (latent_kept, rope_kept) = (pack(&latent_values, storage).1, pack(&rope_values, storage).1);
            let (a, q) = (lab.floats(&a_values)?, lab.floats(&q_values)?);
            let latent_words = cache_rows(&latent_values, d_latent as u32, &slots, batch.cache_rows, storage);
            let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
            let partials = splits(&batch, split).len() * n_head;
            let (values, softmax) = (lab.output(partials * d_latent)?, lab.output(partials * 2)?);
            for Part { slots, lines, splits } in parts(&batch, split, border) {
                let of_part = |words: &[u32], width: usize| {
                    let row = row_words(width as u32, storage);
                    words[slots.start * row..slots.end * row].to_vec()
                };
                let latent_cache = lab.words(&of_part(&latent_words, d_latent))?;
                let rope_cache = lab.words(&[&of_part(&rope_words, d_rope)[..], &[0; 4]].concat())?;
                let sequences = lab.words(bytemuck::cast_slice(&lines))?;
                let args = attention_absorbed::Args {
                    absorbed: &a.region,
                    q: &q.region,
                    latent_cache: &latent_cache.region,
                    rope_cache: &rope_cache.region,
                    sequences: &sequences.region,
                    partial_values: &values.region,
                    partial_softmax: &softmax.region,
                };
                let (n_sequence, cache_rows) = (lines.len() as u32, slots.len() as u32);
                launch.of(AttentionAbsorbed { n_sequence, splits, cache_rows, ..launch.op }).run(lab, args)?;
            }
            let q_rope: Vec<f64> = q_values.chunks(d_nope + d_rope).flat_map(|head| widen(&head[d_nope..])).collect();
            let reference_of = match launch.of_halves() {
                true => reference::attention_absorbed_of_halves,
                false => reference::attention_absorbed,
            };
            let expected = reference_of(
                &widen(&a_values),
                &q_rope,
                &latent_kept,
                &rope_kept,
                &splits(&batch, split),
                n_head,
                d_latent,
                d_rope,
                scale.into(),
            );
            extreme.check_scores(launch.variant.spec.name, &expected.max)?;
            let compared = lab.compare(&values, &expected.values, tolerance)?;
            let state = lab.read(&softmax)?;
            Ok(std::iter::once(compared).chain(compare_softmax(lab, (&state, 0), &expected, of_scores)).collect())
        };
    each_able(
        cases,
        id,
        op,
        |_| true,
        move |lab, variant| {
            // The reference rounds the queries as the kernel does, but not the weights of the softmax: each is off by at most 2⁻¹¹
            // of itself, and so are, as errors of random signs, their sums. Scores and their maximum know nothing of it.
            let halves = if rounds_to_halves(&variant.spec) { HALF_ROUNDOFF } else { 0.0 };
            let tolerance = Tolerance { relative: of_scores.relative + halves };
            let device = lab.kernels.context();
            let of = |setting| {
                let tuning = if setting == Tuning::Auto { held(variant, &op, device) } else { setting };
                let compared = run(lab, Launch { op, variant, tuning }, tolerance)?;
                Ok(outcome(name_of(setting), compared))
            };
            // Heads of many may share more memory than a device has.
            let held = |&setting: &Tuning| setting == Tuning::Auto || fits(variant, &op, device, setting);
            lab.settings(variant.spec.tunings).filter(held).map(of).collect()
        },
    );
}
