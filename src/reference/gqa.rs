//! One attention layer with keys and values per head, from the kernels of this module.

use half::f16;

use super::layer::History;
use super::{Heads, attention_prefill, matmul, rms_norm, rope, rotations, scale_queries};
use crate::config::GqaConfig;
use crate::error::Result;
use crate::storage::Storage;
use crate::weights::{GqaWeights, HostTensor};

/// One layer of grouped-query attention in f64.
#[derive(Debug, Clone)]
pub struct GqaLayer {
    config: GqaConfig,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<Vec<f64>>,
    k_norm: Option<Vec<f64>>,
    cache: Storage,
}

#[derive(Debug, Clone)]
struct Linear {
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
}

impl Linear {
    fn of(weight: &HostTensor, bias: &Option<HostTensor>) -> Self {
        Linear { weight: weight.to_f64(), bias: bias.as_ref().map(HostTensor::to_f64) }
    }

    fn apply(&self, x: &[f64], tokens: usize, inner: usize) -> Vec<f64> {
        matmul(x, &self.weight, self.bias.as_deref(), tokens, inner, self.weight.len() / inner)
    }
}

impl GqaLayer {
    /// Copies the weights to f64.
    ///
    /// # Errors
    /// As [`GqaWeights::check`].
    pub fn new(config: GqaConfig, weights: &GqaWeights) -> Result<GqaLayer> {
        weights.check(&config)?;
        let GqaWeights { q_proj, q_bias, k_proj, k_bias, v_proj, v_bias, o_proj, o_bias, q_norm, k_norm } = weights;
        Ok(GqaLayer {
            config,
            q_proj: Linear::of(q_proj, q_bias),
            k_proj: Linear::of(k_proj, k_bias),
            v_proj: Linear::of(v_proj, v_bias),
            o_proj: Linear::of(o_proj, o_bias),
            q_norm: q_norm.as_ref().map(HostTensor::to_f64),
            k_norm: k_norm.as_ref().map(HostTensor::to_f64),
            cache: Storage::F32,
        })
    }

    /// The same with rotated keys and values rounded as a cache in `storage` rounds them; f32 rounds nothing here.
    pub fn with_cache(self, storage: Storage) -> GqaLayer {
        GqaLayer { cache: storage, ..self }
    }

    /// Most bytes of the keys and values of `cached` tokens, and of computing `new` ones at once.
    pub fn bytes(config: &GqaConfig, cached: u64, new: u64) -> u64 {
        let wide = |value: u32| u64::from(value);
        let (queries, kv) = (wide(config.n_head) * wide(config.head_dim), wide(config.cache_elements()));
        // A list that grows may have twice the room that it needs, and is moved.
        let computed = 3 * wide(config.hidden_size) + 3 * queries + 2 * kv;
        cached.saturating_mul(3 * kv).saturating_add(new.saturating_mul(computed)).saturating_mul(8)
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &GqaConfig {
        &self.config
    }

    /// New tokens of one sequence, at positions `history.len()..`: each attends to the history, to the new tokens before it and
    /// to itself. Their rotated keys and their values are added to `history`.
    ///
    /// ```text
    /// q = f_t RoPE_t(N(q_proj h + b_q))   k = RoPE_t(N(k_proj h + b_k))   v = v_proj h + b_v      per head
    /// s_j = head_dim^-½ · q · k_j,  j ≤ t      y = o_proj concat(Σ_j softmax(s)_j v_j) + b_o
    /// ```
    ///
    /// `hidden` `[tokens, hidden]`; returns `[tokens, hidden]`.
    pub fn forward(&self, hidden: &[f64], history: &mut History) -> Vec<f64> {
        let GqaConfig { n_head, n_kv_head, head_dim, .. } = self.config;
        let [n_head, n_kv_head, head_dim] = [n_head, n_kv_head, head_dim].map(|extent| extent as usize);
        let width = self.config.hidden_size as usize;
        let (first, tokens) = (history.len(), hidden.len() / width);
        let positions: Vec<u32> = (first as u32..).take(tokens).collect();
        let turns = rotations(&self.config.rope, head_dim, &positions);
        let interleave = self.config.rope.interleave;
        let normed = |x: Vec<f64>, weight: &Option<Vec<f64>>| match (weight, self.config.qk_norm_eps) {
            (Some(weight), Some(eps)) => rms_norm(&x, Some(weight), head_dim, eps),
            _ => x,
        };
        let mut q = normed(self.q_proj.apply(hidden, tokens, width), &self.q_norm);
        rope(&mut q, &turns, n_head, head_dim, head_dim, interleave);
        scale_queries(&self.config.rope, &mut q, first as u32, n_head * head_dim);
        let mut k = normed(self.k_proj.apply(hidden, tokens, width), &self.k_norm);
        rope(&mut k, &turns, n_kv_head, head_dim, head_dim, interleave);
        let v = self.v_proj.apply(hidden, tokens, width);
        let mut kv: Vec<f64> = k
            .chunks_exact(head_dim)
            .zip(v.chunks_exact(head_dim))
            .flat_map(|(k, v)| k.iter().chain(v))
            .copied()
            .collect();
        if self.cache == Storage::F16 {
            kv.iter_mut().for_each(|value| *value = f16::from_f64(*value).to_f64());
        }
        history.append(tokens, kv, Vec::new());
        let visible: Vec<_> = (0..tokens).map(|t| 0..first + t + 1).collect();
        let heads = Heads { n_head, n_kv_head, d_nope: head_dim, d_rope: 0, d_value: head_dim };
        let attended = attention_prefill(&q, history.kv(), &[], &visible, heads, self.config.scale());
        self.o_proj.apply(&attended.values, tokens, n_head * head_dim)
    }
}
