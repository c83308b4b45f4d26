//! Cases of `swiglu`: lengths around the workgroup's.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{Swiglu, swiglu};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let tolerance = Tolerance::sums(&[1]);
    for elements in [1, 63, 64, 65, 255, 257, 5000] {
        let op = Swiglu { elements: elements as u32 };
        each_variant(cases, elements, op, move |lab, launch| {
            let mut random = Random::new(SEED);
            let (a, b) = (random.values(elements, 3.0), random.values(elements, 1.0));
            let (gate, up, y) = (lab.floats(&a)?, lab.floats(&b)?, lab.output(elements)?);
            launch.run(lab, swiglu::Args { gate: &gate.region, up: &up.region, y: &y.region })?;
            Ok(vec![lab.compare(&y, &reference::swiglu(&widen(&a), &widen(&b)), tolerance)?])
        });
    }
}
