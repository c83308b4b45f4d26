//! Scores a model on a text: sliding windows, loss, bits per character.
//!
//! The text is tokenised once; its first token is context only. Windows of W = `max_position_embeddings` tokens begin W/2
//! apart: the window that begins at s is fed tokens `[s, min(s + W, n − 1))` and scores the next-token targets that no
//! earlier window scored. Loss is total nats / scored tokens, bits per character total nats / ln 2 / characters.

use std::ops::Range;

use super::tokenizer::TextTokenizer;
use crate::error::{ArgumentError, DataError, Error, Result};

/// Tokens to feed at once, and which of their predictions count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Indices of the tokens to feed.
    pub inputs: Range<usize>,
    /// Indices of the tokens that are scored: the one at `t` is predicted by the logits of input `t − 1`.
    pub targets: Range<usize>,
}

impl Window {
    /// Rows of the window's logits that are scored, in the order of `targets`.
    pub fn scored_rows(&self) -> Range<usize> {
        self.targets.start - 1 - self.inputs.start..self.targets.end - 1 - self.inputs.start
    }
}

/// The windows over a text of `n` tokens; every token but the first is scored exactly once.
#[derive(Debug, Clone)]
pub struct Windows {
    tokens: usize,
    width: usize,
    start: usize,
    scored: usize,
}

impl Windows {
    /// Windows of `width` tokens, at least 1, over `tokens` tokens; none where there are fewer than 2 tokens.
    pub fn new(tokens: usize, width: usize) -> Self {
        Windows { tokens, width: width.max(1), start: 0, scored: 1 }
    }
}

impl Iterator for Windows {
    type Item = Window;

    fn next(&mut self) -> Option<Window> {
        if self.scored >= self.tokens {
            return None;
        }
        let end = self.start.saturating_add(self.width).min(self.tokens - 1);
        let window = Window { inputs: self.start..end, targets: self.scored..end + 1 };
        self.scored = end + 1;
        self.start += (self.width / 2).max(1);
        Some(window)
    }
}

/// Characters that count for bits per character: those of the text without its first token's.
///
/// # Errors
/// `DataError::Tokenizer` when the tokenizer's decoder fails.
pub fn scored_characters(tokenizer: &TextTokenizer, text: &str, ids: &[u32]) -> Result<u64> {
    let first = tokenizer.decode(&ids[..ids.len().min(1)])?;
    // A first token that ends inside a character leaves that character to the scored ones.
    let first = first.trim_end_matches(char::REPLACEMENT_CHARACTER);
    Ok(text.chars().count().saturating_sub(first.chars().count()) as u64)
}

/// A running sum of negative log-likelihoods.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    nats: f64,
    tokens: u64,
}

impl Score {
    /// Adds predictions: `logits` `[targets.len(), vocab]`, row i predicts `targets[i]`.
    ///
    /// # Errors
    /// `ArgumentError::Count` when the sizes do not fit, `ArgumentError::TokenId` for a target beyond the vocabulary,
    /// `DataError::NonFinite` for a logit that is NaN or infinite; the score is then unchanged.
    pub fn add(&mut self, logits: &[f32], targets: &[u32], vocab_size: u32) -> Result<()> {
        let vocab = vocab_size as usize;
        let expected = targets.len() as u64 * u64::from(vocab_size);
        if logits.len() as u64 != expected {
            return Err(Error::Argument(ArgumentError::Count { what: "logits", expected, found: logits.len() as u64 }));
        }
        if let Some(index) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(Error::Data(DataError::NonFinite { what: "logits", index, value: logits[index] }));
        }
        let mut nats = 0.0;
        for (index, &target) in targets.iter().enumerate() {
            if target >= vocab_size {
                return Err(Error::Argument(ArgumentError::TokenId { index, id: target.into(), vocab_size }));
            }
            let row = &logits[index * vocab..][..vocab];
            let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = row.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
            nats += sum.ln() + (largest - f64::from(row[target as usize]));
        }
        self.nats += nats;
        self.tokens += targets.len() as u64;
        Ok(())
    }

    /// Total negative log-likelihood.
    pub fn nats(&self) -> f64 {
        self.nats
    }

    /// Tokens scored.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Nats per token; NaN before any token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Bits per character, by the number of characters of the scored text.
    pub fn bits_per_character(&self, characters: u64) -> f64 {
        self.nats / std::f64::consts::LN_2 / characters as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_once() {
        for width in [1, 2, 3, 4, 7, 8] {
            for tokens in 0..40 {
                let mut scored = Vec::new();
                for window in Windows::new(tokens, width) {
                    assert!(!window.inputs.is_empty() && window.inputs.len() <= width);
                    assert!(window.inputs.end < tokens, "the last token has nothing to predict");
                    assert!(!window.targets.is_empty());
                    let rows = window.scored_rows();
                    assert_eq!(rows.len(), window.targets.len());
                    assert_eq!(window.inputs.start + rows.start + 1, window.targets.start);
                    assert_eq!(rows.end, window.inputs.len());
                    scored.extend(window.targets);
                }
                assert_eq!(scored, (1..tokens.max(1)).collect::<Vec<_>>(), "{tokens} tokens, width {width}");
            }
        }
    }

    #[test]
    fn windows_overlap_by_half() {
        let windows: Vec<_> = Windows::new(11, 4).collect();
        let inputs: Vec<_> = windows.iter().map(|window| window.inputs.clone()).collect();
        assert_eq!(inputs, [0..4, 2..6, 4..8, 6..10]);
        let targets: Vec<_> = windows.iter().map(|window| window.targets.clone()).collect();
        assert_eq!(targets, [1..5, 5..7, 7..9, 9..11]);
        assert_eq!(windows[1].scored_rows(), 2..4);
    }

    #[test]
    fn a_uniform_model_needs_the_logarithm_of_the_vocabulary() {
        let mut score = Score::default();
        score.add(&[1e4; 24], &[0, 7, 3], 8).unwrap();
        assert!((score.loss() - 8f64.ln()).abs() < 1e-12);
        assert_eq!(score.tokens(), 3);
        // 3 tokens of 3 bits over 2 characters.
        assert!((score.bits_per_character(2) - 4.5).abs() < 1e-12);
    }

    #[test]
    fn the_score_is_minus_the_log_of_the_softmax() {
        let mut score = Score::default();
        score.add(&[0.0, 1.0, 3.0], &[1], 3).unwrap();
        let expected = -(1f64.exp() / (1.0 + 1f64.exp() + 3f64.exp())).ln();
        assert!((score.nats() - expected).abs() < 1e-12);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let mut score = Score::default();
        assert!(matches!(
            score.add(&[0.0; 5], &[0, 1], 3),
            Err(Error::Argument(ArgumentError::Count { expected: 6, found: 5, .. }))
        ));
        assert!(matches!(
            score.add(&[0.0; 6], &[0, 3], 3),
            Err(Error::Argument(ArgumentError::TokenId { index: 1, .. }))
        ));
        assert!(matches!(
            score.add(&[0.0, f32::NAN, 0.0], &[0], 3),
            Err(Error::Data(DataError::NonFinite { index: 1, .. }))
        ));
        assert_eq!(score, Score::default());
    }
}
