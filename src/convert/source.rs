//! The source's forward pass over the calibration text, layer by layer, in f64.

use super::layer::Activations;
use super::matrix::{Matrix, add_bias, product};
use crate::config::{DecoderAttention, DecoderConfig, GqaConfig};
use crate::decoder::{DecoderAttentionWeights, DecoderLayerWeights};
use crate::error::{ArgumentError, DataError, Error, Result};
use crate::reference::{rms_norm, rope, rotations, swiglu};
use crate::weights::{Checkpoint, GqaWeights, HostTensor};

/// Token ids of a text, cut into sequences that each begin at position 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    ids: Vec<u32>,
    starts: Vec<usize>,
}

impl Calibration {
    /// Sequences of up to `length` tokens from `ids`, `tokens` in all, each beginning with `prefix`: what the tokenizer puts before
    /// a text. Of a longer text they are taken evenly: its beginning alone has fewer of the ids that the rest has.
    ///
    /// # Errors
    /// `ArgumentError::Empty` without a token, `ArgumentError::TokenId` beyond the vocabulary.
    pub fn new(ids: &[u32], prefix: &[u32], tokens: usize, length: usize, vocab_size: u32) -> Result<Self> {
        let text = ids.strip_prefix(prefix).unwrap_or(ids);
        if let Some(index) = ids.iter().position(|&id| id >= vocab_size) {
            return Err(Error::Argument(ArgumentError::TokenId { index, id: ids[index].into(), vocab_size }));
        }
        let of_text = length.saturating_sub(prefix.len()).max(1);
        let mut calibration = Calibration { ids: Vec::new(), starts: Vec::new() };
        let parts = text.len().div_ceil(of_text);
        let taken = tokens.div_ceil(prefix.len() + of_text).min(parts);
        for number in 0..taken {
            let part = &text[number * parts / taken * of_text..];
            let part = &part[..of_text.min(part.len())];
            calibration.starts.push(calibration.ids.len());
            calibration.ids.extend(prefix.iter().chain(part));
            calibration.ids.truncate(tokens);
        }
        match calibration.ids.len() {
            0 => Err(Error::Argument(ArgumentError::Empty { what: "the calibration text" })),
            _ => Ok(calibration),
        }
    }

    /// Ids of all sequences, one after another.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// First token of each sequence.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let ends = self.starts.iter().skip(1).copied().chain([self.ids.len()]);
        self.starts.iter().copied().zip(ends).map(|(start, end)| start..end)
    }
}

fn of_latents() -> Error {
    let problem = "is that of a model whose layers cache latents already: only keys and values per head are converted";
    Error::config("model_type", problem)
}

/// The attention of a configuration with keys and values per head.
///
/// # Errors
/// [`Error::Config`] for a model of latents.
pub fn heads(config: &DecoderConfig) -> Result<&GqaConfig> {
    match &config.attention {
        DecoderAttention::Heads(heads) => Ok(heads),
        DecoderAttention::Latent(_) => Err(of_latents()),
    }
}

/// What one layer of the source does.
pub(super) struct LayerPass {
    /// Its attention's weights.
    pub attention: GqaWeights,
    /// Over all tokens.
    pub activations: Activations,
    /// Normed input of attention, and its output, of the first sequence.
    pub first: [Matrix; 2],
}

/// The residual stream behind the embedding, `[tokens, hidden]`.
pub(super) fn embedded(config: &DecoderConfig, embedding: &HostTensor, calibration: &Calibration) -> Result<Matrix> {
    let hidden = config.attention.hidden_size() as usize;
    let rows = calibration.ids.iter().flat_map(|&id| &embedding.data[id as usize * hidden..][..hidden]);
    let stream = Matrix::of(rows.map(|&value| f64::from(value) * config.scales.embedding).collect(), hidden);
    check_finite(&stream, || format!("rows of `{}` are", embedding.name))?;
    Ok(stream)
}

fn check_finite(stream: &Matrix, what: impl Fn() -> String) -> Result<()> {
    match stream.data.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::Data(DataError::Input(format!("{} not finite: the model cannot be converted", what())))),
    }
}

/// Takes layer `number` of the checkpoint and runs it: the stream goes on to the next layer.
pub(super) fn run_layer(
    config: &DecoderConfig,
    checkpoint: &Checkpoint<'_>,
    number: u32,
    calibration: &Calibration,
    stream: &mut Matrix,
) -> Result<LayerPass> {
    let weights = DecoderLayerWeights::load(checkpoint, number, config)?;
    let attention = heads(config)?.clone();
    let DecoderAttentionWeights::Heads(of_attention) = weights.attention else {
        return Err(of_latents());
    };
    let layer = SourceLayer::new(attention, &of_attention);
    let [gate_proj, up_proj, down_proj] = [&weights.gate_proj, &weights.up_proj, &weights.down_proj].map(matrix);
    let norms = [&weights.input_norm, &weights.post_attention_norm].map(HostTensor::to_f64);
    let hidden = stream.cols;
    let mut activations =
        Activations { ids: calibration.ids.clone(), starts: calibration.starts.clone(), ..Activations::default() };
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut first = None;
    for range in calibration.ranges() {
        let part = &mut stream.data[range.start * hidden..range.end * hidden];
        let normed = Matrix::of(rms_norm(part, Some(&norms[0]), hidden, config.rms_norm_eps), hidden);
        let (out, k, v) = layer.forward(&normed);
        add(part, &out, config.scales.residual);
        keys.extend(k.data);
        values.extend(v.data);
        first.get_or_insert([normed, out]);
        let normed = Matrix::of(rms_norm(part, Some(&norms[1]), hidden, config.rms_norm_eps), hidden);
        let [gate, up] = [&gate_proj, &up_proj].map(|w| product(normed.view(), w.t()));
        let inner = Matrix::of(swiglu(&gate.data, &up.data), gate.cols);
        add(part, &product(inner.view(), down_proj.t()), config.scales.residual);
    }
    check_finite(stream, || format!("activations behind layer {number} are"))?;
    activations.keys = Matrix::of(keys, layer.kv_width());
    activations.values = Matrix::of(values, layer.kv_width());
    Ok(LayerPass { attention: of_attention, activations, first: first.unwrap_or_default() })
}

fn add(stream: &mut [f64], delta: &Matrix, factor: f64) {
    stream.iter_mut().zip(&delta.data).for_each(|(value, delta)| *value += factor * delta);
}

fn matrix(tensor: &HostTensor) -> Matrix {
    Matrix::of(tensor.to_f64(), tensor.shape.last().copied().unwrap_or(1))
}

/// Attention with keys and values per head, by matrix products.
pub struct SourceLayer {
    config: GqaConfig,
    /// `q_proj`, `k_proj` and `v_proj`.
    projections: [Linear; 3],
    o_proj: Linear,
}

/// A matrix `[out, in]` and its bias.
struct Linear(Matrix, Option<Vec<f64>>);

impl Linear {
    fn of(proj: &HostTensor, bias: &Option<HostTensor>) -> Self {
        Linear(matrix(proj), bias.as_ref().map(HostTensor::to_f64))
    }

    fn apply(&self, x: &Matrix) -> Matrix {
        let mut y = product(x.view(), self.0.t());
        add_bias(&mut y, &self.1);
        y
    }
}

impl SourceLayer {
    /// Copies the weights of a layer without norms of its heads to f64.
    pub fn new(config: GqaConfig, weights: &GqaWeights) -> Self {
        let GqaWeights { q_proj, q_bias, k_proj, k_bias, v_proj, v_bias, o_proj, o_bias, .. } = weights;
        SourceLayer {
            config,
            projections: [Linear::of(q_proj, q_bias), Linear::of(k_proj, k_bias), Linear::of(v_proj, v_bias)],
            o_proj: Linear::of(o_proj, o_bias),
        }
    }

    fn kv_width(&self) -> usize {
        (self.config.n_kv_head * self.config.head_dim) as usize
    }

    /// One sequence from its beginning: output, keys before rotation, and values.
    pub fn forward(&self, hidden: &Matrix) -> (Matrix, Matrix, Matrix) {
        let [n_head, n_kv_head, d] =
            [self.config.n_head, self.config.n_kv_head, self.config.head_dim].map(|extent| extent as usize);
        let tokens = hidden.rows;
        let [mut q, keys, values] = self.projections.each_ref().map(|projection| projection.apply(hidden));
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let turns = rotations(&self.config.rope, d, &positions);
        let mut k = keys.clone();
        rope(&mut q.data, &turns, n_head, d, d, self.config.rope.interleave);
        rope(&mut k.data, &turns, n_kv_head, d, d, self.config.rope.interleave);
        let scale = self.config.scale();
        let mut attended = Matrix::zeros(tokens, n_head * d);
        let head_of = |matrix: &Matrix, head: usize| {
            Matrix::of(
                matrix.data.chunks_exact(matrix.cols).flat_map(|row| &row[head * d..][..d]).copied().collect(),
                d,
            )
        };
        for head in 0..n_head {
            let group = head / (n_head / n_kv_head);
            let mut scores = product(head_of(&q, head).view(), head_of(&k, group).t());
            for (token, row) in scores.data.chunks_exact_mut(tokens).enumerate() {
                let (seen, later) = row.split_at_mut(token + 1);
                later.fill(0.0);
                let largest = seen.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                seen.iter_mut().for_each(|score| *score = (scale * (*score - largest)).exp());
                let sum: f64 = seen.iter().sum();
                seen.iter_mut().for_each(|weight| *weight /= sum);
            }
            let out = product(scores.view(), head_of(&values, group).view());
            for token in 0..tokens {
                attended.row_mut(token)[head * d..][..d].copy_from_slice(out.row(token));
            }
        }
        (self.o_proj.apply(&attended), keys, values)
    }
}

/// Norm of `found − wanted` over that of `wanted`.
pub(super) fn relative_error(found: &Matrix, wanted: &Matrix) -> f64 {
    let square: f64 = found.data.iter().zip(&wanted.data).map(|(a, b)| (a - b).powi(2)).sum();
    if square > 0.0 { (square / wanted.energy()).sqrt() } else { 0.0 }
}
