//! Configurations as checkpoints spell them: what is read, what is refused, and the numbers that YaRN makes of it. No GPU.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use approx::{assert_abs_diff_eq, assert_relative_eq};
use egmla::config::{Activation, AttentionConfig, DecoderConfig, GateNorm, GateSite, RopeConfig, RopeScaling};
use egmla::reference::rotations;

/// A DeepSeek-style config with some top-level keys replaced or added (a null removes nothing, it stands as null).
fn json(changes: serde_json::Value) -> String {
    let mut config = serde_json::json!({
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": null,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "rms_norm_eps": 1e-5
    });
    let object = config.as_object_mut().unwrap();
    object.extend(changes.as_object().unwrap().clone());
    config.to_string()
}

fn parse(changes: serde_json::Value) -> AttentionConfig {
    AttentionConfig::from_json(&json(changes)).unwrap()
}

/// The one-line message of a config that must be refused, which names `key`.
fn refused(key: &str, changes: serde_json::Value) {
    let text = json(changes);
    match AttentionConfig::from_json(&text) {
        Ok(config) => panic!("`{text}` passes as {config:?}"),
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(key) && !message.contains('\n'), "`{message}` does not name `{key}`");
        }
    }
}

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

#[test]
fn config_defaults() {
    let config = parse(serde_json::json!({}));
    assert_eq!(config.rope, RopeConfig::default());
    assert_eq!((config.gate, config.d_q_latent, config.attention_bias), (None, None, false));
    let gate = parse(serde_json::json!({"embedding_gate": {"vocab_size": 9, "embed_dim": 3}})).gate.unwrap();
    assert_eq!((gate.site, gate.activation, gate.norm), Default::default());
    assert_eq!((gate.site, gate.activation), (GateSite::UpProjected, Activation::Identity));
    assert_eq!((gate.norm, gate.norm_eps), (GateNorm::LayerNorm, 1e-5));
}

#[test]
fn a_tied_gate_has_the_models_sizes() {
    let tied = |gate: serde_json::Value| serde_json::json!({"vocab_size": 100, "embedding_gate": gate});
    let short = parse(tied(serde_json::json!({"tied": true})));
    let gate = short.gate.clone().unwrap();
    assert_eq!((gate.tied, gate.vocab_size, gate.d_gate), (true, 100, 64));
    // Written out, they are the same.
    for gate in [
        serde_json::json!({"tied": true, "embed_dim": 64, "vocab_size": 100}),
        serde_json::json!({"tied": true, "embed_dim": null, "vocab_size": null}),
    ] {
        assert_eq!(parse(tied(gate)), short);
    }
    let alone = serde_json::json!({"embedding_gate": {"tied": true, "vocab_size": 100}});
    assert_eq!(parse(alone), short);
    // No table: only the projection of 4 · 16 keys and values, and γ and β.
    let plain = parse(serde_json::json!({}));
    assert_eq!(short.parameters() - plain.parameters(), 64 * 64 + 2 * 64);

    for (key, changes) in [
        (
            "embedding_gate.embed_dim`: is 7, but a tied gate reads token embeddings, whose width hidden_size is 64",
            tied(serde_json::json!({"tied": true, "embed_dim": 7})),
        ),
        (
            "embedding_gate.vocab_size`: is 99, but vocab_size is 100",
            tied(serde_json::json!({"tied": true, "vocab_size": 99})),
        ),
        ("`vocab_size`: is missing", serde_json::json!({"embedding_gate": {"tied": true}})),
        ("embedding_gate.tied", tied(serde_json::json!({"tied": "yes"}))),
        // A gate with a table has no sizes but its own.
        ("embed_dim", tied(serde_json::json!({"vocab_size": 100}))),
    ] {
        refused(key, changes);
    }
}

#[test]
fn config_spellings_of_rope_scaling() {
    let object = serde_json::json!({
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0
    });
    let mut renamed = object.as_object().unwrap().clone();
    let kind = renamed.remove("type").unwrap();
    renamed.insert("rope_type".to_owned(), kind);
    let mut with_theta = renamed.clone();
    with_theta.insert("rope_theta".to_owned(), 50000.into());
    let expected = yarn(40.0, Some(1.0), Some(1.0), None);
    for config in [
        serde_json::json!({"rope_scaling": object}),
        serde_json::json!({"rope_scaling": renamed}),
        serde_json::json!({"rope_parameters": object}),
        serde_json::json!({"rope_parameters": renamed, "rope_scaling": null}),
    ] {
        assert_eq!(parse(config).rope, expected);
    }
    let theta = RopeConfig { theta: 50000.0, ..expected };
    assert_eq!(parse(serde_json::json!({"rope_parameters": with_theta})).rope, theta);
    assert_eq!(parse(serde_json::json!({"rope_parameters": with_theta, "rope_theta": 50000})).rope, theta);

    let linear = parse(serde_json::json!({"rope_scaling": {"type": "linear", "factor": 2.5}})).rope.scaling;
    assert_eq!(linear, RopeScaling::Linear { factor: 2.5 });
    let default = parse(serde_json::json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}})).rope;
    assert_eq!(default, RopeConfig { theta: 7000.0, ..RopeConfig::default() });
    assert!(!parse(serde_json::json!({"rope_interleave": false})).rope.interleave);
}

#[test]
fn config_refuses_bad_dimensions() {
    refused("qk_rope_head_dim", serde_json::json!({"qk_rope_head_dim": 3}));
    for key in ["hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank", "v_head_dim"] {
        refused(key, serde_json::json!({key: 0}));
        refused(key, serde_json::json!({key: -1}));
        refused(key, serde_json::json!({key: 1.5}));
        refused(key, serde_json::json!({key: "8"}));
        refused(key, serde_json::json!({key: 4_294_967_296_u64}));
    }
    refused("qk_nope_head_dim", serde_json::json!({"qk_nope_head_dim": 0, "qk_rope_head_dim": 0}));
    for key in [
        "hidden_size",
        "num_attention_heads",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ] {
        for value in [2_147_483_648_u64, 4_294_967_294] {
            refused("2^31", serde_json::json!({key: value}));
        }
    }
    refused("kv_lora_rank", serde_json::json!({"kv_lora_rank": null}));
    for (key, gate) in [
        ("embedding_gate.vocab_size", serde_json::json!({"vocab_size": 0, "embed_dim": 3})),
        ("embedding_gate.embed_dim", serde_json::json!({"vocab_size": 9, "embed_dim": 0})),
        ("embedding_gate.vocab_size", serde_json::json!({"vocab_size": 2_147_483_648_u64, "embed_dim": 3})),
        ("embedding_gate.embed_dim", serde_json::json!({"vocab_size": 1, "embed_dim": 1_073_741_824})),
        ("embedding_gate.norm_eps", serde_json::json!({"vocab_size": 9, "embed_dim": 3, "norm_eps": 0.0})),
        ("embedding_gate.norm_eps", serde_json::json!({"vocab_size": 9, "embed_dim": 3, "norm_eps": 1e-300})),
        ("embedding_gate", serde_json::json!({"vocab_size": 9})),
        ("activations", serde_json::json!({"vocab_size": 9, "embed_dim": 3, "activations": "silu"})),
        ("relu", serde_json::json!({"vocab_size": 9, "embed_dim": 3, "activation": "relu"})),
        ("embedding_gate", serde_json::json!(true)),
    ] {
        refused(key, serde_json::json!({"embedding_gate": gate}));
    }
}

#[test]
fn config_refuses_unknown_and_contradicting_keys() {
    refused("kv_lora_rnk", serde_json::json!({"kv_lora_rnk": 16}));
    let linear = serde_json::json!({"type": "linear", "factor": 2.0});
    let other = serde_json::json!({"type": "linear", "factor": 3.0});
    refused("rope_parameters", serde_json::json!({"rope_scaling": linear, "rope_parameters": other}));
    for (key, scaling) in [
        ("rope_scaling.type", serde_json::json!({"type": "linear", "rope_type": "yarn", "factor": 2.0})),
        ("proportional", serde_json::json!({"type": "proportional", "factor": 2.0})),
        ("max_position_embeddings", serde_json::json!({"type": "dynamic", "factor": 2.0})),
        ("rope_scaling.factor", serde_json::json!({"type": "linear"})),
        ("rope_scaling.factor", serde_json::json!({"factor": 40.0})),
        ("rope_scaling.factor", serde_json::json!({"type": "default", "factor": 40.0})),
        ("rope_scaling.factor", serde_json::json!({"type": "linear", "factor": 0.0})),
        ("rope_scaling.original_max_position_embeddings", serde_json::json!({"type": "yarn", "factor": 2.0})),
        (
            "rope_scaling.beta_fst",
            serde_json::json!({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fst": 1}),
        ),
        ("rope_scaling.mscale", serde_json::json!({"type": "linear", "factor": 2.0, "mscale": 1.0})),
    ] {
        refused(key, serde_json::json!({"rope_scaling": scaling}));
    }
    for (key, value) in [("attention_factor", 0.0), ("mscale", -1.0), ("mscale_all_dim", -20.0), ("beta_fast", 0.5)] {
        let mut scaling = serde_json::json!({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64});
        scaling[key] = value.into();
        refused(key, serde_json::json!({"rope_scaling": scaling}));
    }
    let theta = serde_json::json!({"rope_type": "default", "rope_theta": 5000.0});
    refused("rope_parameters.rope_theta", serde_json::json!({"rope_theta": 10000.0, "rope_parameters": theta}));
    refused("rope_theta", serde_json::json!({"rope_theta": 0.0}));
    refused("attention_bias", serde_json::json!({"attention_bias": 1}));
    refused("q_proj_bias", serde_json::json!({"q_proj_bias": true, "q_lora_rank": 8}));
    for text in ["", "{", "[]", "null", "{} {}"] {
        assert!(AttentionConfig::from_json(text).is_err(), "`{text}` passes");
    }
}

#[test]
fn decoder_config() {
    let decoder = |changes: serde_json::Value| {
        let mut all = serde_json::json!({
            "vocab_size": 100, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64
        });
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        DecoderConfig::from_json(&json(all))
    };
    let config = decoder(serde_json::json!({"embedding_gate": {"vocab_size": 100, "embed_dim": 4}})).unwrap();
    assert_eq!((config.vocab_size, config.n_layer, config.rms_norm_eps), (100, 2, 1e-5));
    // What transformers writes beside the keys that matter here.
    let written = serde_json::json!({"num_key_value_heads": 4, "head_dim": 64, "mlp_bias": false, "auto_map": {}});
    assert!(decoder(written).is_ok());
    for (key, changes) in [
        ("embedding_gate.vocab_size", serde_json::json!({"embedding_gate": {"vocab_size": 99, "embed_dim": 4}})),
        ("n_routed_experts", serde_json::json!({"n_routed_experts": 8})),
        ("hidden_act", serde_json::json!({"hidden_act": "gelu"})),
        ("mlp_bias", serde_json::json!({"mlp_bias": true})),
        ("num_hidden_layers", serde_json::json!({"num_hidden_layers": 0})),
        ("vocab_size", serde_json::json!({"vocab_size": 2_147_483_648_u64})),
        ("rms_norm_eps", serde_json::json!({"rms_norm_eps": 0.0})),
        ("qk_rope_head_dim", serde_json::json!({"qk_rope_head_dim": 5})),
    ] {
        let message = decoder(changes).unwrap_err().to_string();
        assert!(message.contains(key), "`{message}` does not name `{key}`");
    }
}

#[test]
fn yarn_frequencies_of_deepseek() {
    let plain = RopeConfig::default().frequencies(64);
    let yarn = yarn(40.0, Some(1.0), Some(1.0), None).frequencies(64);
    // corr(32) = 10.47 and corr(1) = 22.51: kept up to pair 10, divided by 40 from pair 23.
    for i in 0..32 {
        assert_relative_eq!(plain[i], 10000f64.powf(-(i as f64) / 32.0), max_relative = 1e-14);
        let expected = match i {
            0..=10 => plain[i],
            23.. => plain[i] / 40.0,
            _ => {
                let ramp = (i as f64 - 10.0) / 13.0;
                plain[i] * (1.0 - ramp) + plain[i] / 40.0 * ramp
            }
        };
        assert_relative_eq!(yarn[i], expected, max_relative = 1e-14);
    }
    // Corners that fall together (a short original length) divide by 0.001 and not by 0.
    let mut short = self::yarn(2.0, None, None, None);
    if let RopeScaling::Yarn { original_max_position_embeddings, .. } = &mut short.scaling {
        *original_max_position_embeddings = 4.0;
    }
    assert!(short.frequencies(8).iter().all(|f| f.is_finite()));
}

#[test]
fn yarn_amplitude_and_scale() {
    let m = |x: f64| 0.1 * x * 40f64.ln() + 1.0;
    assert_relative_eq!(yarn(40.0, Some(0.7), Some(0.5), None).amplitude(), m(0.7) / m(0.5));
    assert_relative_eq!(yarn(40.0, Some(0.7), Some(0.5), Some(9.0)).amplitude(), 9.0);
    assert_relative_eq!(yarn(40.0, None, None, Some(9.0)).amplitude(), 9.0);
    assert_relative_eq!(yarn(40.0, Some(0.7), None, Some(9.0)).amplitude(), 9.0);
    assert_relative_eq!(yarn(40.0, None, None, None).amplitude(), m(1.0));
    assert_eq!(yarn(1.0, None, None, None).amplitude(), 1.0);
    assert_eq!(yarn(0.5, Some(1.0), Some(0.5), None).score_factor(), 1.0);
    let table = rotations(&yarn(40.0, None, None, None), 8, &[0]);
    assert_relative_eq!(table[0][0], m(1.0));

    let scale = |rope| AttentionConfig { d_nope: 128, d_rope: 64, rope, ..parse(serde_json::json!({})) }.scale();
    assert_abs_diff_eq!(scale(yarn(40.0, Some(1.0), Some(1.0), None)), 0.135234, epsilon = 5e-7);
    assert_abs_diff_eq!(scale(yarn(40.0, Some(0.707), Some(0.707), None)), 0.114721, epsilon = 5e-7);
    assert_relative_eq!(scale(yarn(40.0, Some(1.0), None, None)), 192f64.powf(-0.5));
    assert_relative_eq!(scale(RopeConfig::default()), 192f64.powf(-0.5));
    // Control: the width of the cache row is not the width of the query.
    assert!((scale(RopeConfig::default()) - 576f64.powf(-0.5)).abs() > 1e-2);
}
