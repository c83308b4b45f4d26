//! `egmla check --random` and `--replay`: random layers with random histories of their caches.

use egmla::check::property::{self, LayerCase, Search};

use crate::adapter::Gpu;
use crate::console;
use crate::failure::Failure;

/// Histories that are drawn for a configuration before the next one has its pipelines compiled.
const CASES_A_CONFIGURATION: usize = 40;

/// Draws, runs and compares; what fails is printed as it shrank.
pub fn search(gpu: &Gpu, seed: u64, cases: usize) -> Result<(), Failure> {
    let configurations = cases.div_ceil(CASES_A_CONFIGURATION).max(4).min(cases);
    let report = property::search(&gpu.kernels, Search { seed, configurations, cases }).map_err(Failure::run)?;
    gpu.check()?;
    if let Some(failure) = report.failure {
        console::note(format_args!("drawn as {}", failure.drawn.to_json()));
        let case = failure.case.to_json();
        return Err(Failure::run(format!(
            "case {} of {cases}: {}; --replay '{case}'",
            report.compared + 1,
            failure.problem
        )));
    }
    let worst = report.worst.map_or(f64::NAN, |(part, _)| 100.0 * part);
    console::print(&format!(
        "{} cases of {configurations} configurations, {} tokens: all right, the worst at {worst:.0} % of its tolerance\n",
        report.compared, report.tokens
    ))
}

/// Reads a case.
pub fn read(case: &str) -> Result<LayerCase, Failure> {
    LayerCase::from_json(case).map_err(|error| Failure::usage(format!("--replay: {error}")))
}

/// Runs one case.
pub fn replay(gpu: &Gpu, case: &LayerCase) -> Result<(), Failure> {
    let comparison = case.run(&gpu.kernels).map_err(Failure::run)?;
    gpu.check()?;
    comparison.verdict.map_err(Failure::run)?;
    console::print(&format!("right, with a relative error of {:.1e}\n", comparison.relative_error))
}
