//! Cases of `roofline_fma`: elements around the workgroup's, from no step on.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{RooflineFma, roofline_fma};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    // Steps shrink what came before by `a`, so rounding errors do not add up beyond a dozen terms.
    let tolerance = Tolerance::sums(&[12]);
    for (elements, iterations) in [(1, 0), (63, 1), (64, 2), (65, 3), (255, 100), (257, 7)] {
        let op = RooflineFma { elements, iterations, a: 0.75, b: 0.5 };
        each_variant(cases, format!("{elements}x{iterations}"), op, move |lab, launch| {
            let values = Random::new(SEED).values(elements as usize, 1.0);
            let (x, y) = (lab.floats(&values)?, lab.output(elements as usize)?);
            launch.run(lab, roofline_fma::Args { x: &x.region, y: &y.region })?;
            let expected = reference::roofline_fma(&widen(&values), iterations as usize, op.a.into(), op.b.into());
            Ok(vec![lab.compare(&y, &expected, tolerance)?])
        });
    }
}
