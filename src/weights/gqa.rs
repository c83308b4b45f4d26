//! Weights of a layer with keys and values per head.

use super::{Checkpoint, HostTensor, same_tensors};
use crate::config::GqaConfig;
use crate::error::Result;

/// The weights of one attention layer with keys and values per head, in Hugging Face layout (`[out, in]`, row-major).
#[derive(Debug, Clone, PartialEq)]
pub struct GqaWeights {
    /// `q_proj.weight` `[n_head·head_dim, hidden]`
    pub q_proj: HostTensor,
    /// `q_proj.bias` `[n_head·head_dim]`, with `qkv_bias`
    pub q_bias: Option<HostTensor>,
    /// `k_proj.weight` `[n_kv_head·head_dim, hidden]`
    pub k_proj: HostTensor,
    /// `k_proj.bias` `[n_kv_head·head_dim]`, with `qkv_bias`
    pub k_bias: Option<HostTensor>,
    /// `v_proj.weight` `[n_kv_head·head_dim, hidden]`
    pub v_proj: HostTensor,
    /// `v_proj.bias` `[n_kv_head·head_dim]`, with `qkv_bias`
    pub v_bias: Option<HostTensor>,
    /// `o_proj.weight` `[hidden, n_head·head_dim]`
    pub o_proj: HostTensor,
    /// `o_proj.bias` `[hidden]`, with `o_bias`
    pub o_bias: Option<HostTensor>,
    /// `q_norm.weight` `[head_dim]`, with `qk_norm_eps`
    pub q_norm: Option<HostTensor>,
    /// `k_norm.weight` `[head_dim]`, with `qk_norm_eps`
    pub k_norm: Option<HostTensor>,
}

impl GqaWeights {
    /// Takes one layer's weights from a checkpoint; `prefix` as `model.layers.0.self_attn.` or empty.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or type, or is under the prefix without a place in `config`.
    pub fn load(checkpoint: &Checkpoint<'_>, prefix: &str, config: &GqaConfig) -> Result<Self> {
        config.validate()?;
        let weights = Self::build(config, |name, shape| {
            let shape: Vec<usize> = shape.iter().map(|&extent| extent as usize).collect();
            checkpoint.take(&format!("{prefix}{name}"), &shape)
        })?;
        checkpoint.refuse_rest(prefix)?;
        Ok(weights)
    }

    /// Checks weights that were built by hand against a configuration.
    ///
    /// # Errors
    /// A configuration that contradicts itself; a tensor that is missing, has no place, or has another shape or length.
    pub fn check(&self, config: &GqaConfig) -> Result<()> {
        config.validate()?;
        let expected = Self::build(config, HostTensor::outline)?;
        same_tensors(&self.tensors(), &expected.tensors())
    }

    /// Every tensor that a layer may have, in one order.
    fn tensors(&self) -> [Option<&HostTensor>; 10] {
        [
            Some(&self.q_proj),
            self.q_bias.as_ref(),
            Some(&self.k_proj),
            self.k_bias.as_ref(),
            Some(&self.v_proj),
            self.v_bias.as_ref(),
            Some(&self.o_proj),
            self.o_bias.as_ref(),
            self.q_norm.as_ref(),
            self.k_norm.as_ref(),
        ]
    }

    /// The one list of names and shapes: calls `make(name, shape)` for each tensor of `config`.
    pub(crate) fn build(config: &GqaConfig, mut make: impl FnMut(&str, &[u32]) -> Result<HostTensor>) -> Result<Self> {
        let GqaConfig { hidden_size: hidden, qkv_bias, o_bias, .. } = *config;
        let [queries, keys] = [config.n_head, config.n_kv_head].map(|heads| heads * config.head_dim);
        let mut biased = |name: &str, rows: u32, cols: u32, bias: bool| -> Result<_> {
            let weight = make(&format!("{name}.weight"), &[rows, cols])?;
            Ok((weight, bias.then(|| make(&format!("{name}.bias"), &[rows])).transpose()?))
        };
        let (q_proj, q_bias) = biased("q_proj", queries, hidden, qkv_bias)?;
        let (k_proj, k_bias) = biased("k_proj", keys, hidden, qkv_bias)?;
        let (v_proj, v_bias) = biased("v_proj", keys, hidden, qkv_bias)?;
        let (o_proj, o_bias) = biased("o_proj", hidden, queries, o_bias)?;
        let mut norm =
            |name: &str| config.qk_norm_eps.map(|_| make(&format!("{name}.weight"), &[config.head_dim])).transpose();
        let (q_norm, k_norm) = (norm("q_norm")?, norm("k_norm")?);
        Ok(GqaWeights { q_proj, q_bias, k_proj, k_bias, v_proj, v_bias, o_proj, o_bias, q_norm, k_norm })
    }
}
