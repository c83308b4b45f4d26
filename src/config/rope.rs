//! Rotary position embedding: frequencies, YaRN and linear scaling, and how checkpoints spell them.

use serde::Serialize;

use super::keys::Keys;
use crate::error::{Error, Result};

/// Context extension: scaling of positions beyond the length of the training.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071) as DeepSeek checkpoints mean it.
    Yarn {
        /// Context extension.
        factor: f64,
        /// L, the length of the original training.
        original_max_position_embeddings: f64,
        /// Rotations over L above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over L below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Numerator of the factor on cos and sin.
        mscale: Option<f64>,
        /// Its denominator; also scales the scores.
        mscale_all_dim: Option<f64>,
        /// Factor on cos and sin where the two above are not both given.
        attention_factor: Option<f64>,
    },
}

/// Rotary position embedding of the `d_rope` part of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RopeConfig {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Pairs are (2i, 2i+1) when true (DeepSeek), (i, i + d_rope/2) when false.
    pub interleave: bool,
    /// Context extension.
    pub scaling: RopeScaling,
}

impl Default for RopeConfig {
    fn default() -> Self {
        RopeConfig { theta: 10000.0, interleave: true, scaling: RopeScaling::None }
    }
}

/// `m(x) = 0.1 · x · ln(factor) + 1`, 1 when `factor` ≤ 1.
fn yarn_mscale(factor: f64, x: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * x * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// Angle per position of each of the `d_rope / 2` pairs, in radians.
    pub fn frequencies(&self, d_rope: u32) -> Vec<f64> {
        let d = f64::from(d_rope);
        let base = |i: u32| self.theta.powf(-2.0 * f64::from(i) / d);
        match self.scaling {
            RopeScaling::None => (0..d_rope / 2).map(base).collect(),
            RopeScaling::Linear { factor } => (0..d_rope / 2).map(|i| base(i) / factor).collect(),
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, .. } => {
                let correction = |rotations: f64| {
                    d * (original_max_position_embeddings / (2.0 * std::f64::consts::PI * rotations)).ln()
                        / (2.0 * self.theta.ln())
                };
                let low = correction(beta_fast).floor().max(0.0);
                let mut high = correction(beta_slow).ceil().min(d - 1.0);
                if high == low {
                    high += 0.001;
                }
                (0..d_rope / 2)
                    .map(|i| {
                        let ramp = ((f64::from(i) - low) / (high - low)).clamp(0.0, 1.0);
                        base(i) * (1.0 - ramp) + base(i) / factor * ramp
                    })
                    .collect()
            }
        }
    }

    /// Factor on cos and sin (YaRN; 1 otherwise).
    pub fn amplitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, mscale: Some(mscale), mscale_all_dim: Some(all_dim), .. } => {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
            }
            RopeScaling::Yarn { attention_factor: Some(attention_factor), .. } => attention_factor,
            RopeScaling::Yarn { factor, .. } => yarn_mscale(factor, 1.0),
            _ => 1.0,
        }
    }

    /// Factor on the scores: `mscale²` when YaRN scaling carries `mscale_all_dim`, 1 otherwise.
    pub fn score_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, mscale_all_dim: Some(all_dim), .. } => yarn_mscale(factor, all_dim).powi(2),
            _ => 1.0,
        }
    }
}

pub(super) fn rope_from_map(keys: &Keys<'_>) -> Result<RopeConfig> {
    let defaults = RopeConfig::default();
    let parameters = match (keys.object("rope_scaling")?, keys.object("rope_parameters")?) {
        (Some(scaling), None) => Some(Keys::new(scaling, "rope_scaling.")),
        (None, Some(parameters)) => Some(Keys::new(parameters, "rope_parameters.")),
        (None, None) => None,
        (Some(_), Some(_)) => return Err(Error::config("rope_scaling", "stands beside rope_parameters: keep one")),
    };
    let mut theta = keys.float("rope_theta")?;
    let mut scaling = RopeScaling::None;
    if let Some(keys) = parameters {
        theta = match (theta, keys.float("rope_theta")?) {
            (Some(outer), Some(inner)) if outer != inner => {
                return Err(keys.error("rope_theta", format!("is {inner}, but rope_theta is {outer}")));
            }
            (outer, inner) => inner.or(outer),
        };
        let kind = match (keys.text("type")?, keys.text("rope_type")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(keys.error("type", format!("is `{a}`, but rope_type is `{b}`")));
            }
            (a, b) => a.or(b).unwrap_or("default"),
        };
        let factor = || -> Result<f64> { keys.float("factor")?.ok_or_else(|| keys.error("factor", "is missing")) };
        scaling = match kind {
            "default" | "none" => {
                keys.refuse_unknown(&[&["type", "rope_type", "rope_theta", "factor"]])?;
                if let Some(factor) = keys.float("factor")?.filter(|&factor| factor != 1.0) {
                    return Err(keys.error("factor", format!("is {factor}, but the type is missing or `{kind}`")));
                }
                RopeScaling::None
            }
            "linear" => {
                keys.refuse_unknown(&[&["type", "rope_type", "rope_theta", "factor"]])?;
                RopeScaling::Linear { factor: factor()? }
            }
            "yarn" => {
                keys.refuse_unknown(&[&[
                    "type",
                    "rope_type",
                    "rope_theta",
                    "factor",
                    "original_max_position_embeddings",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "attention_factor",
                ]])?;
                RopeScaling::Yarn {
                    factor: factor()?,
                    original_max_position_embeddings: keys
                        .float("original_max_position_embeddings")?
                        .ok_or_else(|| keys.error("original_max_position_embeddings", "is missing"))?,
                    beta_fast: keys.float("beta_fast")?.unwrap_or(32.0),
                    beta_slow: keys.float("beta_slow")?.unwrap_or(1.0),
                    mscale: keys.float("mscale")?,
                    mscale_all_dim: keys.float("mscale_all_dim")?,
                    attention_factor: keys.float("attention_factor")?,
                }
            }
            other => return Err(keys.error("type", format!("`{other}` is not one of default, linear, yarn"))),
        };
    }
    Ok(RopeConfig {
        theta: theta.unwrap_or(defaults.theta),
        interleave: keys.boolean("rope_interleave")?.unwrap_or(defaults.interleave),
        scaling,
    })
}
