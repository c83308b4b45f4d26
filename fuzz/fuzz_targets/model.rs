#![no_main]
//! A model's folder: its tokenizer by itself, and the three files together, opened as the program opens them.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use egmla::decoder::{ModelFolder, TextStream, TextTokenizer};
use egmla_fuzz::{bounded_beside, tensors_file};
use libfuzzer_sys::fuzz_target;

/// Bytes beside those of the input. A regular expression of a few bytes may be compiled to as much as its engine allows,
/// which `TextTokenizer` bounds by their number.
const FIXED: usize = 256 << 20;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("egmla-fuzz-model-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the model");
    folder
});

fuzz_target!(init: quiet(), |data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 0 {
        tokenizer(data);
    } else {
        folder(data);
    }
});

/// A panic of the tokenizers library comes back as an error: only others are findings.
fn quiet() {
    let found = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !egmla::decoder::panics_are_caught() {
            found(info);
        }
    }));
}

fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = bounded_beside(FIXED, bytes.len(), || TextTokenizer::from_bytes(bytes)) else { return };
    let Ok(ids) = tokenizer.encode("To be, or not to be: e\u{301} \u{1f600}\n") else { return };
    assert!(ids.iter().all(|&id| u64::from(id) < tokenizer.vocab_size()), "{ids:?}");
    let Ok(mut stream) = TextStream::new(&tokenizer, &[]) else { return };
    for id in ids {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}

/// Two lengths of two bytes each: of `config.json` and of `model.safetensors`; what is left is `tokenizer.json`.
fn folder(data: &[u8]) {
    let Some(([a, b, c, d], rest)) = data.split_first_chunk() else { return };
    let (config, rest) = rest.split_at(usize::from(u16::from_le_bytes([*a, *b])).min(rest.len()));
    let (weights, tokenizer) = rest.split_at(usize::from(u16::from_le_bytes([*c, *d])).min(rest.len()));
    let weights = tensors_file(weights);
    for (name, bytes) in [("config.json", config), ("model.safetensors", &weights), ("tokenizer.json", tokenizer)] {
        fs::write(FOLDER.join(name), bytes).expect("a file of the model");
    }
    let read = || ModelFolder::open(&FOLDER).and_then(|folder| folder.weights().map(|weights| (folder, weights)));
    let Ok((folder, weights)) = bounded_beside(FIXED, data.len(), read) else { return };
    assert_eq!(weights.layers.len(), folder.config().n_layer as usize);
    assert!(folder.tokenizer().vocab_size() <= u64::from(folder.config().vocab_size));
}
