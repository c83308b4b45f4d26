//! Accuracy of a long context: every decode path and prefill, at cache lengths up to 65 536, against f64 over the same cache.
//!
//! The cache holds latents in f16, as after a prefill. Weights are f32, so the error is that of the kernels' arithmetic. Two
//! curves are for comparison: rounding the cache to f16, in f64 throughout, and the control, running sums in f16, which a long
//! context ruins.

use half::f16;
use serde::Serialize;

use super::guarded::Guarded;
use crate::attention::{Attention, AttentionOptions, CacheOptions, DecodePath, LatentCache, Mode, StepTokens};
use crate::bench::tokens::{VOCABULARY, text_like};
use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite};
use crate::device::Kernels;
use crate::error::Result;
use crate::random::{Random, attention_weights};
use crate::readback;
use crate::recording::Recording;
use crate::reference::{Latents, Layer};
use crate::storage::Storage;
use crate::weights::QueryWeights;

/// Cached tokens that are measured at.
pub const LENGTHS: [u32; 7] = [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536];

/// Standard deviations of the logits: about equal weights, and nearly all weight on few keys.
pub const SPREADS: [f32; 2] = [1.0, 10.0];

/// The largest relative error that is accepted at any length.
pub const LIMIT: f64 = 5e-3;

/// From this length on, errors may not grow by more than [`DRIFT`].
pub const DRIFT_FROM: u32 = 4096;

/// The largest error of a longer cache over that at [`DRIFT_FROM`].
pub const DRIFT: f64 = 2.0;

/// Queries of a measurement: the last tokens of the cache.
const QUERIES: usize = 16;

/// The subject of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// A decode step over the latents.
    Absorbed,
    /// A decode step over rebuilt keys and values.
    Expanded,
    /// A chunk of a prefill.
    Prefill,
    /// Rounding of the cache to f16 alone: f64 over the rounded cache against f64 over the unrounded one.
    Rounding,
    /// The control: a running sum in f16, on the host.
    HalfSums,
}

impl Way {
    /// The three that run on the device.
    pub const DEVICE: [Way; 3] = [Way::Absorbed, Way::Expanded, Way::Prefill];

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Way::Absorbed => "absorbed",
            Way::Expanded => "expanded",
            Way::Prefill => "prefill",
            Way::Rounding => "f16 cache, f64 arithmetic",
            Way::HalfSums => "control: sums in f16",
        }
    }
}

/// Relative errors against the number of cached tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// `MLA`, `gate at latent` or `gate at up_projected`.
    pub configuration: &'static str,
    /// Its subject.
    pub way: Way,
    /// Standard deviation of the logits.
    pub spread: f32,
    /// (cached tokens, ‖got − expected‖₂ / ‖expected‖₂), by length.
    pub errors: Vec<(u32, f64)>,
}

impl Curve {
    /// Its defect, if any: an error over [`LIMIT`], or one that grows with the length.
    pub fn problem(&self) -> Option<String> {
        let name = format!("{} {}, logits of deviation {}", self.configuration, self.way.name(), self.spread);
        // NaN is over any limit.
        if let Some((tokens, error)) = self.errors.iter().find(|(_, error)| error.is_nan() || *error > LIMIT) {
            return Some(format!(
                "{name}: relative error {error:.1e} at {tokens} tokens, at most {LIMIT:.0e} is right"
            ));
        }
        let Some((_, base)) = self.errors.iter().find(|(tokens, _)| *tokens == DRIFT_FROM) else {
            return Some(format!("{name}: not measured at {DRIFT_FROM} tokens"));
        };
        let worst = self.errors.iter().filter(|(tokens, _)| *tokens > DRIFT_FROM).max_by(|a, b| a.1.total_cmp(&b.1))?;
        (worst.1 > DRIFT * base).then(|| {
            let (tokens, error) = worst;
            format!("{name}: relative error {error:.1e} at {tokens} tokens, {base:.1e} at {DRIFT_FROM}: it drifts")
        })
    }
}

/// The three configurations, 2 heads of 16 + 16 and latents of 64.
fn configurations() -> [(&'static str, AttentionConfig); 3] {
    let mla = AttentionConfig {
        hidden_size: 48,
        n_head: 2,
        d_latent: 64,
        d_nope: 16,
        d_rope: 16,
        d_value: 16,
        ..AttentionConfig::default()
    };
    let gated = |site| {
        let (activation, norm) = (Activation::OnePlus, GateNorm::LayerNorm);
        let gate =
            GateConfig { vocab_size: VOCABULARY, d_gate: 4, tied: false, site, activation, norm, norm_eps: 1e-5 };
        AttentionConfig { gate: Some(gate), ..mla.clone() }
    };
    [
        ("MLA", mla.clone()),
        ("gate at latent", gated(GateSite::Latent)),
        ("gate at up_projected", gated(GateSite::UpProjected)),
    ]
}

/// Every configuration, path and spread, at these lengths (at least 64 each). `progress` is called before each measurement, with
/// its name; where it returns false, the curves are those so far.
///
/// # Errors
/// A lost device, or one without the memory for the longest cache.
pub fn measure(kernels: &Kernels, lengths: &[u32], mut progress: impl FnMut(&str) -> bool) -> Result<Vec<Curve>> {
    let mut curves = Vec::new();
    for spread in SPREADS {
        for (name, config) in configurations() {
            if !progress(&format!("{name}, logits of deviation {spread}")) {
                return Ok(curves);
            }
            curves.extend(of_configuration(kernels, name, &config, spread, lengths)?);
        }
        let errors = lengths.iter().map(|&tokens| (tokens, half_sums(tokens, spread))).collect();
        curves.push(Curve { configuration: "MLA", way: Way::HalfSums, spread, errors });
    }
    Ok(curves)
}

fn of_configuration(
    kernels: &Kernels,
    name: &'static str,
    config: &AttentionConfig,
    spread: f32,
    lengths: &[u32],
) -> Result<Vec<Curve>> {
    let mut weights = attention_weights(config, true, 1)?;
    // Queries of this size against keys of size 1: logits of this deviation.
    if let QueryWeights::Full { proj, .. } = &mut weights.query {
        proj.data.iter_mut().for_each(|value| *value *= spread);
    }
    let longest = lengths.iter().copied().max().unwrap_or(0).max(QUERIES as u32 + 1);
    let past = longest as usize - QUERIES;
    let mut random = Random::new(2);
    let exact = random.values(past * config.d_latent as usize, 1.0);
    let exact_rope = random.values(past * config.d_rope as usize, 1.0);
    let hidden = random.values(QUERIES * config.hidden_size as usize, 1.0);
    let wide_hidden: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
    let ids = text_like(longest as usize, 3);
    let (past_ids, new_ids) = ids.split_at(past);

    let unrounded = Layer::new(config.clone(), &weights)?;
    let reference = unrounded.clone().with_cache(Storage::F16);
    let widen = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| value.into()).collect() };
    let rounded = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| f16::from_f32(value).to_f64()).collect() };
    let (latent, of_exact) = (rounded(&exact), widen(&exact));
    // A prefill leaves the statistics of the latents that it read back from the cache.
    let statistics: Vec<[f32; 2]> =
        unrounded.statistics(&latent, past_ids).iter().map(|pair| pair.map(|value| value as f32)).collect();
    let before =
        Latents { statistics: unrounded.statistics(&of_exact, past_ids), latent: of_exact, k_rope: widen(&exact_rope) };
    let cached = Latents {
        latent,
        k_rope: rounded(&exact_rope),
        statistics: statistics.iter().map(|pair| pair.map(f64::from)).collect(),
    };

    let attention = Attention::new(kernels, config, &weights, AttentionOptions::default())?;
    let new = QUERIES as u32;
    let options = CacheOptions {
        capacity: longest,
        storage: Storage::F16,
        max_tokens: new,
        decode_tokens: new,
        tile_rows: 4096,
        ..CacheOptions::default()
    };
    let mut cache = LatentCache::new(&attention, options)?;
    cache.fill_with(past_ids, &exact, &exact_rope, &statistics)?;

    // The longest first: roll back then gives every shorter one.
    let mut descending = lengths.to_vec();
    descending.sort_unstable_by(|a, b| b.cmp(a));
    let mut curves = [Way::Absorbed, Way::Expanded, Way::Prefill, Way::Rounding].map(|way| Curve {
        configuration: name,
        way,
        spread,
        errors: Vec::new(),
    });
    for &tokens in &descending {
        let past = tokens.max(new + 1) - new;
        cache.truncate(0, past)?;
        let mut got = Vec::new();
        for way in Way::DEVICE {
            let (mode, path) = match way {
                Way::Expanded => (Mode::Decode, DecodePath::Expanded),
                Way::Prefill => (Mode::Prefill, DecodePath::Auto),
                _ => (Mode::Decode, DecodePath::Absorbed),
            };
            let ids = config.gate.is_some().then_some(new_ids);
            cache.set_decode_path(path);
            // Never committed: the next step overwrites this one.
            let step = cache.prepare(mode, StepTokens { counts: &[new], ids })?;
            let input = Guarded::filled(kernels, "hidden", bytemuck::cast_slice(&hidden))?;
            let out = Guarded::poisoned(kernels, "out", hidden.len())?;
            let mut recording = Recording::new(kernels);
            let (from, to) = (&input.region, &out.region);
            attention.forward(&mut recording, &cache, &step, 0, from, to)?;
            readback::submit(&mut recording)?;
            got.push(widen(&out.read_f32(kernels)?));
        }
        let past = past as usize;
        let own_ids = &past_ids[..past];
        let held = cached.first(past, config);
        let absorbed = reference.decode_absorbed(&wide_hidden, new_ids, &held, own_ids);
        let expanded = reference.decode_expanded(&wide_hidden, new_ids, &held, own_ids);
        let exact = unrounded.decode_absorbed(&wide_hidden, new_ids, &before.first(past, config), own_ids);
        let errors = [
            relative(&got[0], &absorbed),
            relative(&got[1], &expanded),
            relative(&got[2], &expanded),
            relative(&absorbed, &exact),
        ];
        for (curve, error) in curves.iter_mut().zip(errors) {
            curve.errors.insert(0, (tokens, error));
        }
    }
    Ok(curves.into())
}

/// ‖got − expected‖₂ / ‖expected‖₂.
fn relative(got: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(got, expected)| got - expected));
    error / norm(&mut expected.iter().copied())
}

/// Relative error of one head over cached latents when weights, their sum and the weighted latents are added up in f16.
fn half_sums(tokens: u32, spread: f32) -> f64 {
    const WIDTH: usize = 64;
    let mut random = Random::new(4);
    let query = random.values(WIDTH, spread / (WIDTH as f32).sqrt());
    let latents: Vec<f64> =
        random.values(tokens as usize * WIDTH, 1.0).iter().map(|&value| f16::from_f32(value).to_f64()).collect();
    let score = |row: &[f64]| row.iter().zip(&query).map(|(c, &a)| c * f64::from(a)).sum::<f64>();
    let scores: Vec<f64> = latents.chunks(WIDTH).map(score).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut exact, mut halves) = ([0.0; WIDTH + 1], [f16::ZERO; WIDTH + 1]);
    for (row, score) in latents.chunks(WIDTH).zip(&scores) {
        let weight = (score - most).exp();
        for (index, value) in row.iter().copied().chain([1.0]).enumerate() {
            exact[index] += weight * value;
            halves[index] = f16::from_f64(halves[index].to_f64() + weight * value);
        }
    }
    let attended = |sums: [f64; WIDTH + 1]| sums[..WIDTH].iter().map(|sum| sum / sums[WIDTH]).collect::<Vec<_>>();
    relative(&attended(halves.map(f16::to_f64)), &attended(exact))
}

#[cfg(test)]
mod tests {
    use super::{Curve, LENGTHS, SPREADS, Way, half_sums};

    fn curve(errors: &[(u32, f64)]) -> Curve {
        Curve { configuration: "MLA", way: Way::Absorbed, spread: 1.0, errors: errors.to_vec() }
    }

    #[test]
    fn a_curve_is_right_only_when_it_is_low_and_level() {
        assert_eq!(curve(&[(1024, 1e-3), (4096, 1e-6), (65_536, 1.9e-6)]).problem(), None);
        for (wrong, word) in [
            (curve(&[(4096, 1e-6), (32_768, 2.1e-6), (65_536, 1e-6)]), "drifts"),
            (curve(&[(4096, 4e-3), (65_536, 5.1e-3)]), "at most"),
            (curve(&[(4096, 1e-6), (65_536, f64::NAN)]), "at most"),
            (curve(&[(65_536, 1e-6)]), "not measured"),
        ] {
            assert!(wrong.problem().is_some_and(|problem| problem.contains(word)), "{wrong:?}");
        }
    }

    /// Control of the measurement: it tells f16 sums from f32 sums.
    #[test]
    fn sums_in_f16_are_found_out() {
        let errors = |spread| LENGTHS.iter().map(|&tokens| (tokens, half_sums(tokens, spread))).collect();
        let control = Curve { way: Way::HalfSums, errors: errors(SPREADS[0]), ..curve(&[]) };
        println!("{:?}", control.errors);
        assert!(control.problem().is_some());
        let [short, long] = [2, 6].map(|index| control.errors[index].1);
        assert!(long > 2.0 * short && long > 0.05, "{:?}", control.errors);
    }
}
