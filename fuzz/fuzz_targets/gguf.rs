#![no_main]
//! A GGUF file: its container in memory with every tensor and the configuration, and the same bytes as a checkpoint and as a whole
//! model, opened as the program opens them.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use egmla::config::{DecoderConfig, ModelSummary};
use egmla::decoder::{ModelFolder, panics_are_caught};
use egmla::gguf::Gguf;
use egmla::weights::Checkpoint;
use egmla_fuzz::{bounded, bounded_beside};
use libfuzzer_sys::fuzz_target;

/// Bytes beside those of the input, for a tokenizer's regular expressions.
const FIXED: usize = 256 << 20;

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("egmla-fuzz-{}.gguf", std::process::id())));

fuzz_target!(init: quiet(), |data: &[u8]| {
    let Ok(file) = bounded(data.len(), || Gguf::from_bytes(data.to_vec())) else { return };
    for (name, info) in file.tensors() {
        if let Ok(values) = bounded(data.len(), || file.read(name)) {
            assert_eq!(values.len(), info.shape.iter().product::<usize>(), "{name}");
        }
    }
    if let Ok(text) = bounded(data.len(), || file.config_json()) {
        let _ = DecoderConfig::from_json(&text);
        let _ = ModelSummary::from_json(&text);
    }
    if let Ok(tokenizer) = bounded_beside(FIXED, data.len(), || file.tokenizer())
        && let Ok(ids) = tokenizer.encode("ab 12 \u{e9}\u{1f600}<s>\n")
    {
        assert!(ids.iter().all(|&id| u64::from(id) < tokenizer.vocab_size()), "{ids:?}");
        let _ = tokenizer.decode(&ids);
    }
    fs::write(&*FILE, data).expect("the file of the model");
    if let Ok(checkpoint) = bounded(data.len(), || Checkpoint::open(&FILE)) {
        for (name, info) in checkpoint.tensors() {
            if let Ok(tensor) = bounded(data.len(), || checkpoint.take(name, &info.shape)) {
                assert_eq!(tensor.data.len(), info.shape.iter().product::<usize>(), "{name}");
            }
        }
    }
    let read = || ModelFolder::open(&FILE).and_then(|model| model.weights().map(|weights| (model, weights)));
    if let Ok((model, weights)) = bounded_beside(FIXED, data.len(), read) {
        assert_eq!(weights.layers.len(), model.config().n_layer as usize);
    }
});

/// A panic of the tokenizers library comes back as an error: only others are findings.
fn quiet() {
    let found = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !panics_are_caught() {
            found(info);
        }
    }));
}
