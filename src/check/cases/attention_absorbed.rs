//! Cases of `attention_absorbed`: ragged batches of one new token and of several, latents of every width, and the extremes.

use super::batch::{Widths, cache_rows, compare_partials, decoding, few_new, few_sizes, splits};
use super::extreme::{Extreme, attention_tolerance};
use super::{SEED, widen};
use crate::adapter::Tuning;
use crate::check::{Case, Lab, Outcome, every_tuning, not_run, pack, skipped};
use crate::error::Result;
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::{AttentionAbsorbed, attention_absorbed};
use crate::op::Variant;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

const VARIANTS: [&Variant<AttentionAbsorbed>; 3] =
    [&attention_absorbed::PLAIN, &attention_absorbed::STREAM, &attention_absorbed::SUBGROUP];

pub(super) fn cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (name, lengths, widths) in few_sizes() {
            let (n_head, _, d_rope, d_latent) = widths;
            let id = format!("{name}_h{n_head}_r{d_latent}+{d_rope}/{}", storage.name());
            for variant in VARIANTS.into_iter().filter(|variant| takes(variant, widths)) {
                let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, 1, widths, storage, Extreme::Plain);
                cases.push(Case::new(variant.spec.name, id.clone(), run));
            }
        }
        // Speculative decoding: candidates that see each other, across the border of a split.
        let (lengths, widths) = (&[258, 1, 40, 511], (3, 16, 8, 16));
        for most in [2, 16] {
            let id = format!("q{most}/{}", storage.name());
            for variant in VARIANTS {
                let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, most, widths, storage, Extreme::Plain);
                cases.push(Case::new(variant.spec.name, id.clone(), run));
            }
        }
    }
    for variant in VARIANTS {
        cases.push(Case::new(variant.spec.name, "t32768_h3_r20+8/f16", move |lab| {
            absorbed(lab, variant, &[32_768], 1, (3, 12, 8, 20), Storage::F16, Extreme::Plain)
        }));
    }
    for extreme in Extreme::ALL {
        for storage in Storage::ALL {
            let (lengths, widths, id) =
                (&[300, 1, 255], (3, 16, 8, 16), format!("{}/{}", extreme.name(), storage.name()));
            for variant in VARIANTS {
                let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, 1, widths, storage, extreme);
                cases.push(Case::new(variant.spec.name, id.clone(), run));
            }
        }
    }
    // DeepSeek-V3's widths: the query is staged in several chunks.
    for variant in VARIANTS.into_iter().filter(|variant| takes(variant, (5, 128, 64, 512))) {
        cases.push(Case::new(variant.spec.name, "t300_h5_r512+64/f16", move |lab| {
            absorbed(lab, variant, &[300], 1, (5, 128, 64, 512), Storage::F16, Extreme::Plain)
        }));
    }
    // Latents of one load to several a lane, of half a load more, of none left for the last lanes; without a rotary key.
    for widths in [(1, 4, 0, 4), (9, 8, 4, 100), (17, 4, 12, 64), (5, 16, 64, 128), (2, 64, 64, 256)] {
        for (variant, storage) in
            VARIANTS.into_iter().flat_map(|variant| Storage::ALL.map(|storage| (variant, storage)))
        {
            if !takes(variant, widths) {
                continue;
            }
            let (n_head, _, d_rope, d_latent) = widths;
            let id = format!("wide_h{n_head}_r{d_latent}+{d_rope}/{}", storage.name());
            let run = move |lab: &Lab<'_>| absorbed(lab, variant, &[70, 3, 257], 2, widths, storage, Extreme::Plain);
            cases.push(Case::new(variant.spec.name, id, run));
        }
    }
}

/// Whether a kernel over the latents takes these widths: all but one need rows that begin on 16-byte boundaries.
fn takes(variant: &'static Variant<AttentionAbsorbed>, (_, d_nope, d_rope, d_latent): Widths) -> bool {
    let aligned = [d_nope, d_rope, d_latent].iter().all(|width| width.is_multiple_of(4));
    aligned || variant.spec.name == attention_absorbed::PLAIN.spec.name
}

fn absorbed(
    lab: &Lab<'_>,
    variant: &'static Variant<AttentionAbsorbed>,
    lengths: &[u32],
    most: u32,
    (n_head, d_nope, d_rope, d_latent): Widths,
    storage: Storage,
    extreme: Extreme,
) -> Result<Vec<Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let batch = few_new(lengths, most);
    let slots = batch.slots();
    let scale = ((d_latent + d_rope) as f32).sqrt().recip();
    let problem = attention_absorbed::AttentionAbsorbed {
        tokens: batch.tokens,
        most_tokens: most,
        n_sequence: batch.sequences.len() as u32,
        splits: batch.rows / SPLIT,
        partials: splits(&batch).len() as u32,
        n_head: n_head as u32,
        d_latent: d_latent as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        cache_rows: batch.cache_rows,
        scale,
        storage,
    };
    // The lanes of a small subgroup hold short rows only: said, and not passed over.
    if variant.spec.name == attention_absorbed::STREAM.spec.name
        && let Err(error) = variant.plan(&problem, lab.kernels.context(), Tuning::Auto)
    {
        return Ok(vec![not_run(error.to_string())]);
    }
    let tolerance = attention_tolerance(d_latent + d_rope, SPLIT as usize, extreme.spread());
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
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
        let latent_cache = lab.words(&latent_words)?;
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&decoding(&batch)))?;
        let partials = splits(&batch).len() * n_head;
        let (values, softmax) = (lab.output(partials * d_latent)?, lab.output(partials * 2)?);
        let args = attention_absorbed::Args {
            absorbed: &a.region,
            q: &q.region,
            latent_cache: &latent_cache.region,
            rope_cache: &rope_cache.region,
            sequences: &sequences.region,
            partial_values: &values.region,
            partial_softmax: &softmax.region,
        };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let q_rope: Vec<f64> = q_values.chunks(d_nope + d_rope).flat_map(|head| widen(&head[d_nope..])).collect();
        let expected = reference::attention_absorbed(
            &widen(&a_values),
            &q_rope,
            &latent_kept,
            &rope_kept,
            &splits(&batch),
            n_head,
            d_latent,
            d_rope,
            scale.into(),
        );
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    })
}
