//! `egmla check`: every case against the reference, on the user's own adapter; random layers; what a long context costs.

mod long;
mod random;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use comfy_table::Table;
use egmla::Kernels;
use egmla::check::Outcome;
use egmla::low_level::WhyLeftOut;
use serde::Serialize;

use crate::adapter::{self, AdapterOption, Backend, Gpu, LimitsOption};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;

/// Options of `egmla check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    adapter: AdapterOption,
    /// What the device is opened with: `default`, WebGPU's default limits and no feature, every check of shaders, as on the least that a browser runs on;
    /// `adapter`, what the adapter has, as other commands do
    #[arg(long, value_name = "L", value_enum, default_value_t)]
    limits: LimitsOption,
    /// Only the cases whose id contains S
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Print every comparison, not only a line per kernel and what failed
    #[arg(long, short, conflicts_with = "json")]
    verbose: bool,
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
    /// Instead: the error of every way to attend at up to 65 536 cached tokens
    #[arg(long, conflicts_with = "filter")]
    long: bool,
    /// With --long: write the plot to DIR as SVG
    #[arg(long, value_name = "DIR", requires = "long")]
    svg: Option<PathBuf>,
    /// Instead: N random layers with random histories of their caches; the first that fails is shrunk and printed
    #[arg(long, value_name = "N", conflicts_with_all = ["filter", "json", "long"])]
    random: Option<usize>,
    /// Of --random: equal seeds, equal cases
    #[arg(long, value_name = "S", default_value_t = 1, requires = "random")]
    seed: u64,
    /// Instead: one case that --random printed
    #[arg(long, value_name = "CASE", conflicts_with_all = ["filter", "json", "long", "random"])]
    replay: Option<String>,
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
    /// Not run: the device lacks what the variant needs. Neither passed nor failed.
    skipped: bool,
    problem: Option<String>,
    /// Of the whole case, in its first row: its tunings are run together.
    seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    adapter: String,
    passed: usize,
    failed: usize,
    skipped: usize,
    /// By Ctrl-C: of the cases, those that had been run until then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    interrupted: bool,
    rows: Vec<Row>,
}

/// Runs the cases.
pub fn run(args: CheckArgs) -> Result<(), Failure> {
    // clap asks for --long only where nothing given excludes it.
    if args.svg.is_some() && !args.long {
        return Err(Failure::usage("--svg is the plot of --long: give both, or neither"));
    }
    let mut cases = egmla::check::cases();
    let of = cases.len();
    if let Some(filter) = &args.filter {
        cases.retain(|case| case.id().contains(filter.as_str()));
    }
    if cases.is_empty() {
        let filter = args.filter.unwrap_or_default();
        return Err(Failure::usage(format!("no case contains `{filter}` (--filter); there are {of} cases")));
    }
    // Read before a device is opened: a case that cannot be is bad input.
    let replayed = args.replay.as_deref().map(random::read).transpose()?;
    if args.random == Some(0) {
        return Err(Failure::usage("--random 0: there is nothing to compare"));
    }
    // One case has nothing to keep.
    if replayed.is_some() {
        interrupt::watch()
    } else {
        interrupt::watch_patiently()
    }
    let backend = adapter::open_with(&args.adapter, args.limits)?;
    let gpu = match &backend {
        Backend::Gpu(gpu) => gpu,
        // Never green without comparing.
        Backend::Cpu { .. } if args.adapter.adapter.trim().eq_ignore_ascii_case("auto") => {
            return Err(Failure::run(
                "no usable adapter on this machine; install a driver, for instance Mesa's software Vulkan \
                 (mesa-vulkan-drivers)",
            ));
        }
        Backend::Cpu { .. } => {
            return Err(Failure::usage(
                "--adapter cpu: the kernels run on adapters only, on the CPU there is nothing to compare with the reference",
            ));
        }
    };
    let adapter = backend.describe();
    console::note(format_args!("adapter: {adapter}"));
    if args.long {
        return long::run(gpu, args.json, args.svg.as_deref());
    }
    if let Some(cases) = args.random {
        return random::search(gpu, args.seed, cases);
    }
    if let Some(case) = replayed {
        return random::replay(gpu, &case);
    }
    // What was wrong once is shown to be wrong, or not to be any more; what takes the device along is not run again.
    let mut left_out = gpu.kernels.context().left_out.clone();
    left_out.0.retain(|_, why| matches!(why, WhyLeftOut::Fatal(_)));
    let kernels = gpu.kernels.leaving_out(left_out);
    let (run, rows) = run_cases(gpu, &kernels, &cases, !args.json)?;
    let interrupted = run < cases.len();
    let skipped = rows.iter().filter(|row| row.skipped).count();
    let failed = rows.iter().filter(|row| row.failed()).count();
    let report = Report { adapter, passed: rows.len() - failed - skipped, failed, skipped, interrupted, rows };
    let mut text = match (args.json, args.verbose) {
        (true, _) => serde_json::to_string_pretty(&report).map_err(Failure::run)? + "\n",
        (false, true) => format!("{}\n", table(&report.rows)),
        (false, false) => String::new(),
    };
    if !args.json {
        let (passed, of) = (report.passed, report.rows.len());
        let cases = if interrupted { format!("{run} of {}", cases.len()) } else { run.to_string() };
        let until = if interrupted { ", interrupted" } else { "" };
        text += &format!("{passed} passed, {failed} failed, {skipped} skipped of {of} in {cases} cases{until}\n");
    }
    console::print(&text)?;
    if interrupted { Err(Failure::Interrupted) } else { conclude(&report.rows) }
}

impl Row {
    /// One that ran nothing, or whose numbers follow.
    fn new(id: &str, kernel: &str, tuning: String, problem: Option<String>) -> Self {
        let (error, tolerance) = (f64::NAN, f64::NAN);
        let (id, kernel, passed) = (id.to_owned(), kernel.to_owned(), problem.is_none());
        Row { id, kernel, tuning, error, tolerance, passed, skipped: false, problem, seconds: None }
    }

    fn failed(&self) -> bool {
        !self.passed && !self.skipped
    }
}

/// One failed comparison fails the run, and so does a run that compared nothing.
fn conclude(rows: &[Row]) -> Result<(), Failure> {
    let mut failed = rows.iter().filter(|row| row.failed());
    let Some(first) = failed.next() else {
        return match rows.iter().find(|row| row.skipped) {
            Some(first) if rows.iter().all(|row| row.skipped) => Err(Failure::run(format!(
                "nothing was compared; {}: {}",
                first.id,
                first.problem.as_deref().unwrap_or_default()
            ))),
            _ => Ok(()),
        };
    };
    Err(Failure::run(format!(
        "{} of {} comparisons failed; the first is {} ({}): {}",
        1 + failed.count(),
        rows.len(),
        first.id,
        first.tuning,
        first.problem.as_deref().unwrap_or_default()
    )))
}

/// Runs the cases kernel by kernel until the run is asked to end; with `tell`, prints a line for each kernel, and what failed in
/// it. Returns how many cases were run, and what they came to.
fn run_cases(gpu: &Gpu, on: &Kernels, cases: &[egmla::check::Case], tell: bool) -> Result<(usize, Vec<Row>), Failure> {
    let mut kernels: Vec<&str> = Vec::new();
    for case in cases {
        if !kernels.contains(&case.kernel()) {
            kernels.push(case.kernel());
        }
    }
    let width = kernels.iter().map(|kernel| kernel.len()).max().unwrap_or(0);
    let bar = console::interruptible(cases.len() as u64, "cases");
    let (mut run, mut rows) = (0, Vec::new());
    for kernel in kernels {
        if interrupt::asked() {
            break;
        }
        bar.set_message(kernel.to_owned());
        let (first, start) = (rows.len(), Instant::now());
        if let Some(why) = on.context().left_out.0.get(kernel) {
            rows.push(Row::new(kernel, kernel, "-".to_owned(), Some(format!("not run: {why}"))));
        }
        let of_kernel = cases.iter().filter(|case| case.kernel() == kernel);
        for case in of_kernel.take_while(|_| !interrupt::asked()) {
            rows.extend(run_case(gpu, on, case)?);
            run += 1;
            bar.inc(1);
        }
        if tell {
            let text = summary(kernel, width, &rows[first..], start.elapsed().as_secs_f64());
            bar.suspend(|| console::print(&text))?;
        }
    }
    bar.finish_and_clear();
    Ok((run, rows))
}

/// A line of what a kernel's comparisons came to, and one for each that failed.
fn summary(kernel: &str, width: usize, rows: &[Row], seconds: f64) -> String {
    let compared = rows.iter().filter(|row| !row.skipped).count();
    let failed: Vec<_> = rows.iter().filter(|row| row.failed()).collect();
    let worst = rows.iter().filter(|row| row.passed).map(|row| row.error / row.tolerance.max(f64::MIN_POSITIVE));
    let worst = 100.0 * worst.fold(0.0, f64::max);
    let mut text = match (compared, failed.len()) {
        (0, _) => format!("{kernel:width$}  not run"),
        (_, 0) => format!(
            "{kernel:width$}  ok, {compared} comparisons, worst at {worst:.0} % of its tolerance, {seconds:.1} s"
        ),
        (_, failed) => format!("{kernel:width$}  FAILED, {failed} of {compared} comparisons, {seconds:.1} s"),
    };
    // Each reason once.
    let mut reasons: Vec<_> = rows.iter().filter(|row| row.skipped).filter_map(|row| row.problem.as_deref()).collect();
    let skipped = reasons.len();
    reasons.sort();
    reasons.dedup();
    if skipped > 0 {
        text += &format!("; {skipped} {}", reasons.join(", "));
    }
    text.push('\n');
    for row in failed {
        text += &format!("    {} ({}): {}\n", row.id, row.tuning, row.problem.as_deref().unwrap_or_default());
    }
    text
}

/// What a kernel refuses is a failed row; a lost device ends the run, since every later case would fail with it.
fn run_case(gpu: &Gpu, on: &Kernels, case: &egmla::check::Case) -> Result<Vec<Row>, Failure> {
    let start = Instant::now();
    let outcomes = case.run(on);
    let seconds = start.elapsed().as_secs_f64();
    gpu.check()?;
    let row = |tuning: String, problem| Row::new(case.id(), case.kernel(), tuning, problem);
    let mut rows: Vec<_> = match outcomes {
        Ok(outcomes) => outcomes
            .into_iter()
            .map(|Outcome { tuning, error, tolerance, skipped, verdict, .. }| Row {
                error,
                tolerance,
                skipped,
                ..row(tuning, verdict.err())
            })
            .collect(),
        Err(error) if error.is_loss() => return Err(Failure::run(format!("{}: {error}", case.id()))),
        Err(error) => vec![row("-".to_owned(), Some(error.to_string()))],
    };
    if rows.is_empty() {
        rows.push(row("-".to_owned(), Some("nothing was compared".to_owned())));
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
            match &row.problem {
                None => "ok".to_owned(),
                Some(problem) if row.skipped => problem.clone(),
                Some(problem) => format!("FAILED: {problem}"),
            },
            row.seconds.map_or_else(String::new, |seconds| format!("{:.0} ms", seconds * 1e3)),
        ]);
    }
    table
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{Row, conclude, summary};

    fn row(problem: Option<&str>) -> Row {
        Row {
            id: "matmul/1".to_owned(),
            kernel: "matmul".to_owned(),
            tuning: "auto".to_owned(),
            error: 0.0,
            tolerance: 1.0,
            passed: problem.is_none(),
            skipped: problem.is_some_and(|problem| problem.starts_with("skipped")),
            problem: problem.map(str::to_owned),
            seconds: None,
        }
    }

    #[test]
    fn a_kernel_has_one_line_and_every_failure_its_own() {
        let rows = [row(None), row(Some("a NaN")), row(Some("skipped: a feature")), row(Some("skipped: a feature"))];
        assert_eq!(
            summary("matmul", 8, &rows, 0.25),
            "matmul    FAILED, 1 of 2 comparisons, 0.2 s; 2 skipped: a feature\n    matmul/1 (auto): a NaN\n"
        );
        assert_eq!(
            summary("matmul", 6, &rows[..1], 2.0),
            "matmul  ok, 1 comparisons, worst at 0 % of its tolerance, 2.0 s\n"
        );
        assert_eq!(summary("matmul", 6, &rows[2..], 2.0), "matmul  not run; 2 skipped: a feature\n");
    }

    #[test]
    fn one_failed_comparison_fails_the_run() {
        assert!(conclude(&[row(None), row(None)]).is_ok());
        assert!(conclude(&[row(None), row(Some("skipped: a feature not offered"))]).is_ok());
        let failure = conclude(&[row(Some("skipped: a feature not offered"))]).unwrap_err();
        assert_eq!(failure.message(), "nothing was compared; matmul/1: skipped: a feature not offered");
        let failure = conclude(&[row(None), row(Some("a NaN"))]).unwrap_err();
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(failure.message(), "1 of 2 comparisons failed; the first is matmul/1 (auto): a NaN");
    }
}
