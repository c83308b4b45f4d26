//! Cases of `gate`: every activation with every norm, statistics out of order, rows of wider ones.

use super::{SEED, widen};
use crate::check::compare::Tolerance;
use crate::check::random::Random;
use crate::check::{Case, every_tuning};
use crate::config::{Activation, GateNorm};
use crate::kernels::{Gate, gate};
use crate::op::Variant;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let every = |rows, width| {
        let norms = move |activation| GateNorm::ALL.map(|norm| (activation, norm, rows, width));
        Activation::ALL.into_iter().flat_map(norms)
    };
    let normed = |(rows, width)| (Activation::Sigmoid, GateNorm::LayerNorm, rows, width);
    let any = [(1, 1), (3, 63), (2, 64), (1, 65), (4, 257), (130, 24)].map(normed);
    // The last has rows enough for several an invocation, and a rest.
    let whole = [(1, 8), (3, 64), (33, 1000), (4, 2056), (130, 24), (541, 16)].map(normed);
    for storage in Storage::ALL {
        for sizes in every(5, 33).chain(any) {
            cases.push(gate_case(&gate::ROWS, sizes, (2, 3), storage));
        }
        for sizes in every(35, 40).chain(whole) {
            cases.push(gate_case(&gate::VEC4, sizes, (4, 12), storage));
        }
    }
}

fn gate_case(
    variant: &'static Variant<Gate>,
    (activation, norm, rows, width): (Activation, GateNorm, u32, u32),
    (offset, more): (u32, u32),
    storage: Storage,
) -> Case {
    let id = format!("{activation:?}_{norm:?}_{rows}x{width}/{}", storage.name());
    Case::new(variant.spec.name, id, move |lab| {
        let tolerance = Tolerance::sums(&[width as usize, width as usize]);
        every_tuning(variant.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let pitch = width + more;
            let x_values = random.values((offset + rows * pitch) as usize, 1.0);
            let mut g_values = random.values((rows * width) as usize, 1.0);
            // Where exponentials overflow and tanh saturates.
            let ends = [95.0, -95.0].into_iter().cycle();
            g_values.iter_mut().step_by(11).zip(ends).for_each(|(value, end)| *value = end);
            let (x, g) = (lab.floats(&x_values)?, lab.floats(&g_values)?);
            let (weight, w) = lab.stored(&random.values(width as usize, 1.0), storage)?;
            let (bias, b) = lab.stored(&random.values(width as usize, 1.0), storage)?;
            // Statistics land backwards and one row apart; the last row has none.
            let statistics_rows = rows + 2;
            let slot = |row: u32| if row + 1 == rows { u32::MAX } else { rows - row };
            let slots = lab.words(&(0..rows).map(slot).collect::<Vec<_>>())?;
            let y = lab.output((rows * width) as usize)?;
            let statistics = lab.output(2 * statistics_rows as usize)?;
            let problem = gate::Gate {
                rows,
                width,
                x_offset: offset,
                x_row: pitch,
                eps: 1e-5,
                activation,
                norm,
                statistics_rows,
                storage,
            };
            let args = gate::Args {
                x: &x.region,
                g: &g.region,
                weight: &weight.region,
                bias: &bias.region,
                slots: &slots.region,
                y: &y.region,
                statistics: &statistics.region,
            };
            lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
            let row_of = |row: u32| &x_values[(offset + row * pitch) as usize..][..width as usize];
            let dense = widen(&(0..rows).flat_map(row_of).copied().collect::<Vec<_>>());
            let (weight, bias) = match norm {
                GateNorm::LayerNorm => (Some(&w[..]), Some(&b[..])),
                GateNorm::RmsNorm => (Some(&w[..]), None),
                GateNorm::None => (None, None),
            };
            let g = widen(&g_values);
            let expected = reference::gate(&dense, &g, activation, norm, weight, bias, width as usize, 1e-5);
            let mut all = vec![f64::NAN; 2 * statistics_rows as usize];
            for row in 0..rows.saturating_sub(1) {
                let at = 2 * slot(row) as usize;
                all[at..at + 2].copy_from_slice(&expected.statistics[row as usize]);
            }
            Ok(vec![lab.compare(&y, &expected.values, tolerance)?, lab.compare(&statistics, &all, tolerance)?])
        })
    })
}
