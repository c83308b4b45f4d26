//! Cases of `residual_add`: lengths around the workgroup's, of one element an invocation and of four.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{ResidualAdd, residual_add};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let tolerance = Tolerance::sums(&[1]);
    let lengths = [1, 4, 63, 64, 65, 252, 255, 257, 260, 1020, 1028, 5000].map(|elements| (elements, 1.0));
    // A factor, for a remainder and for whole loads.
    for (elements, factor) in lengths.into_iter().chain([(257, 0.178), (260, 0.178)]) {
        let id = if factor == 1.0 { elements.to_string() } else { format!("{elements}_by_{factor}") };
        each_variant(cases, id, ResidualAdd { elements, factor }, move |lab, launch| {
            let mut random = Random::new(SEED);
            let (a, b) = (random.values(elements as usize, 1.0), random.values(elements as usize, 1.0));
            let (stream, delta) = (lab.floats(&a)?, lab.floats(&b)?);
            launch.run(lab, residual_add::Args { delta: &delta.region, stream: &stream.region })?;
            Ok(vec![lab.compare(
                &stream,
                &reference::residual_add(&widen(&a), &widen(&b), factor.into()),
                tolerance,
            )?])
        });
    }
}
