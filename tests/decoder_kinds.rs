//! Decoders of every kind of attention and with scales around the layers: the device against the CPU's f64 form, and that against
//! what scales mean.
#![cfg(feature = "decoder")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use egmla::attention::{AttentionOptions, CacheOptions, DecodePath, Mode, StepTokens};
use egmla::config::{DecoderAttention, DecoderConfig, DecoderScales};
use egmla::decoder::{
    CpuDecoder, Decoder, DecoderAttentionWeights, DecoderCache, DecoderLayerWeights, DecoderState, DecoderWeights,
    Logits,
};
use egmla::error::TensorError;
use egmla::random::{Random, attention_weights, gqa_weights};
use egmla::readback;
use egmla::weights::{Checkpoint, HostTensor};
use egmla::{Error, Recording, Storage, wgpu};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const VOCAB: usize = 97;

fn with(base: Value, changes: Value) -> DecoderConfig {
    let mut all = base;
    all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    DecoderConfig::from_json(&all.to_string()).unwrap()
}

fn base(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"
    })
}

fn latents(model_type: &str) -> Value {
    let mut all = base(model_type);
    let of_latents =
        json!({"kv_lora_rank": 9, "q_lora_rank": 7, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5});
    all.as_object_mut().unwrap().extend(of_latents.as_object().unwrap().clone());
    all
}

fn configs() -> Vec<(&'static str, DecoderConfig)> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let grouped = json!({"num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500000.0, "rope_scaling": llama3,
        "tie_word_embeddings": true});
    let window = json!({"num_key_value_heads": 1, "sliding_window": null});
    vec![
        ("llama", with(base("llama"), grouped)),
        ("llama, biases", with(base("llama"), json!({"attention_bias": true}))),
        ("mistral", with(base("mistral"), window)),
        ("qwen2", with(base("qwen2"), json!({"num_key_value_heads": 3, "tie_word_embeddings": true}))),
        ("youtu", with(latents("youtu"), json!({"tie_word_embeddings": true}))),
        ("minicpm3", with(latents("minicpm3"), json!({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 10}))),
        ("qwen3", with(base("qwen3"), json!({"num_key_value_heads": 3, "head_dim": 10}))),
        ("minicpm3, untied", with(latents("minicpm3"), json!({"scale_emb": 0.3, "tie_word_embeddings": false}))),
    ]
}

/// Random weights that keep activations of order 1.
fn weights(config: &DecoderConfig) -> DecoderWeights {
    let mut random = Random::new(5);
    let mut make = |name: &str, shape: &[u32]| {
        let shape: Vec<usize> = shape.iter().map(|&extent| extent as usize).collect();
        let n = shape.iter().product();
        let data = match shape[..] {
            [_] => random.values(n, 0.1).iter().map(|x| 1.0 + x).collect(),
            _ => random.values(n, (*shape.last().unwrap() as f32).sqrt().recip()),
        };
        HostTensor { name: name.to_owned(), shape, data }
    };
    let (hidden, inner, vocab) = (config.attention.hidden_size(), config.intermediate_size, config.vocab_size);
    let attention = |layer: u32| match &config.attention {
        DecoderAttention::Latent(of) => {
            let mut weights = attention_weights(of, true, layer.into()).unwrap();
            if of.gate.as_ref().is_some_and(|gate| gate.tied) {
                weights.gate.iter_mut().for_each(|gate| gate.embedding = None);
            }
            DecoderAttentionWeights::Latent(weights)
        }
        DecoderAttention::Heads(of) => DecoderAttentionWeights::Heads(gqa_weights(of, layer.into()).unwrap()),
    };
    DecoderWeights {
        embedding: make("model.embed_tokens.weight", &[vocab, hidden]),
        layers: (0..config.n_layer)
            .map(|layer| DecoderLayerWeights {
                input_norm: make("input_layernorm.weight", &[hidden]),
                attention: attention(layer),
                post_attention_norm: make("post_attention_layernorm.weight", &[hidden]),
                gate_proj: make("mlp.gate_proj.weight", &[inner, hidden]),
                up_proj: make("mlp.up_proj.weight", &[inner, hidden]),
                down_proj: make("mlp.down_proj.weight", &[hidden, inner]),
            })
            .collect(),
        norm: make("model.norm.weight", &[hidden]),
        lm_head: (!config.tie_word_embeddings).then(|| make("lm_head.weight", &[vocab, hidden])),
    }
}

/// ‖got − expected‖ over ‖expected‖.
fn error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let apart: f64 = got.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    (apart / expected.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

fn step(
    gpu: &common::Gpu,
    decoder: &Decoder,
    (cache, state): (&mut DecoderCache, &DecoderState),
    (mode, counts, ids): (Mode, &[u32], &[u32]),
    logits: Logits,
) -> Vec<f32> {
    let mut recording = Recording::new(&gpu.kernels);
    let tokens = StepTokens { counts, ids: Some(ids) };
    let region = decoder.advance(&mut recording, cache, state, (mode, tokens), logits).unwrap();
    readback::submit(&mut recording).unwrap();
    let read = readback::wait(readback::read_f32(&gpu.kernels, &[&region])).unwrap().remove(0);
    gpu.assert_no_errors();
    read
}

/// What `required_limits` says is enough to load a model and to record a step, and four bytes less are not.
#[test]
fn required_limits_are_the_least_that_a_model_needs() {
    let tied = json!({"site": "up_projected", "tied": true, "activation": "one_plus", "norm": "none"});
    let egmla = json!({"embedding_gate": tied, "tie_word_embeddings": true, "intermediate_size": 40_000});
    let llama = json!({"num_key_value_heads": 2, "vocab_size": 40_000, "tie_word_embeddings": true});
    let rows = 1000;
    for (config, all_logits, needed) in [
        (with(latents("egmla"), egmla), false, 40_000 * rows * 4),
        (with(base("llama"), llama.clone()), true, 40_000 * rows * 4),
        (with(base("llama"), llama), false, 0),
    ] {
        let weights = weights(&config);
        let cache = CacheOptions { capacity: rows as u32, max_tokens: 2 * rows as u32, ..CacheOptions::default() };
        let built = |limits: wgpu::Limits| -> egmla::Result<usize> {
            let kernels = common::noop(limits);
            let decoder = Decoder::new(&kernels, &config, &weights, AttentionOptions::default())?;
            let mut cache = decoder.cache(cache)?;
            let state = decoder.state(&cache, all_logits)?;
            let mut recording = Recording::new(&kernels);
            let tokens = StepTokens { counts: &[rows as u32], ids: Some(&vec![3; rows as usize]) };
            let logits = if all_logits { Logits::All } else { Logits::Last };
            decoder.advance(&mut recording, &mut cache, &state, (Mode::Prefill, tokens), logits)?;
            Ok(recording.dispatches())
        };
        let limits = config.required_limits(AttentionOptions::default(), &cache, all_logits).unwrap();
        let default = wgpu::Limits::default();
        assert_eq!(
            limits,
            wgpu::Limits {
                max_storage_buffer_binding_size: needed.max(default.max_storage_buffer_binding_size),
                ..default
            }
        );
        assert!(built(limits.clone()).unwrap() > 0);
        if needed > 0 {
            let refused = built(wgpu::Limits { max_storage_buffer_binding_size: needed - 4, ..limits });
            assert!(matches!(refused, Err(Error::Limit { needed: of, .. }) if of == needed), "{refused:?}");
        }
    }
}

#[test]
fn the_device_gives_what_the_cpu_gives() {
    let gpu = common::gpu();
    let ids = Random::new(6).ids(40, VOCAB as u32);
    for (name, config) in configs() {
        let weights = weights(&config);
        let cpu = CpuDecoder::new(&config, &weights).unwrap();
        let expected = cpu.forward(&ids, &mut cpu.state(), Logits::All).unwrap();
        let row = |t: usize| &expected[t * VOCAB..(t + 1) * VOCAB];
        // As for the decoder of latents alone (tests/decoder.rs).
        for (storage, tolerance) in [(Storage::F32, 2e-5), (Storage::F16, 5e-3)] {
            let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(storage)).unwrap();
            let mut cache = decoder.cache(CacheOptions { capacity: 40, storage, ..CacheOptions::default() }).unwrap();
            let state = decoder.state(&cache, true).unwrap();
            let all = step(&gpu, &decoder, (&mut cache, &state), (Mode::Prefill, &[40], &ids), Logits::All);
            let found = error(&all, &expected);
            println!("{name}, {storage:?}: {found:e}");
            assert!(found < tolerance, "{name}, {storage:?}, prefill: {found:e}");
            // Roll back, then go on token by token.
            cache.truncate(0, 31).unwrap();
            cache.set_decode_path(DecodePath::Absorbed);
            for t in 31..40 {
                let last = step(&gpu, &decoder, (&mut cache, &state), (Mode::Decode, &[1], &ids[t..=t]), Logits::Last);
                let found = error(&last, row(t));
                assert!(found < tolerance, "{name}, {storage:?}, decode at {t}: {found:e}");
            }
            assert_eq!(cache.lengths(), [40]);
            let heads = matches!(config.attention, DecoderAttention::Heads(_));
            assert_eq!(state.memory(&cache).keys_and_values > 0, heads, "{name}");
        }
    }
}

/// A prefix is computed once: saved, restored, copied and grown, it goes on as the CPU does, whatever the kind of attention.
#[test]
fn sequences_move() {
    let gpu = common::gpu();
    let ids = Random::new(8).ids(24, VOCAB as u32);
    let mut caches = Vec::new();
    for index in [0, 4] {
        let (name, config) = configs().remove(index);
        let weights = weights(&config);
        let cpu = CpuDecoder::new(&config, &weights).unwrap();
        let expected = cpu.forward(&ids, &mut cpu.state(), Logits::All).unwrap();
        let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
        let options = |batch| CacheOptions { batch, capacity: 24, ..CacheOptions::default() };
        let mut prefix = decoder.cache(options(1)).unwrap();
        let state = decoder.state(&prefix, false).unwrap();
        step(&gpu, &decoder, (&mut prefix, &state), (Mode::Prefill, &[20], &ids[..20]), Logits::None);
        let regions = prefix.sequence_regions(0).unwrap();
        let rows = readback::wait(readback::read(&gpu.kernels, &regions.iter().collect::<Vec<_>>())).unwrap();
        let saved = prefix.save_sequence(0, &rows).unwrap();
        let mut cache = decoder.cache(options(3)).unwrap();
        let mut recording = Recording::new(&gpu.kernels);
        cache.restore_sequence(&mut recording, 0, &saved).unwrap();
        cache.copy_sequence(&mut recording, 0, 1).unwrap();
        cache.copy_sequence_from(&mut recording, 2, &prefix, 0).unwrap();
        cache.grow(&mut recording, 30).unwrap();
        readback::submit(&mut recording).unwrap();
        assert_eq!((cache.lengths(), cache.options().capacity), (&[20; 3][..], 30));
        let state = decoder.state(&cache, false).unwrap();
        for t in 20..24 {
            let of_each = (Mode::Decode, &[1; 3][..], &[ids[t]; 3][..]);
            let last = step(&gpu, &decoder, (&mut cache, &state), of_each, Logits::Last);
            for last in last.chunks(VOCAB) {
                let found = error(last, &expected[t * VOCAB..][..VOCAB]);
                assert!(found < 2e-5, "{name} at {t}: {found:e}");
            }
        }
        caches.push((cache, saved));
    }
    let [(heads, of_heads), (latents, of_latents)] = &mut caches[..] else { unreachable!() };
    let mut recording = Recording::new(&gpu.kernels);
    let error = heads.copy_sequence_from(&mut recording, 0, latents, 0).unwrap_err().to_string();
    assert!(error.contains("another kind"), "{error}");
    for (cache, bytes) in [(heads, of_latents), (latents, of_heads)] {
        let error = cache.restore_sequence(&mut recording, 0, bytes).unwrap_err().to_string();
        assert!(error.contains("another kind"), "{error}");
        assert_eq!((cache.lengths(), recording.dispatches()), (&[24; 3][..], 0));
    }
}

#[test]
fn a_ragged_batch_is_each_sequence_alone() {
    let gpu = common::gpu();
    let (_, config) = configs().remove(0);
    let weights = weights(&config);
    let cpu = CpuDecoder::new(&config, &weights).unwrap();
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let options = CacheOptions { batch: 3, capacity: 16, max_tokens: 20, ..CacheOptions::default() };
    let mut cache = decoder.cache(options).unwrap();
    let state = decoder.state(&cache, false).unwrap();
    let ids = Random::new(7).ids(20, VOCAB as u32);
    let mut states = [cpu.state(), cpu.state(), cpu.state()];
    let steps: [(Mode, [u32; 3]); 4] =
        [(Mode::Prefill, [5, 0, 9]), (Mode::Prefill, [1, 3, 0]), (Mode::Decode, [1, 1, 1]), (Mode::Decode, [0, 1, 0])];
    for (mode, counts) in steps {
        let tokens = counts.iter().sum::<u32>() as usize;
        let got = step(&gpu, &decoder, (&mut cache, &state), (mode, &counts, &ids[..tokens]), Logits::Last);
        let (mut expected, mut first) = (Vec::new(), 0);
        for (state, count) in states.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
            let own = &ids[first..first + count as usize];
            expected.extend(cpu.forward(own, state, Logits::Last).unwrap());
            first += count as usize;
        }
        let found = error(&got, &expected);
        assert!(found < 2e-5, "{counts:?}: {found:e}");
    }
}

/// A model with scales is one without whose embedding, output projections and head are scaled.
#[test]
fn scales_are_factors_on_weights() {
    let (_, config) = configs().pop().unwrap();
    let scales = config.scales;
    assert_eq!(scales, DecoderScales { embedding: 0.3, residual: 1.4 / 2f64.sqrt(), logits: 256.0 / 36.0 });
    let scaled = weights(&config);
    let mut plain = scaled.clone();
    let times = |tensor: &mut HostTensor, factor: f64| {
        tensor.data.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    };
    times(&mut plain.embedding, scales.embedding);
    times(plain.lm_head.as_mut().unwrap(), scales.logits);
    for layer in &mut plain.layers {
        times(&mut layer.down_proj, scales.residual);
        let DecoderAttentionWeights::Latent(attention) = &mut layer.attention else { panic!("latents") };
        times(&mut attention.o_proj, scales.residual);
    }
    let ids = Random::new(8).ids(12, VOCAB as u32);
    let logits = |config: &DecoderConfig, weights: &DecoderWeights| {
        let decoder = CpuDecoder::new(config, weights).unwrap();
        decoder.forward(&ids, &mut decoder.state(), Logits::All).unwrap()
    };
    let expected = logits(&DecoderConfig { scales: DecoderScales::default(), ..config.clone() }, &plain);
    let got: Vec<f32> = logits(&config, &scaled).iter().map(|&logit| logit as f32).collect();
    // The scaled weights were rounded to f32.
    let found = error(&got, &expected);
    assert!(found < 1e-6, "{found:e}");
    let without = logits(&DecoderConfig { scales: DecoderScales::default(), ..config }, &scaled);
    assert!(error(&got, &without) > 0.1, "scales that have no effect prove nothing");
}

/// The tensors of a model with keys and values per head, as a checkpoint.
fn serialized(weights: &DecoderWeights) -> Vec<u8> {
    let mut all = vec![(String::new(), &weights.embedding), (String::new(), &weights.norm)];
    all.extend(weights.lm_head.iter().map(|head| (String::new(), head)));
    for (number, layer) in weights.layers.iter().enumerate() {
        let DecoderAttentionWeights::Heads(of) = &layer.attention else { panic!("heads") };
        let prefix = format!("model.layers.{number}.");
        let attention = [&of.q_proj, &of.k_proj, &of.v_proj, &of.o_proj];
        let biases = [&of.q_bias, &of.k_bias, &of.v_bias, &of.o_bias];
        all.extend(
            attention.into_iter().chain(biases.into_iter().flatten()).map(|t| (format!("{prefix}self_attn."), t)),
        );
        let rest = [&layer.input_norm, &layer.post_attention_norm, &layer.gate_proj, &layer.up_proj, &layer.down_proj];
        all.extend(rest.map(|tensor| (prefix.clone(), tensor)));
    }
    let views = all.iter().map(|(prefix, tensor)| {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytemuck::cast_slice(&tensor.data)).unwrap();
        (format!("{prefix}{}", tensor.name), view)
    });
    safetensors::serialize(views, None).unwrap()
}

/// Weights go to the device part by part: the host never holds many of them, and what is computed is the same to the bit.
#[test]
fn a_model_is_loaded_layer_by_layer() {
    let gpu = common::gpu();
    let changes =
        json!({"num_key_value_heads": 2, "attention_bias": true, "num_hidden_layers": 12, "intermediate_size": 700});
    let config = with(base("llama"), changes);
    let weights = weights(&config);
    let bytes = serialized(&weights);
    let checkpoint = || Checkpoint::new(&bytes).unwrap();
    let options = common::stored(Storage::F32);
    let whole = Decoder::new(&gpu.kernels, &config, &weights, options).unwrap();
    let mut loaded = None;
    let used = allocation_counter::measure(|| {
        loaded = Some(Decoder::load(&gpu.kernels, &config, &checkpoint(), options).unwrap());
    });
    let all = allocation_counter::measure(|| drop(DecoderWeights::load(&checkpoint(), &config).unwrap()));
    // A layer as it was read: its tensors are stored row by row, in memory of the device.
    let of_layer = bytes.len() as u64 / 12;
    println!("{} bytes, {} of the whole, {} of a layer", used.bytes_max, all.bytes_max, of_layer);
    assert!(all.bytes_max > bytes.len() as u64 * 9 / 10, "{all:?}: was anything counted?");
    assert!(used.bytes_max < 2 * of_layer, "{} of {}", used.bytes_max, bytes.len());
    let ids = Random::new(9).ids(9, VOCAB as u32);
    let logits = |decoder: &Decoder| {
        let mut cache = decoder.cache(CacheOptions { capacity: 9, ..CacheOptions::default() }).unwrap();
        let state = decoder.state(&cache, true).unwrap();
        step(&gpu, decoder, (&mut cache, &state), (Mode::Prefill, &[9], &ids), Logits::All)
    };
    assert_eq!(logits(&whole), logits(&loaded.unwrap()));

    // What does not belong there is found, whatever has been uploaded before.
    let shorter = DecoderConfig { n_layer: 11, ..config.clone() };
    let extra = Decoder::load(&gpu.kernels, &shorter, &checkpoint(), options).map(drop).unwrap_err();
    assert!(
        matches!(&extra, Error::Tensor(TensorError::Extra { name, .. }) if name.starts_with("model.layers.11.")),
        "{extra}"
    );
    let longer = DecoderConfig { n_layer: 13, ..config };
    let missing = Decoder::load(&gpu.kernels, &longer, &checkpoint(), options).map(drop).unwrap_err();
    assert!(
        matches!(&missing, Error::Tensor(TensorError::Missing { name, .. }) if name.starts_with("model.layers.12.")),
        "{missing}"
    );
    gpu.assert_no_errors();
}

/// Embedding, head and feed-forward part of two or three shards each, the last a ragged one: to the bit what one binding gives.
#[test]
fn matrices_over_a_binding_are_computed_in_shards() {
    const BINDING: u64 = 32 << 10;
    const VOCAB: u32 = 300;
    let sizes = json!({"vocab_size": VOCAB, "hidden_size": 60, "intermediate_size": 270, "num_attention_heads": 1});
    let sized = |mut base: Value, changes: Value| {
        base.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
        with(base, changes)
    };
    let untied = json!({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 10, "tie_word_embeddings": false});
    let configs = [
        ("heads, untied", sized(base("llama"), json!({"head_dim": 10}))),
        ("latents, tied", sized(latents("youtu"), json!({"tie_word_embeddings": true}))),
        ("latents with scales, untied", sized(latents("minicpm3"), untied)),
    ];
    let limits = wgpu::Limits { max_storage_buffer_binding_size: BINDING, ..wgpu::Limits::default() };
    let (whole, small) = (common::gpu(), common::gpu_with(limits));
    // Rows of 64 floats: shards of 128 in f32, of 256 in f16. Its first row, both sides of every border, and the last.
    let mut ids = vec![0, 127, 128, 129, 254, 255, 256, 257, VOCAB - 1];
    ids.extend(Random::new(10).ids(11, VOCAB));
    for (name, config) in &configs {
        let weights = weights(config);
        for (storage, dispatches) in [(Storage::F32, 2 + 2 + 2 * (2 + 2 + 2)), (Storage::F16, 1 + 1 + 2 * (1 + 1 + 1))]
        {
            let options =
                CacheOptions { capacity: 24, max_tokens: 24, decode_tokens: 2, storage, ..CacheOptions::default() };
            let run = |gpu: &common::Gpu| {
                let decoder = Decoder::new(&gpu.kernels, config, &weights, common::stored(storage)).unwrap();
                let mut cache = decoder.cache(options).unwrap();
                let state = decoder.state(&cache, true).unwrap();
                let mut recording = Recording::new(&gpu.kernels);
                let tokens = StepTokens { counts: &[20], ids: Some(&ids) };
                let prepared = decoder.prepare(&mut cache, Mode::Prefill, tokens).unwrap();
                decoder.forward(&mut recording, &cache, &prepared, &state, Logits::All).unwrap();
                let mut step = |mode, ids: &[u32], wanted| {
                    step(gpu, &decoder, (&mut cache, &state), (mode, &[ids.len() as u32], ids), wanted)
                };
                let mut logits = step(Mode::Prefill, &ids, Logits::All);
                logits.extend(step(Mode::Decode, &ids[3..5], Logits::Last));
                logits.extend(step(Mode::Decode, &ids[6..7], Logits::Last));
                (recording.dispatches(), logits)
            };
            let (few, expected) = run(&whole);
            let (many, got) = run(&small);
            assert_eq!(many - few, dispatches, "{name}, {storage:?}: a dispatch for each further shard");
            assert_eq!(got.len(), 22 * VOCAB as usize);
            let differs = got.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{name}, {storage:?}");
        }
    }
    // Logits are in one buffer, and a shard has eight rows at least.
    let limit = |result: egmla::Result<()>| match result.unwrap_err() {
        Error::Limit { what, needed, allowed: BINDING, .. } => (what, needed),
        other => panic!("{other}"),
    };
    let (_, config) = &configs[0];
    let decoder = Decoder::new(&small.kernels, config, &weights(config), common::stored(Storage::F32)).unwrap();
    let options = CacheOptions { capacity: 28, max_tokens: 28, ..CacheOptions::default() };
    let cache = decoder.cache(options).unwrap();
    let (what, needed) = limit(decoder.state(&cache, true).map(drop));
    assert!(what.contains("`logits` of [28, 300]") && needed == 28 * 300 * 4, "{what}: {needed}");
    decoder.state(&cache, false).unwrap();
    let wide = DecoderConfig { intermediate_size: 2000, ..config.clone() };
    let refused = Decoder::new(&small.kernels, &wide, &weights(&wide), common::stored(Storage::F32));
    let (what, needed) = limit(refused.map(drop));
    assert!(what.contains("down_proj") && needed == 8 * 2000 * 4, "{what}: {needed}");
    small.assert_no_errors();
}

/// Tensors of a Llama checkpoint, by their names there.
#[test]
fn a_llama_checkpoint_is_read_by_its_names() {
    let config = with(base("llama"), json!({"num_key_value_heads": 2, "attention_bias": true}));
    let shapes = |skip: &str| {
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, 36]),
            ("model.norm.weight".to_owned(), vec![36]),
            ("lm_head.weight".to_owned(), vec![VOCAB, 36]),
        ];
        for layer in 0..2 {
            for (name, shape) in [
                ("input_layernorm.weight", vec![36]),
                ("post_attention_layernorm.weight", vec![36]),
                ("mlp.gate_proj.weight", vec![50, 36]),
                ("mlp.up_proj.weight", vec![50, 36]),
                ("mlp.down_proj.weight", vec![36, 50]),
                ("self_attn.q_proj.weight", vec![36, 36]),
                ("self_attn.k_proj.weight", vec![12, 36]),
                ("self_attn.v_proj.weight", vec![12, 36]),
                ("self_attn.o_proj.weight", vec![36, 36]),
                ("self_attn.q_proj.bias", vec![36]),
                ("self_attn.k_proj.bias", vec![12]),
                ("self_attn.v_proj.bias", vec![12]),
                ("self_attn.o_proj.bias", vec![36]),
            ] {
                all.push((format!("model.layers.{layer}.{name}"), shape));
            }
        }
        all.retain(|(name, _)| name != skip);
        all
    };
    let load = |skip: &str, config: &DecoderConfig| {
        let all: Vec<_> = shapes(skip);
        let data = vec![0u8; 4 * VOCAB * 36];
        let views = all.iter().map(|(name, shape)| {
            let bytes = 4 * shape.iter().product::<usize>();
            (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), &data[..bytes]).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        DecoderWeights::load(&Checkpoint::new(&bytes).unwrap(), config)
    };
    let weights = load("", &config).unwrap();
    assert!(matches!(&weights.layers[1].attention, DecoderAttentionWeights::Heads(of) if of.o_bias.is_some()));
    let missing = load("model.layers.1.self_attn.v_proj.bias", &config).unwrap_err();
    assert!(
        matches!(&missing, Error::Tensor(TensorError::Missing { name, .. }) if name == "model.layers.1.self_attn.v_proj.bias"),
        "{missing}"
    );
    // Without the key, the biases have no place.
    let unbiased = with(base("llama"), json!({"num_key_value_heads": 2}));
    let extra = load("", &unbiased).unwrap_err();
    assert!(matches!(&extra, Error::Tensor(TensorError::Extra { name, .. }) if name.ends_with(".bias")), "{extra}");
    // Weights of latents in a model of heads, and the other way round.
    let latent = configs().remove(4).1;
    assert!(CpuDecoder::new(&config, &self::weights(&latent)).is_err());
    let gpu = common::gpu();
    assert!(Decoder::new(&gpu.kernels, &latent, &weights, common::stored(Storage::F32)).is_err());
    let decoder = Decoder::new(&gpu.kernels, &config, &weights, common::stored(Storage::F32)).unwrap();
    let other = Decoder::new(&gpu.kernels, &latent, &self::weights(&latent), common::stored(Storage::F32)).unwrap();
    let mut cache = other.cache(CacheOptions { capacity: 8, ..CacheOptions::default() }).unwrap();
    let state = other.state(&cache, false).unwrap();
    let mut recording = Recording::new(&gpu.kernels);
    let tokens = StepTokens { counts: &[1], ids: Some(&[1]) };
    let refused =
        decoder.advance(&mut recording, &mut cache, &state, (Mode::Prefill, tokens), Logits::Last).unwrap_err();
    assert!(refused.to_string().contains("another kind"), "{refused}");
    assert_eq!((recording.dispatches(), cache.lengths()), (0, &[0][..]));
}
