//! The decoder around the attention layers.

use serde::Serialize;

use super::family::Family;
use super::keys::{Keys, parse_object};
use super::meaning::Scope;
use super::rope::above;
use super::{AttentionConfig, GateConfig, GqaConfig, RopeConfig, quantisation, validate_eps};
use crate::error::{Error, Result};

/// Every layer's attention, by what it caches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum DecoderAttention {
    /// Latents: MLA or EG-MLA.
    Latent(AttentionConfig),
    /// Keys and values per head: MHA, GQA or MQA.
    Heads(GqaConfig),
}

impl DecoderAttention {
    /// d, the model width.
    pub fn hidden_size(&self) -> u32 {
        match self {
            DecoderAttention::Latent(config) => config.hidden_size,
            DecoderAttention::Heads(config) => config.hidden_size,
        }
    }

    /// Rotary embedding.
    pub fn rope(&self) -> &RopeConfig {
        match self {
            DecoderAttention::Latent(config) => &config.rope,
            DecoderAttention::Heads(config) => &config.rope,
        }
    }

    /// The embedding gate of EG-MLA.
    pub fn gate(&self) -> Option<&GateConfig> {
        match self {
            DecoderAttention::Latent(config) => config.gate.as_ref(),
            DecoderAttention::Heads(_) => None,
        }
    }

    /// Elements per cached token and layer.
    pub fn cache_elements(&self) -> u32 {
        match self {
            DecoderAttention::Latent(config) => config.cache_elements(),
            DecoderAttention::Heads(config) => config.cache_elements(),
        }
    }

    /// The same count for multi-head attention of this shape.
    pub fn mha_cache_elements(&self) -> u32 {
        match self {
            DecoderAttention::Latent(config) => config.mha_cache_elements(),
            DecoderAttention::Heads(config) => config.mha_cache_elements(),
        }
    }

    /// Elements of a layer's weights.
    pub fn parameters(&self) -> u64 {
        match self {
            DecoderAttention::Latent(config) => config.parameters(),
            DecoderAttention::Heads(config) => config.parameters(),
        }
    }

    /// Checks that the fields fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the checkpoint key that does not fit.
    pub fn validate(&self) -> Result<()> {
        match self {
            DecoderAttention::Latent(config) => config.validate(),
            DecoderAttention::Heads(config) => config.validate(),
        }
    }
}

/// Factors around the layers; all 1 but for MiniCPM3.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DecoderScales {
    /// On token embeddings: `scale_emb`.
    pub embedding: f64,
    /// On what a layer's attention and feed-forward part add to the residual stream: `scale_depth / √num_hidden_layers`.
    pub residual: f64,
    /// On logits: `dim_model_base / hidden_size`.
    pub logits: f64,
}

impl Default for DecoderScales {
    fn default() -> Self {
        DecoderScales { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

impl DecoderScales {
    /// Those of a family that has them. An absent key has MiniCPM3's value, null is a factor of 1.
    fn from_keys(keys: &Keys<'_>, (n_layer, hidden_size): (u32, u32)) -> Result<Self> {
        let given = |key: &str, absent: f64| match keys.holds(key) {
            false => Ok(Some(absent)),
            true => keys.float(key),
        };
        Ok(DecoderScales {
            embedding: given("scale_emb", 12.0)?.unwrap_or(1.0),
            residual: given("scale_depth", 1.4)?.map_or(1.0, |depth| depth / f64::from(n_layer).sqrt()),
            logits: given("dim_model_base", 256.0)?.map_or(1.0, |base| base / f64::from(hidden_size)),
        })
    }

    fn validate(&self) -> Result<()> {
        let keys = [("scale_emb", self.embedding), ("scale_depth", self.residual), ("dim_model_base", self.logits)];
        keys.into_iter().try_for_each(|(key, factor)| above(key, factor, 0.0))
    }
}

/// A decoder-only language model: RMSNorm, attention, RMSNorm, SwiGLU, tied or separate output embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Entries of the token embedding.
    pub vocab_size: u32,
    /// Width of the SwiGLU's inner part.
    pub intermediate_size: u32,
    /// Layers.
    pub n_layer: u32,
    /// `eps` of the decoder's RMSNorms.
    pub rms_norm_eps: f64,
    /// Longest context of the training.
    pub max_position_embeddings: u32,
    /// The output embedding is the input embedding.
    pub tie_word_embeddings: bool,
    /// Every layer's attention.
    pub attention: DecoderAttention,
    /// Factors around the layers.
    pub scales: DecoderScales,
}

impl DecoderConfig {
    /// Reads a decoder's `config.json`.
    ///
    /// # Errors
    /// `DataError::Json` or [`Error::Config`] with the key; keys of architectures that are not computed here (experts,
    /// weights quantised otherwise than by fp8) are refused by name.
    pub fn from_json(text: &str) -> Result<Self> {
        let map = parse_object(text)?;
        let keys = Keys::new(&map, "");
        let family = Family::of_keys(&keys)?;
        let attention = match family.and_then(|family| family.heads) {
            Some(_) => DecoderAttention::Heads(GqaConfig::from_map(&map, Scope::Decoder)?),
            None => DecoderAttention::Latent(AttentionConfig::from_map(&map, None, Scope::Decoder)?),
        };
        // A type that is not known has been refused.
        let family = family.unwrap_or(Family::of_definition());
        quantisation::check(&map)?;
        match keys.text("hidden_act")? {
            None | Some("silu") => {}
            Some(other) => return Err(Error::config("hidden_act", format!("`{other}` is not supported, only silu"))),
        }
        if keys.boolean("mlp_bias")? == Some(true) {
            return Err(Error::config("mlp_bias", "is true, but a bias in the feed-forward part is not supported"));
        }
        let n_layer = keys.required_integer("num_hidden_layers")?;
        let scales = match family.scales {
            true => DecoderScales::from_keys(&keys, (n_layer, attention.hidden_size()))?,
            false => DecoderScales::default(),
        };
        let config = DecoderConfig {
            vocab_size: keys.required_integer("vocab_size")?,
            intermediate_size: keys.required_integer("intermediate_size")?,
            n_layer,
            rms_norm_eps: keys.float("rms_norm_eps")?.unwrap_or(family.rms_norm_eps),
            max_position_embeddings: keys.required_integer("max_position_embeddings")?,
            tie_word_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(family.tied),
            attention,
            scales,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the fields fit each other.
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
            if u64::from(width) * u64::from(self.attention.hidden_size()) >= 1 << 31 {
                return Err(Error::config(key, "the dimensions give a matrix of 2^31 or more elements"));
            }
        }
        validate_eps("rms_norm_eps", self.rms_norm_eps)?;
        self.scales.validate()?;
        // Each may be valid, and what a device makes of them not.
        validate_eps("rms_norm_eps over scale_emb²", self.stream_eps())?;
        above("scale_depth over scale_emb", self.stream_factor(), 0.0)?;
        if let Some(gate) = self.attention.gate()
            && gate.vocab_size != self.vocab_size
        {
            return Err(Error::config(
                "embedding_gate.vocab_size",
                format!("is {}, but vocab_size is {}", gate.vocab_size, self.vocab_size),
            ));
        }
        Ok(())
    }

    /// `eps` of the norms where the residual stream is kept over the factor on embeddings. A norm makes the same of x and of x / c,
    /// whose eps is eps / c²: so that no dispatch scales embeddings.
    pub(crate) fn stream_eps(&self) -> f64 {
        self.rms_norm_eps / self.scales.embedding.powi(2)
    }

    /// Factor on what is added to that stream.
    pub(crate) fn stream_factor(&self) -> f64 {
        self.scales.residual / self.scales.embedding
    }
}
