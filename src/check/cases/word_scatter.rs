//! Cases of `word_scatter`: no word, one, and more than a workgroup has.

use super::{SEED, each_variant};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{WordScatter, word_scatter};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for count in [0, 1, 63, 300] {
        each_variant(cases, count, WordScatter { count, words: 700 }, move |lab, launch| {
            let values = Random::new(SEED).values(700, 1.0);
            let words = lab.floats(&values)?;
            let patches: Vec<[u32; 2]> = (0..count).map(|i| [(i * 37) % 700, (i as f32).to_bits()]).collect();
            let list = lab.words(bytemuck::cast_slice(&[&patches[..], &[[0; 2]]].concat()))?;
            launch.run(lab, word_scatter::Args { patches: &list.region, words: &words.region })?;
            let mut expected: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
            reference::word_scatter(&mut expected, &patches);
            let expected: Vec<f64> = expected.into_iter().map(|bits| f32::from_bits(bits).into()).collect();
            Ok(vec![lab.compare(&words, &expected, Tolerance::EXACT)?])
        });
    }
}
