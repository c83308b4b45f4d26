//! The language model: its folder, its CPU form, its device form against the CPU's.
#![cfg(feature = "decoder")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use egmla::attention::{Attention, CacheOptions, DecodePath, Mode, StepTokens, TiedEmbedding};
use egmla::check::capture::{Action, Capture};
use egmla::config::{DecoderAttention, DecoderConfig};
use egmla::decoder::{
    CpuDecoder, Decoder, DecoderAttentionWeights, DecoderWeights, Logits, ModelFolder, NativeDecoder, TextStream,
    TextTokenizer, Windows, argmax, scored_characters,
};
use egmla::error::{ArgumentError, DataError, TensorError};
use egmla::readback;
use egmla::weights::Checkpoint;
use egmla::{Error, Recording, Storage};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

const VOCAB: usize = 256;

/// Which gate the tiny model has.
#[derive(Clone, Copy, PartialEq)]
enum Gate {
    None,
    UpProjected,
    Latent,
    /// At `up_projected`, by the token embedding.
    Tied,
}

impl Gate {
    const ALL: [Gate; 4] = [Gate::None, Gate::UpProjected, Gate::Latent, Gate::Tied];
}

/// Odd sizes throughout.
fn config(gate: Gate) -> Value {
    let site = if gate == Gate::Latent { "latent" } else { "up_projected" };
    json!({
        "architectures": ["Tiny"], "vocab_size": VOCAB, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3,
        "q_lora_rank": if gate == Gate::Latent { json!(7) } else { Value::Null },
        "kv_lora_rank": 9, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "intermediate_size": 21,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": gate == Gate::UpProjected,
        "embedding_gate": match gate {
            Gate::None => Value::Null,
            Gate::Tied => json!({"tied": true, "activation": "one_plus"}),
            _ => json!({"vocab_size": VOCAB, "embed_dim": 5, "site": site}),
        },
    })
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    data: Vec<f32>,
}

/// Random weights that keep activations of order 1.
fn tensors(gate: Gate) -> Vec<Tensor> {
    let mut random = fastrand::Rng::with_seed(5);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let deviation = match shape {
            [_] => 0.2,
            _ => 2.0 / (shape[1] as f32).sqrt(),
        };
        let centre = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let n = shape.iter().product();
        let data = (0..n).map(|_| centre + deviation * (random.f32() * 2.0 - 1.0)).collect();
        tensors.push(Tensor { name, shape: shape.to_vec(), data });
    };
    let (hidden, latent, rope, heads, nope, value, inner) = (30, 9, 4, 3, 6, 5, 21);
    add("model.embed_tokens.weight".into(), &[VOCAB, hidden]);
    for layer in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
        layer("input_layernorm.weight", &[hidden]);
        layer("post_attention_layernorm.weight", &[hidden]);
        layer("mlp.gate_proj.weight", &[inner, hidden]);
        layer("mlp.up_proj.weight", &[inner, hidden]);
        layer("mlp.down_proj.weight", &[hidden, inner]);
        if gate == Gate::Latent {
            layer("self_attn.q_a_proj.weight", &[7, hidden]);
            layer("self_attn.q_a_layernorm.weight", &[7]);
            layer("self_attn.q_b_proj.weight", &[heads * (nope + rope), 7]);
        } else {
            layer("self_attn.q_proj.weight", &[heads * (nope + rope), hidden]);
        }
        layer("self_attn.kv_a_proj_with_mqa.weight", &[latent + rope, hidden]);
        layer("self_attn.kv_a_layernorm.weight", &[latent]);
        layer("self_attn.kv_b_proj.weight", &[heads * (nope + value), latent]);
        layer("self_attn.o_proj.weight", &[hidden, heads * value]);
        if gate != Gate::None {
            let width = if gate == Gate::Latent { latent } else { heads * (nope + value) };
            let row = if gate == Gate::Tied { hidden } else { 5 };
            if gate != Gate::Tied {
                layer("self_attn.gate_embedding.weight", &[VOCAB, row]);
            }
            layer("self_attn.gate_b_proj.weight", &[width, row]);
            layer("self_attn.gate_norm.weight", &[width]);
            layer("self_attn.gate_norm.bias", &[width]);
        }
    }
    add("model.norm.weight".into(), &[hidden]);
    if gate != Gate::UpProjected {
        add("lm_head.weight".into(), &[VOCAB, hidden]);
    }
    tensors
}

fn serialized(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytemuck::cast_slice(&tensor.data)).unwrap();
        (tensor.name.as_str(), view)
    });
    safetensors::serialize(views, None).unwrap()
}

/// Byte-level, one token a byte.
fn tokenizer() -> Value {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, Value> =
        (0..).zip(alphabet).map(|(id, symbol): (u32, char)| (symbol.to_string(), json!(id))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

/// A whole model folder, changed by `change` before it is written.
fn folder_with(gate: Gate, change: impl FnOnce(&mut Value, &mut Vec<Tensor>, &mut Value)) -> TempDir {
    let dir = TempDir::new().unwrap();
    let (mut config, mut tensors, mut tokenizer) = (config(gate), tensors(gate), tokenizer());
    change(&mut config, &mut tensors, &mut tokenizer);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), serialized(&tensors)).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    dir
}

fn folder(gate: Gate) -> TempDir {
    folder_with(gate, |_, _, _| {})
}

/// Opens and loads; the message of what goes wrong, which is one line and names the file.
fn refusal(dir: &Path, file: &str) -> String {
    let error = ModelFolder::open(dir).and_then(|folder| folder.weights()).expect_err("must be refused");
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    assert!(message.contains(file), "{message}");
    message
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn a_whole_folder_is_read() {
    for gate in Gate::ALL {
        let dir = folder(gate);
        let folder = ModelFolder::open(dir.path()).unwrap();
        let weights = folder.weights().unwrap();
        assert_eq!(weights.layers.len(), 2);
        assert_eq!(weights.lm_head.is_none(), gate == Gate::UpProjected);
    }
}

#[test]
fn tensors_are_checked_by_name_and_shape() {
    let norm = "model.layers.1.post_attention_layernorm.weight";
    let dir = folder_with(Gate::UpProjected, |_, tensors, _| tensors.retain(|tensor| tensor.name != norm));
    assert_says(&refusal(dir.path(), "model.safetensors"), &[norm, "missing", "[30]"]);

    let extra = |name: &str| Tensor { name: name.into(), shape: vec![2, 3], data: vec![0.0; 6] };
    for (name, why) in [
        ("model.layers.2.input_layernorm.weight", "not expected"),
        ("model.layers.0.self_attn.spare", "not expected"),
        // Beside a tied embedding it is one where it has the shape.
        ("lm_head.weight", "expected [256, 30]"),
    ] {
        let dir = folder_with(Gate::UpProjected, |_, tensors, _| tensors.push(extra(name)));
        assert_says(&refusal(dir.path(), "model.safetensors"), &[name, "[2, 3]", why]);
    }

    let dir = folder_with(Gate::None, |_, tensors, _| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name.ends_with("0.mlp.down_proj.weight")).unwrap();
        tensor.shape.reverse();
    });
    assert_says(
        &refusal(dir.path(), "model.safetensors"),
        &["model.layers.0.mlp.down_proj.weight", "[21, 30]", "[30, 21]"],
    );
}

#[test]
fn broken_files_are_refused() {
    let dir = folder(Gate::None);
    let weights = dir.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for kept in [3, 9, 200, whole.len() - 1] {
        std::fs::write(&weights, &whole[..kept]).unwrap();
        assert_says(&refusal(dir.path(), "model.safetensors"), &["not a valid safetensors file"]);
    }
    std::fs::write(&weights, []).unwrap();
    assert_says(&refusal(dir.path(), "model.safetensors"), &["0 bytes"]);
    std::fs::remove_file(&weights).unwrap();
    assert!(
        matches!(ModelFolder::open(dir.path()), Err(Error::File { source, .. }) if matches!(*source, Error::Data(DataError::Io(_))))
    );
    std::fs::create_dir(&weights).unwrap();
    refusal(dir.path(), "model.safetensors");

    let dir = folder(Gate::None);
    std::fs::write(dir.path().join("tokenizer.json"), "{\n\"version\":\n").unwrap();
    assert_says(&refusal(dir.path(), "tokenizer.json"), &["tokenizer"]);
    std::fs::write(dir.path().join("config.json"), "{\"vocab_size\": ").unwrap();
    refusal(dir.path(), "config.json");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refusal(dir.path(), "config.json");
}

#[test]
fn config_is_held_to_what_is_computed() {
    let set = |key: &'static str, value: Value| {
        let dir = folder_with(Gate::UpProjected, |config, _, _| config[key] = value);
        refusal(dir.path(), "config.json")
    };
    assert_says(&set("hidden_sise", json!(3)), &["hidden_sise", "not known"]);
    assert_says(&set("n_routed_experts", json!(64)), &["n_routed_experts"]);
    assert_says(&set("quantization_config", json!({"quant_method": "awq"})), &["quantization_config", "awq"]);
    assert_says(&set("hidden_act", json!("gelu")), &["hidden_act", "gelu"]);
    assert_says(&set("num_hidden_layers", json!(0)), &["num_hidden_layers"]);
    assert_says(&set("intermediate_size", json!(u32::MAX)), &["intermediate_size"]);
    assert_says(&set("vocab_size", json!(300)), &["300", "256"]);
}

#[test]
fn a_tokenizer_beyond_the_vocabulary_is_refused() {
    let dir = folder_with(Gate::None, |_, _, tokenizer| tokenizer["model"]["vocab"]["ab"] = json!(299));
    assert_says(&refusal(dir.path(), "tokenizer.json"), &["300", "256"]);
}

#[test]
fn text_comes_whole_and_complete() {
    let tokenizer = TextTokenizer::from_bytes(tokenizer().to_string().as_bytes()).unwrap();
    let text = "Ö Romeo — ✓ done";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids.len(), text.len(), "a token a byte, and no truncation");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);

    let context = 3;
    let mut stream = TextStream::new(&tokenizer, &ids[..context]).unwrap();
    let mut read = String::new();
    for &id in &ids[context..] {
        let new = stream.push(id).unwrap();
        assert!(!new.contains('\u{fffd}'), "{new:?}");
        read.push_str(&new);
    }
    assert_eq!(read, text[context..]);
    assert_eq!(stream.finish().unwrap(), "");

    // A character that never ends comes out when the text does.
    let mut stream = TextStream::new(&tokenizer, &[]).unwrap();
    let check = tokenizer.encode("✓").unwrap();
    assert_eq!(stream.push(check[0]).unwrap(), "");
    assert_eq!(stream.push(check[1]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");

    assert_eq!(scored_characters(&tokenizer, "Romeo", &tokenizer.encode("Romeo").unwrap()).unwrap(), 4);
    assert_eq!(scored_characters(&tokenizer, "Öd", &tokenizer.encode("Öd").unwrap()).unwrap(), 2);
}

fn load(dir: &Path) -> (DecoderConfig, DecoderWeights) {
    let folder = ModelFolder::open(dir).unwrap();
    (folder.config().clone(), folder.weights().unwrap())
}

fn ids(n: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(9);
    (0..n).map(|_| random.u32(0..VOCAB as u32)).collect()
}

/// `‖a − b‖ / ‖b‖`; NaN anywhere gives NaN, which no bound accepts.
fn error<A: Copy + Into<f64>>(a: &[A], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(&a, b)| (a.into() - b).powi(2)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn the_cpu_form_gives_the_same_whole_and_step_by_step() {
    for gate in Gate::ALL {
        let dir = folder(gate);
        let (config, weights) = load(dir.path());
        let decoder = CpuDecoder::new(&config, &weights).unwrap();
        let ids = ids(20);
        let whole = decoder.forward(&ids, &mut decoder.state(), Logits::All).unwrap();
        for prefilled in [0, 1, 7, 19] {
            let mut state = decoder.state();
            let mut parts = Vec::new();
            if prefilled > 0 {
                parts = decoder.forward(&ids[..prefilled], &mut state, Logits::All).unwrap();
            }
            for &id in &ids[prefilled..] {
                parts.extend(decoder.forward(&[id], &mut state, Logits::Last).unwrap());
            }
            assert!(error(&parts, &whole) < 1e-12);
        }
        // Control: another past token is seen by what follows it.
        let mut changed = ids.clone();
        changed[3] = (changed[3] + 1) % VOCAB as u32;
        let other = decoder.forward(&changed, &mut decoder.state(), Logits::All).unwrap();
        assert_eq!(other[..3 * VOCAB], whole[..3 * VOCAB]);
        assert!(error(&other[5 * VOCAB..], &whole[5 * VOCAB..]) > 1e-3);
    }
}

#[test]
fn the_cpu_form_refuses_what_it_cannot_look_up() {
    let dir = folder(Gate::None);
    let (config, weights) = load(dir.path());
    let decoder = CpuDecoder::new(&config, &weights).unwrap();
    let mut state = decoder.state();
    assert!(matches!(
        decoder.forward(&[], &mut state, Logits::Last),
        Err(Error::Argument(ArgumentError::Empty { .. }))
    ));
    let refused = decoder.forward(&[1, VOCAB as u32], &mut state, Logits::Last);
    assert!(matches!(refused, Err(Error::Argument(ArgumentError::TokenId { index: 1, id: 256, vocab_size: 256 }))));
    assert!(state.is_empty());
}

/// One sequence's new tokens.
fn new<'a>(mode: Mode, counts: &'a [u32], ids: &'a [u32]) -> (Mode, StepTokens<'a>) {
    (mode, StepTokens { counts, ids: Some(ids) })
}

/// Submits one step, once, and reads its logits.
fn step(
    gpu: &common::Gpu,
    decoder: &Decoder,
    cache: &mut egmla::decoder::DecoderCache,
    state: &egmla::decoder::DecoderState,
    new: (Mode, StepTokens<'_>),
    logits: Logits,
) -> Vec<f32> {
    let mut recording = Recording::new(&gpu.kernels);
    let region = decoder.advance(&mut recording, cache, state, new, logits).unwrap();
    readback::submit(&mut recording).unwrap();
    let read = readback::wait(readback::read_f32(&gpu.kernels, &[&region])).unwrap().remove(0);
    gpu.assert_no_errors();
    read
}

#[test]
fn the_device_gives_what_the_cpu_gives() {
    let gpu = common::gpu();
    for gate in Gate::ALL {
        let dir = folder(gate);
        let (config, weights) = load(dir.path());
        let expected_of = |ids: &[u32]| {
            let cpu = CpuDecoder::new(&config, &weights).unwrap();
            cpu.forward(ids, &mut cpu.state(), Logits::All).unwrap()
        };
        let ids = ids(40);
        let expected = expected_of(&ids);
        let row = |t: usize| &expected[t * VOCAB..(t + 1) * VOCAB];
        for (storage, tolerance) in [(Storage::F32, 2e-5), (Storage::F16, 5e-3)] {
            let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(storage)).unwrap();
            let options = CacheOptions { capacity: 40, storage, ..CacheOptions::default() };
            let mut cache = decoder.cache(options).unwrap();
            let state = decoder.state(&cache, true).unwrap();
            let all = step(&gpu, &decoder, &mut cache, &state, new(Mode::Prefill, &[40], &ids), Logits::All);
            let found = error(&all, &expected);
            assert!(found < tolerance, "prefill, {storage:?}: {found}");

            let mut paths = vec![DecodePath::Expanded];
            if gate != Gate::UpProjected {
                paths.push(DecodePath::Absorbed);
            }
            for path in paths {
                cache.reset();
                cache.set_decode_path(path);
                let prompt = new(Mode::Prefill, &[11], &ids[..11]);
                let last = step(&gpu, &decoder, &mut cache, &state, prompt, Logits::Last);
                assert!(error(&last, row(10)) < tolerance);
                for t in 11..40 {
                    let next = new(Mode::Decode, &[1], &ids[t..=t]);
                    let logits = step(&gpu, &decoder, &mut cache, &state, next, Logits::Last);
                    let found = error(&logits, row(t));
                    assert!(found < tolerance, "decode {path:?} at {t}, {storage:?}: {found}");
                }
                assert_eq!(cache.lengths(), [40]);
            }
        }
    }
}

#[test]
fn a_ragged_batch_is_each_sequence_alone() {
    let gpu = common::gpu();
    let dir = folder(Gate::UpProjected);
    let (config, weights) = load(dir.path());
    let cpu = CpuDecoder::new(&config, &weights).unwrap();
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let options = CacheOptions { batch: 3, capacity: 16, max_tokens: 20, ..CacheOptions::default() };
    let mut cache = decoder.cache(options).unwrap();
    let state = decoder.state(&cache, false).unwrap();
    let ids = ids(20);
    let mut states = [cpu.state(), cpu.state(), cpu.state()];
    let steps: [(Mode, [u32; 3]); 4] =
        [(Mode::Prefill, [5, 0, 9]), (Mode::Prefill, [1, 3, 0]), (Mode::Decode, [1, 1, 1]), (Mode::Decode, [0, 1, 0])];
    for (mode, counts) in steps {
        let tokens = counts.iter().sum::<u32>() as usize;
        let got = step(&gpu, &decoder, &mut cache, &state, new(mode, &counts, &ids[..tokens]), Logits::Last);
        let (mut expected, mut first) = (Vec::new(), 0);
        for (state, count) in states.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
            let own = &ids[first..first + count as usize];
            expected.extend(cpu.forward(own, state, Logits::Last).unwrap());
            first += count as usize;
        }
        let found = error(&got, &expected);
        assert!(found < 2e-5, "{counts:?}: {found}");
    }
}

#[test]
fn what_a_step_cannot_do_leaves_recording_and_cache_as_they_were() {
    let gpu = common::gpu();
    let dir = folder(Gate::None);
    let (config, weights) = load(dir.path());
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let mut cache = decoder.cache(CacheOptions { capacity: 8, max_tokens: 4, ..CacheOptions::default() }).unwrap();
    let state = decoder.state(&cache, false).unwrap();
    let mut recording = Recording::new(&gpu.kernels);
    let mut advance = |ids: Option<&[u32]>, mode, count, logits| {
        let tokens = StepTokens { counts: &[count], ids };
        decoder.advance(&mut recording, &mut cache, &state, (mode, tokens), logits)
    };
    let last = Logits::Last;
    // No gate looks at the ids: the decoder does.
    let refused = advance(Some(&[1, 256]), Mode::Prefill, 2, last);
    assert!(
        matches!(refused, Err(Error::Argument(ArgumentError::TokenId { index: 1, id: 256, vocab_size: 256 }))),
        "{refused:?}"
    );
    assert!(matches!(advance(None, Mode::Prefill, 2, last), Err(Error::Argument(ArgumentError::Empty { .. }))));
    assert!(matches!(advance(Some(&[]), Mode::Prefill, 0, last), Err(Error::Argument(ArgumentError::Empty { .. }))));
    assert!(matches!(advance(Some(&[1]), Mode::Prefill, 2, last), Err(Error::Argument(ArgumentError::Count { .. }))));
    assert!(matches!(
        advance(Some(&[1; 5]), Mode::Prefill, 5, last),
        Err(Error::Argument(ArgumentError::OutOfRange { .. }))
    ));
    assert!(matches!(advance(Some(&[1; 9]), Mode::Prefill, 9, last), Err(Error::CacheFull { .. })));
    assert!(matches!(
        advance(Some(&[1; 2]), Mode::Prefill, 2, Logits::All),
        Err(Error::Argument(ArgumentError::OutOfRange { .. }))
    ));
    assert_eq!(recording.dispatches(), 0);
    assert_eq!(cache.lengths(), [0]);

    let gated = folder(Gate::UpProjected);
    let (config, weights) = load(gated.path());
    let other = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let refused = other.advance(&mut recording, &mut cache, &state, new(Mode::Prefill, &[1], &[1]), last);
    assert!(refused.is_err(), "a cache of another model");
    assert_eq!(recording.dispatches(), 0);
    gpu.assert_no_errors();
}

/// The buffers of the gates' embeddings that a decode step reads, layer by layer, by their index.
fn gate_embeddings(gpu: &common::Gpu, gate: Gate) -> Vec<usize> {
    let dir = folder(gate);
    let (config, weights) = load(dir.path());
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let mut cache = decoder.cache(CacheOptions { capacity: 8, ..CacheOptions::default() }).unwrap();
    cache.set_decode_path(DecodePath::Absorbed);
    let state = decoder.state(&cache, false).unwrap();
    let mut recording = Recording::new(&gpu.kernels);
    let new = new(Mode::Decode, &[1], &[7]);
    decoder.advance(&mut recording, &mut cache, &state, new, Logits::None).unwrap();
    let capture = Capture::new(&gpu.kernels, gpu.kernels.context().clone());
    capture.submit(&mut recording).unwrap();
    let of_gates = |action| match action {
        Action::Dispatch { kernel: "gather" | "gate_project", bindings, .. } => {
            bindings.iter().find(|binding| binding.binding == 1).map(|binding| binding.buffer)
        }
        _ => None,
    };
    // The first is the lookup of the token itself.
    capture.take_actions().into_iter().filter_map(of_gates).skip(1).collect()
}

#[test]
fn layers_with_tied_gates_share_one_embedding_on_the_device() {
    let gpu = common::gpu();
    let [first, second] = gate_embeddings(&gpu, Gate::Tied)[..] else { panic!("two layers") };
    assert_eq!(first, second);
    // Control: tables are each layer's own.
    let [first, second] = gate_embeddings(&gpu, Gate::UpProjected)[..] else { panic!("two layers") };
    assert_ne!(first, second);
    gpu.assert_no_errors();
}

#[test]
fn a_tied_embedding_is_the_models_alone_and_of_its_own_layers() {
    let gpu = common::gpu();
    let dir = folder(Gate::Tied);
    let (config, mut weights) = load(dir.path());
    let DecoderAttention::Latent(of_layer) = &config.attention else { panic!("latents") };
    let DecoderAttentionWeights::Latent(layer) = &weights.layers[1].attention else { panic!("latents") };
    let kernels = &gpu.kernels;
    let embedding = TiedEmbedding::new(kernels, of_layer, &weights.embedding, Storage::F32).unwrap();
    assert_eq!(embedding.bytes(), VOCAB as u64 * 32 * 4, "rows of 30 elements, padded to 32");
    let with = |config: &_, storage| {
        Attention::with_tied_embedding(kernels, config, layer, &embedding, common::stored(storage)).map(drop)
    };
    with(of_layer, Storage::F32).unwrap();
    let message = with(of_layer, Storage::F16).unwrap_err().to_string();
    assert_says(&message, &["does not fit the tied embedding of 256 rows of 30 in f32"]);
    let mut smaller = of_layer.clone();
    smaller.gate.as_mut().unwrap().vocab_size = 255;
    assert!(with(&smaller, Storage::F32).is_err());
    // A layer by itself has none to read.
    let missing = Attention::new(kernels, of_layer, layer, common::stored(Storage::F32)).unwrap_err().to_string();
    assert_says(&missing, &["model.embed_tokens.weight", "missing", "[256, 30]"]);
    let other = folder(Gate::UpProjected);
    let DecoderAttention::Latent(with_table) = load(other.path()).0.attention else { panic!("latents") };
    assert!(TiedEmbedding::new(kernels, &with_table, &weights.embedding, Storage::F32).is_err());

    // A layer with one of its own would not read the model's.
    let own = weights.embedding.clone();
    let DecoderAttentionWeights::Latent(layer) = &mut weights.layers[1].attention else { panic!("latents") };
    layer.gate.as_mut().unwrap().embedding = Some(own);
    let options = common::stored(Storage::F32);
    for refused in [
        Decoder::new(kernels, &config, &weights, options).map(drop),
        CpuDecoder::new(&config, &weights).map(drop),
        NativeDecoder::new(&config, weights.clone()).map(drop),
    ] {
        assert_says(&refused.unwrap_err().to_string(), &["model.embed_tokens.weight", "not expected"]);
    }
    gpu.assert_no_errors();
}

#[test]
fn a_tied_embedding_over_a_binding_is_refused() {
    // 256 rows of 32 floats.
    let limits = egmla::wgpu::Limits { max_storage_buffer_binding_size: 16 << 10, ..Default::default() };
    let gpu = common::gpu_with(limits);
    let new = |gate| {
        let dir = folder(gate);
        let (config, weights) = load(dir.path());
        Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).map(drop)
    };
    let refused = new(Gate::Tied).unwrap_err();
    assert_says(&refused.to_string(), &["model.embed_tokens.weight", "32768", "16384"]);
    // The embedding itself, without a tied gate, is cut.
    new(Gate::UpProjected).unwrap();
}

#[test]
fn the_memory_report_counts_the_decoders_buffers() {
    let gpu = common::gpu();
    let dir = folder(Gate::UpProjected);
    let (config, weights) = load(dir.path());
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let options = CacheOptions { capacity: 32, max_tokens: 8, ..CacheOptions::default() };
    let cache = decoder.cache(options).unwrap();
    let report = |all_logits| decoder.state(&cache, all_logits).unwrap().memory(&cache);
    let (last, all) = (report(false), report(true));
    assert_eq!(all.workspace - last.workspace, 7 * VOCAB as u64 * 4, "seven more rows of logits");
    assert_eq!(all.latent, 2 * 32 * 16 * 4, "2 layers, 32 rows of 9 elements, padded to 16");
    assert!(last.workspace > 8 * (3 * 30 + 3 * 21) * 4);
}

/// The committed model, against what PyTorch said of it.
struct Golden {
    config: DecoderConfig,
    weights: DecoderWeights,
    token_ids: Vec<u32>,
    logits: Vec<f64>,
    greedy: Vec<u32>,
}

/// A missing model is a failure: a test that compared nothing must not pass.
fn golden() -> Golden {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/shakespeare");
    let (config, weights) = load(&dir);
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let integers = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let logits = tensors.tensor("logits").unwrap();
    let wide = logits.dtype() == Dtype::F64;
    let logits = match wide {
        true => logits.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        false => logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
    };
    Golden { config, weights, token_ids: integers("token_ids"), logits, greedy: integers("greedy_ids") }
}

#[test]
fn the_committed_model_on_the_cpu_is_pytorchs() {
    let golden = golden();
    let decoder = CpuDecoder::new(&golden.config, &golden.weights).unwrap();
    let mut state = decoder.state();
    let logits = decoder.forward(&golden.token_ids, &mut state, Logits::All).unwrap();
    let found = error(&logits, &golden.logits);
    println!("relative error {found:e}");
    assert!(found < 1e-9, "{found}");
    let vocab = golden.config.vocab_size as usize;
    let mut last: Vec<f32> = logits[logits.len() - vocab..].iter().map(|&logit| logit as f32).collect();
    let mut written = Vec::new();
    for _ in &golden.greedy {
        let id = argmax(&last).unwrap();
        written.push(id);
        last = decoder.forward(&[id], &mut state, Logits::Last).unwrap().iter().map(|&logit| logit as f32).collect();
    }
    assert_eq!(written, golden.greedy);
}

#[test]
fn the_committed_model_on_the_device_is_pytorchs() {
    let golden = golden();
    let gpu = common::gpu();
    let n = golden.token_ids.len();
    for (storage, tolerance) in [(Storage::F32, 2e-5), (Storage::F16, 5e-3)] {
        let decoder = Decoder::new(&gpu.kernels, &golden.config, &golden.weights, common::stored(storage)).unwrap();
        let capacity = (n + golden.greedy.len()) as u32;
        let mut cache = decoder.cache(CacheOptions { capacity, storage, ..CacheOptions::default() }).unwrap();
        let state = decoder.state(&cache, true).unwrap();
        let counts = [n as u32];
        let prompt = new(Mode::Prefill, &counts, &golden.token_ids);
        let logits = step(&gpu, &decoder, &mut cache, &state, prompt, Logits::All);
        let found = error(&logits, &golden.logits);
        println!("{storage:?}: relative error {found:e}");
        assert!(found < tolerance, "{storage:?}: {found}");
        if storage == Storage::F16 {
            continue;
        }
        let mut last = logits[logits.len() - golden.config.vocab_size as usize..].to_vec();
        let mut written = Vec::new();
        for _ in &golden.greedy {
            let id = argmax(&last).unwrap();
            written.push(id);
            last = step(&gpu, &decoder, &mut cache, &state, new(Mode::Decode, &[1], &[id]), Logits::Last);
        }
        assert_eq!(written, golden.greedy);
    }
}

#[test]
fn a_checkpoint_without_tensors_misses_the_first() {
    let bytes = serialized(&[]);
    let config = DecoderConfig::from_json(&config(Gate::None).to_string()).unwrap();
    let refused = DecoderWeights::load(&Checkpoint::new(&bytes).unwrap(), &config);
    assert!(
        matches!(refused, Err(Error::Tensor(TensorError::Missing { name, .. })) if name == "model.embed_tokens.weight")
    );
    assert_eq!(Windows::new(0, 4).count() + Windows::new(1, 4).count(), 0);
}
