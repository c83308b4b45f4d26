//! One attention layer, MLA or EG-MLA, from the kernels of this module: expanded ([`Layer::forward`]) and absorbed
//! ([`Layer::forward_absorbed`]). The two agree to rounding; the program's CPU fallback runs the first. Both also decode from
//! what a latent cache holds: [`Layer::decode_expanded`], [`Layer::decode_absorbed`].

use std::sync::Arc;

use half::f16;

use crate::config::{AttentionConfig, GateConfig, TIED_NORM_EPS};
use crate::error::Result;
use crate::storage::Storage;
use crate::weights::{AttentionWeights, HostTensor, QueryWeights};

use super::attention_prefill::{exponentials, weighted_sum};
use super::matmul::dot;
use super::{
    Gated, Heads, activate, attention_prefill, gate, gather, matmul, rms_norm, rope, rotations, scale_queries,
};

/// One attention layer in f64.
#[derive(Debug, Clone)]
pub struct Layer {
    config: AttentionConfig,
    query: Query,
    kv_a_proj: Vec<f64>,
    kv_a_bias: Option<Vec<f64>>,
    kv_a_norm: Option<Vec<f64>>,
    kv_b_proj: Vec<f64>,
    o_proj: Vec<f64>,
    o_bias: Option<Vec<f64>>,
    gate: Option<Gate>,
    cache: Storage,
}

#[derive(Debug, Clone)]
enum Query {
    Full { proj: Vec<f64>, bias: Option<Vec<f64>> },
    LowRank { rank: usize, a_proj: Vec<f64>, a_bias: Option<Vec<f64>>, a_norm: Vec<f64>, b_proj: Vec<f64> },
}

#[derive(Debug, Clone)]
struct Gate {
    config: GateConfig,
    /// `[vocab, d_gate]`; of a tied gate the token embedding as it is in the checkpoint.
    embedding: Arc<Vec<f64>>,
    b_proj: Vec<f64>,
    norm_weight: Option<Vec<f64>>,
    norm_bias: Option<Vec<f64>>,
}

/// Keys and values already computed for the tokens of one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    length: usize,
    kv: Vec<f64>,
    k_rope: Vec<f64>,
}

impl History {
    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forgets all but the first `length` tokens; does nothing where there are no more than that.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.kv.truncate(self.kv.len() / self.length * length);
            self.k_rope.truncate(self.k_rope.len() / self.length * length);
            self.length = length;
        }
    }

    pub(super) fn append(&mut self, tokens: usize, kv: Vec<f64>, k_rope: Vec<f64>) {
        self.kv.extend(kv);
        self.k_rope.extend(k_rope);
        self.length += tokens;
    }

    /// Keys without the rotary part and values, gated: `[len, n_head, d_nope + d_value]`; of [`super::GqaLayer`], rotated keys and
    /// values `[len, n_kv_head, 2 · head_dim]`.
    pub fn kv(&self) -> &[f64] {
        &self.kv
    }

    /// Rotary keys `[len, d_rope]`; of [`super::GqaLayer`] there are none.
    pub fn k_rope(&self) -> &[f64] {
        &self.k_rope
    }
}

/// Cache rows of some tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Latents {
    /// c `[tokens, d_latent]`, normed; gated at site `latent`, ungated at site `up_projected`.
    pub latent: Vec<f64>,
    /// k_R `[tokens, d_rope]`, rotated.
    pub k_rope: Vec<f64>,
    /// (μ, ρ) `[tokens]` of the norm at site `up_projected`; (0, 1) everywhere else.
    pub statistics: Vec<[f64; 2]>,
}

impl Latents {
    /// Those of the first `tokens` tokens, which are no more than there are.
    pub fn first(&self, tokens: usize, config: &AttentionConfig) -> Latents {
        Latents {
            latent: self.latent[..tokens * config.d_latent as usize].to_vec(),
            k_rope: self.k_rope[..tokens * config.d_rope as usize].to_vec(),
            statistics: self.statistics[..tokens].to_vec(),
        }
    }

    /// These tokens, then `more`.
    fn followed_by(&self, more: Latents) -> Latents {
        let both = |before: &[f64], after: Vec<f64>| [before, &after].concat();
        Latents {
            latent: both(&self.latent, more.latent),
            k_rope: both(&self.k_rope, more.k_rope),
            statistics: [&self.statistics[..], &more.statistics].concat(),
        }
    }
}

/// Cached positions by token id, for the absorbed form.
struct Groups {
    /// u(j), the group of each position.
    of: Vec<usize>,
    /// g_u of each group, `[D]`.
    gates: Vec<Vec<f64>>,
}

impl Layer {
    /// Copies the weights to f64, those of a tied gate with the model's token embedding.
    ///
    /// # Errors
    /// As [`AttentionWeights::check`].
    pub fn new(config: AttentionConfig, weights: &AttentionWeights) -> Result<Layer> {
        weights.check(&config)?;
        let embedding = weights.gate.as_ref().and_then(|gate| gate.embedding.as_ref());
        Ok(Layer::of(config, weights, embedding.map(|own| Arc::new(own.to_f64()))))
    }

    /// The same with the token embedding of its model, `[vocab, hidden]`, for a tied gate; the weights are without one.
    #[cfg(feature = "decoder")]
    pub(crate) fn with_embedding(
        config: AttentionConfig,
        weights: &AttentionWeights,
        embedding: &Arc<Vec<f64>>,
    ) -> Result<Layer> {
        weights.check_own(&config)?;
        Ok(Layer::of(config, weights, Some(Arc::clone(embedding))))
    }

    /// The weights have been checked: with a gate there is an embedding.
    fn of(config: AttentionConfig, weights: &AttentionWeights, embedding: Option<Arc<Vec<f64>>>) -> Layer {
        let optional = |tensor: &Option<HostTensor>| tensor.as_ref().map(HostTensor::to_f64);
        let query = match &weights.query {
            QueryWeights::Full { proj, bias } => Query::Full { proj: proj.to_f64(), bias: optional(bias) },
            QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => Query::LowRank {
                rank: a_norm.data.len(),
                a_proj: a_proj.to_f64(),
                a_bias: optional(a_bias),
                a_norm: a_norm.to_f64(),
                b_proj: b_proj.to_f64(),
            },
        };
        let gate = config.gate.clone().zip(weights.gate.as_ref()).zip(embedding);
        let gate = gate.map(|((config, weights), embedding)| Gate {
            config,
            embedding,
            b_proj: weights.b_proj.to_f64(),
            norm_weight: optional(&weights.norm_weight),
            norm_bias: optional(&weights.norm_bias),
        });
        Layer {
            config,
            query,
            kv_a_proj: weights.kv_a_proj.to_f64(),
            kv_a_bias: optional(&weights.kv_a_bias),
            kv_a_norm: optional(&weights.kv_a_norm),
            kv_b_proj: weights.kv_b_proj.to_f64(),
            o_proj: weights.o_proj.to_f64(),
            o_bias: optional(&weights.o_bias),
            gate,
            cache: Storage::F32,
        }
    }

    /// The same with latents and rotary keys rounded as a cache in `storage` rounds them; f32 rounds nothing here. The norm's
    /// statistics are those of the rounded latents, so that every decode path computes the same.
    pub fn with_cache(self, storage: Storage) -> Layer {
        Layer { cache: storage, ..self }
    }

    /// Most bytes of the keys and values of `cached` tokens, and of computing `new` ones at once.
    pub fn bytes(config: &AttentionConfig, cached: u64, new: u64) -> u64 {
        let wide = |value: u32| u64::from(value);
        let AttentionConfig { hidden_size, n_head, d_latent, d_q_latent, d_rope, d_value, .. } = *config;
        let (d_kv, d_query) = (wide(config.d_kv()), wide(n_head) * wide(config.d_query()));
        // A list that grows may have twice the room that it needs, and is moved.
        let kept = 3 * (d_kv + wide(d_rope));
        let low = 3 * (wide(d_latent) + wide(d_rope) + wide(d_q_latent.unwrap_or(0)));
        let gates = config.gate.as_ref().map_or(0, |gate| wide(gate.d_gate) + 3 * d_kv.max(wide(d_latent)));
        let computed = 3 * wide(hidden_size) + 2 * d_query + 2 * wide(n_head) * wide(d_value) + low + d_kv + gates;
        cached.saturating_mul(kept).saturating_add(new.saturating_mul(computed)).saturating_mul(8)
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// New tokens of one sequence, at positions `history.len()..`: each attends to the history, to the new tokens
    /// before it and to itself. Their keys and values are added to `history`.
    ///
    /// `hidden` `[tokens, hidden]`, `token_ids` `[tokens]` (not looked at without a gate); returns `[tokens, hidden]`.
    pub fn forward(&self, hidden: &[f64], token_ids: &[u32], history: &mut History) -> Vec<f64> {
        let (first, tokens) = (history.len(), self.tokens(hidden));
        let q = self.queries(hidden, first as u32);
        let (latents, kv) = self.keys_and_values(hidden, token_ids, first as u32);
        history.append(tokens, kv, latents.k_rope);
        let visible: Vec<_> = (0..tokens).map(|t| 0..first + t + 1).collect();
        let heads = self.heads();
        let attended = attention_prefill(&q, &history.kv, &history.k_rope, &visible, heads, self.config.scale());
        self.output(&attended.values, tokens)
    }

    /// The cache rows of tokens from `first_position` on; arguments as in
    /// [`Layer::forward`].
    pub fn latents(&self, hidden: &[f64], token_ids: &[u32], first_position: u32) -> Latents {
        self.keys_and_values(hidden, token_ids, first_position).0
    }

    /// (μ, ρ) of the gate's norm of latents `[tokens, d_latent]` with these ids at site `up_projected`; (0, 1) everywhere else.
    pub fn statistics(&self, latent: &[f64], token_ids: &[u32]) -> Vec<[f64; 2]> {
        self.up_project(latent, token_ids).1
    }

    /// A whole sequence from position 0, as decoding computes it: no keys and values, but queries absorbed into the
    /// latent once per distinct token id (one group for MLA and site `latent`). Equal to [`Layer::forward`].
    pub fn forward_absorbed(&self, hidden: &[f64], token_ids: &[u32]) -> Vec<f64> {
        self.decode_absorbed(hidden, token_ids, &Latents::default(), &[])
    }

    /// New tokens of one sequence behind those that a cache holds, whose ids are `past_ids`: like [`Layer::forward_absorbed`]
    /// of all of them, the new ones' part.
    pub fn decode_absorbed(&self, hidden: &[f64], token_ids: &[u32], past: &Latents, past_ids: &[u32]) -> Vec<f64> {
        let (tokens, first) = (self.tokens(hidden), past.statistics.len());
        let (heads, d_query) = (self.heads(), self.heads().d_query());
        let q = self.queries(hidden, first as u32);
        let latents = past.followed_by(self.latents(hidden, token_ids, first as u32));
        let groups = self.groups(&[past_ids, token_ids].concat(), first + tokens);
        let mut values = Vec::with_capacity(tokens * heads.n_head * heads.d_value);
        for (row, query) in q.chunks_exact(d_query).enumerate() {
            let (token, head) = (row / heads.n_head, row % heads.n_head);
            values.extend(self.absorbed_head(query, head, first + token + 1, &latents, &groups));
        }
        self.output(&values, tokens)
    }

    /// The same, with keys and values rebuilt from what the cache holds: the new tokens' part of [`Layer::forward`].
    pub fn decode_expanded(&self, hidden: &[f64], token_ids: &[u32], past: &Latents, past_ids: &[u32]) -> Vec<f64> {
        let (kv, _) = self.up_project(&past.latent, past_ids);
        let mut history = History { length: past.statistics.len(), kv, k_rope: past.k_rope.clone() };
        self.forward(hidden, token_ids, &mut history)
    }

    /// One query head over the first `rows` cached positions.
    ///
    /// ```text
    /// a[u] = W_Kᵀ (q_C ⊙ γ_K ⊙ g_K[u])
    /// s_j  = scale · ( ρ_j (a[u(j)] · c_j − μ_j Σ(q_C ⊙ γ_K)) + q_C · β_K + q_R · k_R_j )
    /// w_j  = softmax(s)_j · ρ_j
    /// S[u] = Σ_{j in u} w_j c_j
    /// o    = γ_V ⊙ ( Σ_u g_V[u] ⊙ (W_V S[u]) − Σ_j w_j μ_j ) + β_V
    /// ```
    fn absorbed_head(&self, query: &[f64], head: usize, rows: usize, latents: &Latents, groups: &Groups) -> Vec<f64> {
        let (heads, d_latent) = (self.heads(), self.config.d_latent as usize);
        let keys = head * heads.d_kv()..head * heads.d_kv() + heads.d_nope;
        let values = keys.end..keys.end + heads.d_value;
        let weight_row = |n: usize| &self.kv_b_proj[n * d_latent..][..d_latent];
        let latent = |j: usize| &latents.latent[j * d_latent..][..d_latent];
        let k_rope = |j: usize| &latents.k_rope[j * heads.d_rope..][..heads.d_rope];
        let (gamma, beta) = self.affine();
        let (q_nope, q_rope) = query.split_at(heads.d_nope);

        let q_gamma: Vec<f64> = q_nope.iter().zip(&gamma[keys.clone()]).map(|(q, gamma)| q * gamma).collect();
        let absorbed = groups.gates.iter().map(|g| {
            let gated: Vec<f64> = q_gamma.iter().zip(&g[keys.clone()]).map(|(q, g)| q * g).collect();
            weighted_sum(&gated, keys.clone().map(weight_row), d_latent)
        });
        let absorbed: Vec<Vec<f64>> = absorbed.collect();
        let q_gamma_sum: f64 = q_gamma.iter().sum();
        let q_beta = dot(q_nope, &beta[keys.clone()]);
        let score = |j: usize| {
            let [mu, rho] = latents.statistics[j];
            let content = rho * (dot(&absorbed[groups.of[j]], latent(j)) - mu * q_gamma_sum);
            self.config.scale() * (content + q_beta + dot(q_rope, k_rope(j)))
        };
        let scores: Vec<f64> = (0..rows).map(score).collect();
        let (_, weights, sum) = exponentials(&scores, f64::NEG_INFINITY);

        let mut shift = 0.0;
        let mut latent_sums = vec![vec![0.0; d_latent]; groups.gates.len()];
        for (j, weight) in weights.iter().enumerate() {
            let [mu, rho] = latents.statistics[j];
            let w = weight / sum * rho;
            shift += w * mu;
            latent_sums[groups.of[j]].iter_mut().zip(latent(j)).for_each(|(sum, c)| *sum += w * c);
        }
        let output = |n: usize| {
            let gated = groups.gates.iter().zip(&latent_sums).map(|(g, sum)| g[n] * dot(weight_row(n), sum));
            gamma[n] * (gated.sum::<f64>() - shift) + beta[n]
        };
        values.map(output).collect()
    }

    /// The positions by token id and the gate of each id; all in one group with gate 1 where nothing is gated after
    /// the latent.
    fn groups(&self, token_ids: &[u32], tokens: usize) -> Groups {
        let Some(gate) = self.gate.as_ref().filter(|_| self.config.up_projected_gate().is_some()) else {
            return Groups { of: vec![0; tokens], gates: vec![vec![1.0; self.config.d_kv() as usize]] };
        };
        let mut distinct = token_ids.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let of = token_ids.iter().map(|id| distinct.partition_point(|other| other < id)).collect();
        let act = |g: &f64| activate(gate.config.activation, *g);
        let gates = distinct.iter().map(|&id| gate.project(&[id]).iter().map(act).collect()).collect();
        Groups { of, gates }
    }

    /// γ and β `[D]` of the norm at site `up_projected`; 1 and 0 everywhere else.
    fn affine(&self) -> (Vec<f64>, Vec<f64>) {
        let width = self.config.d_kv() as usize;
        let gate = self.gate.as_ref().filter(|_| self.config.up_projected_gate().is_some());
        let weight = gate.and_then(|gate| gate.norm_weight.clone());
        let bias = gate.and_then(|gate| gate.norm_bias.clone());
        (weight.unwrap_or_else(|| vec![1.0; width]), bias.unwrap_or_else(|| vec![0.0; width]))
    }

    /// Rotated queries `[tokens, n_head, d_nope + d_rope]`.
    fn queries(&self, hidden: &[f64], first_position: u32) -> Vec<f64> {
        let (heads, tokens, width) = (self.heads(), self.tokens(hidden), self.config.hidden_size as usize);
        let d_q = heads.n_head * heads.d_query();
        let mut q = match &self.query {
            Query::Full { proj, bias } => matmul(hidden, proj, bias.as_deref(), tokens, width, d_q),
            Query::LowRank { rank, a_proj, a_bias, a_norm, b_proj } => {
                let latent = matmul(hidden, a_proj, a_bias.as_deref(), tokens, width, *rank);
                let latent = rms_norm(&latent, Some(a_norm), *rank, self.config.low_rank_norm_eps);
                matmul(&latent, b_proj, None, tokens, *rank, d_q)
            }
        };
        self.rotate(&mut q, first_position, heads.n_head, heads.d_query());
        scale_queries(&self.config.rope, &mut q, first_position, d_q);
        q
    }

    /// Cache rows of the tokens, and their keys and values `[tokens, n_head, d_nope + d_value]`.
    fn keys_and_values(&self, hidden: &[f64], token_ids: &[u32], first_position: u32) -> (Latents, Vec<f64>) {
        let (heads, tokens, width) = (self.heads(), self.tokens(hidden), self.config.hidden_size as usize);
        let d_latent = self.config.d_latent as usize;
        let d_kv_a = d_latent + heads.d_rope;
        let kv_a = matmul(hidden, &self.kv_a_proj, self.kv_a_bias.as_deref(), tokens, width, d_kv_a);
        let mut latent: Vec<f64> = kv_a.chunks_exact(d_kv_a).flat_map(|row| &row[..d_latent]).copied().collect();
        let mut k_rope: Vec<f64> = kv_a.chunks_exact(d_kv_a).flat_map(|row| &row[d_latent..]).copied().collect();
        if let Some(weight) = &self.kv_a_norm {
            latent = rms_norm(&latent, Some(weight), d_latent, self.config.low_rank_norm_eps);
            latent.iter_mut().for_each(|element| *element *= self.config.latent_factor);
        }
        self.rotate(&mut k_rope, first_position, 1, heads.d_rope);
        if let Some(gate) = self.gate.as_ref().filter(|_| self.config.latent_gate().is_some()) {
            latent = gate.apply(&latent, token_ids).values;
        }
        if self.cache == Storage::F16 {
            let round = |value: &mut f64| *value = f16::from_f64(*value).to_f64();
            latent.iter_mut().for_each(round);
            k_rope.iter_mut().for_each(round);
        }
        let (kv, statistics) = self.up_project(&latent, token_ids);
        (Latents { latent, k_rope, statistics }, kv)
    }

    /// Keys and values `[tokens, n_head, d_nope + d_value]` of cached latents `[tokens, d_latent]`, and the statistics of their
    /// norm.
    fn up_project(&self, latent: &[f64], token_ids: &[u32]) -> (Vec<f64>, Vec<[f64; 2]>) {
        let (d_latent, d_kv) = (self.config.d_latent as usize, self.config.d_kv() as usize);
        let tokens = latent.len() / d_latent;
        let kv = matmul(latent, &self.kv_b_proj, None, tokens, d_latent, d_kv);
        match self.gate.as_ref().filter(|_| self.config.up_projected_gate().is_some()) {
            None => (kv, vec![[0.0, 1.0]; tokens]),
            Some(gate) => {
                let Gated { values, statistics } = gate.apply(&kv, token_ids);
                (values, statistics)
            }
        }
    }

    /// RoPE on the last `d_rope` of each head; the first token is at `first_position`.
    fn rotate(&self, values: &mut [f64], first_position: u32, n_head: usize, d_head: usize) {
        let d_rope = self.config.d_rope as usize;
        let tokens = values.len() / (n_head * d_head).max(1);
        let positions: Vec<u32> = (first_position..).take(tokens).collect();
        let rotations = rotations(&self.config.rope, d_rope, &positions);
        rope(values, &rotations, n_head, d_head, d_rope, self.config.rope.interleave);
    }

    /// `o_proj` of the attended values `[tokens, n_head, d_value]`.
    fn output(&self, values: &[f64], tokens: usize) -> Vec<f64> {
        let d_values = (self.config.n_head * self.config.d_value) as usize;
        matmul(values, &self.o_proj, self.o_bias.as_deref(), tokens, d_values, self.config.hidden_size as usize)
    }

    fn tokens(&self, hidden: &[f64]) -> usize {
        hidden.len() / self.config.hidden_size as usize
    }

    fn heads(&self) -> Heads {
        Heads {
            n_head: self.config.n_head as usize,
            n_kv_head: self.config.n_head as usize,
            d_nope: self.config.d_nope as usize,
            d_rope: self.config.d_rope as usize,
            d_value: self.config.d_value as usize,
        }
    }
}

impl Gate {
    /// `gate_b_proj · e`, before the activation: `[tokens, width]`. e is a row of the table; of a tied gate the normed token embedding.
    fn project(&self, token_ids: &[u32]) -> Vec<f64> {
        let d_gate = self.config.d_gate as usize;
        let mut rows = gather(&self.embedding, d_gate, token_ids);
        if self.config.tied {
            rows = rms_norm(&rows, None, d_gate, TIED_NORM_EPS);
        }
        matmul(&rows, &self.b_proj, None, token_ids.len(), d_gate, self.b_proj.len() / d_gate)
    }

    /// `Norm(x ⊙ g)` for `x` `[tokens, width]`.
    fn apply(&self, x: &[f64], token_ids: &[u32]) -> Gated {
        let GateConfig { activation, norm, norm_eps, d_gate, .. } = self.config;
        let (weight, bias) = (self.norm_weight.as_deref(), self.norm_bias.as_deref());
        let width = self.b_proj.len() / d_gate as usize;
        gate(x, &self.project(token_ids), activation, norm, weight, bias, width, norm_eps)
    }
}
