//! Finds the fastest tile settings of each kernel on one adapter, on request.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::report::median;
use super::timer::{Copies, Timer};
use super::{Row, Stock};
use crate::adapter::Tunings;
use crate::device::Kernels;
use crate::error::Result;
use crate::kernels::shaders;
use crate::recording::Recording;

/// Runs of each candidate, in turns.
const RUNS: usize = 5;

/// With fewer a kernel counts as not measured.
const LEAST_RUNS: usize = 3;

/// Rows that a kernel is measured in: those where it takes longest.
const ROWS: usize = 3;

/// A candidate must be this much faster than the setting for the class: less is the machine's noise.
const GAIN: f64 = 0.95;

/// The tuning result of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// Stem of the kernel.
    pub kernel: &'static str,
    /// Microseconds of its dispatches in the rows that were measured, with the setting for the adapter's class.
    pub of_class_us: f64,
    /// The same with the fastest setting.
    pub best_us: f64,
    /// The setting to take, where one is faster by more than noise.
    pub choice: Option<usize>,
}

/// Progress of tuning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The kernel at hand.
    pub kernel: &'static str,
    /// Kernels that are done.
    pub done: usize,
    /// Kernels; 0 while their order is measured.
    pub of: usize,
}

/// Measures the settings of every kernel of these rows, those first that take longest, until all are done or `limit` is
/// over, or until `progress`, which is called before each candidate's run, says false. Dispatches of other kernels are left out of
/// what is timed. Kernels that would need longer than `limit` leaves them are not among the results.
///
/// # Errors
/// A lost device. Settings that the device does not allow are passed over.
pub fn tune(
    kernels: &Kernels,
    timer: &Timer,
    rows: &[Row],
    limit: Duration,
    mut progress: impl FnMut(Progress) -> bool,
) -> Result<Vec<Tuned>> {
    let start = Instant::now();
    let of_class = kernels.with_tunings(Tunings::default())?;
    let mut stock = Stock::default();
    // Microseconds of each kernel in each row.
    let mut shares: BTreeMap<&'static str, Vec<(f64, usize)>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        if start.elapsed() > limit / 3 {
            break;
        }
        let prepared = match row.prepare(&of_class, &mut stock) {
            Ok(prepared) => prepared,
            Err(error) if error.is_of_device() => return Err(error),
            Err(_) => continue,
        };
        let names: BTreeSet<_> = prepared.recording.kernel_names().collect();
        for name in names {
            if start.elapsed() > limit / 3 {
                break;
            }
            if !progress(Progress { kernel: name, done: 0, of: 0 }) {
                return Ok(Vec::new());
            }
            let Some(mut recording) = alone(row, name, &of_class, &mut stock)? else { continue };
            shares.entry(name).or_default().push((timer.run(&mut recording)?.device_us, index));
        }
    }
    let mut order: Vec<_> = shares.into_iter().filter(|(name, _)| settings(name) > 1).collect();
    for (name, shares) in &mut order {
        shares.sort_by(|a, b| b.0.total_cmp(&a.0));
        // A row that would take most of the time by itself gives way to shorter ones.
        let runs = ((1 + settings(name)) * (1 + RUNS)) as f64;
        let within = |time: f64| time * runs < limit.as_secs_f64() * 1e6 / 8.0;
        shares.retain(|&(time, _)| within(time));
        shares.truncate(ROWS);
    }
    order.retain(|(_, shares)| !shares.is_empty());
    let total = |shares: &[(f64, usize)]| shares.iter().map(|(time, _)| time).sum::<f64>();
    order.sort_by(|(_, a), (_, b)| total(b).total_cmp(&total(a)));

    let mut tuned = Vec::new();
    let of = order.len();
    for (done, (kernel, shares)) in order.into_iter().enumerate() {
        let mut goes_on = || progress(Progress { kernel, done, of });
        if start.elapsed() > limit || !goes_on() {
            break;
        }
        let rows: Vec<_> = shares.iter().map(|&(_, index)| &rows[index]).collect();
        tuned.extend(kernel_of((kernel, &rows), &of_class, timer, &mut stock, (start, limit), goes_on)?);
    }
    Ok(tuned)
}

/// Number of settings of a kernel.
fn settings(kernel: &str) -> usize {
    shaders().find(|spec| spec.name == kernel).map_or(0, |spec| spec.tunings)
}

/// The dispatches of one kernel in a row; `None` where the device does not allow what they need.
fn alone(row: &Row, kernel: &str, kernels: &Kernels, stock: &mut Stock) -> Result<Option<Recording>> {
    match row.prepare(kernels, stock) {
        Ok(mut prepared) => {
            prepared.recording.retain(kernel);
            Ok(Some(prepared.recording))
        }
        Err(error) if error.is_of_device() => Err(error),
        Err(_) => Ok(None),
    }
}

/// A setting of a kernel, or that for the class; its recordings, one per row; their times together, run by run.
type Candidate = (Option<usize>, Vec<(Recording, Copies)>, Vec<f64>);

/// Measures the settings of one kernel; `None` where the time was up too early, or it does not go on.
fn kernel_of(
    (kernel, rows): (&'static str, &[&Row]),
    of_class: &Kernels,
    timer: &Timer,
    stock: &mut Stock,
    (start, limit): (Instant, Duration),
    mut goes_on: impl FnMut() -> bool,
) -> Result<Option<Tuned>> {
    let mut candidates: Vec<Candidate> = Vec::new();
    // The setting for the class, then each by its number.
    for setting in std::iter::once(None).chain((0..settings(kernel)).map(Some)) {
        if !goes_on() {
            return Ok(None);
        }
        let tunings = setting.map(|index| (kernel.to_owned(), index)).into_iter().collect();
        let with = of_class.with_tunings(Tunings(tunings))?;
        let recordings = rows.iter().map(|row| alone(row, kernel, &with, stock)).collect::<Result<Option<Vec<_>>>>()?;
        let Some(recordings) = recordings else { continue };
        let compiled = |mut recording: Recording| {
            timer.run(&mut recording)?;
            let copies = Copies::of(timer.run(&mut recording)?.device_us);
            Ok((recording, copies))
        };
        let recordings = recordings.into_iter().map(compiled).collect::<Result<Vec<_>>>()?;
        candidates.push((setting, recordings, Vec::new()));
    }
    let mut rounds = 0;
    'rounds: while rounds < RUNS {
        if rounds > 0 && start.elapsed() > limit {
            break;
        }
        for (_, recordings, times) in &mut candidates {
            if !goes_on() {
                break 'rounds;
            }
            let run = |(recording, copies): &mut (Recording, Copies)| {
                timer.steady(recording, *copies).map(|elapsed| elapsed.device_us)
            };
            times.push(recordings.iter_mut().map(run).sum::<Result<f64>>()?);
        }
        rounds += 1;
    }
    if rounds < LEAST_RUNS {
        return Ok(None);
    }
    let mut medians = candidates.into_iter().map(|(setting, _, mut times)| {
        // Whole rounds only, so that no candidate has runs that another has not.
        times.truncate(rounds);
        times.sort_by(f64::total_cmp);
        (setting, median(&times))
    });
    let of_class_us = medians.next().map_or(0.0, |(_, time)| time);
    let best = medians.min_by(|a, b| a.1.total_cmp(&b.1)).filter(|(_, time)| *time < of_class_us);
    let (choice, best_us) = best.unwrap_or((None, of_class_us));
    let choice = choice.filter(|_| best_us < GAIN * of_class_us);
    Ok(Some(Tuned { kernel, of_class_us, best_us, choice }))
}
