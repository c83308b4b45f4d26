//! Cases of `roofline_cooperative`: matrices of both sizes, from no product on.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{RooflineCooperative, roofline_cooperative};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (groups, iterations) in [(1, 0), (1, 1), (3, 100), (70, 7)] {
        for side in [16, 8] {
            let op = RooflineCooperative { groups, iterations, side };
            let (side, iterations) = (side as usize, iterations as usize);
            let tolerance = Tolerance::sums(&[iterations * side]);
            each_variant(cases, format!("{groups}x{iterations}"), op, move |lab, launch| {
                let values = Random::new(SEED).values(roofline_cooperative::FACTORS as usize * side * side, 1.0);
                let written = groups as usize * roofline_cooperative::PRODUCTS as usize * side * side;
                let (x, y) = (lab.floats(&values)?, lab.output(written)?);
                launch.run(lab, roofline_cooperative::Args { x: &x.region, y: &y.region })?;
                let expected = reference::roofline_cooperative(&widen(&values), side, iterations);
                Ok(vec![lab.compare(&y, &expected.repeat(groups as usize), tolerance)?])
            });
        }
    }
}
