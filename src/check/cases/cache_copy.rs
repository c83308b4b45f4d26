//! Cases of `cache_copy`: words to the front, to the back, and none.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{CacheCopy, cache_copy};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        let op = CacheCopy { words, from_word, to_word };
        let id = format!("{words}_{from_word}_to_{to_word}");
        each_variant(cases, id, op, move |lab, launch| {
            let values = Random::new(SEED).values(600, 1.0);
            let cache = lab.floats(&values)?;
            launch.run(lab, cache_copy::Args { cache: &cache.region })?;
            let mut expected = widen(&values);
            reference::cache_copy(&mut expected, 1, from_word as usize, to_word as usize, words as usize);
            Ok(vec![lab.compare(&cache, &expected, Tolerance::EXACT)?])
        });
    }
}
