//! Attention with keys and values per head: MHA, GQA and MQA.

use serde::Serialize;
use serde_json::{Map, Value};

use super::family::{Family, HeadsRule};
use super::keys::{Keys, parse_object};
use super::meaning::{self, Kind, Scope};
use super::rope::{RopeConfig, rope_from_map};
use super::{of_text, validate_eps};
use crate::error::{Error, Result};

/// One attention layer that caches rotated keys, and values: grouped-query attention (GQA, arXiv 2305.13245). With as many heads
/// of keys and values as of queries it is multi-head attention (MHA), with one of them multi-query attention (MQA).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GqaConfig {
    /// d, the model width.
    pub hidden_size: u32,
    /// Query heads, `num_attention_heads`.
    pub n_head: u32,
    /// Heads of keys and values, `num_key_value_heads`; divides `n_head`. Query head h reads head `h / (n_head / n_kv_head)`.
    pub n_kv_head: u32,
    /// Width of query, key and value per head; even. All of queries and keys is rotated.
    pub head_dim: u32,
    /// Biases on `q_proj`, `k_proj` and `v_proj`.
    pub qkv_bias: bool,
    /// Bias on `o_proj`.
    pub o_bias: bool,
    /// `eps` of the RMSNorm of every head of queries and keys, before rotation; `None` is no such norm.
    pub qk_norm_eps: Option<f64>,
    /// Rotary embedding; its `score_factor` has no effect here.
    pub rope: RopeConfig,
}

impl GqaConfig {
    /// Reads the attention of a `config.json` of a type with keys and values per head.
    ///
    /// # Errors
    /// `DataError::Json`, or [`Error::Config`] with every key that is not known, or that changes attention in a way that is not
    /// computed; a `model_type` that is not known.
    pub fn from_json(text: &str) -> Result<Self> {
        let map = parse_object(text)?;
        Self::from_map(of_text(&map), Scope::Attention)
    }

    pub(super) fn from_map(map: &Map<String, Value>, scope: Scope) -> Result<Self> {
        let keys = Keys::new(map, "");
        let family = Family::of_keys(&keys)?;
        meaning::check(map, (scope, Kind::Heads), keys.text("model_type")?.unwrap_or_default(), family)?;
        let rule = family.and_then(|family| family.heads).unwrap_or(HeadsRule::Llama);
        let hidden_size = keys.required_integer("hidden_size")?;
        let n_head = keys.required_integer("num_attention_heads")?;
        let n_kv_head = match (keys.integer("num_key_value_heads")?, rule) {
            (Some(heads), _) => heads,
            (None, HeadsRule::Llama) => n_head,
            // Each has its own number where there is no key.
            (None, HeadsRule::Mistral | HeadsRule::Ministral3 | HeadsRule::Qwen2 | HeadsRule::Qwen3) => {
                return Err(keys.error("num_key_value_heads", "is missing"));
            }
        };
        let head_dim = match keys.integer("head_dim")? {
            Some(width) => width,
            None if matches!(rule, HeadsRule::Ministral3 | HeadsRule::Qwen3) && !keys.holds("head_dim") => 128,
            None => hidden_size.checked_div(n_head).unwrap_or(0),
        };
        let (qkv_bias, o_bias) = match rule {
            HeadsRule::Llama | HeadsRule::Qwen3 => {
                let bias = keys.boolean("attention_bias")?.unwrap_or(false);
                (bias, bias)
            }
            HeadsRule::Mistral | HeadsRule::Ministral3 => (false, false),
            HeadsRule::Qwen2 => (true, false),
        };
        let family = family.unwrap_or(Family::of_definition());
        let rope = rope_from_map(&keys, family, family.rope())?;
        let eps = keys.float("rms_norm_eps")?.unwrap_or(family.rms_norm_eps);
        let qk_norm_eps = (rule == HeadsRule::Qwen3).then_some(eps);
        let config = GqaConfig { hidden_size, n_head, n_kv_head, head_dim, qkv_bias, o_bias, qk_norm_eps, rope };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the fields fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the checkpoint key that does not fit.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.n_head),
            ("num_key_value_heads", self.n_kv_head),
            ("head_dim", self.head_dim),
        ] {
            if value == 0 {
                return Err(Error::config(key, "is 0, must be at least 1"));
            }
        }
        if !self.n_head.is_multiple_of(self.n_kv_head) {
            let problem = format!("is {}, must divide num_attention_heads, which is {}", self.n_kv_head, self.n_head);
            return Err(Error::config("num_key_value_heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config("head_dim", format!("is {}, must be even", self.head_dim)));
        }
        // Every width and every weight is indexed with 32 bits on the device: each must stay below 2^31 elements.
        let rows = (u64::from(self.n_head) + 2 * u64::from(self.n_kv_head)).checked_mul(self.head_dim.into());
        let elements = rows.and_then(|rows| rows.checked_mul(self.hidden_size.into()));
        if elements.is_none_or(|elements| elements >= 1 << 31) {
            return Err(Error::config("head_dim", "the dimensions give a matrix of 2^31 or more elements"));
        }
        self.qk_norm_eps.map_or(Ok(()), |eps| validate_eps("rms_norm_eps", eps))?;
        self.rope.validate(self.head_dim, "head_dim")
    }

    /// Elements of a layer's weights.
    pub fn parameters(&self) -> u64 {
        let wide = u64::from;
        let (queries, keys) = (wide(self.n_head) * wide(self.head_dim), wide(self.n_kv_head) * wide(self.head_dim));
        let qkv = (queries + 2 * keys) * (wide(self.hidden_size) + wide(self.qkv_bias.into()));
        let norms = if self.qk_norm_eps.is_some() { 2 * wide(self.head_dim) } else { 0 };
        norms + qkv + (queries + wide(self.o_bias.into())) * wide(self.hidden_size)
    }

    /// Factor on the scores: `head_dim^-0.5`.
    pub fn scale(&self) -> f64 {
        f64::from(self.head_dim).powf(-0.5)
    }

    /// Elements per cached token and layer: `2 · n_kv_head · head_dim`.
    pub fn cache_elements(&self) -> u32 {
        2 * self.n_kv_head * self.head_dim
    }

    /// The same count for multi-head attention of this shape.
    pub fn mha_cache_elements(&self) -> u32 {
        2 * self.n_head * self.head_dim
    }
}
