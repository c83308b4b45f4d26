//! Configurations as published models ship them: each is read by the rule of its type, or refused by name, never computed as
//! something else. Shapes and keys are those of the models' own files and of what transformers 5.23 writes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use approx::assert_relative_eq;
use egmla::config::{
    AttentionConfig, DecoderAttention, DecoderConfig, DecoderScales, GqaConfig, LOW_RANK_NORM_EPS, ModelSummary,
    QueryScaling, RopeConfig, RopeScaling, model_types,
};
use serde_json::{Value, json};

/// `base` with some keys replaced or added.
fn with(base: &Value, changes: Value) -> Value {
    let mut all = base.clone();
    all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    all
}

/// DeepSeek-V3 as it ships, without its scaling.
fn deepseek() -> Value {
    serde_json::from_str(
        r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "c"},
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280,
        "aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": true
    }"#,
    )
    .unwrap()
}

fn yarn(factor: f64, fast: f64, mscale: f64) -> Value {
    json!({"type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096})
}

/// What transformers 5.23 writes for a type: other names of rope, lists per layer, null where nothing is set.
fn written(model_type: &str) -> Value {
    with(
        &deepseek(),
        json!({
            "model_type": model_type, "head_dim": 64, "qk_head_dim": 192, "output_router_logits": false, "pad_token_id": null,
            "rope_interleave": true, "rope_theta": null, "quantization_config": null, "rope_scaling": null,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "transformers_version": "5.23.0",
            "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": null, "topk_group": null
        }),
    )
}

/// Dense layers around the attention, as Youtu-LLM's.
fn youtu() -> Value {
    json!({
        "architectures": ["YoutuForCausalLM"], "model_type": "youtu", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_head_dim": 192, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "head_dim": 64, "rope_theta": 1600000, "rope_interleave": true, "tie_word_embeddings": true,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "attention_bias": false,
        "attention_dropout": 0.0, "mlp_bias": false, "initializer_range": 0.02, "embedding_initializer_range": 0.04,
        "use_cache": true, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
        "transformers_version": "4.57.1"
    })
}

fn minicpm3() -> Value {
    let ones = vec![1.0; 16];
    json!({
        "architectures": ["MiniCPM3ForCausalLM"], "auto_map": {}, "bos_token_id": 1, "eos_token_id": [2, 73440],
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.1, "intermediate_size": 6400,
        "max_position_embeddings": 32768, "model_type": "minicpm3", "num_attention_heads": 40, "num_hidden_layers": 62,
        "num_key_value_heads": 40, "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-5, "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256, "torch_dtype": "bfloat16",
        "use_cache": true, "vocab_size": 73448,
        "rope_scaling": {"type": "longrope", "long_factor": ones, "short_factor": ones, "original_max_position_embeddings": 32768}
    })
}

fn longcat() -> Value {
    json!({
        "architectures": ["LongcatFlashForCausalLM"], "model_type": "longcat_flash", "attention_method": "MLA",
        "attention_bias": false, "hidden_size": 6144, "ffn_hidden_size": 12288, "num_layers": 28, "num_attention_heads": 64,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "mla_scale_q_lora": true, "mla_scale_kv_lora": true, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0,
        "max_position_embeddings": 131072, "n_routed_experts": 512, "zero_expert_num": 256, "zero_expert_type": "identity",
        "moe_topk": 12, "expert_ffn_hidden_size": 2048, "routed_scaling_factor": 6.0, "vocab_size": 131072
    })
}

fn kimi_linear() -> Value {
    with(
        &written("kimi_linear"),
        json!({
            "rope_parameters": null, "rope_interleave": null, "q_lora_rank": null, "num_attention_heads": 32,
            "hidden_size": 2304, "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4,
            "linear_head_dim": 128, "linear_num_heads": 32, "model_max_length": 1048576, "moe_renormalize": true,
            "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1
        }),
    )
}

/// Mistral 4 as transformers writes it; without `rope_parameters` it scales positions by default.
fn mistral4() -> Value {
    with(
        &written("mistral4"),
        json!({
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 256, "q_lora_rank": 1024,
            "qk_nope_head_dim": 64, "head_dim": 128, "qk_head_dim": 128, "first_k_dense_replace": 0,
            "max_position_embeddings": 1048576,
            "rope_parameters": {"type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0,
                "original_max_position_embeddings": 8192, "max_position_embeddings": 1048576, "beta_fast": 32.0,
                "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
                "partial_rotary_factor": 0.5}
        }),
    )
}

/// DeepSeek-V3's widths as another type.
fn of_type(name: &str) -> Value {
    let position = (name == "mistral4").then_some(json!({"rope_type": "default"}));
    with(&deepseek(), json!({"model_type": name, "rope_parameters": position}))
}

/// Heads, latent, query latent, content, rotary, value.
type Shape = (u32, u32, Option<u32>, u32, u32, u32);

/// Name, configuration, and the shape of its attention.
fn models() -> Vec<(&'static str, Value, Shape)> {
    let deepseek = deepseek();
    let kimi = json!({"model_type": "kimi_k2", "num_attention_heads": 64, "rope_scaling": yarn(32.0, 1.0, 1.0), "rope_theta": 50000.0});
    let kimi = with(&deepseek, kimi);
    let glm = json!({
        "model_type": "glm4_moe_lite", "num_attention_heads": 20, "hidden_size": 2048, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "rope_theta": 1000000.0, "rope_scaling": null,
        "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820
    });
    vec![
        (
            "DeepSeek-V3",
            with(&deepseek, json!({"rope_scaling": yarn(40.0, 32.0, 1.0)})),
            (128, 512, Some(1536), 128, 64, 128),
        ),
        (
            "DeepSeek-V2-Lite",
            with(
                &deepseek,
                json!({"model_type": "deepseek_v2", "num_attention_heads": 16, "hidden_size": 2048, "q_lora_rank": null,
                    "rope_scaling": yarn(40.0, 32.0, 0.707)}),
            ),
            (16, 512, None, 128, 64, 128),
        ),
        (
            "Moonlight",
            with(
                &deepseek,
                json!({"num_attention_heads": 16, "hidden_size": 2048, "q_lora_rank": null, "rope_theta": 50000.0}),
            ),
            (16, 512, None, 128, 64, 128),
        ),
        ("Kimi-K2", kimi.clone(), (64, 512, Some(1536), 128, 64, 128)),
        (
            "Kimi-K2.5",
            json!({"architectures": ["K"], "model_type": "kimi_k25", "dtype": "bfloat16", "text_config": kimi, "vision_config": {}}),
            (64, 512, Some(1536), 128, 64, 128),
        ),
        ("GLM-4.7-Flash", with(&deepseek, glm), (20, 512, Some(768), 192, 64, 256)),
        ("LongCat-Flash", longcat(), (64, 512, Some(1536), 128, 64, 128)),
        ("MiniCPM3", minicpm3(), (40, 256, Some(768), 64, 32, 64)),
        ("Youtu-LLM", youtu(), (16, 512, Some(1536), 128, 64, 128)),
        ("deepseek_v2, written", written("deepseek_v2"), (128, 512, Some(1536), 128, 64, 128)),
        ("deepseek_v3, written", written("deepseek_v3"), (128, 512, Some(1536), 128, 64, 128)),
        ("kimi_linear, written", kimi_linear(), (32, 512, None, 128, 64, 128)),
        ("mistral4, written", mistral4(), (32, 256, Some(1024), 64, 64, 128)),
    ]
}

fn read(config: &Value) -> AttentionConfig {
    AttentionConfig::from_json(&config.to_string()).unwrap()
}

/// The one line of a configuration that is refused, which holds each of `names`.
fn refused(config: &str, names: &[&str]) {
    let message = match AttentionConfig::from_json(config) {
        Ok(config) => panic!("it passes as {config:?}"),
        Err(error) => error.to_string(),
    };
    assert!(!message.contains('\n'), "{message}");
    for name in names {
        assert!(message.contains(name), "`{message}` does not name `{name}`");
    }
}

#[test]
fn every_model_is_read_as_it_ships() {
    for (name, config, shape) in models() {
        let found = AttentionConfig::from_json(&config.to_string()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let c = &found;
        assert_eq!((c.n_head, c.d_latent, c.d_q_latent, c.d_nope, c.d_rope, c.d_value), shape, "{name}");
        assert_eq!(c.low_rank_norm_eps, LOW_RANK_NORM_EPS, "{name}");
    }
}

#[test]
fn the_type_decides_the_arithmetic() {
    let [plain, minicpm3, kimi_linear, longcat] =
        [deepseek(), minicpm3(), kimi_linear(), longcat()].map(|config| read(&config));
    assert_eq!((plain.rope.interleave, plain.rope.rotate), (true, true));
    assert_eq!((plain.query_factor, plain.latent_factor), (1.0, 1.0));
    assert!(!minicpm3.rope.interleave);
    // 32 divisors of 1 change nothing.
    let halves = RopeConfig { scaling: RopeScaling::None, ..minicpm3.rope.clone() };
    assert_eq!(minicpm3.rope.frequencies(32), halves.frequencies(32));
    assert_eq!(minicpm3.rope.amplitude(), 1.0);
    assert!(kimi_linear.rope.frequencies(64).iter().all(|&frequency| frequency == 0.0));
    assert!(plain.rope.frequencies(64).iter().all(|&frequency| frequency > 0.0));
    assert_relative_eq!(longcat.query_factor, 2.0);
    assert_relative_eq!(longcat.latent_factor, 12f64.sqrt());
    assert_relative_eq!(longcat.scale(), 2.0 * 192f64.powf(-0.5));
    // The same names by another type's rule.
    let as_deepseek = AttentionConfig::from_json_as(&self::minicpm3().to_string(), Some("deepseek_v3"));
    let as_deepseek = as_deepseek.map_err(|error| error.to_string());
    assert!(as_deepseek.as_ref().is_err_and(|message| message.contains("v_head_dim")), "{as_deepseek:?}");
    let turned = AttentionConfig::from_json_as(&self::kimi_linear().to_string(), Some("deepseek_v3")).unwrap();
    assert!(turned.rope.rotate);
    let unscaled = with(&self::longcat(), json!({"mla_scale_q_lora": false, "mla_scale_kv_lora": false}));
    assert_eq!((read(&unscaled).query_factor, read(&unscaled).latent_factor), (1.0, 1.0));
    let eps = with(&deepseek(), json!({"low_rank_norm_eps": 1e-5}));
    assert_eq!(read(&eps).low_rank_norm_eps, 1e-5);
}

#[test]
fn types_that_are_not_computed_are_refused_by_name() {
    let mut computed = 0;
    for (name, why) in model_types() {
        let config = of_type(name);
        match why {
            None => {
                read(&config);
                computed += 1;
            }
            Some(why) => refused(&config.to_string(), &[name, why]),
        }
    }
    assert!(computed >= 10, "{computed}");
    refused(
        &with(&deepseek(), json!({"model_type": "deepseek_v9"})).to_string(),
        &["deepseek_v9", "deepseek_v3, kimi_k2"],
    );
    assert!(AttentionConfig::from_json_as(&deepseek().to_string(), Some("nonsense")).is_err());
    let unknown = with(&deepseek(), json!({"model_type": "my_own"})).to_string();
    assert_eq!(AttentionConfig::from_json_as(&unknown, Some("deepseek_v3")).unwrap(), read(&deepseek()));
}

#[test]
fn keys_that_change_attention_are_refused_all_at_once() {
    let changes = json!({"index_topk": 2048, "sliding_window": 512, "kv_lora_rnk": 3, "mla_use_output_gate": true});
    refused(
        &with(&deepseek(), changes).to_string(),
        &["index_topk", "2048", "sliding_window", "kv_lora_rnk", "mla_use_output_gate"],
    );
    // Each by itself; and without effect it is passed over.
    for (key, value, neutral) in [
        ("index_topk", json!(2048), json!(null)),
        ("sliding_window", json!(512), json!(null)),
        ("mla_use_output_gate", json!(true), json!(false)),
        ("attn_logit_softcapping", json!(30.0), json!(0.0)),
        ("partial_rotary_factor", json!(0.5), json!(1)),
        ("rope_scaling", json!({"type": "proportional", "factor": 2.0}), json!(null)),
    ] {
        refused(&with(&deepseek(), json!({key: value})).to_string(), &[key]);
        read(&with(&deepseek(), json!({key: neutral})));
    }
    read(&with(&deepseek(), json!({"use_sliding_window": false, "sliding_window": 4096})));
    let position = json!({"rope_parameters": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "llama_4_scaling_beta": 0.1}});
    refused(&with(&deepseek(), position).to_string(), &["llama_4_scaling_beta", "0.1", "deepseek_v3"]);
}

#[test]
fn queries_are_scaled_by_position_where_the_type_says_so() {
    let rope = read(&mistral4()).rope;
    assert_eq!(rope.query_scaling, Some(QueryScaling { beta: 0.1, original_max_position_embeddings: 8192.0 }));
    for (position, expected) in [
        (0, 1.0),
        (8191, 1.0),
        (8192, 1.0 + 0.1 * 2f64.ln()),
        (16383, 1.0 + 0.1 * 2f64.ln()),
        (1048575, 1.0 + 0.1 * 128f64.ln()),
    ] {
        assert_relative_eq!(rope.query_factor(position), expected, max_relative = 1e-15);
    }
    assert_eq!(read(&deepseek()).rope.query_factor(1 << 20), 1.0);
    let scaling =
        |changes: Value| with(&mistral4(), json!({"rope_parameters": with(&mistral4()["rope_parameters"], changes)}));
    for beta in [json!(0), json!(null)] {
        assert_eq!(read(&scaling(json!({"llama_4_scaling_beta": beta}))).rope.query_scaling, None);
    }
    // Of YaRN the length is that of both; without it, the factor's alone.
    let alone = json!({"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192});
    let alone = read(&with(&mistral4(), json!({"rope_parameters": alone}))).rope;
    assert_eq!((alone.query_scaling, alone.scaling), (rope.query_scaling, RopeScaling::None));
    // It says what the widths say.
    refused(&scaling(json!({"partial_rotary_factor": 0.25})).to_string(), &["partial_rotary_factor", "0.25"]);
    for (changes, names) in [
        (json!({"llama_4_scaling_beta": -1.0}), ["llama_4_scaling_beta", "above 0"]),
        (json!({"llama_4_scaling_beta": 1e38}), ["llama_4_scaling_beta", "above 0"]),
        (json!({"original_max_position_embeddings": 0}), ["original_max_position_embeddings", "0"]),
    ] {
        refused(&scaling(changes).to_string(), &names);
    }
    refused(
        &with(&mistral4(), json!({"rope_parameters": null})).to_string(),
        &["rope_parameters", "missing", "mistral4"],
    );
}

#[test]
fn a_text_may_be_written_by_any_program() {
    let text = deepseek().to_string();
    let same = read(&deepseek());
    assert_eq!(AttentionConfig::from_json(&format!("\u{feff}{text}")).unwrap(), same);
    let floats = text.replace("\"kv_lora_rank\":512", "\"kv_lora_rank\":512.0");
    assert_ne!(floats, text);
    assert_eq!(AttentionConfig::from_json(&floats).unwrap(), same);
    // Python writes these words; a text that holds them stays as it is.
    let special = text.replacen('{', r#"{"router_z":NaN,"moe_a":-Infinity,"_note":"a \" NaN, Infinity","#, 1);
    assert_eq!(AttentionConfig::from_json(&special).unwrap(), same);
    for (key, found) in [("rope_theta", "NaN"), ("kv_lora_rank", "Infinity")] {
        let config = with(&deepseek(), json!({key: null})).to_string();
        refused(&config.replace(&format!("\"{key}\":null"), &format!("\"{key}\":{found}")), &[key, found]);
    }
    refused(&text.replace("\"kv_lora_rank\":512", "\"kv_lora_rank\":512.5"), &["kv_lora_rank", "512.5"]);
    // One scaling by both names.
    let both =
        |other: Value| with(&deepseek(), json!({"rope_scaling": yarn(40.0, 32.0, 1.0), "rope_parameters": other}));
    let once = read(&with(&deepseek(), json!({"rope_scaling": yarn(40.0, 32.0, 1.0)})));
    assert_eq!(read(&both(with(&yarn(40.0, 32.0, 1.0), json!({"rope_theta": 10000.0})))), once);
    refused(&both(yarn(32.0, 32.0, 1.0)).to_string(), &["rope_scaling", "rope_parameters"]);
}

#[test]
fn scalings_as_checkpoints_mean_them() {
    let rope = |scaling: Value, theta: f64| {
        read(&with(&deepseek(), json!({"rope_scaling": scaling, "rope_theta": theta}))).rope
    };
    // By transformers' formulas in another language. Kimi-K2: both ends at 1 rotation, 19.16 pairs.
    let kimi = rope(yarn(32.0, 1.0, 1.0), 50000.0).frequencies(64);
    for (pair, expected) in [
        (0, 1.0),
        (18, 2.2742037565104418e-3),
        (19, 1.6217599081159522e-3),
        (20, 3.6140467735726306e-5),
        (31, 8.764412911589875e-7),
    ] {
        assert_relative_eq!(kimi[pair], expected, max_relative = 1e-13);
    }
    let fractions = rope(with(&yarn(40.0, 32.0, 1.0), json!({"truncate": false})), 10000.0).frequencies(64);
    for (pair, expected) in [
        (9, 7.498942093324558e-2),
        (11, 4.036758449441141e-2),
        (16, 5.524062977468265e-3),
        (23, 3.33380358040831e-5),
        (24, 2.5e-5),
    ] {
        assert_relative_eq!(fractions[pair], expected, max_relative = 1e-13);
    }
    let llama = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let llama = rope(llama, 500000.0).frequencies(64);
    for (pair, expected) in [
        (0, 1.0),
        (14, 3.2114459947525913e-3),
        (15, 1.290547928209264e-3),
        (17, 9.70828780262767e-5),
        (18, 1.9461638184831125e-5),
    ] {
        assert_relative_eq!(llama[pair], expected, max_relative = 1e-13);
    }
    let m = |x: f64| 0.1 * x * 40f64.ln() + 1.0;
    let amplitude = |changes: Value| rope(with(&yarn(40.0, 32.0, 0.707), changes), 10000.0).amplitude();
    assert_eq!(amplitude(json!({"attention_factor": 1.25})), 1.25);
    assert_relative_eq!(amplitude(json!({"mscale_all_dim": 0})), m(1.0));
    assert_relative_eq!(amplitude(json!({"mscale": 1.0})), m(1.0) / m(0.707));
    // Without a factor it is the ratio of the lengths, 163 840 / 4 096.
    assert_eq!(
        rope(with(&yarn(1.0, 32.0, 1.0), json!({"factor": null})), 10000.0),
        rope(yarn(40.0, 32.0, 1.0), 10000.0)
    );

    let long = |longest: u32, long: f64| {
        with(
            &minicpm3(),
            json!({"max_position_embeddings": longest, "rope_scaling": {"type": "longrope",
            "short_factor": vec![2.0; 16], "long_factor": vec![long; 16], "original_max_position_embeddings": 32768}}),
        )
    };
    let short = read(&long(32768, 4.0)).rope;
    assert_eq!((short.frequencies(32)[0], short.amplitude()), (0.5, 1.0));
    assert_relative_eq!(read(&long(65536, 2.0)).rope.amplitude(), (1.0 + 2f64.ln() / 32768f64.ln()).sqrt());
    refused(&long(65536, 4.0).to_string(), &["long_factor", "32768"]);
    let few = json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0],
        "original_max_position_embeddings": 32768}});
    refused(&with(&minicpm3(), few).to_string(), &["short_factor", "1", "16"]);
}

/// Up to the length of the training `dynamic` changes nothing; beyond, what it does is refused where a length is asked for.
#[test]
fn dynamic_scaling_holds_up_to_the_trained_length() {
    let scaling = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    let rope = read(&with(&deepseek(), scaling.clone())).rope;
    assert_eq!(rope.scaling, RopeScaling::Dynamic { max_position_embeddings: 163840 });
    let plain = read(&deepseek()).rope;
    assert_eq!((rope.frequencies(64), rope.amplitude()), (plain.frequencies(64), 1.0));
    rope.check_length(163840).unwrap();
    let error = rope.check_length(163841).unwrap_err().to_string();
    assert!(["dynamic", "163840", "163841"].iter().all(|part| error.contains(part)), "{error}");
    plain.check_length(usize::MAX).unwrap();
    let llama = DecoderConfig::from_json(&with(&llama(), scaling.clone()).to_string()).unwrap();
    assert_eq!(llama.attention.rope().scaling, RopeScaling::Dynamic { max_position_embeddings: 131072 });
    let mut missing = with(&deepseek(), scaling);
    missing.as_object_mut().unwrap().remove("max_position_embeddings");
    refused(&missing.to_string(), &["max_position_embeddings", "missing"]);
}

/// Without a rotary part the whole head is content (glm5_next, whose indexer is refused).
#[test]
fn a_rotary_width_of_0_is_read() {
    for name in ["deepseek_v2", "deepseek_v3", "kimi_linear", "longcat_flash"] {
        let c = read(&with(&deepseek(), json!({"model_type": name, "qk_rope_head_dim": 0})));
        assert_eq!((c.d_rope, c.d_query(), c.cache_elements()), (0, 128, 512), "{name}");
    }
    refused(
        &with(&deepseek(), json!({"qk_rope_head_dim": 0, "qk_nope_head_dim": 0})).to_string(),
        &["qk_nope_head_dim"],
    );
}

#[test]
fn whole_models_are_read_or_refused_by_name() {
    let refused = |config: &Value, names: &[&str]| {
        let message = DecoderConfig::from_json(&config.to_string()).unwrap_err().to_string();
        for name in names {
            assert!(message.contains(name), "`{message}` does not name `{name}`");
        }
    };
    assert_eq!(DecoderConfig::from_json(&youtu().to_string()).unwrap().n_layer, 32);
    let dense = with(&deepseek(), json!({"first_k_dense_replace": 61, "quantization_config": null}));
    assert_eq!(DecoderConfig::from_json(&dense.to_string()).unwrap().n_layer, 61);
    refused(&deepseek(), &["n_routed_experts", "256", "mixture of experts", "attend --layer", "info"]);
    // Scales of another type than theirs are not guessed at.
    refused(&with(&minicpm3(), json!({"model_type": "youtu"})), &["scale_depth", "1.4", "scale_emb", "dim_model_base"]);
    refused(&longcat(), &["n_routed_experts", "ffn_hidden_size"]);
    refused(&kimi_linear(), &["linear_num_heads", "num_experts"]);
}

#[test]
fn every_model_has_its_sizes_and_what_runs_it() {
    for (name, config, shape) in models() {
        let summary = ModelSummary::from_json(&config.to_string()).unwrap();
        let DecoderAttention::Latent(c) = &summary.attention else { panic!("{name}") };
        assert_eq!((c.n_head, c.d_latent, c.d_q_latent, c.d_nope, c.d_rope, c.d_value), shape, "{name}");
        assert!(summary.attention_problem.is_none(), "{name}: {:?}", summary.attention_problem);
        assert_eq!(
            summary.decoder_problem.is_none(),
            ["Youtu", "MiniCPM3"].iter().any(|dense| name.starts_with(dense)),
            "{name}: {:?}",
            summary.decoder_problem
        );
    }
    for (model_type, why) in model_types() {
        let summary = ModelSummary::from_json(&of_type(model_type).to_string()).unwrap();
        assert_eq!(summary.attention_problem.is_some(), why.is_some(), "{model_type}");
    }
    let layers = |config: Value| ModelSummary::from_json(&config.to_string()).unwrap().n_layer;
    assert_eq!((layers(deepseek()), layers(longcat()), layers(kimi_linear())), (61, 56, 1));
    assert!(ModelSummary::from_json(&with(&deepseek(), json!({"kv_lora_rank": 0})).to_string()).is_err());
    // By hand: 7168·1536 + 1536 + 1536·128·192, 7168·576 + 512, 512·128·256, 128·128·7168.
    assert_eq!(read(&deepseek()).parameters(), 48_760_320 + 4_129_280 + 16_777_216 + 117_440_512);
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    })
}

fn mistral() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32768
    })
}

fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936
    })
}

/// Its text model alone.
fn ministral3() -> Value {
    json!({
        "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 262144, "num_attention_heads": 32, "num_hidden_layers": 26,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": null, "tie_word_embeddings": true,
        "use_cache": true, "vocab_size": 131072,
        "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn",
            "type": "yarn"}
    })
}

fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936
    })
}

#[test]
fn models_with_keys_and_values_per_head_are_read() {
    let heads = |config: &Value| match DecoderConfig::from_json(&config.to_string()).unwrap().attention {
        DecoderAttention::Heads(config) => config,
        other => panic!("{other:?}"),
    };
    let shape = |c: &GqaConfig| (c.hidden_size, c.n_head, c.n_kv_head, c.head_dim, c.qkv_bias, c.o_bias);
    let c = heads(&llama());
    assert_eq!(shape(&c), (2048, 32, 8, 64, false, false));
    assert!(!c.rope.interleave && c.rope.rotate && c.rope.theta == 500000.0);
    assert!(matches!(c.rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
    assert_eq!((c.scale(), c.cache_elements(), c.mha_cache_elements()), (0.125, 1024, 4096));
    // By hand: 2048·(2048 + 2·512) and 2048·2048.
    assert_eq!(c.parameters(), 6_291_456 + 4_194_304);
    assert_eq!(shape(&heads(&mistral())), (4096, 32, 8, 128, false, false));
    assert_eq!(shape(&heads(&qwen2())), (896, 14, 2, 64, true, false));
    let c = heads(&qwen3());
    assert_eq!((shape(&c), c.qk_norm_eps), ((1024, 16, 8, 128, false, false), Some(1e-6)));
    // By hand: 1024·128·(16 + 2·8), 2048·1024 and two norms.
    assert_eq!((c.parameters(), c.rope.interleave), (4_194_304 + 2_097_152 + 256, false));
    let mut bare = qwen3();
    bare.as_object_mut().unwrap().remove("head_dim");
    bare.as_object_mut().unwrap().remove("use_sliding_window");
    let bare = with(&bare, json!({"rms_norm_eps": 1e-5, "sliding_window": 4096}));
    assert_eq!((heads(&bare).head_dim, heads(&bare).qk_norm_eps), (128, Some(1e-5)));
    assert_eq!((heads(&qwen2()).qk_norm_eps, heads(&llama()).qk_norm_eps), (None, None));
    let c = heads(&ministral3());
    assert_eq!((shape(&c), c.rope.amplitude()), ((3072, 32, 8, 128, false, false), 1.0));
    assert_eq!(c.rope.query_scaling, Some(QueryScaling { beta: 0.1, original_max_position_embeddings: 16384.0 }));
    let mut bare = ministral3();
    bare.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(heads(&bare), c);
    assert_eq!(heads(&with(&bare, json!({"head_dim": null}))).head_dim, 96);
    let bare = json!({"num_key_value_heads": null, "head_dim": null, "attention_bias": true});
    assert_eq!(shape(&heads(&with(&llama(), bare))), (2048, 32, 32, 64, true, true));
    // YaRN turns keys here as well, but does not scale the scores.
    let yarn = with(
        &llama(),
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
    );
    assert_eq!(heads(&yarn).scale(), 0.125);
    assert_relative_eq!(heads(&yarn).rope.amplitude(), 0.1 * 4f64.ln() + 1.0);
    // An unused window, as a program without the switch writes it.
    let mut unused = qwen2();
    unused.as_object_mut().unwrap().remove("use_sliding_window");
    assert_eq!(heads(&unused), heads(&qwen2()));
    let summary = ModelSummary::from_json(&llama().to_string()).unwrap();
    assert_eq!((summary.n_layer, summary.attention), (16, DecoderAttention::Heads(heads(&llama()))));
    assert!(summary.decoder_problem.is_none());
    let problem = summary.attention_problem.unwrap().to_string();
    assert!(problem.contains("model_type") && problem.contains("not latents"), "{problem}");
    assert_eq!(GqaConfig::from_json(&llama().to_string()).unwrap(), heads(&llama()));
    assert!(GqaConfig::from_json(&youtu().to_string()).unwrap_err().to_string().contains("not keys and values"));
}

#[test]
fn what_heads_do_not_compute_is_refused_by_name() {
    let refused = |config: Value, names: &[&str]| {
        let message = DecoderConfig::from_json(&config.to_string()).unwrap_err().to_string();
        for name in names {
            assert!(message.contains(name) && !message.contains('\n'), "`{message}` does not name `{name}`");
        }
    };
    refused(with(&llama(), json!({"model_type": "gemma2"})), &["model_type", "gemma2", "not known", "llama", "youtu"]);
    refused(with(&llama(), json!({"kv_lora_rank": 64})), &["kv_lora_rank", "llama"]);
    refused(with(&llama(), json!({"num_key_value_heads": 5})), &["num_key_value_heads", "5", "32"]);
    refused(with(&llama(), json!({"num_key_value_heads": 0})), &["num_key_value_heads", "0"]);
    refused(with(&llama(), json!({"head_dim": 63})), &["head_dim", "63", "even"]);
    refused(with(&llama(), json!({"head_dim": 0})), &["head_dim", "0"]);
    refused(with(&llama(), json!({"head_dim": 4_294_967_294_u64})), &["head_dim", "2^31"]);
    refused(with(&llama(), json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor", "0.5"]);
    refused(with(&llama(), json!({"rope_scaling": {"type": "dynamic"}})), &["rope_scaling.factor", "missing"]);
    refused(with(&llama(), json!({"rope_scaling": {"type": "dynamic", "factor": 0}})), &["rope_scaling.factor", "0"]);
    let alpha = json!({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}});
    refused(with(&llama(), alpha), &["rope_scaling.alpha", "not known"]);
    refused(with(&llama(), json!({"attention_multiplier": 0.5})), &["attention_multiplier", "not known"]);
    refused(with(&llama(), json!({"num_local_experts": 8})), &["num_local_experts", "mixture", "egmla info"]);
    refused(with(&llama(), json!({"layer_types": ["full_attention", "sliding_attention"]})), &["layer_types"]);
    refused(with(&llama(), json!({"mlp_bias": true})), &["mlp_bias"]);
    refused(with(&mistral(), json!({"sliding_window": 4096})), &["sliding_window", "4096"]);
    refused(with(&mistral(), json!({"num_key_value_heads": null})), &["num_key_value_heads", "missing"]);
    let mut windowed = mistral();
    windowed.as_object_mut().unwrap().remove("sliding_window");
    refused(windowed, &["sliding_window", "missing"]);
    refused(with(&qwen3(), json!({"num_key_value_heads": null})), &["num_key_value_heads", "missing"]);
    refused(with(&qwen3(), json!({"use_sliding_window": true})), &["use_sliding_window"]);
    refused(with(&qwen2(), json!({"use_sliding_window": true})), &["sliding_window", "32768", "use_sliding_window"]);
}

#[test]
fn scales_around_the_layers_are_read() {
    let scales = |config: Value| DecoderConfig::from_json(&config.to_string()).unwrap().scales;
    let of_file = DecoderScales { embedding: 12.0, residual: 1.4 / 62f64.sqrt(), logits: 0.1 };
    assert_eq!(scales(minicpm3()), of_file);
    let none = json!({"scale_emb": null, "scale_depth": null, "dim_model_base": null});
    assert_eq!(scales(with(&minicpm3(), none)), DecoderScales::default());
    let mut absent = minicpm3();
    for key in ["scale_emb", "scale_depth", "dim_model_base"] {
        absent.as_object_mut().unwrap().remove(key);
    }
    assert_eq!(scales(absent), of_file);
    assert_eq!((scales(youtu()), scales(llama())), Default::default());
    for key in ["scale_emb", "scale_depth", "dim_model_base"] {
        for value in [0.0, -1.0, 1e300, 1e-300] {
            let error = DecoderConfig::from_json(&with(&minicpm3(), json!({key: value})).to_string()).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
    // Nothing in MiniCPM3's file says that its output embedding is that of the input.
    assert!(DecoderConfig::from_json(&minicpm3().to_string()).unwrap().tie_word_embeddings);
}
