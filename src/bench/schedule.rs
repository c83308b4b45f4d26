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
