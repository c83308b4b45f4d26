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
//! | `d_gate` | `embedding_gate.embed_dim` | d_e | token-embedding width of the gate; `hidden_size` where it is tied |
//! | `n_kv_head` | `num_key_value_heads` | | heads of keys and values, of [`GqaConfig`] |
//! | `head_dim` | `head_dim` | | width of query, key and value per head, of [`GqaConfig`] |
//! | [`AttentionConfig::d_kv`] | | D | `n_head · (d_nope + d_value)`, width of the up-projected keys and values |
//!
//! Papers: MLA is DeepSeek-V2 (arXiv 2405.04434) and V3 (2412.19437), EG-MLA is arXiv 2509.16686.

mod decoder;
mod family;
mod gqa;
mod keys;
mod meaning;
mod quantisation;
mod rope;
mod summary;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use family::{FAMILIES, Family};
use keys::{Keys, parse_object};
use meaning::{Kind, Scope};
use rope::above;

pub use decoder::{DecoderAttention, DecoderConfig, DecoderScales};
pub use gqa::GqaConfig;
pub use quantisation::weight_block_size;
pub use rope::{QueryScaling, RopeConfig, RopeScaling};
pub use summary::ModelSummary;

/// Where the embedding gate acts (EG-MLA; the paper leaves it open, see `docs/definition.md`).
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

    /// FLOPs of one.
    pub(crate) fn flops(self) -> u64 {
        match self {
            Activation::Identity => 0,
            Activation::Tanh | Activation::OnePlus => 1,
            Activation::Sigmoid | Activation::Silu => 3,
        }
    }
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
    /// Entries of the gate table; token ids are below it. Of a tied gate the model's `vocab_size`.
    pub vocab_size: u32,
    /// Width of an entry, d_e in the paper. Of a tied gate `hidden_size`.
    #[serde(rename = "embed_dim")]
    pub d_gate: u32,
    /// Entries are rows of the model's own token embedding, each RMS-normalised over its width by [`TIED_NORM_EPS`], in place of
    /// those of a table for each layer.
    #[serde(default)]
    pub tied: bool,
    /// Where the gate acts.
    #[serde(default)]
    pub site: GateSite,
    /// Applied to the projected gate row.
    #[serde(default)]
    pub activation: Activation,
    /// Norm after the product.
    #[serde(default)]
    pub norm: GateNorm,
    /// `eps` of that norm.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
}

fn default_norm_eps() -> f64 {
    1e-5
}

/// `eps` of the norm of token embeddings that a tied gate reads: `x / √(mean x² + eps)`.
pub const TIED_NORM_EPS: f64 = 1e-6;

/// The gate of a configuration. A tied one takes both sizes from the model, and may repeat them.
fn gate_from_map(keys: &Keys<'_>) -> Result<Option<GateConfig>> {
    let Some(object) = keys.object("embedding_gate")? else { return Ok(None) };
    let mut object = object.clone();
    let of_gate = Keys::new(&object, "embedding_gate.");
    if of_gate.boolean("tied")? == Some(true) {
        let own = of_gate.integer("vocab_size")?;
        let vocab_size = match (own, keys.integer("vocab_size")?) {
            (Some(own), Some(of_model)) if own != of_model => {
                return Err(of_gate.error("vocab_size", format!("is {own}, but vocab_size is {of_model}")));
            }
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => return Err(keys.error("vocab_size", "is missing: a tied gate has a row for each token")),
        };
        let d_gate = match of_gate.integer("embed_dim")? {
            Some(width) => width,
            None => keys.required_integer("hidden_size")?,
        };
        for (key, value) in [("vocab_size", vocab_size), ("embed_dim", d_gate)] {
            object.insert(key.to_owned(), value.into());
        }
    }
    let read = serde_json::from_value(Value::Object(object));
    read.map(Some).map_err(|error| Error::config("embedding_gate", error.to_string()))
}

/// One attention layer, MLA or EG-MLA.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
    /// A bias on `q_proj`, of a full-rank query: key `q_proj_bias`. No published type has it; Qwen2 has once it is converted.
    pub q_proj_bias: bool,
    /// The embedding gate; `None` is plain MLA.
    pub gate: Option<GateConfig>,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// `eps` of `q_a_layernorm` and `kv_a_layernorm`, key `low_rank_norm_eps`: [`LOW_RANK_NORM_EPS`] by default. The checkpoint's
    /// `rms_norm_eps` is that of the decoder's norms; some engines take it here, too.
    pub low_rank_norm_eps: f64,
    /// Factor on queries; √(hidden_size / q_lora_rank) in LongCat-Flash, 1 elsewhere.
    pub query_factor: f64,
    /// Factor on the normed latent; √(hidden_size / kv_lora_rank) in LongCat-Flash, 1 elsewhere.
    pub latent_factor: f64,
}

impl Default for AttentionConfig {
    /// No sizes, which [`AttentionConfig::validate`] refuses, and every option as a configuration that does not name it.
    fn default() -> Self {
        AttentionConfig {
            hidden_size: 0,
            n_head: 0,
            d_latent: 0,
            d_q_latent: None,
            d_nope: 0,
            d_rope: 0,
            d_value: 0,
            attention_bias: false,
            q_proj_bias: false,
            gate: None,
            rope: RopeConfig::default(),
            low_rank_norm_eps: LOW_RANK_NORM_EPS,
            query_factor: 1.0,
            latent_factor: 1.0,
        }
    }
}

/// `eps` of the low-rank norms where a configuration gives none: transformers takes it for every `model_type` that is read here.
pub const LOW_RANK_NORM_EPS: f64 = 1e-6;

impl AttentionConfig {
    /// Reads the attention of a `config.json`, of any of the types in `docs/checkpoints.md`, a mixture of experts or not; of a
    /// `text_config` where that holds the attention.
    ///
    /// # Errors
    /// `DataError::Json`, or [`Error::Config`] with every key that is not known, or that changes attention in a way that is not
    /// computed; a `model_type` that is not known.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_json_as(text, None)
    }

    /// The same by the rules of another `model_type` than the configuration's.
    ///
    /// # Errors
    /// As [`AttentionConfig::from_json`].
    pub fn from_json_as(text: &str, model_type: Option<&str>) -> Result<Self> {
        let map = parse_object(text)?;
        Self::from_map(of_text(&map), model_type, Scope::Attention)
    }

    fn from_map(map: &Map<String, Value>, model_type: Option<&str>, scope: Scope) -> Result<Self> {
        let keys = Keys::new(map, "");
        let model_type = match model_type {
            Some(given) => Some(given),
            None => keys.text("model_type")?,
        };
        let family = Family::of(model_type);
        meaning::check(map, (scope, Kind::Latent), model_type.unwrap_or_default(), family)?;
        let family = family.unwrap_or(Family::of_definition());
        let hidden_size = keys.required_integer("hidden_size")?;
        let n_head = keys.required_integer("num_attention_heads")?;
        let d_latent = keys.required_integer("kv_lora_rank")?;
        let d_q_latent = keys.integer("q_lora_rank")?;
        let d_value = match keys.integer("v_head_dim")? {
            Some(width) => width,
            None if family.name == "minicpm3" => hidden_size.checked_div(n_head).unwrap_or(0),
            None => return Err(keys.error("v_head_dim", "is missing")),
        };
        let factor = |key: &str, rank: Option<u32>| -> Result<f64> {
            let scaled = keys.boolean(key)?.unwrap_or(family.scaled);
            let ratio = |rank: u32| (f64::from(hidden_size) / f64::from(rank)).sqrt();
            Ok(rank.filter(|&rank| scaled && rank > 0).map_or(1.0, ratio))
        };
        let mut rope = family.rope();
        if let Some(unturned) = keys.boolean("mla_use_nope")? {
            rope.rotate = !unturned;
        }
        let config = AttentionConfig {
            hidden_size,
            n_head,
            d_latent,
            d_q_latent,
            d_nope: keys.required_integer("qk_nope_head_dim")?,
            d_rope: keys.required_integer("qk_rope_head_dim")?,
            d_value,
            attention_bias: keys.boolean("attention_bias")?.unwrap_or(false),
            gate: gate_from_map(&keys)?,
            q_proj_bias: keys.boolean("q_proj_bias")?.unwrap_or(false),
            rope: rope::rope_from_map(&keys, family, rope)?,
            low_rank_norm_eps: keys.float("low_rank_norm_eps")?.unwrap_or(LOW_RANK_NORM_EPS),
            query_factor: factor("mla_scale_q_lora", d_q_latent)?,
            latent_factor: factor("mla_scale_kv_lora", Some(d_latent))?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the fields fit each other.
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
        if let (true, Some(rank)) = (self.q_proj_bias, self.d_q_latent) {
            let problem = format!("is true, but there is no `q_proj`: q_lora_rank is {rank}");
            return Err(Error::config("q_proj_bias", problem));
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
            if gate.tied && gate.d_gate != self.hidden_size {
                let (found, hidden) = (gate.d_gate, self.hidden_size);
                let problem =
                    format!("is {found}, but a tied gate reads token embeddings, whose width hidden_size is {hidden}");
                return Err(Error::config("embedding_gate.embed_dim", problem));
            }
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
        validate_eps("low_rank_norm_eps", self.low_rank_norm_eps)?;
        for (key, factor) in [("mla_scale_q_lora", self.query_factor), ("mla_scale_kv_lora", self.latent_factor)] {
            if !(factor.is_finite() && factor > 0.0) {
                return Err(Error::config(key, format!("gives a factor of {factor}, must be above 0 and finite")));
            }
        }
        self.validate_rope()
    }

    fn validate_rope(&self) -> Result<()> {
        self.rope.validate(self.d_rope, "qk_rope_head_dim")?;
        match self.rope.scaling {
            // Each may be valid and the square of their result too large.
            RopeScaling::Yarn { .. } => above("rope_scaling.mscale_all_dim", self.scale(), 0.0),
            _ => Ok(()),
        }
    }

    /// Elements of a layer's weights, its gate table among them; the token embedding of a tied gate is the model's.
    pub fn parameters(&self) -> u64 {
        let wide = u64::from;
        let (hidden, queries) = (wide(self.hidden_size), wide(self.n_head) * wide(self.d_query()));
        let biased = u64::from(self.attention_bias);
        let query = match self.d_q_latent.map(wide) {
            None => (hidden + u64::from(self.q_proj_bias)) * queries,
            Some(rank) => (hidden + biased + 1 + queries) * rank,
        };
        let down = (hidden + biased) * (wide(self.d_latent) + wide(self.d_rope)) + wide(self.d_latent);
        let up = wide(self.d_latent) * wide(self.d_kv());
        let out = (wide(self.n_head) * wide(self.d_value) + biased) * hidden;
        let gate = self.gate.as_ref().map_or(0, |gate| {
            let affine = match gate.norm {
                GateNorm::LayerNorm => 2,
                GateNorm::RmsNorm => 1,
                GateNorm::None => 0,
            };
            let table = if gate.tied { 0 } else { wide(gate.d_gate) * wide(gate.vocab_size) };
            table + (wide(gate.d_gate) + affine) * wide(self.gated_width())
        });
        query + down + up + out + gate
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

    /// Factor on the scores: `(d_nope + d_rope)^-0.5`, times YaRN's `mscale²`, times that on queries.
    pub fn scale(&self) -> f64 {
        f64::from(self.d_query()).powf(-0.5) * self.rope.score_factor() * self.query_factor
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

/// Where the attention of a configuration stands: models of more than text nest it.
fn of_text(map: &Map<String, Value>) -> &Map<String, Value> {
    let nested = || ["text_config", "language_config", "llm_config"].iter().find_map(|key| map.get(*key)?.as_object());
    if map.contains_key("kv_lora_rank") { map } else { nested().unwrap_or(map) }
}

/// Every `model_type` with latents that is known, and what is not computed of it.
pub fn model_types() -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    FAMILIES.iter().filter(|family| family.heads.is_none()).map(|family| (family.name, family.refused))
}

/// The shaders take it as f32: there it must not become 0 or infinite.
fn validate_eps(key: &str, eps: f64) -> Result<()> {
    let single = eps as f32;
    if single.is_finite() && single > 0.0 {
        return Ok(());
    }
    Err(Error::config(key, format!("is {eps}, must be above 0 and finite in f32")))
}
