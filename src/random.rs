//! Seeded random values: the same on every machine.

use crate::config::{AttentionConfig, GqaConfig};
use crate::error::Result;
use crate::weights::{AttentionWeights, GqaWeights, HostTensor};

/// A seeded generator.
#[derive(Debug, Clone)]
pub struct Random(fastrand::Rng);

impl Random {
    /// Equal seeds give equal values.
    pub fn new(seed: u64) -> Self {
        Random(fastrand::Rng::with_seed(seed))
    }

    /// One value of mean 0 and deviation 1.
    pub fn normal(&mut self) -> f32 {
        // Box and Muller; 1 − u is never 0.
        let radius = (-2.0 * (1.0 - self.0.f64()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.0.f64()).cos()) as f32
    }

    /// One value in [0, 1).
    pub fn unit(&mut self) -> f64 {
        self.0.f64()
    }

    /// `n` values of mean 0.
    pub fn values(&mut self, n: usize, deviation: f32) -> Vec<f32> {
        (0..n).map(|_| deviation * self.normal()).collect()
    }

    /// `n` ids below `vocab`, which is at least 1.
    pub fn ids(&mut self, n: usize, vocab: u32) -> Vec<u32> {
        (0..n).map(|_| self.0.u32(0..vocab)).collect()
    }
}

/// A tensor that keeps activations of order 1, by its name.
fn tensor(random: &mut Random, name: &str, shape: &[u32]) -> HostTensor {
    let shape: Vec<usize> = shape.iter().map(|&extent| extent as usize).collect();
    let elements = shape.iter().product();
    let data = match name {
        _ if name.ends_with("norm.weight") => random.values(elements, 0.1).iter().map(|x| 1.0 + x).collect(),
        _ if name.ends_with(".bias") => random.values(elements, 0.1),
        "gate_embedding.weight" => random.values(elements, 1.0),
        _ => random.values(elements, (shape.last().copied().unwrap_or(1) as f32).sqrt().recip()),
    };
    HostTensor { name: name.to_owned(), shape, data }
}

/// Weights for `config` that keep activations of order 1: matrices of deviation `1/√inner`, norm weights near 1,
/// biases near 0, gate rows of deviation 1; those of a tied gate are normed. `kv_a_norm`: whether there is a `kv_a_layernorm`.
///
/// # Errors
/// A configuration that contradicts itself or overflows.
pub fn attention_weights(config: &AttentionConfig, kv_a_norm: bool, seed: u64) -> Result<AttentionWeights> {
    config.validate()?;
    let mut random = Random::new(seed);
    let mut make = |name: &str, shape: &[u32]| Ok(tensor(&mut random, name, shape));
    AttentionWeights::build(config, kv_a_norm, &mut make)?.with_token_embedding(config, &mut make)
}

/// The same for a layer with keys and values per head.
///
/// # Errors
/// A configuration that contradicts itself or overflows.
pub fn gqa_weights(config: &GqaConfig, seed: u64) -> Result<GqaWeights> {
    config.validate()?;
    let mut random = Random::new(seed);
    GqaWeights::build(config, |name, shape| Ok(tensor(&mut random, name, shape)))
}
