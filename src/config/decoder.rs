//! The small decoder around the attention layers.

use super::keys::{Keys, parse_object};
use super::meaning::Scope;
use super::{AttentionConfig, validate_eps};
use crate::error::{Error, Result};

/// A small decoder-only language model: RMSNorm, attention, RMSNorm, SwiGLU, tied or separate output embedding.
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
    pub attention: AttentionConfig,
}

impl DecoderConfig {
    /// Reads a decoder's `config.json`.
    ///
    /// # Errors
    /// `DataError::Json` or [`Error::Config`] with the key; keys of architectures that are not computed here (experts,
    /// quantised weights) are refused by name.
    pub fn from_json(text: &str) -> Result<Self> {
        let map = parse_object(text)?;
        let keys = Keys::new(&map, "");
        let attention = AttentionConfig::from_map(&map, None, Scope::Decoder)?;
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
