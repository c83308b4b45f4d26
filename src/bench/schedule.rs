//! Measures bench rows in turns.

use std::time::{Duration, Instant};

use super::report::{DispatchTime, Measured, Profile, Skipped, Times, median};
use super::roofline::{Roofline, evict, giga_per_second};
use super::timer::{Copies, Profiled, Timer};
use super::{Prepared, Row, Stock, Suite};
use crate::adapter::AdapterClass;
use crate::cost::Cost;
use crate::device::Kernels;
use crate::error::{DataError, Error, Result};

/// Time limits of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// A row with at least five runs that took this long together is done.
    pub enough: Duration,
    /// A row that took this long is done, whatever its runs.
    pub limit: Duration,
    /// Most runs.
    pub most_runs: usize,
    /// When this is over no row is begun any more, and no run that would not end before: a row that had none but its cold
    /// one shows that one.
    pub total: Duration,
}

impl Budget {
    /// Of a suite.
    pub fn of(suite: Suite) -> Self {
        let (enough, limit, total) = match suite {
            Suite::Quick => (1, 6, 150),
            Suite::Full => (3, 60, 3600),
        };
        let [enough, limit, total] = [enough, limit, total].map(Duration::from_secs);
        Budget { enough, limit, most_runs: 50, total }
    }
}

/// Fewer say little of a median.
const LEAST_RUNS: usize = 5;

/// A row whose first use takes longer is timed run by run.
const SLOW: Duration = Duration::from_secs(2);

/// Runs with empty caches.
const COLD_RUNS: usize = 20;

/// A row's turn: runs until this much is spent.
const TURN: Duration = Duration::from_millis(40);

/// Progress of a measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress<'a> {
    /// The row at hand.
    pub id: &'a str,
    /// Rows that are done.
    pub done: usize,
    /// Rows.
    pub of: usize,
}

struct Running<'a> {
    row: &'a Row,
    prepared: Prepared,
    times: Times,
    spent: Duration,
    /// Wall time of its first use: later runs take less.
    longest: Duration,
    copies: Copies,
}

/// What came of the rows.
#[derive(Debug, Default)]
pub struct Rows {
    /// Those that were measured.
    pub measured: Vec<Measured>,
    /// Those that the device or this version refuses, or that there was no time for.
    pub skipped: Vec<Skipped>,
    /// Those whose results are not finite: not timed.
    pub wrong: Vec<Skipped>,
}

/// Why a row is skipped that an interrupt left with too few runs.
const INTERRUPTED: &str = "interrupted";

/// Sets every row up, runs each once cold and checks that its results are finite, then measures them in turns. Once `progress`,
/// which is called before each of these and before each turn, says false, the rows with runs enough are all that was measured.
///
/// # Errors
/// A lost device.
pub fn measure(
    kernels: &Kernels,
    timer: &Timer,
    roofline: &Roofline,
    rows: &[Row],
    budget: Budget,
    mut progress: impl FnMut(Progress<'_>) -> bool,
) -> Result<Rows> {
    let begun = Instant::now();
    let over = || begun.elapsed() >= budget.total;
    let mut goes_on = true;
    let mut stock = Stock::default();
    let (mut running, mut skipped, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        if over() {
            let why = format!("the suite's {} s were over", budget.total.as_secs());
            skipped.push(Skipped { id: row.id().to_owned(), why });
            continue;
        }
        goes_on = goes_on && progress(Progress { id: row.id(), done: 0, of: rows.len() });
        if !goes_on {
            skipped.push(Skipped { id: row.id().to_owned(), why: INTERRUPTED.to_owned() });
            continue;
        }
        // Nothing compiled: a row's first use is its own.
        match start(row, &kernels.uncompiled(), timer, &mut stock) {
            Ok(started) => running.push(started),
            Err(error) if error.is_loss() => return Err(error),
            Err(error) => {
                let is_wrong = matches!(error, Error::Data(DataError::NonFinite { .. }));
                let row = Skipped { id: row.id().to_owned(), why: error.to_string() };
                if is_wrong { wrong.push(row) } else { skipped.push(row) }
            }
        }
    }
    drop(stock);
    // A run that would not end in time is not begun.
    let fits = |row: &Running<'_>| begun.elapsed() + row.longest < budget.total;
    let open = |row: &Running<'_>| !row.is_done(budget) && fits(row);
    // Rows whose one run is longer than a row's limit wait until every other is done: their turns would eat the time.
    for slow in [false, true] {
        let now = |row: &Running<'_>| (row.longest > budget.limit) == slow && open(row);
        while goes_on && running.iter().any(now) {
            for index in 0..running.len() {
                let done = rows.len() - running.iter().filter(|row| open(row)).count();
                let row = &mut running[index];
                goes_on = goes_on && progress(Progress { id: row.row.id(), done, of: rows.len() });
                if !goes_on {
                    break;
                }
                let turn = Instant::now();
                while now(row) && turn.elapsed() < TURN {
                    let start = Instant::now();
                    row.times.runs.push(timer.steady(&mut row.prepared.recording, row.copies)?.device_us);
                    row.spent += start.elapsed();
                }
            }
        }
    }
    // A software adapter's caches are the processor's, and no business of a kernel's.
    if goes_on && kernels.context().class != AdapterClass::Software && !running.is_empty() && !over() {
        // Without memory for it there is no such figure, and every other stands.
        match evict(kernels) {
            Err(error) if error.is_loss() => return Err(error),
            Err(error) => tracing::warn!("no times with cold caches: {error}"),
            Ok(mut evict) => {
                for row in &mut running {
                    row.times.cold_us = timer.cold(&mut row.prepared.recording, &mut evict, COLD_RUNS)?;
                }
            }
        }
    }
    if !goes_on {
        running.retain(|row| {
            let enough = row.is_done(budget) || row.times.runs.len() >= LEAST_RUNS;
            if !enough {
                skipped.push(Skipped { id: row.row.id().to_owned(), why: INTERRUPTED.to_owned() });
            }
            enough
        });
    }
    let measured = running.into_iter().map(|running| Measured::new(running.row, running.times, roofline)).collect();
    Ok(Rows { measured, skipped, wrong })
}

/// Times every dispatch of the rows: medians over a few submissions. Rows that the device refuses are left out, and all from the
/// one on before which `goes_on` says false.
///
/// # Errors
/// A lost device.
pub fn profile(
    kernels: &Kernels,
    timer: &Timer,
    roofline: &Roofline,
    rows: &[Row],
    goes_on: impl Fn() -> bool,
) -> Result<Vec<Profile>> {
    let mut stock = Stock::default();
    let mut profiles = Vec::new();
    for row in rows.iter().take_while(|_| goes_on()) {
        let mut prepared = match row.prepare(kernels, &mut stock) {
            Ok(prepared) => prepared,
            Err(error) if error.is_loss() => return Err(error),
            Err(_) => continue,
        };
        let recording = &mut prepared.recording;
        timer.run(recording)?;
        let copies = Copies::of(timer.run(recording)?.device_us);
        let runs = (0..PROFILES).map(|_| timer.profile(recording, copies)).collect::<Result<Option<Vec<_>>>>()?;
        let Some(runs) = runs else { continue };
        let middle = |of: &dyn Fn(&Profiled) -> f64| {
            let mut times: Vec<f64> = runs.iter().map(of).collect();
            times.sort_by(f64::total_cmp);
            median(&times)
        };
        let dispatch = |(index, (kernel, grid, Cost { flops, bytes })): (usize, (&'static str, [u32; 3], Cost))| {
            let us = middle(&|run| run.dispatches.get(index).copied().unwrap_or_default());
            DispatchTime {
                kernel: kernel.to_owned(),
                grid,
                us,
                bytes,
                flops,
                pct_copy: 100.0 * giga_per_second(bytes, us) / roofline.copy_gb_s,
                pct_fma: 100.0 * giga_per_second(flops, us) / roofline.fma_gflop_s,
            }
        };
        let dispatches = recording.costs().enumerate().map(dispatch).collect();
        profiles.push(Profile { id: row.id().to_owned(), timestamps_us: middle(&|run| run.empty_us), dispatches });
    }
    Ok(profiles)
}

/// Submissions of a profile.
const PROFILES: usize = 5;

impl Running<'_> {
    fn is_done(&self, budget: Budget) -> bool {
        let runs = self.times.runs.len();
        runs >= budget.most_runs || self.spent >= budget.limit || (runs >= LEAST_RUNS && self.spent >= budget.enough)
    }
}

fn start<'a>(row: &'a Row, kernels: &Kernels, timer: &Timer, stock: &mut Stock) -> Result<Running<'a>> {
    let mut prepared = row.prepare(kernels, stock)?;
    let cold = Instant::now();
    let first_device_us = timer.run(&mut prepared.recording)?.device_us;
    let longest = cold.elapsed();
    let first_us = longest.as_secs_f64() * 1e6;
    prepared.verify()?;
    let cpu_reference_us = prepared.reference.as_ref().map(|reference| {
        let start = Instant::now();
        reference();
        start.elapsed().as_secs_f64() * 1e6
    });
    let (cost, dispatches) = (prepared.cost, prepared.recording.dispatches());
    let mut times = Times {
        first_us,
        first_device_us,
        runs: Vec::new(),
        copies: 1,
        cold_us: None,
        sync: Vec::new(),
        cost,
        dispatches,
        cpu_reference_us,
    };
    let mut copies = Copies::ONE;
    if longest < SLOW {
        // The first run was slow: it compiled, and on a GPU its clock was low.
        copies = Copies::of(timer.run(&mut prepared.recording)?.device_us);
        copies = Copies::of(timer.steady(&mut prepared.recording, copies)?.device_us);
        let sync = (0..LEAST_RUNS).map(|_| timer.run(&mut prepared.recording).map(|elapsed| elapsed.wall_us));
        times.sync = sync.collect::<Result<_>>()?;
    }
    times.copies = copies.timed;
    Ok(Running { row, prepared, times, spent: Duration::ZERO, longest, copies })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::rows::Work;
    use super::super::timer::Clock;
    use super::*;

    /// A device that writes timestamps where the adapter has them, planned for as a class, and its clock.
    fn device(class: AdapterClass) -> (Kernels, Timer) {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).unwrap();
        let required_features = adapter.features() & wgpu::Features::TIMESTAMP_QUERY;
        let descriptor = wgpu::DeviceDescriptor { required_features, ..Default::default() };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
        let kernels = Kernels::with_class(&device, &queue, class).unwrap();
        let timer = Timer::new(&kernels).unwrap();
        (kernels, timer)
    }

    /// 4 GB/s and 8 GFLOP/s.
    const ROOFLINE: Roofline = Roofline {
        copy_gb_s: 4.0,
        fma_gflop_s: 8.0,
        cooperative_f16_gflop_s: None,
        empty_dispatch_us: 0.0,
        submit_wait_us: 0.0,
    };

    /// Two rows that are right, one that is not between them.
    fn three() -> [Row; 3] {
        let (small, large) = (Work::Norm { rows: 4, width: 8 }, Work::Norm { rows: 64, width: 512 });
        [("small", small), ("wrong", Work::Wrong), ("large", large)].map(|(id, work)| Row {
            id: id.to_owned(),
            path: "norm",
            storage: "f32",
            suite: Suite::Quick,
            work,
        })
    }

    fn measured(class: AdapterClass) -> (Rows, Timer) {
        let (kernels, timer) = device(class);
        let [enough, limit, total] = [1, 10_000, 60_000].map(Duration::from_millis);
        let budget = Budget { enough, limit, most_runs: 7, total };
        let found = measure(&kernels, &timer, &ROOFLINE, &three(), budget, |_| true).unwrap();
        (found, timer)
    }

    #[test]
    fn a_wrong_row_is_named_and_those_behind_it_are_measured() {
        let (Rows { measured, skipped, wrong }, _) = measured(AdapterClass::Software);
        let wrong: Vec<_> = wrong.iter().map(|row| (row.id.as_str(), row.why.as_str())).collect();
        assert_eq!(wrong, [("wrong", "result of a bench row: element 1 is NaN, must be finite")]);
        assert_eq!(skipped, []);
        assert_eq!(measured.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["small", "large"]);
        for row in measured {
            assert!(row.runs > 0 && row.median_us >= row.min_us && row.min_us > 0.0, "{row:?}");
            // The processor's own caches are left alone.
            assert_eq!(row.cold_us, None);
        }
    }

    /// On a device that is taken for a GPU, two figures: hot and cold.
    #[test]
    fn rows_of_a_gpu_are_also_measured_with_cold_caches() {
        let (Rows { measured, .. }, timer) = measured(AdapterClass::Discrete);
        assert_eq!(measured.len(), 2);
        for row in measured {
            assert_eq!(row.cold_us.is_some(), timer.clock() == Clock::Timestamps, "{row:?}");
            assert!(row.cold_us.is_none_or(|us| us > 0.0), "{row:?}");
        }
    }

    #[test]
    fn a_profile_has_every_dispatch_with_its_shares_of_the_ceilings() {
        let (kernels, timer) = device(AdapterClass::Software);
        let [small, _, large] = three();
        let rows = [small, large];
        let found = profile(&kernels, &timer, &ROOFLINE, &rows, || true).unwrap();
        if timer.clock() == Clock::Wall {
            assert_eq!(found, []);
            return;
        }
        assert_eq!(found.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["small", "large"]);
        for (of_row, row) in found.iter().zip(&rows) {
            let cost = row.prepare(&kernels, &mut Stock::default()).unwrap().cost;
            let [dispatch] = &of_row.dispatches[..] else { unreachable!("{of_row:?}") };
            assert_eq!((dispatch.kernel.as_str(), dispatch.bytes, dispatch.flops), ("norm", cost.bytes, cost.flops));
            assert!(dispatch.us > 0.0 && of_row.timestamps_us >= 0.0 && !dispatch.grid.contains(&0), "{of_row:?}");
            // 4000 bytes and 8000 FLOPs in a microsecond are all of the ceilings.
            let [copy, fma] = [cost.bytes as f64 / 4e3, cost.flops as f64 / 8e3].map(|us| 100.0 * us / dispatch.us);
            assert!((dispatch.pct_copy / copy - 1.0).abs() < 1e-9 && (dispatch.pct_fma / fma - 1.0).abs() < 1e-9);
        }
        let before = profile(&kernels, &timer, &ROOFLINE, &rows, || false).unwrap();
        assert_eq!(before, [], "none is begun after an interrupt");
    }
}
