//! Cases of `residual_add`: lengths around the workgroup's, of one element an invocation and of four.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{ResidualAdd, residual_add};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let tolerance = Tolerance::sums(&[1]);
    for elements in [1, 4, 63, 64, 65, 252, 255, 257, 260, 1020, 1028, 5000] {
        each_variant(cases, elements, ResidualAdd { elements }, tolerance, move |lab, launch| {
            let mut random = Random::new(SEED);
            let (a, b) = (random.values(elements as usize, 1.0), random.values(elements as usize, 1.0));
            let (stream, delta) = (lab.floats(&a)?, lab.floats(&b)?);
            launch.run(lab, residual_add::Args { delta: &delta.region, stream: &stream.region })?;
            Ok(vec![lab.compare(&stream, &reference::residual_add(&widen(&a), &widen(&b)), tolerance)?])
        });
    }
}
