//! Cases of `roofline_fma`: elements around the workgroup's, from no step on.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::roofline_fma;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (elements, iterations) in [(1, 0), (63, 1), (64, 2), (65, 3), (255, 100), (257, 7)] {
        cases.push(Case::new("roofline_fma", format!("{elements}x{iterations}"), move |lab| {
            // Steps shrink what came before by `a`, so rounding errors do not add up beyond a dozen terms.
            let tolerance = Tolerance::sums(&[12]);
            every_tuning(roofline_fma::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let values = Random::new(SEED).values(elements, 1.0);
                let (x, y) = (lab.floats(&values)?, lab.output(elements)?);
                let args = roofline_fma::Args { x: &x.region, y: &y.region };
                let (a, b) = (0.75, 0.5);
                let problem = roofline_fma::RooflineFma { elements: elements as u32, iterations, a, b };
                lab.launch(|recording| recording.add_variant(&roofline_fma::ELEMENTS, &problem, args, tuning))?;
                let expected = reference::roofline_fma(&widen(&values), iterations as usize, a.into(), b.into());
                Ok(vec![lab.compare(&y, &expected, tolerance)?])
            })
        }));
    }
}
