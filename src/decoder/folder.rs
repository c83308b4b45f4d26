//! A model's folder: `config.json`, `tokenizer.json`, and the weights in `model.safetensors` or in shards; or one GGUF file.

use std::path::{Path, PathBuf};

use super::model::Decoder;
use super::native::NativeDecoder;
use super::rules::TextRules;
use super::tokenizer::TextTokenizer;
use crate::attention::AttentionOptions;
use crate::checkpoint::layer_of;
use crate::config::{DecoderAttention, DecoderConfig, weight_block_size};
use crate::device::Kernels;
use crate::error::{ArgumentError, DataError, Error, Result};
use crate::files;
use crate::gguf::{self, Gguf};
use crate::storage::Storage;
use crate::weights::{AttentionWeights, Checkpoint, GqaWeights, HostTensor, TOKEN_EMBEDDING, model_folder};

/// A model in Hugging Face layout, or in a GGUF file: configuration and tokenizer are read at once, weights on request.
pub struct ModelFolder {
    path: PathBuf,
    config: DecoderConfig,
    tokenizer: TextTokenizer,
    rules: TextRules,
    /// Blocks of fp8 weights, where the configuration gives some.
    block: Option<[u32; 2]>,
}

impl std::fmt::Debug for ModelFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFolder").field("path", &self.path).field("config", &self.config).finish_non_exhaustive()
    }
}

impl ModelFolder {
    /// Opens a folder, a GGUF file, or the name `org/name` of a model in Hugging Face's cache ([`model_folder`]). Weights are
    /// checked against the configuration by [`ModelFolder::weights`].
    ///
    /// # Errors
    /// `DataError::Io` for a file that is not there or not readable; [`Error::File`] with what is wrong in `config.json`, in the
    /// headers of the weights (as [`Checkpoint::open`]) or in `tokenizer.json`, among them a tokenizer with ids beyond
    /// `vocab_size`, or in the files of [`TextRules::read`]; or in the GGUF file.
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = model_folder(dir)?;
        if gguf::is_gguf(&dir) {
            return Self::open_gguf(dir);
        }
        let config_path = dir.join("config.json");
        let text = files::read_text(&config_path, files::MOST_CONFIG)?;
        let config = DecoderConfig::from_json(&text).map_err(|error| error.in_file(&config_path))?;
        let block = weight_block_size(&text).map_err(|error| error.in_file(&config_path))?;

        Checkpoint::open(&dir)?;

        let tokenizer_path = dir.join("tokenizer.json");
        let bytes = files::read(&tokenizer_path, files::MOST_TOKENIZER)?;
        let tokenizer = TextTokenizer::from_bytes(&bytes).map_err(|error| error.in_file(&tokenizer_path))?;
        check_vocabulary(&tokenizer, &config).map_err(|error| error.in_file(&tokenizer_path))?;
        let rules = TextRules::read(&dir, &text, &tokenizer)?;
        Ok(ModelFolder { path: dir, config, tokenizer, rules, block })
    }

    fn open_gguf(path: PathBuf) -> Result<Self> {
        let file = Gguf::open(&path)?;
        let read = || {
            let config = DecoderConfig::from_json(&file.config_json()?)?;
            let tokenizer = file.tokenizer()?;
            check_vocabulary(&tokenizer, &config)?;
            Ok((config, tokenizer, file.text_rules()?))
        };
        let (config, tokenizer, rules) = read().map_err(|error: Error| error.in_file(&path))?;
        Ok(ModelFolder { path, config, tokenizer, rules, block: None })
    }

    /// The folder or file.
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

    /// When a text ends, and how a conversation is written.
    pub fn rules(&self) -> &TextRules {
        &self.rules
    }

    /// Tokens that end a text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.rules.eos_token_ids
    }

    /// A Jinja template that writes a conversation as text.
    pub fn chat_template(&self) -> Option<&str> {
        self.rules.chat_template.as_deref()
    }

    /// Ids of a text, by [`TextTokenizer::encode`].
    ///
    /// # Errors
    /// `DataError::Tokenizer` in [`Error::File`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text).map_err(|error| error.in_file(self.tokenizer_path()))
    }

    /// Ids of a text that already has its special tokens, as a chat template writes them.
    ///
    /// # Errors
    /// `DataError::Tokenizer` in [`Error::File`].
    pub fn encode_written(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode_written(text).map_err(|error| error.in_file(self.tokenizer_path()))
    }

    fn tokenizer_path(&self) -> PathBuf {
        if self.path.is_file() { self.path.clone() } else { self.path.join("tokenizer.json") }
    }

    /// Reads all weights, widened to f32, a piece of a file at a time: with a mapping instead, another process that shortens the
    /// file would end this one.
    ///
    /// # Errors
    /// `DataError::Io` if a file cannot be read any more, [`Error::File`] with a tensor that is missing, has another shape or
    /// type, or has no place in the configuration.
    pub fn weights(&self) -> Result<DecoderWeights> {
        DecoderWeights::load(&self.checkpoint()?, &self.config)
    }

    /// The decoder on a device: its weights go there layer by layer ([`Decoder::load`]).
    ///
    /// # Errors
    /// As [`ModelFolder::weights`] and [`Decoder::load`].
    pub fn decoder(&self, kernels: &Kernels, options: AttentionOptions) -> Result<Decoder> {
        Decoder::load(kernels, &self.config, &self.checkpoint()?, options)
    }

    /// The decoder on the CPU: its weights are read layer by layer ([`NativeDecoder::load`]). With f16 storage matrices are halves
    /// ([`Checkpoint::in_halves`]); else they are those that lose nothing by it.
    ///
    /// # Errors
    /// As [`ModelFolder::weights`]; a weight beyond f16's range with f16 storage.
    pub fn native_decoder(&self, storage: Storage) -> Result<NativeDecoder> {
        let checkpoint = self.checkpoint()?;
        let checkpoint = if storage == Storage::F16 { checkpoint.in_halves() } else { checkpoint };
        NativeDecoder::load(&self.config, &checkpoint)
    }

    /// The bytes of a `tokenizer.json`; of a GGUF file, of one that does the same.
    ///
    /// # Errors
    /// As [`ModelFolder::open`].
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        let path = self.tokenizer_path();
        if gguf::is_gguf(&path) {
            let json = Gguf::open(&path)?.tokenizer_json();
            return json.map(String::into_bytes).map_err(|error| error.in_file(&path));
        }
        files::read(&path, files::MOST_TOKENIZER)
    }

    /// Its weights, of which none is read yet.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn checkpoint(&self) -> Result<Checkpoint<'static>> {
        let checkpoint = Checkpoint::open(&self.path)?;
        Ok(match self.block {
            Some(block) => checkpoint.with_block_size(block),
            None => checkpoint,
        })
    }
}

/// Refuses a tokenizer with ids beyond the embedding.
fn check_vocabulary(tokenizer: &TextTokenizer, config: &DecoderConfig) -> Result<()> {
    let (needed, vocab_size) = (tokenizer.vocab_size(), config.vocab_size);
    if needed > u64::from(vocab_size) {
        let problem = format!(
            "the vocabulary needs {needed} rows of the embedding, but vocab_size in config.json is {vocab_size}"
        );
        return Err(Error::Data(DataError::Tokenizer(problem)));
    }
    Ok(())
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
            DecoderAttention::Latent(config) => Self::Latent(AttentionWeights::load_own(checkpoint, prefix, config)?),
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

impl DecoderLayerWeights {
    /// Takes the weights of layer `number` from a checkpoint.
    ///
    /// # Errors
    /// As [`DecoderWeights::load`].
    pub(crate) fn load(checkpoint: &Checkpoint<'_>, number: u32, config: &DecoderConfig) -> Result<Self> {
        let hidden = config.attention.hidden_size() as usize;
        let inner = config.intermediate_size as usize;
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
    }
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
    /// `lm_head.weight` `[vocab, hidden]`; `None` when the embedding serves as both. With `tie_word_embeddings` it is there only
    /// where a checkpoint holds one that differs from the embedding: then it is taken, with a warning, as transformers 5 does
    pub lm_head: Option<HostTensor>,
}

/// A part of a decoder's weights, as they are read.
#[expect(clippy::large_enum_variant, reason = "handles only: the elements are on the heap")]
pub(super) enum Part {
    Embedding(HostTensor),
    Layer(DecoderLayerWeights),
    Norm(HostTensor),
    /// `None` when the embedding serves as both.
    Head(Option<HostTensor>),
}

impl DecoderWeights {
    /// Takes a decoder's weights from a checkpoint that holds nothing else, but for layers behind the last that predict further
    /// tokens, with an `eh_proj`, and what [`Checkpoint::refuse_rest`] passes over.
    ///
    /// # Errors
    /// `TensorError::Missing`, `TensorError::Shape`, `TensorError::Type` or `TensorError::Extra`, each with the
    /// tensor's name; a configuration that contradicts itself.
    pub fn load(checkpoint: &Checkpoint<'_>, config: &DecoderConfig) -> Result<Self> {
        let (mut embedding, mut norm, mut lm_head) = (None, None, None);
        let mut layers = Vec::new();
        Self::visit(checkpoint, config, |part| {
            match part {
                Part::Embedding(tensor) => embedding = Some(tensor),
                Part::Layer(layer) => layers.push(layer),
                Part::Norm(tensor) => norm = Some(tensor),
                Part::Head(tensor) => lm_head = tensor,
            }
            Ok(())
        })?;
        let absent = || Error::Argument(ArgumentError::Empty { what: "the list of weights" });
        Ok(DecoderWeights { embedding: embedding.ok_or_else(absent)?, layers, norm: norm.ok_or_else(absent)?, lm_head })
    }

    /// The same, part by part: whoever drops each before the next never holds more than one.
    pub(super) fn visit(
        checkpoint: &Checkpoint<'_>,
        config: &DecoderConfig,
        mut part: impl FnMut(Part) -> Result<()>,
    ) -> Result<()> {
        config.validate()?;
        let predicting = checkpoint.prediction_layers(config.n_layer);
        checkpoint.pass_over(
            &format!("of layers that predict further tokens, from num_hidden_layers {} on", config.n_layer),
            |name| layer_of(name).is_some_and(|layer| predicting.contains(&layer)),
        );
        checkpoint.pass_over_harmless("");
        let (vocab, hidden) = (config.vocab_size as usize, config.attention.hidden_size() as usize);
        let embedding = checkpoint.take(TOKEN_EMBEDDING, &[vocab, hidden])?;
        let head = || checkpoint.take("lm_head.weight", &[vocab, hidden]);
        if config.tie_word_embeddings {
            let lm_head = if checkpoint.contains("lm_head.weight") { Some(head()?) } else { None };
            let lm_head = lm_head.filter(|head| !is_tied(head, &embedding));
            part(Part::Embedding(embedding))?;
            part(Part::Head(lm_head))?;
        } else {
            part(Part::Embedding(embedding))?;
            part(Part::Head(Some(head()?)))?;
        }
        for number in 0..config.n_layer {
            part(Part::Layer(DecoderLayerWeights::load(checkpoint, number, config)?))?;
        }
        part(Part::Norm(checkpoint.take("model.norm.weight", &[hidden])?))?;
        checkpoint.refuse_rest("")
    }

    /// Names and shapes without elements: what is planned of a model before any of it is read. The layers are all alike, and the
    /// first stands for them, with the token embedding where its gate is tied.
    pub(super) fn outline(config: &DecoderConfig) -> Result<Self> {
        config.validate()?;
        let (vocab, hidden, inner) = (config.vocab_size, config.attention.hidden_size(), config.intermediate_size);
        let make = HostTensor::outline;
        let of_layer = |name: &str, shape: &[u32]| make(&format!("model.layers.0.self_attn.{name}"), shape);
        let attention = match &config.attention {
            DecoderAttention::Latent(config) => {
                let own = AttentionWeights::build(config, true, of_layer)?;
                DecoderAttentionWeights::Latent(own.with_token_embedding(config, make)?)
            }
            DecoderAttention::Heads(config) => DecoderAttentionWeights::Heads(GqaWeights::build(config, of_layer)?),
        };
        Ok(DecoderWeights {
            embedding: make(TOKEN_EMBEDDING, &[vocab, hidden])?,
            layers: vec![DecoderLayerWeights {
                input_norm: make("model.layers.0.input_layernorm.weight", &[hidden])?,
                attention,
                post_attention_norm: make("model.layers.0.post_attention_layernorm.weight", &[hidden])?,
                gate_proj: make("model.layers.0.mlp.gate_proj.weight", &[inner, hidden])?,
                up_proj: make("model.layers.0.mlp.up_proj.weight", &[inner, hidden])?,
                down_proj: make("model.layers.0.mlp.down_proj.weight", &[hidden, inner])?,
            }],
            norm: make("model.norm.weight", &[hidden])?,
            lm_head: (!config.tie_word_embeddings).then(|| make("lm_head.weight", &[vocab, hidden])).transpose()?,
        })
    }
}

/// Whether an output embedding beside a tied one says the same; a note says which is taken.
fn is_tied(head: &HostTensor, embedding: &HostTensor) -> bool {
    let (head_name, name) = (&head.name, &embedding.name);
    let same = head.data.iter().zip(&embedding.data).all(|(a, b)| a.to_bits() == b.to_bits());
    match same {
        true => tracing::warn!(
            "passed over: tensor `{head_name}`, the same as `{name}`, to which tie_word_embeddings ties it"
        ),
        false => tracing::warn!(
            "tensor `{head_name}` differs from `{name}`, to which tie_word_embeddings ties it: it is taken as it is"
        ),
    }
    same
}
