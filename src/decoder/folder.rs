//! A model's folder: `config.json`, `model.safetensors`, `tokenizer.json`.

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::mapped;
use super::tokenizer::TextTokenizer;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::weights::{AttentionWeights, Checkpoint, HostTensor};

/// A model in Hugging Face layout: configuration and tokenizer read, weights mapped into memory.
pub struct ModelFolder {
    path: PathBuf,
    config: DecoderConfig,
    tokenizer: TextTokenizer,
    weights_path: PathBuf,
    weights: Mmap,
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
    /// [`Error::Io`] for a file that is not there or not readable; [`Error::File`] with what is wrong in `config.json`,
    /// in the header of `model.safetensors` or in `tokenizer.json`, among them a tokenizer with ids beyond `vocab_size`.
    pub fn open(dir: &Path) -> Result<Self> {
        let config_path = dir.join("config.json");
        let text =
            std::fs::read_to_string(&config_path).map_err(|source| Error::Io { path: config_path.clone(), source })?;
        let config = DecoderConfig::from_json(&text).map_err(|error| error.in_file(&config_path))?;

        let weights_path = dir.join("model.safetensors");
        let weights = mapped::map(&weights_path)?;
        Checkpoint::new(&weights).map_err(|error| error.in_file(&weights_path))?;

        let tokenizer_path = dir.join("tokenizer.json");
        let bytes =
            std::fs::read(&tokenizer_path).map_err(|source| Error::Io { path: tokenizer_path.clone(), source })?;
        let tokenizer = TextTokenizer::from_bytes(&bytes).map_err(|error| error.in_file(&tokenizer_path))?;
        if tokenizer.vocab_size() > u64::from(config.vocab_size) {
            let problem = format!(
                "the vocabulary needs {} rows of the embedding, but vocab_size in config.json is {}",
                tokenizer.vocab_size(),
                config.vocab_size
            );
            return Err(Error::Tokenizer(problem).in_file(&tokenizer_path));
        }
        Ok(ModelFolder { path: dir.to_owned(), config, tokenizer, weights_path, weights })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `config.json` says.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What `tokenizer.json` says.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// Copies all weights out of the mapped file, widened to f32.
    ///
    /// # Errors
    /// [`Error::File`] with a tensor that is missing, of another shape or type, or has no place in the configuration.
    pub fn weights(&self) -> Result<DecoderWeights> {
        Checkpoint::new(&self.weights)
            .and_then(|checkpoint| DecoderWeights::load(&checkpoint, &self.config))
            .map_err(|error| error.in_file(&self.weights_path))
    }
}

/// One layer's weights, named under `model.layers.N.`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderLayerWeights {
    /// `input_layernorm.weight` `[hidden]`
    pub input_norm: HostTensor,
    /// `self_attn.…`
    pub attention: AttentionWeights,
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
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorType`] or [`Error::ExtraTensor`], each with the
    /// tensor's name; a configuration that contradicts itself.
    pub fn load(checkpoint: &Checkpoint<'_>, config: &DecoderConfig) -> Result<Self> {
        config.validate()?;
        let vocab = config.vocab_size as usize;
        let hidden = config.attention.hidden_size as usize;
        let inner = config.intermediate_size as usize;
        let layer = |number: u32| -> Result<DecoderLayerWeights> {
            let take = |name: &str, shape: &[usize]| checkpoint.take(&format!("model.layers.{number}.{name}"), shape);
            let attention = format!("model.layers.{number}.self_attn.");
            Ok(DecoderLayerWeights {
                input_norm: take("input_layernorm.weight", &[hidden])?,
                attention: AttentionWeights::load(checkpoint, &attention, &config.attention)?,
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
