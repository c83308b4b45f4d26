//! One attention layer in f32 on the CPU, as [`reference::Layer`](crate::reference::Layer) defines it.

use std::sync::Arc;

use super::product::{Attending, Linear, Rows, for_each_part, panel_bytes, share};
use super::{optional, rms_norm};
use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm, RopeConfig, TIED_NORM_EPS};
use crate::error::Result;
use crate::reference::{Heads, rotations};
use crate::weights::{AttentionWeights, QueryWeights};

/// Queries of a head that attend together: their scores against the whole past are in memory at once.
const BLOCK: usize = 64;

/// Most tokens that attend to latents at once, all heads of them together.
const ABSORBED: usize = 8;

/// One attention layer, MLA or EG-MLA, in f32.
#[derive(Debug)]
pub struct NativeLayer {
    config: AttentionConfig,
    query: Query,
    kv_a: Linear,
    kv_a_norm: Option<Vec<f32>>,
    kv_b: Linear,
    o: Linear,
    gate: Option<Gate>,
}

#[derive(Debug)]
enum Query {
    Full(Linear),
    LowRank { a: Linear, a_norm: Vec<f32>, b: Linear },
}

#[derive(Debug)]
struct Gate {
    config: GateConfig,
    /// `[vocab, d_gate]`; of a tied gate the token embedding as it is in the checkpoint.
    embedding: Arc<Linear>,
    b: Linear,
    norm_weight: Option<Vec<f32>>,
    norm_bias: Option<Vec<f32>>,
}

/// What a layer keeps of one sequence: latents, or with a gate at `up_projected` gated keys and values, and rotary keys; or the keys
/// and values of a [`NativeGqaLayer`](super::NativeGqaLayer).
#[derive(Debug, Clone, PartialEq)]
pub struct NativeHistory {
    length: usize,
    /// `[len, d_latent]` or `[len, n_kv_head, d_nope + d_value]`
    rows: Vec<f32>,
    /// `[len, d_rope]`
    k_rope: Vec<f32>,
}

impl NativeHistory {
    /// Empty, with room for tokens of such rows.
    pub(super) fn with_room(capacity: usize, row: usize, d_rope: usize) -> Self {
        let room = |width: usize| Vec::with_capacity(capacity.saturating_mul(width));
        NativeHistory { length: 0, rows: room(row), k_rope: room(d_rope) }
    }

    pub(super) fn append(&mut self, tokens: usize, rows: &[f32], k_rope: &[f32]) {
        self.length += tokens;
        self.rows.extend_from_slice(rows);
        self.k_rope.extend_from_slice(k_rope);
    }

    pub(super) fn rows(&self) -> &[f32] {
        &self.rows
    }

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
            self.rows.truncate(self.rows.len() / self.length * length);
            self.k_rope.truncate(self.k_rope.len() / self.length * length);
            self.length = length;
        }
    }
}

/// Whether `tokens` new tokens attend to latents with fewer multiply-adds for each cached one than to keys and values, which must be
/// made of the latents first.
fn absorbs(heads: Heads, d_latent: usize, tokens: usize) -> bool {
    let expanded = heads.d_kv() * d_latent + tokens * (heads.d_query() + heads.d_value);
    tokens <= ABSORBED && tokens * (2 * d_latent + heads.d_rope) < expanded
}

impl NativeLayer {
    /// Takes the weights, those of a tied gate with the model's token embedding.
    ///
    /// # Errors
    /// As [`AttentionWeights::check`].
    pub fn new(config: &AttentionConfig, mut weights: AttentionWeights) -> Result<Self> {
        weights.check(config)?;
        let embedding = weights.gate.as_mut().and_then(|gate| gate.embedding.take());
        Ok(Self::of(config, weights, embedding.map(|own| Arc::new(Linear::new(own, None)))))
    }

    /// The same with the token embedding of its model, `[vocab, hidden]`, for a tied gate; the weights are without one.
    pub(super) fn with_embedding(
        config: &AttentionConfig,
        weights: AttentionWeights,
        embedding: &Arc<Linear>,
    ) -> Result<Self> {
        weights.check_own(config)?;
        Ok(Self::of(config, weights, Some(Arc::clone(embedding))))
    }

    /// The weights have been checked: with a gate there is an embedding.
    fn of(config: &AttentionConfig, weights: AttentionWeights, embedding: Option<Arc<Linear>>) -> Self {
        let query = match weights.query {
            QueryWeights::Full { proj, bias } => Query::Full(Linear::new(proj, bias)),
            QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => {
                let (a, b) = (Linear::new(a_proj, a_bias), Linear::new(b_proj, None));
                Query::LowRank { a, a_norm: a_norm.data, b }
            }
        };
        let gate = config.gate.clone().zip(weights.gate).zip(embedding);
        let gate = gate.map(|((config, weights), embedding)| Gate {
            config,
            embedding,
            b: Linear::new(weights.b_proj, None),
            norm_weight: optional(weights.norm_weight),
            norm_bias: optional(weights.norm_bias),
        });
        NativeLayer {
            config: config.clone(),
            query,
            kv_a: Linear::new(weights.kv_a_proj, weights.kv_a_bias),
            kv_a_norm: optional(weights.kv_a_norm),
            kv_b: Linear::new(weights.kv_b_proj, None),
            o: Linear::new(weights.o_proj, weights.o_bias),
            gate,
        }
    }

    /// Most bytes of what is kept of `cached` tokens, and of computing the last `new` of them at once.
    pub fn bytes(config: &AttentionConfig, cached: u64, new: u64) -> u64 {
        let heads = heads_of(config);
        let (d_latent, all_kv) = (u64::from(config.d_latent), u64::from(config.d_kv()));
        let wide = |width: usize| width as u64;
        let kept = match config.up_projected_gate() {
            Some(_) => all_kv + wide(heads.d_rope),
            None => d_latent + wide(heads.d_rope),
        };
        let low = 3 * (d_latent + wide(heads.d_rope)) + 2 * u64::from(config.d_q_latent.unwrap_or(0));
        let gates = config.gate.as_ref().map_or(0, |gate| u64::from(gate.d_gate) + u64::from(config.gated_width()));
        // Of a new token: what came in and goes out, queries, absorbed ones and their latents, values, keys and values, gates.
        let of_heads =
            (2 * (wide(heads.d_query()) + d_latent + wide(heads.d_value))).saturating_mul(wide(heads.n_head));
        let computed = 2 * u64::from(config.hidden_size) + of_heads + low + 2 * all_kv + gates;
        // Keys and values of the past, where they are made of latents.
        let scores = scores(new, wide(heads.n_head));
        let all = cached.max(new);
        let past = if new == 0 || config.up_projected_gate().is_some() { 0 } else { all_kv };
        let of_past = all.saturating_mul(scores + past);
        let (low, gate) = (config.d_q_latent.unwrap_or(0), config.gate.as_ref().map_or(0, |gate| gate.d_gate));
        let values = wide(heads.n_head * heads.d_value);
        let widest = u64::from(config.hidden_size.max(config.d_latent).max(low).max(gate)).max(values);
        let panels = if new == 0 { 0 } else { panel_bytes(widest) };
        let elements = all.saturating_mul(kept).saturating_add(new.saturating_mul(computed)).saturating_add(of_past);
        elements.saturating_mul(4).saturating_add(panels)
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// What is kept of an empty sequence, with room for `capacity` tokens; it grows where there are more.
    pub fn history(&self, capacity: usize) -> NativeHistory {
        let AttentionConfig { d_latent, d_rope, .. } = self.config;
        let row = if self.config.up_projected_gate().is_some() { self.config.d_kv() } else { d_latent };
        NativeHistory::with_room(capacity, row as usize, d_rope as usize)
    }

    /// New tokens of one sequence behind those of `history`, which was made by this layer: each attends to the history, to the
    /// new tokens before it and to itself. `history` keeps them.
    ///
    /// `hidden` `[tokens, hidden]`, `token_ids` `[tokens]`, below the gate's vocabulary (not looked at without a gate); returns
    /// `[tokens, hidden]`.
    pub fn forward(&self, hidden: &[f32], token_ids: &[u32], history: &mut NativeHistory) -> Vec<f32> {
        let tokens = hidden.len() / self.config.hidden_size as usize;
        let turns = turns(&self.config.rope, self.config.d_rope, history.len(), tokens);
        self.forward_turned(hidden, token_ids, &turns, history)
    }

    pub(super) fn forward_turned(
        &self,
        hidden: &[f32],
        token_ids: &[u32],
        turns: &[[f32; 2]],
        history: &mut NativeHistory,
    ) -> Vec<f32> {
        let heads = heads_of(&self.config);
        let tokens = hidden.len() / self.config.hidden_size as usize;
        let q = self.queries(hidden, turns, history.len());
        self.keep(hidden, token_ids, turns, history);
        let attended = if self.config.up_projected_gate().is_some() {
            expanded(&q, &history.rows, &history.k_rope, heads, tokens)
        } else if absorbs(heads, self.config.d_latent as usize, tokens) {
            self.absorbed(&q, history, tokens)
        } else {
            expanded(&q, &self.kv_b.apply(&history.rows), &history.k_rope, heads, tokens)
        };
        self.o.apply(&attended)
    }

    /// Rotated queries, times the scale of the scores: `[tokens, n_head, d_nope + d_rope]`; the first is at position `first`.
    fn queries(&self, hidden: &[f32], turns: &[[f32; 2]], first: usize) -> Vec<f32> {
        let heads = heads_of(&self.config);
        let mut q = match &self.query {
            Query::Full(proj) => proj.apply(hidden),
            Query::LowRank { a, a_norm, b } => {
                let mut latent = a.apply(hidden);
                rms_norm(&mut latent, Some(a_norm), a.cols(), self.config.low_rank_norm_eps);
                b.apply(&latent)
            }
        };
        rotate(&mut q, turns, (heads.n_head, heads.d_query()), heads.d_rope, self.config.rope.interleave);
        scale(&mut q, self.config.scale(), &self.config.rope, first, heads.n_head * heads.d_query());
        q
    }

    /// Adds the rows of new tokens.
    fn keep(&self, hidden: &[f32], token_ids: &[u32], turns: &[[f32; 2]], history: &mut NativeHistory) {
        let (d_latent, d_rope) = (self.config.d_latent as usize, self.config.d_rope as usize);
        let kv_a = self.kv_a.apply(hidden);
        let mut latent = Vec::with_capacity(kv_a.len());
        let mut k_rope = Vec::with_capacity(turns.len() * 2);
        for row in kv_a.chunks_exact(d_latent + d_rope) {
            latent.extend_from_slice(&row[..d_latent]);
            k_rope.extend_from_slice(&row[d_latent..]);
        }
        if self.kv_a_norm.is_some() {
            rms_norm(&mut latent, self.kv_a_norm.as_deref(), d_latent, self.config.low_rank_norm_eps);
            let factor = self.config.latent_factor as f32;
            latent.iter_mut().for_each(|element| *element *= factor);
        }
        rotate(&mut k_rope, turns, (1, d_rope), d_rope, self.config.rope.interleave);
        let up_projected = self.config.up_projected_gate().is_some();
        let mut rows = if up_projected { self.kv_b.apply(&latent) } else { latent };
        if let Some(gate) = &self.gate {
            gate.apply(&mut rows, token_ids);
        }
        history.append(kv_a.len() / (d_latent + d_rope), &rows, &k_rope);
    }

    /// The same over the latents themselves: queries carry the key rows of `kv_b_proj`, value rows come after the sum.
    fn absorbed(&self, q: &[f32], history: &NativeHistory, tokens: usize) -> Vec<f32> {
        let heads = heads_of(&self.config);
        let Heads { n_head, d_nope, d_rope, d_value, .. } = heads;
        let d_latent = self.config.d_latent as usize;
        let first = history.len() - tokens;
        let mut attended = vec![0.0; n_head * tokens * d_value];
        let of_head = tokens * (history.len() * (2 * d_latent + d_rope) + d_latent * heads.d_kv());
        let part = share(n_head, n_head * of_head);
        let latents = Rows::strided(&history.rows, history.len(), d_latent, d_latent);
        let k_rope = Rows::strided(&history.k_rope, history.len(), d_rope, d_rope);
        for_each_part(&mut attended, part * tokens * d_value, n_head * of_head, |number, out| {
            let (count, of_first) = (out.len() / (tokens * d_value), number * part);
            let query = |token: usize, head: usize| {
                q[(token * n_head + of_first + head) * heads.d_query()..][..heads.d_query()].split_at(d_nope)
            };
            // All heads of a token come before the next: they see the same rows.
            let mut absorbed = vec![0.0; tokens * count * d_latent];
            let mut q_rope = Vec::with_capacity(tokens * count * d_rope);
            for (row, absorbed) in absorbed.chunks_exact_mut(d_latent).enumerate() {
                let (q_nope, rotary) = query(row / count, row % count);
                self.kv_b.add_weighted(q_nope, (of_first + row % count) * heads.d_kv(), absorbed);
                q_rope.extend_from_slice(rotary);
            }
            let queries = tokens * count;
            let mut sums = vec![0.0; queries * d_latent];
            let q = Rows::strided(&absorbed, queries, d_latent, d_latent);
            let q_rope = Rows::strided(&q_rope, queries, d_rope, d_rope);
            Attending { q, q_rope, keys: latents, k_rope, values: latents }
                .attend(|i| first + i / count + 1, &mut sums);
            for (row, out) in out.chunks_exact_mut(d_value).enumerate() {
                let (head, token) = (row / tokens, row % tokens);
                let sums = &sums[(token * count + head) * d_latent..][..d_latent];
                self.kv_b.add_dot_products(sums, (of_first + head) * heads.d_kv() + d_nope, out);
            }
        });
        by_token(&attended, (n_head, tokens, d_value))
    }
}

/// Scores for each cached token that are in memory at once.
pub(super) fn scores(new: u64, n_head: u64) -> u64 {
    // Every thread has a block, or all heads are absorbed.
    let of_blocks = (rayon::current_num_threads() as u64).min(n_head) * new.min(BLOCK as u64);
    of_blocks.max(n_head.saturating_mul(new.min(ABSORBED as u64)))
}

/// Attention of the last `tokens` of the kept ones over keys and values `[len, n_kv_head, d_nope + d_value]` and rotary keys
/// `[len, d_rope]`. `q` `[tokens, n_head, d_nope + d_rope]` are times the scale of the scores; returns `[tokens, n_head, d_value]`.
pub(super) fn expanded(q: &[f32], kv: &[f32], k_rope: &[f32], heads: Heads, tokens: usize) -> Vec<f32> {
    let Heads { n_head, n_kv_head, d_nope, d_rope, d_value } = heads;
    let (kv_row, group) = (n_kv_head * heads.d_kv(), n_head / n_kv_head);
    let length = kv.len() / kv_row;
    let first = length - tokens;
    let attend = |(kv_head, end): (usize, usize), (q, q_rope), visible: &dyn Fn(usize) -> usize, out: &mut [f32]| {
        let of_head =
            |from: usize, width: usize| Rows::strided(&kv[kv_head * heads.d_kv() + from..], end, width, kv_row);
        let k_rope = Rows::strided(k_rope, end, d_rope, d_rope);
        let (keys, values) = (of_head(0, d_nope), of_head(d_nope, d_value));
        Attending { q, q_rope, keys, k_rope, values }.attend(visible, out);
    };
    // The content part and the rotary part of some queries.
    let queries = |first: usize, count: usize, stride: usize| {
        let part = |from: usize, width: usize| Rows::strided(&q[first + from..], count, width, stride);
        (part(0, d_nope), part(d_nope, d_rope))
    };
    let of_head = tokens * length * (heads.d_query() + d_value);
    let mut attended = vec![0.0; n_head * tokens * d_value];
    // By head, then by token: a part is one head's, or that of the heads that share keys and values.
    if tokens == 1 {
        for_each_part(&mut attended, group * d_value, n_head * of_head, |kv_head, out| {
            let q = queries(kv_head * group * heads.d_query(), group, heads.d_query());
            attend((kv_head, length), q, &|_| length, out);
        });
        return attended;
    }
    for_each_part(&mut attended, tokens * d_value, n_head * of_head, |head, out| {
        for_each_part(out, BLOCK * d_value, of_head, |block, out| {
            let (block, count) = (block * BLOCK, out.len() / d_value);
            let q = queries((block * n_head + head) * heads.d_query(), count, n_head * heads.d_query());
            attend((head / group, first + block + count), q, &|i| first + block + i + 1, out);
        });
    });
    by_token(&attended, (n_head, tokens, d_value))
}

/// `[n_head, tokens, width]` as `[tokens, n_head, width]`.
fn by_token(values: &[f32], (n_head, tokens, width): (usize, usize, usize)) -> Vec<f32> {
    let rows = (0..tokens * n_head).map(|row| (row % n_head) * tokens + row / n_head);
    rows.flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// cos and sin of the positions `first..first + tokens`: `[tokens, d_rope / 2]`.
pub(super) fn turns(rope: &RopeConfig, d_rope: u32, first: usize, tokens: usize) -> Vec<[f32; 2]> {
    let positions: Vec<u32> = (first as u32..).take(tokens).collect();
    let turns = rotations(rope, d_rope as usize, &positions);
    turns.into_iter().map(|turn| turn.map(|value| value as f32)).collect()
}

/// Head count and widths.
fn heads_of(config: &AttentionConfig) -> Heads {
    let AttentionConfig { n_head, d_nope, d_rope, d_value, .. } = *config;
    let [n_head, d_nope, d_rope, d_value] = [n_head, d_nope, d_rope, d_value].map(|width| width as usize);
    Heads { n_head, n_kv_head: n_head, d_nope, d_rope, d_value }
}

/// Multiplies queries `[tokens, row]` by the scale of the scores and by the factor of their position, from `first` on.
pub(super) fn scale(q: &mut [f32], by: f64, rope: &RopeConfig, first: usize, row: usize) {
    for (q, position) in q.chunks_exact_mut(row).zip(first as u32..) {
        let factor = (by * rope.query_factor(position)) as f32;
        q.iter_mut().for_each(|q| *q *= factor);
    }
}

/// RoPE on the last `d_rope` of each head `[tokens, n_head, d_head]`.
pub(super) fn rotate(
    values: &mut [f32],
    turns: &[[f32; 2]],
    (n_head, d_head): (usize, usize),
    d_rope: usize,
    interleave: bool,
) {
    let pairs = d_rope / 2;
    if pairs == 0 {
        return;
    }
    for (token, turns) in values.chunks_exact_mut(n_head * d_head).zip(turns.chunks_exact(pairs)) {
        for head in token.chunks_exact_mut(d_head) {
            let part = &mut head[d_head - d_rope..];
            for (i, [cos, sin]) in turns.iter().enumerate() {
                let (first, second) = if interleave { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                let (x, y) = (part[first], part[second]);
                part[first] = x * cos - y * sin;
                part[second] = x * sin + y * cos;
            }
        }
    }
}

impl Gate {
    /// `x ← Norm(x ⊙ act(gate_b_proj · e))`, `[tokens, width]`. e is a row of the table; of a tied gate the normed token embedding.
    fn apply(&self, x: &mut [f32], token_ids: &[u32]) {
        let activation = self.config.activation;
        let mut rows = self.embedding.gather(token_ids);
        if self.config.tied {
            rms_norm(&mut rows, None, self.config.d_gate as usize, TIED_NORM_EPS);
        }
        x.iter_mut().zip(self.b.apply(&rows)).for_each(|(x, g)| *x *= activate(activation, g));
        let weight = self.norm_weight.as_deref();
        match self.config.norm {
            GateNorm::None => {}
            GateNorm::RmsNorm => rms_norm(x, weight, self.b.cols(), self.config.norm_eps),
            GateNorm::LayerNorm => {
                for row in x.chunks_exact_mut(self.b.cols()) {
                    let mean =
                        |of: &dyn Fn(f64) -> f64| row.iter().map(|&x| of(f64::from(x))).sum::<f64>() / row.len() as f64;
                    let mu = mean(&|x| x);
                    let rho = 1.0 / (mean(&|x| (x - mu).powi(2)) + self.config.norm_eps).sqrt();
                    for (i, x) in row.iter_mut().enumerate() {
                        let normed = (*x - mu as f32) * rho as f32;
                        let scaled = normed * weight.map_or(1.0, |weight| weight[i]);
                        *x = scaled + self.norm_bias.as_ref().map_or(0.0, |bias| bias[i]);
                    }
                }
            }
        }
    }
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Identity => x,
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::OnePlus => 1.0 + x,
    }
}
