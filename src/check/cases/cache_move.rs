//! Cases of `cache_move`: words to the front, to the back, and none.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::cache_move;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        cases.push(Case::new("cache_move", format!("{words}_{from_word}_to_{to_word}"), move |lab| {
            every_tuning(cache_move::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(600, 1.0);
                let source = lab.floats(&values)?;
                let before = Random::new(SEED + 1).values(600, 1.0);
                let sink = lab.floats(&before)?;
                let problem = cache_move::CacheMove { words, from_word, to_word };
                lab.launch(|recording| {
                    recording.add_variant(
                        &cache_move::ELEMENTS,
                        &problem,
                        cache_move::Args { source: &source.region, sink: &sink.region },
                        tuning,
                    )
                })?;
                let mut expected = widen(&before);
                let (from, to, rows) = (from_word as usize, to_word as usize, words as usize);
                reference::cache_move(&widen(&values), &mut expected, 1, from, to, rows);
                Ok(vec![lab.compare(&sink, &expected, Tolerance::EXACT)?])
            })
        }));
    }
}
