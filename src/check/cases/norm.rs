//! Cases of `norm`: both kinds, rows with and without padding, columns of wider rows.

use super::{SEED, each_variant, equal_rows, spread, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::error::Result;
use crate::kernels::norm;
use crate::random::Random;
use crate::reference;
use crate::storage::{Storage, padded_width};

pub(super) fn cases(cases: &mut Vec<Case>) {
    // Rows that end anywhere in a load, then whole ones.
    let padded = [(1, 1), (3, 31), (2, 63), (5, 10), (1, 65), (7, 257), (300, 22)];
    let whole = [(1, 8), (9, 32), (2, 64), (5, 1000), (17, 1032), (300, 24), (3, 4096)];
    for storage in Storage::ALL {
        for kind in [norm::Kind::Rms, norm::Kind::Layer] {
            for sizes in [padded, whole] {
                for (index, sizes) in sizes.into_iter().enumerate() {
                    // Odd cases read columns out of wider rows.
                    let apart = if index % 2 == 1 { (8, 12) } else { (0, 0) };
                    norm_cases(cases, sizes, apart, kind, storage, false);
                }
            }
            // One element, and equal ones, have no spread.
            for sizes in [(3, 1), (3, 131), (2, 264)] {
                norm_cases(cases, sizes, (0, 0), kind, storage, true);
            }
        }
    }
}

fn norm_cases(
    cases: &mut Vec<Case>,
    (rows, width): (u32, u32),
    (offset, more): (u32, u32),
    kind: norm::Kind,
    storage: Storage,
    equal: bool,
) {
    let parts = [width];
    let whole = padded_width(width);
    let pitch = whole + more;
    let op = norm::Norm {
        rows,
        width,
        x_offset: offset,
        x_row: pitch,
        eps: 1e-6,
        kind,
        bias: kind == norm::Kind::Layer,
        storage,
    };
    let equal_name = if equal { "equal_" } else { "" };
    let id = format!("{equal_name}{kind:?}_{rows}x{width}/{}", storage.name());
    let tolerance = Tolerance::sums(&[width as usize]);
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut values = random.values((offset + rows * pitch) as usize, 1.0);
        // A mean far from 0: E[x²] − mean² would lose digits here.
        values.iter_mut().for_each(|value| *value += 3.0);
        if equal {
            equal_rows(&mut values, pitch as usize);
        }
        let x = lab.floats(&values)?;
        let mut affine = || -> Result<_> {
            let values = random.values(width as usize, 1.0);
            Ok((lab.stored(&spread(&values, &parts, || 0.0), storage)?.0, pack(&values, storage).1))
        };
        let ((weight, w), (bias, b)) = (affine()?, affine()?);
        let y = lab.output((rows * whole) as usize)?;
        let args = norm::Args { x: &x.region, weight: &weight.region, bias: &bias.region, y: &y.region };
        launch.run(lab, args)?;
        let row = |row: u32| widen(&values[(offset + row * pitch) as usize..][..width as usize]);
        let dense: Vec<f64> = (0..rows).flat_map(row).collect();
        let expected = match kind {
            norm::Kind::Rms => reference::rms_norm(&dense, Some(&w), width as usize, 1e-6),
            norm::Kind::Layer => reference::layer_norm(&dense, Some(&w), Some(&b), width as usize, 1e-6),
        };
        Ok(vec![lab.compare(&y, &spread(&expected, &parts, || 0.0), tolerance)?])
    });
}
