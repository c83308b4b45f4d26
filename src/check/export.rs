//! The case table as data, for a host without Rust that runs the cases and judges them.

use serde::Serialize;

use super::capture::{Action, Blob, Blobs, BufferData, Capture, ComparisonData, ToleranceData};
use super::compare::{F32_LIMIT, Tolerance, compare};
use super::guarded::POISON;
use super::view::{Reading, View};
use super::{Case, Lab};
use crate::adapter::{AdapterClass, PlanContext};
use crate::device::Kernels;
use crate::error::{ArgumentError, Error, Result};
use crate::random::Random;

/// A case: buffers, actions, and the comparisons of every variant.
#[derive(Debug, Serialize)]
pub struct CaseData {
    /// [`Case::id`]
    pub id: String,
    /// [`Case::kernel`]
    pub kernel: &'static str,
    /// Every buffer that is used.
    pub buffers: Vec<BufferData>,
    /// Actions, in order.
    pub actions: Vec<Action>,
    /// Its variants.
    pub variants: Vec<VariantData>,
}

/// A variant of a case: one [`super::Outcome`].
#[derive(Debug, Serialize)]
pub struct VariantData {
    /// As [`super::Outcome::tuning`].
    pub tuning: String,
    /// Why the variant was not planned, for want of a feature; it then has no comparisons.
    pub skipped: Option<String>,
    /// All must hold.
    pub comparisons: Vec<ComparisonData>,
}

/// The context of plans for a page: WebGPU's default limits and, if the host enables the feature `subgroups`, subgroups of `.0`
/// to `.1` invocations.
pub fn webgpu(subgroups: Option<(u32, u32)>) -> PlanContext {
    // A browser does not report its kind of adapter.
    let plain = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    match subgroups {
        None => plain,
        Some((subgroup_min_size, subgroup_max_size)) => {
            PlanContext { features: wgpu::Features::SUBGROUP, subgroup_min_size, subgroup_max_size, ..plain }
        }
    }
}

impl Case {
    /// Exports the case and its bytes, planned for `context`. No kernel runs: buffers are allocated on the device of `kernels` to
    /// read their first content back.
    ///
    /// # Errors
    /// A kernel that cannot run, a comparison outside of the case's own list, or a lost device.
    pub fn export(&self, kernels: &Kernels, context: PlanContext) -> Result<(CaseData, Blobs)> {
        let capture = Capture::new(kernels, context);
        let outcomes = (self.run)(&Lab { kernels: capture.kernels(), capture: Some(&capture), once: false })?;
        let captured = capture.finish();
        let named: usize = outcomes.iter().map(|outcome| outcome.comparisons).sum();
        if named != captured.comparisons.len() {
            let (expected, found) = (named as u64, captured.comparisons.len() as u64);
            return Err(Error::Argument(ArgumentError::Count {
                what: "comparisons of a case that were written down",
                expected,
                found,
            }));
        }
        let mut comparisons = captured.comparisons.into_iter();
        let variants = outcomes
            .into_iter()
            .map(|outcome| VariantData {
                comparisons: comparisons.by_ref().take(outcome.comparisons).collect(),
                skipped: if outcome.skipped { outcome.verdict.err() } else { None },
                tuning: outcome.tuning,
            })
            .collect();
        let (id, kernel) = (self.id.clone(), self.kernel);
        Ok((CaseData { id, kernel, buffers: captured.buffers, actions: captured.actions, variants }, captured.blobs))
    }
}

/// Results, right and wrong ones, with this crate's verdicts: another comparator must agree.
#[derive(Debug, Serialize)]
pub struct Verdicts {
    /// A word that nobody wrote.
    pub poison: u32,
    /// Readings of words.
    pub views: Vec<ViewData>,
    /// Results and their verdicts.
    pub results: Vec<ResultData>,
}

/// A view and its elements.
#[derive(Debug, Serialize)]
pub struct ViewData {
    /// Words of a region.
    pub words: Blob,
    /// The view of them.
    pub view: View,
    /// As f32.
    pub shows: Blob,
}

/// A result and what the comparator says of it.
#[derive(Debug, Serialize)]
pub struct ResultData {
    /// Its defect, in words.
    pub what: &'static str,
    /// f32
    pub got: Blob,
    /// f64
    pub expected: Blob,
    /// The tolerance.
    pub tolerance: ToleranceData,
    /// The relative error; null where it is not a number.
    pub error: Option<f64>,
    /// Whether it passes.
    pub right: bool,
}

/// Truths and lies with their verdicts, and the bytes that they name.
pub fn verdicts() -> (Verdicts, Blobs) {
    let mut blobs = Blobs::default();
    let mut results = Vec::new();
    let tolerance = Tolerance { relative: F32_LIMIT };
    let width = 16;
    let mut random = Random::new(3);
    let truth = random.values(12 * width, 1.0);
    let expected: Vec<f64> = truth.iter().map(|&value| f64::from(value) * (1.0 + 1e-7)).collect();
    let mut add = |what: &'static str, got: &[f32], expected: &[f64], tolerance: Tolerance| {
        let comparison = compare(got, expected, tolerance);
        let error = comparison.relative_error;
        results.push(ResultData {
            what,
            got: blobs.add(bytemuck::cast_slice(got)),
            expected: blobs.add(bytemuck::cast_slice(expected)),
            tolerance: tolerance.into(),
            error: error.is_finite().then_some(error),
            right: comparison.verdict.is_ok(),
        });
    };
    let with = |index: usize, value: f32| {
        let mut got = truth.clone();
        got[index] = value;
        got
    };
    let mut infinite = expected.clone();
    infinite[5] = f64::NEG_INFINITY;
    let mut swapped = truth.clone();
    let (upper, lower) = swapped[2 * width..].split_at_mut(width);
    upper.swap_with_slice(&mut lower[..width]);
    let mut shifted = truth.clone();
    shifted.rotate_left(width);
    let scaled = |by: f32| truth.iter().map(|value| value * by).collect::<Vec<_>>();
    add("the truth", &truth, &expected, tolerance);
    add("the truth, held to every bit", &truth, &expected, Tolerance::EXACT);
    add("itself, held to every bit", &truth, &truth.iter().map(|&x| x.into()).collect::<Vec<f64>>(), Tolerance::EXACT);
    add("one NaN", &with(37, f32::NAN), &expected, tolerance);
    add("the mark of memory that nobody wrote", &with(37, f32::from_bits(POISON)), &expected, tolerance);
    add("an infinity", &with(5, f32::INFINITY), &expected, tolerance);
    add("a number where an infinity belongs", &truth, &infinite, tolerance);
    add("an infinity of the other sign", &with(5, f32::INFINITY), &infinite, tolerance);
    add("NaN where an infinity belongs", &with(5, f32::NAN), &infinite, tolerance);
    add("the right infinity", &with(5, f32::NEG_INFINITY), &infinite, tolerance);
    add("all NaN", &vec![f32::NAN; truth.len()], &expected, tolerance);
    add("all zero", &vec![0.0; truth.len()], &expected, tolerance);
    add("zeros for zeros", &[0.0; 4], &[0.0; 4], tolerance);
    let tiny = f32::MIN_POSITIVE / 4.0;
    add("subnormal numbers flushed", &[0.0; 2], &[tiny.into(), (-tiny).into()], tolerance);
    add("a subnormal number of the other sign", &[0.0, tiny], &[tiny.into(), (-tiny).into()], tolerance);
    add("the smallest normal number flushed", &[0.0], &[f32::MIN_POSITIVE.into()], tolerance);
    add("noise on zeros", &[1e-6, 0.0], &[0.0; 2], tolerance);
    add("a result of another input", &shifted, &expected, tolerance);
    add("two rows swapped", &swapped, &expected, tolerance);
    add("one per cent of scale", &scaled(1.01), &expected, tolerance);
    add("a little within the tolerance", &scaled(1.0 + 0.9 * F32_LIMIT as f32), &expected, tolerance);
    add("a little beyond the tolerance", &scaled(1.0 + 1.1 * F32_LIMIT as f32), &expected, tolerance);
    add("one element off, within the norm", &with(9, truth[9] + 1e-3), &expected, Tolerance { relative: 1e-4 });
    add("an element missing", &truth[1..], &expected, tolerance);
    add("nothing", &[], &expected, tolerance);
    add("nothing for nothing", &[], &[], tolerance);

    let floats: Vec<u32> =
        [1.5f32, -2.0, f32::MIN, 0.0, 3.25, f32::NAN, 1e30, 4.0].iter().map(|value| value.to_bits()).collect();
    let halves = vec![0x4000_3c00, 0xbc00_0001, 0x7c00_fc00, 0x7e00_83ff];
    let whole = vec![7, u32::MAX, POISON, 16_777_217];
    let all = |reading, count| View::all(reading, count);
    let table = View { reading: Reading::F32, first: 1, counts: [2, 2], strides: [3, 2] };
    let views = [
        (&floats, all(Reading::F32, 8)),
        (&floats, table),
        (&floats, View { counts: [3, 3], ..table }),
        (&floats, View { reading: Reading::Marked, first: 0, counts: [4, 1], strides: [2, 1] }),
        (&floats, View { reading: Reading::LogSumExp, first: 0, counts: [4, 1], strides: [2, 1] }),
        (&halves, all(Reading::F16, 8)),
        (&halves, View { reading: Reading::F16, first: 1, counts: [2, 2], strides: [4, 1] }),
        (&whole, all(Reading::U32, 4)),
        (&whole, all(Reading::Written, 4)),
        (&whole, all(Reading::F32, 0)),
    ];
    let views = views.map(|(words, view)| ViewData {
        words: blobs.add(bytemuck::cast_slice(words)),
        view,
        shows: blobs.add(bytemuck::cast_slice(&view.apply(words))),
    });
    (Verdicts { poison: POISON, views: views.into(), results }, blobs)
}
