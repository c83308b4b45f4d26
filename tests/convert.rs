//! Conversion to latents: identities of the rotation and of the latent, gates, the written folder.
#![cfg(feature = "convert")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use egmla::Recording;
use egmla::attention::{AttentionOptions, CacheOptions, Mode, StepTokens};
use egmla::config::{DecoderAttention, DecoderConfig, GqaConfig};
use egmla::convert::{
    Activations, Calibration, Conversion, GateKind, Gates, LatentLayer, LayerOptions, Matrix, Mixing, Progress,
    SourceLayer, convert_layer, convert_layer_with, latent_config,
};
use egmla::decoder::{CpuDecoder, Decoder, DecoderWeights, Logits, ModelFolder, NativeDecoder, TextRules};
use egmla::random::{Random, gqa_weights};
use egmla::readback;
use egmla::reference::{History, Layer, matmul, rms_norm, rope, rotations, swiglu};
use egmla::weights::{Checkpoint, GqaWeights, HostTensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 36;
const HEADS: usize = 6;
const GROUPS: usize = 3;
const WIDTH: usize = 8;
const VOCAB: usize = 40;
const INNER: usize = 20;
const LAYERS: usize = 2;

/// Gates of each kind.
const KINDS: [GateKind; 2] = [TABLE, GateKind::Tied];
const TABLE: GateKind = GateKind::Table { embed_dim: 8 };

/// Of the latent's joint vector, with one rotated slice.
const JOINT: usize = (GROUPS - 1) * WIDTH + GROUPS * WIDTH;

fn config_json(interleave: bool) -> Value {
    json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": true,
        "rope_theta": 500.0, "rope_interleave": interleave,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    })
}

/// A small Llama of random weights.
struct Model {
    config: DecoderConfig,
    attention: Vec<GqaWeights>,
    /// Per layer: both norms, then gate, up and down.
    around: Vec<[HostTensor; 5]>,
    embedding: HostTensor,
    norm: HostTensor,
}

impl Model {
    fn new(interleave: bool) -> Self {
        Self::of(config_json(interleave))
    }

    /// The same with biases on all four projections, several times larger than a random layer's.
    fn biased() -> Self {
        let mut config = config_json(false);
        config["attention_bias"] = json!(true);
        let mut model = Self::of(config);
        for weights in &mut model.attention {
            let GqaWeights { q_bias, k_bias, v_bias, o_bias, .. } = weights;
            for bias in [q_bias, k_bias, v_bias, o_bias] {
                bias.as_mut().unwrap().data.iter_mut().for_each(|value| *value *= 8.0);
            }
        }
        model
    }

    fn of(config: Value) -> Self {
        let config = DecoderConfig::from_json(&config.to_string()).unwrap();
        let mut random = Random::new(7);
        let mut tensor = |name: &str, shape: &[usize]| {
            let n = shape.iter().product();
            let data = match shape {
                [_] => random.values(n, 0.1).iter().map(|x| 1.0 + x).collect(),
                _ => random.values(n, 1.5 / (shape[1] as f32).sqrt()),
            };
            HostTensor { name: name.to_owned(), shape: shape.to_vec(), data }
        };
        let around = (0..LAYERS).map(|_| {
            [
                tensor("input_layernorm.weight", &[HIDDEN]),
                tensor("post_attention_layernorm.weight", &[HIDDEN]),
                tensor("mlp.gate_proj.weight", &[INNER, HIDDEN]),
                tensor("mlp.up_proj.weight", &[INNER, HIDDEN]),
                tensor("mlp.down_proj.weight", &[HIDDEN, INNER]),
            ]
        });
        let around = around.collect();
        let embedding = tensor("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
        let norm = tensor("model.norm.weight", &[HIDDEN]);
        let DecoderAttention::Heads(heads) = &config.attention else { panic!("keys and values per head") };
        let attention = (0..LAYERS as u64).map(|layer| gqa_weights(heads, 11 + layer).unwrap()).collect();
        Model { config, attention, around, embedding, norm }
    }

    fn heads(&self) -> &GqaConfig {
        let DecoderAttention::Heads(heads) = &self.config.attention else { panic!("keys and values per head") };
        heads
    }

    /// Logits of every token in f64, with attention as given: layer and normed hidden states to its output.
    fn logits(&self, ids: &[u32], mut attention: impl FnMut(usize, &Matrix) -> Matrix) -> Vec<f64> {
        let table = self.embedding.to_f64();
        let mut stream: Vec<f64> =
            ids.iter().flat_map(|&id| &table[id as usize * HIDDEN..][..HIDDEN]).copied().collect();
        let eps = self.config.rms_norm_eps;
        for (layer, [norm, post, gate, up, down]) in self.around.iter().enumerate() {
            let normed = rms_norm(&stream, Some(&norm.to_f64()), HIDDEN, eps);
            let out = attention(layer, &Matrix::of(normed, HIDDEN));
            stream.iter_mut().zip(&out.data).for_each(|(value, delta)| *value += delta);
            let normed = rms_norm(&stream, Some(&post.to_f64()), HIDDEN, eps);
            let of = |w: &HostTensor| matmul(&normed, &w.to_f64(), None, ids.len(), HIDDEN, INNER);
            let inner = swiglu(&of(gate), &of(up));
            let out = matmul(&inner, &down.to_f64(), None, ids.len(), INNER, HIDDEN);
            stream.iter_mut().zip(&out).for_each(|(value, delta)| *value += delta);
        }
        let normed = rms_norm(&stream, Some(&self.norm.to_f64()), HIDDEN, eps);
        matmul(&normed, &table, None, ids.len(), HIDDEN, VOCAB)
    }

    /// Logits of the source, and what each layer's attention does on the way.
    fn run(&self, ids: &[u32]) -> (Vec<f64>, Vec<Activations>) {
        let mut seen = Vec::new();
        let logits = self.logits(ids, |layer, hidden| {
            let (out, keys, values) = SourceLayer::new(self.heads().clone(), &self.attention[layer]).forward(hidden);
            seen.push(Activations { keys, values, ids: ids.to_vec(), starts: vec![0] });
            out
        });
        (logits, seen)
    }

    /// A folder of the source.
    fn write(&self, dir: &Path) {
        let mut tensors = vec![self.embedding.clone(), self.norm.clone()];
        for (layer, around) in self.around.iter().enumerate() {
            let GqaWeights { q_proj, q_bias, k_proj, k_bias, v_proj, v_bias, o_proj, o_bias, .. } =
                &self.attention[layer];
            for tensor in around {
                tensors.push(HostTensor { name: format!("model.layers.{layer}.{}", tensor.name), ..tensor.clone() });
            }
            for tensor in [q_proj, k_proj, v_proj, o_proj]
                .into_iter()
                .chain([q_bias, k_bias, v_bias, o_bias].into_iter().flatten())
            {
                let name = format!("model.layers.{layer}.self_attn.{}", tensor.name);
                tensors.push(HostTensor { name, ..tensor.clone() });
            }
        }
        let views = tensors.iter().map(|tensor| {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytemuck::cast_slice(&tensor.data));
            (tensor.name.as_str(), view.unwrap())
        });
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

fn ids(tokens: usize) -> Vec<u32> {
    Random::new(3).ids(tokens, VOCAB as u32)
}

fn options(rank: usize, rope_slices: usize) -> LayerOptions {
    LayerOptions { rank, rope_slices, sink_weight: 10.0 }
}

/// Largest difference over the largest magnitude.
fn error(found: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let largest = wanted.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

/// Latent layers of a model, converted by `of`.
fn layers(
    model: &Model,
    seen: &[Activations],
    of: impl Fn(&GqaWeights, &Activations) -> LatentLayer,
) -> Vec<LatentLayer> {
    model.attention.iter().zip(seen).map(|(weights, seen)| of(weights, seen)).collect()
}

#[test]
fn with_every_slice_rotated_the_logits_are_those_of_the_source() {
    for (model, interleave) in [(Model::new(false), false), (Model::new(true), true), (Model::biased(), false)] {
        let ids = ids(30);
        let (wanted, seen) = model.run(&ids);
        let all = options(GROUPS * WIDTH, GROUPS);
        let convert = |weights: &GqaWeights, seen: &Activations| {
            convert_layer(model.heads(), weights, seen, &all, None).unwrap().0
        };
        let converted = layers(&model, &seen, convert);
        assert_eq!(converted[0].config.d_nope, 0);
        let found = model.logits(&ids, |layer, hidden| converted[layer].forward(hidden, &ids));
        let found = error(&found, &wanted);
        assert!(found < 1e-10, "{found}");

        // The halves of a pair mixed each in its own way do not turn like one.
        let apart = layers(&model, &seen, |weights, seen| {
            let mixing = Mixing::principal(model.heads(), seen).unwrap();
            let mut channels = mixing.channels().to_vec();
            let half = if interleave { 1 } else { WIDTH / 2 };
            let other = if interleave { 2 } else { 1 };
            channels[half] = mixing.channels()[other].clone();
            let mixing = Mixing::new(GROUPS, channels);
            convert_layer_with(model.heads(), weights, seen, &all, None, &mixing).unwrap().0
        });
        let found = model.logits(&ids, |layer, hidden| apart[layer].forward(hidden, &ids));
        let found = error(&found, &wanted);
        assert!(found > 1e-3, "{found}");
    }
}

/// Attention whose keys, mixed over the heads, are rotated in the first `slices` only; by its definition.
fn partly_rotated(config: &GqaConfig, weights: &GqaWeights, mixing: &Mixing, slices: usize, hidden: &Matrix) -> Matrix {
    let tokens = hidden.rows;
    let GqaWeights { q_proj, q_bias, k_proj, k_bias, v_proj, v_bias, o_proj, o_bias, .. } = weights;
    let f64_of = |bias: &Option<HostTensor>| bias.as_ref().map(HostTensor::to_f64);
    let of = |(w, bias): (&HostTensor, &Option<HostTensor>)| {
        matmul(&hidden.data, &w.to_f64(), f64_of(bias).as_deref(), tokens, HIDDEN, w.shape[0])
    };
    let [q, k, v] = [(q_proj, q_bias), (k_proj, k_bias), (v_proj, v_bias)].map(of);
    let turns = rotations(&config.rope, WIDTH, &(0..tokens as u32).collect::<Vec<_>>());
    let at = |channel: usize, head: usize, slice: usize| mixing.channels()[channel].row(head)[slice];
    let turned = |mut rows: Vec<f64>, slice: usize| {
        if slice < slices {
            rope(&mut rows, &turns, 1, WIDTH, WIDTH, config.rope.interleave);
        }
        rows
    };
    let mut attended = vec![0.0; tokens * HEADS * WIDTH];
    for head in 0..HEADS {
        let group = head / (HEADS / GROUPS);
        let mut scores = vec![0.0; tokens * tokens];
        for slice in 0..GROUPS {
            let each = |value: &dyn Fn(usize, usize) -> f64| {
                (0..tokens).flat_map(|t| (0..WIDTH).map(move |c| (t, c))).map(|(t, c)| value(t, c)).collect()
            };
            let queries: Vec<f64> = each(&|t, c| at(c, group, slice) * q[(t * HEADS + head) * WIDTH + c]);
            let keys: Vec<f64> =
                each(&|t, c| (0..GROUPS).map(|other| at(c, other, slice) * k[(t * GROUPS + other) * WIDTH + c]).sum());
            let (queries, keys) = (turned(queries, slice), turned(keys, slice));
            let more = matmul(&queries, &keys, None, tokens, WIDTH, tokens);
            scores.iter_mut().zip(more).for_each(|(score, more)| *score += config.scale() * more);
        }
        for t in 0..tokens {
            let weights: Vec<f64> = (0..=t).map(|j| scores[t * tokens + j].exp()).collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..WIDTH {
                attended[(t * HEADS + head) * WIDTH + c] = weights
                    .iter()
                    .enumerate()
                    .map(|(j, weight)| weight / sum * v[(j * GROUPS + group) * WIDTH + c])
                    .sum();
            }
        }
    }
    let out = matmul(&attended, &o_proj.to_f64(), f64_of(o_bias).as_deref(), tokens, HEADS * WIDTH, HIDDEN);
    Matrix::of(out, HIDDEN)
}

#[test]
fn at_full_rank_nothing_but_rotation_is_lost() {
    for (slices, model) in [(1, Model::new(false)), (2, Model::new(false)), (1, Model::biased()), (2, Model::biased())]
    {
        let ids = ids(30);
        let (source, seen) = model.run(&ids);
        let full = options((GROUPS - slices) * WIDTH + GROUPS * WIDTH, slices);
        let convert = |options: &LayerOptions| {
            layers(&model, &seen, |weights, seen| {
                let (layer, lost) = convert_layer(model.heads(), weights, seen, options, None).unwrap();
                assert!(options.rank < full.rank || lost.lost < 1e-20);
                layer
            })
        };
        let wanted = model.logits(&ids, |layer, hidden| {
            let mixing = Mixing::principal(model.heads(), &seen[layer]).unwrap();
            partly_rotated(model.heads(), &model.attention[layer], &mixing, slices, hidden)
        });
        let of = |layers: Vec<LatentLayer>| model.logits(&ids, |layer, hidden| layers[layer].forward(hidden, &ids));
        let found = error(&of(convert(&full)), &wanted);
        assert!(found < 1e-10, "{slices} slices: {found}");
        let less = error(&of(convert(&options(full.rank - 12, slices))), &wanted);
        assert!(less > 1e-3, "a lower rank changes something: {less}");
        assert!(error(&wanted, &source) > 1e-3, "and so does a rotation that is left out");
    }
}

/// A first position that is unlike all others, and little of the whole.
fn with_sink(seen: &Activations) -> Activations {
    let mut seen = seen.clone();
    let mut random = Random::new(9);
    let deviation = (seen.keys.energy() / seen.keys.data.len() as f64).sqrt() as f32;
    for part in [&mut seen.keys, &mut seen.values] {
        let row: Vec<f64> = random.values(part.cols, 1.5 * deviation).into_iter().map(f64::from).collect();
        part.row_mut(0).copy_from_slice(&row);
    }
    seen
}

#[test]
fn weighted_first_positions_are_kept() {
    let model = Model::new(false);
    let (_, seen) = model.run(&ids(60));
    let seen = with_sink(&seen[0]);
    let gates = KINDS.map(|kind| Gates::new(&model.embedding, kind, &seen.ids, &seen.starts).unwrap());
    for gates in [None, Some(&gates[0]), Some(&gates[1])] {
        let lost = |sink_weight: f64| {
            let options = LayerOptions { rank: 12, rope_slices: 1, sink_weight };
            convert_layer(model.heads(), &model.attention[0], &seen, &options, gates).unwrap().1.lost_of_first
        };
        let (weighted, plain) = (lost(10.0), lost(0.0));
        assert!(weighted < plain / 20.0, "{weighted} of {plain}");
    }
}

#[test]
fn gates_at_full_rank_are_the_layer_without_them_and_need_the_bias() {
    for model in [Model::new(false), Model::biased()] {
        let ids = ids(40);
        let (_, seen) = model.run(&ids);
        let hidden = Matrix::of(Random::new(5).values(20 * HIDDEN, 1.0).into_iter().map(f64::from).collect(), HIDDEN);
        let (weights, seen) = (&model.attention[0], &seen[0]);
        let (plain, _) = convert_layer(model.heads(), weights, seen, &options(JOINT, 1), None).unwrap();
        let wanted = plain.forward(&hidden, &ids[..20]);
        for kind in KINDS {
            let gates = Gates::new(&model.embedding, kind, &seen.ids, &seen.starts).unwrap();
            let (gated, lost) =
                convert_layer(model.heads(), weights, seen, &options(JOINT + 1, 1), Some(&gates)).unwrap();
            let found = error(&gated.forward(&hidden, &ids[..20]).data, &wanted.data);
            assert!(found < 1e-10 && lost.lost < 1e-20, "{found}, {lost:?}");

            // In f32, by the definition of the layer.
            let mut rounded = with_embedding(&gated, &model.embedding);
            let run = |weights: &egmla::AttentionWeights| {
                let layer = Layer::new(gated.config.clone(), weights).unwrap();
                error(&layer.forward(&hidden.data, &ids[..20], &mut History::default()), &wanted.data)
            };
            assert!(run(&rounded) < 1e-4, "{}", run(&rounded));
            rounded.o_bias.as_mut().unwrap().data.fill(0.0);
            assert!(run(&rounded) > 0.1, "{}", run(&rounded));
        }
    }
}

/// A layer's weights, with the model's embedding where its gate is tied.
fn with_embedding(layer: &LatentLayer, embedding: &HostTensor) -> egmla::AttentionWeights {
    let mut weights = layer.weights();
    weights.gate.iter_mut().for_each(|gate| {
        gate.embedding.get_or_insert_with(|| embedding.clone());
    });
    weights
}

/// A layer in f64 and the definition of what is written of it: gates that hold something, by the model's embedding.
#[test]
fn a_layer_with_gates_is_what_its_weights_say() {
    let model = Model::new(false);
    let (_, seen) = model.run(&ids(60));
    let hidden = Matrix::of(Random::new(5).values(20 * HIDDEN, 1.0).into_iter().map(f64::from).collect(), HIDDEN);
    for kind in KINDS {
        let gates = Gates::new(&model.embedding, kind, &seen[0].ids, &seen[0].starts).unwrap();
        let (layer, _) =
            convert_layer(model.heads(), &model.attention[0], &seen[0], &options(12, 1), Some(&gates)).unwrap();
        let weights = with_embedding(&layer, &model.embedding);
        let ids = ids(20);
        let found =
            Layer::new(layer.config.clone(), &weights).unwrap().forward(&hidden.data, &ids, &mut History::default());
        // Keys and values carry an offset of 8 times their size, rounded to f32 like the weights.
        let found = error(&found, &layer.forward(&hidden, &ids).data);
        assert!(found < 1e-4, "{kind:?}: {found}");
    }
}

#[test]
fn gates_hold_what_token_ids_explain() {
    let model = Model::new(false);
    let weights = &model.attention[0];
    // Hidden states that are the token's embedding and a little of the context.
    let ids = ids(400);
    let noise = Random::new(21).values(ids.len() * HIDDEN, 0.3);
    let states: Vec<f64> = ids
        .iter()
        .flat_map(|&id| &model.embedding.data[id as usize * HIDDEN..][..HIDDEN])
        .zip(&noise)
        .map(|(value, noise)| f64::from(value / 0.25 + noise))
        .collect();
    let hidden = Matrix::of(states, HIDDEN);
    let (_, keys, values) = SourceLayer::new(model.heads().clone(), weights).forward(&hidden);
    let seen = Activations { keys, values, ids: ids.clone(), starts: vec![0] };
    let table = GateKind::Table { embed_dim: JOINT as u32 };
    let gates = [table, GateKind::Tied].map(|kind| Gates::new(&model.embedding, kind, &ids, &[0]).unwrap());
    let (full, _) = convert_layer(model.heads(), weights, &seen, &options(JOINT, 1), None).unwrap();
    let wanted = full.forward(&hidden, &ids);
    let of = |gates: Option<&Gates>| {
        let (layer, lost) = convert_layer(model.heads(), weights, &seen, &options(8, 1), gates).unwrap();
        (error(&layer.forward(&hidden, &ids).data, &wanted.data), lost.lost)
    };
    let (plain, plain_lost) = of(None);
    // Of a tied gate what is lost is told without the token's id: 40 ids for a regression on 36 features.
    for (gates, less) in gates.iter().zip([4.0, 3.0]) {
        let (gated, gated_lost) = of(Some(gates));
        let found = format!("{gated} of {plain}, {gated_lost} of {plain_lost}");
        assert!(gated < plain / 2.0 && gated_lost < plain_lost / less, "{found}");
    }
}

#[test]
fn what_is_not_converted_is_refused() {
    let model = Model::new(false);
    let gate = |embed_dim| Some(GateKind::Table { embed_dim }.config(VOCAB as u32, HIDDEN as u32));
    let tied = Some(GateKind::Tied.config(VOCAB as u32, HIDDEN as u32));
    let refused = |config: &GqaConfig, options: &LayerOptions, gate| {
        latent_config(config, options, gate).unwrap_err().to_string()
    };
    let heads = model.heads();
    assert_eq!(refused(heads, &options(0, 1), None), format!("rank is 0, must be 1 to {JOINT}"));
    assert_eq!(refused(heads, &options(JOINT + 1, 1), None), format!("rank is {}, must be 1 to {JOINT}", JOINT + 1));
    assert_eq!(refused(heads, &options(1, 1), gate(4)), format!("rank is 1, must be 2 to {}", JOINT + 1));
    assert_eq!(refused(heads, &options(1, 1), tied), format!("rank is 1, must be 2 to {}", JOINT + 1));
    assert_eq!(refused(heads, &options(9, 1), gate(99)), format!("embed-dim is 99, must be 1 to {JOINT}"));
    assert_eq!(refused(heads, &options(9, 0), None), "rope-slices is 0, must be 1 to 3");
    let normed = GqaConfig { qk_norm_eps: Some(1e-6), ..heads.clone() };
    assert!(refused(&normed, &options(9, 1), None).contains("norms every head of queries and keys"));
}

/// Byte-level, one token for each of the first letters.
fn tokenizer(vocab_size: u32) -> String {
    let vocab: Map<String, Value> =
        (0..vocab_size).map(|id| (char::from_u32(0x41 + id).unwrap().to_string(), json!(id))).collect();
    json!({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "A"}})
        .to_string()
}

/// Converts `model` in `source` to `output`, until `stop` layers are done.
fn convert(
    model: &Model,
    source: &Path,
    output: &Path,
    gate: Option<GateKind>,
    stop: Option<u32>,
) -> egmla::Result<bool> {
    model.write(source);
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::new(&bytes).unwrap();
    let (calibration, tokenizer) =
        (Calibration::new(&ids(100), &[], 100, 40, VOCAB as u32).unwrap(), tokenizer(VOCAB as u32));
    let rules = TextRules {
        eos_token_ids: vec![2],
        chat_template: Some("{{ bos_token }}".to_owned()),
        special_tokens: BTreeMap::from([("bos_token".to_owned(), "A".to_owned())]),
    };
    let conversion = Conversion {
        config: &model.config,
        checkpoint: &checkpoint,
        calibration: &calibration,
        options: options(20, 1),
        gate,
        tokenizer: tokenizer.as_bytes(),
        origin: json!({"model": "random"}),
        rules: &rules,
    };
    let made = conversion.run(output, |progress| match (progress, stop) {
        (Progress::Layers(done, _), Some(stop)) => done < stop,
        _ => true,
    })?;
    Ok(made.is_some())
}

#[test]
fn a_written_folder_runs_on_cpu_and_device() {
    let gpu = common::gpu();
    // With gates keys and values carry an offset of 8 times their size, and round so much coarser.
    for (model, gate, tolerance) in [
        (Model::new(false), None, 2e-5),
        (Model::new(false), Some(TABLE), 2e-4),
        (Model::new(false), Some(GateKind::Tied), 2e-4),
        (Model::biased(), None, 2e-5),
    ] {
        let (source, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(convert(&model, source.path(), output.path(), gate, None).unwrap());
        let folder = ModelFolder::open(output.path()).unwrap();
        let weights = folder.weights().unwrap();
        assert_eq!(folder.config().attention.cache_elements() as usize, 20 + WIDTH);
        let cpu = CpuDecoder::new(folder.config(), &weights).unwrap();
        let ids = ids(30);
        let wanted = cpu.forward(&ids, &mut cpu.state(), Logits::All).unwrap();

        let decoder = Decoder::new(&gpu.kernels, folder.config(), &weights, AttentionOptions::default()).unwrap();
        let mut cache = decoder.cache(CacheOptions { capacity: 30, ..CacheOptions::default() }).unwrap();
        let state = decoder.state(&cache, true).unwrap();
        let mut recording = Recording::new(&gpu.kernels);
        let new = (Mode::Prefill, StepTokens { counts: &[30], ids: Some(&ids) });
        let region = decoder.advance(&mut recording, &mut cache, &state, new, Logits::All).unwrap();
        readback::submit(&mut recording).unwrap();
        let read = readback::wait(readback::read_f32(&gpu.kernels, &[&region])).unwrap().remove(0);
        gpu.assert_no_errors();
        let read: Vec<f64> = read.into_iter().map(f64::from).collect();
        let found = error(&read, &wanted);
        assert!(found < tolerance, "{gate:?}: {found}");
        let native = NativeDecoder::new(folder.config(), weights).unwrap();
        let read = native.forward(&ids, &mut native.state(30), Logits::All).unwrap();
        let found = error(&read.into_iter().map(f64::from).collect::<Vec<_>>(), &wanted);
        assert!(found < tolerance, "{gate:?} on the CPU: {found}");

        let made: Value =
            serde_json::from_slice(&std::fs::read(output.path().join("conversion.json")).unwrap()).unwrap();
        assert_eq!(made["rank"], 20);
        assert_eq!(
            (&made["gate"], &made["embed_dim"]),
            (&json!(gate.map(GateKind::name)), &json!(gate.and_then(GateKind::embed_dim)))
        );
        assert_eq!(made["origin"]["model"], "random");
        assert_eq!(made["layers"].as_array().unwrap().len(), LAYERS);
        let config: Value = serde_json::from_slice(&std::fs::read(output.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(folder.rules().eos_token_ids, [2]);
        assert_eq!(folder.chat_template(), Some("{{ bos_token }}"));
        assert_eq!(folder.rules().special_tokens["bos_token"], "A");
        // transformers warns of a length with a decimal point.
        assert_eq!(config["rope_scaling"]["original_max_position_embeddings"].as_u64(), Some(32));
        assert!(!output.path().join("conversion-work").exists());
    }
}

#[test]
fn a_stopped_conversion_goes_on() {
    let model = Model::new(true);
    for gate in [None, Some(TABLE), Some(GateKind::Tied)] {
        let [source, whole, stopped] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let run = |output: &Path, gate, stop| convert(&model, source.path(), output, gate, stop);
        assert!(run(whole.path(), gate, None).unwrap());
        assert!(!run(stopped.path(), gate, Some(1)).unwrap());
        assert!(!stopped.path().join("config.json").exists());
        for other in [None, Some(TABLE), Some(GateKind::Table { embed_dim: 5 }), Some(GateKind::Tied)] {
            if other != gate {
                let refused = run(stopped.path(), other, None).unwrap_err().to_string();
                assert!(refused.contains("another source, text or options"), "{refused}");
            }
        }
        assert!(run(stopped.path(), gate, None).unwrap());
        for file in ["config.json", "model.safetensors", "tokenizer.json", "conversion.json"] {
            let [whole, stopped] = [&whole, &stopped].map(|folder| std::fs::read(folder.path().join(file)).unwrap());
            assert!(whole == stopped, "{file}");
        }
        // A finished folder is other content.
        let refused = run(stopped.path(), gate, None).unwrap_err().to_string();
        assert!(refused.contains("holds other content"), "{refused}");
        // A damaged work file is no state.
        let damaged = tempfile::tempdir().unwrap();
        assert!(!run(damaged.path(), gate, Some(1)).unwrap());
        let stream = damaged.path().join("conversion-work/stream-0001");
        let mut bytes = std::fs::read(&stream).unwrap();
        bytes[9] ^= 1;
        std::fs::write(&stream, bytes).unwrap();
        let refused = run(damaged.path(), gate, None).unwrap_err().to_string();
        assert!(refused.contains("stream-0001: is damaged"), "{refused}");
    }
}

/// One layer against `tests/golden/offset_gates/make.py`, which fits it by code of its own: what is lost of the calibration text, and
/// keys and values of single tokens, among them the first and one whose id the text does not hold. Of a tied gate it sees, each by more
/// than its tolerance: another eps, P of the whole regression, first positions with a gate of 1 or without weight, rows within P,
/// what embeddings have in common left in the gate, latents without A / (a + m), m of the channels alone, rows shrunk to means.
#[test]
fn a_layer_with_offset_gates_is_that_of_an_independent_fit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/offset_gates/case.json");
    let case: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let of = |name: &str| -> Vec<f64> { serde_json::from_value(case[name].clone()).unwrap() };
    let rows = |name: &str| -> Vec<Vec<f64>> { serde_json::from_value(case[name].clone()).unwrap() };
    let matrix = |name: &str| Matrix::of(rows(name).concat(), rows(name)[0].len());
    let tensor = |name: &str| {
        let Matrix { rows, cols, data } = matrix(name);
        let data = data.into_iter().map(|value| value as f32).collect();
        HostTensor { name: format!("{name}.weight"), shape: vec![rows, cols], data }
    };
    let hidden = matrix("hidden");
    let ids: Vec<u32> = of("ids").into_iter().map(|id| id as u32).collect();
    let starts: Vec<usize> = of("starts").into_iter().map(|at| at as usize).collect();
    let config =
        GqaConfig { hidden_size: 12, n_head: 4, n_kv_head: 2, head_dim: 4, ..Model::new(false).heads().clone() };
    let [q_proj, k_proj, v_proj, o_proj] = ["q_proj", "k_proj", "v_proj", "o_proj"].map(tensor);
    let weights = GqaWeights { q_proj, k_proj, v_proj, o_proj, ..gqa_weights(&config, 1).unwrap() };
    let (_, keys, values) = SourceLayer::new(config.clone(), &weights).forward(&hidden);
    let seen = Activations { keys, values, ids, starts };
    let options = LayerOptions { rank: of("rank")[0] as usize, rope_slices: 1, sink_weight: of("sink_weight")[0] };
    for (kind, suffix) in [(GateKind::Table { embed_dim: of("embed_dim")[0] as u32 }, ""), (GateKind::Tied, "_tied")] {
        let gates = Gates::new(&tensor("embedding"), kind, &seen.ids, &seen.starts).unwrap();
        let (layer, lost) = convert_layer(&config, &weights, &seen, &options, Some(&gates)).unwrap();
        // f32 of the weights, times sums of a dozen: the inputs have three decimals, of which f32 holds seven digits.
        for (found, wanted) in [lost.lost, lost.lost_of_first].into_iter().zip(of(&format!("lost{suffix}"))) {
            assert!((found - wanted).abs() < 1e-6, "{kind:?}: {found}, not {wanted}");
        }

        let made = layer.weights();
        let (down, up) = (made.kv_a_proj.to_f64(), made.kv_b_proj.to_f64());
        let (bias, gate) = (made.kv_a_bias.unwrap().to_f64(), made.gate.unwrap());
        assert_eq!(gate.embedding.is_none(), kind == GateKind::Tied);
        let table = match gate.embedding {
            Some(table) => table.to_f64(),
            None => rms_norm(&matrix("embedding").data, None, 12, 1e-6),
        };
        let (projection, offset) = (gate.b_proj.to_f64(), of(&format!("offset{suffix}")));
        for (chosen, wanted) in rows("chosen").iter().zip(rows(&format!("keys_and_values{suffix}"))) {
            let (token, id) = (chosen[0] as usize, chosen[1] as usize);
            let latent = matmul(hidden.row(token), &down, Some(&bias), 1, 12, bias.len());
            let of_latent = matmul(&latent[..options.rank], &up, None, 1, options.rank, offset.len());
            let d_gate = gates.config().d_gate as usize;
            let factors = matmul(&table[id * d_gate..][..d_gate], &projection, None, 1, d_gate, offset.len());
            for (at, wanted) in wanted.iter().enumerate() {
                let found = of_latent[at] * (1.0 + factors[at]) - offset[at];
                let here = format!("{kind:?}, token {token}, id {id}: {found}, not {wanted}");
                assert!((found - wanted).abs() < 1e-5 * offset[at], "{here}");
            }
        }
    }
}

/// A folder of tests/golden/transformers: a model, and what Hugging Face transformers computes of it.
struct Transformers {
    folder: std::path::PathBuf,
    expected: Vec<u8>,
}

impl Transformers {
    fn new(kind: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/transformers").join(kind);
        let expected = std::fs::read(folder.join("expected.safetensors")).unwrap();
        Transformers { folder, expected }
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.expected).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.bytes(name).as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    /// Of every one of `token_ids`.
    fn logits(&self, name: &str) -> Vec<f64> {
        self.bytes(name).as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }

    fn config(&self) -> DecoderConfig {
        DecoderConfig::from_json(&std::fs::read_to_string(self.folder.join("config.json")).unwrap()).unwrap()
    }

    /// The same logits by the reference, of this configuration and checkpoint.
    fn computed(&self, config: &DecoderConfig, folder: &Path) -> Vec<f64> {
        let weights = DecoderWeights::load(&Checkpoint::open(folder).unwrap(), config).unwrap();
        let decoder = CpuDecoder::new(config, &weights).unwrap();
        decoder.forward(&self.ids("token_ids"), &mut decoder.state(), Logits::All).unwrap()
    }
}

#[test]
fn models_with_keys_and_values_per_head_are_those_of_transformers() {
    for kind in ["llama", "qwen2", "qwen3"] {
        let case = Transformers::new(kind);
        // Both in f64.
        let found = error(&case.computed(&case.config(), &case.folder), &case.logits("logits"));
        assert!(found < 1e-12, "{kind}: {found}");
    }
}

#[test]
fn a_written_folder_is_what_transformers_computes_of_it() {
    for kind in ["llama", "qwen2"] {
        let case = Transformers::new(kind);
        let (config, checkpoint) = (case.config(), Checkpoint::open(&case.folder).unwrap());
        let tokenizer = tokenizer(config.vocab_size);
        let conversion = Conversion {
            config: &config,
            checkpoint: &checkpoint,
            calibration: &Calibration::new(&case.ids("calibration"), &[], 200, 64, config.vocab_size).unwrap(),
            options: options(12, 1),
            gate: None,
            tokenizer: tokenizer.as_bytes(),
            origin: Value::Null,
            rules: &TextRules::default(),
        };
        let output = tempfile::tempdir().unwrap();
        let made = conversion.run(output.path(), |_| true).unwrap().unwrap();
        let found = case.computed(&made.config, output.path());
        let wanted = case.logits("converted");
        // The folder that was loaded there was written on another machine: sums in another order round a weight to the f32 beside it.
        assert!(error(&found, &wanted) < 1e-6, "{kind}: {}", error(&found, &wanted));
        let lost = error(&found, &case.logits("logits"));
        assert!(lost > 1e-2, "{kind}: the conversion changes something: {lost}");
    }
}

#[test]
fn calibration_sequences_are_taken_evenly_from_the_text() {
    let text: Vec<u32> = (0..100).collect();
    let of = |prefix: &[u32], tokens| {
        let calibration = Calibration::new(&text, prefix, tokens, 10, 100).unwrap();
        (calibration.ids().to_vec(), calibration.starts().to_vec())
    };
    let range = |first: u32, end: u32| (first..end).collect::<Vec<u32>>();
    assert_eq!(of(&[], 20), ([range(0, 10), range(50, 60)].concat(), vec![0, 10]));
    // The last one is cut; a prefix takes its place in each sequence.
    assert_eq!(of(&[], 25), ([range(0, 10), range(30, 40), range(60, 65)].concat(), vec![0, 10, 20]));
    assert_eq!(of(&[99], 20), ([vec![99], range(0, 9), vec![99], range(54, 63)].concat(), vec![0, 10]));
    // A text that is no longer than what is asked for is taken whole.
    assert_eq!(of(&[], 1000), (text.clone(), range(0, 10).into_iter().map(|n| 10 * n as usize).collect()));
}
