//! Cases of `norm`: both kinds, one and two segments a row, columns of wider rows.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::random::Random;
use crate::check::{Case, every_tuning};
use crate::kernels::{Norm, norm};
use crate::op::Variant;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let any = [(1, 1, 0), (3, 31, 7), (2, 63, 0), (5, 64, 8), (1, 65, 0), (7, 257, 3), (300, 24, 0)];
    let whole = [(1, 8, 0), (9, 32, 8), (2, 64, 0), (5, 1000, 264), (17, 264, 1032), (300, 24, 0), (3, 4096, 0)];
    for storage in Storage::ALL {
        for kind in [norm::Kind::Rms, norm::Kind::Layer] {
            for (index, sizes) in any.into_iter().enumerate() {
                // Odd cases read columns out of wider rows.
                let (offset, pitch) = if index % 2 == 1 { (3, 5) } else { (0, 0) };
                cases.push(norm_case(&norm::ROWS, sizes, (offset, pitch), kind, storage));
            }
            for (index, sizes) in whole.into_iter().enumerate() {
                let (offset, pitch) = if index % 2 == 1 { (8, 12) } else { (0, 0) };
                cases.push(norm_case(&norm::VEC4, sizes, (offset, pitch), kind, storage));
            }
        }
    }
}

fn norm_case(
    variant: &'static Variant<Norm>,
    (rows, width, second): (u32, u32, u32),
    (offset, more): (u32, u32),
    kind: norm::Kind,
    storage: Storage,
) -> Case {
    let whole = width + second;
    let pitch = whole + more;
    let problem = norm::Norm {
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
    let id = format!("{kind:?}_{rows}x{width}{behind}/{}", storage.name());
    Case::new(variant.spec.name, id, move |lab| {
        let tolerance = Tolerance::sums(&[width.max(second) as usize]);
        every_tuning(variant.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let mut values = random.values((offset + rows * pitch) as usize, 1.0);
            // A mean far from 0: E[x²] − mean² would lose digits here.
            values.iter_mut().for_each(|value| *value += 3.0);
            let x = lab.floats(&values)?;
            let (weight, w) = lab.stored(&random.values(whole as usize, 1.0), storage)?;
            let (bias, b) = lab.stored(&random.values(whole as usize, 1.0), storage)?;
            let y = lab.output((rows * whole) as usize)?;
            let args = norm::Args { x: &x.region, weight: &weight.region, bias: &bias.region, y: &y.region };
            lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
            let mut expected = Vec::new();
            for row in 0..rows {
                for (first, width) in [(0, width as usize), (width as usize, second as usize)] {
                    let segment = &values[(offset + row * pitch) as usize + first..][..width];
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
            Ok(vec![lab.compare(&y, &expected, tolerance)?])
        })
    })
}
