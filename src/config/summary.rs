//! What a configuration holds, whether or not it is computed here.

use serde_json::Value;

use super::family::Family;
use super::keys::{Keys, parse_object};
use super::meaning::Scope;
use super::{AttentionConfig, DecoderAttention, DecoderConfig, GqaConfig, of_text};
use crate::error::{Error, Result};

/// The sizes of a model, and what of it is not computed.
#[derive(Debug)]
pub struct ModelSummary {
    /// Its `model_type`.
    pub model_type: Option<String>,
    /// Layers that have this attention; both of a layer where it has two.
    pub n_layer: u32,
    /// Sizes of a layer's attention. To be computed with only where `attention_problem` is `None`.
    pub attention: DecoderAttention,
    /// Why one attention layer is not computed.
    pub attention_problem: Option<Error>,
    /// Why the model is not run whole.
    pub decoder_problem: Option<Error>,
}

impl ModelSummary {
    /// Reads any `config.json` with multi-head latent attention, or with keys and values per head.
    ///
    /// # Errors
    /// `DataError::Json`, or [`Error::Config`] for a size that is missing or impossible.
    pub fn from_json(text: &str) -> Result<Self> {
        let whole = parse_object(text)?;
        let map = of_text(&whole);
        let keys = Keys::new(map, "");
        let model_type = keys.text("model_type")?.map(str::to_owned);
        let of_heads = Family::of_keys(&keys)?.is_some_and(|family| family.heads.is_some())
            || !keys.holds("kv_lora_rank") && keys.holds("num_key_value_heads");
        let attention = match of_heads {
            true => DecoderAttention::Heads(GqaConfig::from_map(map, Scope::Sizes)?),
            false => DecoderAttention::Latent(AttentionConfig::from_map(map, None, Scope::Sizes)?),
        };
        // Layers of other kinds have no latents.
        let n_layer = match keys.get("layer_types").and_then(Value::as_array) {
            Some(kinds) if kinds.iter().any(|kind| kind == "linear_attention") => {
                kinds.iter().filter(|kind| *kind == "full_attention").count() as u32
            }
            _ => match keys.integer("num_hidden_layers")? {
                Some(layers) => layers,
                None => keys.required_integer("num_layers")?,
            },
        };
        let of_layer = if model_type.as_deref() == Some("longcat_flash") { 2 } else { 1 };
        Ok(ModelSummary {
            model_type,
            n_layer: n_layer.saturating_mul(of_layer),
            attention,
            attention_problem: AttentionConfig::from_json(text).err(),
            decoder_problem: DecoderConfig::from_json(text).err(),
        })
    }
}
