//! Cases of `norm`: both kinds, rows of one and of two segments, columns of wider rows.

use super::{SEED, each_variant, equal_rows, spread, widen};
use crate::check::compare::Tolerance;
use crate::check::{Case, pack};
use crate::error::Result;
use crate::kernels::norm;
use crate::random::Random;
use crate::reference;
use crate::storage::{Storage, padded_width};

pub(super) fn cases(cases: &mut Vec<Case>) {
    // Segments that end anywhere in a load, then whole ones.
    let padded = [(1, 1, 0), (3, 31, 7), (2, 63, 0), (5, 64, 10), (1, 65, 0), (7, 257, 3), (300, 22, 0)];
    let whole = [(1, 8, 0), (9, 32, 8), (2, 64, 0), (5, 1000, 264), (17, 264, 1032), (300, 24, 0), (3, 4096, 0)];
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
            for sizes in [(3, 1, 0), (3, 131, 0), (2, 264, 0)] {
                norm_cases(cases, sizes, (0, 0), kind, storage, true);
            }
        }
    }
}

fn norm_cases(
    cases: &mut Vec<Case>,
    (rows, width, second): (u32, u32, u32),
    (offset, more): (u32, u32),
    kind: norm::Kind,
    storage: Storage,
    equal: bool,
) {
    let parts = [width, second];
    let whole = padded_width(width) + padded_width(second);
    let pitch = whole + more;
    let op = norm::Norm {
        rows,
        width,
        second,
        x_offset: offset,
        x_row: pitch,
        eps: 1e-6,
        kind,
        bias: kind == norm::Kind::Layer,
        storage,
    };
    let behind = if second > 0 { format!("+{second}") } else { String::new() };
    let equal_name = if equal { "equal_" } else { "" };
    let id = format!("{equal_name}{kind:?}_{rows}x{width}{behind}/{}", storage.name());
    let tolerance = Tolerance::sums(&[width.max(second) as usize]);
    each_variant(cases, id, op, tolerance, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut values = random.values((offset + rows * pitch) as usize, 1.0);
        // A mean far from 0: E[x²] − mean² would lose digits here.
        values.iter_mut().for_each(|value| *value += 3.0);
        if equal {
            equal_rows(&mut values, pitch as usize);
        }
        let x = lab.floats(&values)?;
        let mut affine = || -> Result<_> {
            let values = random.values((width + second) as usize, 1.0);
            Ok((lab.stored(&spread(&values, &parts, || 0.0), storage)?.0, pack(&values, storage).1))
        };
        let ((weight, w), (bias, b)) = (affine()?, affine()?);
        let y = lab.output((rows * whole) as usize)?;
        let args = norm::Args { x: &x.region, weight: &weight.region, bias: &bias.region, y: &y.region };
        launch.run(lab, args)?;
        let mut expected = Vec::new();
        for row in 0..rows {
            let segments = [(0, 0, width as usize), (padded_width(width) as usize, width as usize, second as usize)];
            for (at, first, width) in segments {
                let segment = &values[(offset + row * pitch) as usize + at..][..width];
                let (dense, part) = (widen(segment), first..first + width);
                expected.extend(match kind {
                    _ if width == 0 => Vec::new(),
                    norm::Kind::Rms => reference::rms_norm(&dense, Some(&w[part]), width, 1e-6),
                    norm::Kind::Layer => {
                        reference::layer_norm(&dense, Some(&w[part.clone()]), Some(&b[part]), width, 1e-6)
                    }
                });
            }
        }
        Ok(vec![lab.compare(&y, &spread(&expected, &parts, || 0.0), tolerance)?])
    });
}
