//! Rotary position embedding: frequencies, their scalings, and how checkpoints spell them.

use std::f64::consts::PI;

use serde::Serialize;

use super::family::Family;
use super::keys::Keys;
use crate::error::{Error, Result};

/// Context extension: scaling of positions beyond the length of the training.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Dynamic NTK scaling up to the length of the training, where every frequency is as it is. Beyond, transformers takes the
    /// frequencies of the length that a sequence has in each step, and keys stay turned by those of theirs: results depend on how a
    /// text was cut into steps, and are not computed ([`RopeConfig::check_length`]).
    Dynamic {
        /// Length of the training.
        max_position_embeddings: u32,
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
        /// Numerator of the factor on cos and sin; 0 counts as absent.
        mscale: Option<f64>,
        /// Its denominator; also scales the scores. 0 counts as absent.
        mscale_all_dim: Option<f64>,
        /// Factor on cos and sin, in place of that of the two above.
        attention_factor: Option<f64>,
        /// The ends of the ramp are whole numbers of pairs.
        truncate: bool,
    },
    /// Llama 3: frequencies below `low_freq_factor` rotations over L are divided by `factor`, those above `high_freq_factor` are
    /// kept, those between are mixed.
    Llama3 {
        /// Context extension.
        factor: f64,
        /// Rotations over L below which a frequency is divided.
        low_freq_factor: f64,
        /// Rotations over L above which it is kept.
        high_freq_factor: f64,
        /// L, the length of the original training.
        original_max_position_embeddings: f64,
    },
    /// LongRoPE (arXiv 2402.13753) up to the length of the original training: each frequency divided by a number of its own.
    LongRope {
        /// `[d_rope / 2]` divisors.
        short_factor: Vec<f64>,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
}

/// Factor on queries by their position: `1 + β · ln(1 + ⌊position / L⌋)`, 1 up to the length of the original training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct QueryScaling {
    /// β, `llama_4_scaling_beta`.
    pub beta: f64,
    /// L, the length of the original training.
    pub original_max_position_embeddings: f64,
}

impl QueryScaling {
    /// The factor at a position.
    pub fn factor(&self, position: u32) -> f64 {
        1.0 + self.beta * (f64::from(position) / self.original_max_position_embeddings).floor().ln_1p()
    }
}

/// Rotary position embedding of the `d_rope` part of queries and keys, and what else depends on positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeConfig {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Pairs are (2i, 2i+1) when true (DeepSeek), (i, i + d_rope/2) when false.
    pub interleave: bool,
    /// Context extension.
    pub scaling: RopeScaling,
    /// False leaves the rotary part as it is, at every position (Kimi-Linear).
    pub rotate: bool,
    /// Factor on whole queries (Mistral 4, Ministral 3).
    pub query_scaling: Option<QueryScaling>,
}

impl Default for RopeConfig {
    fn default() -> Self {
        RopeConfig { theta: 10000.0, interleave: true, scaling: RopeScaling::None, rotate: true, query_scaling: None }
    }
}

/// `m(x) = 0.1 · x · ln(factor) + 1`, 1 when `factor` ≤ 1.
fn yarn_mscale(factor: f64, x: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * x * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// Checks that the fields fit each other and the rotary width, which `width_key` names.
    ///
    /// # Errors
    /// [`Error::Config`] with the checkpoint key that does not fit.
    pub(super) fn validate(&self, d_rope: u32, width_key: &str) -> Result<()> {
        above("rope_theta", self.theta, 1.0)?;
        if let Some(scaling) = self.query_scaling {
            above("rope_scaling.original_max_position_embeddings", scaling.original_max_position_embeddings, 0.0)?;
            // It only rises or only falls.
            above("rope_scaling.llama_4_scaling_beta", scaling.factor(u32::MAX), 0.0)?;
        }
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => Ok(()),
            &RopeScaling::Linear { factor } => above("rope_scaling.factor", factor, 0.0),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                above("rope_scaling.factor", factor, 0.0)?;
                above("rope_scaling.original_max_position_embeddings", original_max_position_embeddings, 0.0)?;
                above("rope_scaling.low_freq_factor", low_freq_factor, 0.0)?;
                above("rope_scaling.high_freq_factor", high_freq_factor, low_freq_factor as f32)
            }
            RopeScaling::LongRope { short_factor, attention_factor } => {
                if short_factor.len() != (d_rope / 2) as usize {
                    let (found, expected) = (short_factor.len(), d_rope / 2);
                    let problem = format!("has {found} numbers, must have {expected}, half of {width_key}");
                    return Err(Error::config("rope_scaling.short_factor", problem));
                }
                short_factor.iter().try_for_each(|&factor| above("rope_scaling.short_factor", factor, 0.0))?;
                above("rope_scaling.attention_factor", *attention_factor, 0.0)
            }
            &RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                attention_factor,
                truncate: _,
            } => {
                above("rope_scaling.factor", factor, 0.0)?;
                above("rope_scaling.original_max_position_embeddings", original_max_position_embeddings, 0.0)?;
                above("rope_scaling.beta_slow", beta_slow, 0.0)?;
                if beta_fast < beta_slow {
                    let problem = format!("is {beta_fast}, must be at least beta_slow, {beta_slow}");
                    return Err(Error::config("rope_scaling.beta_fast", problem));
                }
                above("rope_scaling.beta_fast", beta_fast, 0.0)?;
                above("rope_scaling.attention_factor", attention_factor.unwrap_or(1.0), 0.0)?;
                for (key, value) in [("rope_scaling.mscale", mscale), ("rope_scaling.mscale_all_dim", mscale_all_dim)] {
                    if value.is_some_and(|value| !(value.is_finite() && value >= 0.0)) {
                        return Err(Error::config(
                            key,
                            format!("is {}, must be at least 0", value.unwrap_or_default()),
                        ));
                    }
                }
                above("rope_scaling.mscale", self.amplitude(), 0.0)
            }
        }
    }

    /// Angle per position of each of the `d_rope / 2` pairs, in radians.
    pub fn frequencies(&self, d_rope: u32) -> Vec<f64> {
        let d = f64::from(d_rope);
        let base = |i: u32| self.theta.powf(-2.0 * f64::from(i) / d);
        let scaled = |i: u32| match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => base(i),
            RopeScaling::Linear { factor } => base(i) / factor,
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                let correction = |rotations: &f64| {
                    d * (original_max_position_embeddings / (2.0 * PI * rotations)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(d - 1.0));
                if high == low {
                    high += 0.001;
                }
                let ramp = ((f64::from(i) - low) / (high - low)).clamp(0.0, 1.0);
                base(i) * (1.0 - ramp) + base(i) / factor * ramp
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let rotations = original_max_position_embeddings * base(i) / (2.0 * PI);
                let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                base(i) / factor * (1.0 - kept) + base(i) * kept
            }
            RopeScaling::LongRope { short_factor, .. } => base(i) / short_factor.get(i as usize).unwrap_or(&1.0),
        };
        (0..d_rope / 2).map(|i| if self.rotate { scaled(i) } else { 0.0 }).collect()
    }

    /// Factor on cos and sin (YaRN and LongRoPE; 1 otherwise).
    pub fn amplitude(&self) -> f64 {
        if !self.rotate {
            return 1.0;
        }
        match self.scaling {
            RopeScaling::Yarn { attention_factor: Some(attention_factor), .. } => attention_factor,
            RopeScaling::Yarn { factor, mscale: Some(mscale), mscale_all_dim: Some(all_dim), .. }
                if mscale != 0.0 && all_dim != 0.0 =>
            {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
            }
            RopeScaling::Yarn { factor, .. } => yarn_mscale(factor, 1.0),
            RopeScaling::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Refuses a sequence of more tokens than this embedding turns.
    ///
    /// # Errors
    /// [`Error::Config`] with both lengths.
    pub fn check_length(&self, tokens: usize) -> Result<()> {
        match self.scaling {
            RopeScaling::Dynamic { max_position_embeddings: most } if tokens as u64 > u64::from(most) => {
                let problem = format!(
                    "is `dynamic`: beyond {most} positions (max_position_embeddings) frequencies depend on the length, which is \
                     not computed, and {tokens} are asked for"
                );
                Err(Error::config("rope_scaling.type", problem))
            }
            _ => Ok(()),
        }
    }

    /// Factor on the queries of a position.
    pub fn query_factor(&self, position: u32) -> f64 {
        self.query_scaling.map_or(1.0, |scaling| scaling.factor(position))
    }

    /// Factor on the scores: `mscale²` when YaRN scaling carries `mscale_all_dim`, 1 otherwise.
    pub fn score_factor(&self) -> f64 {
        match self.scaling {
            // Of 0 it is 1.
            RopeScaling::Yarn { factor, mscale_all_dim: Some(all_dim), .. } => yarn_mscale(factor, all_dim).powi(2),
            _ => 1.0,
        }
    }
}

/// In f32, the device's type: a value that becomes 0 or infinite there would make every result NaN.
pub(super) fn above(key: &str, value: f64, bound: f32) -> Result<()> {
    let single = value as f32;
    if single.is_finite() && single > bound {
        Ok(())
    } else {
        Err(Error::config(key, format!("is {value}, must be above {bound} and finite in f32")))
    }
}

/// Keys that the object of any scaling may have; the last two only where they change nothing, or the family has them.
const SPELLINGS: &[&str] = &["type", "rope_type", "rope_theta", "partial_rotary_factor", "llama_4_scaling_beta"];

const LENGTH: &str = "original_max_position_embeddings";

/// The rotary embedding of a configuration whose family, without a key that says otherwise, has these `defaults`.
pub(super) fn rope_from_map(keys: &Keys<'_>, family: &Family, defaults: RopeConfig) -> Result<RopeConfig> {
    let outer = keys.float("rope_theta")?;
    let mut read = Vec::new();
    for (name, prefix) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
        if let Some(object) = keys.object(name)? {
            let inner = Keys::new(object, prefix);
            let theta = inner.float("rope_theta")?;
            if let (Some(outer), Some(theta)) = (outer, theta)
                && outer != theta
            {
                return Err(inner.error("rope_theta", format!("is {theta}, but rope_theta is {outer}")));
            }
            read.push((theta, scaling_from(&inner, keys, family)?));
        }
    }
    let (theta, (scaling, query_scaling)) = match &mut read[..] {
        [] if family.scales_queries => {
            let problem = format!("is missing: `{}` scales positions without it, too", family.name);
            return Err(keys.error("rope_parameters", problem));
        }
        [] => (None, Default::default()),
        [(theta, scaling)] => (*theta, std::mem::take(scaling)),
        [(first, one), (second, other), ..]
            if one == other && (first.is_none() || second.is_none() || first == second) =>
        {
            (first.or(*second), std::mem::take(one))
        }
        _ => {
            return Err(
                keys.error("rope_scaling", "stands beside a rope_parameters that says something else: keep one")
            );
        }
    };
    Ok(RopeConfig {
        theta: outer.or(theta).unwrap_or(defaults.theta),
        interleave: keys.boolean("rope_interleave")?.unwrap_or(defaults.interleave),
        scaling,
        query_scaling,
        ..defaults
    })
}

/// The scalings of keys and of queries, from their object and the configuration around it.
fn scaling_from(keys: &Keys<'_>, config: &Keys<'_>, family: &Family) -> Result<(RopeScaling, Option<QueryScaling>)> {
    let kind = match (keys.text("type")?, keys.text("rope_type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(keys.error("type", format!("is `{a}`, but rope_type is `{b}`")));
        }
        (a, b) => a.or(b).unwrap_or("default"),
    };
    let needed = |key: &str| keys.float(key)?.ok_or_else(|| keys.error(key, "is missing"));
    let (known, scaling): (&[&str], _) = match kind {
        "default" | "none" => {
            if let Some(factor) = keys.float("factor")?.filter(|&factor| factor != 1.0) {
                return Err(keys.error("factor", format!("is {factor}, but the type is missing or `{kind}`")));
            }
            (&["factor"], RopeScaling::None)
        }
        "linear" => (&["factor"], RopeScaling::Linear { factor: needed("factor")? }),
        "dynamic" => {
            above("rope_scaling.factor", needed("factor")?, 0.0)?;
            (
                &["factor"],
                RopeScaling::Dynamic { max_position_embeddings: config.required_integer("max_position_embeddings")? },
            )
        }
        "yarn" => {
            let original = needed(LENGTH)?;
            let factor = match (keys.float("factor")?, config.float("max_position_embeddings")?) {
                (Some(factor), _) => factor,
                (None, Some(longest)) => longest / original,
                (None, None) => return Err(keys.error("factor", "is missing")),
            };
            (
                &[
                    "factor",
                    LENGTH,
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "attention_factor",
                    "truncate",
                    "max_position_embeddings",
                ],
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: keys.float("beta_fast")?.unwrap_or(32.0),
                    beta_slow: keys.float("beta_slow")?.unwrap_or(1.0),
                    mscale: keys.float("mscale")?,
                    mscale_all_dim: keys.float("mscale_all_dim")?,
                    attention_factor: keys.float("attention_factor")?,
                    truncate: keys.boolean("truncate")?.unwrap_or(true),
                },
            )
        }
        "llama3" => (
            &["factor", "low_freq_factor", "high_freq_factor", LENGTH],
            RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_max_position_embeddings: needed(LENGTH)?,
            },
        ),
        "longrope" => {
            let original = needed(LENGTH)?;
            let [short_factor, long_factor] = [keys.numbers("short_factor")?, keys.numbers("long_factor")?];
            let longest = config.float("max_position_embeddings")?.unwrap_or(original);
            if short_factor != long_factor && longest > original {
                return Err(keys.error(
                    "long_factor",
                    format!(
                        "turns every key anew once a context is longer than {original}, which is not computed; for contexts up \
                         to {original} set max_position_embeddings to that"
                    ),
                ));
            }
            let factor = keys.float("factor")?.unwrap_or(longest / original);
            let attention_factor = match keys.float("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / original.ln()).sqrt(),
            };
            (
                &["factor", LENGTH, "short_factor", "long_factor", "attention_factor"],
                RopeScaling::LongRope { short_factor, attention_factor },
            )
        }
        other => {
            let one_of = "default, linear, dynamic, yarn, llama3, longrope";
            return Err(keys.error("type", format!("`{other}` is not one of {one_of}")));
        }
    };
    let beta = keys.float("llama_4_scaling_beta")?.filter(|&beta| beta != 0.0);
    keys.refuse_unknown(&[known, SPELLINGS, if beta.is_some() { &[LENGTH] } else { &[] }])?;
    if let Some(part) = keys.float("partial_rotary_factor")?.filter(|&part| part != 1.0) {
        // There it is that of the whole head, which says nothing that the widths do not say.
        let [nope, rope] = [config.float("qk_nope_head_dim")?, config.float("qk_rope_head_dim")?];
        let of_widths = nope.zip(rope).filter(|_| family.scales_queries).map(|(nope, rope)| rope / (nope + rope));
        if of_widths != Some(part) {
            let problem = format!("is {part}: it turns a part of the rotary width only, which is not computed");
            return Err(keys.error("partial_rotary_factor", problem));
        }
    }
    let query_scaling = match beta {
        Some(beta) if family.scales_queries => {
            Some(QueryScaling { beta, original_max_position_embeddings: needed(LENGTH)? })
        }
        Some(beta) => {
            let problem = format!("is {beta}: it scales queries by their position, which `{}` does not", family.name);
            return Err(keys.error("llama_4_scaling_beta", problem));
        }
        None => None,
    };
    Ok((scaling, query_scaling))
}
