//! What a `model_type` means beyond the names of its tensors and of its keys: the same names do not mean the same arithmetic.
//!
//! Source: the modelling files of transformers 5.23, one per type, and the checkpoints' own files where those differ.

use super::keys::Keys;
use super::rope::RopeConfig;
use crate::error::Result;

/// How queries and keys of a family are turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turning {
    /// Pairs (2i, 2i + 1), unless `rope_interleave` says otherwise.
    Neighbours,
    /// Pairs (i, i + d_rope/2), unless `rope_interleave` says otherwise.
    Halves,
    /// Not at all.
    Never,
}

/// Keys and values per head, as a family has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeadsRule {
    /// `attention_bias` biases all four projections, `num_key_value_heads` may be absent.
    Llama,
    /// No biases; without `sliding_window` there is one.
    Mistral,
    /// No biases and no window; without `head_dim` it is 128.
    Ministral3,
    /// Biases on queries, keys and values.
    Qwen2,
    /// `attention_bias` as in Llama, a norm of every head of queries and keys; without `head_dim` it is 128.
    Qwen3,
}

/// A `model_type` that is known.
#[derive(Debug)]
pub(super) struct Family {
    /// The value of `model_type`.
    pub name: &'static str,
    /// `None` caches latents (MLA), the others keys and values per head.
    pub heads: Option<HeadsRule>,
    turning: Turning,
    /// The output embedding is that of the input where a configuration does not say.
    pub tied: bool,
    /// `rms_norm_eps` where a configuration does not say.
    pub rms_norm_eps: f64,
    /// `scale_emb`, `scale_depth` and `dim_model_base` scale embeddings, residuals and logits.
    pub scales: bool,
    /// Queries are multiplied by √(hidden_size / q_lora_rank), normed latents by √(hidden_size / kv_lora_rank).
    pub scaled: bool,
    /// `llama_4_scaling_beta` multiplies queries by a factor of their position.
    pub scales_queries: bool,
    /// What its attention does that is not computed here.
    pub refused: Option<&'static str>,
}

const fn plain(name: &'static str) -> Family {
    Family {
        name,
        heads: None,
        turning: Turning::Neighbours,
        tied: false,
        rms_norm_eps: 1e-6,
        scales: false,
        scaled: false,
        scales_queries: false,
        refused: None,
    }
}

const fn of_heads(name: &'static str, rule: HeadsRule) -> Family {
    Family { heads: Some(rule), turning: Turning::Halves, ..plain(name) }
}

const fn refused(name: &'static str, why: &'static str) -> Family {
    Family { refused: Some(why), ..plain(name) }
}

const INDEXER: &str = "its queries attend only to the keys that an indexer chooses; up to index_topk tokens that is \
                       deepseek_v3's attention (without the index_… keys)";

/// The rule of `docs/definition.md`, and of configurations without a type.
const DEFINITION: Family = plain("egmla");

/// Every type that is known.
pub(super) const FAMILIES: &[Family] = &[
    DEFINITION,
    plain("deepseek_v2"),
    plain("deepseek_v3"),
    plain("kimi_k2"),
    Family { rms_norm_eps: 1e-5, ..plain("glm4_moe_lite") },
    Family { tied: true, ..plain("youtu") },
    plain("axk1"),
    Family { scaled: true, rms_norm_eps: 1e-5, ..plain("longcat_flash") },
    Family { turning: Turning::Halves, tied: true, rms_norm_eps: 1e-5, scales: true, ..plain("minicpm3") },
    Family { turning: Turning::Never, ..plain("kimi_linear") },
    Family { scales_queries: true, ..plain("mistral4") },
    of_heads("llama", HeadsRule::Llama),
    of_heads("mistral", HeadsRule::Mistral),
    Family { scales_queries: true, rms_norm_eps: 1e-5, ..of_heads("ministral3", HeadsRule::Ministral3) },
    of_heads("qwen2", HeadsRule::Qwen2),
    of_heads("qwen3", HeadsRule::Qwen3),
    refused("deepseek_v32", INDEXER),
    refused("glm_moe_dsa", INDEXER),
    refused("axk2", "its queries attend only to chosen keys, and a gate multiplies its output"),
    refused("bailing_hybrid", "a gate per head, g_proj, multiplies its output"),
    refused("dots3_note", "it norms rotary keys, and a gate, g_proj, multiplies its output"),
    refused("glm5_next", "its queries attend only to the keys that an indexer chooses"),
    refused("hy_v4", "it has attention sinks, and a gate multiplies its output"),
    refused("mistral_large4", "its queries attend only to chosen keys, and layers share keys and values"),
];

impl Family {
    /// The family of a configuration's `model_type`.
    ///
    /// # Errors
    /// The key, if it holds no text.
    pub(super) fn of_keys(keys: &Keys<'_>) -> Result<Option<&'static Family>> {
        Ok(Family::of(keys.text("model_type")?))
    }

    /// The family of a type; without one, that of the definition.
    pub(super) fn of(model_type: Option<&str>) -> Option<&'static Family> {
        match model_type {
            None => Some(Family::of_definition()),
            Some(name) => FAMILIES.iter().find(|family| family.name == name),
        }
    }

    pub(super) fn of_definition() -> &'static Family {
        &DEFINITION
    }

    pub(super) fn rope(&self) -> RopeConfig {
        RopeConfig {
            interleave: self.turning != Turning::Halves,
            rotate: self.turning != Turning::Never,
            ..RopeConfig::default()
        }
    }
}
