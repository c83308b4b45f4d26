//! SmolLM2-135M-Instruct, a model that people have, against a forward pass that shares nothing with this crate
//! (tests/golden/smollm2): its tokens, its text and the log-probability of every token. `scripts/smollm2.sh` brings the file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{gpu, stored};
use egmla::attention::{CacheOptions, Mode, StepTokens};
use egmla::check::compare::F32_LIMIT;
use egmla::decoder::{CpuDecoder, DecoderWeights, Logits, ModelFolder, NativeDecoder};
use egmla::{Recording, Storage, readback};

#[derive(serde::Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
    log_probabilities: Vec<f64>,
}

impl Case {
    fn all() -> Vec<Case> {
        let cases: Vec<Case> = serde_json::from_str(include_str!("golden/smollm2/reference.json")).unwrap();
        assert!(cases.iter().all(|case| case.token_ids.len() == 64 && case.log_probabilities.len() == 64));
        cases
    }

    /// Feeds the reference's own tokens; every one of them must be the most likely, at the reference's log-probability. The tolerance
    /// may depend on the largest logit; returns the largest part of it that was needed.
    fn holds(&self, tolerance: impl Fn(f64) -> f64, mut feed: impl FnMut(&[u32]) -> Vec<f64>) -> f64 {
        let mut worst = 0.0f64;
        let mut fed = self.prompt_ids.clone();
        for (step, (&token, &expected)) in self.token_ids.iter().zip(&self.log_probabilities).enumerate() {
            let logits = feed(&fed);
            let top = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - top).exp()).sum();
            let found = logits[token as usize] - top - sum.ln();
            let off = (found - expected).abs();
            let tolerance = tolerance(logits.iter().fold(0.0, |most, logit| logit.abs().max(most)));
            assert!(off <= tolerance, "{:?}, token {step}: {found} for {expected}", self.prompt);
            // Two tokens within the tolerance may change places.
            assert!(top - logits[token as usize] <= 2.0 * tolerance, "{:?}, token {step}: not the first", self.prompt);
            worst = worst.max(off / tolerance);
            fed = vec![token];
        }
        worst
    }
}

/// The model, where the script has brought it.
fn model() -> Option<ModelFolder> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        println!("not run: no {}: sh scripts/smollm2.sh brings it", path.display());
        return None;
    }
    Some(ModelFolder::open(&path).unwrap())
}

#[test]
fn texts_become_the_references_tokens_and_text_again() {
    let Some(model) = model() else { return };
    for case in Case::all() {
        assert_eq!(model.encode(&case.prompt).unwrap(), case.prompt_ids, "{:?}", case.prompt);
    }
    let answer = model.tokenizer().decode(&Case::all()[2].token_ids).unwrap();
    assert!(answer.starts_with("The boiling point of water is approximately 100°C (181.67°F)."), "{answer}");
}

#[test]
fn the_reference_on_the_cpu_says_what_another_program_says() {
    let Some(model) = model() else { return };
    let decoder = CpuDecoder::new(model.config(), &model.weights().unwrap()).unwrap();
    for case in Case::all() {
        let mut state = decoder.state();
        // The golden file has nine decimal places.
        case.holds(|_| 1e-8, |ids| decoder.forward(ids, &mut state, Logits::Last).unwrap());
    }
}

/// Each layer adds what one layer may be off.
fn in_f32(model: &ModelFolder) -> impl Fn(f64) -> f64 {
    let layers = f64::from(model.config().n_layer);
    move |largest| largest * F32_LIMIT * layers
}

#[test]
fn the_cpu_in_f32_says_what_another_program_says() {
    let Some(model) = model() else { return };
    let decoder = NativeDecoder::new(model.config(), model.weights().unwrap()).unwrap();
    for case in Case::all() {
        let mut state = decoder.state(128);
        let mut feed = |ids: &[u32]| decoder.forward(ids, &mut state, Logits::Last).unwrap();
        let worst = case.holds(in_f32(&model), |ids| feed(ids).into_iter().map(f64::from).collect());
        println!("{:?}: log-probabilities within {worst:.1e} of the tolerance", case.prompt);
    }
}

/// Rounding moves every weight of a matrix by at most 2⁻¹¹ of it, independently, so it moves a product by no larger part of it. Seven
/// products of a layer, embedding and logits add up as independent errors do.
fn in_halves(model: &ModelFolder) -> impl Fn(f64) -> f64 {
    let products = 7.0 * f64::from(model.config().n_layer) + 2.0;
    move |largest| largest * 2f64.powi(-11) * products.sqrt()
}

#[test]
fn the_cpu_with_weights_in_halves_says_the_same_up_to_their_rounding() {
    let Some(model) = model() else { return };
    let decoder = model.native_decoder(Storage::F16).unwrap();
    for case in Case::all() {
        let mut state = decoder.state(128);
        let mut feed = |ids: &[u32]| decoder.forward(ids, &mut state, Logits::Last).unwrap();
        let worst = case.holds(in_halves(&model), |ids| feed(ids).into_iter().map(f64::from).collect());
        println!("{:?}: log-probabilities within {worst:.1e} of the tolerance", case.prompt);
    }
}

#[test]
fn the_cpu_with_weights_in_halves_is_the_reference_with_the_same_weights() {
    let Some(model) = model() else { return };
    let decoder = model.native_decoder(Storage::F16).unwrap();
    let weights = DecoderWeights::load(&model.checkpoint().unwrap().in_halves(), model.config()).unwrap();
    let reference = CpuDecoder::new(model.config(), &weights).unwrap();
    let case = &Case::all()[0];
    let (mut state, mut expected_state) = (decoder.state(128), reference.state());
    for ids in [&case.prompt_ids[..]].into_iter().chain(case.token_ids[..8].chunks(1)) {
        let found = decoder.forward(ids, &mut state, Logits::All).unwrap();
        let expected = reference.forward(ids, &mut expected_state, Logits::All).unwrap();
        let largest = expected.iter().fold(0.0f64, |most, logit| logit.abs().max(most));
        let off = found.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
        assert!(off <= in_f32(&model)(largest), "{off} of {largest}");
    }
}

#[test]
fn the_device_says_what_another_program_says() {
    let Some(model) = model() else { return };
    let gpu = gpu();
    let decoder = model.decoder(&gpu.kernels, stored(Storage::F32)).unwrap();
    for case in Case::all() {
        let mut cache = decoder.cache(CacheOptions { capacity: 128, max_tokens: 64, ..Default::default() }).unwrap();
        let state = decoder.state(&cache, false).unwrap();
        let mut recording = Recording::new(&gpu.kernels);
        let worst = case.holds(in_f32(&model), |ids| {
            let mode = if ids.len() > 1 { Mode::Prefill } else { Mode::Decode };
            let tokens = StepTokens { counts: &[ids.len() as u32], ids: Some(ids) };
            recording.clear();
            let region = decoder.advance(&mut recording, &mut cache, &state, (mode, tokens), Logits::Last).unwrap();
            readback::submit(&mut recording).unwrap();
            let logits = readback::wait(readback::read_f32(&gpu.kernels, &[&region])).unwrap().remove(0);
            logits.into_iter().map(f64::from).collect()
        });
        println!("{:?}: log-probabilities within {worst:.1e} of the tolerance", case.prompt);
    }
    gpu.assert_no_errors();
}
