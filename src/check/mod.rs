//! The one table of named cases: every kernel and the layer against the f64 reference, on the caller's adapter.
//!
//! ```no_run
//! # fn run(device: &egmla::wgpu::Device, queue: &egmla::wgpu::Queue) -> egmla::Result<()> {
//! let kernels = egmla::Kernels::new(device, queue)?;
//! for case in egmla::check::cases() {
//!     for outcome in case.run(&kernels)? {
//!         // A variant whose feature the device lacks is `Err("skipped: …")`, never `Ok`.
//!         println!("{} {}: {:?}", case.id(), outcome.tuning, outcome.verdict);
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! Memory is hostile: outputs, workspace and unused cache rows hold NaN before every launch, the padding of used cache rows holds
//! the largest half, guard words surround every buffer, and the GPU runs before the reference.
//!
//! [`prove`] runs one small case of each kernel that needs an optional feature, and says which to leave out.
//!
//! [`cases`] are named, [`property`] draws layers at random, and [`long`] measures the accuracy of long caches.

pub mod capture;
mod cases;
pub mod compare;
pub mod export;
pub mod guarded;
mod layer_cases;
pub mod long;
pub mod property;
mod prove;
pub mod view;

pub use prove::{Proofs, prove, prove_kernel};

use crate::adapter::Tuning;
use crate::device::Kernels;
use crate::error::Result;
use crate::readback;
use crate::recording::Recording;
use crate::storage::Storage;
use capture::Capture;
use compare::{Comparison, Tolerance, compare};
use guarded::Guarded;
use view::{Reading, View};

/// A named case.
pub struct Case {
    id: String,
    kernel: &'static str,
    run: Box<Run>,
}

type Run = dyn Fn(&Lab<'_>) -> Result<Vec<Outcome>> + Send + Sync;

/// The result of one variant of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// `auto`, the number of a forced tuning, or the way a layer was run.
    pub tuning: String,
    /// Relative 2-norm error of the result that is nearest to its tolerance.
    pub error: f64,
    /// The largest that is accepted.
    pub tolerance: f64,
    /// `Err` with one line that says what is wrong, also for a variant that was not run: see `skipped`.
    pub verdict: Result<(), String>,
    /// The device lacks a feature of this variant: not run, neither right nor wrong.
    pub skipped: bool,
    /// Number of comparisons, of which this is the worst; 0 if not run.
    pub comparisons: usize,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("id", &self.id).field("kernel", &self.kernel).finish_non_exhaustive()
    }
}

impl Case {
    fn new(
        kernel: &'static str,
        sizes: impl std::fmt::Display,
        run: impl Fn(&Lab<'_>) -> Result<Vec<Outcome>> + Send + Sync + 'static,
    ) -> Self {
        Case { id: format!("{kernel}/{sizes}"), kernel, run: Box::new(run) }
    }

    /// `kernel/sizes/…`
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Stem of the kernel, or `layer`.
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    /// Runs every tuning of the case on a device, and waits.
    ///
    /// # Errors
    /// A kernel that cannot run, an overwritten guard word, or a lost device. A wrong result is an [`Outcome`].
    pub fn run(&self, kernels: &Kernels) -> Result<Vec<Outcome>> {
        (self.run)(&Lab { kernels, capture: None, once: false })
    }

    /// The same with the setting that the device takes by itself alone.
    fn run_once(&self, kernels: &Kernels) -> Result<Vec<Outcome>> {
        (self.run)(&Lab { kernels, capture: None, once: true })
    }
}

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut cases = cases::cases();
    cases.extend(layer_cases::cases());
    cases
}

/// A device to run cases on, or a capture that exports them.
struct Lab<'a> {
    kernels: &'a Kernels,
    /// Takes the place of the device: exports launches, readings and comparisons.
    capture: Option<&'a Capture>,
    /// Every kernel at one setting.
    once: bool,
}

/// Words of a region that were read back; the first content of the region if nothing ran.
struct Words {
    words: Vec<u32>,
    /// Of a capture: the number of the reading.
    number: usize,
}

impl Lab<'_> {
    /// The settings to run of so many.
    fn settings(&self, tunings: usize) -> impl Iterator<Item = Tuning> + use<> {
        settings(if self.once { 0 } else { tunings })
    }

    fn floats(&self, values: &[f32]) -> Result<Guarded> {
        Guarded::filled(self.kernels, "input", bytemuck::cast_slice(values))
    }

    fn words(&self, values: &[u32]) -> Result<Guarded> {
        Guarded::filled(self.kernels, "input", values)
    }

    /// A tensor in the given storage, and its values as they are stored.
    fn stored(&self, values: &[f32], storage: Storage) -> Result<(Guarded, Vec<f64>)> {
        let (words, kept) = pack(values, storage);
        Ok((self.words(&words)?, kept))
    }

    fn output(&self, words: usize) -> Result<Guarded> {
        Guarded::poisoned(self.kernels, "output", words)
    }

    fn launch(&self, record: impl FnOnce(&mut Recording) -> Result<()>) -> Result<()> {
        let mut recording = Recording::new(self.kernels);
        record(&mut recording)?;
        self.submit(&mut recording)
    }

    fn submit(&self, recording: &mut Recording) -> Result<()> {
        match self.capture {
            None => readback::submit(recording),
            Some(capture) => capture.submit(recording),
        }
    }

    fn read(&self, region: &Guarded) -> Result<Words> {
        let words = region.read(self.kernels)?;
        let number = self.capture.map_or(Ok(0), |capture| capture.read(region))?;
        Ok(Words { words, number })
    }

    /// Compares a region, all of it as f32.
    fn compare(&self, got: &Guarded, expected: &[f64], tolerance: Tolerance) -> Result<Comparison> {
        let words = self.read(got)?;
        Ok(self.compare_views(&[(&words, View::all(Reading::F32, words.words.len()))], expected, tolerance))
    }

    /// Compares views, one after another. Every comparison of a case is made here, so a capture misses none.
    fn compare_views(&self, parts: &[(&Words, View)], expected: &[f64], tolerance: Tolerance) -> Comparison {
        if let Some(capture) = self.capture {
            let parts = parts.iter().map(|(words, view)| (words.number, *view)).collect();
            capture.compare(parts, expected, tolerance);
        }
        let got: Vec<f32> = parts.iter().flat_map(|(words, view)| view.apply(&words.words)).collect();
        compare(&got, expected, tolerance)
    }
}

/// Words of a tensor in the given storage, and its values as they are stored.
pub(crate) fn pack(values: &[f32], storage: Storage) -> (Vec<u32>, Vec<f64>) {
    match storage {
        Storage::F32 => {
            (values.iter().map(|value| value.to_bits()).collect(), values.iter().map(|&value| value.into()).collect())
        }
        Storage::F16 => {
            let halves: Vec<half::f16> = values.iter().map(|&value| half::f16::from_f32(value)).collect();
            let word = |pair: &[half::f16]| {
                let high = pair.get(1).map_or(0, |high| u32::from(high.to_bits()));
                u32::from(pair[0].to_bits()) | high << 16
            };
            (halves.chunks(2).map(word).collect(), halves.iter().map(|half| half.to_f64()).collect())
        }
    }
}

/// What stands for the outcomes of a case that the device is not offered, with the reason.
fn not_run(reason: String) -> Outcome {
    Outcome {
        tuning: "-".to_owned(),
        error: f64::NAN,
        tolerance: f64::NAN,
        verdict: Err(format!("skipped: {reason}")),
        skipped: true,
        comparisons: 0,
    }
}

/// `Auto` and every forced tuning.
fn settings(tunings: usize) -> impl Iterator<Item = Tuning> {
    std::iter::once(Tuning::Auto).chain((0..tunings).map(Tuning::Forced))
}

/// What an outcome calls it.
fn name_of(tuning: Tuning) -> String {
    match tuning {
        Tuning::Auto => "auto".to_owned(),
        Tuning::Forced(index) => index.to_string(),
    }
}

/// Several comparisons, and the error of the one that is nearest to its tolerance; none at all is a failure, since nothing was
/// compared.
fn outcome(tuning: String, comparisons: Vec<Comparison>) -> Outcome {
    let nearness = |one: &Comparison| one.relative_error / one.tolerance.max(f64::MIN_POSITIVE);
    let nearest = comparisons.iter().max_by(|a, b| nearness(a).total_cmp(&nearness(b)));
    let (error, tolerance) = nearest.map_or((f64::NAN, f64::NAN), |one| (one.relative_error, one.tolerance));
    let count = comparisons.len();
    let none = comparisons.is_empty().then(|| "nothing was compared".to_owned());
    let problem = none.or_else(|| comparisons.into_iter().find_map(|comparison| comparison.verdict.err()));
    Outcome { tuning, error, tolerance, verdict: problem.map_or(Ok(()), Err), skipped: false, comparisons: count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_has_the_error_nearest_to_its_tolerance() {
        let of = |relative_error, tolerance| Comparison { relative_error, tolerance, verdict: Ok(()) };
        let found = outcome("auto".to_owned(), vec![of(3e-4, 1e-3), of(2e-6, 2.7e-6), of(0.0, 0.0)]);
        assert_eq!((found.error, found.tolerance, found.comparisons), (2e-6, 2.7e-6, 3));
        assert_eq!(found.verdict, Ok(()));
        assert_eq!(outcome("auto".to_owned(), Vec::new()).verdict, Err("nothing was compared".to_owned()));
    }
}
