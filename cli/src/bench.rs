//! `egmla bench`: the adapter's ceilings, then every row against them; plots; and the table of `docs/speed.md` from kept results.

mod page;
pub mod plots;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table};
use egmla::bench::report::{DispatchTime, Profile, Report, Skipped};
use egmla::bench::roofline::Roofline;
use egmla::bench::schedule::{Budget, Rows, measure, profile};
use egmla::bench::timer::{Clock, Timer};
use egmla::bench::{self, Suite, host};
use egmla::wgpu;

use crate::adapter::{self, AdapterOption, Backend, Gpu, LimitsOption};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;
use crate::output::Output;

/// Options of `egmla bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(flatten)]
    adapter: AdapterOption,
    /// Which rows
    #[arg(long, value_name = "SUITE", value_enum, default_value_t)]
    suite: SuiteOption,
    /// Only the rows whose id contains S
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Write what was measured to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also time every dispatch of the rows by itself
    #[arg(long)]
    profile: bool,
    /// Write plots to DIR as SVG
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Measure nothing: put the table of these results into docs/speed.md of the current folder, and plots beside them
    #[arg(long, value_name = "RESULTS", num_args = 1.., conflicts_with_all = ["suite", "filter", "json", "profile", "svg", "adapter"])]
    page: Vec<PathBuf>,
}

/// `--suite`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
enum SuiteOption {
    /// Caches of up to 8192 tokens
    #[default]
    Quick,
    /// Every row
    Full,
}

impl From<SuiteOption> for Suite {
    fn from(option: SuiteOption) -> Self {
        match option {
            SuiteOption::Quick => Suite::Quick,
            SuiteOption::Full => Suite::Full,
        }
    }
}

/// Measures, prints and writes.
pub fn run(args: BenchArgs) -> Result<(), Failure> {
    if !args.page.is_empty() {
        return page::update(Path::new("docs/speed.md"), &args.page);
    }
    let suite = Suite::from(args.suite);
    let filter = args.filter.as_deref().unwrap_or_default();
    let rows: Vec<_> = bench::rows().into_iter().filter(|row| row.is_in(suite) && row.id().contains(filter)).collect();
    if rows.is_empty() && !host::IDS.iter().any(|id| id.contains(filter)) {
        return Err(Failure::usage(format!("no row of this suite contains `{filter}` (--filter)")));
    }
    // Outputs are checked before anything is measured.
    let json = args.json.as_deref().map(Output::check_with_folders).transpose()?;
    if let Some(folder) = &args.svg {
        plots::check(folder)?;
    }
    interrupt::watch_patiently();
    let backend = adapter::open_with(&args.adapter, LimitsOption::Adapter)?;
    let gpu = gpu(&backend)?;
    console::note(format_args!("adapter: {}", backend.describe()));
    gpu.note_tunings();
    let timer = Timer::new(&gpu.kernels)?;
    console::note(format_args!("times: {}", timer.clock().describe()));
    let roofline = Roofline::measure(&gpu.kernels, &timer)?;
    gpu.check()?;
    interrupt::check()?;
    let bar = console::interruptible(rows.len() as u64, "rows");
    let Rows { measured, skipped, wrong } =
        measure(&gpu.kernels, &timer, &roofline, &rows, Budget::of(suite), |progress| {
            bar.set_position(progress.done as u64);
            bar.set_message(progress.id.to_owned());
            !interrupt::asked()
        })?;
    bar.finish_and_clear();
    let profiles = match args.profile {
        true => profile(&gpu.kernels, &timer, &roofline, &rows, || !interrupt::asked())?,
        false => Vec::new(),
    };
    if args.profile && timer.clock() == Clock::Wall {
        console::note("no profile: the adapter has no timestamps");
    }
    let host = if interrupt::asked() { Vec::new() } else { host::measure(&gpu.kernels, filter)? };
    gpu.check()?;
    let interrupted = interrupt::asked();
    let info = &gpu.info;
    let report = Report {
        adapter: info.name.clone(),
        backend: format!("{:?}", info.backend),
        driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned(),
        software: info.device_type == wgpu::DeviceType::Cpu,
        egmla: env!("CARGO_PKG_VERSION").to_owned(),
        suite,
        interrupted,
        clock: timer.clock(),
        tunings: gpu.kernels.context().tunings.clone(),
        roofline,
        rows: measured,
        host,
        skipped,
        wrong,
        profiles,
    };
    // A closed stdout does not keep the files from being written, nor a failed file the table from being printed.
    let printed = console::print(&text(&report));
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::run)? + "\n";
        file.keep(text.as_bytes())?;
    }
    if let Some(folder) = args.svg.as_ref().filter(|_| !interrupted) {
        for (name, svg) in plots::all(&report)? {
            write(&folder.join(name), &svg)?;
        }
    }
    printed?;
    if interrupted { Err(Failure::Interrupted) } else { conclude(&report.wrong) }
}

/// One wrong row fails the run.
fn conclude(wrong: &[Skipped]) -> Result<(), Failure> {
    wrong.first().map_or(Ok(()), |first| {
        Err(Failure::run(format!("{} rows are wrong; the first is {}: {}", wrong.len(), first.id, first.why)))
    })
}

/// The device; benches and tuning have nothing to do without one.
pub fn gpu(backend: &Backend) -> Result<&Gpu, Failure> {
    match backend {
        Backend::Gpu(gpu) => Ok(gpu),
        Backend::Cpu { reason, .. } => Err(Failure::run(format!(
            "{reason}: there is no adapter to measure; install a driver, for instance Mesa's software Vulkan \
             (mesa-vulkan-drivers)"
        ))),
    }
}

/// Writes a file, whole or not at all, and makes its folders.
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Output::check_with_folders(path)?.write(text.as_bytes())
}

/// Microseconds for a reader, to three digits.
fn time(microseconds: f64) -> String {
    let (value, unit) = match microseconds {
        us if us < 1e3 => (us, "µs"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    format!("{} {unit}", digits(value))
}

/// A number to three digits, or as many as it has before the point.
fn digits(value: f64) -> String {
    let decimals = match value {
        0.0 => 0,
        small if small < 0.1 => 4,
        small if small < 1.0 => 3,
        small if small < 10.0 => 2,
        small => usize::from(small < 100.0),
    };
    format!("{value:.decimals$}")
}

/// The ceilings in one line.
fn ceilings(roofline: &Roofline) -> String {
    let cooperative = roofline.cooperative_f16_gflop_s;
    let cooperative =
        cooperative.map_or_else(String::new, |rate| format!(", cooperative f16 {} GFLOP/s", digits(rate)));
    format!(
        "copy {} GB/s, f32 multiply-adds {} GFLOP/s{cooperative}, empty dispatch {}, submit and wait {}",
        digits(roofline.copy_gb_s),
        digits(roofline.fma_gflop_s),
        time(roofline.empty_dispatch_us),
        time(roofline.submit_wait_us)
    )
}

/// A line for each dispatch of a row.
fn profile_text(profile: &Profile) -> String {
    let all: f64 = profile.dispatches.iter().map(|dispatch| dispatch.us).sum();
    let mut text = format!(
        "{}: {} dispatches, {} with a timestamp around each, {} of it the timestamps'\n",
        profile.id,
        profile.dispatches.len(),
        time(all),
        time(profile.timestamps_us * profile.dispatches.len() as f64),
    );
    for DispatchTime { kernel, grid, us, bytes, flops, pct_copy, pct_fma } in &profile.dispatches {
        text += &format!(
            "  {:>8}  {kernel} {grid:?}, {} MB, {} MFLOP, {} % copy, {} % FMA\n",
            time(*us),
            digits(*bytes as f64 / 1e6),
            digits(*flops as f64 / 1e6),
            digits(*pct_copy),
            digits(*pct_fma)
        );
    }
    text
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    let header = [
        "row",
        "path",
        "storage",
        "runs",
        "first",
        "min",
        "median",
        "cold",
        "sync",
        "MB",
        "MFLOP",
        "GB/s",
        "GFLOP/s",
        "% copy",
        "% FMA",
        "dispatches",
        "CPU f64",
    ];
    table.set_header(header);
    for row in &report.rows {
        table.add_row([
            row.id.clone(),
            row.path.clone(),
            row.storage.clone(),
            row.runs.to_string(),
            time(row.first_us),
            time(row.min_us),
            time(row.median_us),
            row.cold_us.map_or_else(|| "-".to_owned(), time),
            row.sync_us.map_or_else(|| "-".to_owned(), time),
            digits(row.bytes as f64 / 1e6),
            digits(row.flops as f64 / 1e6),
            digits(row.gb_s),
            digits(row.gflop_s),
            digits(row.pct_copy),
            digits(row.pct_fma),
            row.dispatches.to_string(),
            row.cpu_reference_us.map_or_else(|| "-".to_owned(), time),
        ]);
    }
    for column in 3..header.len() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let skipped: String = report.skipped.iter().map(|row| format!("not measured: {}: {}\n", row.id, row.why)).collect();
    let profiles: String = report.profiles.iter().map(profile_text).collect();
    let wrong: String = report.wrong.iter().map(|row| format!("WRONG: {}: {}\n", row.id, row.why)).collect();
    let host: String = report
        .host
        .iter()
        .map(|row| {
            let each = row.host_us / row.dispatches.max(1) as f64;
            let (all, least) = (time(row.host_us), time(row.min_us));
            let (dispatches, finish) = (row.dispatches, time(row.finish_us));
            let recorded = format!("{all} on the host (min {least}), {dispatches} dispatches, {} each", time(each));
            format!("{}: {recorded}; wgpu's finish {finish}\n", row.id)
        })
        .collect();
    let interrupted = if report.interrupted { "INTERRUPTED: the rows that had been measured until then\n" } else { "" };
    format!("roofline: {}\n{table}\n{profiles}{wrong}{skipped}{host}{interrupted}", ceilings(&report.roofline))
}

#[cfg(test)]
mod tests {
    use egmla::bench::report::Skipped;

    use super::{conclude, digits, time};

    #[test]
    fn a_wrong_row_fails_the_run() {
        assert!(conclude(&[]).is_ok());
        let row = |id: &str| Skipped { id: id.to_owned(), why: "result 3 is NaN".to_owned() };
        let failure = conclude(&[row("matmul/1"), row("norm/1")]).err();
        let message = failure.map(|failure| (failure.exit_code(), failure.message().to_owned()));
        assert_eq!(message, Some((1, "2 rows are wrong; the first is matmul/1: result 3 is NaN".to_owned())));
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        assert_eq!([time(0.5), time(12.34), time(999.0)], ["0.500 µs", "12.3 µs", "999 µs"]);
        assert_eq!([time(1234.0), time(56_789.0), time(2.5e6)], ["1.23 ms", "56.8 ms", "2.50 s"]);
        assert_eq!([digits(12_345.6), digits(0.0032), digits(0.0)], ["12346", "0.0032", "0"]);
    }
}
