//! egmla's kernels beside burn's on the same device, and candle's on the CPU: in one process, in turns.
//!
//! A run is timed from the first call to the end of the work on the device, with inputs and results resident there.
//! Times of first use are those of a process that finds no pipelines on the disk: with Mesa's drivers, set
//! `MESA_SHADER_CACHE_DISABLE=true`. burn's later cases profit from what its earlier ones compiled; `--only` avoids that.

mod burn_side;
mod candle_side;
mod ours;
mod problem;
mod report;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use burn::tensor::wgpu::WgpuSetup;
use burn::tensor::wgpu::wgpu::DeviceType;
use clap::{Parser, ValueEnum};

use problem::{Case, Matmul, MlaDecode, Prefill};
use report::{Report, Row, Times};

pub type Failure = Box<dyn std::error::Error>;

/// Most that two sides' results may differ by, as a relative 2-norm.
const TOLERANCE: f64 = 1e-3;

/// A way to compute a case whose inputs are where it computes.
pub trait Side {
    /// Computes once and waits for the end.
    fn run(&mut self) -> Result<(), Failure>;

    /// The last result, in the order that [`problem`] gives.
    fn result(&self) -> Result<Vec<f32>, Failure>;
}

/// Compares egmla with burn on the same device, and with candle on the CPU.
#[derive(Parser)]
struct Options {
    /// Timed runs of every side
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// One case instead of all
    #[arg(long, value_name = "CASE")]
    only: Option<Case>,
    /// Measure burn's `attention` on a software adapter, too, where what it tries compiles for a quarter of an hour and more
    #[arg(long)]
    burn_attention: bool,
    /// Write the report here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let words: Vec<_> = failure.to_string().split_whitespace().map(str::to_owned).collect();
            eprintln!("error: {}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    if let Some(file) = &options.json {
        // Found out now, not after minutes of measuring; what is there stays until there is a report.
        let opened = File::options().create(true).append(true).open(file);
        opened.map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let (device, setup) = burn_side::open()?;
    let info = setup.adapter.get_info();
    let burn_attention = options.burn_attention || info.device_type != DeviceType::Cpu;
    let runs = options.runs.into();
    let mut rows = Vec::new();
    for &case in Case::value_variants() {
        if options.only.is_none_or(|only| only == case) {
            rows.extend(Contest::new(case, &device, &setup, burn_attention)?.measure(runs)?);
        }
    }
    let report = Report::new(&info, runs, rows);
    report.print();
    if !burn_attention {
        println!("not measured: burn's `attention` (software adapter, see --burn-attention)");
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

/// The sides of one case.
struct Contest {
    case: &'static str,
    problem: String,
    operations: usize,
    ours: Box<dyn Side>,
    burn: Vec<(&'static str, Box<dyn Side>)>,
    candle: Box<dyn Side>,
}

impl Contest {
    fn new(case: Case, device: &Device, setup: &WgpuSetup, burn_attention: bool) -> Result<Self, Failure> {
        let (gpu, queue) = (&setup.device, &setup.queue);
        Ok(match case {
            Case::Matmul => {
                let inputs = Matmul::new();
                Contest {
                    case: "matmul",
                    problem: inputs.describe(),
                    operations: inputs.operations(),
                    ours: ours::matmul(gpu, queue, &inputs)?,
                    burn: vec![("matmul", burn_side::matmul(device, &inputs)?)],
                    candle: candle_side::matmul(&inputs)?,
                }
            }
            Case::Prefill => {
                let inputs = Prefill::new();
                let mut burn = vec![("operations", burn_side::prefill_operations(device, &inputs)?)];
                if burn_attention {
                    burn.push(("attention", burn_side::prefill_attention(device, &inputs)?));
                }
                Contest {
                    case: "prefill",
                    problem: inputs.describe(),
                    operations: inputs.operations(),
                    ours: ours::prefill(gpu, queue, &inputs)?,
                    burn,
                    candle: candle_side::prefill(&inputs)?,
                }
            }
            Case::MlaDecode => {
                let inputs = MlaDecode::new();
                Contest {
                    case: "mla_decode",
                    problem: inputs.describe(),
                    operations: inputs.operations(),
                    ours: ours::mla_decode(gpu, queue, &inputs)?,
                    burn: vec![("operations", burn_side::mla_decode(device, &inputs)?)],
                    candle: candle_side::mla_decode(&inputs)?,
                }
            }
        })
    }

    fn measure(self, runs: usize) -> Result<Vec<Row>, Failure> {
        let Contest { case, problem, operations, ours, burn, candle } = self;
        let (burn_names, burn): (Vec<_>, Vec<_>) = burn.into_iter().unzip();
        let mut sides: Vec<_> = std::iter::once(ours).chain(burn).chain([candle]).collect();
        let mut times = vec![Times::default(); sides.len()];
        for (side, times) in sides.iter_mut().zip(&mut times) {
            times.first_use_s = seconds(side.as_mut())?;
        }
        let expected = sides[0].result()?;
        let names = ["ours"].into_iter().chain(burn_names.iter().copied()).chain(["candle"]);
        for ((side, times), name) in sides.iter().zip(&mut times).zip(names) {
            times.relative_difference = relative_difference(&side.result()?, &expected);
            if times.relative_difference > TOLERANCE {
                let found = times.relative_difference;
                return Err(
                    format!("{case}: result of `{name}` is {found:.1e} from ours, allowed {TOLERANCE:.0e}").into()
                );
            }
        }
        for side in &mut sides {
            settle(side.as_mut())?;
        }
        for _ in 0..runs {
            for (side, times) in sides.iter_mut().zip(&mut times) {
                times.runs_ms.push(1e3 * seconds(side.as_mut())?);
            }
        }
        times.iter_mut().for_each(|times| times.median_ms = median(&times.runs_ms));
        let row = |(burn_computes_by, burn): (&'static str, &Times)| Row {
            case,
            problem: problem.clone(),
            burn_computes_by,
            gflop: operations as f64 / 1e9,
            burn_over_ours: burn.median_ms / times[0].median_ms,
            ours: times[0].clone(),
            burn: burn.clone(),
            candle_cpu: times[times.len() - 1].clone(),
        };
        Ok(burn_names.into_iter().zip(&times[1..]).map(row).collect())
    }
}

/// Runs until three times in a row are within 15 %, or 30 times: tuning goes on after the first result.
fn settle(side: &mut dyn Side) -> Result<(), Failure> {
    let mut times = Vec::new();
    for _ in 0..30 {
        times.push(seconds(side)?);
        let last = &times[times.len().saturating_sub(3)..];
        let (least, most) = last.iter().fold((f64::INFINITY, 0f64), |(least, most), &t| (least.min(t), most.max(t)));
        if times.len() >= 5 && most <= 1.15 * least {
            break;
        }
    }
    Ok(())
}

fn seconds(side: &mut dyn Side) -> Result<f64, Failure> {
    let start = Instant::now();
    side.run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// `‖found − expected‖ / ‖expected‖`, infinite when the lengths differ or a value is no number.
fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let pairs = found.iter().zip(expected).map(|(&found, &expected)| (f64::from(found), f64::from(expected)));
    let (difference, norm) = pairs.fold((0.0, 0.0), |(difference, norm), (found, expected)| {
        (difference + (found - expected).powi(2), norm + expected.powi(2))
    });
    let relative = (difference / norm).sqrt();
    if relative.is_nan() { f64::INFINITY } else { relative }
}
