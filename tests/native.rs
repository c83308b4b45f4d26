//! The decoder in f32 on the CPU against its definition in f64: layers and decoders of every kind, with random sizes and options,
//! and matrices in f32, f16 and bf16.
#![cfg(feature = "decoder")]
#![allow(clippy::unwrap_used, missing_docs)]

use egmla::config::{
    Activation, AttentionConfig, DecoderAttention, DecoderConfig, DecoderScales, GateConfig, GateNorm, GateSite,
    GqaConfig, QueryScaling, RopeConfig, RopeScaling,
};
use egmla::decoder::{
    CpuDecoder, DecoderAttentionWeights, DecoderLayerWeights, DecoderWeights, Logits, NativeDecoder, NativeGqaLayer,
    NativeLayer,
};
use egmla::error::ArgumentError;
use egmla::random::{Random, attention_weights, gqa_weights};
use egmla::reference::{GqaLayer, History, Layer};
use egmla::weights::{GqaWeights, HostTensor, QueryWeights};
use egmla::{AttentionWeights, Error};
use half::{bf16, f16};

/// `‖a − b‖ / ‖b‖`; NaN anywhere gives NaN, which no bound accepts.
fn error(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// Bound of that error behind `depth` dependent operations whose sums have `terms` terms at most. A rounding is 2⁻²⁴ at most, those
/// of a sum are independent and grow as √terms, both factors of a product bring theirs; errors of operations that follow each other
/// add up.
fn bound(depth: u32, terms: u32) -> f64 {
    2.0 * f64::from(depth) * f64::from(terms).sqrt() * 2f64.powi(-24)
}

/// Operations of a layer that follow each other: low-rank product, norm, product, gate, its norm, scores, softmax, sum, output.
const OF_LAYER: u32 = 9;

/// The feed-forward part and the norms: two norms, two products, an activation.
const OF_REST: u32 = 5;

/// A configuration of a kind, drawn.
fn drawn(random: &mut Random, gate: Option<GateSite>) -> AttentionConfig {
    let mut below = |least: u32, most: u32| least + (random.unit() * f64::from(most - least + 1)) as u32;
    let d_rope = 2 * below(0, 5);
    let site = gate;
    let hidden_size = below(5, 70);
    let tied = below(0, 2) == 0;
    let gate = site.map(|site| GateConfig {
        vocab_size: VOCAB,
        d_gate: if tied { hidden_size } else { below(1, 9) },
        tied,
        site,
        activation: Activation::ALL[below(0, 4) as usize],
        norm: GateNorm::ALL[below(0, 2) as usize],
        norm_eps: 1e-5,
    });
    let scaling = match below(0, 2) {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor: 3.0 },
        _ => RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 16.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(0.7),
            attention_factor: None,
            truncate: true,
        },
    };
    let mut config = AttentionConfig {
        hidden_size,
        n_head: below(1, 9),
        d_latent: below(1, 40),
        d_q_latent: (below(0, 1) == 1).then(|| below(2, 20)),
        d_nope: below(u32::from(d_rope == 0), 21),
        d_rope,
        d_value: below(1, 21),
        attention_bias: below(0, 1) == 1,
        q_proj_bias: false,
        gate,
        rope: RopeConfig {
            interleave: below(0, 1) == 1,
            scaling,
            rotate: below(0, 4) > 0,
            query_scaling: (below(0, 2) == 0).then_some(SCALED_QUERIES),
            ..RopeConfig::default()
        },
        low_rank_norm_eps: 1e-6,
        query_factor: 1.25,
        latent_factor: 0.75,
    };
    config.q_proj_bias = config.d_q_latent.is_none() && below(0, 1) == 1;
    config
}

/// The same with keys and values per head: of every group, of some, and one for all.
fn drawn_heads(random: &mut Random) -> GqaConfig {
    let mut below = |least: u32, most: u32| least + (random.unit() * f64::from(most - least + 1)) as u32;
    let (n_kv_head, group) = (below(1, 4), [1, 2, 3, 6][below(0, 3) as usize]);
    GqaConfig {
        hidden_size: below(5, 70),
        n_head: n_kv_head * group,
        n_kv_head,
        head_dim: 2 * below(1, 20),
        qkv_bias: below(0, 1) == 1,
        o_bias: below(0, 1) == 1,
        qk_norm_eps: (below(0, 1) == 1).then_some(1e-3),
        rope: RopeConfig {
            interleave: below(0, 1) == 1,
            query_scaling: (below(0, 2) == 0).then_some(SCALED_QUERIES),
            ..RopeConfig::default()
        },
    }
}

const SCALED_QUERIES: QueryScaling = QueryScaling { beta: 0.7, original_max_position_embeddings: 5.0 };

const VOCAB: u32 = 23;

/// Rounds matrices by turns: to f16, to bf16, and not at all.
fn round<'a>(number: usize, matrices: impl IntoIterator<Item = &'a mut HostTensor>) {
    for value in matrices.into_iter().flat_map(|matrix| &mut matrix.data) {
        *value = match number % 3 {
            0 => *value,
            1 => f16::from_f32(*value).to_f32(),
            _ => bf16::from_f32(*value).to_f32(),
        };
    }
}

fn matrices(weights: &mut AttentionWeights) -> Vec<&mut HostTensor> {
    let mut matrices = vec![&mut weights.kv_a_proj, &mut weights.kv_b_proj, &mut weights.o_proj];
    match &mut weights.query {
        QueryWeights::Full { proj, .. } => matrices.push(proj),
        QueryWeights::LowRank { a_proj, b_proj, .. } => matrices.extend([a_proj, b_proj]),
    }
    matrices.extend(weights.gate.iter_mut().flat_map(|gate| gate.embedding.iter_mut().chain([&mut gate.b_proj])));
    matrices
}

fn matrices_of_heads(weights: &mut GqaWeights) -> [&mut HostTensor; 4] {
    [&mut weights.q_proj, &mut weights.k_proj, &mut weights.v_proj, &mut weights.o_proj]
}

const KINDS: [Option<GateSite>; 3] = [None, Some(GateSite::Latent), Some(GateSite::UpProjected)];

/// Sizes of steps; they take each path: one token, few, and many, with and without a past.
const STEPS: [usize; 7] = [70, 1, 1, 3, 9, 1, 2];

fn longest(config: &AttentionConfig) -> u32 {
    let tokens = STEPS.iter().sum::<usize>() as u32;
    let widths = [config.hidden_size, config.n_head * config.d_value, config.d_latent, config.d_kv(), tokens];
    widths.into_iter().max().unwrap()
}

/// Of a tied gate the token embedding, of another a table: an error before anything is computed.
#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let mut random = Random::new(1);
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for tied in [false, true] {
            let mut config = drawn(&mut random, Some(site));
            let hidden = config.hidden_size;
            config.gate.iter_mut().for_each(|gate| (gate.tied, gate.d_gate) = (tied, hidden));
            let mut weights = attention_weights(&config, true, 1).unwrap();
            weights.gate.as_mut().unwrap().embedding = None;
            let name = if tied { "`model.embed_tokens.weight`" } else { "`gate_embedding.weight`" };
            for refused in [
                weights.check(&config).unwrap_err(),
                Layer::new(config.clone(), &weights).unwrap_err(),
                NativeLayer::new(&config, weights).map(drop).unwrap_err(),
            ] {
                let refused = refused.to_string();
                assert!(refused.contains(name) && refused.contains("missing"), "{refused}");
            }
        }
    }
    let mut config = drawn_heads(&mut random);
    config.qkv_bias = true;
    let weights = GqaWeights { k_bias: None, ..gqa_weights(&config, 1).unwrap() };
    for refused in [
        weights.check(&config).unwrap_err(),
        GqaLayer::new(config.clone(), &weights).unwrap_err(),
        NativeGqaLayer::new(&config, weights).unwrap_err(),
    ] {
        let refused = refused.to_string();
        assert!(refused.contains("`k_proj.bias`") && refused.contains("missing"), "{refused}");
    }
}

#[test]
fn layers_of_every_kind_are_the_references() {
    let mut random = Random::new(1);
    for (number, gate) in KINDS.into_iter().cycle().take(60).enumerate() {
        let config = drawn(&mut random, gate);
        let mut weights = attention_weights(&config, true, number as u64).unwrap();
        // Of every kind in each form.
        round(number / KINDS.len(), matrices(&mut weights));
        let reference = Layer::new(config.clone(), &weights).unwrap();
        let native = NativeLayer::new(&config, weights).unwrap();
        let (mut expected_past, mut past) = (History::default(), native.history(0));
        for tokens in STEPS {
            let hidden = random.values(tokens * config.hidden_size as usize, 1.0);
            let ids = random.ids(tokens, VOCAB);
            let wide: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
            let expected = reference.forward(&wide, &ids, &mut expected_past);
            let found = error(&native.forward(&hidden, &ids, &mut past), &expected);
            let bound = bound(OF_LAYER, longest(&config));
            assert!(found < bound, "{number}, {tokens} tokens: {found:.1e}, at most {bound:.1e}; {config:?}");
        }
        assert_eq!(past.len(), expected_past.len());
    }
}

#[test]
fn layers_with_keys_and_values_per_head_are_the_references() {
    let mut random = Random::new(7);
    for number in 0..24 {
        let config = drawn_heads(&mut random);
        let mut weights = gqa_weights(&config, number).unwrap();
        round(number as usize, matrices_of_heads(&mut weights));
        let reference = GqaLayer::new(config.clone(), &weights).unwrap();
        let native = NativeGqaLayer::new(&config, weights).unwrap();
        let (mut expected_past, mut past) = (History::default(), native.history(0));
        let longest = config.hidden_size.max(config.n_head * config.head_dim).max(STEPS.iter().sum::<usize>() as u32);
        for tokens in STEPS {
            let hidden = random.values(tokens * config.hidden_size as usize, 1.0);
            let wide: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
            let expected = reference.forward(&wide, &mut expected_past);
            let found = error(&native.forward(&hidden, &mut past), &expected);
            let bound = bound(OF_LAYER, longest);
            assert!(found < bound, "{number}, {tokens} tokens: {found:.1e}, at most {bound:.1e}; {config:?}");
        }
    }
}

fn decoder(random: &mut Random, attention: DecoderAttention) -> (DecoderConfig, DecoderWeights) {
    let config = DecoderConfig {
        vocab_size: VOCAB,
        intermediate_size: 31,
        n_layer: 2,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 128,
        tie_word_embeddings: random.unit() < 0.5,
        attention,
        scales: DecoderScales { embedding: 1.5, residual: 0.7, logits: 0.25 },
    };
    let hidden = config.attention.hidden_size();
    let mut tensor = |shape: &[u32]| {
        let shape: Vec<usize> = shape.iter().map(|&extent| extent as usize).collect();
        let data = match shape[..] {
            [width] => random.values(width, 0.1).iter().map(|x| 1.0 + x).collect(),
            _ => random.values(shape.iter().product(), (shape[1] as f32).sqrt().recip()),
        };
        HostTensor { name: String::new(), shape, data }
    };
    let layers = (0..config.n_layer).map(|layer| DecoderLayerWeights {
        input_norm: tensor(&[hidden]),
        attention: match &config.attention {
            DecoderAttention::Latent(config) => {
                let mut weights = attention_weights(config, true, layer.into()).unwrap();
                // The model has it once.
                weights
                    .gate
                    .iter_mut()
                    .filter(|_| config.gate.as_ref().unwrap().tied)
                    .for_each(|gate| gate.embedding = None);
                DecoderAttentionWeights::Latent(weights)
            }
            DecoderAttention::Heads(config) => {
                DecoderAttentionWeights::Heads(gqa_weights(config, layer.into()).unwrap())
            }
        },
        post_attention_norm: tensor(&[hidden]),
        gate_proj: tensor(&[31, hidden]),
        up_proj: tensor(&[31, hidden]),
        down_proj: tensor(&[hidden, 31]),
    });
    let layers = layers.collect();
    let weights = DecoderWeights {
        layers,
        embedding: tensor(&[VOCAB, hidden]),
        norm: tensor(&[hidden]),
        lm_head: (!config.tie_word_embeddings).then(|| tensor(&[VOCAB, hidden])),
    };
    (config, weights)
}

#[test]
fn decoders_of_every_kind_are_the_references() {
    let mut random = Random::new(2);
    for number in 0..32 {
        let (attention, longest) = match KINDS.get(number % 4) {
            Some(gate) => {
                let config = drawn(&mut random, *gate);
                (DecoderAttention::Latent(config.clone()), longest(&config))
            }
            None => (DecoderAttention::Heads(drawn_heads(&mut random)), 480),
        };
        let (config, mut weights) = decoder(&mut random, attention);
        for layer in &mut weights.layers {
            match &mut layer.attention {
                DecoderAttentionWeights::Latent(weights) => round(number / 4, matrices(weights)),
                DecoderAttentionWeights::Heads(weights) => round(number / 4, matrices_of_heads(weights)),
            }
            round(number / 4, [&mut layer.gate_proj, &mut layer.up_proj, &mut layer.down_proj]);
        }
        round(number / 4, [&mut weights.embedding].into_iter().chain(&mut weights.lm_head));
        let reference = CpuDecoder::new(&config, &weights).unwrap();
        let native = NativeDecoder::new(&config, weights).unwrap();
        let (mut expected_past, mut past) = (reference.state(), native.state(10));
        let bound = bound(config.n_layer * (OF_LAYER + OF_REST) + 2, longest);
        for (step, tokens) in STEPS.into_iter().enumerate() {
            let ids = random.ids(tokens, VOCAB);
            let logits = [Logits::All, Logits::Last, Logits::None][step % 3];
            let expected = reference.forward(&ids, &mut expected_past, logits).unwrap();
            let found = native.forward(&ids, &mut past, logits).unwrap();
            assert_eq!(found.len(), expected.len());
            if logits != Logits::None {
                let found = error(&found, &expected);
                assert!(found < bound, "{number}, {tokens} tokens: {found:.1e}, at most {bound:.1e}; {config:?}");
            }
        }
        // What was forgotten is computed again.
        let ids = random.ids(5, VOCAB);
        past.truncate(30);
        expected_past.truncate(30);
        let expected = reference.forward(&ids, &mut expected_past, Logits::All).unwrap();
        let found = error(&native.forward(&ids, &mut past, Logits::All).unwrap(), &expected);
        assert!(found < bound, "{number}, after a truncation: {found:.1e}");
    }
}

/// A product of enough rows and columns for several threads, against one whose operands they do not share.
#[test]
fn threads_change_nothing_but_the_order_of_sums() {
    let config = AttentionConfig {
        hidden_size: 768,
        n_head: 8,
        d_latent: 64,
        d_nope: 32,
        d_rope: 16,
        d_value: 48,
        ..AttentionConfig::default()
    };
    let weights = attention_weights(&config, true, 3).unwrap();
    let reference = Layer::new(config.clone(), &weights).unwrap();
    let native = NativeLayer::new(&config, weights).unwrap();
    let mut random = Random::new(3);
    let (mut expected_past, mut past) = (History::default(), native.history(0));
    for tokens in [300, 1] {
        let hidden = random.values(tokens * 768, 1.0);
        let wide: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
        let expected = reference.forward(&wide, &[], &mut expected_past);
        let found = error(&native.forward(&hidden, &[], &mut past), &expected);
        assert!(found < bound(OF_LAYER, 768), "{tokens} tokens: {found:.1e}");
    }
}

/// What is not finite stays with the tokens that see it.
#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    let mut random = Random::new(4);
    for gate in KINDS {
        let mut config = AttentionConfig { hidden_size: 12, ..drawn(&mut random, gate) };
        config.gate.iter_mut().filter(|gate| gate.tied).for_each(|gate| gate.d_gate = 12);
        let layer = NativeLayer::new(&config, attention_weights(&config, true, 4).unwrap()).unwrap();
        let mut hidden = random.values(90 * 12, 1.0);
        let ids = random.ids(90, VOCAB);
        let whole = layer.forward(&hidden, &ids, &mut layer.history(90));
        hidden[80 * 12] = f32::NAN;
        let spoilt = layer.forward(&hidden, &ids, &mut layer.history(90));
        assert!(spoilt[80 * 12..].iter().all(|value| value.is_nan()));
        let close = |a: &[f32], b: &[f32]| error(a, &b.iter().copied().map(f64::from).collect::<Vec<_>>());
        assert!(close(&spoilt[..80 * 12], &whole[..80 * 12]) < bound(OF_LAYER, longest(&config)));
    }
}

#[test]
fn what_cannot_be_looked_up_is_refused() {
    let mut random = Random::new(5);
    let attention = DecoderAttention::Latent(drawn(&mut random, None));
    let (config, weights) = decoder(&mut random, attention);
    let decoder = NativeDecoder::new(&config, weights.clone()).unwrap();
    let mut state = decoder.state(0);
    let refused = |ids: &[u32], state: &mut _| decoder.forward(ids, state, Logits::Last).unwrap_err();
    assert!(matches!(refused(&[], &mut state), Error::Argument(ArgumentError::Empty { .. })));
    assert!(matches!(refused(&[1, VOCAB], &mut state), Error::Argument(ArgumentError::TokenId { index: 1, .. })));
    assert!(state.is_empty());
    let heads = DecoderConfig { attention: DecoderAttention::Heads(drawn_heads(&mut random)), ..config.clone() };
    assert!(matches!(NativeDecoder::new(&heads, weights.clone()), Err(Error::Config { .. })));
    let fewer = DecoderConfig { n_layer: 1, ..config };
    assert!(matches!(
        NativeDecoder::new(&fewer, weights),
        Err(Error::Argument(ArgumentError::Count { expected: 1, found: 2, .. }))
    ));
}

#[test]
fn a_checkpoints_layer_without_its_norm_is_the_references() {
    let config = AttentionConfig { latent_factor: 1.0, ..drawn(&mut Random::new(6), None) };
    let weights: AttentionWeights = attention_weights(&config, false, 6).unwrap();
    let hidden = Random::new(6).values(7 * config.hidden_size as usize, 1.0);
    let wide: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
    let expected = Layer::new(config.clone(), &weights).unwrap().forward(&wide, &[], &mut History::default());
    let layer = NativeLayer::new(&config, weights).unwrap();
    let found = error(&layer.forward(&hidden, &[], &mut layer.history(0)), &expected);
    assert!(found < bound(OF_LAYER, longest(&config)), "{found:.1e}");
}
