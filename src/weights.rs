//! Weights on the host: read from a checkpoint by name, checked against the configuration.

mod gqa;

use crate::config::{AttentionConfig, GateNorm};
use crate::error::{Error, Result, TensorError};

pub use crate::checkpoint::{Checkpoint, LayerNumber, TensorInfo, model_folder};
pub use gqa::GqaWeights;

/// Name of a model's token embedding, `[vocab, hidden]`.
pub(crate) const TOKEN_EMBEDDING: &str = "model.embed_tokens.weight";

/// A tensor in host memory, row-major, widened to f32 (exact for f16 and bf16 checkpoints).
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Full name in the checkpoint.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` elements.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// The same values in double precision, as the reference takes them.
    pub fn to_f64(&self) -> Vec<f64> {
        self.data.iter().copied().map(f64::from).collect()
    }

    /// A name and a shape, without elements; a `Result`, as what reads a tensor has it.
    pub(crate) fn outline(name: &str, shape: &[u32]) -> Result<HostTensor> {
        let shape = shape.iter().map(|&extent| extent as usize).collect();
        Ok(HostTensor { name: name.to_owned(), shape, data: Vec::new() })
    }
}

/// The query projection: one matrix, or two with a norm between them.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryWeights {
    /// `q_proj` `[n_head·(d_nope+d_rope), hidden]`.
    Full {
        /// `q_proj.weight`
        proj: HostTensor,
        /// `q_proj.bias` `[n_head·(d_nope+d_rope)]`, with `q_proj_bias`
        bias: Option<HostTensor>,
    },
    /// `q_b_proj · RMSNorm(q_a_proj h)`.
    LowRank {
        /// `q_a_proj.weight` `[d_q_latent, hidden]`
        a_proj: HostTensor,
        /// `q_a_proj.bias` `[d_q_latent]`, with `attention_bias`
        a_bias: Option<HostTensor>,
        /// `q_a_layernorm.weight` `[d_q_latent]`
        a_norm: HostTensor,
        /// `q_b_proj.weight` `[n_head·(d_nope+d_rope), d_q_latent]`
        b_proj: HostTensor,
    },
}

/// The gate's own weights. `width` is D at site `up_projected`, `d_latent` at site `latent`.
#[derive(Debug, Clone, PartialEq)]
pub struct GateWeights {
    /// `gate_embedding.weight` `[vocab, d_gate]`; of a tied gate the model's token embedding as it is in the checkpoint,
    /// `model.embed_tokens.weight` `[vocab, hidden]`, and `None` in the layers of a decoder, which holds it once.
    pub embedding: Option<HostTensor>,
    /// `gate_b_proj.weight` `[width, d_gate]`
    pub b_proj: HostTensor,
    /// `gate_norm.weight` `[width]`, unless the norm is `none`
    pub norm_weight: Option<HostTensor>,
    /// `gate_norm.bias` `[width]`, with `layer_norm`
    pub norm_bias: Option<HostTensor>,
}

/// The weights of one attention layer, in Hugging Face layout (`[out, in]`, row-major).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionWeights {
    /// The query projection.
    pub query: QueryWeights,
    /// `kv_a_proj_with_mqa.weight` `[d_latent + d_rope, hidden]`, latent rows first
    pub kv_a_proj: HostTensor,
    /// `kv_a_proj_with_mqa.bias` `[d_latent + d_rope]`, with `attention_bias`
    pub kv_a_bias: Option<HostTensor>,
    /// `kv_a_layernorm.weight` `[d_latent]`; absent means no norm
    pub kv_a_norm: Option<HostTensor>,
    /// `kv_b_proj.weight` `[D, d_latent]`, rows per head: d_nope key rows, then d_value value rows
    pub kv_b_proj: HostTensor,
    /// `o_proj.weight` `[hidden, n_head·d_value]`
    pub o_proj: HostTensor,
    /// `o_proj.bias` `[hidden]`, with `attention_bias`
    pub o_bias: Option<HostTensor>,
    /// The gate, for EG-MLA.
    pub gate: Option<GateWeights>,
}

impl AttentionWeights {
    /// Takes one layer's weights from a checkpoint; `prefix` as `model.layers.0.self_attn.` or empty. Those of a tied gate come with
    /// the model's token embedding, `model.embed_tokens.weight` for that prefix.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or type, or is under the prefix without a place in `config`; `DataError::Layer`
    /// for a tied gate where the checkpoint has no token embedding, or several without a prefix that tells which.
    pub fn load(checkpoint: &Checkpoint<'_>, prefix: &str, config: &AttentionConfig) -> Result<Self> {
        config.validate()?;
        let of_model = config.gate.as_ref().filter(|gate| gate.tied);
        let embedding = of_model.map(|gate| {
            let shape = [gate.vocab_size, gate.d_gate].map(|extent| extent as usize);
            checkpoint.take(&checkpoint.token_embedding(prefix)?, &shape)
        });
        let embedding = embedding.transpose()?;
        let mut weights = Self::load_own(checkpoint, prefix, config)?;
        if let (Some(gate), Some(embedding)) = (&mut weights.gate, embedding) {
            gate.embedding = Some(embedding);
        }
        Ok(weights)
    }

    /// The same without the token embedding, for layers of a decoder.
    pub(crate) fn load_own(checkpoint: &Checkpoint<'_>, prefix: &str, config: &AttentionConfig) -> Result<Self> {
        config.validate()?;
        let take = |name: &str, shape: &[u32]| {
            let shape: Vec<usize> = shape.iter().map(|&extent| extent as usize).collect();
            checkpoint.take(&format!("{prefix}{name}"), &shape)
        };
        let weights = Self::build(config, checkpoint.contains(&format!("{prefix}kv_a_layernorm.weight")), take)?;
        checkpoint.refuse_rest(prefix)?;
        Ok(weights)
    }

    /// Checks weights that were built by hand against a configuration; a tied gate's must hold the token embedding.
    ///
    /// # Errors
    /// A configuration that contradicts itself; a tensor that is missing, has no place, or has another shape or length.
    pub fn check(&self, config: &AttentionConfig) -> Result<()> {
        self.check_tensors(config, true)
    }

    /// The same for a layer that reads the token embedding of its model: a tied gate's weights are without one.
    pub(crate) fn check_own(&self, config: &AttentionConfig) -> Result<()> {
        self.check_tensors(config, false)
    }

    fn check_tensors(&self, config: &AttentionConfig, with_token_embedding: bool) -> Result<()> {
        config.validate()?;
        if config.latent_factor != 1.0 && self.kv_a_norm.is_none() {
            let name = "kv_a_layernorm.weight".to_owned();
            return Err(Error::Tensor(TensorError::Missing { name, expected: vec![config.d_latent as usize] }));
        }
        let mut expected = Self::build(config, self.kv_a_norm.is_some(), HostTensor::outline)?;
        if with_token_embedding {
            expected = expected.with_token_embedding(config, HostTensor::outline)?;
        }
        same_tensors(&self.tensors(), &expected.tensors())
    }

    /// Every tensor that a layer may have, in one order.
    fn tensors(&self) -> [Option<&HostTensor>; 16] {
        let [proj, bias, a_proj, a_bias, a_norm, b_proj] = match &self.query {
            QueryWeights::Full { proj, bias } => [Some(proj), bias.as_ref(), None, None, None, None],
            QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => {
                [None, None, Some(a_proj), a_bias.as_ref(), Some(a_norm), Some(b_proj)]
            }
        };
        let gate = self.gate.as_ref();
        [
            proj,
            bias,
            a_proj,
            a_bias,
            a_norm,
            b_proj,
            Some(&self.kv_a_proj),
            self.kv_a_bias.as_ref(),
            self.kv_a_norm.as_ref(),
            Some(&self.kv_b_proj),
            Some(&self.o_proj),
            self.o_bias.as_ref(),
            gate.and_then(|gate| gate.embedding.as_ref()),
            gate.map(|gate| &gate.b_proj),
            gate.and_then(|gate| gate.norm_weight.as_ref()),
            gate.and_then(|gate| gate.norm_bias.as_ref()),
        ]
    }

    /// The tensors of the layer, in one order.
    #[cfg(feature = "convert")]
    pub(crate) fn into_tensors(self) -> impl Iterator<Item = HostTensor> {
        self.tensors().map(|tensor| tensor.cloned()).into_iter().flatten()
    }

    /// The one list of names and shapes: calls `make(name, shape)` for each tensor of `config` that the layer has of its own.
    pub(crate) fn build(
        config: &AttentionConfig,
        kv_a_norm: bool,
        mut make: impl FnMut(&str, &[u32]) -> Result<HostTensor>,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let d_q = config.n_head * config.d_query();
        let bias = config.attention_bias;
        let query = match config.d_q_latent {
            None => QueryWeights::Full {
                proj: make("q_proj.weight", &[d_q, hidden])?,
                bias: config.q_proj_bias.then(|| make("q_proj.bias", &[d_q])).transpose()?,
            },
            Some(rank) => QueryWeights::LowRank {
                a_proj: make("q_a_proj.weight", &[rank, hidden])?,
                a_bias: bias.then(|| make("q_a_proj.bias", &[rank])).transpose()?,
                a_norm: make("q_a_layernorm.weight", &[rank])?,
                b_proj: make("q_b_proj.weight", &[d_q, rank])?,
            },
        };
        let d_kv_a = config.d_latent + config.d_rope;
        let width = config.gated_width();
        Ok(AttentionWeights {
            query,
            kv_a_proj: make("kv_a_proj_with_mqa.weight", &[d_kv_a, hidden])?,
            kv_a_bias: bias.then(|| make("kv_a_proj_with_mqa.bias", &[d_kv_a])).transpose()?,
            kv_a_norm: kv_a_norm.then(|| make("kv_a_layernorm.weight", &[config.d_latent])).transpose()?,
            kv_b_proj: make("kv_b_proj.weight", &[config.d_kv(), config.d_latent])?,
            o_proj: make("o_proj.weight", &[hidden, config.n_head * config.d_value])?,
            o_bias: bias.then(|| make("o_proj.bias", &[hidden])).transpose()?,
            gate: match &config.gate {
                None => None,
                Some(gate) => Some(GateWeights {
                    embedding: match gate.tied {
                        true => None,
                        false => Some(make("gate_embedding.weight", &[gate.vocab_size, gate.d_gate])?),
                    },
                    b_proj: make("gate_b_proj.weight", &[width, gate.d_gate])?,
                    norm_weight: match gate.norm {
                        GateNorm::None => None,
                        _ => Some(make("gate_norm.weight", &[width])?),
                    },
                    norm_bias: match gate.norm {
                        GateNorm::LayerNorm => Some(make("gate_norm.bias", &[width])?),
                        _ => None,
                    },
                }),
            },
        })
    }

    /// The same with the model's token embedding, where a tied gate reads it.
    pub(crate) fn with_token_embedding(
        mut self,
        config: &AttentionConfig,
        mut make: impl FnMut(&str, &[u32]) -> Result<HostTensor>,
    ) -> Result<Self> {
        if let (Some(gate), Some(of)) = (&mut self.gate, &config.gate)
            && of.tied
        {
            gate.embedding = Some(make(TOKEN_EMBEDDING, &[of.vocab_size, of.d_gate])?);
        }
        Ok(self)
    }
}

/// Compares the tensors of a layer, those that it may have in one order, with what they must be.
///
/// # Errors
/// A tensor that is missing, has no place, or has another shape or length.
pub(crate) fn same_tensors(found: &[Option<&HostTensor>], expected: &[Option<&HostTensor>]) -> Result<()> {
    for (found, expected) in found.iter().zip(expected) {
        match (found, expected) {
            (None, None) => {}
            (None, Some(expected)) => {
                return Err(Error::Tensor(TensorError::Missing {
                    name: expected.name.clone(),
                    expected: expected.shape.clone(),
                }));
            }
            (Some(found), None) => {
                return Err(Error::Tensor(TensorError::Extra { name: found.name.clone(), found: found.shape.clone() }));
            }
            (Some(found), Some(expected)) => {
                let (name, expected) = (found.name.clone(), expected.shape.clone());
                if found.shape != expected {
                    return Err(Error::Tensor(TensorError::Shape { name, expected, found: found.shape.clone() }));
                }
                // The shape and the number of elements disagree.
                if found.data.len() != expected.iter().product::<usize>() {
                    return Err(Error::Tensor(TensorError::Shape { name, expected, found: vec![found.data.len()] }));
                }
            }
        }
    }
    Ok(())
}
