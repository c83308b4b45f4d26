//! The adapter's ceilings, which bench rows are compared with.

use serde::{Deserialize, Serialize};

use super::timer::{Copies, Timer};
use crate::adapter::{AdapterClass, Tuning};
use crate::device::{Kernels, Region};
use crate::error::Result;
use crate::kernels::{roofline_cooperative, roofline_copy, roofline_fma};
use crate::op::{Op, choose};
use crate::recording::Recording;
use crate::vouched::Caller;

/// Ceilings of an adapter, and the overhead of a dispatch and of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// Bytes read and written by the copy kernel, 10⁹ per second.
    pub copy_gb_s: f64,
    /// f32 multiply-adds in registers, 10⁹ FLOPs per second.
    pub fma_gflop_s: f64,
    /// Products of cooperative f16 matrices, 10⁹ FLOPs per second; null if not measured.
    pub cooperative_f16_gflop_s: Option<f64>,
    /// A dispatch of one workgroup with nothing to do, behind others in one pass.
    pub empty_dispatch_us: f64,
    /// A submission of one such dispatch and the wait for its end, as the host sees it.
    pub submit_wait_us: f64,
}

/// Runs of each setting; the fastest counts, since a ceiling is what is reached at best.
const RUNS: usize = 5;

/// Dispatches timed together, so that the pass around them does not count.
const DISPATCHES: u32 = 256;

impl Roofline {
    /// Measures it: a second or so.
    ///
    /// # Errors
    /// An object that the device refuses.
    pub fn measure(kernels: &Kernels, timer: &Timer) -> Result<Self> {
        let software = kernels.context().class == AdapterClass::Software;
        Ok(Roofline {
            copy_gb_s: copy(kernels, timer, software)?,
            fma_gflop_s: fma(kernels, timer, software)?,
            cooperative_f16_gflop_s: cooperative(kernels, timer, software)?,
            empty_dispatch_us: (idle(kernels, timer, 1 + DISPATCHES)? - idle(kernels, timer, 1)?).max(0.0)
                / f64::from(DISPATCHES),
            submit_wait_us: submit_wait(kernels, timer)?,
        })
    }

    /// The highest rate of a kernel of this many FLOPs per byte, 10⁹ FLOPs per second.
    pub fn ceiling(&self, flops_per_byte: f64) -> f64 {
        self.fma_gflop_s.min(self.copy_gb_s * flops_per_byte)
    }
}

/// Microseconds of the fastest run.
fn best(timer: &Timer, recording: &mut Recording) -> Result<f64> {
    let mut best = f64::INFINITY;
    // The first run compiles; it does not win.
    let mut copies = Copies::ONE;
    for _ in 0..=RUNS {
        let elapsed = timer.steady(recording, copies)?;
        copies = Copies::of(elapsed.device_us);
        best = best.min(elapsed.device_us);
    }
    Ok(best)
}

/// Microseconds of the fastest of the operation's shaders and settings, of those that the device takes.
fn fastest<O: Op>(kernels: &Kernels, timer: &Timer, op: &O, args: O::Args<&Region>) -> Result<f64> {
    choose(op, kernels.context())?;
    let mut least = f64::INFINITY;
    for variant in O::VARIANTS.iter().filter(|variant| variant.spec.offered(kernels.context())) {
        for tuning in (0..variant.spec.tunings).map(Tuning::Forced) {
            if variant.plan(op, kernels.context(), tuning).is_ok() {
                let mut recording = Recording::new(kernels);
                recording.add_forced(variant, op, args, tuning, Caller::Library)?;
                least = least.min(best(timer, &mut recording)?);
            }
        }
    }
    Ok(least)
}

/// 10⁹ per second, from a count and microseconds.
pub(super) fn giga_per_second(count: u64, microseconds: f64) -> f64 {
    if microseconds > 0.0 { count as f64 / microseconds / 1e3 } else { 0.0 }
}

fn copy(kernels: &Kernels, timer: &Timer, software: bool) -> Result<f64> {
    // Beyond any cache, within a binding.
    let wanted: u64 = if software { 64 << 20 } else { 512 << 20 };
    let bytes = wanted.min(kernels.context().limits.max_storage_buffer_binding_size) & !15;
    let x = Region::from(&kernels.upload("egmla.roofline.x", &vec![1; bytes as usize])?);
    let y = Region::from(&kernels.allocate("egmla.roofline.y", bytes)?);
    let problem = roofline_copy::RooflineCopy { words: (bytes / 4) as u32 };
    let best = fastest(kernels, timer, &problem, roofline_copy::Args { x: &x, y: &y })?;
    Ok(giga_per_second(problem.cost().bytes, best))
}

fn fma(kernels: &Kernels, timer: &Timer, software: bool) -> Result<f64> {
    let (elements, iterations) = if software { (1 << 14, 512) } else { (1 << 20, 1024) };
    let x = Region::from(&kernels.upload("egmla.roofline.x", &vec![0; 4 * elements as usize])?);
    let y = Region::from(&kernels.allocate("egmla.roofline.y", 4 * u64::from(elements))?);
    let problem = roofline_fma::RooflineFma { elements, iterations, a: 0.75, b: 0.5 };
    let best = fastest(kernels, timer, &problem, roofline_fma::Args { x: &x, y: &y })?;
    Ok(giga_per_second(problem.cost().flops, best))
}

/// By the largest matrices that are offered; `None` where none are.
fn cooperative(kernels: &Kernels, timer: &Timer, software: bool) -> Result<Option<f64>> {
    let offered = kernels.context().cooperative;
    let side = match (offered.by_16, offered.by_8) {
        (true, _) => 16,
        (false, true) => 8,
        (false, false) => return Ok(None),
    };
    let (groups, iterations) = if software { (64, 64) } else { (4096, 4096) };
    let problem = roofline_cooperative::RooflineCooperative { groups, iterations, side };
    let bytes = problem.bytes();
    let x = Region::from(&kernels.upload("egmla.roofline.x", &vec![0; bytes.x as usize])?);
    let y = Region::from(&kernels.allocate("egmla.roofline.y", bytes.y)?);
    let best = fastest(kernels, timer, &problem, roofline_cooperative::Args { x: &x, y: &y })?;
    Ok(Some(giga_per_second(problem.cost().flops, best)))
}

/// Dispatches of one vector each.
fn idle(kernels: &Kernels, timer: &Timer, dispatches: u32) -> Result<f64> {
    best(timer, &mut vectors(kernels, dispatches)?)
}

/// One such dispatch, submitted and waited for: microseconds as the host sees it.
fn submit_wait(kernels: &Kernels, timer: &Timer) -> Result<f64> {
    let mut recording = vectors(kernels, 1)?;
    let runs = (0..=RUNS).map(|_| timer.run(&mut recording).map(|elapsed| elapsed.wall_us));
    runs.collect::<Result<Vec<_>>>().map(|runs| runs.into_iter().fold(f64::INFINITY, f64::min))
}

fn vectors(kernels: &Kernels, dispatches: u32) -> Result<Recording> {
    let x = Region::from(&kernels.allocate("egmla.roofline.x", 16)?);
    let y = Region::from(&kernels.allocate("egmla.roofline.y", 16)?);
    let mut recording = Recording::new(kernels);
    for _ in 0..dispatches {
        let problem = roofline_copy::RooflineCopy { words: 4 };
        recording.add_own(&problem, roofline_copy::Args { x: &x, y: &y })?;
    }
    Ok(recording)
}

/// Goes over more memory than a device's caches hold.
pub(super) fn evict(kernels: &Kernels) -> Result<Recording> {
    let bytes = (128u64 << 20).min(kernels.context().largest_binding()) & !15;
    let x = Region::from(&kernels.allocate("egmla.evict.x", bytes)?);
    let y = Region::from(&kernels.allocate("egmla.evict.y", bytes)?);
    let mut recording = Recording::new(kernels);
    recording
        .add_own(&roofline_copy::RooflineCopy { words: (bytes / 4) as u32 }, roofline_copy::Args { x: &x, y: &y })?;
    Ok(recording)
}
