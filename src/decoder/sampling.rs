//! The next token from logits.

use crate::error::{ArgumentError, DataError, Error, Result};

/// Rules of drawing a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the `k` most likely tokens.
    pub top_k: Option<u32>,
    /// Only the most likely tokens that together reach this probability, at least one.
    pub top_p: Option<f64>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    /// The most likely token.
    fn default() -> Self {
        SamplingOptions { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

/// Draws tokens; equal seeds and logits draw equal tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    random: fastrand::Rng,
}

/// Index of the largest logit, the lowest index among equals.
///
/// # Errors
/// `ArgumentError::Empty` without logits, `DataError::NonFinite` with the first that is NaN or infinite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    check(logits)?;
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    Ok(best as u32)
}

fn check(logits: &[f32]) -> Result<()> {
    if logits.is_empty() {
        return Err(Error::Argument(ArgumentError::Empty { what: "the list of logits" }));
    }
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::Data(DataError::NonFinite { what: "logits", index, value: logits[index] })),
    }
}

impl Sampler {
    /// A sampler.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a temperature that is negative or not finite, `top_k` 0 or `top_p` outside of (0, 1].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        let refuse = |what: String, instead| Err(Error::Unsupported { what, instead });
        if !(options.temperature.is_finite() && options.temperature >= 0.0) {
            return refuse(format!("temperature {}", options.temperature), "it must be a finite number, 0 or above");
        }
        if options.top_k == Some(0) {
            return refuse("top_k 0".to_owned(), "it must be at least 1");
        }
        if let Some(top_p) = options.top_p
            && !(top_p > 0.0 && top_p <= 1.0)
        {
            return refuse(format!("top_p {top_p}"), "it must be above 0 and at most 1");
        }
        Ok(Sampler { options, random: fastrand::Rng::with_seed(options.seed) })
    }

    /// Draws one of `logits.len()` tokens.
    ///
    /// # Errors
    /// As [`argmax`].
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let candidates = self.distribution(logits)?;
        let mut draw = self.random.f64();
        for &(token, probability) in &candidates {
            if draw < probability {
                return Ok(token);
            }
            draw -= probability;
        }
        // Rounding may leave a little beyond the last: it belongs to the most likely.
        argmax(logits)
    }

    /// The tokens that can be drawn and their probabilities, which sum to 1.
    ///
    /// # Errors
    /// As [`argmax`].
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let best = argmax(logits)?;
        let SamplingOptions { temperature, top_k, top_p, .. } = self.options;
        if temperature == 0.0 {
            return Ok(vec![(best, 1.0)]);
        }
        let largest = f64::from(logits[best as usize]);
        let mut candidates: Vec<(u32, f64)> = (0..).zip(logits.iter().copied().map(f64::from)).collect();
        if top_k.is_some() || top_p.is_some() {
            // Most likely first, the lower index among equals.
            let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
            if let Some(top_k) = top_k.map(|top_k| top_k as usize).filter(|&top_k| top_k < candidates.len()) {
                candidates.select_nth_unstable_by(top_k, order);
                candidates.truncate(top_k);
            }
            candidates.sort_unstable_by(order);
        }
        for candidate in &mut candidates {
            candidate.1 = ((candidate.1 - largest) / temperature).exp();
        }
        normalise(&mut candidates);
        if let Some(top_p) = top_p {
            let mut reached = 0.0;
            let kept = candidates.iter().take_while(|(_, probability)| {
                let wanted = reached < top_p;
                reached += probability;
                wanted
            });
            let kept = kept.count().max(1);
            candidates.truncate(kept);
            normalise(&mut candidates);
        }
        Ok(candidates)
    }
}

fn normalise(candidates: &mut [(u32, f64)]) {
    // At least 1: the most likely candidate is exp(0), or the rest of a sum that was.
    let sum: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    candidates.iter_mut().for_each(|(_, weight)| *weight /= sum);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LOGITS: [f32; 5] = [0.3, 2.0, -1.0, 2.0, 1.1];

    fn sampler(temperature: f64, top_k: Option<u32>, top_p: Option<f64>, seed: u64) -> Sampler {
        Sampler::new(SamplingOptions { temperature, top_k, top_p, seed }).unwrap()
    }

    #[test]
    fn argmax_takes_the_lowest_index_of_equals() {
        assert_eq!(argmax(&LOGITS).unwrap(), 1);
        assert_eq!(sampler(0.0, None, None, 3).sample(&LOGITS).unwrap(), 1);
    }

    #[test]
    fn one_candidate_is_the_argmax() {
        for seed in 0..50 {
            assert_eq!(sampler(1.0, Some(1), None, seed).sample(&LOGITS).unwrap(), 1);
            assert_eq!(sampler(1.0, None, Some(1e-9), seed).sample(&LOGITS).unwrap(), 1);
            assert_eq!(sampler(1e-300, None, None, seed).sample(&[0.0, 1.0, 0.5]).unwrap(), 1);
        }
    }

    #[test]
    fn a_seed_repeats_itself() {
        let draw = |seed| {
            let mut sampler = sampler(1.5, None, None, seed);
            (0..64).map(|_| sampler.sample(&LOGITS).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        for (temperature, top_k, top_p) in
            [(1.0, None, None), (0.7, None, None), (1.3, Some(3), None), (1.0, None, Some(0.9))]
        {
            let mut sampler = sampler(temperature, top_k, top_p, 11);
            let expected = sampler.distribution(&LOGITS).unwrap();
            let total: f64 = expected.iter().map(|(_, probability)| probability).sum();
            assert!((total - 1.0).abs() < 1e-12);
            let draws = 20_000;
            let mut counts = [0u32; LOGITS.len()];
            for _ in 0..draws {
                counts[sampler.sample(&LOGITS).unwrap() as usize] += 1;
            }
            let mut chi_square = 0.0;
            for (token, probability) in expected {
                let mean = probability * f64::from(draws);
                chi_square += (f64::from(std::mem::take(&mut counts[token as usize])) - mean).powi(2) / mean;
            }
            // 99.9 % of at most 4 degrees of freedom lie below 18.5.
            assert!(chi_square < 18.5, "{chi_square}");
            assert_eq!(counts, [0; 5], "a token that was ruled out was drawn");
        }
    }

    #[test]
    fn probabilities_are_the_softmax() {
        let distribution = sampler(2.0, None, None, 0).distribution(&LOGITS).unwrap();
        let sum: f64 = LOGITS.iter().map(|&logit| (f64::from(logit) / 2.0).exp()).sum();
        for (token, probability) in distribution {
            let expected = (f64::from(LOGITS[token as usize]) / 2.0).exp() / sum;
            assert!((probability - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        // Probabilities 0.5, 0.3, 0.2.
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        for (top_p, kept) in [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (1.0, 3)] {
            assert_eq!(sampler(1.0, None, Some(top_p), 0).distribution(&logits).unwrap().len(), kept, "{top_p}");
        }
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        for (value, temperature) in [(f32::NAN, 0.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (f32::NEG_INFINITY, 1.0)] {
            let result = sampler(temperature, Some(2), Some(0.5), 0).sample(&[0.0, value, 1.0]);
            assert!(matches!(result, Err(Error::Data(DataError::NonFinite { index: 1, .. }))), "{result:?}");
        }
        assert!(matches!(sampler(1.0, None, None, 0).sample(&[]), Err(Error::Argument(ArgumentError::Empty { .. }))));
    }

    #[test]
    fn bad_options_are_refused() {
        let options = SamplingOptions { temperature: 1.0, ..Default::default() };
        for temperature in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(Sampler::new(SamplingOptions { temperature, ..options }).is_err());
        }
        for top_p in [0.0, -0.5, 1.5, f64::NAN] {
            assert!(Sampler::new(SamplingOptions { top_p: Some(top_p), ..options }).is_err());
        }
        assert!(Sampler::new(SamplingOptions { top_k: Some(0), ..options }).is_err());
    }
}
