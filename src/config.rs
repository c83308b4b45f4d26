//! Dimensions, gate and rotary embedding of a model: the one glossary of the crate.
//!
//! | here | checkpoint key | paper | meaning |
//! |---|---|---|---|
//! | `hidden_size` | `hidden_size` | d | model width |
//! | `n_head` | `num_attention_heads` | n_h | query heads |
//! | `d_latent` | `kv_lora_rank` | d_c | cached latent width |
//! | `d_q_latent` | `q_lora_rank` (null: full-rank query) | d_c' | query latent width |
//! | `d_nope` | `qk_nope_head_dim` | d_h | content part of query and key, per head |
//! | `d_rope` | `qk_rope_head_dim` | d_h^R | rotary part; one key shared by all heads; may be 0 |
//! | `d_value` | `v_head_dim` | d_h | value width per head |
//! | `d_gate` | `embedding_gate.embed_dim` | d_e | token-embedding width of the gate |
//! | [`AttentionConfig::d_kv`] | | D | `n_head · (d_nope + d_value)`, width of the up-projected keys and values |
//!
//! Papers: MLA is DeepSeek-V2 (arXiv 2405.04434) and V3 (2412.19437), EG-MLA is arXiv 2509.16686.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;

/// Where the embedding gate is applied (EG-MLA; the paper leaves it open, see the README).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateSite {
    /// On the up-projected keys and values: `kv = Norm((kv_b_proj c) ⊙ g)`. The cache holds the ungated latent.
    #[default]
    UpProjected,
    /// On the latent before it is cached: `c ← Norm(c ⊙ g)`.
    Latent,
}

/// Activation of the gate: `g = act(gate_b_proj e)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x`
    #[default]
    Identity,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `tanh x`
    Tanh,
    /// `x · sigmoid x`
    Silu,
    /// `1 + x`
    OnePlus,
}

impl Activation {
    /// Every activation, in the order of its number in the shaders.
    pub const ALL: [Activation; 5] =
        [Activation::Identity, Activation::Sigmoid, Activation::Tanh, Activation::Silu, Activation::OnePlus];
}

/// Norm after the gate, over the whole gated width, affine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateNorm {
    /// `(x − mean) / √(var + eps) · weight + bias`
    #[default]
    LayerNorm,
    /// `x / √(mean x² + eps) · weight`
    RmsNorm,
    /// No norm, no affine part.
    None,
}

impl GateNorm {
    /// Every norm, in the order of its number in the shaders.
    pub const ALL: [GateNorm; 3] = [GateNorm::LayerNorm, GateNorm::RmsNorm, GateNorm::None];
}

/// The embedding gate of EG-MLA: checkpoint key `embedding_gate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateConfig {
    /// Rows of the gate table (token ids are below it).
    pub vocab_size: u32,
    /// Width of a row, d_e in the paper.
    #[serde(rename = "embed_dim")]
    pub d_gate: u32,
    /// Where the gate acts.
    #[serde(default)]
    pub site: GateSite,
    /// What is applied to the projected row.
    #[serde(default)]
    pub activation: Activation,
    /// What follows the product.
    #[serde(default)]
    pub norm: GateNorm,
    /// `eps` of that norm.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
}

fn default_norm_eps() -> f64 {
    1e-5
}

/// How positions are stretched beyond the length a model was trained at.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071) as DeepSeek checkpoints mean it.
    Yarn {
        /// Context extension.
        factor: f64,
        /// L, the length of the original training.
        original_max_position_embeddings: f64,
        /// Rotations over L above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over L below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Numerator of the factor on cos and sin.
        mscale: Option<f64>,
        /// Its denominator; also scales the scores.
        mscale_all_dim: Option<f64>,
        /// Factor on cos and sin where the two above are not both given.
        attention_factor: Option<f64>,
    },
}

/// Rotary position embedding of the `d_rope` part of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Pairs are (2i, 2i+1) when true (DeepSeek), (i, i + d_rope/2) when false.
    pub interleave: bool,
    /// Context extension.
    pub scaling: RopeScaling,
}

impl Default for RopeConfig {
    fn default() -> Self {
        RopeConfig { theta: 10000.0, interleave: true, scaling: RopeScaling::None }
    }
}

/// `m(x) = 0.1 · x · ln(factor) + 1`, 1 when `factor` ≤ 1.
fn yarn_mscale(factor: f64, x: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * x * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// Angle per position of each of the `d_rope / 2` pairs, in radians.
    pub fn frequencies(&self, d_rope: u32) -> Vec<f64> {
        let d = f64::from(d_rope);
        let base = |i: u32| self.theta.powf(-2.0 * f64::from(i) / d);
        match self.scaling {
            RopeScaling::None => (0..d_rope / 2).map(base).collect(),
            RopeScaling::Linear { factor } => (0..d_rope / 2).map(|i| base(i) / factor).collect(),
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, .. } => {
                let correction = |rotations: f64| {
                    d * (original_max_position_embeddings / (2.0 * std::f64::consts::PI * rotations)).ln()
                        / (2.0 * self.theta.ln())
                };
                let low = correction(beta_fast).floor().max(0.0);
                let mut high = correction(beta_slow).ceil().min(d - 1.0);
                if high == low {
                    high += 0.001;
                }
                (0..d_rope / 2)
                    .map(|i| {
                        let ramp = ((f64::from(i) - low) / (high - low)).clamp(0.0, 1.0);
                        base(i) * (1.0 - ramp) + base(i) / factor * ramp
                    })
                    .collect()
            }
        }
    }

    /// Factor on cos and sin (YaRN; 1 otherwise).
    pub fn amplitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, mscale: Some(mscale), mscale_all_dim: Some(all_dim), .. } => {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
            }
            RopeScaling::Yarn { attention_factor: Some(attention_factor), .. } => attention_factor,
            RopeScaling::Yarn { factor, .. } => yarn_mscale(factor, 1.0),
            _ => 1.0,
        }
    }

    /// Factor on the scores: `mscale²` when YaRN scaling carries `mscale_all_dim`, 1 otherwise.
    pub fn score_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, mscale_all_dim: Some(all_dim), .. } => yarn_mscale(factor, all_dim).powi(2),
            _ => 1.0,
        }
    }
}

/// One attention layer, MLA or EG-MLA.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// d, the model width.
    pub hidden_size: u32,
    /// n_h, query heads.
    pub n_head: u32,
    /// d_c, width of the cached latent.
    pub d_latent: u32,
    /// d_c', width of the query latent; `None` for a full-rank query.
    pub d_q_latent: Option<u32>,
    /// Content part of query and key per head.
    pub d_nope: u32,
    /// Rotary part; even; may be 0.
    pub d_rope: u32,
    /// Value width per head.
    pub d_value: u32,
    /// Biases on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
    pub attention_bias: bool,
    /// The embedding gate; `None` is plain MLA.
    pub gate: Option<GateConfig>,
    /// Rotary embedding.
    pub rope: RopeConfig,
}

/// `eps` of `q_a_layernorm` and `kv_a_layernorm`, whatever the checkpoint's `rms_norm_eps` says of the decoder's norms.
pub const LOW_RANK_NORM_EPS: f64 = 1e-6;

/// Keys of DeepSeek-style checkpoints that say nothing about one attention layer.
const KEYS_OUTSIDE_ATTENTION: &[&str] = &[
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "ep_size",
    "first_k_dense_replace",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_nextn_predict_layers",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "rms_norm_eps",
    "routed_scaling_factor",
    "scoring_func",
    "seq_aux",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
];

const ATTENTION_KEYS: &[&str] = &[
    "attention_bias",
    "embedding_gate",
    "hidden_size",
    "kv_lora_rank",
    "num_attention_heads",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "v_head_dim",
];

/// A JSON object read key by key, with errors that name the key.
pub(crate) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Prefix of the keys in messages, as `rope_scaling.`.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Keys { map, prefix }
    }

    fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::config(&format!("{}{key}", self.prefix), problem)
    }

    /// The value, `None` when absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn integer(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().map(u32::try_from) {
            Some(Ok(number)) => Ok(Some(number)),
            _ => Err(self.error(key, format!("{value} is not a whole number from 0 to {}", u32::MAX))),
        }
    }

    pub(crate) fn required_integer(&self, key: &str) -> Result<u32> {
        self.integer(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.error(key, format!("{value} is not a finite number"))),
        }
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, format!("{value} is not true or false")))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format!("{value} is not a text")))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.error(key, format!("{value} is not an object")))
    }

    /// Refuses keys that are in none of the lists: a misspelt option must not pass as its default.
    pub(crate) fn refuse_unknown(&self, known: &[&[&str]]) -> Result<()> {
        for key in self.map.keys() {
            if !known.iter().any(|list| list.contains(&key.as_str())) {
                return Err(self.error(key, "is not known"));
            }
        }
        Ok(())
    }
}

pub(crate) fn parse_object(text: &str) -> Result<Map<String, Value>> {
    json::walk(text.as_bytes(), &mut |_| {})?;
    match serde_json::from_str(text)? {
        Value::Object(map) => Ok(map),
        other => Err(Error::config("(top level)", format!("{} is not an object", summary(&other)))),
    }
}

fn summary(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl AttentionConfig {
    /// Reads the checkpoint keys of one attention layer from the text of a `config.json`.
    ///
    /// Keys of the wider model are passed over; keys that are in neither list are refused, so that a misspelt
    /// option cannot pass as its default.
    ///
    /// # Errors
    /// [`Error::Json`] or [`Error::Config`] with the key.
    pub fn from_json(text: &str) -> Result<Self> {
        let map = parse_object(text)?;
        Keys::new(&map, "").refuse_unknown(&[ATTENTION_KEYS, KEYS_OUTSIDE_ATTENTION])?;
        Self::from_map(&map)
    }

    fn from_map(map: &Map<String, Value>) -> Result<Self> {
        let keys = Keys::new(map, "");
        let gate = match keys.object("embedding_gate")? {
            None => None,
            Some(object) => {
                let read = serde_json::from_value(Value::Object(object.clone()));
                Some(read.map_err(|error| Error::config("embedding_gate", error.to_string()))?)
            }
        };
        let config = AttentionConfig {
            hidden_size: keys.required_integer("hidden_size")?,
            n_head: keys.required_integer("num_attention_heads")?,
            d_latent: keys.required_integer("kv_lora_rank")?,
            d_q_latent: keys.integer("q_lora_rank")?,
            d_nope: keys.required_integer("qk_nope_head_dim")?,
            d_rope: keys.required_integer("qk_rope_head_dim")?,
            d_value: keys.required_integer("v_head_dim")?,
            attention_bias: keys.boolean("attention_bias")?.unwrap_or(false),
            gate,
            rope: rope_from_map(&keys)?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what the fields say against each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the checkpoint key that does not fit.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.n_head),
            ("kv_lora_rank", self.d_latent),
            ("q_lora_rank", self.d_q_latent.unwrap_or(1)),
            ("v_head_dim", self.d_value),
            ("embedding_gate.vocab_size", self.gate.as_ref().map_or(1, |gate| gate.vocab_size)),
            ("embedding_gate.embed_dim", self.gate.as_ref().map_or(1, |gate| gate.d_gate)),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(Error::config(key, "is 0, must be at least 1"));
            }
        }
        if self.d_nope == 0 && self.d_rope == 0 {
            return Err(Error::config("qk_nope_head_dim", "is 0 and so is qk_rope_head_dim: queries would be empty"));
        }
        if !self.d_rope.is_multiple_of(2) {
            return Err(Error::config("qk_rope_head_dim", format!("is {}, must be even", self.d_rope)));
        }
        // Every width and every weight is indexed with 32 bits on the device: each must stay below 2^31 elements.
        let wide = |value: u32| u64::from(value);
        let d_query = wide(self.d_nope) + wide(self.d_rope);
        let d_kv = wide(self.d_nope) + wide(self.d_value);
        let input = self.d_q_latent.map_or(wide(self.hidden_size), wide);
        let products = [
            ("num_attention_heads", wide(self.n_head).checked_mul(d_query.max(d_kv))),
            ("q_lora_rank", Some(wide(self.hidden_size) * wide(self.d_q_latent.unwrap_or(0)))),
            ("qk_nope_head_dim", wide(self.n_head).checked_mul(d_query).and_then(|rows| rows.checked_mul(input))),
            ("kv_lora_rank", (wide(self.d_latent) + wide(self.d_rope)).checked_mul(wide(self.hidden_size))),
            ("kv_lora_rank", wide(self.n_head).checked_mul(d_kv).and_then(|d| d.checked_mul(wide(self.d_latent)))),
            (
                "v_head_dim",
                wide(self.n_head).checked_mul(wide(self.d_value)).and_then(|d| d.checked_mul(wide(self.hidden_size))),
            ),
        ];
        for (key, product) in products {
            if product.is_none_or(|elements| elements >= 1 << 31) {
                return Err(Error::config(key, "the dimensions give a matrix of 2^31 or more elements"));
            }
        }
        if let Some(gate) = &self.gate {
            let gated = wide(self.gated_width());
            let sizes = [
                ("embedding_gate.vocab_size", wide(gate.vocab_size).checked_mul(wide(gate.d_gate))),
                ("embedding_gate.embed_dim", gated.checked_mul(wide(gate.d_gate))),
            ];
            for (key, product) in sizes {
                if product.is_none_or(|elements| elements >= 1 << 31) {
                    return Err(Error::config(key, "the dimensions give a matrix of 2^31 or more elements"));
                }
            }
            validate_eps("embedding_gate.norm_eps", gate.norm_eps)?;
        }
        self.validate_rope()
    }

    fn validate_rope(&self) -> Result<()> {
        // In f32, which the device computes with: what vanishes or overflows there would be NaN in every result.
        let above = |key: &str, value: f64, bound: f32| {
            let single = value as f32;
            if single.is_finite() && single > bound {
                Ok(())
            } else {
                Err(Error::config(key, format!("is {value}, must be above {bound} and finite in f32")))
            }
        };
        above("rope_theta", self.rope.theta, 1.0)?;
        match self.rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => above("rope_scaling.factor", factor, 0.0),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                attention_factor,
            } => {
                above("rope_scaling.factor", factor, 0.0)?;
                above("rope_scaling.original_max_position_embeddings", original_max_position_embeddings, 0.0)?;
                above("rope_scaling.beta_slow", beta_slow, 0.0)?;
                above("rope_scaling.beta_fast", beta_fast, beta_slow as f32)?;
                above("rope_scaling.attention_factor", attention_factor.unwrap_or(1.0), 0.0)?;
                for (key, value) in [("rope_scaling.mscale", mscale), ("rope_scaling.mscale_all_dim", mscale_all_dim)] {
                    if value.is_some_and(|value| !(value.is_finite() && value >= 0.0)) {
                        return Err(Error::config(
                            key,
                            format!("is {}, must be at least 0", value.unwrap_or_default()),
                        ));
                    }
                }
                // Each may be sound and the square of what they give too large.
                above("rope_scaling.mscale", self.rope.amplitude(), 0.0)?;
                above("rope_scaling.mscale_all_dim", self.scale(), 0.0)
            }
        }
    }

    /// `d_nope + d_rope`, width of one query head.
    pub fn d_query(&self) -> u32 {
        self.d_nope + self.d_rope
    }

    /// D of the paper: `n_head · (d_nope + d_value)`, width of the up-projected keys and values.
    pub fn d_kv(&self) -> u32 {
        self.n_head * (self.d_nope + self.d_value)
    }

    /// Width that the gate acts on: D at site `up_projected`, `d_latent` at site `latent`, 0 without a gate.
    pub fn gated_width(&self) -> u32 {
        match self.gate.as_ref().map(|gate| gate.site) {
            None => 0,
            Some(GateSite::UpProjected) => self.d_kv(),
            Some(GateSite::Latent) => self.d_latent,
        }
    }

    /// The gate, when it acts on the up-projected keys and values.
    pub fn up_projected_gate(&self) -> Option<&GateConfig> {
        self.gate.as_ref().filter(|gate| gate.site == GateSite::UpProjected)
    }

    /// The gate, when it acts on the latent before it is cached.
    pub fn latent_gate(&self) -> Option<&GateConfig> {
        self.gate.as_ref().filter(|gate| gate.site == GateSite::Latent)
    }

    /// Factor on the scores: `(d_nope + d_rope)^-0.5`, times YaRN's `mscale²`.
    pub fn scale(&self) -> f64 {
        f64::from(self.d_query()).powf(-0.5) * self.rope.score_factor()
    }

    /// Elements that the paper counts per cached token and layer: `d_latent + d_rope`. Token ids and norm statistics are
    /// bookkeeping, reported apart by [`crate::attention::MemoryReport`].
    pub fn cache_elements(&self) -> u32 {
        self.d_latent + self.d_rope
    }

    /// The same count for multi-head attention of this shape with keys and values of `d_nope` and `d_value`.
    pub fn mha_cache_elements(&self) -> u32 {
        self.d_kv()
    }
}

/// The shaders take it as f32: there it must not become 0 or infinite.
fn validate_eps(key: &str, eps: f64) -> Result<()> {
    let single = eps as f32;
    if single.is_finite() && single > 0.0 {
        return Ok(());
    }
    Err(Error::config(key, format!("is {eps}, must be above 0 and finite in f32")))
}

fn rope_from_map(keys: &Keys<'_>) -> Result<RopeConfig> {
    let defaults = RopeConfig::default();
    let parameters = match (keys.object("rope_scaling")?, keys.object("rope_parameters")?) {
        (Some(scaling), None) => Some(Keys::new(scaling, "rope_scaling.")),
        (None, Some(parameters)) => Some(Keys::new(parameters, "rope_parameters.")),
        (None, None) => None,
        (Some(_), Some(_)) => return Err(Error::config("rope_scaling", "stands beside rope_parameters: keep one")),
    };
    let mut theta = keys.float("rope_theta")?;
    let mut scaling = RopeScaling::None;
    if let Some(keys) = parameters {
        theta = match (theta, keys.float("rope_theta")?) {
            (Some(outer), Some(inner)) if outer != inner => {
                return Err(keys.error("rope_theta", format!("is {inner}, but rope_theta is {outer}")));
            }
            (outer, inner) => inner.or(outer),
        };
        let kind = match (keys.text("type")?, keys.text("rope_type")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(keys.error("type", format!("is `{a}`, but rope_type is `{b}`")));
            }
            (a, b) => a.or(b).unwrap_or("default"),
        };
        let factor = || -> Result<f64> { keys.float("factor")?.ok_or_else(|| keys.error("factor", "is missing")) };
        scaling = match kind {
            "default" | "none" => {
                keys.refuse_unknown(&[&["type", "rope_type", "rope_theta", "factor"]])?;
                if let Some(factor) = keys.float("factor")?.filter(|&factor| factor != 1.0) {
                    return Err(keys.error("factor", format!("is {factor}, but the type is missing or `{kind}`")));
                }
                RopeScaling::None
            }
            "linear" => {
                keys.refuse_unknown(&[&["type", "rope_type", "rope_theta", "factor"]])?;
                RopeScaling::Linear { factor: factor()? }
            }
            "yarn" => {
                keys.refuse_unknown(&[&[
                    "type",
                    "rope_type",
                    "rope_theta",
                    "factor",
                    "original_max_position_embeddings",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "attention_factor",
                ]])?;
                RopeScaling::Yarn {
                    factor: factor()?,
                    original_max_position_embeddings: keys
                        .float("original_max_position_embeddings")?
                        .ok_or_else(|| keys.error("original_max_position_embeddings", "is missing"))?,
                    beta_fast: keys.float("beta_fast")?.unwrap_or(32.0),
                    beta_slow: keys.float("beta_slow")?.unwrap_or(1.0),
                    mscale: keys.float("mscale")?,
                    mscale_all_dim: keys.float("mscale_all_dim")?,
                    attention_factor: keys.float("attention_factor")?,
                }
            }
            other => return Err(keys.error("type", format!("`{other}` is not one of default, linear, yarn"))),
        };
    }
    Ok(RopeConfig {
        theta: theta.unwrap_or(defaults.theta),
        interleave: keys.boolean("rope_interleave")?.unwrap_or(defaults.interleave),
        scaling,
    })
}

/// A small decoder-only language model: RMSNorm, attention, RMSNorm, SwiGLU, tied or separate output embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the token embedding.
    pub vocab_size: u32,
    /// Width of the SwiGLU's inner part.
    pub intermediate_size: u32,
    /// Layers.
    pub n_layer: u32,
    /// `eps` of the decoder's RMSNorms.
    pub rms_norm_eps: f64,
    /// Tokens the model was trained to see at once.
    pub max_position_embeddings: u32,
    /// The output embedding is the input embedding.
    pub tie_word_embeddings: bool,
    /// Every layer's attention.
    pub attention: AttentionConfig,
}

/// Decoder keys that are read, beside those of the attention.
const DECODER_KEYS: &[&str] = &[
    "hidden_act",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_hidden_layers",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
];

/// Decoder keys that change nothing of what is computed.
const IGNORED_DECODER_KEYS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "initializer_range",
    "model_type",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

impl DecoderConfig {
    /// Reads a decoder's `config.json`.
    ///
    /// # Errors
    /// [`Error::Json`] or [`Error::Config`] with the key; keys of architectures that are not computed here (experts,
    /// quantised weights) are refused by name.
    pub fn from_json(text: &str) -> Result<Self> {
        let map = parse_object(text)?;
        let keys = Keys::new(&map, "");
        keys.refuse_unknown(&[ATTENTION_KEYS, DECODER_KEYS, IGNORED_DECODER_KEYS])?;
        let attention = AttentionConfig::from_map(&map)?;
        match keys.text("hidden_act")? {
            None | Some("silu") => {}
            Some(other) => return Err(Error::config("hidden_act", format!("`{other}` is not supported, only silu"))),
        }
        if keys.boolean("mlp_bias")? == Some(true) {
            return Err(Error::config("mlp_bias", "is true, but a bias in the feed-forward part is not supported"));
        }
        let config = DecoderConfig {
            vocab_size: keys.required_integer("vocab_size")?,
            intermediate_size: keys.required_integer("intermediate_size")?,
            n_layer: keys.required_integer("num_hidden_layers")?,
            rms_norm_eps: keys.float("rms_norm_eps")?.unwrap_or(1e-6),
            max_position_embeddings: keys.required_integer("max_position_embeddings")?,
            tie_word_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what the fields say against each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the checkpoint key that does not fit.
    pub fn validate(&self) -> Result<()> {
        self.attention.validate()?;
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.n_layer),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 {
                return Err(Error::config(key, "is 0, must be at least 1"));
            }
        }
        for (key, width) in [("vocab_size", self.vocab_size), ("intermediate_size", self.intermediate_size)] {
            if u64::from(width) * u64::from(self.attention.hidden_size) >= 1 << 31 {
                return Err(Error::config(key, "the dimensions give a matrix of 2^31 or more elements"));
            }
        }
        validate_eps("rms_norm_eps", self.rms_norm_eps)?;
        if let Some(gate) = &self.attention.gate
            && gate.vocab_size != self.vocab_size
        {
            return Err(Error::config(
                "embedding_gate.vocab_size",
                format!("is {}, but vocab_size is {}", gate.vocab_size, self.vocab_size),
            ));
        }
        Ok(())
    }
}
