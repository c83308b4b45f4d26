//! `egmla check`: every case against the reference, on the user's own adapter.

use std::time::Instant;

use clap::Args;
use comfy_table::Table;
use serde::Serialize;

use crate::adapter::{self, AdapterOption, Backend, Gpu};
use crate::console;
use crate::failure::Failure;

/// Options of `egmla check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    adapter: AdapterOption,
    /// Only the cases whose id contains S
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// One tuning of one case.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    kernel: String,
    tuning: String,
    /// Worst relative error; null in JSON where it is not a number.
    error: f64,
    tolerance: f64,
    passed: bool,
    problem: Option<String>,
    /// Of the whole case, in its first row: its tunings are run together.
    seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    adapter: String,
    passed: usize,
    failed: usize,
    rows: Vec<Row>,
}

/// Runs the cases.
pub fn run(args: CheckArgs) -> Result<(), Failure> {
    let mut cases = egmla::check::cases();
    let of = cases.len();
    if let Some(filter) = &args.filter {
        cases.retain(|case| case.id().contains(filter.as_str()));
    }
    if cases.is_empty() {
        let filter = args.filter.unwrap_or_default();
        return Err(Failure::usage(format!("no case contains `{filter}` (--filter); there are {of} cases")));
    }
    let backend = adapter::open(&args.adapter)?;
    let gpu = match &backend {
        Backend::Gpu(gpu) => gpu,
        // Never green without comparing.
        Backend::Cpu { .. } if args.adapter.adapter.trim().eq_ignore_ascii_case("auto") => {
            return Err(Failure::run(
                "no usable GPU adapter on this machine; install a driver, for instance Mesa's software Vulkan \
                 (mesa-vulkan-drivers)",
            ));
        }
        Backend::Cpu { .. } => {
            return Err(Failure::usage(
                "--adapter cpu: the CPU computes the reference itself, there is nothing to compare it with",
            ));
        }
    };
    let adapter = backend.describe();
    console::note(format_args!("adapter: {adapter}"));
    let mut rows = Vec::new();
    for case in &cases {
        rows.extend(run_case(gpu, case)?);
    }
    let failed = rows.iter().filter(|row| !row.passed).count();
    let report = Report { adapter, passed: rows.len() - failed, failed, rows };
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(Failure::run)? + "\n"
    } else {
        format!(
            "{}\n{} passed, {failed} failed of {} in {} cases\n",
            table(&report.rows),
            report.passed,
            report.rows.len(),
            cases.len()
        )
    };
    console::print(&text)?;
    conclude(&report.rows)
}

/// One failed comparison fails the run.
fn conclude(rows: &[Row]) -> Result<(), Failure> {
    let mut failed = rows.iter().filter(|row| !row.passed);
    let Some(first) = failed.next() else { return Ok(()) };
    Err(Failure::run(format!(
        "{} of {} comparisons failed; the first is {} ({}): {}",
        1 + failed.count(),
        rows.len(),
        first.id,
        first.tuning,
        first.problem.as_deref().unwrap_or_default()
    )))
}

/// What a kernel refuses is a failed row; a lost device ends the run, since every later case would fail with it.
fn run_case(gpu: &Gpu, case: &egmla::check::Case) -> Result<Vec<Row>, Failure> {
    let start = Instant::now();
    let outcomes = case.run(&gpu.kernels, &gpu.queue);
    let seconds = start.elapsed().as_secs_f64();
    gpu.check()?;
    let row = |tuning: String, error, tolerance, problem: Option<String>| Row {
        id: case.id().to_owned(),
        kernel: case.kernel().to_owned(),
        tuning,
        error,
        tolerance,
        passed: problem.is_none(),
        problem,
        seconds: None,
    };
    let mut rows: Vec<_> = match outcomes {
        Ok(outcomes) => outcomes
            .into_iter()
            .map(|outcome| row(outcome.tuning, outcome.error, outcome.tolerance, outcome.verdict.err()))
            .collect(),
        Err(error @ egmla::Error::Device { .. }) => return Err(Failure::run(format!("{}: {error}", case.id()))),
        Err(error) => vec![row("-".to_owned(), f64::NAN, f64::NAN, Some(error.to_string()))],
    };
    if rows.is_empty() {
        rows.push(row("-".to_owned(), f64::NAN, f64::NAN, Some("nothing was compared".to_owned())));
    }
    rows[0].seconds = Some(seconds);
    Ok(rows)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["case", "kernel", "tuning", "error", "tolerance", "verdict", "time"]);
    for row in rows {
        let number = |value: f64| if value.is_nan() { "-".to_owned() } else { format!("{value:.1e}") };
        table.add_row([
            row.id.clone(),
            row.kernel.clone(),
            row.tuning.clone(),
            number(row.error),
            number(row.tolerance),
            row.problem.as_ref().map_or_else(|| "ok".to_owned(), |problem| format!("FAILED: {problem}")),
            row.seconds.map_or_else(String::new, |seconds| format!("{:.0} ms", seconds * 1e3)),
        ]);
    }
    table
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{Row, conclude};

    fn row(problem: Option<&str>) -> Row {
        Row {
            id: "matmul/1".to_owned(),
            kernel: "matmul".to_owned(),
            tuning: "auto".to_owned(),
            error: 0.0,
            tolerance: 1.0,
            passed: problem.is_none(),
            problem: problem.map(str::to_owned),
            seconds: None,
        }
    }

    #[test]
    fn one_failed_comparison_fails_the_run() {
        assert!(conclude(&[row(None), row(None)]).is_ok());
        let failure = conclude(&[row(None), row(Some("a NaN"))]).unwrap_err();
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(failure.message(), "1 of 2 comparisons failed; the first is matmul/1 (auto): a NaN");
    }
}
