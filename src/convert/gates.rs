//! Gates without training: what the identity of a token explains of its keys and values goes into a row per id, and the latent
//! holds only the rest.
//!
//! ```text
//! [k_nope ; v] + m ≈ (E S⁻¹ P c + a + m) ⊙ g_u,   g_u = 1 + b_u / (a + m)
//! ```
//!
//! With m several times larger than what the latent carries, the gate adds b_u, but for the share of the latent's part over m.
//! One column of the latent is the constant 1 and carries a + m. m is never taken off again: on keys it adds the same to every
//! score of a query, which the softmax does not see; on values it is a constant of the output, which the bias of `o_proj` takes
//! off.
//!
//! Per layer, over y scaled by the balance:
//!
//! 1. A ridge regression of the mean of each id on its token embedding, its strength by leaving each id out. It serves the ids
//!    that the text does not hold.
//! 2. Each mean is shrunk to it by n / (n + κ), n times met; κ is the variance within ids over that of means around the regression.
//! 3. P: principal axes of what is left of each token when its id's row is made without it; first positions weighted. Ids that are
//!    met at first positions alone, as a token that begins every text, have no row: their gate is 1.
//! 4. The rows, without what lies within P, are kept along their `embed_dim` principal axes, weighted by how often ids are met; the
//!    ids that are not met share the weight of those met once (Good and Turing).
//!
//! A tied gate has no rows but the token embeddings: of these steps it has the regression of 1 alone, and P of what that leaves of
//! each token when it is fitted without the token's id. A first position is left what its own gate leaves, which the latent then
//! holds. The regression B is around the mean e₀ of the embeddings, and the gate is not:
//!
//! ```text
//! (E S⁻¹ P c + a + m) ⊙ (1 + B (e − e₀) / (a + m)) = (E S⁻¹ P c ⊙ A / (a + m) + A) ⊙ (1 + B e / A),   A = a + m − B e₀
//! ```

use std::sync::Arc;

use super::layer::{Activations, Fitted, LayerOptions, covariance, first_weight, lost};
use super::matrix::{Matrix, View, eigen, product};
use crate::config::{Activation, GateConfig, GateNorm, GateSite, TIED_NORM_EPS};
use crate::error::Result;
use crate::reference::rms_norm;
use crate::weights::HostTensor;

/// m over the root mean square of a channel.
const OFFSET: f64 = 8.0;

/// Strengths of the ridge that are tried, in mean eigenvalues of the features.
const RIDGES: [f64; 8] = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// Rows of the vocabulary that are computed at once.
const PIECE: usize = 4096;

/// Where the rows of gates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// From a table of each layer.
    Table {
        /// Width of its rows.
        embed_dim: u32,
    },
    /// From the model's token embedding.
    Tied,
}

impl GateKind {
    /// The gate's part of a configuration: `one_plus`, without a norm.
    pub fn config(self, vocab_size: u32, hidden_size: u32) -> GateConfig {
        GateConfig {
            vocab_size,
            d_gate: self.embed_dim().unwrap_or(hidden_size),
            tied: self == GateKind::Tied,
            site: GateSite::UpProjected,
            activation: Activation::OnePlus,
            norm: GateNorm::None,
            norm_eps: 1e-5,
        }
    }

    /// Its name, as the program's option has it.
    pub fn name(self) -> &'static str {
        match self {
            GateKind::Table { .. } => "table",
            GateKind::Tied => "tied",
        }
    }

    /// Width of a table's rows.
    pub fn embed_dim(self) -> Option<u32> {
        match self {
            GateKind::Table { embed_dim } => Some(embed_dim),
            GateKind::Tied => None,
        }
    }
}

/// A model's token embedding.
#[derive(Debug, PartialEq)]
pub(super) struct Embedding {
    /// `[vocab, hidden]`
    data: Vec<f32>,
    hidden: usize,
}

impl Embedding {
    /// Rows of ids as a tied gate reads them, `[ids, hidden]`.
    fn normed(&self, ids: impl Iterator<Item = u32>) -> Matrix {
        let rows = ids.flat_map(|id| &self.data[id as usize * self.hidden..][..self.hidden]);
        let rows: Vec<f64> = rows.copied().map(f64::from).collect();
        Matrix::of(rms_norm(&rows, None, self.hidden, TIED_NORM_EPS), self.hidden)
    }
}

/// What the gates of all layers share: the ids of the calibration text and their token embeddings.
#[derive(Debug)]
pub struct Gates {
    config: GateConfig,
    embedding: Arc<Embedding>,
    /// Ids that are met behind first positions, ascending, and how often.
    ids: Vec<u32>,
    counts: Vec<f64>,
    /// Index in `ids` of each token; none for first positions.
    of_token: Vec<Option<usize>>,
    /// Ids that are met at first positions alone, ascending. By a table their gate is 1: what every head leans on there is many
    /// times larger than m, and a gate would change it by as much.
    firsts: Vec<u32>,
    /// Weight of each id in the regression.
    weights: Vec<f64>,
    /// Mean of the features.
    centre: Vec<f64>,
    /// Eigenvalues and eigenvectors of the features' weighted covariance, and the ids' features along them.
    eigenvalues: Vec<f64>,
    axes: Matrix,
    features: Matrix,
}

/// The rows that a gate reads.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rows {
    /// `[vocab, embed_dim]`
    Table(Matrix),
    Tied(Arc<Embedding>),
}

/// A gate's rows and projection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Gate {
    pub rows: Rows,
    /// `[n_head · (d_nope + d_value), width of a row]`
    pub b_proj: Matrix,
}

impl Gate {
    /// `kv ⊙ g`, `[tokens, n_head · (d_nope + d_value)]`.
    pub fn apply(&self, kv: &mut Matrix, ids: &[u32]) {
        let rows = match &self.rows {
            Rows::Table(table) => {
                Matrix::of(ids.iter().flat_map(|&id| table.row(id as usize)).copied().collect(), table.cols)
            }
            Rows::Tied(embedding) => embedding.normed(ids.iter().copied()),
        };
        let gates = product(rows.view(), self.b_proj.t());
        kv.data.iter_mut().zip(&gates.data).for_each(|(value, gate)| *value *= 1.0 + gate);
    }
}

/// What a layer's gates add, in the space of y scaled.
pub(super) struct Offset {
    /// a
    centre: Vec<f64>,
    pub rows: Rows,
    /// From a row to what it adds, `[width of a row, width]`.
    map: Matrix,
    /// The row that adds nothing: a, with what the map makes of it, is what the constant carries.
    neutral: Vec<f64>,
    /// Mean of y yᵀ over tokens.
    moment: Matrix,
}

/// The same for keys and values of every query head, `[n_head · (d_nope + d_value)]`.
pub(super) struct Expanded {
    /// A, what the constant of the latent carries.
    pub carried: Vec<f64>,
    /// A / (a + m), on what the latent holds; 1 with a table.
    pub shares: Vec<f64>,
    /// m
    pub offsets: Vec<f64>,
    /// From a row to the gate, `[n_head · (d_nope + d_value), width of a row]`.
    pub b_proj: Matrix,
}

impl Offset {
    /// By the expansion of y to keys and values of every query head.
    pub fn expanded(&self, expansion: &Matrix) -> Expanded {
        let centre = product(expansion.view(), View::new(&self.centre, 1)).data;
        let moments = product(expansion.view(), self.moment.view());
        let mut b_proj = product(expansion.view(), self.map.t());
        let neutral = product(b_proj.view(), View::new(&self.neutral, 1)).data;
        let offsets: Vec<f64> = (0..expansion.rows)
            .map(|row| {
                let square: f64 = moments.row(row).iter().zip(expansion.row(row)).map(|(a, b)| a * b).sum();
                // A channel that is 0 throughout has no size of its own. A must not come near 0.
                if square > 0.0 { OFFSET * square.sqrt().max(neutral[row].abs()) } else { 1.0 }
            })
            .collect();
        let whole: Vec<f64> = centre.iter().zip(&offsets).map(|(centre, offset)| centre + offset).collect();
        let carried: Vec<f64> = whole.iter().zip(&neutral).map(|(whole, neutral)| whole - neutral).collect();
        let shares = carried.iter().zip(&whole).map(|(carried, whole)| carried / whole).collect();
        b_proj.scale_rows(&carried.iter().map(|value| value.recip()).collect::<Vec<_>>());
        Expanded { carried, shares, offsets, b_proj }
    }
}

impl Gates {
    /// Prepares gates for the tokens of a calibration text, by the model's token embedding.
    ///
    /// # Errors
    /// An embedding that is not finite.
    pub fn new(embedding: &HostTensor, kind: GateKind, ids: &[u32], starts: &[usize]) -> Result<Self> {
        let [vocab, hidden] = [0, 1].map(|axis| embedding.shape.get(axis).copied().unwrap_or(0));
        let behind = |at: &usize| starts.binary_search(at).is_err();
        let mut met: Vec<u32> = (0..ids.len()).filter(behind).map(|at| ids[at]).collect();
        met.sort_unstable();
        met.dedup();
        let of_token: Vec<_> =
            (0..ids.len()).map(|at| if behind(&at) { met.binary_search(&ids[at]).ok() } else { None }).collect();
        let mut firsts: Vec<u32> = starts.iter().map(|&at| ids[at]).collect();
        firsts.retain(|id| met.binary_search(id).is_err());
        firsts.sort_unstable();
        firsts.dedup();
        let mut counts = vec![0.0; met.len()];
        of_token.iter().flatten().for_each(|&at| counts[at] += 1.0);
        let weights: Vec<f64> = counts.iter().map(|n| n / (n + 1.0)).collect();
        let mut gates = Gates {
            config: kind.config(vocab as u32, hidden as u32),
            embedding: Arc::new(Embedding { data: embedding.data.clone(), hidden }),
            ids: met,
            counts,
            of_token,
            firsts,
            weights,
            centre: vec![0.0; hidden],
            eigenvalues: Vec::new(),
            axes: Matrix::default(),
            features: Matrix::default(),
        };
        let features = gates.embedding.normed(gates.ids.iter().copied());
        let total: f64 = gates.weights.iter().sum();
        for (row, weight) in features.data.chunks_exact(hidden).zip(&gates.weights) {
            gates.centre.iter_mut().zip(row).for_each(|(centre, value)| *centre += weight / total * value);
        }
        let features = gates.centred(features);
        let mut weighted = features.clone();
        weighted.scale_rows(&gates.weights.iter().map(|weight| weight.sqrt()).collect::<Vec<_>>());
        (gates.eigenvalues, gates.axes) = eigen(&product(weighted.t(), weighted.view()))?;
        gates.features = product(features.view(), gates.axes.view());
        Ok(gates)
    }

    /// The gate's part of a configuration.
    pub fn config(&self) -> GateConfig {
        self.config.clone()
    }

    fn centred(&self, mut features: Matrix) -> Matrix {
        for row in features.data.chunks_exact_mut(features.cols) {
            row.iter_mut().zip(&self.centre).for_each(|(value, centre)| *value -= centre);
        }
        features
    }

    /// Latents and gates of one layer, for y `scaled`.
    pub(super) fn fit(&self, scaled: &Matrix, activations: &Activations, options: &LayerOptions) -> Result<Fitted> {
        let width = scaled.cols;
        let means = self.means(scaled);
        let total: f64 = self.weights.iter().sum();
        let mut centre = vec![0.0; width];
        for (row, weight) in means.data.chunks_exact(width).zip(&self.weights) {
            centre.iter_mut().zip(row).for_each(|(centre, value)| *centre += weight / total * value);
        }
        let ridge = self.ridge(&means, &centre, total);
        let (residual, rows) = match self.config.tied {
            true => (self.left_by_regression(scaled, activations, &means, &centre, &ridge), None),
            false => {
                let kappa = self.shrinkage(scaled, &means, &ridge.left);
                let rows = self.rows_of(&means, &centre, &ridge, kappa);
                (self.left_by_rows(scaled, activations, (&means, &rows), &centre, &ridge, kappa), Some(rows))
            }
        };
        let first = first_weight(activations, options.sink_weight);
        let (_, axes) = eigen(&covariance(&residual, &activations.starts, first))?;
        let axes = axes.first_cols(options.rank - 1);
        let [lost, lost_of_first] = lost(scaled, &without(residual, &axes), &activations.starts);

        let mut moment = product(scaled.t(), scaled.view());
        moment.data.iter_mut().for_each(|value| *value /= scaled.rows as f64);
        let (rows, map, neutral) = match rows {
            Some(rows) => {
                let (table, map) = self.table(&rows, &ridge, &axes)?;
                let neutral = vec![0.0; map.rows];
                (Rows::Table(table), map, neutral)
            }
            None => (Rows::Tied(Arc::clone(&self.embedding)), without(ridge.map, &axes), self.centre.clone()),
        };
        let centre = without(Matrix::of(centre, width), &axes).data;
        let offset = Offset { centre, rows, map, neutral, moment };
        Ok(Fitted { axes, offset: Some(offset), lost, lost_of_first })
    }

    /// What is left of each token when the regression is fitted without its id; of first positions, what the regression leaves.
    fn left_by_regression(
        &self,
        scaled: &Matrix,
        activations: &Activations,
        means: &Matrix,
        centre: &[f64],
        ridge: &Ridge,
    ) -> Matrix {
        let mut residual = scaled.clone();
        for (token, of) in self.of_token.iter().enumerate() {
            let left = residual.row_mut(token);
            match *of {
                Some(id) => {
                    let regressed = means.row(id).iter().zip(ridge.left.row(id)).map(|(mean, left)| mean - left);
                    left.iter_mut().zip(regressed).for_each(|(left, regressed)| *left -= regressed);
                }
                None => {
                    let row = self.regressed(activations.ids[token], ridge);
                    let regressed = centre.iter().zip(&row).map(|(centre, row)| centre + row);
                    left.iter_mut().zip(regressed).for_each(|(left, regressed)| *left -= regressed);
                }
            }
        }
        residual
    }

    /// What is left of each token when its id's row is made without it.
    fn left_by_rows(
        &self,
        scaled: &Matrix,
        activations: &Activations,
        (means, rows): (&Matrix, &Matrix),
        centre: &[f64],
        ridge: &Ridge,
        kappa: f64,
    ) -> Matrix {
        let width = scaled.cols;
        let mut residual = scaled.clone();
        for (token, of) in self.of_token.iter().enumerate() {
            let y = scaled.row(token);
            let left = residual.row_mut(token);
            match *of {
                Some(id) => {
                    let n = self.counts[id];
                    let (mean, left_of_mean) = (means.row(id), ridge.left.row(id));
                    let share = (n - 1.0) / (n - 1.0 + kappa);
                    for at in 0..width {
                        let regressed = mean[at] - left_of_mean[at];
                        let others = if n > 1.0 { (n * mean[at] - y[at]) / (n - 1.0) } else { regressed };
                        left[at] = y[at] - regressed - share * (others - regressed);
                    }
                }
                None => {
                    let row = self.row(activations.ids[token], rows, ridge);
                    for at in 0..width {
                        left[at] = y[at] - centre[at] - row[at];
                    }
                }
            }
        }
        residual
    }

    /// A table of the rows, without what the latent holds anyway, and the map from it.
    fn table(&self, rows: &Matrix, ridge: &Ridge, axes: &Matrix) -> Result<(Matrix, Matrix)> {
        let width = rows.cols;
        let vocab = self.config.vocab_size as usize;
        let singles = self.counts.iter().filter(|&&n| n == 1.0).count() as f64;
        let unmet = singles / (vocab - self.ids.len()).max(1) as f64;
        let piece = |first: usize| {
            let ids = first as u32..(first + PIECE).min(vocab) as u32;
            let features = self.centred(self.embedding.normed(ids.clone()));
            let mut table = product(features.view(), ridge.map.view());
            for (id, row) in ids.zip(table.data.chunks_exact_mut(width)) {
                if let Ok(at) = self.ids.binary_search(&id) {
                    row.copy_from_slice(rows.row(at));
                } else if self.firsts.binary_search(&id).is_ok() {
                    row.fill(0.0);
                }
            }
            without(table, axes)
        };
        let mut spread = Matrix::zeros(width, width);
        for first in (0..vocab).step_by(PIECE) {
            let mut table = piece(first);
            let weights: Vec<f64> = (first as u32..)
                .take(table.rows)
                .map(|id| self.ids.binary_search(&id).map_or(unmet, |at| self.counts[at]).sqrt())
                .collect();
            table.scale_rows(&weights);
            let more = product(table.t(), table.view());
            spread.data.iter_mut().zip(&more.data).for_each(|(sum, more)| *sum += more);
        }
        let directions = eigen(&spread)?.1.first_cols(self.config.d_gate as usize);
        let mut embedding = Vec::with_capacity(vocab * directions.cols);
        for first in (0..vocab).step_by(PIECE) {
            embedding.extend(product(piece(first).view(), directions.view()).data);
        }
        Ok((Matrix::of(embedding, directions.cols), directions.transposed()))
    }

    /// Mean of y of each id.
    fn means(&self, scaled: &Matrix) -> Matrix {
        let mut means = Matrix::zeros(self.ids.len(), scaled.cols);
        for (token, of) in self.of_token.iter().enumerate() {
            if let Some(id) = *of {
                means.row_mut(id).iter_mut().zip(scaled.row(token)).for_each(|(mean, value)| *mean += value);
            }
        }
        means.scale_rows(&self.counts.iter().map(|n| n.recip()).collect::<Vec<_>>());
        means
    }

    fn ridge(&self, means: &Matrix, centre: &[f64], total: f64) -> Ridge {
        let width = means.cols;
        let mut targets = means.clone();
        for row in targets.data.chunks_exact_mut(width) {
            row.iter_mut().zip(centre).for_each(|(value, centre)| *value -= centre);
        }
        let mut weighted = targets.clone();
        weighted.scale_rows(&self.weights);
        let moments = product(self.features.t(), weighted.view());
        let mean = self.eigenvalues.iter().sum::<f64>() / self.eigenvalues.len().max(1) as f64;
        let mut best: Option<(f64, Ridge)> = None;
        for strength in RIDGES {
            let inverse: Vec<f64> =
                self.eigenvalues.iter().map(|value| (value.max(0.0) + (strength * mean).max(1e-12)).recip()).collect();
            let mut along = moments.clone();
            along.scale_rows(&inverse);
            let fitted = product(self.features.view(), along.view());
            let mut left = targets.clone();
            let mut error = 0.0;
            for id in 0..self.ids.len() {
                let squares = self.features.row(id).iter().zip(&inverse).map(|(z, inverse)| z * z * inverse);
                // Its own share of its fitted value, by which leaving it out is known without fitting anew.
                let own = self.weights[id] * (squares.sum::<f64>() + total.recip());
                let factor = (1.0 - own).max(1e-3).recip();
                for (left, fitted) in left.row_mut(id).iter_mut().zip(fitted.row(id)) {
                    *left = (*left - fitted) * factor;
                    error += self.weights[id] * *left * *left;
                }
            }
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, Ridge { map: along, fitted, left }));
            }
        }
        let (_, mut ridge) = best.unwrap_or_default();
        ridge.map = product(self.axes.view(), ridge.map.view());
        ridge
    }

    /// κ: variance within ids over that of their means around the regression.
    fn shrinkage(&self, scaled: &Matrix, means: &Matrix, left: &Matrix) -> f64 {
        let mut within = 0.0;
        for (token, of) in self.of_token.iter().enumerate() {
            if let Some(id) = *of {
                within += scaled.row(token).iter().zip(means.row(id)).map(|(y, mean)| (y - mean).powi(2)).sum::<f64>();
            }
        }
        let freedom: f64 = self.counts.iter().map(|n| n - 1.0).sum();
        let within = within / freedom.max(1.0);
        let (mut between, mut total) = (0.0, 0.0);
        for id in 0..self.ids.len() {
            let square: f64 = left.row(id).iter().map(|value| value * value).sum();
            between += self.weights[id] * (square - within / self.counts[id]);
            total += self.weights[id];
        }
        let kappa = within / (between / total.max(1e-12)).max(within * 1e-2);
        if kappa.is_finite() { kappa } else { 1.0 }
    }

    /// b of each id that is met, `[ids, width]`, around the centre.
    fn rows_of(&self, means: &Matrix, centre: &[f64], ridge: &Ridge, kappa: f64) -> Matrix {
        let mut rows = means.clone();
        for (id, row) in rows.data.chunks_exact_mut(means.cols).enumerate() {
            let share = self.counts[id] / (self.counts[id] + kappa);
            for ((value, centre), fitted) in row.iter_mut().zip(centre).zip(ridge.fitted.row(id)) {
                *value = fitted + share * (*value - centre - fitted);
            }
        }
        rows
    }

    /// b of any id.
    fn row(&self, id: u32, rows: &Matrix, ridge: &Ridge) -> Vec<f64> {
        match self.ids.binary_search(&id) {
            Ok(at) => rows.row(at).to_vec(),
            Err(_) if self.firsts.binary_search(&id).is_ok() => vec![0.0; rows.cols],
            Err(_) => self.regressed(id, ridge),
        }
    }

    /// What the regression says of any id, around the centre.
    fn regressed(&self, id: u32, ridge: &Ridge) -> Vec<f64> {
        product(self.centred(self.embedding.normed([id].into_iter())).view(), ridge.map.view()).data
    }
}

/// A regression of y's means on token embeddings.
#[derive(Default)]
struct Ridge {
    /// From features to y around its centre, `[hidden, width]`.
    map: Matrix,
    /// Of each id that is met.
    fitted: Matrix,
    /// Mean less what the regression says without the id.
    left: Matrix,
}

/// `x (I − P Pᵀ)`, row by row.
fn without(mut x: Matrix, axes: &Matrix) -> Matrix {
    let held = product(product(x.view(), axes.view()).view(), axes.t());
    x.data.iter_mut().zip(&held.data).for_each(|(value, held)| *value -= held);
    x
}
