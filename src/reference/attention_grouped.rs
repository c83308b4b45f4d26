//! Attention over the latent cache with a gate per token id between latent and key: one absorbed query per id.

use super::attention_absorbed::unit_of_halves;
use super::attention_prefill::{exponentials, weighted_sum};
use super::matmul::dot;
use super::{Heads, Partial};

/// Cache and weights for [`attention_grouped`].
#[derive(Debug, Clone, Copy)]
pub struct Grouped<'a> {
    /// Rotated queries `[tokens, n_head, d_nope + d_rope]`.
    pub q: &'a [f64],
    /// `[n_head, d_nope + d_value, d_latent]`.
    pub kv_b_proj: &'a [f64],
    /// γ `[n_head, d_nope + d_value]`.
    pub gamma: &'a [f64],
    /// β `[n_head, d_nope + d_value]`.
    pub beta: &'a [f64],
    /// Activated gate rows `[gate rows, n_head, d_nope + d_value]`.
    pub gates: &'a [f64],
    /// `[rows, d_latent]`.
    pub latent: &'a [f64],
    /// `[rows, d_rope]`.
    pub k_rope: &'a [f64],
    /// (μ, ρ) `[rows]`.
    pub statistics: &'a [[f64; 2]],
}

/// Groups and positions of one partial result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupedItem {
    /// The query token.
    pub token: usize,
    /// Groups: a gate row, and the rows that hold its id.
    pub groups: Vec<(usize, Vec<usize>)>,
}

/// ```text
/// a[u] = W_Kᵀ (scale · q_C ⊙ γ_K ⊙ g_K[u])
/// s_j  = ρ_j (a[u(j)] · c_j − μ_j · scale · Σ(q_C ⊙ γ_K)) + scale · q_R · k_R_j
/// S[u] = Σ_{j in u} e^(s_j − max) ρ_j c_j
/// o    = γ_V ⊙ ( Σ_u g_V[u] ⊙ (W_V S[u]) − Σ_j e^(s_j − max) ρ_j μ_j ) + β_V Σ_j e^(s_j − max)
/// ```
///
/// over the positions of each item. `q_C · β_K`, the same for every position, is left out of the scores.
pub fn attention_grouped(
    input: &Grouped<'_>,
    items: &[GroupedItem],
    heads: Heads,
    d_latent: usize,
    scale: f64,
) -> Partial {
    attend(input, items, heads, d_latent, scale, |_| {})
}

/// [`attention_grouped`](attention_grouped()) of queries that are rounded to f16: gated ones, absorbed ones and rotary ones, each in
/// units of the power of two below its largest element. Weights of positions and sums of latents are not rounded here.
pub fn attention_grouped_of_halves(
    input: &Grouped<'_>,
    items: &[GroupedItem],
    heads: Heads,
    d_latent: usize,
    scale: f64,
) -> Partial {
    attend(input, items, heads, d_latent, scale, |row| {
        let unit = unit_of_halves(row.iter());
        row.iter_mut().for_each(|value| *value = half::f16::from_f64(*value / unit).to_f64() * unit);
    })
}

/// [`attention_grouped`](attention_grouped()) whose queries are `rounded`.
fn attend(
    input: &Grouped<'_>,
    items: &[GroupedItem],
    heads: Heads,
    d_latent: usize,
    scale: f64,
    rounded: impl Fn(&mut [f64]),
) -> Partial {
    let d_kv = heads.n_head * heads.d_kv();
    let mut partial = Partial { values: Vec::new(), max: Vec::new(), sum: Vec::new() };
    for GroupedItem { token, groups } in items {
        for head in 0..heads.n_head {
            let keys = head * heads.d_kv()..head * heads.d_kv() + heads.d_nope;
            let values = keys.end..keys.end + heads.d_value;
            let weight_row = |n: usize| &input.kv_b_proj[n * d_latent..][..d_latent];
            let latent = |row: usize| &input.latent[row * d_latent..][..d_latent];
            let query = &input.q[(token * heads.n_head + head) * heads.d_query()..][..heads.d_query()];
            let (q_nope, q_rope) = query.split_at(heads.d_nope);
            let gamma = &input.gamma[keys.clone()];
            let q_gamma: Vec<f64> = q_nope.iter().zip(gamma).map(|(q, gamma)| scale * q * gamma).collect();
            let mut q_rope = q_rope.to_vec();
            rounded(&mut q_rope);
            let mut scores = Vec::new();
            for (gate_row, rows) in groups {
                let gate = &input.gates[gate_row * d_kv..][..d_kv];
                let mut gated: Vec<f64> = q_gamma.iter().zip(&gate[keys.clone()]).map(|(q, g)| q * g).collect();
                rounded(&mut gated);
                let mut absorbed = weighted_sum(&gated, keys.clone().map(weight_row), d_latent);
                rounded(&mut absorbed);
                scores.extend(rows.iter().map(|&row| {
                    let [mu, rho] = input.statistics[row];
                    let content = rho * (dot(&absorbed, latent(row)) - mu * q_gamma.iter().sum::<f64>());
                    content + scale * dot(&q_rope, &input.k_rope[row * heads.d_rope..][..heads.d_rope])
                }));
            }
            let (max, weights, sum) = exponentials(&scores, f64::from(f32::MIN));
            let mut output = vec![0.0; heads.d_value];
            let mut next = weights.iter();
            for (gate_row, rows) in groups {
                let mut latents = vec![0.0; d_latent];
                for (&row, weight) in rows.iter().zip(next.by_ref()) {
                    let [mu, rho] = input.statistics[row];
                    latents.iter_mut().zip(latent(row)).for_each(|(sum, c)| *sum += weight * rho * c);
                    output.iter_mut().for_each(|o| *o -= weight * rho * mu);
                }
                for (o, n) in output.iter_mut().zip(values.clone()) {
                    *o += input.gates[gate_row * d_kv + n] * dot(weight_row(n), &latents);
                }
            }
            partial.values.extend(output.iter().zip(values).map(|(o, n)| input.gamma[n] * o + input.beta[n] * sum));
            partial.max.push(max);
            partial.sum.push(sum);
        }
    }
    partial
}
