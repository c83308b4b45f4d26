//! Cases of `cache_copy`: words to the front, to the back, and none.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::cache_copy;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        cases.push(Case::new("cache_copy", format!("{words}_{from_word}_to_{to_word}"), move |lab| {
            every_tuning(cache_copy::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(600, 1.0);
                let cache = lab.floats(&values)?;
                let problem = cache_copy::CacheCopy { words, from_word, to_word };
                lab.launch(|recording| {
                    recording.add_variant(
                        &cache_copy::ELEMENTS,
                        &problem,
                        cache_copy::Args { cache: &cache.region },
                        tuning,
                    )
                })?;
                let mut expected = widen(&values);
                reference::cache_copy(&mut expected, 1, from_word as usize, to_word as usize, words as usize);
                Ok(vec![lab.compare(&cache, &expected, Tolerance::EXACT)?])
            })
        }));
    }
}
