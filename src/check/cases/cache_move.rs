//! Cases of `cache_move`: words to the front, to the back, and none.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{CacheMove, cache_move};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        let op = CacheMove { words, from_word, to_word };
        let id = format!("{words}_{from_word}_to_{to_word}");
        each_variant(cases, id, op, move |lab, launch| {
            let values = Random::new(SEED).values(600, 1.0);
            let source = lab.floats(&values)?;
            let before = Random::new(SEED + 1).values(600, 1.0);
            let sink = lab.floats(&before)?;
            launch.run(lab, cache_move::Args { source: &source.region, sink: &sink.region })?;
            let mut expected = widen(&before);
            let (from, to, rows) = (from_word as usize, to_word as usize, words as usize);
            reference::cache_move(&widen(&values), &mut expected, 1, from, to, rows);
            Ok(vec![lab.compare(&sink, &expected, Tolerance::EXACT)?])
        });
    }
}
