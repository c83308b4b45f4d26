//! The measured table of `docs/speed.md`, from results that are kept in files.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use egmla::bench::report::{Measured, Report};
use egmla::bench::{Suite, rows};
use serde::Deserialize;

use super::{ceilings, digits, plots, time, write};
use crate::failure::Failure;

const BEGIN: &str = "<!-- bench: begin -->";
const END: &str = "<!-- bench: end -->";

/// Results of other libraries on the same machine, `peers-<adapter>.json` beside ours.
#[derive(Debug, Default, Deserialize)]
struct Peers {
    rows: Vec<PeerRow>,
}

#[derive(Debug, Deserialize)]
struct PeerRow {
    /// A row's id, or the short name that the peers' program has for it.
    case: String,
    burn: Option<PeerTimes>,
    candle_cpu: Option<PeerTimes>,
}

#[derive(Debug, Deserialize)]
struct PeerTimes {
    median_ms: f64,
}

impl Peers {
    fn beside(file: &Path, report: &Report) -> Result<Self, Failure> {
        let path = file.with_file_name(format!("peers-{}.json", report.slug()));
        if path.is_file() { read(&path) } else { Ok(Peers::default()) }
    }

    /// The fastest way that a peer has to compute a row.
    fn time(&self, id: &str, of: impl Fn(&PeerRow) -> Option<&PeerTimes>) -> String {
        let same = |row: &&PeerRow| {
            row.case == id
                || match row.case.as_str() {
                    "matmul" => id == "matmul/1024",
                    "prefill" => id == "prefill/mha_16x128/t512",
                    "mla_decode" => id == "decode/mla_dsv3_16h_f32/t4096",
                    _ => false,
                }
        };
        let times = self.rows.iter().filter(same).filter_map(of).map(|times| times.median_ms * 1e3);
        times.min_by(f64::total_cmp).map_or_else(|| "–".to_owned(), time)
    }
}

/// Most bytes of a file of results.
const MOST_RESULTS: u64 = 64 << 20;

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Failure> {
    let bytes = egmla::files::read(path, MOST_RESULTS)?;
    serde_json::from_slice(&bytes).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

/// Replaces the page's block, and the plots beside the results.
pub fn update(page: &Path, files: &[PathBuf]) -> Result<(), Failure> {
    let name = |file: &&PathBuf| file.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let mut block = String::new();
    for file in files.iter().filter(|file| !name(file).starts_with("peers-")) {
        let report: Report = read(file)?;
        if report.interrupted {
            return Err(Failure::usage(format!("{}: is of a run that was interrupted", file.display())));
        }
        let plots = plots::all(&report)?;
        for (name, svg) in &plots {
            write(&file.with_file_name(name), svg)?;
        }
        section(&mut block, file, &report, &Peers::beside(file, &report)?, &plots);
    }
    let text = egmla::files::read_text(page, MOST_RESULTS)?;
    let marked = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) =
        marked.ok_or_else(|| Failure::usage(format!("{}: no block from `{BEGIN}` to `{END}`", page.display())))?;
    write(page, &format!("{before}{BEGIN}\n{block}{END}{after}"))
}

fn section(block: &mut String, file: &Path, report: &Report, peers: &Peers, plots: &[(String, String)]) {
    let software = if report.software { ", software: for correctness, not for speed" } else { "" };
    let suite = match report.suite {
        Suite::Quick => "quick",
        Suite::Full => "full",
    };
    let all = rows().iter().filter(|row| row.is_in(report.suite)).count();
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(block, "{text}");
    };
    line(format!(
        "\n**{}** ({}, {}{software}). Times: {}.",
        report.adapter,
        report.backend,
        report.driver,
        report.clock.describe()
    ));
    line(format!(
        "Ceilings: {}. Suite `{suite}`, {} of its {all} rows.",
        ceilings(&report.roofline),
        report.rows.len()
    ));
    if !report.tunings.0.is_empty() {
        let choices: Vec<_> = report.tunings.0.iter().map(|(kernel, choice)| format!("{kernel} {choice}")).collect();
        line(format!("Tuned: {}.", choices.join(", ")));
    }
    line(
        "\n| row | storage | median | GB/s | % copy | GFLOP/s | % FMA | dispatches | first use | burn, same adapter \
         | candle, CPU | f64 reference, CPU |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
            .to_owned(),
    );
    for row in &report.rows {
        line(cells(row, peers));
    }
    // The page is one folder below the current one, and links are relative to the page.
    let up = if file.is_absolute() { Path::new("") } else { Path::new("..") };
    let place = |name: &str| up.join(file.with_file_name(name)).to_string_lossy().replace('\\', "/");
    line(String::new());
    for (name, _) in plots {
        let what = name.trim_end_matches(".svg").rsplit('-').next().unwrap_or_default();
        line(format!("![{what}, {}]({})", report.adapter, place(name)));
    }
    if let Some(first) = report.skipped.first() {
        let count = report.skipped.len();
        let rows = if count == 1 { "row" } else { "rows" };
        line(format!("\nNot measured: {count} {rows} (`{}`: {}).", first.id, first.why));
    }
}

fn cells(row: &Measured, peers: &Peers) -> String {
    let arithmetic = |value: f64| if row.flops == 0 { "–".to_owned() } else { digits(value) };
    let cells = [
        format!("`{}`", row.id),
        row.storage.clone(),
        time(row.median_us),
        digits(row.gb_s),
        digits(row.pct_copy),
        arithmetic(row.gflop_s),
        arithmetic(row.pct_fma),
        row.dispatches.to_string(),
        time(row.first_us),
        peers.time(&row.id, |peer| peer.burn.as_ref()),
        peers.time(&row.id, |peer| peer.candle_cpu.as_ref()),
        row.cpu_reference_us.map_or_else(|| "–".to_owned(), time),
    ];
    format!("| {} |", cells.join(" | "))
}
