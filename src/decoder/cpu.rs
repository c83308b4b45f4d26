//! The decoder in f64 on the CPU, from the kernels' definitions: the reference of tests, and the fallback without a GPU.

use std::num::NonZero;
use std::sync::Arc;

use super::folder::{DecoderAttentionWeights, DecoderWeights};
use super::model::{Logits, check_ids};
use crate::config::{DecoderAttention, DecoderConfig, DecoderScales};
use crate::error::{ArgumentError, Error, Result};
use crate::reference::{GqaLayer, History, Layer, gather, matmul, residual_add, rms_norm, swiglu};
use crate::weights::HostTensor;

/// A decoder in f64.
#[derive(Debug)]
pub struct CpuDecoder {
    config: DecoderConfig,
    /// Tied gates read it, too.
    embedding: Arc<Vec<f64>>,
    layers: Vec<CpuLayer>,
    norm: Vec<f64>,
    lm_head: Option<Vec<f64>>,
}

#[derive(Debug)]
struct CpuLayer {
    input_norm: Vec<f64>,
    attention: CpuAttention,
    post_attention_norm: Vec<f64>,
    gate_proj: Vec<f64>,
    up_proj: Vec<f64>,
    down_proj: Vec<f64>,
}

#[derive(Debug)]
enum CpuAttention {
    Latent(Box<Layer>),
    Heads(Box<GqaLayer>),
}

impl CpuAttention {
    /// Refuses weights of the other kind.
    fn new(config: &DecoderAttention, weights: &DecoderAttentionWeights, embedding: &Arc<Vec<f64>>) -> Result<Self> {
        match (config, weights) {
            (DecoderAttention::Latent(config), DecoderAttentionWeights::Latent(weights)) => {
                let layer = match config.gate.as_ref().is_some_and(|gate| gate.tied) {
                    true => Layer::with_embedding(config.clone(), weights, embedding)?,
                    false => Layer::new(config.clone(), weights)?,
                };
                Ok(CpuAttention::Latent(Box::new(layer)))
            }
            (DecoderAttention::Heads(config), DecoderAttentionWeights::Heads(weights)) => {
                Ok(CpuAttention::Heads(Box::new(GqaLayer::new(config.clone(), weights)?)))
            }
            _ => Err(other_kind()),
        }
    }

    fn forward(&self, hidden: &[f64], token_ids: &[u32], history: &mut History) -> Vec<f64> {
        match self {
            CpuAttention::Latent(layer) => layer.forward(hidden, token_ids, history),
            CpuAttention::Heads(layer) => layer.forward(hidden, history),
        }
    }

    fn bytes(config: &DecoderAttention, cached: u64, new: u64) -> u64 {
        match config {
            DecoderAttention::Latent(config) => Layer::bytes(config, cached, new),
            DecoderAttention::Heads(config) => GqaLayer::bytes(config, cached, new),
        }
    }
}

/// For weights of another kind of attention than the configuration's.
pub(super) fn other_kind() -> Error {
    Error::config("(attention)", "the weights are of another kind of attention than the configuration")
}

/// Keys and values of one sequence, for every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuState {
    layers: Vec<History>,
}

impl CpuState {
    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, History::len)
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

impl CpuDecoder {
    /// Copies the weights to f64. They must have been loaded with the same `config`.
    ///
    /// # Errors
    /// A configuration that contradicts itself, weights of another kind of attention, or `ArgumentError::Count` for another number
    /// of layers.
    pub fn new(config: &DecoderConfig, weights: &DecoderWeights) -> Result<Self> {
        config.validate()?;
        check_layers(config, weights)?;
        let embedding = Arc::new(weights.embedding.to_f64());
        let layers = weights.layers.iter().map(|layer| {
            Ok(CpuLayer {
                input_norm: layer.input_norm.to_f64(),
                attention: CpuAttention::new(&config.attention, &layer.attention, &embedding)?,
                post_attention_norm: layer.post_attention_norm.to_f64(),
                gate_proj: layer.gate_proj.to_f64(),
                up_proj: layer.up_proj.to_f64(),
                down_proj: layer.down_proj.to_f64(),
            })
        });
        Ok(CpuDecoder {
            config: config.clone(),
            layers: layers.collect::<Result<_>>()?,
            embedding,
            norm: weights.norm.to_f64(),
            lm_head: weights.lm_head.as_ref().map(HostTensor::to_f64),
        })
    }

    /// Most bytes, beside the weights, of a state of `cached` tokens and of computing `new` ones at once with the logits of
    /// `rows` of them.
    pub fn bytes(config: &DecoderConfig, cached: u64, new: u64, rows: u64) -> u64 {
        let wide = |value: u32| u64::from(value);
        let state = CpuAttention::bytes(&config.attention, cached, 0).saturating_mul(wide(config.n_layer));
        let stream = 3 * wide(config.attention.hidden_size()) + 4 * wide(config.intermediate_size);
        let step = CpuAttention::bytes(&config.attention, 0, new).saturating_add(new.saturating_mul(8 * stream));
        // In f64, and in f32 for whoever asked.
        let logits = rows.saturating_mul(12 * wide(config.vocab_size));
        state.saturating_add(step).saturating_add(logits)
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The state of an empty sequence.
    pub fn state(&self) -> CpuState {
        CpuState { layers: vec![History::default(); self.layers.len()] }
    }

    /// New tokens after those in `state`, which they are added to. Returns logits `[rows, vocab]`: a row for each new
    /// token, for the last, or none, as `logits` says.
    ///
    /// # Errors
    /// `ArgumentError::Empty` without tokens, `ArgumentError::TokenId` beyond the vocabulary, `ArgumentError::Count` for the state
    /// of a decoder with another number of layers; the state is then unchanged.
    pub fn forward(&self, token_ids: &[u32], state: &mut CpuState, logits: Logits) -> Result<Vec<f64>> {
        check_ids(token_ids, self.config.vocab_size)?;
        self.config.attention.rope().check_length(state.len() + token_ids.len())?;
        if state.layers.len() != self.layers.len() {
            let (expected, found) = (self.layers.len() as u64, state.layers.len() as u64);
            return Err(Error::Argument(ArgumentError::Count { what: "layers of the state", expected, found }));
        }
        let tokens = token_ids.len();
        let hidden = self.config.attention.hidden_size() as usize;
        let inner = self.config.intermediate_size as usize;
        let eps = self.config.rms_norm_eps;
        let DecoderScales { embedding, residual, logits: of_logits } = self.config.scales;
        let mut stream = gather(&self.embedding, hidden, token_ids);
        scale(&mut stream, embedding);
        for (layer, history) in self.layers.iter().zip(&mut state.layers) {
            let normed = rms_norm(&stream, Some(&layer.input_norm), hidden, eps);
            stream = residual_add(&stream, &layer.attention.forward(&normed, token_ids, history), residual);
            let normed = rms_norm(&stream, Some(&layer.post_attention_norm), hidden, eps);
            let gate = linear(&normed, &layer.gate_proj, tokens, hidden, inner);
            let up = linear(&normed, &layer.up_proj, tokens, hidden, inner);
            let delta = linear(&swiglu(&gate, &up), &layer.down_proj, tokens, inner, hidden);
            stream = residual_add(&stream, &delta, residual);
        }
        let rows = match logits {
            Logits::None => return Ok(Vec::new()),
            Logits::Last => 1,
            Logits::All => tokens,
        };
        let normed = rms_norm(&stream[(tokens - rows) * hidden..], Some(&self.norm), hidden, eps);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let mut logits = linear(&normed, head, rows, hidden, self.config.vocab_size as usize);
        scale(&mut logits, of_logits);
        Ok(logits)
    }
}

fn scale(values: &mut [f64], factor: f64) {
    values.iter_mut().for_each(|value| *value *= factor);
}

/// Refuses weights of another number of layers.
pub(super) fn check_layers(config: &DecoderConfig, weights: &DecoderWeights) -> Result<()> {
    let (expected, found) = (u64::from(config.n_layer), weights.layers.len() as u64);
    if expected != found {
        return Err(Error::Argument(ArgumentError::Count { what: "layers in the weights", expected, found }));
    }
    Ok(())
}

/// [`matmul`] without bias, its rows (or the columns of a single row) shared among threads where there is enough to do.
fn linear(x: &[f64], w: &[f64], rows: usize, inner: usize, cols: usize) -> Vec<f64> {
    /// Multiply-adds that are worth a thread.
    const SHARE: usize = 1 << 17;
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = threads.min(rows.saturating_mul(inner).saturating_mul(cols) / SHARE);
    if threads < 2 {
        return matmul(x, w, None, rows, inner, cols);
    }
    let mut y = vec![0.0; rows * cols];
    std::thread::scope(|scope| {
        if rows == 1 {
            let share = cols.div_ceil(threads);
            for (y, w) in y.chunks_mut(share).zip(w.chunks(share * inner)) {
                scope.spawn(move || y.copy_from_slice(&matmul(x, w, None, 1, inner, y.len())));
            }
        } else {
            let share = rows.div_ceil(threads);
            for (y, x) in y.chunks_mut(share * cols).zip(x.chunks(share * inner)) {
                scope.spawn(move || y.copy_from_slice(&matmul(x, w, None, y.len() / cols, inner, cols)));
            }
        }
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_change_nothing() {
        let values = |n: usize, seed: u64| {
            let mut random = fastrand::Rng::with_seed(seed);
            (0..n).map(|_| random.f64() - 0.5).collect::<Vec<_>>()
        };
        for (rows, inner, cols) in [(1, 512, 1025), (3, 300, 701), (257, 64, 33), (2, 3, 5)] {
            let (x, w) = (values(rows * inner, 1), values(cols * inner, 2));
            assert_eq!(linear(&x, &w, rows, inner, cols), matmul(&x, &w, None, rows, inner, cols));
        }
    }
}
