//! `egmla check --random` and `--replay`: random layers with random histories of their caches.

use egmla::check::property::{self, LayerCase, Search};

use crate::adapter::Gpu;
use crate::console;
use crate::failure::Failure;
use crate::interrupt;

/// Histories that are drawn for a configuration before the next one has its pipelines compiled.
const CASES_A_CONFIGURATION: usize = 40;

/// Draws, runs and compares; what fails is printed as it shrank. A run that is interrupted says what it has compared.
pub fn search(gpu: &Gpu, seed: u64, cases: usize) -> Result<(), Failure> {
    let configurations = cases.div_ceil(CASES_A_CONFIGURATION).max(4).min(cases);
    let bar = console::interruptible(cases as u64, "cases");
    let report = property::search(&gpu.kernels, Search { seed, configurations, cases }, |compared| {
        bar.set_position(compared as u64);
        !interrupt::asked()
    })
    .map_err(Failure::run)?;
    bar.finish_and_clear();
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
    if report.compared == 0 {
        return Err(Failure::Interrupted);
    }
    let worst = report.worst.map_or(f64::NAN, |(part, _)| 100.0 * part);
    let interrupted = report.compared < cases;
    let of = if interrupted { format!(" of {cases}") } else { String::new() };
    let until = if interrupted { ", interrupted" } else { "" };
    console::print(&format!(
        "{}{of} cases of {configurations} configurations, {} tokens: all right, the worst at {worst:.0} % of its tolerance{until}\n",
        report.compared, report.tokens
    ))?;
    if interrupted { Err(Failure::Interrupted) } else { Ok(()) }
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
