//! A model's folder: `config.json`, `model.safetensors`, `tokenizer.json`.

use std::path::{Path, PathBuf};

use super::tokenizer::TextTokenizer;
use crate::config::{DecoderAttention, DecoderConfig};
use crate::error::{DataError, Error, Result};
use crate::files;
use crate::weights::{AttentionWeights, Checkpoint, GqaWeights, HostTensor};

/// A model in Hugging Face layout: configuration and tokenizer are read at once, weights on request.
pub struct ModelFolder {
    path: PathBuf,
    config: DecoderConfig,
    tokenizer: TextTokenizer,
    weights_path: PathBuf,
}

impl std::fmt::Debug for ModelFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFolder").field("path", &self.path).field("config", &self.config).finish_non_exhaustive()
    }
}

impl ModelFolder {
    /// Opens a folder. Weights are checked against the configuration by [`ModelFolder::weights`].
    ///
    /// # Errors
    /// `DataError::Io` for a file that is not there or not readable; [`Error::File`] with what is wrong in `config.json`,
    /// in the header of `model.safetensors` or in `tokenizer.json`, among them a tokenizer with ids beyond `vocab_size`.
    pub fn open(dir: &Path) -> Result<Self> {
        let config_path = dir.join("config.json");
        let text = files::read_text(&config_path, files::MOST_CONFIG)?;
        let config = DecoderConfig::from_json(&text).map_err(|error| error.in_file(&config_path))?;

        let weights_path = dir.join("model.safetensors");
        files::check_safetensors(&weights_path)?;

        let tokenizer_path = dir.join("tokenizer.json");
        let bytes = files::read(&tokenizer_path, files::MOST_TOKENIZER)?;
        let tokenizer = TextTokenizer::from_bytes(&bytes).map_err(|error| error.in_file(&tokenizer_path))?;
        if tokenizer.vocab_size() > u64::from(config.vocab_size) {
            let problem = format!(
                "the vocabulary needs {} rows of the embedding, but vocab_size in config.json is {}",
                tokenizer.vocab_size(),
                config.vocab_size
            );
            return Err(Error::Data(DataError::Tokenizer(problem)).in_file(&tokenizer_path));
        }
        Ok(ModelFolder { path: dir.to_owned(), config, tokenizer, weights_path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The content of `tokenizer.json`.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// Ids of a text, by [`TextTokenizer::encode`].
    ///
    /// # Errors
    /// `DataError::Tokenizer` in [`Error::File`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text).map_err(|error| error.in_file(self.path.join("tokenizer.json")))
    }

    /// Reads all weights, widened to f32. The file's bytes are in memory beside them until it returns: with a mapping instead,
    /// another process that shortens the file would end this one.
    ///
    /// # Errors
    /// `DataError::Io` if the file cannot be read any more, [`Error::File`] with a tensor that is missing, has another shape or
    /// type, or has no place in the configuration.
    pub fn weights(&self) -> Result<DecoderWeights> {
        Checkpoint::new(&files::read_safetensors(&self.weights_path)?)
            .and_then(|checkpoint| DecoderWeights::load(&checkpoint, &self.config))
            .map_err(|error| error.in_file(&self.weights_path))
    }
}

/// One layer's attention, of the kind that the configuration has.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one a layer, and handles only: the elements are on the heap")]
pub enum DecoderAttentionWeights {
    /// Latents: MLA or EG-MLA.
    Latent(AttentionWeights),
    /// Keys and values per head.
    Heads(GqaWeights),
}

impl DecoderAttentionWeights {
    fn load(checkpoint: &Checkpoint<'_>, prefix: &str, config: &DecoderAttention) -> Result<Self> {
        Ok(match config {
            DecoderAttention::Latent(config) => Self::Latent(AttentionWeights::load(checkpoint, prefix, config)?),
            DecoderAttention::Heads(config) => Self::Heads(GqaWeights::load(checkpoint, prefix, config)?),
        })
    }
}

/// One layer's weights, named under `model.layers.N.`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderLayerWeights {
    /// `input_layernorm.weight` `[hidden]`
    pub input_norm: HostTensor,
    /// `self_attn.…`
    pub attention: DecoderAttentionWeights,
    /// `post_attention_layernorm.weight` `[hidden]`
    pub post_attention_norm: HostTensor,
    /// `mlp.gate_proj.weight` `[intermediate, hidden]`
    pub gate_proj: HostTensor,
    /// `mlp.up_proj.weight` `[intermediate, hidden]`
    pub up_proj: HostTensor,
    /// `mlp.down_proj.weight` `[hidden, intermediate]`
    pub down_proj: HostTensor,
}

/// The weights of a whole decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderWeights {
    /// `model.embed_tokens.weight` `[vocab, hidden]`
    pub embedding: HostTensor,
    /// The layers, first to last.
    pub layers: Vec<DecoderLayerWeights>,
    /// `model.norm.weight` `[hidden]`
    pub norm: HostTensor,
    /// `lm_head.weight` `[vocab, hidden]`; `None` when the embedding serves as both
    pub lm_head: Option<HostTensor>,
}

impl DecoderWeights {
    /// Takes a decoder's weights from a checkpoint that holds nothing else.
    ///
    /// # Errors
    /// `TensorError::Missing`, `TensorError::Shape`, `TensorError::Type` or `TensorError::Extra`, each with the
    /// tensor's name; a configuration that contradicts itself.
    pub fn load(checkpoint: &Checkpoint<'_>, config: &DecoderConfig) -> Result<Self> {
        config.validate()?;
        let vocab = config.vocab_size as usize;
        let hidden = config.attention.hidden_size() as usize;
        let inner = config.intermediate_size as usize;
        let layer = |number: u32| -> Result<DecoderLayerWeights> {
            let take = |name: &str, shape: &[usize]| checkpoint.take(&format!("model.layers.{number}.{name}"), shape);
            let attention = format!("model.layers.{number}.self_attn.");
            Ok(DecoderLayerWeights {
                input_norm: take("input_layernorm.weight", &[hidden])?,
                attention: DecoderAttentionWeights::load(checkpoint, &attention, &config.attention)?,
                post_attention_norm: take("post_attention_layernorm.weight", &[hidden])?,
                gate_proj: take("mlp.gate_proj.weight", &[inner, hidden])?,
                up_proj: take("mlp.up_proj.weight", &[inner, hidden])?,
                down_proj: take("mlp.down_proj.weight", &[hidden, inner])?,
            })
        };
        let weights = DecoderWeights {
            embedding: checkpoint.take("model.embed_tokens.weight", &[vocab, hidden])?,
            layers: (0..config.n_layer).map(layer).collect::<Result<_>>()?,
            norm: checkpoint.take("model.norm.weight", &[hidden])?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(checkpoint.take("lm_head.weight", &[vocab, hidden])?),
            },
        };
        checkpoint.refuse_rest("")?;
        Ok(weights)
    }
}
