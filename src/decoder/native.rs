//! The decoder in f32 on the CPU, for speed: [`CpuDecoder`](super::CpuDecoder) is its definition.
//!
//! A decode step reads every weight once, so memory bandwidth bounds it: at best bytes of the weights over bytes per second.
//! Matrices are therefore halves in memory where that changes no value, as of every checkpoint in bf16 or f16: widened in
//! registers, they give the same sums bit by bit. Others are in f32 unless [`Checkpoint::in_halves`] has rounded them. Plain MLA,
//! and EG-MLA with the gate at `latent`, keep latents and attend to them; a step of many tokens makes keys and values of them
//! first. With the gate at `up_projected` gated keys and values are kept.

mod gqa;
mod layer;
mod matrix;
mod product;

pub use gqa::NativeGqaLayer;
pub use layer::{NativeHistory, NativeLayer};

use std::sync::Arc;

use super::cpu::{check_layers, other_kind};
use super::folder::{DecoderAttentionWeights, DecoderLayerWeights, DecoderWeights, Part};
use super::model::{Logits, check_ids};
use crate::config::{DecoderAttention, DecoderConfig, DecoderScales};
use crate::error::{ArgumentError, Error, Result};
use crate::weights::{Checkpoint, HostTensor};
use product::Linear;

/// A decoder in f32, its matrices as halves where they hold nothing else.
#[derive(Debug)]
pub struct NativeDecoder {
    config: DecoderConfig,
    /// Tied gates read it, too.
    embedding: Arc<Linear>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Option<Linear>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    attention: Attention,
    post_attention_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
enum Attention {
    Latent(Box<NativeLayer>),
    Heads(Box<NativeGqaLayer>),
}

impl Layer {
    fn new(config: &DecoderConfig, weights: DecoderLayerWeights, embedding: &Arc<Linear>) -> Result<Self> {
        Ok(Layer {
            input_norm: weights.input_norm.data,
            attention: Attention::new(&config.attention, weights.attention, embedding)?,
            post_attention_norm: weights.post_attention_norm.data,
            gate: Linear::new(weights.gate_proj, None),
            up: Linear::new(weights.up_proj, None),
            down: Linear::new(weights.down_proj, None),
        })
    }
}

impl Attention {
    /// Refuses weights of the other kind.
    fn new(config: &DecoderAttention, weights: DecoderAttentionWeights, embedding: &Arc<Linear>) -> Result<Self> {
        match (config, weights) {
            (DecoderAttention::Latent(config), DecoderAttentionWeights::Latent(weights)) => {
                let layer = match config.gate.as_ref().is_some_and(|gate| gate.tied) {
                    true => NativeLayer::with_embedding(config, weights, embedding)?,
                    false => NativeLayer::new(config, weights)?,
                };
                Ok(Attention::Latent(Box::new(layer)))
            }
            (DecoderAttention::Heads(config), DecoderAttentionWeights::Heads(weights)) => {
                Ok(Attention::Heads(Box::new(NativeGqaLayer::new(config, weights)?)))
            }
            _ => Err(other_kind()),
        }
    }

    fn bytes(config: &DecoderAttention, cached: u64, new: u64) -> u64 {
        match config {
            DecoderAttention::Latent(config) => NativeLayer::bytes(config, cached, new),
            DecoderAttention::Heads(config) => NativeGqaLayer::bytes(config, cached, new),
        }
    }

    fn history(&self, capacity: usize) -> NativeHistory {
        match self {
            Attention::Latent(layer) => layer.history(capacity),
            Attention::Heads(layer) => layer.history(capacity),
        }
    }

    fn forward(&self, hidden: &[f32], token_ids: &[u32], turns: &[[f32; 2]], history: &mut NativeHistory) -> Vec<f32> {
        match self {
            Attention::Latent(layer) => layer.forward_turned(hidden, token_ids, turns, history),
            Attention::Heads(layer) => layer.forward_turned(hidden, turns, history),
        }
    }
}

/// What every layer keeps of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct NativeState {
    layers: Vec<NativeHistory>,
}

impl NativeState {
    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, NativeHistory::len)
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(length));
    }
}

impl NativeDecoder {
    /// Takes the weights, which must have been loaded with the same `config`.
    ///
    /// # Errors
    /// A configuration that contradicts itself, weights of another kind of attention, or `ArgumentError::Count` for another number
    /// of layers.
    pub fn new(config: &DecoderConfig, weights: DecoderWeights) -> Result<Self> {
        config.validate()?;
        check_layers(config, &weights)?;
        let embedding = Arc::new(Linear::new(weights.embedding, None));
        let layers = weights.layers.into_iter().map(|layer| Layer::new(config, layer, &embedding));
        Ok(NativeDecoder {
            config: config.clone(),
            layers: layers.collect::<Result<_>>()?,
            embedding,
            norm: weights.norm.data,
            lm_head: weights.lm_head.map(|head| Linear::new(head, None)),
        })
    }

    /// The same from a checkpoint that holds nothing else, of which no more than a layer, or the embeddings, is in memory in f32
    /// beside what is kept.
    ///
    /// # Errors
    /// As [`DecoderWeights::load`].
    pub fn load(config: &DecoderConfig, checkpoint: &Checkpoint<'_>) -> Result<Self> {
        let absent = || Error::Argument(ArgumentError::Empty { what: "the list of weights" });
        let (mut embedding, mut norm, mut lm_head) = (None, None, None);
        let mut layers = Vec::new();
        DecoderWeights::visit(checkpoint, config, |part| {
            match part {
                Part::Embedding(tensor) => embedding = Some(Arc::new(Linear::new(tensor, None))),
                Part::Layer(layer) => {
                    layers.push(Layer::new(config, layer, embedding.as_ref().ok_or_else(absent)?)?);
                }
                Part::Norm(tensor) => norm = Some(tensor.data),
                Part::Head(tensor) => lm_head = tensor.map(|head| Linear::new(head, None)),
            }
            Ok(())
        })?;
        let (embedding, norm) = (embedding.ok_or_else(absent)?, norm.ok_or_else(absent)?);
        Ok(NativeDecoder { config: config.clone(), embedding, layers, norm, lm_head })
    }

    /// Most bytes, beside the weights, of a state of `cached` tokens and of computing `new` ones at once with the logits of
    /// `rows` of them.
    pub fn bytes(config: &DecoderConfig, cached: u64, new: u64, rows: u64) -> u64 {
        let wide = |value: u32| u64::from(value);
        let kept = Attention::bytes(&config.attention, cached, 0).saturating_mul(wide(config.n_layer));
        let stream = 3 * wide(config.attention.hidden_size()) + 3 * wide(config.intermediate_size);
        let step = Attention::bytes(&config.attention, cached, new).saturating_add(new.saturating_mul(4 * stream));
        let panels = product::panel_bytes(wide(config.attention.hidden_size().max(config.intermediate_size)));
        kept.saturating_add(step)
            .saturating_add(panels)
            .saturating_add(rows.saturating_mul(4 * wide(config.vocab_size)))
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Whether a step of one token attends to latents, not to keys and values.
    pub fn keeps_latents(&self) -> bool {
        matches!(&self.config.attention, DecoderAttention::Latent(config) if config.up_projected_gate().is_none())
    }

    /// The state of an empty sequence, with room for `capacity` tokens; it grows where there are more.
    pub fn state(&self, capacity: usize) -> NativeState {
        NativeState { layers: self.layers.iter().map(|layer| layer.attention.history(capacity)).collect() }
    }

    /// New tokens after those in `state`, which they are added to. Returns logits `[rows, vocab]`: a row for each new
    /// token, for the last, or none, as `logits` says.
    ///
    /// # Errors
    /// As [`CpuDecoder::forward`](super::CpuDecoder::forward); the state is then unchanged.
    pub fn forward(&self, token_ids: &[u32], state: &mut NativeState, logits: Logits) -> Result<Vec<f32>> {
        check_ids(token_ids, self.config.vocab_size)?;
        self.config.attention.rope().check_length(state.len() + token_ids.len())?;
        if state.layers.len() != self.layers.len() {
            let (expected, found) = (self.layers.len() as u64, state.layers.len() as u64);
            return Err(Error::Argument(ArgumentError::Count { what: "layers of the state", expected, found }));
        }
        // A product then shares its work without a way into the pool and out of it.
        Ok(rayon::scope(|_| self.compute(token_ids, state, logits)))
    }

    /// Of ids below the vocabulary, and a state of as many layers.
    fn compute(&self, token_ids: &[u32], state: &mut NativeState, logits: Logits) -> Vec<f32> {
        let (tokens, hidden) = (token_ids.len(), self.config.attention.hidden_size() as usize);
        let normed = |stream: &[f32], weight: &[f32]| {
            let mut normed = stream.to_vec();
            rms_norm(&mut normed, Some(weight), hidden, self.config.rms_norm_eps);
            normed
        };
        let DecoderScales { embedding, residual, logits: of_logits } = self.config.scales;
        // All layers turn alike.
        let (rope, d_rope) = match &self.config.attention {
            DecoderAttention::Latent(config) => (&config.rope, config.d_rope),
            DecoderAttention::Heads(config) => (&config.rope, config.head_dim),
        };
        let turns = layer::turns(rope, d_rope, state.len(), tokens);
        let mut stream = self.embedding.gather(token_ids);
        scale(&mut stream, embedding);
        for (layer, history) in self.layers.iter().zip(&mut state.layers) {
            let x = normed(&stream, &layer.input_norm);
            add(&mut stream, &layer.attention.forward(&x, token_ids, &turns, history), residual);
            let x = normed(&stream, &layer.post_attention_norm);
            let mut inner = layer.gate.apply(&x);
            inner.iter_mut().zip(layer.up.apply(&x)).for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
            add(&mut stream, &layer.down.apply(&inner), residual);
        }
        let rows = match logits {
            Logits::None => return Vec::new(),
            Logits::Last => 1,
            Logits::All => tokens,
        };
        let x = normed(&stream[(tokens - rows) * hidden..], &self.norm);
        let mut logits = self.lm_head.as_ref().unwrap_or(&self.embedding).apply(&x);
        scale(&mut logits, of_logits);
        logits
    }
}

fn optional(tensor: Option<HostTensor>) -> Option<Vec<f32>> {
    tensor.map(|tensor| tensor.data)
}

/// `stream += factor · delta`
fn add(stream: &mut [f32], delta: &[f32], factor: f64) {
    stream.iter_mut().zip(delta).for_each(|(x, delta)| *x += factor as f32 * delta);
}

fn scale(values: &mut [f32], factor: f64) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value *= factor as f32);
    }
}

/// `x ← x / √(mean x² + eps) · weight`, per row of `width`.
fn rms_norm(x: &mut [f32], weight: Option<&[f32]>, width: usize, eps: f64) {
    for row in x.chunks_exact_mut(width) {
        let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let rho = (1.0 / (squares / width as f64 + eps).sqrt()) as f32;
        for (i, x) in row.iter_mut().enumerate() {
            *x *= rho * weight.map_or(1.0, |weight| weight[i]);
        }
    }
}
