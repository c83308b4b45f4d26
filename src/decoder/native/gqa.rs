//! One layer of grouped-query attention in f32 on the CPU, as [`reference::GqaLayer`](crate::reference::GqaLayer) defines it.

use super::layer::{NativeHistory, expanded, rotate, scale, turns};
use super::product::{Linear, panel_bytes};
use super::{optional, rms_norm};
use crate::config::GqaConfig;
use crate::error::Result;
use crate::reference::Heads;
use crate::weights::GqaWeights;

/// One attention layer with keys and values per head, in f32.
#[derive(Debug)]
pub struct NativeGqaLayer {
    config: GqaConfig,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
}

impl NativeGqaLayer {
    /// Takes the weights.
    ///
    /// # Errors
    /// As [`GqaWeights::check`].
    pub fn new(config: &GqaConfig, weights: GqaWeights) -> Result<Self> {
        weights.check(config)?;
        Ok(NativeGqaLayer {
            config: config.clone(),
            q: Linear::new(weights.q_proj, weights.q_bias),
            k: Linear::new(weights.k_proj, weights.k_bias),
            v: Linear::new(weights.v_proj, weights.v_bias),
            o: Linear::new(weights.o_proj, weights.o_bias),
            q_norm: optional(weights.q_norm),
            k_norm: optional(weights.k_norm),
        })
    }

    /// Most bytes of what is kept of `cached` tokens, and of computing the last `new` of them at once.
    pub fn bytes(config: &GqaConfig, cached: u64, new: u64) -> u64 {
        let wide = |value: u32| u64::from(value);
        let (queries, kept) = (wide(config.n_head) * wide(config.head_dim), wide(config.cache_elements()));
        let computed = 2 * wide(config.hidden_size) + 3 * queries + 2 * kept;
        let scores = super::layer::scores(new, wide(config.n_head));
        let all = cached.max(new);
        let panels = if new == 0 { 0 } else { panel_bytes(queries.max(wide(config.hidden_size))) };
        let elements = all.saturating_mul(kept + scores).saturating_add(new.saturating_mul(computed));
        elements.saturating_mul(4).saturating_add(panels)
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &GqaConfig {
        &self.config
    }

    /// What is kept of an empty sequence, with room for `capacity` tokens; it grows where there are more.
    pub fn history(&self, capacity: usize) -> NativeHistory {
        NativeHistory::with_room(capacity, self.config.cache_elements() as usize, 0)
    }

    /// New tokens of one sequence behind those of `history`, which was made by this layer: each attends to the history, to the
    /// new tokens before it and to itself. `history` keeps them.
    ///
    /// `hidden` `[tokens, hidden]`; returns `[tokens, hidden]`.
    pub fn forward(&self, hidden: &[f32], history: &mut NativeHistory) -> Vec<f32> {
        let tokens = hidden.len() / self.config.hidden_size as usize;
        let turns = turns(&self.config.rope, self.config.head_dim, history.len(), tokens);
        self.forward_turned(hidden, &turns, history)
    }

    pub(super) fn forward_turned(&self, hidden: &[f32], turns: &[[f32; 2]], history: &mut NativeHistory) -> Vec<f32> {
        let GqaConfig { n_head, n_kv_head, head_dim, .. } = self.config;
        let [n_head, n_kv_head, head_dim] = [n_head, n_kv_head, head_dim].map(|extent| extent as usize);
        let tokens = hidden.len() / self.config.hidden_size as usize;
        let interleave = self.config.rope.interleave;
        let norm = |x: &mut [f32], weight: &Option<Vec<f32>>| {
            if let (Some(weight), Some(eps)) = (weight, self.config.qk_norm_eps) {
                rms_norm(x, Some(weight), head_dim, eps);
            }
        };
        let mut q = self.q.apply(hidden);
        norm(&mut q, &self.q_norm);
        rotate(&mut q, turns, (n_head, head_dim), head_dim, interleave);
        scale(&mut q, self.config.scale(), &self.config.rope, history.len(), n_head * head_dim);
        let (mut k, v) = (self.k.apply(hidden), self.v.apply(hidden));
        norm(&mut k, &self.k_norm);
        rotate(&mut k, turns, (n_kv_head, head_dim), head_dim, interleave);
        let pairs = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
        let kv: Vec<f32> = pairs.flat_map(|(k, v)| k.iter().chain(v)).copied().collect();
        history.append(tokens, &kv, &[]);
        let heads = Heads { n_head, n_kv_head, d_nope: head_dim, d_rope: 0, d_value: head_dim };
        self.o.apply(&expanded(&q, history.rows(), &[], heads, tokens))
    }
}
