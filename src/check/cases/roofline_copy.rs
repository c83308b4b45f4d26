//! Cases of `roofline_copy`: vectors around its workgroups' sizes.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, every_tuning};
use crate::kernels::roofline_copy;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    // Vectors of four around the workgroups' 256 and 1024.
    for vectors in [1, 63, 255, 256, 257, 1023, 1025, 5000] {
        cases.push(Case::new("roofline_copy", 4 * vectors, move |lab| {
            every_tuning(roofline_copy::VECTORS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(4 * vectors, 1.0);
                let (x, y) = (lab.floats(&values)?, lab.output(4 * vectors)?);
                let args = roofline_copy::Args { x: &x.region, y: &y.region };
                let problem = roofline_copy::RooflineCopy { words: 4 * vectors as u32 };
                lab.launch(|recording| recording.add_variant(&roofline_copy::VECTORS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&y, &reference::roofline_copy(&widen(&values)), Tolerance::EXACT)?])
            })
        }));
    }
}
