//! Cases of `roofline_cooperative`: matrices of both sizes, from no product on.

use super::{SEED, widen};
use crate::adapter::Cooperative;
use crate::check::compare::Tolerance;
use crate::check::{Case, Lab, Outcome, every_tuning, skipped};
use crate::error::Result;
use crate::kernels::{RooflineCooperative, roofline_cooperative};
use crate::op::Variant;
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (groups, iterations) in [(1, 0), (1, 1), (3, 100), (70, 7)] {
        for variant in [&roofline_cooperative::BY_16, &roofline_cooperative::BY_8] {
            let id = format!("{groups}x{iterations}");
            cases.push(Case::new(variant.spec.name, id, move |lab| products(lab, variant, groups, iterations)));
        }
    }
}

/// Either kernel that multiplies matrices in registers.
fn products(
    lab: &Lab<'_>,
    variant: &'static Variant<RooflineCooperative>,
    groups: u32,
    iterations: u32,
) -> Result<Vec<Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let side = if variant.spec.cooperative == Cooperative::BY_16 { 16 } else { 8 };
    let problem = RooflineCooperative { groups, iterations, side };
    let (side, iterations) = (side as usize, iterations as usize);
    let tolerance = Tolerance::sums(&[iterations * side]);
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let values = Random::new(SEED).values(roofline_cooperative::FACTORS as usize * side * side, 1.0);
        let written = groups as usize * roofline_cooperative::PRODUCTS as usize * side * side;
        let (x, y) = (lab.floats(&values)?, lab.output(written)?);
        let args = roofline_cooperative::Args { x: &x.region, y: &y.region };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let expected = reference::roofline_cooperative(&widen(&values), side, iterations);
        Ok(vec![lab.compare(&y, &expected.repeat(groups as usize), tolerance)?])
    })
}
