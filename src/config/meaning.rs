//! The one list of configuration keys: which are read, which are passed over, and which change what a model computes in a way
//! that is not computed here. A key that is none of these is refused: a misspelt option must not pass as its default.

use serde_json::{Map, Value};

use super::family::{FAMILIES, Family, HeadsRule};
use super::keys::Keys;
use crate::error::Result;

/// What a configuration is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// One attention layer.
    Attention,
    /// A whole decoder.
    Decoder,
    /// Sizes alone, whatever is computed with them.
    Sizes,
}

/// What an attention layer caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One latent per token.
    Latent,
    /// Keys and values per head.
    Heads,
}

/// What a key is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Read.
    Read,
    /// No effect on results.
    Harmless,
    /// Changes attention: what it would do.
    Attention(&'static str),
    /// Changes the model around the attention: what it would do.
    Model(&'static str),
}

use Meaning::{Attention, Harmless, Model, Read};

const EXPERTS: &str = "the feed-forward part is a mixture of experts";
const CHOSEN: &str = "each query attends to chosen keys only";
const WINDOW: &str = "each query attends to the nearest keys only";
const MEDIA: &str = "the model takes more than text";

/// Keys by name. Those of [`PATTERNS`] are not repeated.
const KEYS: &[(&str, Meaning)] = &[
    // Attention.
    ("attention_bias", Read),
    ("embedding_gate", Read),
    ("head_dim", Read),
    ("hidden_size", Read),
    ("kv_lora_rank", Read),
    ("low_rank_norm_eps", Read),
    ("mla_scale_kv_lora", Read),
    ("mla_scale_q_lora", Read),
    ("mla_use_nope", Read),
    ("model_type", Read),
    ("num_attention_heads", Read),
    ("num_key_value_heads", Read),
    ("q_lora_rank", Read),
    ("q_proj_bias", Read),
    ("qk_nope_head_dim", Read),
    ("qk_rope_head_dim", Read),
    ("quantization_config", Read),
    ("rope_interleave", Read),
    ("rope_parameters", Read),
    ("rope_scaling", Read),
    ("rope_theta", Read),
    ("v_head_dim", Read),
    // The decoder around it.
    ("hidden_act", Read),
    ("intermediate_size", Read),
    ("max_position_embeddings", Read),
    ("mlp_bias", Read),
    ("num_hidden_layers", Read),
    ("rms_norm_eps", Read),
    ("tie_word_embeddings", Read),
    ("vocab_size", Read),
    // Nothing but counts that follow from others, or names.
    ("architectures", Harmless),
    ("attention_method", Harmless),
    ("auto_map", Harmless),
    ("bos_token_id", Harmless),
    ("decoder_start_token_id", Harmless),
    ("dtype", Harmless),
    ("eos_token_id", Harmless),
    ("ep_size", Harmless),
    ("first_k_dense_replace", Harmless),
    ("id2label", Harmless),
    ("is_decoder", Harmless),
    ("is_encoder_decoder", Harmless),
    ("label2id", Harmless),
    ("max_window_layers", Harmless),
    ("model_max_length", Harmless),
    ("n_group", Harmless),
    ("name_or_path", Harmless),
    ("norm_topk_prob", Harmless),
    ("num_layers", Harmless),
    ("output_attentions", Harmless),
    ("output_hidden_states", Harmless),
    ("pad_token_id", Harmless),
    ("pretraining_tp", Harmless),
    ("qk_head_dim", Harmless),
    ("return_dict", Harmless),
    ("routed_scaling_factor", Harmless),
    ("scoring_func", Harmless),
    ("sep_token_id", Harmless),
    ("seq_aux", Harmless),
    ("tokenizer_class", Harmless),
    ("torch_dtype", Harmless),
    ("torchscript", Harmless),
    ("transformers_version", Harmless),
    ("unk_token_id", Harmless),
    ("use_cache", Harmless),
    ("vocab_size_in_config", Harmless),
    // Attention that is not computed.
    ("attn_logit_softcapping", Attention("scores are bent by a tanh")),
    ("attention_chunk_size", Attention(WINDOW)),
    ("attention_scale", Attention("scores are scaled by another factor")),
    ("clip_qkv", Attention("queries, keys and values are clipped")),
    ("gated_attention", Attention("a gate multiplies the output of attention")),
    ("llama_4_scaling_beta", Attention("queries are scaled by their position")),
    ("partial_rotary_factor", Attention("a part of the rotary width is turned only")),
    ("mla_use_output_gate", Attention("a gate multiplies the output of attention")),
    ("qk_layernorm", Attention("queries and keys are normed per head")),
    ("sliding_window", Attention(WINDOW)),
    ("sliding_window_size", Attention(WINDOW)),
    ("use_head_wise_attn_gate", Attention("a gate multiplies the output of attention")),
    ("use_qk_norm", Attention("queries and keys are normed per head")),
    ("use_sliding_window", Attention(WINDOW)),
    // Models that are not computed whole.
    ("dim_model_base", Model("the output is scaled by hidden_size over it")),
    ("expert_ffn_hidden_size", Model(EXPERTS)),
    ("ffn_hidden_size", Model(EXPERTS)),
    ("final_logit_softcapping", Model("logits are bent by a tanh")),
    ("hc_mult", Model("layers have several residual streams")),
    ("language_config", Model(MEDIA)),
    ("linear_attn_config", Model("some layers have another attention")),
    ("llm_config", Model(MEDIA)),
    ("scale_depth", Model("residuals are scaled by the depth")),
    ("scale_emb", Model("embeddings are scaled")),
    ("swiglu_limit", Model("the feed-forward part is clipped")),
    ("text_config", Model(MEDIA)),
    ("zero_expert_num", Model(EXPERTS)),
    ("zero_expert_type", Harmless),
];

/// Keys of latents: in a configuration of keys and values per head they would contradict it.
const OF_LATENTS: &[&str] = &[
    "embedding_gate",
    "kv_lora_rank",
    "low_rank_norm_eps",
    "mla_scale_kv_lora",
    "mla_scale_q_lora",
    "mla_use_nope",
    "q_lora_rank",
    "q_proj_bias",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
];

/// Keys of models whose embeddings, residuals and logits are scaled.
const SCALES: &[&str] = &["dim_model_base", "scale_depth", "scale_emb"];

/// Keys by a part of their name, the first that fits.
const PATTERNS: &[(&str, Meaning)] = &[
    ("index_", Attention(CHOSEN)),
    ("indexer_", Attention(CHOSEN)),
    ("vision_", Model(MEDIA)),
    ("audio_", Model(MEDIA)),
    ("image_", Harmless),
    ("video_", Harmless),
    ("media_", Harmless),
    // Before `experts`: how many are taken, or are shared, says nothing where there are none.
    ("num_experts_per_tok", Harmless),
    ("shared_expert", Harmless),
    ("expert_group", Harmless),
    ("n_routed_experts", Model(EXPERTS)),
    ("num_experts", Model(EXPERTS)),
    ("num_local_experts", Model(EXPERTS)),
    ("expert", Harmless),
    ("moe_", Harmless),
    ("_moe", Harmless),
    ("router", Harmless),
    ("topk", Harmless),
    ("aux_loss", Harmless),
    ("initializer", Harmless),
    ("dropout", Harmless),
    ("layer_types", Harmless),
    ("linear_", Model("some layers have another attention")),
    ("nextn", Harmless),
    ("mtp", Harmless),
    ("attn_implementation", Harmless),
    ("gradient_checkpointing", Harmless),
];

fn meaning(key: &str) -> Option<Meaning> {
    let named = KEYS.iter().find(|(name, _)| *name == key);
    let by_part = || PATTERNS.iter().find(|(part, _)| key.contains(part));
    // A name that begins so is of the writer's program.
    let private = key.starts_with('_').then_some(Harmless);
    named.or_else(by_part).map(|&(_, meaning)| meaning).or(private)
}

/// No effect, as a program writes it that knows the key.
fn neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(_) | Value::Bool(true) => false,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// Refuses what is unknown, and what changes what is read; all of it in one line.
pub(super) fn check(
    map: &Map<String, Value>,
    (scope, kind): (Scope, Kind),
    model_type: &str,
    family: Option<&Family>,
) -> Result<()> {
    if scope == Scope::Sizes {
        return Ok(());
    }
    let keys = Keys::new(map, "");
    let mut problems = Vec::new();
    let of_heads = family.is_some_and(|family| family.heads.is_some());
    match family.map(|family| family.refused) {
        Some(None) if of_heads == (kind == Kind::Heads) => {}
        Some(None) => {
            let [is, not] = ["keys and values per head", "latents"];
            let [is, not] = if of_heads { [is, not] } else { [not, is] };
            problems.push(("model_type", format!("is `{model_type}`: its layers cache {is}, not {not}")));
        }
        Some(Some(why)) => problems.push(("model_type", format!("is `{model_type}`: {why}, which is not computed"))),
        None => {
            let fits = |family: &&Family| {
                family.refused.is_none() && (scope == Scope::Decoder || family.heads.is_some() == (kind == Kind::Heads))
            };
            let known: Vec<_> = FAMILIES.iter().filter(fits).map(|it| it.name).collect();
            problems.push((
                "model_type",
                format!(
                    "`{model_type}` is not known; if its attention is that of one of these, name that: {}",
                    known.join(", ")
                ),
            ));
        }
    }
    if of_heads {
        let contradicting = OF_LATENTS.iter().filter(|key| keys.get(key).is_some());
        let what = format!("does not belong to `{model_type}`, whose layers cache keys and values per head");
        problems.extend(contradicting.map(|key| (*key, what.clone())));
        let kinds = map.get("layer_types").and_then(Value::as_array);
        if kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind != "full_attention")) {
            problems.push(("layer_types", "is not `full_attention` throughout, which is not computed".to_owned()));
        }
    }
    let rule = family.and_then(|family| family.heads);
    if rule == Some(HeadsRule::Mistral) && !map.contains_key("sliding_window") {
        problems.push(("sliding_window", format!("is missing: {WINDOW}, unless it is null")));
    }
    let scaled = family.is_some_and(|family| family.scales);
    // Written beside a switch that is off, or by models all of whose layers are dense, they say nothing.
    let dense = match (map.get("first_k_dense_replace"), map.get("num_hidden_layers"), map.get("mlp_layer_types")) {
        (_, _, Some(Value::Array(kinds))) => kinds.iter().all(|kind| kind == "dense"),
        (Some(dense), Some(layers), _) => dense.as_u64().zip(layers.as_u64()).is_some_and(|(dense, all)| dense >= all),
        _ => false,
    };
    let unused = |key: &str, what: &str| match key {
        "partial_rotary_factor" => map.get(key).and_then(Value::as_f64) == Some(1.0),
        "sliding_window" => match map.get("use_sliding_window") {
            Some(used) => used == false,
            None => matches!(rule, Some(HeadsRule::Qwen2 | HeadsRule::Qwen3)),
        },
        key if SCALES.contains(&key) => scaled,
        _ => what == EXPERTS && dense,
    };
    let mut experts = false;
    for (key, value) in map {
        let what = match meaning(key) {
            Some(Attention(what)) => what,
            Some(Model(what)) if scope == Scope::Decoder => what,
            Some(_) => continue,
            None if value.is_null() => continue,
            None => {
                problems
                    .push((&**key, "is not known: remove it if it changes nothing that attention computes".to_owned()));
                continue;
            }
        };
        if !neutral(value) && !unused(key, what) {
            problems.push((&**key, format!("is {}: {what}, which is not computed", keys.shown(key))));
            experts |= what == EXPERTS;
        }
    }
    if let (true, Some((_, last))) = (experts, problems.last_mut()) {
        // What does work of such a model.
        last.push_str(match kind {
            Kind::Latent => "; `egmla attend --layer` runs one of its attention layers, `egmla info` shows its sizes",
            Kind::Heads => "; `egmla info` shows its sizes",
        });
    }
    match &problems[..] {
        [] => Ok(()),
        [(key, problem)] => Err(keys.error(key, problem.clone())),
        [(first, problem), more @ ..] => {
            let more: Vec<_> = more.iter().map(|(key, problem)| format!("`{key}`: {problem}")).collect();
            Err(keys.error(first, format!("{problem}; {}", more.join("; "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{KEYS, Meaning, PATTERNS, meaning};

    #[test]
    fn every_key_stands_once() {
        for (at, (key, _)) in KEYS.iter().enumerate() {
            assert!(KEYS[..at].iter().all(|(other, _)| other != key), "{key}");
        }
        for (at, (part, _)) in PATTERNS.iter().enumerate() {
            // One that an earlier one holds is never reached.
            assert!(PATTERNS[..at].iter().all(|(other, _)| !part.contains(other)), "{part}");
        }
    }

    #[test]
    fn misspelt_keys_of_attention_are_not_known() {
        for key in ["kv_lora_rnk", "rope_interleaved", "qk_rope_dim", "attention_biases", "embedding_gates"] {
            assert_eq!(meaning(key), None, "{key}");
        }
        assert_eq!(meaning("router_bias_update_speed"), Some(Meaning::Harmless));
    }
}
