//! The comparator: when a kernel's result is right. `tests/compare.rs` feeds it wrong results, each of which it must refuse.

/// Unit roundoff of f32: half the distance from 1 to the next number.
pub const UNIT_ROUNDOFF: f64 = 1.0 / 16_777_216.0;

/// Unit roundoff of f16.
pub const HALF_ROUNDOFF: f64 = 1.0 / 2048.0;

/// The largest relative 2-norm error that f32 storage may show, whatever a derivation allows.
pub const F32_LIMIT: f64 = 2e-5;

/// The same with weights or cache rounded to f16, against a reference that was not.
pub const F16_LIMIT: f64 = 5e-3;

/// The tolerance of a comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Largest relative error of the whole tensor: ‖got − expected‖₂ / ‖expected‖₂.
    pub relative: f64,
}

impl Tolerance {
    /// Data that is only moved: every bit must arrive.
    pub const EXACT: Tolerance = Tolerance { relative: 0.0 };

    /// For results of a chain of f32 sums of the given lengths.
    ///
    /// Rounding errors of a sum of n terms behave as a random walk: its relative error is about √n · u with unit roundoff
    /// u (Higham and Mary 2019, doi 10.1137/18M1226312, whose bound holds with a factor λ of a few; 4 here). Divisions,
    /// square roots and exponentials of the chain add the few u that WGSL grants them (exp: 3 + 2|x| units in the last
    /// place); 8 u cover those.
    pub fn sums(lengths: &[usize]) -> Self {
        let roots: f64 = lengths.iter().map(|&length| (length as f64).sqrt()).sum();
        Tolerance { relative: (4.0 * UNIT_ROUNDOFF * (roots + 8.0)).min(F32_LIMIT) }
    }

    /// For one element, against its own size or the tensor's root mean square, whichever is larger. The largest of a
    /// million normal deviates is 5 σ; rows of different conditioning take the rest.
    pub fn element(&self) -> f64 {
        32.0 * self.relative
    }
}

/// The result of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// ‖got − expected‖₂ / ‖expected‖₂; infinite where that is not a number.
    pub relative_error: f64,
    /// What it may be at most.
    pub tolerance: f64,
    /// One line that says what is wrong, with the worst index.
    pub verdict: Result<(), String>,
}

/// Compares a result with the reference: lengths, then positions of non-finite values, then every element by absolute or
/// relative error, then the whole tensor's relative norm. 0 is as right as a number below the smallest normal one: WGSL lets
/// an implementation flush those ("Differences from IEEE-754").
pub fn compare(got: &[f32], expected: &[f64], tolerance: Tolerance) -> Comparison {
    let limit = tolerance.relative;
    let fail =
        |relative_error: f64, problem: String| Comparison { relative_error, tolerance: limit, verdict: Err(problem) };
    if got.len() != expected.len() {
        return fail(f64::INFINITY, format!("{} elements, expected {}", got.len(), expected.len()));
    }
    let kind = |x: f64| (x.is_nan(), x.is_infinite().then_some(x > 0.0));
    let non_finite = |(g, e): (&f32, &f64)| kind(f64::from(*g)) != kind(*e);
    if let Some(index) = got.iter().zip(expected).position(non_finite) {
        let count = got.iter().zip(expected).filter(|&(g, e)| non_finite((g, e))).count();
        let (g, e) = (got[index], expected[index]);
        return fail(f64::INFINITY, format!("element {index} is {g}, expected {e} ({count} such)"));
    }
    let flushed = |g: f32, e: f64| if g == 0.0 && e.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { e };
    let finite =
        || got.iter().zip(expected).filter(|(_, e)| e.is_finite()).map(|(&g, &e)| (f64::from(g), flushed(g, e)));
    let norm = finite().map(|(_, e)| e * e).sum::<f64>().sqrt();
    let error = finite().map(|(g, e)| (g - e) * (g - e)).sum::<f64>().sqrt();
    let relative_error = if error == 0.0 { 0.0 } else { error / norm };
    let relative_error = if relative_error.is_nan() { f64::INFINITY } else { relative_error };
    let rms = norm / (expected.len().max(1) as f64).sqrt();

    // By how much each element exceeds what it may be off; the worst one is named.
    let excess = |&(_, &g, &e): &(usize, &f32, &f64)| {
        (f64::from(g) - flushed(g, e)).abs() / e.abs().max(rms).max(f64::MIN_POSITIVE)
    };
    let elements =
        || (0..).zip(got).zip(expected).map(|((index, g), e)| (index, g, e)).filter(|(_, _, e)| e.is_finite());
    let worst = elements().max_by(|a, b| excess(a).total_cmp(&excess(b)));
    if let Some(element) = worst
        && (excess(&element) > tolerance.element() || relative_error > limit)
    {
        let (index, g, e) = element;
        let problem = format!(
            "relative error {relative_error:.2e} of at most {limit:.2e}; worst element {index} is {g}, expected {e}"
        );
        return fail(relative_error, problem);
    }
    Comparison { relative_error, tolerance: limit, verdict: Ok(()) }
}
