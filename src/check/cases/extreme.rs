//! Extreme inputs of attention, and their tolerances.

use crate::check::compare::{Tolerance, UNIT_ROUNDOFF};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Extreme inputs of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extreme {
    /// None of it.
    Plain,
    /// Scores of ±1e4 before the softmax: one key takes everything, nothing overflows.
    HugeScores,
    /// Every score is 0: every key has the same weight.
    EqualScores,
    /// One key's score is a thousand times the others'.
    OneKey,
    /// Queries below the smallest normal f32, every other element of the keys below the smallest normal number of the storage.
    Denormals,
    /// Every element of keys and values is ±65504.
    Largest,
}

impl Extreme {
    pub(super) const ALL: [Extreme; 5] =
        [Extreme::HugeScores, Extreme::EqualScores, Extreme::OneKey, Extreme::Denormals, Extreme::Largest];

    pub(super) fn name(self) -> &'static str {
        match self {
            Extreme::Plain => "plain",
            Extreme::HugeScores => "huge_scores",
            Extreme::EqualScores => "equal_scores",
            Extreme::OneKey => "one_key",
            Extreme::Denormals => "denormals",
            Extreme::Largest => "f16_largest",
        }
    }

    /// Size of the scores, for the tolerance.
    pub(super) fn spread(self) -> f64 {
        match self {
            Extreme::HugeScores => 1e4,
            Extreme::OneKey => 1e3,
            Extreme::Plain | Extreme::EqualScores | Extreme::Denormals | Extreme::Largest => 1.0,
        }
    }

    pub(super) fn of_queries(self, values: &mut [f32]) {
        let scale = |values: &mut [f32], by: f32| values.iter_mut().for_each(|value| *value *= by);
        match self {
            Extreme::Plain | Extreme::OneKey => {}
            Extreme::HugeScores => scale(values, 1e4),
            Extreme::EqualScores => values.fill(0.0),
            // No score reaches the smallest normal number: see `check_scores`.
            Extreme::Denormals => scale(values, 6e-40),
            // Against keys of this size scores of order 1.
            Extreme::Largest => scale(values, 1.0 / 65_504.0),
        }
    }

    /// Refuses a case of denormals some of whose largest scores are normal numbers: queries that a device flushes make them 0,
    /// which the comparator takes for a number below the smallest normal one, and for no other.
    pub(super) fn check_scores(self, case: &'static str, maxima: &[f64]) -> Result<()> {
        let normal = |max: &&f64| max.abs() >= f64::from(f32::MIN_POSITIVE) && **max > f64::from(f32::MIN);
        match maxima.iter().find(normal) {
            Some(max) if self == Extreme::Denormals => {
                Err(Error::problem(case, format!("the case of denormals has a score of {max}")))
            }
            _ => Ok(()),
        }
    }

    /// `width` values per row.
    pub(super) fn of_keys(self, values: &mut [f32], width: usize, storage: Storage) {
        match self {
            Extreme::Plain | Extreme::HugeScores | Extreme::EqualScores => {}
            Extreme::OneKey => {
                let middle = values.len() / width.max(1) / 2 * width;
                values[middle..].iter_mut().take(width).for_each(|value| *value *= 1e3);
            }
            Extreme::Denormals => {
                // A tenth of the smallest normal number.
                let tiny = match storage {
                    Storage::F32 => f32::MIN_POSITIVE / 10.0,
                    Storage::F16 => 6e-6,
                };
                values.iter_mut().step_by(2).for_each(|value| *value *= tiny);
            }
            Extreme::Largest => values.iter_mut().for_each(|value| *value = 65_504f32.copysign(*value)),
        }
    }
}

/// Scores of size `spread` carry absolute errors of spread · u · √d: those are relative errors of their exponentials.
pub(super) fn attention_tolerance(d_query: usize, keys: usize, spread: f64) -> Tolerance {
    let plain = Tolerance::sums(&[d_query, keys]);
    if spread <= 1.0 {
        return plain;
    }
    Tolerance { relative: plain.relative + 4.0 * UNIT_ROUNDOFF * spread * ((d_query as f64).sqrt() + 8.0) }
}
