//! Cases of `swiglu`: lengths around the workgroup's.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::swiglu;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for elements in [1, 63, 64, 65, 255, 257, 5000] {
        cases.push(Case::new("swiglu", elements, move |lab| {
            let tolerance = Tolerance::sums(&[1]);
            every_tuning(swiglu::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 3.0), random.values(elements, 1.0));
                let (gate, up, y) = (lab.floats(&a)?, lab.floats(&b)?, lab.output(elements)?);
                let args = swiglu::Args { gate: &gate.region, up: &up.region, y: &y.region };
                let problem = swiglu::Swiglu { elements: elements as u32 };
                lab.launch(|recording| recording.add_variant(&swiglu::ELEMENTS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&y, &reference::swiglu(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
    }
}
