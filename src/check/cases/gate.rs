//! Cases of `gate`: every activation with every norm, statistics out of order, rows of wider ones, results in halves.

use super::{SEED, each_variant, equal_rows, spread, widen};
use crate::check::compare::{HALF_ROUNDOFF, Tolerance, UNIT_ROUNDOFF};
use crate::check::view::{Reading, View};
use crate::check::{Case, pack};
use crate::config::{Activation, GateNorm};
use crate::error::Result;
use crate::kernels::gate;
use crate::random::Random;
use crate::reference;
use crate::storage::{Segments, Storage};

pub(super) fn cases(cases: &mut Vec<Case>) {
    let norms = |activation, rows, segments| GateNorm::ALL.map(|norm| (activation, norm, rows, segments));
    let normed = |(rows, segments)| (Activation::Sigmoid, GateNorm::LayerNorm, rows, segments);
    let heads = |count, first, second| Segments { count, parts: [first, second] };
    // Parts that end anywhere in a load, and one that is not there.
    let padded = [
        (1, Segments::one(1)),
        (3, Segments::one(63)),
        (2, heads(1, 0, 5)),
        (1, heads(3, 5, 8)),
        (4, heads(9, 1, 3)),
        (530, heads(2, 3, 9)),
    ];
    // The last has rows enough for several per invocation, and a rest.
    let whole = [(1, 8), (3, 64), (33, 1000), (4, 2056), (130, 24), (541, 16)];
    let whole = whole.map(|(rows, width)| (rows, Segments::one(width)));
    for storage in Storage::ALL {
        let every = Activation::ALL.into_iter().flat_map(|activation| norms(activation, 35, heads(1, 24, 16)));
        // The padding matters to the norm alone.
        let cut = norms(Activation::Silu, 5, heads(3, 7, 4));
        let sizes = || cut.into_iter().chain(padded.map(normed)).chain(whole.map(normed));
        for sizes in every.chain(sizes()) {
            gate_cases(cases, sizes, [storage, Storage::F32], Values::Any);
        }
        // One element, and equal ones, have no spread.
        for sizes in [(3, Segments::one(1)), (3, heads(2, 70, 9)), (2, Segments::one(264))] {
            gate_cases(cases, normed(sizes), [storage, Storage::F32], Values::Equal);
        }
        // In halves, as layers of halves want them; some beyond the largest.
        for sizes in sizes().take(if storage == Storage::F16 { usize::MAX } else { cut.len() }) {
            gate_cases(cases, sizes, [storage, Storage::F16], Values::Any);
        }
        let unnormed = (Activation::Silu, GateNorm::None, 9, heads(3, 7, 16));
        gate_cases(cases, unnormed, [storage, Storage::F16], Values::Large);
    }
}

/// What the elements of x are.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    /// Of order 1.
    Any,
    /// Of order 1 and equal in a row, as those of g.
    Equal,
    /// Results on both sides of the largest half.
    Large,
}

fn gate_cases(
    cases: &mut Vec<Case>,
    (activation, norm, rows, segments): (Activation, GateNorm, u32, Segments),
    [storage, y_storage]: [Storage; 2],
    values: Values,
) {
    let Segments { count, parts: [first, second] } = segments;
    let (equal, halves) = (values == Values::Equal, y_storage == Storage::F16);
    let (of_values, scale) = match values {
        Values::Any => ("", 1.0),
        Values::Equal => ("equal_", 1.0),
        Values::Large => ("large_", 1e5),
    };
    let stored = if halves { "/y_f16" } else { "" };
    let sizes = format!("{activation:?}_{norm:?}_{rows}x{count}x{first}+{second}");
    let id = format!("{of_values}{sizes}/{}{stored}", storage.name());
    let (width, whole) = (segments.used() as usize, segments.width());
    let mut tolerance = Tolerance::sums(&[width, width]);
    if equal {
        // A product may be rounded for the mean and not for the result: its u of itself is divided by √eps.
        tolerance.relative += 4.0 * UNIT_ROUNDOFF / 1e-5f64.sqrt();
    }
    let of_statistics = tolerance;
    if halves {
        // WGSL does not say how pack2x16float rounds: a unit in the last place of f16.
        tolerance.relative += 2.0 * HALF_ROUNDOFF;
    }
    // Rows stand apart, behind an offset.
    let (offset, pitch) = (4, whole + 12);
    let op = gate::Gate {
        rows,
        segments,
        x_offset: offset,
        x_row: pitch,
        eps: 1e-5,
        activation,
        norm,
        statistics_rows: rows + 2,
        storage,
        y_storage,
    };
    each_variant(cases, id, op, move |lab, launch| {
        let mut random = Random::new(SEED);
        let mut dense = random.values(rows as usize * width, scale);
        if equal {
            equal_rows(&mut dense, width);
        }
        let mut x_values = random.values((offset + rows * pitch) as usize, 1.0);
        for (row, values) in spread(&dense, &segments.parts, || 0.0).chunks(whole as usize).enumerate() {
            x_values[offset as usize + row * pitch as usize..][..values.len()].copy_from_slice(values);
        }
        let mut g_values = random.values(rows as usize * width, 1.0);
        // Where exponentials overflow and tanh saturates.
        let ends = [95.0, -95.0].into_iter().cycle();
        if equal {
            equal_rows(&mut g_values, width);
        } else {
            g_values.iter_mut().step_by(11).zip(ends).for_each(|(value, end)| *value = end);
        }
        let (x, g) = (lab.floats(&x_values)?, lab.floats(&spread(&g_values, &segments.parts, || 0.5))?);
        let mut affine = || -> Result<_> {
            let values = random.values(width, 1.0);
            Ok((lab.stored(&spread(&values, &segments.parts, || 0.0), storage)?.0, pack(&values, storage).1))
        };
        let ((weight, w), (bias, b)) = (affine()?, affine()?);
        // Statistics land backwards and one row apart; the last row has none.
        let slot = |row: u32| if row + 1 == rows { u32::MAX } else { rows - row };
        let slots = lab.words(&(0..rows).map(slot).collect::<Vec<_>>())?;
        let y = lab.output((y_storage.sized(u64::from(rows * whole)) / 4) as usize)?;
        let statistics = lab.output(2 * op.statistics_rows as usize)?;
        let args = gate::Args {
            x: &x.region,
            g: &g.region,
            weight: &weight.region,
            bias: &bias.region,
            slots: &slots.region,
            y: &y.region,
            statistics: &statistics.region,
        };
        launch.run(lab, args)?;
        let (weight, bias) = match norm {
            GateNorm::LayerNorm => (Some(&w[..]), Some(&b[..])),
            GateNorm::RmsNorm => (Some(&w[..]), None),
            GateNorm::None => (None, None),
        };
        let (dense, g) = (widen(&dense), widen(&g_values));
        let expected = reference::gate(&dense, &g, activation, norm, weight, bias, width, 1e-5);
        let mut all = vec![f64::NAN; 2 * op.statistics_rows as usize];
        for row in 0..rows.saturating_sub(1) {
            let at = 2 * slot(row) as usize;
            all[at..at + 2].copy_from_slice(&expected.statistics[row as usize]);
        }
        let mut values = spread(&expected.values, &segments.parts, || 0.0);
        let of_y = View::all(if halves { Reading::F16 } else { Reading::F32 }, values.len());
        if halves {
            values.iter_mut().for_each(|value| *value = value.clamp(-65504.0, 65504.0));
        }
        let compared = lab.compare_views(&[(&lab.read(&y)?, of_y)], &values, tolerance);
        Ok(vec![compared, lab.compare(&statistics, &all, of_statistics)?])
    });
}
