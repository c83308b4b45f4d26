//! Checkpoints as people have them: shards, Hugging Face's cache, prefixes, fp8, and what is beside the weights. Each is read to
//! the last bit, or refused in one line that names what is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use egmla::Result;
use egmla::config::{Activation, AttentionConfig, DecoderConfig, GateConfig, GateNorm, GateSite, weight_block_size};
use egmla::weights::{AttentionWeights, Checkpoint, HostTensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Type, shape and bytes of a tensor.
#[derive(Debug, Clone, PartialEq)]
struct Tensor(Dtype, Vec<usize>, Vec<u8>);

type Tensors = BTreeMap<String, Tensor>;

fn f32s(shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let count = shape.iter().product();
    Tensor(Dtype::F32, shape.to_vec(), (0..count).flat_map(|i| value(i).to_le_bytes()).collect())
}

fn file(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        let Tensor(dtype, shape, data) = tensor;
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn wave(i: usize) -> f32 {
    ((i * 7 + 3) % 23) as f32 * 0.1 - 1.0
}

/// The attention of a small layer.
fn config() -> AttentionConfig {
    AttentionConfig::from_json(
        r#"{"hidden_size":8,"num_attention_heads":2,"q_lora_rank":null,"kv_lora_rank":4,"qk_nope_head_dim":4,
            "qk_rope_head_dim":2,"v_head_dim":3}"#,
    )
    .unwrap()
}

const LAYER: [(&str, &[usize]); 5] = [
    ("q_proj.weight", &[12, 8]),
    ("kv_a_proj_with_mqa.weight", &[6, 8]),
    ("kv_a_layernorm.weight", &[4]),
    ("kv_b_proj.weight", &[14, 4]),
    ("o_proj.weight", &[8, 6]),
];

/// Layers of that attention under these prefixes, no two alike.
fn layers(prefixes: &[&str]) -> Tensors {
    let of = |(n, prefix): (usize, &&str)| {
        let prefix = (*prefix).to_owned();
        LAYER.map(move |(name, shape)| (format!("{prefix}{name}"), f32s(shape, |i| wave(i + n))))
    };
    prefixes.iter().enumerate().flat_map(of).collect()
}

/// A folder of two shards and their index.
fn shards(folder: &Path, tensors: &Tensors) {
    let mut parts = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (at, (name, tensor)) in tensors.iter().enumerate() {
        parts[at % 2].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), json!(shard(at % 2)));
    }
    for (at, part) in parts.iter().enumerate() {
        fs::write(folder.join(shard(at)), file(part)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    fs::write(folder.join(INDEX), index.to_string()).unwrap();
}

const INDEX: &str = "model.safetensors.index.json";

fn shard(at: usize) -> String {
    format!("model-0000{}-of-00002.safetensors", at + 1)
}

fn take_all(checkpoint: &Checkpoint<'_>) -> Vec<HostTensor> {
    let names: Vec<_> = checkpoint.tensors().iter().map(|(name, info)| (name.clone(), info.shape.clone())).collect();
    names.iter().map(|(name, shape)| checkpoint.take(name, shape).unwrap()).collect()
}

/// The one line of an error, which holds each of `parts`.
#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("it was read").to_string();
    assert!(!message.contains('\n'), "{message}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

#[test]
fn one_file_shards_and_bytes_in_memory_hold_the_same() {
    let mut tensors = layers(&["model.layers.0.self_attn.", "model.layers.1.self_attn."]);
    // More than is read at once, in types whose elements have two bytes.
    let halves = (0..1_500_000u32).flat_map(|i| ((i % 0x7c00) as u16).to_le_bytes()).collect();
    tensors.insert("large".to_owned(), Tensor(Dtype::F16, vec![3, 500_000], halves));
    tensors.insert("empty".to_owned(), Tensor(Dtype::BF16, vec![0, 4], vec![]));
    let bytes = file(&tensors);
    let expected = take_all(&Checkpoint::new(&bytes).unwrap());
    assert_eq!(expected.len(), 12);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    shards(path, &tensors);
    for opened in [path.to_owned(), path.join(INDEX)] {
        let checkpoint = Checkpoint::open(&opened).unwrap();
        assert_eq!(take_all(&checkpoint), expected, "{opened:?}");
        assert_eq!(checkpoint.files().len(), 2);
        refused(checkpoint.take("none", &[1]), &[INDEX, "tensor `none` is missing"]);
    }
    // A single file stands before an index, as transformers has it.
    fs::write(path.join("model.safetensors"), &bytes).unwrap();
    fs::write(path.join(INDEX), "{").unwrap();
    for opened in [path.to_owned(), path.join("model.safetensors")] {
        assert_eq!(take_all(&Checkpoint::open(&opened).unwrap()), expected, "{opened:?}");
    }
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let tensors = layers(&["model.layers.0.self_attn."]);
    let spoilt = |change: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        shards(folder.path(), &tensors);
        change(folder.path());
        Checkpoint::open(folder.path()).map(drop)
    };
    let index = |folder: &Path, name: &str, file: serde_json::Value| {
        let path = folder.join(INDEX);
        let mut index: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        index["weight_map"][name] = file;
        fs::write(path, index.to_string()).unwrap();
    };
    spoilt(&|_| {}).unwrap();
    refused(spoilt(&|folder| fs::remove_file(folder.join(shard(1))).unwrap()), &[INDEX, &shard(1), "is not there"]);
    refused(spoilt(&|folder| index(folder, "b", json!(shard(0)))), &[INDEX, "tensor `b` is listed in", &shard(0)]);
    let first = tensors.keys().next().unwrap();
    refused(spoilt(&|folder| index(folder, first, json!(shard(1)))), &[INDEX, first, &shard(1), "not there"]);
    let twice = |folder: &Path| fs::write(folder.join(shard(1)), file(&tensors)).unwrap();
    refused(spoilt(&twice), &[&shard(1), &shard(0), first, "is here and in"]);
    for name in ["../other.safetensors", "/etc/passwd", "a/b", "..", ""] {
        refused(spoilt(&|folder| index(folder, "b", json!(name))), &[INDEX, "`b`", name, "not the name of a file"]);
    }
    refused(spoilt(&|folder| index(folder, "b", json!(3))), &[INDEX, "`b`", "3"]);
    let text = |text: &'static str| spoilt(&move |folder: &Path| fs::write(folder.join(INDEX), text).unwrap());
    for (written, part) in [
        ("[]", "expected an object"),
        ("{}", "weight_map"),
        ("", "the file is empty"),
        (r#"{"weight_map":{"a":"x","a":"y"}}"#, "`a` is given twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("\n<!DOCTYPE html><html>", "web page"),
        ("\u{1}", "index of shards"),
    ] {
        refused(text(written), &[INDEX, part]);
    }
    let cut = |folder: &Path| fs::write(folder.join(shard(0)), &file(&tensors)[..99]).unwrap();
    refused(spoilt(&cut), &[&shard(0), "not a valid safetensors file"]);
    refused(
        spoilt(&|folder| fs::remove_file(folder.join(INDEX)).unwrap()),
        &["is a directory that holds neither model.safetensors nor"],
    );
    let torch = |folder: &Path| {
        fs::rename(folder.join(INDEX), folder.join("pytorch_model.bin")).unwrap();
    };
    refused(spoilt(&torch), &["pytorch_model.bin", "save_file"]);
}

#[test]
fn what_is_no_safetensors_file_is_named_as_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    for (bytes, part) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"[..], "git-LFS"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "zip archive"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P", "pickle"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"  <HTML lang=en>", "web page"),
        (b"", "the file is empty"),
    ] {
        refused(Checkpoint::new(bytes), &["not a valid safetensors file", part]);
        fs::write(&path, bytes).unwrap();
        refused(Checkpoint::open(&path), &["w.safetensors", "not a valid safetensors file", part]);
    }
    // A file is opened as what it is; bytes are not.
    let gguf = b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00";
    refused(Checkpoint::new(gguf), &["not a valid safetensors file", "GGUF"]);
    fs::write(&path, gguf).unwrap();
    refused(Checkpoint::open(&path), &["w.safetensors", "not a valid GGUF file"]);
}

#[test]
fn a_file_that_changes_after_its_header_was_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let bytes = file(&layers(&[""]));
    let opened = || {
        fs::write(&path, &bytes).unwrap();
        Checkpoint::open(&path).unwrap()
    };
    let checkpoint = opened();
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 - 1).unwrap();
    refused(checkpoint.take("q_proj.weight", &[12, 8]), &["w.safetensors", "has changed since"]);
    let checkpoint = opened();
    fs::remove_file(&path).unwrap();
    refused(checkpoint.take("q_proj.weight", &[12, 8]), &["w.safetensors: "]);
}

#[test]
fn layers_are_found_by_any_usual_prefix() {
    let bytes_of = |prefixes: &[&str]| file(&layers(prefixes));
    for stem in ["model.layers", "language_model.model.layers", "model.language_model.layers", "layers", "a.b.layers"] {
        let prefixes = [0, 1, 2].map(|n| format!("{stem}.{n}.self_attn."));
        let bytes = bytes_of(&prefixes.each_ref().map(String::as_str));
        let checkpoint = Checkpoint::new(&bytes).unwrap();
        let found = checkpoint.attention_prefix("2".parse().unwrap()).unwrap();
        assert_eq!(found, prefixes[2]);
        let weights = AttentionWeights::load(&checkpoint, &found, &config()).unwrap();
        assert_eq!(weights.o_proj.data[0], wave(2));
        refused(checkpoint.attention_prefix("3".parse().unwrap()), &["no layer 3: there are 3, from 0 to 2"]);
        refused(checkpoint.only_attention_prefix(), &["3 layers of attention", &prefixes[0], &prefixes[2], "--layer"]);
    }
    // Two attentions in a layer.
    let bytes = bytes_of(&["model.layers.0.self_attn.0.", "model.layers.0.self_attn.1."]);
    let checkpoint = Checkpoint::new(&bytes).unwrap();
    for part in [0, 1] {
        let found = checkpoint.attention_prefix(format!("0.{part}").parse().unwrap()).unwrap();
        assert_eq!(found, format!("model.layers.0.self_attn.{part}."));
        AttentionWeights::load(&checkpoint, &found, &config()).unwrap();
    }
    refused(checkpoint.attention_prefix("0".parse().unwrap()), &["2 attentions", "self_attn.0.", "as 0.0"]);
    refused(checkpoint.attention_prefix("0.2".parse().unwrap()), &["layer 0 has no attention 2", "self_attn.1."]);
    // Layers without latents beside one with them, as Kimi-Linear's.
    let mut tensors = layers(&["model.layers.3.self_attn."]);
    for layer in 0..3 {
        tensors.insert(format!("model.layers.{layer}.self_attn.A_log"), f32s(&[1], wave));
    }
    let bytes = file(&tensors);
    let checkpoint = Checkpoint::new(&bytes).unwrap();
    let parts = ["layer 1 has no multi-head latent attention", "model.layers.1.self_attn.A_log", "layer 3"];
    refused(checkpoint.attention_prefix("1".parse().unwrap()), &parts);
    assert_eq!(checkpoint.only_attention_prefix().unwrap(), "model.layers.3.self_attn.");
    // Two models in one file.
    let bytes = bytes_of(&["a.layers.0.self_attn.", "b.layers.0.self_attn."]);
    refused(Checkpoint::new(&bytes).unwrap().attention_prefix("0".parse().unwrap()), &["`a.layers.0", "`b.layers.0"]);
    // No layers.
    let bytes = bytes_of(&[""]);
    let checkpoint = Checkpoint::new(&bytes).unwrap();
    refused(checkpoint.attention_prefix("0".parse().unwrap()), &["there are no layers"]);
    assert_eq!(checkpoint.only_attention_prefix().unwrap(), "");
}

#[test]
fn the_token_embedding_of_a_tied_gate_is_that_of_the_layers_model() {
    let tied = AttentionConfig {
        gate: Some(GateConfig {
            vocab_size: 5,
            d_gate: 8,
            tied: true,
            site: GateSite::UpProjected,
            activation: Activation::OnePlus,
            norm: GateNorm::None,
            norm_eps: 1e-5,
        }),
        ..config()
    };
    let with = |prefix: &str, more: &[(&str, [usize; 2])]| {
        let mut tensors = layers(&[prefix]);
        tensors.insert(format!("{prefix}gate_b_proj.weight"), f32s(&[14, 8], wave));
        tensors.extend(more.iter().map(|(name, shape)| ((*name).to_owned(), f32s(shape, |i| wave(i + name.len())))));
        let bytes = file(&tensors);
        AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), prefix, &tied)
    };
    for (prefix, name) in [
        ("model.layers.3.self_attn.", "model.embed_tokens.weight"),
        ("language_model.model.layers.0.self_attn.1.", "language_model.model.embed_tokens.weight"),
        ("layers.12.self_attn.", "embed_tokens.weight"),
        // Without layers, the only one.
        ("", "embed_tokens.weight"),
        ("self_attn.", "model.embed_tokens.weight"),
    ] {
        // Another model's is not taken for it.
        let other = ("vision.embed_tokens.weight", [5, 8]);
        let more = if prefix.contains("layers.") { vec![(name, [5, 8]), other] } else { vec![(name, [5, 8])] };
        let embedding = with(prefix, &more).unwrap().gate.unwrap().embedding.unwrap();
        assert_eq!((&*embedding.name, embedding.data[0]), (name, wave(name.len())), "{prefix}");
        refused(with(prefix, &[(name, [4, 8])]), &[name, "has shape [4, 8], expected [5, 8]"]);
        // A table beside it would be ignored.
        let table = format!("{prefix}gate_embedding.weight");
        let more = [(name, [5, 8]), (&*table, [5, 8])];
        refused(with(prefix, &more), &[&table, "is not expected"]);
    }
    let of_other = [("vision.embed_tokens.weight", [5, 8])];
    refused(
        with("model.layers.3.self_attn.", &of_other),
        &["the gate is tied to the token embedding, and `model.embed_tokens.weight` is not there"],
    );
    refused(with("self_attn.", &[]), &["no tensor is named embed_tokens.weight", "--model", "--layer"]);
    let several = [("a.embed_tokens.weight", [5, 8]), ("b.embed_tokens.weight", [5, 8])];
    refused(with("self_attn.", &several), &["there are 2, from `a.embed_tokens.weight` to `b.embed_tokens.weight`"]);
}

/// The value of an e4m3 code, by its definition.
fn e4m3(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let size = if exponent == 0 { fraction * 2f64.powi(-6) } else { (1.0 + fraction) * 2f64.powi(exponent - 7) };
    if code >> 7 == 1 { -size } else { size }
}

/// Codes that are numbers, as they come.
fn codes(shape: [usize; 2]) -> Vec<u8> {
    (0..shape[0] * shape[1])
        .map(|i| (i * 37 % 256) as u8)
        .map(|code| if code & 0x7f == 0x7f { 0x7e } else { code })
        .collect()
}

#[test]
fn fp8_weights_are_their_codes_times_the_factors_of_their_blocks() {
    // The rows of kv_a_proj_with_mqa in DeepSeek-V3, 4.5 blocks, and 1.6 blocks of columns.
    let shape = [576, 200];
    for (block, blocks) in [([128, 128], [5, 2]), ([100, 64], [6, 4]), ([576, 200], [1, 1]), ([1000, 1], [1, 200])] {
        let scale = |i: usize| 1.5f32.powi(i as i32 % 7 - 3);
        let tensors = Tensors::from([
            ("w.weight".to_owned(), Tensor(Dtype::F8_E4M3, shape.to_vec(), codes(shape))),
            ("w.weight_scale_inv".to_owned(), f32s(&blocks, scale)),
        ]);
        let bytes = file(&tensors);
        let checkpoint = Checkpoint::new(&bytes).unwrap().with_block_size(block);
        let found = checkpoint.take("w.weight", &shape).unwrap();
        for (i, (&found, code)) in found.data.iter().zip(codes(shape)).enumerate() {
            let (row, column) = (i / shape[1], i % shape[1]);
            let factor = scale(row / block[0] as usize * blocks[1] + column / block[1] as usize);
            // One product in f32 of two numbers that are exact.
            assert_eq!(found, e4m3(code) as f32 * factor, "{block:?}, row {row}, column {column}");
        }
        // Nothing of it is left over.
        checkpoint.refuse_rest("").unwrap();
        if block != [128, 128] {
            let refusal = Checkpoint::new(&bytes).unwrap().take("w.weight", &shape);
            refused(refusal, &["w.weight_scale_inv", &format!("{blocks:?}"), "[5, 2]"]);
        }
    }
}

#[test]
fn fp8_weights_with_one_factor_or_with_wrong_ones() {
    let with = |factors: Option<Tensor>| {
        let weight = ("w.weight".to_owned(), Tensor(Dtype::F8_E4M3, vec![2, 3], codes([2, 3])));
        let factors = factors.map(|factors| ("w.weight_scale_inv".to_owned(), factors));
        let bytes = file(&std::iter::once(weight).chain(factors).collect());
        Checkpoint::new(&bytes).unwrap().take("w.weight", &[2, 3])
    };
    let expected: Vec<f32> = codes([2, 3]).into_iter().map(|code| e4m3(code) as f32 * 0.25).collect();
    let bf16 = Tensor(Dtype::BF16, vec![1, 1], half::bf16::from_f32(0.25).to_le_bytes().to_vec());
    for factors in [f32s(&[], |_| 0.25), f32s(&[1], |_| 0.25), f32s(&[1, 1], |_| 0.25), bf16] {
        assert_eq!(with(Some(factors)).unwrap().data, expected);
    }
    refused(with(None), &["`w.weight_scale_inv` is missing", "[1, 1]"]);
    refused(with(Some(f32s(&[2, 1], |_| 1.0))), &["`w.weight_scale_inv` has shape [2, 1], expected [1, 1]"]);
    refused(with(Some(f32s(&[0], |_| 1.0))), &["`w.weight_scale_inv` has shape [0]"]);
    let coded = Tensor(Dtype::F8_E4M3, vec![1, 1], vec![1]);
    refused(with(Some(coded)), &["`w.weight_scale_inv` has element type F8_E4M3"]);
    let other = file(&Tensors::from([("w".to_owned(), Tensor(Dtype::F8_E5M2, vec![1], vec![1]))]));
    refused(Checkpoint::new(&other).unwrap().take("w", &[1]), &["`w` has element type F8_E5M2"]);
}

#[test]
fn other_quantised_weights_are_named() {
    for (name, method) in
        [("q_proj.qweight", "AWQ"), ("q_proj.g_idx", "GPTQ"), ("q_proj.weight_packed", "compressed-tensors")]
    {
        let mut tensors = layers(&["layers.0.self_attn."]);
        tensors.remove("layers.0.self_attn.q_proj.weight");
        tensors.insert(format!("layers.0.self_attn.{name}"), Tensor(Dtype::I32, vec![1], vec![0; 4]));
        let bytes = file(&tensors);
        let loaded = AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), "layers.0.self_attn.", &config());
        refused(loaded, &["layers.0.self_attn.q_proj.weight", name, method]);
    }
}

#[test]
fn tensors_beside_a_layer_are_passed_over_where_they_change_nothing() {
    let beside = |name: &str| {
        let mut tensors = layers(&["self_attn."]);
        tensors.insert(format!("self_attn.{name}"), f32s(&[1], wave));
        let bytes = file(&tensors);
        AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), "self_attn.", &config()).map(drop)
    };
    for name in ["rotary_emb.inv_freq", "attn.k_scale", "attn.v_scale"] {
        beside(name).unwrap();
    }
    for name in ["indexer.wk.weight", "inv_freq", "sinks", "q_proj.weight_scale_inv"] {
        refused(beside(name), &[name, "is not expected"]);
    }
}

#[test]
fn blocks_and_methods_are_read_from_a_configuration() {
    let of = |quantised: serde_json::Value| json!({"quantization_config": quantised}).to_string();
    for (quantised, expected) in [
        (json!(null), None),
        (json!({"quant_method": "fp8"}), None),
        (json!({"quant_method": "fp8", "weight_block_size": [128, 64]}), Some([128, 64])),
    ] {
        assert_eq!(weight_block_size(&of(quantised.clone())).unwrap(), expected);
        let nested = json!({"text_config": {"quantization_config": quantised}}).to_string();
        assert_eq!(weight_block_size(&nested).unwrap(), expected);
    }
    let around = json!({"text_config": {"kv_lora_rank": 1}, "quantization_config": {"weight_block_size": [2, 3]}});
    assert_eq!(weight_block_size(&around.to_string()).unwrap(), Some([2, 3]));
    for wrong in
        [json!(128), json!([128]), json!([0, 1]), json!([-1, 1]), json!([1, 1, 1]), json!([1.5, 1]), json!(["a", 1])]
    {
        refused(
            weight_block_size(&of(json!({"weight_block_size": wrong}))),
            &["quantization_config.weight_block_size"],
        );
    }
    let model = |quantised: serde_json::Value| {
        let mut config: serde_json::Value =
            serde_json::from_str(include_str!("../models/shakespeare/config.json")).unwrap();
        config["quantization_config"] = quantised;
        DecoderConfig::from_json(&config.to_string()).map(drop)
    };
    for fine in [json!(null), json!({}), json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})]
    {
        model(fine).unwrap();
    }
    for method in ["awq", "gptq", "bitsandbytes", "compressed-tensors"] {
        refused(model(json!({"quant_method": method})), &["quantization_config.quant_method", method, "fp8"]);
    }
    refused(model(json!({"bits": 4})), &["quantization_config.quant_method", "is missing"]);
    refused(model(json!({"quant_method": "fp8", "fmt": "e5m2"})), &["quantization_config.fmt", "e5m2"]);
    refused(model(json!({"quant_method": "fp8", "weight_block_size": [0, 1]})), &["weight_block_size"]);
}

/// A whole small model, beside which other tensors stand.
#[cfg(feature = "decoder")]
mod model {
    use egmla::decoder::{DecoderWeights, ModelFolder};

    use super::*;

    const VOCAB: usize = 5;

    fn model(tied: bool) -> (DecoderConfig, Tensors) {
        let config = json!({
            "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": null,
            "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "intermediate_size": 6,
            "max_position_embeddings": 64, "tie_word_embeddings": tied,
        });
        let mut tensors = Tensors::new();
        for layer in 0..2 {
            tensors.extend(super::layers(&[&format!("model.layers.{layer}.self_attn.")]));
            let mut add = |name: &str, shape: &[usize]| {
                tensors.insert(format!("model.layers.{layer}.{name}.weight"), f32s(shape, wave));
            };
            add("input_layernorm", &[8]);
            add("post_attention_layernorm", &[8]);
            add("mlp.gate_proj", &[6, 8]);
            add("mlp.up_proj", &[6, 8]);
            add("mlp.down_proj", &[8, 6]);
        }
        tensors.insert("model.embed_tokens.weight".to_owned(), f32s(&[VOCAB, 8], wave));
        tensors.insert("model.norm.weight".to_owned(), f32s(&[8], wave));
        if !tied {
            tensors.insert("lm_head.weight".to_owned(), f32s(&[VOCAB, 8], |i| wave(i + 1)));
        }
        (DecoderConfig::from_json(&config.to_string()).unwrap(), tensors)
    }

    fn load((config, tensors): &(DecoderConfig, Tensors)) -> Result<DecoderWeights> {
        let bytes = file(tensors);
        DecoderWeights::load(&Checkpoint::new(&bytes).unwrap(), config)
    }

    #[test]
    fn an_output_embedding_beside_a_tied_one_is_taken_where_it_differs() {
        let head = |shift: usize| {
            let mut tied = model(true);
            tied.1.insert("lm_head.weight".to_owned(), f32s(&[VOCAB, 8], |i| wave(i + shift)));
            load(&tied).unwrap().lm_head
        };
        assert_eq!(load(&model(true)).unwrap().lm_head, None);
        assert_eq!(head(0), None);
        assert_eq!(head(1), load(&model(false)).unwrap().lm_head);
        assert!(head(1).is_some());
        let mut wrong = model(true);
        wrong.1.insert("lm_head.weight".to_owned(), f32s(&[VOCAB, 4], wave));
        refused(load(&wrong), &["lm_head.weight", "[5, 4]", "[5, 8]"]);
    }

    #[test]
    fn layers_that_predict_further_tokens_are_passed_over_and_no_others() {
        let expected = load(&model(true)).unwrap();
        let with = |names: &[&str]| {
            let mut more = model(true);
            more.1.extend(names.iter().map(|name| ((*name).to_owned(), f32s(&[1], wave))));
            load(&more)
        };
        let predicting = ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.x", "model.layers.2.enorm.weight"];
        assert_eq!(with(&predicting).unwrap(), expected);
        let harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.attn.k_scale"];
        assert_eq!(with(&harmless).unwrap(), expected);
        // A layer more than the configuration tells of, one that predicts but is counted, and what nobody knows.
        refused(with(&["model.layers.2.self_attn.x"]), &["model.layers.2.self_attn.x", "not expected"]);
        refused(with(&["model.layers.1.eh_proj.weight"]), &["model.layers.1.eh_proj.weight", "not expected"]);
        refused(with(&["model.layers.3.x", predicting[0]]), &["model.layers.3.x", "not expected"]);
        refused(with(&["model.embeddings.weight"]), &["model.embeddings.weight", "not expected"]);
    }

    #[test]
    fn a_model_in_fp8_is_the_same_model_times_its_factors() {
        let (config, mut tensors) = model(true);
        let name = "model.layers.1.mlp.up_proj.weight";
        tensors.insert(name.to_owned(), Tensor(Dtype::F8_E4M3, vec![6, 8], codes([6, 8])));
        tensors.insert(format!("{name}_scale_inv"), f32s(&[1, 1], |_| 0.5));
        let loaded = load(&(config, tensors)).unwrap();
        let expected: Vec<f32> = codes([6, 8]).into_iter().map(|code| e4m3(code) as f32 * 0.5).collect();
        assert_eq!(loaded.layers[1].up_proj.data, expected);
    }

    /// The committed model as Hugging Face's cache has it: links from a snapshot to blobs.
    #[cfg(unix)]
    #[test]
    fn a_model_is_read_from_the_cache_of_hugging_face() {
        use std::os::unix::fs::symlink;

        let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/shakespeare");
        let hub = tempfile::tempdir().unwrap();
        let model = hub.path().join("models--org--model");
        let snapshot = model.join("snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("blobs")).unwrap();
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), "0123").unwrap();
        for (blob, name) in ["config.json", "model.safetensors", "tokenizer.json"].iter().enumerate() {
            fs::copy(committed.join(name), model.join(format!("blobs/{blob}"))).unwrap();
            symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
        }
        let expected = ModelFolder::open(&committed).unwrap().weights().unwrap();
        let found = ModelFolder::open(&model).unwrap();
        assert_eq!(found.path(), snapshot);
        assert_eq!(found.weights().unwrap(), expected);
    }
}
