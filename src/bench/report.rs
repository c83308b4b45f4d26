//! A report of measurements, as written to a file and read back.

use serde::{Deserialize, Serialize};

use super::host::HostRow;
use super::roofline::{Roofline, giga_per_second};
use super::timer::Clock;
use super::{Row, Suite};
use crate::adapter::Tunings;
use crate::cost::Cost;

/// One run of the table on one adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the adapter.
    pub adapter: String,
    /// Vulkan, Metal, …
    pub backend: String,
    /// Driver and its version.
    pub driver: String,
    /// The adapter computes on the CPU.
    pub software: bool,
    /// Version of this crate.
    pub egmla: String,
    /// Which rows were asked for.
    pub suite: Suite,
    /// The run was interrupted: of the rows, those that had been measured until then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// Clock of `min_us` and `median_us`; `first_us` is always wall time.
    pub clock: Clock,
    /// Measured choices that were in force; empty where every kernel took the one for its class.
    pub tunings: Tunings,
    /// Ceilings, measured just before the rows.
    pub roofline: Roofline,
    /// The rows.
    pub rows: Vec<Measured>,
    /// Host time of decode steps.
    #[serde(default)]
    pub host: Vec<HostRow>,
    /// Rows of the suite that are not among them, and why.
    pub skipped: Vec<Skipped>,
    /// Rows whose results were wrong, and how; they are not among the rows either.
    #[serde(default)]
    pub wrong: Vec<Skipped>,
    /// Dispatch by dispatch, where it was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<Profile>,
}

impl Report {
    /// A name for the adapter's files: letters, digits and hyphens.
    pub fn slug(&self) -> String {
        slug(&format!("{} {}", self.adapter, self.backend))
    }

    /// The row of an id.
    pub fn row(&self, id: &str) -> Option<&Measured> {
        self.rows.iter().find(|row| row.id == id)
    }
}

/// Letters and digits in lower case, everything between them one hyphen.
pub fn slug(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// One row, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// As in the table.
    pub id: String,
    /// Kernel or decode path.
    pub path: String,
    /// Storage of weights and cache.
    pub storage: String,
    /// Measured runs; the first, cold one is not among them. With 0 the times are of that one: there was no time for more.
    pub runs: usize,
    /// Wall time of the first use: pipelines compiled, one submission, the wait for its end.
    pub first_us: f64,
    /// Fastest run.
    pub min_us: f64,
    /// Median run: what the rates are of. Hot: runs follow each other on the same buffers.
    pub median_us: f64,
    /// Copies of a step in one timed pass; the times are of one.
    #[serde(default = "one")]
    pub copies: usize,
    /// Median run that finds nothing in the device's caches; null in software and where the device has no timestamps.
    #[serde(default)]
    pub cold_us: Option<f64>,
    /// One step, submitted and waited for, as the host sees it; null in older results.
    #[serde(default)]
    pub sync_us: Option<f64>,
    /// Compulsory traffic of a step, by the rules of `cost`.
    pub bytes: u64,
    /// Operations of a step, by the rules of `cost`.
    pub flops: u64,
    /// 10⁹ bytes per second.
    pub gb_s: f64,
    /// 10⁹ FLOPs per second.
    pub gflop_s: f64,
    /// Per cent of the copy kernel's rate.
    pub pct_copy: f64,
    /// Per cent of the multiply-add rate.
    pub pct_fma: f64,
    /// Dispatches of a step.
    pub dispatches: usize,
    /// The f64 reference of the same path on one core of the same machine in the same run.
    pub cpu_reference_us: Option<f64>,
}

fn one() -> usize {
    1
}

/// Every dispatch of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// As in the table.
    pub id: String,
    /// What the timestamps around a dispatch cost, which is part of its time.
    pub timestamps_us: f64,
    /// In order.
    pub dispatches: Vec<DispatchTime>,
}

/// One dispatch, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DispatchTime {
    /// Stem of the kernel.
    pub kernel: String,
    /// Workgroups in x, y and z.
    pub grid: [u32; 3],
    /// Median microseconds, timestamps included.
    pub us: f64,
    /// Compulsory traffic.
    pub bytes: u64,
    /// Operations.
    pub flops: u64,
    /// Per cent of the copy kernel's rate.
    pub pct_copy: f64,
    /// Per cent of the multiply-add rate.
    pub pct_fma: f64,
}

/// A row that was not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// As in the table.
    pub id: String,
    /// One line.
    pub why: String,
}

/// Times of a row, before rates are computed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Times {
    pub first_us: f64,
    pub first_device_us: f64,
    pub runs: Vec<f64>,
    pub copies: usize,
    pub cold_us: Option<f64>,
    pub sync: Vec<f64>,
    pub cost: Cost,
    pub dispatches: usize,
    pub cpu_reference_us: Option<f64>,
}

impl Measured {
    pub(super) fn new(row: &Row, times: Times, roofline: &Roofline) -> Self {
        let Times { first_us, first_device_us, mut runs, copies, cold_us, mut sync, dispatches, .. } = times;
        let (Cost { flops, bytes }, cpu_reference_us) = (times.cost, times.cpu_reference_us);
        sync.sort_by(f64::total_cmp);
        let measured = runs.len();
        if runs.is_empty() {
            runs.push(first_device_us);
        }
        runs.sort_by(f64::total_cmp);
        let median_us = median(&runs);
        let (gb_s, gflop_s) = (giga_per_second(bytes, median_us), giga_per_second(flops, median_us));
        Measured {
            id: row.id().to_owned(),
            path: row.path().to_owned(),
            storage: row.storage().to_owned(),
            runs: measured,
            first_us,
            min_us: runs.first().copied().unwrap_or_default(),
            median_us,
            copies,
            cold_us,
            sync_us: (!sync.is_empty()).then(|| median(&sync)),
            bytes,
            flops,
            gb_s,
            gflop_s,
            pct_copy: 100.0 * gb_s / roofline.copy_gb_s,
            pct_fma: 100.0 * gflop_s / roofline.fma_gflop_s,
            dispatches,
            cpu_reference_us,
        }
    }
}

/// The middle of sorted values; 0 of none.
pub(super) fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match sorted {
        [] => 0.0,
        _ if sorted.len().is_multiple_of(2) => (sorted[half - 1] + sorted[half]) / 2.0,
        _ => sorted[half],
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn rates_follow_from_the_median() {
        let row = super::super::rows().into_iter().next().unwrap();
        let roofline = Roofline {
            copy_gb_s: 10.0,
            fma_gflop_s: 200.0,
            cooperative_f16_gflop_s: None,
            empty_dispatch_us: 0.0,
            submit_wait_us: 0.0,
        };
        let cost = Cost { flops: 4_000_000, bytes: 100_000 };
        let runs = vec![40.0, 10.0, 20.0, 30.0];
        let times = Times {
            first_us: 99.0,
            first_device_us: 90.0,
            runs,
            copies: 1,
            cold_us: None,
            sync: vec![3.0],
            cost,
            dispatches: 3,
            cpu_reference_us: None,
        };
        let measured = Measured::new(&row, times, &roofline);
        assert_eq!((measured.runs, measured.min_us, measured.median_us), (4, 10.0, 25.0));
        // 100 000 bytes in 25 µs are 4 GB/s; 4 million FLOPs, 160 GFLOP/s.
        assert_eq!((measured.gb_s, measured.gflop_s), (4.0, 160.0));
        assert!((measured.pct_copy - 40.0).abs() < 1e-9 && (measured.pct_fma - 80.0).abs() < 1e-9);
        let cold = Times {
            first_us: 99.0,
            first_device_us: 50.0,
            runs: Vec::new(),
            copies: 1,
            cold_us: None,
            sync: Vec::new(),
            cost,
            dispatches: 3,
            cpu_reference_us: None,
        };
        let cold = Measured::new(&row, cold, &roofline);
        assert_eq!((cold.runs, cold.median_us, cold.gb_s), (0, 50.0, 2.0));
        let text = serde_json::to_string(&measured).unwrap();
        assert_eq!(serde_json::from_str::<Measured>(&text).unwrap(), measured);
        assert_eq!(roofline.ceiling(5.0), 50.0);
        assert_eq!(roofline.ceiling(50.0), 200.0);
    }

    #[test]
    fn slugs_are_file_names() {
        assert_eq!(slug("llvmpipe (LLVM 19.1.7, 256 bits) Vulkan"), "llvmpipe-llvm-19-1-7-256-bits-vulkan");
        assert_eq!(slug("NVIDIA GeForce/RTX"), "nvidia-geforce-rtx");
    }

    #[test]
    fn medians() {
        assert_eq!([median(&[]), median(&[3.0]), median(&[1.0, 2.0]), median(&[1.0, 2.0, 9.0])], [0.0, 3.0, 1.5, 2.0]);
    }
}
