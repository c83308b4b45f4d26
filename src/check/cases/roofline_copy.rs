//! Cases of `roofline_copy`: vectors around its workgroups' sizes.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::kernels::{RooflineCopy, roofline_copy};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    // Vectors of four around the workgroups' 256 and 1024.
    for vectors in [1, 63, 255, 256, 257, 1023, 1025, 5000] {
        let op = RooflineCopy { words: 4 * vectors };
        each_variant(cases, op.words, op, |lab, launch| {
            let words = launch.op.words as usize;
            let values = Random::new(SEED).values(words, 1.0);
            let (x, y) = (lab.floats(&values)?, lab.output(words)?);
            launch.run(lab, roofline_copy::Args { x: &x.region, y: &y.region })?;
            Ok(vec![lab.compare(&y, &reference::roofline_copy(&widen(&values)), Tolerance::EXACT)?])
        });
    }
}
