//! One layer: from keys and values per head to latents, in f64.
//!
//! ```text
//! k'_m[c] = Σ_j U_c[j, m] k_j[c]            U of a rotary pair: one orthogonal matrix over the g heads, the same for both halves
//! slice m < s:  rotary key of all heads     q_rope[h, m][c] = U_c[j(h), m] q_h[c]
//! slice m ≥ s:  not rotated                 k_nope[h][c]    = Σ_{m ≥ s} U_c[j(h), m] k'_m[c], against q_h as it is
//! latent        c = Pᵀ S y,  y = [k'_{m ≥ s} ; v]      [k_nope ; v] = E S⁻¹ P c
//! ```
//!
//! The mixing of a pair commutes with its rotation, so that with every slice rotated scores are those of the source. S brings keys
//! to the norm of values, P are the leading eigenvectors of the covariance of S y over calibration text, E expands y to the query
//! heads.
//!
//! Biases: y has none. That of keys is one of the rotary key; in slices that are not rotated it adds the same to every score of a
//! query. That of values is a constant of the output. That of queries is one of the new queries.

use super::gates::{Expanded, Gate, Gates, Rows};
use super::matrix::{Matrix, View, add_bias, eigen, product};
use crate::config::{AttentionConfig, GateConfig, GqaConfig, RopeConfig, RopeScaling};
use crate::error::{DataError, Error, Result};
use crate::reference::{Heads, attention_prefill, rope, rotations};
use crate::weights::{AttentionWeights, GateWeights, GqaWeights, HostTensor, QueryWeights};

/// What a layer does over the calibration text.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    /// Keys before rotation with their bias, `[tokens, n_kv_head · head_dim]`.
    pub keys: Matrix,
    /// Values with their bias, `[tokens, n_kv_head · head_dim]`.
    pub values: Matrix,
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// First token of each sequence, ascending.
    pub starts: Vec<usize>,
}

/// Options of a layer's conversion.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerOptions {
    /// `kv_lora_rank` of the result.
    pub rank: usize,
    /// s, slices that keep their rotation.
    pub rope_slices: usize,
    /// Weight of the first positions in covariances, in weights of all tokens together.
    pub sink_weight: f64,
}

/// What was lost, as fractions.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerError {
    /// Energy of the keys in slices that are not rotated any more.
    pub unrotated_keys: f64,
    /// Energy of keys (without rotation, balanced) and values that neither latents nor gates hold, over all tokens but the first
    /// ones of sequences.
    pub lost: f64,
    /// The same of the first ones.
    pub lost_of_first: f64,
    /// Norm of the error of the attention's output over its norm, on the first sequence of the calibration text.
    pub output: f64,
}

/// Mixing of the heads of keys, per channel: `u[c]` is `[n_kv_head, n_kv_head]`, row j for head j, column m for slice m.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixing {
    n_kv_head: usize,
    head_dim: usize,
    channels: Vec<Matrix>,
}

/// Elements of pair `pair` in a rotated part of `width`.
fn of_pair(pair: usize, width: usize, interleave: bool) -> [usize; 2] {
    if interleave { [2 * pair, 2 * pair + 1] } else { [pair, pair + width / 2] }
}

impl Mixing {
    /// One matrix per channel, for keys of `n_kv_head` heads.
    pub fn new(n_kv_head: usize, channels: Vec<Matrix>) -> Self {
        Mixing { n_kv_head, head_dim: channels.len(), channels }
    }

    /// The principal axes of every pair over the heads: the first slice holds most of the keys' energy. First positions count as any
    /// other: where all sequences begin with the same token, their weight would turn every pair to that one key.
    ///
    /// # Errors
    /// Keys that are not finite.
    pub fn principal(config: &GqaConfig, activations: &Activations) -> Result<Self> {
        let (heads, width) = (config.n_kv_head as usize, config.head_dim as usize);
        let keys = &activations.keys;
        let mut channels = vec![Matrix::default(); width];
        for pair in 0..width / 2 {
            let mut covariance = Matrix::zeros(heads, heads);
            let halves = of_pair(pair, width, config.rope.interleave);
            for row in keys.data.chunks_exact(keys.cols) {
                for channel in halves {
                    for a in 0..heads {
                        for b in 0..heads {
                            covariance.data[a * heads + b] += row[a * width + channel] * row[b * width + channel];
                        }
                    }
                }
            }
            let (_, axes) = eigen(&covariance)?;
            halves.into_iter().for_each(|channel| channels[channel] = axes.clone());
        }
        Ok(Mixing::new(heads, channels))
    }

    /// The matrix of each channel.
    pub fn channels(&self) -> &[Matrix] {
        &self.channels
    }

    fn at(&self, channel: usize, head: usize, slice: usize) -> f64 {
        self.channels[channel].data[head * self.n_kv_head + slice]
    }

    /// Rows of a key projection, `[n_kv_head · head_dim, hidden]`, as rows of slices.
    fn of_rows(&self, w: &Matrix) -> Matrix {
        let (heads, width) = (self.n_kv_head, self.head_dim);
        let mut mixed = Matrix::zeros(w.rows, w.cols);
        for slice in 0..heads {
            for channel in 0..width {
                for head in 0..heads {
                    let factor = self.at(channel, head, slice);
                    let from = w.row(head * width + channel);
                    let to = mixed.row_mut(slice * width + channel);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
                }
            }
        }
        mixed
    }

    /// Keys `[tokens, n_kv_head · head_dim]` as slices.
    fn of_keys(&self, keys: &Matrix) -> Matrix {
        let (heads, width) = (self.n_kv_head, self.head_dim);
        let mut mixed = Matrix::zeros(keys.rows, keys.cols);
        for row in 0..keys.rows {
            let (from, to) = (keys.row(row), mixed.row_mut(row));
            for slice in 0..heads {
                for channel in 0..width {
                    to[slice * width + channel] =
                        (0..heads).map(|head| self.at(channel, head, slice) * from[head * width + channel]).sum();
                }
            }
        }
        mixed
    }
}

/// Weight that each first position has beside that of every token.
pub(super) fn first_weight(activations: &Activations, sink_weight: f64) -> f64 {
    sink_weight * activations.keys.rows as f64 / activations.starts.len().max(1) as f64
}

/// `xᵀ x`, with each first position `first` times more.
pub(super) fn covariance(x: &Matrix, starts: &[usize], first: f64) -> Matrix {
    let mut sum = product(x.t(), x.view());
    let weighted = starts.iter().flat_map(|&row| x.row(row).iter().map(|value| value * first.sqrt())).collect();
    let weighted = Matrix::of(weighted, x.cols);
    let more = product(weighted.t(), weighted.view());
    sum.data.iter_mut().zip(&more.data).for_each(|(sum, more)| *sum += more);
    sum
}

/// A layer of latents in f64, before its weights are rounded to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentLayer {
    /// Its configuration.
    pub config: AttentionConfig,
    q_proj: Matrix,
    q_bias: Option<Vec<f64>>,
    kv_a_proj: Matrix,
    kv_a_bias: Option<Vec<f64>>,
    kv_b_proj: Matrix,
    o_proj: Matrix,
    o_bias: Option<Vec<f64>>,
    gate: Option<Gate>,
}

/// Where the parts of a converted layer are.
pub(super) struct Shape {
    pub hidden: usize,
    pub n_head: usize,
    pub n_kv_head: usize,
    pub head_dim: usize,
    /// Slices that are rotated.
    pub slices: usize,
    pub d_nope: usize,
    /// Width of the keys in y; the values are behind them.
    pub keys: usize,
    /// Width of y.
    pub width: usize,
}

impl Shape {
    pub fn new(config: &GqaConfig, slices: usize) -> Self {
        let [hidden, n_head, n_kv_head, head_dim] =
            [config.hidden_size, config.n_head, config.n_kv_head, config.head_dim].map(|extent| extent as usize);
        let keys = (n_kv_head - slices) * head_dim;
        let d_nope = if keys == 0 { 0 } else { head_dim };
        Shape { hidden, n_head, n_kv_head, head_dim, slices, d_nope, keys, width: keys + n_kv_head * head_dim }
    }
}

/// The configuration of a layer that is converted.
///
/// # Errors
/// [`Error::Config`] for norms of heads, scaled queries or a `dynamic` rotation, which a layer of latents has no place for; a rank or
/// a number of slices that is out of range, by the option's name.
pub fn latent_config(source: &GqaConfig, options: &LayerOptions, gate: Option<GateConfig>) -> Result<AttentionConfig> {
    source.validate()?;
    if let RopeScaling::Dynamic { .. } = source.rope.scaling {
        return Err(Error::config("rope_scaling.type", "is `dynamic`, which is not converted"));
    }
    if source.qk_norm_eps.is_some() {
        let problem = "norms every head of queries and keys, which latents do not hold";
        return Err(Error::config("model_type", problem));
    }
    if source.rope.query_scaling.is_some() {
        let problem = "scales queries by their position, which is not converted";
        return Err(Error::config("rope_scaling.llama_4_scaling_beta", problem));
    }
    let range = |what: &str, found: usize, first: usize, last: usize| match (first..=last).contains(&found) {
        true => Ok(()),
        false => Err(Error::Data(DataError::Input(format!("{what} is {found}, must be {first} to {last}")))),
    };
    range("rope-slices", options.rope_slices, 1, source.n_kv_head as usize)?;
    let shape = Shape::new(source, options.rope_slices);
    // One column of the latent of gates is the constant 1.
    let constant = usize::from(gate.is_some());
    range("rank", options.rank, 1 + constant, shape.width + constant)?;
    if let Some(gate) = gate.as_ref().filter(|gate| !gate.tied) {
        range("embed-dim", gate.d_gate as usize, 1, shape.width)?;
    }
    let d_rope = source.head_dim * options.rope_slices as u32;
    let config = AttentionConfig {
        hidden_size: source.hidden_size,
        n_head: source.n_head,
        d_latent: options.rank as u32,
        d_nope: shape.d_nope as u32,
        d_rope,
        d_value: source.head_dim,
        attention_bias: source.o_bias || source.qkv_bias || gate.is_some(),
        q_proj_bias: source.qkv_bias,
        rope: slices_rope(&source.rope, source.head_dim, options.rope_slices as u32),
        gate,
        ..AttentionConfig::default()
    };
    config.validate()?;
    Ok(config)
}

/// The rotation of several slices of `head_dim`, each turned like the source's key.
fn slices_rope(rope: &RopeConfig, head_dim: u32, slices: u32) -> RopeConfig {
    if slices == 1 {
        return rope.clone();
    }
    // Frequencies that follow no formula of the whole width: each is given by its divisor.
    let plain = RopeConfig { scaling: RopeScaling::None, ..rope.clone() };
    let wanted = rope.frequencies(head_dim);
    let found = plain.frequencies(head_dim * slices);
    let scaling = RopeScaling::LongRope {
        short_factor: found.iter().zip(wanted.iter().cycle()).map(|(found, wanted)| found / wanted).collect(),
        attention_factor: rope.amplitude(),
    };
    RopeConfig { scaling, ..rope.clone() }
}

fn matrix(tensor: &HostTensor) -> Matrix {
    Matrix::of(tensor.to_f64(), tensor.shape.last().copied().unwrap_or(1))
}

/// Converts one layer: with `gates`, of EG-MLA.
///
/// # Errors
/// As [`latent_config`]; activations that are not finite.
pub fn convert_layer(
    source: &GqaConfig,
    weights: &GqaWeights,
    activations: &Activations,
    options: &LayerOptions,
    gates: Option<&Gates>,
) -> Result<(LatentLayer, LayerError)> {
    let mixing = Mixing::principal(source, activations)?;
    convert_layer_with(source, weights, activations, options, gates, &mixing)
}

/// The same with a mixing of heads that is given.
///
/// # Errors
/// As [`convert_layer`].
pub fn convert_layer_with(
    source: &GqaConfig,
    weights: &GqaWeights,
    activations: &Activations,
    options: &LayerOptions,
    gates: Option<&Gates>,
    mixing: &Mixing,
) -> Result<(LatentLayer, LayerError)> {
    let config = latent_config(source, options, gates.map(Gates::config))?;
    weights.check(source)?;
    let shape = Shape::new(source, options.rope_slices);
    let (d, slices) = (shape.head_dim, shape.slices);
    let keys = mixing.of_keys(&activations.keys);
    let bias = |tensor: &Option<HostTensor>| tensor.as_ref().map(HostTensor::to_f64);
    let (q_bias, v_bias) = (bias(&weights.q_bias), bias(&weights.v_bias));
    let k_bias = bias(&weights.k_bias).map(|bias| mixing.of_rows(&Matrix::of(bias, 1)).data);
    let mut y = joined(&keys, &activations.values, slices * d);
    if let (Some(k_bias), Some(v_bias)) = (&k_bias, &v_bias) {
        let of_y = [&k_bias[slices * d..], v_bias].concat();
        for row in y.data.chunks_exact_mut(of_y.len()) {
            row.iter_mut().zip(&of_y).for_each(|(value, bias)| *value -= bias);
        }
    }
    let balance = balance(&y, shape.keys);
    let mut scaled = y;
    scaled.scale_cols(&balance);

    let fitted = match gates {
        None => Fitted::of_latents(&scaled, activations, options)?,
        Some(gates) => gates.fit(&scaled, activations, options)?,
    };
    let error = LayerError {
        unrotated_keys: unrotated(&keys, slices * d),
        lost: fitted.lost,
        lost_of_first: fitted.lost_of_first,
        output: 0.0,
    };

    // y from the latents: S⁻¹ P, expanded to the query heads.
    let expansion = expansion(&shape, mixing, &balance);
    let rank = fitted.axes.cols;
    let mut kv_b_proj = product(expansion.view(), fitted.axes.view());

    // Latents: Pᵀ S [W_K' ; W_V], then the rotary key.
    let k_mixed = mixing.of_rows(&matrix(&weights.k_proj));
    let mut down =
        Matrix::of([&k_mixed.data[slices * d * shape.hidden..], &weights.v_proj.to_f64()].concat(), shape.hidden);
    down.scale_rows(&balance);
    let latents = product(fitted.axes.t(), down.view());
    let d_latent = config.d_latent as usize;
    let mut kv_a_proj = Matrix::zeros(d_latent + slices * d, shape.hidden);
    kv_a_proj.data[..rank * shape.hidden].copy_from_slice(&latents.data);
    let places = rotary_places(&shape, source.rope.interleave);
    for (row, &place) in places.iter().enumerate() {
        kv_a_proj.row_mut(d_latent + place).copy_from_slice(k_mixed.row(row));
    }

    let o_proj = matrix(&weights.o_proj);
    let mut kv_a_bias = config.attention_bias.then(|| vec![0.0; d_latent + slices * d]);
    if let (Some(bias), Some(k_bias)) = (&mut kv_a_bias, &k_bias) {
        places.iter().zip(k_bias).for_each(|(place, from)| bias[d_latent + place] = *from);
    }
    // Of values: of each query head, what attention adds to it whatever its weights, which sum to 1.
    let mut of_values = vec![0.0; shape.n_head * d];
    if let Some(v_bias) = &v_bias {
        for (head, of_head) in of_values.chunks_exact_mut(d).enumerate() {
            of_head.copy_from_slice(&v_bias[head / (shape.n_head / shape.n_kv_head) * d..][..d]);
        }
    }
    let mut gate = None;
    if let Some(offset) = fitted.offset {
        // The constant column of the latent, and what it carries.
        if let Some(bias) = &mut kv_a_bias {
            bias[rank] = 1.0;
        }
        let Expanded { carried, shares, offsets, b_proj } = offset.expanded(&expansion);
        kv_b_proj.scale_rows(&shares);
        let mut wider = Matrix::zeros(kv_b_proj.rows, rank + 1);
        for (row, carried) in carried.into_iter().enumerate() {
            wider.row_mut(row)[..rank].copy_from_slice(kv_b_proj.row(row));
            wider.row_mut(row)[rank] = carried;
        }
        kv_b_proj = wider;
        // m comes out of attention as it is, too.
        for (of_head, offsets) in of_values.chunks_exact_mut(d).zip(offsets.chunks_exact(shape.d_nope + d)) {
            of_head.iter_mut().zip(&offsets[shape.d_nope..]).for_each(|(value, m)| *value -= m);
        }
        gate = Some(Gate { rows: offset.rows, b_proj });
    }
    let o_bias = config.attention_bias.then(|| {
        let mut o_bias = product(o_proj.view(), View::new(&of_values, 1)).data;
        let of_source = bias(&weights.o_bias).into_iter().flatten();
        o_bias.iter_mut().zip(of_source).for_each(|(bias, of_source)| *bias += of_source);
        o_bias
    });
    let queries = |source_rows: &Matrix| queries(&shape, source_rows, mixing, source, &config, &places);
    let layer = LatentLayer {
        q_proj: queries(&matrix(&weights.q_proj)),
        q_bias: q_bias.map(|bias| queries(&Matrix::of(bias, 1)).data),
        kv_a_proj,
        kv_a_bias,
        kv_b_proj,
        o_proj,
        o_bias,
        gate,
        config,
    };
    Ok((layer, error))
}

/// What the latents of a layer hold.
pub(super) struct Fitted {
    /// P, `[width of y, columns of the latent that are projections]`, for y scaled.
    pub axes: Matrix,
    /// Gates, of EG-MLA.
    pub offset: Option<super::gates::Offset>,
    pub lost: f64,
    pub lost_of_first: f64,
}

impl Fitted {
    fn of_latents(scaled: &Matrix, activations: &Activations, options: &LayerOptions) -> Result<Self> {
        let first = first_weight(activations, options.sink_weight);
        let (_, axes) = eigen(&covariance(scaled, &activations.starts, first))?;
        let axes = axes.first_cols(options.rank);
        let held = product(product(scaled.view(), axes.view()).view(), axes.t());
        let mut left = scaled.clone();
        left.data.iter_mut().zip(&held.data).for_each(|(left, held)| *left -= held);
        let [lost, lost_of_first] = lost(scaled, &left, &activations.starts);
        Ok(Fitted { axes, offset: None, lost, lost_of_first })
    }
}

/// Energy of `left` over that of `whole`: of all rows but the first ones of sequences, and of those.
pub(super) fn lost(whole: &Matrix, left: &Matrix, starts: &[usize]) -> [f64; 2] {
    let energy = |matrix: &Matrix, row: usize| matrix.row(row).iter().map(|value| value * value).sum::<f64>();
    let mut sums = [[0.0; 2]; 2];
    for row in 0..whole.rows {
        let of = usize::from(starts.binary_search(&row).is_ok());
        sums[of][0] += energy(left, row);
        sums[of][1] += energy(whole, row);
    }
    sums.map(|[left, whole]| if whole > 0.0 { left / whole } else { 0.0 })
}

/// y: the keys of the slices that are not rotated, from column `from` on, and the values.
fn joined(keys: &Matrix, values: &Matrix, from: usize) -> Matrix {
    let data = keys.data.chunks_exact(keys.cols).zip(values.data.chunks_exact(values.cols));
    Matrix::of(
        data.flat_map(|(keys, values)| keys[from..].iter().chain(values)).copied().collect(),
        keys.cols - from + values.cols,
    )
}

/// S: the norm of the values over that of the keys for the keys, 1 for the values.
fn balance(y: &Matrix, keys: usize) -> Vec<f64> {
    let mut energies = [0.0; 2];
    for row in y.data.chunks_exact(y.cols) {
        row.iter().enumerate().for_each(|(at, value)| energies[usize::from(at >= keys)] += value * value);
    }
    let ratio = (energies[1] / energies[0]).sqrt();
    let factor = if ratio.is_finite() && ratio > 0.0 { ratio } else { 1.0 };
    (0..y.cols).map(|at| if at < keys { factor } else { 1.0 }).collect()
}

fn unrotated(keys: &Matrix, from: usize) -> f64 {
    let rest: f64 = keys.data.chunks_exact(keys.cols).flat_map(|row| &row[from..]).map(|value| value * value).sum();
    if rest > 0.0 { rest / keys.energy() } else { 0.0 }
}

/// E S⁻¹ `[n_head · (d_nope + head_dim), width]`: keys and values of every query head from y that is scaled.
fn expansion(shape: &Shape, mixing: &Mixing, balance: &[f64]) -> Matrix {
    let (d, per_head) = (shape.head_dim, shape.d_nope + shape.head_dim);
    let mut expansion = Matrix::zeros(shape.n_head * per_head, shape.width);
    for head in 0..shape.n_head {
        let group = head / (shape.n_head / shape.n_kv_head);
        for channel in 0..d {
            if shape.d_nope > 0 {
                let row = expansion.row_mut(head * per_head + channel);
                for slice in shape.slices..shape.n_kv_head {
                    row[(slice - shape.slices) * d + channel] = mixing.at(channel, group, slice);
                }
            }
            expansion.row_mut(head * per_head + shape.d_nope + channel)[shape.keys + group * d + channel] = 1.0;
        }
    }
    let inverse: Vec<f64> = balance.iter().map(|factor| factor.recip()).collect();
    expansion.scale_cols(&inverse);
    expansion
}

/// Where each channel of each rotated slice is in the rotary part, `[slices · head_dim]`.
fn rotary_places(shape: &Shape, interleave: bool) -> Vec<usize> {
    let (d, width) = (shape.head_dim, shape.slices * shape.head_dim);
    let mut places = vec![0; width];
    for slice in 0..shape.slices {
        for pair in 0..d / 2 {
            let from = of_pair(pair, d, interleave);
            let to = of_pair(slice * d / 2 + pair, width, interleave);
            for half in 0..2 {
                places[slice * d + from[half]] = to[half];
            }
        }
    }
    places
}

/// Rows of every head from those of the source, of its matrix or its bias: for content keys, then for the rotated slices. Scores have
/// the source's scale.
fn queries(
    shape: &Shape,
    source: &Matrix,
    mixing: &Mixing,
    from: &GqaConfig,
    config: &AttentionConfig,
    places: &[usize],
) -> Matrix {
    let (d, d_query) = (shape.head_dim, shape.d_nope + shape.slices * shape.head_dim);
    let rotated = from.scale() / config.scale();
    // cos and sin carry the amplitude on both sides of a rotated score: what is not rotated any more carries it here.
    let content = rotated * from.rope.amplitude().powi(2);
    let mut rows = Matrix::zeros(shape.n_head * d_query, source.cols);
    for head in 0..shape.n_head {
        let group = head / (shape.n_head / shape.n_kv_head);
        for channel in 0..d {
            let row = source.row(head * d + channel);
            let mut put = |at: usize, factor: f64| {
                let to = rows.row_mut(head * d_query + at);
                to.iter_mut().zip(row).for_each(|(to, from)| *to = factor * from);
            };
            if shape.d_nope > 0 {
                put(channel, content);
            }
            for slice in 0..shape.slices {
                let at = shape.d_nope + places[slice * d + channel];
                put(at, rotated * mixing.at(channel, group, slice));
            }
        }
    }
    rows
}

impl LatentLayer {
    /// Attention over whole sequences from their beginning: `hidden` `[tokens, hidden]`, of one sequence; `[tokens, hidden]`.
    pub fn forward(&self, hidden: &Matrix, ids: &[u32]) -> Matrix {
        let [n_head, d_nope, d_rope, d_value, d_latent] =
            [self.config.n_head, self.config.d_nope, self.config.d_rope, self.config.d_value, self.config.d_latent]
                .map(|extent| extent as usize);
        let positions: Vec<u32> = (0..hidden.rows as u32).collect();
        let turns = rotations(&self.config.rope, d_rope, &positions);
        let interleave = self.config.rope.interleave;
        let mut q = product(hidden.view(), self.q_proj.t());
        add_bias(&mut q, &self.q_bias);
        rope(&mut q.data, &turns, n_head, d_nope + d_rope, d_rope, interleave);
        let mut down = product(hidden.view(), self.kv_a_proj.t());
        add_bias(&mut down, &self.kv_a_bias);
        let latents = down.first_cols(d_latent);
        let mut k_rope: Vec<f64> =
            down.data.chunks_exact(down.cols).flat_map(|row| &row[d_latent..]).copied().collect();
        rope(&mut k_rope, &turns, 1, d_rope, d_rope, interleave);
        let mut kv = product(latents.view(), self.kv_b_proj.t());
        if let Some(gate) = &self.gate {
            gate.apply(&mut kv, ids);
        }
        let visible: Vec<_> = (0..hidden.rows).map(|t| 0..t + 1).collect();
        let heads = Heads { n_head, n_kv_head: n_head, d_nope, d_rope, d_value };
        let attended = attention_prefill(&q.data, &kv.data, &k_rope, &visible, heads, self.config.scale());
        let mut out = product(Matrix::of(attended.values, n_head * d_value).view(), self.o_proj.t());
        add_bias(&mut out, &self.o_bias);
        out
    }

    /// The weights, rounded to f32; of a tied gate without the token embedding, which is the model's.
    pub fn weights(&self) -> AttentionWeights {
        let tensor = |name: &str, matrix: &Matrix| HostTensor {
            name: name.to_owned(),
            shape: vec![matrix.rows, matrix.cols],
            data: matrix.data.iter().map(|&value| value as f32).collect(),
        };
        let vector = |name: &str, values: &Option<Vec<f64>>| {
            values.as_ref().map(|values| HostTensor {
                name: name.to_owned(),
                shape: vec![values.len()],
                data: values.iter().map(|&value| value as f32).collect(),
            })
        };
        AttentionWeights {
            query: QueryWeights::Full {
                proj: tensor("q_proj.weight", &self.q_proj),
                bias: vector("q_proj.bias", &self.q_bias),
            },
            kv_a_proj: tensor("kv_a_proj_with_mqa.weight", &self.kv_a_proj),
            kv_a_bias: vector("kv_a_proj_with_mqa.bias", &self.kv_a_bias),
            kv_a_norm: None,
            kv_b_proj: tensor("kv_b_proj.weight", &self.kv_b_proj),
            o_proj: tensor("o_proj.weight", &self.o_proj),
            o_bias: vector("o_proj.bias", &self.o_bias),
            gate: self.gate.as_ref().map(|gate| GateWeights {
                embedding: match &gate.rows {
                    Rows::Table(table) => Some(tensor("gate_embedding.weight", table)),
                    Rows::Tied(_) => None,
                },
                b_proj: tensor("gate_b_proj.weight", &gate.b_proj),
                norm_weight: None,
                norm_bias: None,
            }),
        }
    }
}
