//! The f64 reference against hand-computed values, the identities of the definition (each with a control that must
//! fail) and the golden cases. No GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// One range is one token's rows here, never a list of numbers.
#![allow(clippy::single_range_in_vec_init)]

use std::ops::Range;
use std::path::Path;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use egmla::config::{
    Activation, AttentionConfig, GateConfig, GateNorm, GateSite, QueryScaling, RopeConfig, RopeScaling,
};
use egmla::random::{Random, attention_weights};
use egmla::reference::{
    Attended, Heads, History, Layer, Partial, activate, attention_absorbed, attention_combine, attention_decode,
    attention_prefill, cache_append, cache_copy, cache_read, gate, gather, layer_norm, matmul, residual_add, rms_norm,
    rope, rotations, swiglu,
};
use egmla::weights::{AttentionWeights, Checkpoint, HostTensor, QueryWeights};
use safetensors::SafeTensors;

// ---------------------------------------------------------------------------------------------------- helpers

const VOCAB: u32 = 11;
const HEADS: Heads = Heads { n_head: 3, n_kv_head: 3, d_nope: 6, d_rope: 4, d_value: 5 };

fn mla() -> AttentionConfig {
    AttentionConfig {
        hidden_size: 23,
        n_head: 3,
        d_latent: 10,
        d_nope: 6,
        d_rope: 4,
        d_value: 5,
        ..AttentionConfig::default()
    }
}

fn egmla(site: GateSite, activation: Activation, norm: GateNorm) -> AttentionConfig {
    let gate = GateConfig { vocab_size: VOCAB, d_gate: 7, tied: false, site, activation, norm, norm_eps: 1e-5 };
    AttentionConfig { gate: Some(gate), ..mla() }
}

/// Layers of every gate, and MLA with the shapes that are special: low-rank query, biases, no rotary part, no content.
fn every_config() -> Vec<AttentionConfig> {
    let mut configs = vec![
        mla(),
        AttentionConfig { d_q_latent: Some(8), attention_bias: true, ..mla() },
        AttentionConfig { d_rope: 0, ..egmla(GateSite::UpProjected, Activation::Silu, GateNorm::LayerNorm) },
        AttentionConfig { d_nope: 0, ..egmla(GateSite::UpProjected, Activation::Identity, GateNorm::LayerNorm) },
    ];
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for activation in Activation::ALL {
            configs.extend(GateNorm::ALL.map(|norm| egmla(site, activation, norm)));
        }
    }
    configs.iter().for_each(|config| config.validate().unwrap());
    configs
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn normal(seed: u64, n: usize) -> Vec<f64> {
    widen(&Random::new(seed).values(n, 1.0))
}

fn hidden(config: &AttentionConfig, tokens: usize) -> Vec<f64> {
    normal(99, tokens * config.hidden_size as usize)
}

fn ids(tokens: usize) -> Vec<u32> {
    Random::new(7).ids(tokens, VOCAB)
}

fn layer(config: &AttentionConfig, seed: u64) -> Layer {
    Layer::new(config.clone(), &attention_weights(config, true, seed).unwrap()).unwrap()
}

fn run(layer: &Layer, hidden: &[f64], ids: &[u32]) -> Vec<f64> {
    layer.forward(hidden, ids, &mut History::default())
}

/// `‖a − b‖ / ‖b‖`; NaN counts as infinitely far.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
    if distance.is_nan() { f64::INFINITY } else { distance }
}

fn assert_close(a: &[f64], b: &[f64]) {
    let distance = distance(a, b);
    assert!(distance < 1e-12, "relative distance {distance:e}");
}

fn assert_far(a: &[f64], b: &[f64]) {
    let distance = distance(a, b);
    assert!(distance > 1e-2, "control passes: relative distance {distance:e}");
}

/// The rows of a matrix in another order: `new[i] = old[order[i]]`.
fn permute_rows(tensor: &mut HostTensor, order: &[usize]) {
    let width = tensor.data.len() / order.len();
    tensor.data = order.iter().flat_map(|&i| tensor.data[i * width..][..width].to_vec()).collect();
}

/// The blocks of `width` rows of each head, for heads in another order.
fn head_rows(order: &[usize], width: usize) -> Vec<usize> {
    order.iter().flat_map(|head| head * width..(head + 1) * width).collect()
}

/// Rows of ±a with a² = 0.5625e-6: the eps of 1e-6 makes ±0.6 of them, not ±1.
#[test]
fn a_tied_gate_reads_token_embeddings_over_their_root_mean_square() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        let table = egmla(site, Activation::Silu, GateNorm::None);
        let wide = GateConfig { d_gate: table.hidden_size, ..table.gate.clone().unwrap() };
        let table = AttentionConfig { gate: Some(wide.clone()), ..table };
        let tied = AttentionConfig { gate: Some(GateConfig { tied: true, ..wide }), ..table.clone() };
        let (hidden, ids) = (hidden(&table, 9), ids(9));
        let weights = attention_weights(&tied, true, 4).unwrap();
        let embedding = weights.gate.as_ref().unwrap().embedding.as_ref().unwrap();
        assert_eq!((&*embedding.name, &embedding.shape[..]), ("model.embed_tokens.weight", &[VOCAB as usize, 23][..]));
        let of_size = |size: f32| {
            let mut weights = weights.clone();
            let embedding = weights.gate.as_mut().unwrap().embedding.as_mut().unwrap();
            embedding.data.iter_mut().for_each(|value| *value = size.copysign(*value));
            weights
        };
        let mut as_table = of_size(0.6);
        as_table.gate.as_mut().unwrap().embedding.as_mut().unwrap().name = "gate_embedding.weight".to_owned();
        let found = run(&Layer::new(tied.clone(), &of_size(0.75e-3)).unwrap(), &hidden, &ids);
        let expected = run(&Layer::new(table, &as_table).unwrap(), &hidden, &ids);
        // Both sizes are rounded to f32, by 2⁻²⁴ of them at most; silu and the product pass on twice that, the softmax less.
        assert!(distance(&found, &expected) < 8.0 * 2f64.powi(-24), "{:e}", distance(&found, &expected));
        assert_far(&run(&Layer::new(tied, &of_size(0.75)).unwrap(), &hidden, &ids), &expected);
    }
}

// -------------------------------------------------------------------------------------- values computed by hand

#[test]
fn comparison_helper_sees_nan_and_scale() {
    assert_eq!(distance(&[f64::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
    assert!(distance(&[1.01, 1.01], &[1.0, 1.0]) > 9e-3);
}

#[test]
fn matmul_by_hand_and_every_tail() {
    let y = matmul(&[1.0, 2.0, 3.0, 4.0], &[1.0, 0.0, 0.5, -1.0, 2.0, 2.0], Some(&[0.0, 1.0, 10.0]), 2, 2, 3);
    assert_eq!(y, [1.0, -0.5, 16.0, 3.0, -1.5, 24.0]);
    for inner in [0, 1, 7, 8, 9, 16, 63] {
        let (x, w) = (normal(1, 3 * inner), normal(2, 5 * inner));
        let y = matmul(&x, &w, None, 3, inner, 5);
        for (i, y) in y.iter().enumerate() {
            let expected: f64 = (0..inner).map(|k| x[i / 5 * inner + k] * w[i % 5 * inner + k]).sum();
            assert_abs_diff_eq!(*y, expected, epsilon = 1e-12);
        }
    }
    assert!(matmul(&[], &[1.0; 6], None, 0, 3, 2).is_empty());
}

#[test]
fn norms_by_hand() {
    let rms = rms_norm(&[3.0, 4.0, 0.0, 0.0], Some(&[1.0, 2.0]), 2, 0.0);
    assert_relative_eq!(rms[0], 3.0 / 12.5_f64.sqrt());
    assert_relative_eq!(rms[1], 8.0 / 12.5_f64.sqrt());
    let rms = rms_norm(&[0.0, 0.0], None, 2, 1e-6);
    assert_eq!(rms, [0.0, 0.0]);
    // mean 2, variance 2/3, eps 1/3: divided by 1.
    let y = layer_norm(&[1.0, 2.0, 3.0], Some(&[1.0, 1.0, 2.0]), Some(&[0.0, 5.0, 0.0]), 3, 1.0 / 3.0);
    assert_abs_diff_eq!(y.as_slice(), [-1.0, 5.0, 2.0].as_slice(), epsilon = 1e-15);
}

#[test]
fn gate_by_hand() {
    let values = [-2.0, 0.0, 0.5].map(|x| Activation::ALL.map(|activation| activate(activation, x)));
    assert_eq!(values[1], [0.0, 0.5, 0.0, 0.0, 1.0]);
    assert_relative_eq!(values[0][1], 1.0 / (1.0 + 2f64.exp()));
    assert_relative_eq!(values[2][2], (1f64.exp() - 1.0) / (1f64.exp() + 1.0));
    assert_relative_eq!(values[0][3], -2.0 * values[0][1]);
    assert_eq!(values[2][4], 1.5);
    // Far out, nothing becomes NaN.
    for activation in Activation::ALL {
        assert!(activate(activation, 1e4).is_finite() && activate(activation, -1e4).is_finite());
    }

    let none = gate(&[1.0, 2.0], &[3.0, 4.0], Activation::Identity, GateNorm::None, None, None, 2, 1.0);
    assert_eq!((none.values, none.statistics), (vec![3.0, 8.0], vec![[0.0, 1.0]]));
    let layer = gate(&[1.0, 2.0], &[1.0, 1.5], Activation::Identity, GateNorm::LayerNorm, None, None, 2, 3.0);
    assert_eq!((layer.values, layer.statistics), (vec![-0.5, 0.5], vec![[2.0, 0.5]]));
    let rms = gate(&[1.0, 1.0], &[1.0, 1.0], Activation::Identity, GateNorm::RmsNorm, Some(&[1.0, 4.0]), None, 2, 3.0);
    assert_eq!((rms.values, rms.statistics), (vec![0.5, 2.0], vec![[0.0, 0.5]]));
}

#[test]
fn gate_is_a_product_and_then_the_norm() {
    let (x, g, weight, bias) = (normal(1, 36), normal(2, 36), normal(3, 9), normal(4, 9));
    let product: Vec<f64> = x.iter().zip(&g).map(|(x, g)| x * g.tanh()).collect();
    let gated = |norm| gate(&x, &g, Activation::Tanh, norm, Some(&weight), Some(&bias), 9, 1e-5).values;
    let expected = layer_norm(&product, Some(&weight), Some(&bias), 9, 1e-5);
    assert_close(&gated(GateNorm::LayerNorm), &expected);
    let rms = gate(&x, &g, Activation::Tanh, GateNorm::RmsNorm, Some(&weight), None, 9, 1e-5).values;
    assert_close(&rms, &rms_norm(&product, Some(&weight), 9, 1e-5));
    // Control: the norm before the gate.
    let normed = layer_norm(&x, Some(&weight), Some(&bias), 9, 1e-5);
    let wrong: Vec<f64> = normed.iter().zip(&g).map(|(x, g)| x * g.tanh()).collect();
    assert_far(&wrong, &expected);
}

#[test]
fn small_kernels_by_hand() {
    assert_eq!(gather(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &[2, 0, 2]), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
    assert_eq!(residual_add(&[1.0, 2.0], &[0.5, -2.0], 1.0), [1.5, 0.0]);
    assert_eq!(residual_add(&[1.0, 2.0], &[0.5, -2.0], 3.0), [2.5, -4.0]);
    let y = swiglu(&[0.0, 2.0], &[3.0, 3.0]);
    assert_eq!(y[0], 0.0);
    assert_relative_eq!(y[1], 6.0 / (1.0 + (-2f64).exp()));

    let mut cache = vec![0.0; 8];
    cache_append(&mut cache, &[1.0, 2.0, 3.0, 4.0], 2, &[3, 1]);
    assert_eq!(cache, [0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 1.0, 2.0]);
    assert_eq!(cache_read(&cache, 2, &[1, 3, 1]), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    cache_copy(&mut cache, 2, 3, 0, 1);
    assert_eq!(cache, [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 1.0, 2.0]);
    // Overlapping ranges: as if read whole first.
    cache_copy(&mut cache, 2, 0, 1, 2);
    assert_eq!(cache, [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0]);
    // Width 0, the rotary cache of a model without one.
    cache_append(&mut [], &[], 0, &[5]);
    assert!(cache_read(&[], 0, &[5]).is_empty());
}

#[test]
fn softmax_by_hand() {
    let heads = Heads { n_head: 1, n_kv_head: 1, d_nope: 1, d_rope: 1, d_value: 1 };
    // Scores ln 1 and ln 3 from content and rotary part together: weights 1/4 and 3/4 of the values 8 and 16.
    let kv = [0.0, 8.0, 2.0 * 3f64.ln(), 16.0];
    let k_rope = [0.0, -3f64.ln()];
    let attended = attention_prefill(&[2.0, 2.0], &kv, &k_rope, &[0..2], heads, 0.5);
    assert_relative_eq!(attended.values[0], 14.0, max_relative = 1e-14);
    assert_relative_eq!(attended.lse[0], 4f64.ln(), max_relative = 1e-14);
    let partial = attention_decode(&[2.0, 2.0], &kv, &k_rope, &[(0, 0..2)], heads, 0.5);
    assert_relative_eq!(partial.max[0], 3f64.ln(), max_relative = 1e-14);
    assert_relative_eq!(partial.sum[0], 4.0 / 3.0, max_relative = 1e-14);
    assert_relative_eq!(partial.values[0], 8.0 / 3.0 + 16.0, max_relative = 1e-14);
}

// ------------------------------------------------------------------------------------------ 1. gate 1 is plain MLA

#[test]
fn gate_of_one_without_norm_is_mla() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        let with = |activation, norm, value: f32| {
            let config = egmla(site, activation, norm);
            let mut weights = attention_weights(&config, true, 5).unwrap();
            weights.gate.as_mut().unwrap().b_proj.data.fill(value);
            let plain = Layer::new(mla(), &AttentionWeights { gate: None, ..weights.clone() }).unwrap();
            let (hidden, ids) = (hidden(&config, 9), ids(9));
            (run(&Layer::new(config, &weights).unwrap(), &hidden, &ids), run(&plain, &hidden, &ids))
        };
        // 1 + 0 = 1.
        let (gated, plain) = with(Activation::OnePlus, GateNorm::None, 0.0);
        assert_close(&gated, &plain);
        let (gated, plain) = with(Activation::OnePlus, GateNorm::LayerNorm, 0.0);
        assert_far(&gated, &plain);
        let (gated, plain) = with(Activation::OnePlus, GateNorm::None, 0.5);
        assert_far(&gated, &plain);
    }
}

// -------------------------------------------------------------------------------------- 2. absorbed and expanded

#[test]
fn absorbed_is_expanded() {
    for (seed, config) in every_config().iter().enumerate() {
        for kv_a_norm in [true, false] {
            let layer =
                Layer::new(config.clone(), &attention_weights(config, kv_a_norm, seed as u64).unwrap()).unwrap();
            let (hidden, ids) = (hidden(config, 17), ids(17));
            assert!(ids.iter().any(|id| ids.iter().filter(|other| *other == id).count() > 1), "a group of one only");
            let distance = distance(&layer.forward_absorbed(&hidden, &ids), &run(&layer, &hidden, &ids));
            assert!(distance < 1e-12, "{distance:e} in {config:?}");
        }
    }
}

#[test]
fn decoding_from_cached_latents_is_the_end_of_a_forward_pass() {
    for (seed, config) in every_config().iter().enumerate() {
        let layer = Layer::new(config.clone(), &attention_weights(config, true, seed as u64).unwrap()).unwrap();
        let (hidden, ids) = (hidden(config, 17), ids(17));
        let width = config.hidden_size as usize;
        let whole = run(&layer, &hidden, &ids);
        for past in [0, 1, 12] {
            let latents = layer.latents(&hidden[..past * width], &ids[..past], 0);
            let (new, new_ids) = (&hidden[past * width..], &ids[past..]);
            for decoded in [
                layer.decode_absorbed(new, new_ids, &latents, &ids[..past]),
                layer.decode_expanded(new, new_ids, &latents, &ids[..past]),
            ] {
                assert_eq!(decoded.len(), (17 - past) * width);
                let distance = distance(&decoded, &whole[past * width..]);
                assert!(distance < 1e-12, "{distance:e} behind {past} in {config:?}");
            }
        }
    }
}

#[test]
fn ungated_absorption_is_wrong() {
    for activation in Activation::ALL {
        for norm in GateNorm::ALL {
            let config = egmla(GateSite::UpProjected, activation, norm);
            let weights = attention_weights(&config, true, 5).unwrap();
            let (hidden, ids) = (hidden(&config, 17), ids(17));
            let expanded = run(&Layer::new(config, &weights).unwrap(), &hidden, &ids);
            // The plain absorption of MLA, which passes the gate and the norm over.
            let plain = Layer::new(mla(), &AttentionWeights { gate: None, ..weights.clone() }).unwrap();
            assert_far(&plain.forward_absorbed(&hidden, &ids), &expanded);
            // The groups without the norm.
            if norm != GateNorm::None {
                let without = egmla(GateSite::UpProjected, activation, GateNorm::None);
                let mut weights = weights.clone();
                let gate = weights.gate.as_mut().unwrap();
                (gate.norm_weight, gate.norm_bias) = (None, None);
                assert_far(&Layer::new(without, &weights).unwrap().forward_absorbed(&hidden, &ids), &expanded);
            }
            // All positions in the group of the first id.
            let layer = Layer::new(egmla(GateSite::UpProjected, activation, norm), &weights).unwrap();
            assert_far(&layer.forward_absorbed(&hidden, &[ids[0]; 17]), &expanded);
        }
    }
}

/// Absorbed queries `[tokens, n_head, d_latent]` and rotary queries of one layer of random weights, with the matching
/// expanded `q` and `kv`.
struct Absorbed {
    a: Vec<f64>,
    q_rope: Vec<f64>,
    q: Vec<f64>,
    latent: Vec<f64>,
    kv: Vec<f64>,
    k_rope: Vec<f64>,
    w: Vec<f64>,
}

const D_LATENT: usize = 10;

fn absorbed(tokens: usize, rows: usize) -> Absorbed {
    let (n_head, d_query, d_kv) = (HEADS.n_head, HEADS.d_query(), HEADS.d_kv());
    let q = normal(1, tokens * n_head * d_query);
    let latent = normal(2, rows * D_LATENT);
    let k_rope = normal(3, rows * HEADS.d_rope);
    let w = normal(4, n_head * d_kv * D_LATENT);
    let (mut a, mut q_rope) = (Vec::new(), Vec::new());
    for (row, query) in q.chunks(d_query).enumerate() {
        let first = row % n_head * d_kv;
        a.extend(
            (0..D_LATENT).map(|c| (0..HEADS.d_nope).map(|n| query[n] * w[(first + n) * D_LATENT + c]).sum::<f64>()),
        );
        q_rope.extend(&query[HEADS.d_nope..]);
    }
    let kv = matmul(&latent, &w, None, rows, D_LATENT, n_head * d_kv);
    Absorbed { a, q_rope, q, latent, kv, k_rope, w }
}

impl Absorbed {
    fn partial(&self, splits: &[(usize, Range<usize>)]) -> Partial {
        let Absorbed { a, q_rope, latent, k_rope, .. } = self;
        attention_absorbed(a, q_rope, latent, k_rope, splits, HEADS.n_head, D_LATENT, HEADS.d_rope, 0.3)
    }

    /// `W_V[h]` applied to attended latents.
    fn values(&self, attended: &Attended) -> Vec<f64> {
        let value = |(row, latent): (usize, &[f64])| {
            let first = row % HEADS.n_head * HEADS.d_kv() + HEADS.d_nope;
            matmul(latent, &self.w[first * D_LATENT..], None, 1, D_LATENT, HEADS.d_value)
        };
        attended.values.chunks(D_LATENT).enumerate().flat_map(value).collect()
    }
}

#[test]
fn absorbed_kernel_is_expanded_kernel() {
    let case = absorbed(3, 20);
    let visible = [0..20, 4..11, 2..3];
    let expanded = attention_prefill(&case.q, &case.kv, &case.k_rope, &visible, HEADS, 0.3);
    let splits: Vec<_> = visible.iter().cloned().enumerate().collect();
    let combined = attention_combine(&case.partial(&splits), &[0..1, 1..2, 2..3], HEADS.n_head, D_LATENT);
    assert_close(&case.values(&combined), &expanded.values);
    assert_close(&combined.lse, &expanded.lse);
    // Control: the absorbed queries of another head.
    let mut wrong = absorbed(3, 20);
    wrong.a.rotate_left(D_LATENT);
    let combined = attention_combine(&wrong.partial(&splits), &[0..1, 1..2, 2..3], HEADS.n_head, D_LATENT);
    assert_far(&case.values(&combined), &expanded.values);
}

// ------------------------------------------------------------------------------------------ 3. prefill and decode

#[test]
fn prefill_and_decode_are_one_prefill() {
    for config in every_config() {
        let layer = layer(&config, 3);
        let (width, tokens) = (config.hidden_size as usize, 9);
        let (hidden, ids) = (hidden(&config, tokens), ids(tokens));
        let mut whole_history = History::default();
        let whole = layer.forward(&hidden, &ids, &mut whole_history);
        for prefilled in 0..=tokens {
            let mut history = History::default();
            let mut parts = layer.forward(&hidden[..prefilled * width], &ids[..prefilled], &mut history);
            for t in prefilled..tokens {
                assert_eq!(history.len(), t);
                parts.extend(layer.forward(&hidden[t * width..][..width], &ids[t..=t], &mut history));
            }
            assert_close(&parts, &whole);
            assert_close(history.kv(), whole_history.kv());
        }
        // Going back and on again; and a chunk of several tokens behind a history.
        let mut history = whole_history.clone();
        history.truncate(100);
        assert_eq!(history, whole_history);
        history.truncate(4);
        assert_eq!(history.len(), 4);
        assert_close(&layer.forward(&hidden[4 * width..], &ids[4..], &mut history), &whole[4 * width..]);
        // Control: the same tokens without the history.
        assert_far(&run(&layer, &hidden[4 * width..], &ids[4..]), &whole[4 * width..]);
        history.truncate(0);
        assert!(history.is_empty() && history.kv().is_empty() && history.k_rope().is_empty());
        history.truncate(0);
    }
}

#[test]
fn nothing_looks_ahead() {
    let config = egmla(GateSite::UpProjected, Activation::Identity, GateNorm::LayerNorm);
    let (layer, width) = (layer(&config, 3), config.hidden_size as usize);
    let (mut hidden, mut ids) = (hidden(&config, 8), ids(8));
    let before = run(&layer, &hidden, &ids);
    hidden[5 * width..].iter_mut().for_each(|x| *x += 1.0);
    ids[6] = (ids[6] + 1) % VOCAB;
    let after = run(&layer, &hidden, &ids);
    assert_eq!(before[..5 * width], after[..5 * width]);
    assert_far(&before[5 * width..], &after[5 * width..]);
}

#[test]
fn no_tokens() {
    for config in every_config() {
        let layer = layer(&config, 3);
        assert!(run(&layer, &[], &[]).is_empty());
        assert!(layer.forward_absorbed(&[], &[]).is_empty());
    }
}

#[test]
fn latents_are_what_forward_used() {
    let config = egmla(GateSite::UpProjected, Activation::Silu, GateNorm::LayerNorm);
    let weights = attention_weights(&config, true, 3).unwrap();
    let layer = Layer::new(config.clone(), &weights).unwrap();
    let (hidden, ids) = (hidden(&config, 6), ids(6));
    let mut history = History::default();
    layer.forward(&hidden, &ids, &mut history);
    let latents = layer.latents(&hidden, &ids, 0);
    assert_eq!(latents.k_rope, history.k_rope());
    // k and v from c, g, μ and ρ alone.
    let gates = weights.gate.as_ref().unwrap();
    let d_kv = config.d_kv() as usize;
    let e = gather(&gates.embedding.as_ref().unwrap().to_f64(), 7, &ids);
    let g = matmul(&e, &gates.b_proj.to_f64(), None, 6, 7, d_kv);
    let kv = matmul(&latents.latent, &weights.kv_b_proj.to_f64(), None, 6, 10, d_kv);
    let (gamma, beta) = (gates.norm_weight.as_ref().unwrap().to_f64(), gates.norm_bias.as_ref().unwrap().to_f64());
    let rebuilt: Vec<f64> = (0..6 * d_kv)
        .map(|i| {
            let [mu, rho] = latents.statistics[i / d_kv];
            (kv[i] * activate(Activation::Silu, g[i]) - mu) * rho * gamma[i % d_kv] + beta[i % d_kv]
        })
        .collect();
    assert_close(&rebuilt, history.kv());
    // Later positions rotate k_R and leave the rest.
    let later = layer.latents(&hidden, &ids, 3);
    assert_eq!((&later.latent, &later.statistics), (&latents.latent, &latents.statistics));
    assert_far(&later.k_rope, &latents.k_rope);
    // Site latent caches the gated latent, and needs no statistics.
    let site_latent = layer_of(GateSite::Latent).latents(&hidden, &ids, 0);
    let ungated = Layer::new(mla(), &attention_weights(&mla(), true, 3).unwrap()).unwrap().latents(&hidden, &[], 0);
    assert_eq!(site_latent.statistics, vec![[0.0, 1.0]; 6]);
    assert_far(&site_latent.latent, &ungated.latent);
}

fn layer_of(site: GateSite) -> Layer {
    layer(&egmla(site, Activation::Identity, GateNorm::LayerNorm), 3)
}

// ------------------------------------------------------------------------------------------------- 4. token ids

#[test]
fn an_id_changes_its_own_key_and_value_only() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        let layer = layer_of(site);
        let d_kv = layer.config().d_kv() as usize;
        let (hidden, mut ids) = (hidden(layer.config(), 8), ids(8));
        let (mut before, mut after) = (History::default(), History::default());
        let output = layer.forward(&hidden, &ids, &mut before);
        ids[3] = (ids[3] + 1) % VOCAB;
        let changed = layer.forward(&hidden, &ids, &mut after);
        assert_eq!(before.k_rope(), after.k_rope());
        for (j, (before, after)) in before.kv().chunks(d_kv).zip(after.kv().chunks(d_kv)).enumerate() {
            assert_eq!(before == after, j != 3, "row {j}");
            if j == 3 {
                assert_far(after, before);
            }
        }
        let width = layer.config().hidden_size as usize;
        assert_eq!(output[..3 * width], changed[..3 * width]);
        assert_far(&changed[3 * width..], &output[3 * width..]);
    }
    // MLA does not look at ids.
    let layer = layer(&mla(), 3);
    let hidden = hidden(&mla(), 8);
    assert_eq!(run(&layer, &hidden, &ids(8)), run(&layer, &hidden, &[]));
}

#[test]
fn permuting_table_and_ids_changes_nothing() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        let config = egmla(site, Activation::Silu, GateNorm::RmsNorm);
        let mut weights = attention_weights(&config, true, 8).unwrap();
        let (hidden, ids) = (hidden(&config, 12), ids(12));
        let before = Layer::new(config.clone(), &weights).unwrap();
        // Row i moves to row (i + 4) mod 11.
        let moved: Vec<u32> = ids.iter().map(|id| (id + 4) % VOCAB).collect();
        let order: Vec<usize> = (0..11).map(|i| (i + 7) % 11).collect();
        permute_rows(weights.gate.as_mut().unwrap().embedding.as_mut().unwrap(), &order);
        let after = Layer::new(config, &weights).unwrap();
        let expected = run(&before, &hidden, &ids);
        assert_close(&run(&after, &hidden, &moved), &expected);
        assert_close(&after.forward_absorbed(&hidden, &moved), &expected);
        assert_far(&run(&after, &hidden, &ids), &expected);
        assert_far(&run(&before, &hidden, &moved), &expected);
    }
}

// ------------------------------------------------------------------------------------------ 5. splits and heads

/// Cuts `rows` of token 0 at the given places.
fn cut(rows: usize, places: &[usize]) -> Vec<(usize, Range<usize>)> {
    let starts = [0].iter().chain(places);
    let ends = places.iter().chain(std::slice::from_ref(&rows));
    starts.zip(ends).map(|(&start, &end)| (0, start..end)).collect()
}

#[test]
fn any_splits_are_one_split() {
    let rows = 29;
    let case = absorbed(1, rows);
    let expanded = attention_prefill(&case.q, &case.kv, &case.k_rope, &[0..rows], HEADS, 0.3);
    let mut cuttings: Vec<Vec<usize>> = (0..=rows).map(|place| vec![place]).collect();
    cuttings.extend([vec![], vec![0, 0, 29, 29], vec![3, 3, 8, 21], (1..rows).collect()]);
    for places in cuttings {
        let splits = cut(rows, &places);
        let all = 0..splits.len();
        let partial = attention_decode(&case.q, &case.kv, &case.k_rope, &splits, HEADS, 0.3);
        let combined = attention_combine(&partial, std::slice::from_ref(&all), HEADS.n_head, HEADS.d_value);
        assert_close(&combined.values, &expanded.values);
        assert_close(&combined.lse, &expanded.lse);
        let combined = attention_combine(&case.partial(&splits), std::slice::from_ref(&all), HEADS.n_head, D_LATENT);
        assert_close(&case.values(&combined), &expanded.values);
    }
    // Controls: a split left out; partial sums added without regard to their maxima.
    let partial = attention_decode(&case.q, &case.kv, &case.k_rope, &cut(rows, &[10, 20]), HEADS, 0.3);
    let fewer = attention_combine(&partial, &[0..2], HEADS.n_head, HEADS.d_value);
    assert_far(&fewer.values, &expanded.values);
    let flat = Partial { max: vec![0.0; partial.max.len()], ..partial };
    let flat = attention_combine(&flat, &[0..3], HEADS.n_head, HEADS.d_value);
    assert_far(&flat.values, &expanded.values);
}

#[test]
fn splits_of_several_tokens() {
    let case = absorbed(3, 12);
    let visible = [0..12, 0..0, 5..9];
    let expanded = attention_prefill(&case.q, &case.kv, &case.k_rope, &visible, HEADS, 0.3);
    let splits = [(2, 5..6), (2, 6..9), (1, 4..4), (0, 0..7), (0, 7..7), (0, 7..12)];
    let partial = attention_decode(&case.q, &case.kv, &case.k_rope, &splits, HEADS, 0.3);
    let combined = attention_combine(&partial, &[3..6, 2..3, 0..2], HEADS.n_head, HEADS.d_value);
    assert_close(&combined.values, &expanded.values);
    for (combined, expanded) in combined.lse.iter().zip(&expanded.lse) {
        assert!(combined == expanded || (combined - expanded).abs() < 1e-12);
    }
}

#[test]
fn order_of_heads_is_invisible() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        let config = egmla(site, Activation::Tanh, GateNorm::LayerNorm);
        let (d_query, d_kv) = (10, 11);
        let mut weights = attention_weights(&config, true, 8).unwrap();
        let (hidden, ids) = (hidden(&config, 9), ids(9));
        let expected = run(&Layer::new(config.clone(), &weights).unwrap(), &hidden, &ids);
        let order = [2, 0, 1];
        let QueryWeights::Full { proj, .. } = &mut weights.query else { panic!("a full-rank query") };
        permute_rows(proj, &head_rows(&order, d_query));
        permute_rows(&mut weights.kv_b_proj, &head_rows(&order, d_kv));
        if site == GateSite::UpProjected {
            let gate = weights.gate.as_mut().unwrap();
            for tensor in [Some(&mut gate.b_proj), gate.norm_weight.as_mut(), gate.norm_bias.as_mut()] {
                permute_rows(tensor.unwrap(), &head_rows(&order, d_kv));
            }
        }
        assert_far(&run(&Layer::new(config.clone(), &weights).unwrap(), &hidden, &ids), &expected);
        let columns = head_rows(&order, 5);
        let o_proj = &mut weights.o_proj.data;
        *o_proj = o_proj.chunks(15).flat_map(|row| columns.iter().map(|&i| row[i]).collect::<Vec<_>>()).collect();
        let permuted = Layer::new(config, &weights).unwrap();
        assert_close(&run(&permuted, &hidden, &ids), &expected);
        assert_close(&permuted.forward_absorbed(&hidden, &ids), &expected);
    }
}

// --------------------------------------------------------------------------------------- 6. scale of the gate

#[test]
fn scale_of_the_gate_goes_into_the_norm() {
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for norm in GateNorm::ALL {
            let mut config = egmla(site, Activation::Identity, norm);
            config.gate.as_mut().unwrap().norm_eps = 1e-30;
            let mut weights = attention_weights(&config, true, 8).unwrap();
            let (hidden, ids) = (hidden(&config, 9), ids(9));
            let before = run(&Layer::new(config.clone(), &weights).unwrap(), &hidden, &ids);
            // A power of two: exact in the f32 weights.
            weights.gate.as_mut().unwrap().b_proj.data.iter_mut().for_each(|x| *x *= 4.0);
            let after = run(&Layer::new(config, &weights).unwrap(), &hidden, &ids);
            match norm {
                GateNorm::None => assert_far(&after, &before),
                _ => assert_close(&after, &before),
            }
        }
    }
    // Control: a norm on the wrong side of the gate does not take the factor away.
    let (x, g) = (normal(1, 30), normal(2, 30));
    let wrong = |factor: f64| -> Vec<f64> {
        layer_norm(&x, None, None, 10, 1e-30).iter().zip(&g).map(|(x, g)| x * g * factor).collect()
    };
    assert_far(&wrong(4.0), &wrong(1.0));
}

// -------------------------------------------------------------------------------- 7. huge logits and empty rows

#[test]
fn huge_logits_stay_finite() {
    let rows = 8;
    let case = absorbed(1, rows);
    // The rotary part adds the same to every score: it must shift the lse and change nothing else.
    let k_rope = vec![1.0; rows * HEADS.d_rope];
    let shifted = |shift: f64| -> (Vec<f64>, Vec<f64>) {
        let mut q = case.q.clone();
        for query in q.chunks_mut(HEADS.d_query()) {
            query[HEADS.d_nope..].fill(shift / 0.3 / 4.0);
        }
        (q, vec![shift / 0.3 / 4.0; HEADS.n_head * HEADS.d_rope])
    };
    let attend = |shift| attention_prefill(&shifted(shift).0, &case.kv, &k_rope, &[0..rows], HEADS, 0.3);
    let plain = attend(0.0);
    for shift in [1e4, -1e4, 1e6, -1e6] {
        let far = attend(shift);
        assert!(far.values.iter().chain(&far.lse).all(|x| x.is_finite()));
        assert!(distance(&far.values, &plain.values) < 1e-9);
        for (far, plain) in far.lse.iter().zip(&plain.lse) {
            assert_abs_diff_eq!(*far, plain + shift, epsilon = 1e-8);
        }
        let (q, q_rope) = shifted(shift);
        let splits = cut(rows, &[3]);
        let partial = attention_decode(&q, &case.kv, &k_rope, &splits, HEADS, 0.3);
        let combined = attention_combine(&partial, &[0..2], HEADS.n_head, HEADS.d_value);
        assert!(distance(&combined.values, &plain.values) < 1e-9);
        let partial = attention_absorbed(
            &case.a,
            &q_rope,
            &case.latent,
            &k_rope,
            &splits,
            HEADS.n_head,
            D_LATENT,
            HEADS.d_rope,
            0.3,
        );
        let combined = attention_combine(&partial, &[0..2], HEADS.n_head, D_LATENT);
        assert!(distance(&case.values(&combined), &plain.values) < 1e-9);
    }
    // Control: softmax without the maximum overflows.
    assert!((1e4f64.exp() / 1e4f64.exp()).is_nan());
}

#[test]
fn one_score_far_above_takes_all() {
    let heads = Heads { n_head: 1, n_kv_head: 1, d_nope: 1, d_rope: 0, d_value: 1 };
    let attended = attention_prefill(&[1e4], &[1.0, 5.0, -1.0, 7.0], &[], &[0..2], heads, 1.0);
    assert_eq!((attended.values, attended.lse), (vec![5.0], vec![1e4]));
}

#[test]
fn empty_rows() {
    let case = absorbed(1, 4);
    let (n_head, lowest) = (HEADS.n_head, f64::from(f32::MIN));
    let attended = attention_prefill(&case.q, &case.kv, &case.k_rope, &[2..2], HEADS, 0.3);
    assert_eq!(attended.values, vec![0.0; n_head * HEADS.d_value]);
    assert_eq!(attended.lse, vec![f64::NEG_INFINITY; n_head]);

    let partial = attention_decode(&case.q, &case.kv, &case.k_rope, &[(0, 4..4), (0, 0..0)], HEADS, 0.3);
    assert_eq!(partial.max, vec![lowest; 2 * n_head]);
    assert_eq!((partial.sum.clone(), partial.values.clone()), (vec![0.0; 6], vec![0.0; 2 * n_head * HEADS.d_value]));
    let absorbed = case.partial(&[(0, 1..1)]);
    assert_eq!((absorbed.max, absorbed.sum), (vec![lowest; n_head], vec![0.0; n_head]));
    assert_eq!(absorbed.values, vec![0.0; n_head * D_LATENT]);

    // Nothing but empty splits, and no split at all.
    for range in [0..2, 1..1] {
        let combined = attention_combine(&partial, &[range], n_head, HEADS.d_value);
        assert_eq!(combined.values, vec![0.0; n_head * HEADS.d_value]);
        assert_eq!(combined.lse, vec![f64::NEG_INFINITY; n_head]);
    }
}

#[test]
fn rows_outside_of_the_range_are_not_read() {
    let mut case = absorbed(1, 6);
    let rows = 2..5;
    let clean = attention_prefill(&case.q, &case.kv, &case.k_rope, std::slice::from_ref(&rows), HEADS, 0.3);
    let width = HEADS.n_head * HEADS.d_kv();
    for row in [0, 1, 5] {
        case.kv[row * width..][..width].fill(f64::NAN);
        case.k_rope[row * HEADS.d_rope..][..HEADS.d_rope].fill(f64::NAN);
        case.latent[row * D_LATENT..][..D_LATENT].fill(f64::NAN);
    }
    let dirty = attention_prefill(&case.q, &case.kv, &case.k_rope, std::slice::from_ref(&rows), HEADS, 0.3);
    assert_eq!(clean, dirty);
    assert!(case.partial(&[(0, rows)]).values.iter().all(|x| x.is_finite()));
    // A NaN within the range is not hidden.
    let dirty = attention_prefill(&case.q, &case.kv, &case.k_rope, &[1..5], HEADS, 0.3);
    assert!(dirty.values.iter().all(|x| x.is_nan()));
}

// ------------------------------------------------------------------------------------------------------ 8. RoPE

fn yarn(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>, attention_factor: Option<f64>) -> RopeConfig {
    let scaling = RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale,
        mscale_all_dim,
        attention_factor,
        truncate: true,
    };
    RopeConfig { scaling, ..RopeConfig::default() }
}

/// Rotates one head of width `x.len()`, all of it.
fn rotated(config: &RopeConfig, x: &[f64], position: u32) -> Vec<f64> {
    let mut x = x.to_vec();
    let d = x.len();
    rope(&mut x, &rotations(config, d, &[position]), 1, d, d, config.interleave);
    x
}

fn half_split() -> RopeConfig {
    RopeConfig { interleave: false, ..RopeConfig::default() }
}

#[test]
fn rope_by_hand() {
    // d_rope 4: frequencies 1 and 0.01; one value before the rotated part; two tokens of two heads.
    let table = rotations(&RopeConfig::default(), 4, &[0, 3]);
    assert_eq!(table.len(), 4);
    assert_abs_diff_eq!(table[3].as_slice(), [0.03f64.cos(), 0.03f64.sin()].as_slice(), epsilon = 1e-15);
    let head = [9.0, 1.0, 0.0, 0.0, 2.0];
    let (sin, cos) = 3f64.sin_cos();
    let (slow_sin, slow_cos) = 0.03f64.sin_cos();
    for (interleave, expected) in [
        (true, [9.0, cos, sin, -2.0 * slow_sin, 2.0 * slow_cos]),
        (false, [9.0, cos, -2.0 * slow_sin, sin, 2.0 * slow_cos]),
    ] {
        let mut values = head.repeat(4);
        rope(&mut values, &table, 2, 5, 4, interleave);
        assert_eq!(values[..10], head.repeat(2));
        assert_abs_diff_eq!(values[10..], [expected, expected].concat(), epsilon = 1e-15);
    }
    let mut values = vec![1.0; 6];
    rope(&mut values, &rotations(&RopeConfig::default(), 0, &[5, 6]), 1, 3, 0, true);
    assert_eq!(values, [1.0; 6]);
}

/// Mistral 4: `1 + beta * log(1 + floor(position / original_max_position_embeddings))` on whole queries. A factor on all queries, as
/// LongCat-Flash has it, gives each position's row.
#[test]
fn queries_are_scaled_by_their_position() {
    let scaling = QueryScaling { beta: 0.5, original_max_position_embeddings: 4.0 };
    for plain in every_config() {
        let rope = RopeConfig { query_scaling: Some(scaling), ..plain.rope.clone() };
        let scaled = AttentionConfig { rope, ..plain.clone() };
        scaled.validate().unwrap();
        let (hidden, ids, width) = (hidden(&plain, 14), ids(14), plain.hidden_size as usize);
        let whole = run(&layer(&scaled, 3), &hidden, &ids);
        for (block, log) in [(0, 0.0), (1, 2f64.ln()), (2, 3f64.ln()), (3, 4f64.ln())] {
            let of_block = layer(&AttentionConfig { query_factor: 1.0 + 0.5 * log, ..plain.clone() }, 3);
            let rows = block * 4 * width..((block + 1) * 4 * width).min(whole.len());
            assert_close(&whole[rows.clone()], &run(&of_block, &hidden, &ids)[rows]);
        }
        assert_close(&layer(&scaled, 3).forward_absorbed(&hidden, &ids), &whole);
        // Control: without it the first four rows alone are the same.
        let other = run(&layer(&plain, 3), &hidden, &ids);
        assert_close(&whole[..4 * width], &other[..4 * width]);
        assert!(distance(&whole[8 * width..], &other[8 * width..]) > 1e-3, "{plain:?}");
    }
}

#[test]
fn pair_layout_is_visible_past_position_0_only() {
    let x = normal(1, 8);
    assert_eq!(rotated(&RopeConfig::default(), &x, 0), rotated(&half_split(), &x, 0));
    assert_far(&rotated(&RopeConfig::default(), &x, 1), &rotated(&half_split(), &x, 1));

    let other = AttentionConfig { rope: half_split(), ..mla() };
    let weights = attention_weights(&mla(), true, 5).unwrap();
    let (right, wrong) = (Layer::new(mla(), &weights).unwrap(), Layer::new(other, &weights).unwrap());
    let hidden = hidden(&mla(), 12);
    let (right, wrong) = (run(&right, &hidden, &[]), run(&wrong, &hidden, &[]));
    let width = mla().hidden_size as usize;
    assert_eq!(right[..width], wrong[..width]);
    assert!(distance(&right[width..], &wrong[width..]) > 1e-3, "control passes");
}

#[test]
fn scores_depend_on_the_distance_alone() {
    let (q, k) = (normal(1, 16), normal(2, 16));
    let score = |a: &RopeConfig, m: u32, b: &RopeConfig, n: u32| -> f64 {
        rotated(a, &q, m).iter().zip(rotated(b, &k, n)).map(|(q, k)| q * k).sum()
    };
    // Past original_max_position_embeddings (4096) as well.
    for rope in [RopeConfig::default(), half_split(), yarn(40.0, None, None, None)] {
        for base in [5, 5000, 150_000] {
            assert_abs_diff_eq!(score(&rope, base + 7, &rope, base), score(&rope, 7, &rope, 0), epsilon = 1e-9);
        }
        assert!((score(&rope, 8, &rope, 0) - score(&rope, 7, &rope, 0)).abs() > 1e-2);
    }
    // Control: query and key with different pairs.
    let (a, b) = (RopeConfig::default(), half_split());
    assert!((score(&a, 5007, &b, 5000) - score(&a, 7, &b, 0)).abs() > 1e-2);
}

#[test]
fn shifting_a_sequence_changes_nothing() {
    // Attention sees distances alone: latents at later positions with queries at later positions give the same scores.
    let layer = layer(&mla(), 3);
    let hidden = hidden(&mla(), 2);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let keys = |first| layer.latents(&hidden, &[], first).k_rope;
    assert_abs_diff_eq!(dot(&keys(0)[..4], &keys(0)[4..]), dot(&keys(6000)[..4], &keys(6000)[4..]), epsilon = 1e-10);
}

#[test]
fn scaled_rope_differs_past_the_original_length() {
    let x = normal(1, 64);
    let plain = rotated(&RopeConfig::default(), &x, 5000);
    let stretched = yarn(40.0, Some(1.0), Some(1.0), None);
    assert_far(&rotated(&stretched, &x, 5000), &plain);
    assert_eq!(rotated(&stretched, &x, 0), x);
    // Linear: position 40 p stands where p stood.
    let linear = RopeConfig { scaling: RopeScaling::Linear { factor: 40.0 }, ..RopeConfig::default() };
    assert!(distance(&rotated(&linear, &x, 200_000), &plain) < 1e-9);
    assert_far(&rotated(&linear, &x, 5000), &plain);
}

// ------------------------------------------------------------------------------------ rules of further families

#[test]
fn factors_are_those_of_the_weights_before_them() {
    let scaled = AttentionConfig { query_factor: 2.0, latent_factor: 0.5, ..mla() };
    let weights = attention_weights(&mla(), true, 4).unwrap();
    let hidden = hidden(&mla(), 7);
    let found = run(&Layer::new(scaled.clone(), &weights).unwrap(), &hidden, &[]);
    let mut by_hand = weights.clone();
    let QueryWeights::Full { proj, .. } = &mut by_hand.query else { panic!("a full-rank query") };
    proj.data.iter_mut().for_each(|element| *element *= 2.0);
    by_hand.kv_a_norm.as_mut().unwrap().data.iter_mut().for_each(|element| *element *= 0.5);
    // Powers of two: both are exact.
    assert_close(&found, &run(&Layer::new(mla(), &by_hand).unwrap(), &hidden, &[]));
    assert_close(&found, &Layer::new(scaled.clone(), &weights).unwrap().forward_absorbed(&hidden, &[]));
    assert_far(&found, &run(&Layer::new(mla(), &weights).unwrap(), &hidden, &[]));
    // Nothing else carries the factor.
    let none = attention_weights(&mla(), false, 4).unwrap();
    let message = none.check(&scaled).unwrap_err().to_string();
    assert!(message.contains("kv_a_layernorm.weight"), "{message}");
}

#[test]
fn what_is_never_turned_is_as_at_position_0() {
    let x = normal(1, 8);
    let never = RopeConfig { rotate: false, ..yarn(40.0, None, None, None) };
    assert_eq!(rotated(&never, &x, 5000), x);
    assert_far(&rotated(&yarn(40.0, None, None, None), &x, 5000), &x);
}

// ------------------------------------------------------------------------------------------------- golden cases

fn tensor_f64(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let data = file.tensor(name).unwrap();
    assert_eq!(data.dtype(), safetensors::Dtype::F64);
    data.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn tensor_u32(file: &SafeTensors<'_>, name: &str) -> Option<Vec<u32>> {
    let data = file.tensor(name).ok()?;
    assert_eq!(data.dtype(), safetensors::Dtype::U32);
    Some(data.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

struct Golden {
    layer: Layer,
    hidden: Vec<f64>,
    ids: Vec<u32>,
    lengths: Vec<usize>,
    expected: Vec<f64>,
}

fn golden(name: &str) -> Golden {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let config = AttentionConfig::from_json(&String::from_utf8(read("config.json")).unwrap()).unwrap();
    let bytes = read("weights.safetensors");
    let weights = AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), "", &config).unwrap();
    let (input, expected) = (read("input.safetensors"), read("expected.safetensors"));
    let tensors = SafeTensors::deserialize(&input).unwrap();
    let shape = tensors.tensor("hidden_states").unwrap().shape().to_vec();
    let lengths = tensor_u32(&tensors, "sequence_lengths").unwrap_or(vec![shape[0] as u32]);
    Golden {
        layer: Layer::new(config, &weights).unwrap(),
        hidden: Checkpoint::new(&input).unwrap().take("hidden_states", &shape).unwrap().to_f64(),
        ids: tensor_u32(&tensors, "token_ids").unwrap_or_default(),
        lengths: lengths.iter().map(|&length| length as usize).collect(),
        expected: tensor_f64(&SafeTensors::deserialize(&expected).unwrap(), "hidden_states"),
    }
}

impl Golden {
    /// Each sequence alone, through `forward(hidden, ids)`.
    fn run(&self, forward: impl Fn(&[f64], &[u32]) -> Vec<f64>) -> Vec<f64> {
        let width = self.layer.config().hidden_size as usize;
        let (mut start, mut output) = (0, Vec::new());
        for length in &self.lengths {
            let end = start + length;
            let ids = self.ids.get(start..end).unwrap_or_default();
            output.extend(forward(&self.hidden[start * width..end * width], ids));
            start = end;
        }
        output
    }

    fn check(&self) {
        let expanded = distance(&self.run(|hidden, ids| run(&self.layer, hidden, ids)), &self.expected);
        let absorbed = distance(&self.run(|hidden, ids| self.layer.forward_absorbed(hidden, ids)), &self.expected);
        println!("expanded {expanded:e}, absorbed {absorbed:e}");
        assert!(expanded < 1e-12 && absorbed < 1e-12, "expanded {expanded:e}, absorbed {absorbed:e}");
        // Control: one value off by 1 %.
        let mut off = self.expected.clone();
        off[0] += 0.01 * off[0].abs().max(0.1);
        assert!(distance(&off, &self.expected) > 1e-12);
    }
}

#[test]
fn golden_egmla_up_projected() {
    let golden = golden("egmla_up_projected");
    assert_eq!(golden.lengths.len(), 3);
    golden.check();
    // Control: the sequences run together.
    assert_far(&run(&golden.layer, &golden.hidden, &golden.ids), &golden.expected);
}

#[test]
fn golden_egmla_latent() {
    golden("egmla_latent").check();
}

#[test]
fn golden_mla_yarn() {
    let golden = golden("mla_yarn");
    golden.check();
    // Control: 75 tokens stand past the original length of 32, so leaving the scaling out shows.
    let Golden { hidden, expected, .. } = &golden;
    let mut config = golden.layer.config().clone();
    config.rope.scaling = RopeScaling::None;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mla_yarn/weights.safetensors");
    let bytes = std::fs::read(folder).unwrap();
    let weights = AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), "", &config).unwrap();
    assert_far(&run(&Layer::new(config, &weights).unwrap(), hidden, &[]), expected);
}

// ----------------------------------------------------------------------------------------------- random values

#[test]
fn random_values_are_seeded_and_normal() {
    let values = Random::new(3).values(20_000, 2.0);
    assert_eq!(values, Random::new(3).values(20_000, 2.0));
    assert_ne!(values, Random::new(4).values(20_000, 2.0));
    let mean = values.iter().copied().map(f64::from).sum::<f64>() / 20_000.0;
    let variance = values.iter().copied().map(|x| f64::from(x).powi(2)).sum::<f64>() / 20_000.0;
    assert!(mean.abs() < 0.06 && (variance - 4.0).abs() < 0.2, "mean {mean}, variance {variance}");
    let ids = Random::new(3).ids(1000, 7);
    assert!((0..7).all(|id| ids.contains(&id)) && ids.iter().all(|id| *id < 7));
}

#[test]
fn random_weights_keep_activations_of_order_one() {
    for config in every_config() {
        let weights = attention_weights(&config, true, 1).unwrap();
        assert_eq!(weights, attention_weights(&config, true, 1).unwrap());
        assert!(weights.kv_a_norm.is_some() && attention_weights(&config, false, 1).unwrap().kv_a_norm.is_none());
        let output = run(&Layer::new(config.clone(), &weights).unwrap(), &hidden(&config, 9), &ids(9));
        let rms = (output.iter().map(|x| x * x).sum::<f64>() / output.len() as f64).sqrt();
        assert!((0.05..5.0).contains(&rms), "rms {rms} of {config:?}");
    }
}
