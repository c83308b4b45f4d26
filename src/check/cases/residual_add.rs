//! Cases of `residual_add`: lengths around the workgroup's.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::residual_add;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for elements in [1, 63, 64, 65, 255, 257, 5000] {
        cases.push(Case::new("residual_add", elements, move |lab| {
            let tolerance = Tolerance::sums(&[1]);
            every_tuning(residual_add::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 1.0), random.values(elements, 1.0));
                let (stream, delta) = (lab.floats(&a)?, lab.floats(&b)?);
                let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
                let problem = residual_add::ResidualAdd { elements: elements as u32 };
                lab.launch(|recording| recording.add_variant(&residual_add::ELEMENTS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&stream, &reference::residual_add(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
    }
}
