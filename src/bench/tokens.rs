//! Token ids with the statistics of real text: the number of distinct ids decides the cost of the gate.
//!
//! Ids follow the law of Zipf and Mandelbrot: the k-th most frequent of 50 304 has weight `(k + 8)^-1.41`. Fitted to the
//! counts of distinct ids in English drama under the GPT-2 tokenizer, tokens per distinct id 3.9 at 4096 tokens, 5.0 at
//! 8192 and 8.5 at 32 768; the law gives 4.05, 5.07 and 8.16.

use crate::random::Random;

/// GPT-2's vocabulary, padded as training code pads it.
pub const VOCABULARY: u32 = 50_304;

const EXPONENT: f64 = 1.41;
const SHIFT: f64 = 8.0;

/// Odd and no multiple of 3 or 131, the factors of [`VOCABULARY`]: ranks times this are all different ids.
const SPREAD: u64 = 25_163;

/// `count` ids below [`VOCABULARY`]. Frequent ids are spread over the table, as real ones are.
pub fn text_like(count: usize, seed: u64) -> Vec<u32> {
    let mut total = 0.0;
    let mut cumulative = Vec::with_capacity(VOCABULARY as usize);
    for rank in 1..=VOCABULARY {
        total += (f64::from(rank) + SHIFT).powf(-EXPONENT);
        cumulative.push(total);
    }
    let mut random = Random::new(seed);
    let mut draw = || {
        let at = random.unit() * total;
        let rank = cumulative.partition_point(|&sum| sum < at).min(cumulative.len() - 1);
        (rank as u64 * SPREAD % u64::from(VOCABULARY)) as u32
    };
    (0..count).map(|_| draw()).collect()
}

/// Different ids among these.
pub fn distinct(ids: &[u32]) -> usize {
    ids.iter().collect::<std::collections::HashSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::{VOCABULARY, distinct, text_like};

    #[test]
    fn distinct_ids_are_as_many_as_in_english_text() {
        for (tokens, per_id) in [(4096, 3.9), (8192, 5.0), (32_768, 8.5)] {
            for seed in 0..5 {
                let ids = text_like(tokens, seed);
                assert!(ids.iter().all(|&id| id < VOCABULARY));
                let found = tokens as f64 / distinct(&ids) as f64;
                assert!((found / per_id - 1.0).abs() < 0.1, "{tokens} tokens, seed {seed}: {found} per distinct id");
            }
        }
    }

    #[test]
    fn uniform_ids_would_not_pass_for_text() {
        let ids = crate::random::Random::new(0).ids(32_768, VOCABULARY);
        assert!(32_768.0 / (distinct(&ids) as f64) < 2.0);
    }

    #[test]
    fn equal_seeds_give_equal_texts() {
        assert_eq!(text_like(100, 7), text_like(100, 7));
        assert_ne!(text_like(100, 7), text_like(100, 8));
        // A longer text begins like the shorter one.
        assert_eq!(text_like(100, 7)[..50], text_like(50, 7));
    }
}
