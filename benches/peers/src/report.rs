//! What was measured, as a table and as JSON.

use burn::tensor::wgpu::wgpu::AdapterInfo;
use serde::Serialize;

/// A side's times in one case.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Times {
    /// First result, with all that is compiled and tuned for it.
    pub first_use_s: f64,
    pub median_ms: f64,
    pub runs_ms: Vec<f64>,
    /// Relative 2-norm of the difference from our result.
    pub relative_difference: f64,
}

/// One case against one of burn's ways to compute it.
#[derive(Debug, Serialize)]
pub struct Row {
    pub case: &'static str,
    pub problem: String,
    pub burn_computes_by: &'static str,
    pub gflop: f64,
    pub burn_over_ours: f64,
    pub ours: Times,
    pub burn: Times,
    pub candle_cpu: Times,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub adapter: String,
    pub backend: String,
    pub driver: String,
    pub device: &'static str,
    pub burn_compiles_to: &'static str,
    pub runs: usize,
    pub versions: Versions,
    pub rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub struct Versions {
    pub egmla: String,
    pub burn: String,
    pub candle: String,
    pub wgpu: String,
}

impl Versions {
    pub fn locked() -> Self {
        Versions {
            egmla: locked_version("egmla"),
            burn: locked_version("burn"),
            candle: locked_version("candle-core"),
            wgpu: locked_version("wgpu"),
        }
    }
}

/// Version of a dependency, from the lock file that this program was built with.
fn locked_version(package: &str) -> String {
    let name = format!("name = \"{package}\"");
    let mut lines = include_str!("../Cargo.lock").lines().skip_while(|line| *line != name);
    let version = lines.nth(1).and_then(|line| line.strip_prefix("version = "));
    version.unwrap_or("unknown").trim_matches('"').to_owned()
}

impl Report {
    pub fn new(info: &AdapterInfo, runs: usize, rows: Vec<Row>) -> Self {
        Report {
            adapter: info.name.clone(),
            backend: info.backend.to_string(),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            device: "one wgpu device, opened by burn and shared by both sides",
            burn_compiles_to: if cfg!(feature = "vulkan") { "SPIR-V where the adapter allows it" } else { "WGSL" },
            runs,
            versions: Versions::locked(),
            rows,
        }
    }

    pub fn print(&self) {
        let Versions { egmla, burn, candle, wgpu } = &self.versions;
        println!("egmla {egmla}, burn {burn}, candle {candle}, wgpu {wgpu}");
        println!("{} ({}, {}); {}", self.adapter, self.backend, self.driver, self.device);
        println!("burn compiles to {}; medians of {} runs in turns\n", self.burn_compiles_to, self.runs);
        println!(
            "{:<32} {:>7} {:>9} {:>9} {:>9} {:>13} {:>17} {:>17}",
            "case", "GFLOP", "ours ms", "burn ms", "burn/ours", "candle CPU ms", "first use ours s", "first use burn s"
        );
        for row in &self.rows {
            println!(
                "{:<32} {:>7.3} {:>9.2} {:>9.2} {:>9.2} {:>13.2} {:>17.2} {:>17.2}",
                format!("{} (burn: {})", row.case, row.burn_computes_by),
                row.gflop,
                row.ours.median_ms,
                row.burn.median_ms,
                row.burn_over_ours,
                row.candle_cpu.median_ms,
                row.ours.first_use_s,
                row.burn.first_use_s
            );
        }
        println!();
        let mut described = "";
        for row in self.rows.iter().filter(|row| std::mem::replace(&mut described, row.case) != row.case) {
            println!("{}: {}", row.case, row.problem);
        }
    }
}
