//! Times a recording: by the device's own clock where it has one, else by the time from submission to its end. Short recordings
//! are repeated, behind untimed copies that bring the clocks up; what the caches hold is another figure.

use std::time::Instant;

use super::report::median;
use crate::device::{Kernels, Region};
use crate::error::Result;
use crate::readback;
use crate::recording::Recording;

/// The clock of the times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// Timestamps that the device writes before and after the compute pass.
    Timestamps,
    /// Submission to its end, as the host sees it.
    Wall,
}

impl Clock {
    /// In words, for tables.
    pub fn describe(self) -> &'static str {
        match self {
            Clock::Timestamps => "device timestamps around the pass",
            Clock::Wall => "wall time from submission to its end",
        }
    }
}

/// How often one submission holds a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// First, for the clocks: a GPU that was waited for idles at a fraction of its rate.
    pub untimed: usize,
    /// Then, in one timed pass.
    pub timed: usize,
}

impl Copies {
    /// One run, timed.
    pub const ONE: Copies = Copies { untimed: 0, timed: 1 };

    /// Untimed work of four milliseconds, then a timed pass of one and more, for a recording of so many microseconds. Long
    /// recordings run once: they bring their clocks up by themselves.
    pub fn of(microseconds: f64) -> Self {
        let fill = |most: f64| if microseconds > 0.0 { (most / microseconds).ceil().min(256.0) as usize } else { 1 };
        let untimed = if microseconds < 20_000.0 { fill(4_000.0) } else { 0 };
        Copies { untimed, timed: fill(1_000.0).max(1) }
    }
}

/// Dispatches of a recording, each timed by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Profiled {
    /// Microseconds of each, timestamps included.
    pub dispatches: Vec<f64>,
    /// Microseconds of a pass with nothing in it: what the timestamps themselves cost.
    pub empty_us: f64,
}

/// One submission.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Elapsed {
    /// Microseconds of one timed copy by the timer's clock.
    pub device_us: f64,
    /// Microseconds from submission to its end, as the host sees it.
    pub wall_us: f64,
}

/// One run of a recording, in parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parts {
    /// Microseconds of the host for its pass, its commands and their submission.
    pub submit_us: f64,
    /// Microseconds from then to the end of the work, as the host sees it.
    pub wait_us: f64,
    /// Microseconds of the pass by the device's own clock, where it has one.
    pub device_us: Option<f64>,
}

/// Submits, waits, and measures the time.
#[derive(Debug)]
pub struct Timer {
    kernels: Kernels,
    timestamps: Option<Timestamps>,
}

#[derive(Debug)]
struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    nanoseconds: f64,
}

/// Timed passes of a submission, at most: a query set holds two timestamps of each.
const MOST_PASSES: u32 = 1024;

impl Timer {
    /// With timestamps where the device was requested with `Features::TIMESTAMP_QUERY`.
    ///
    /// # Errors
    /// `DeviceError::OutOfMemory`, `DeviceError::Lost`.
    pub fn new(kernels: &Kernels) -> Result<Self> {
        let device = kernels.device();
        let timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            kernels.watched().scoped("timestamps", || Timestamps {
                queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("egmla.timestamps"),
                    ty: wgpu::QueryType::Timestamp,
                    count: 2 * MOST_PASSES,
                }),
                resolved: device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("egmla.timestamps"),
                    size: 16 * u64::from(MOST_PASSES),
                    usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                }),
                nanoseconds: f64::from(kernels.queue().get_timestamp_period()),
            })
        });
        Ok(Timer { kernels: kernels.clone(), timestamps: timestamps.transpose()? })
    }

    /// The clock of `device_us`.
    pub fn clock(&self) -> Clock {
        if self.timestamps.is_some() { Clock::Timestamps } else { Clock::Wall }
    }

    /// Runs a recording once and waits for its end.
    ///
    /// # Errors
    /// As [`Recording::record`]; `DeviceError::Driver` when the driver fails.
    pub fn run(&self, recording: &mut Recording) -> Result<Elapsed> {
        self.steady(recording, Copies::ONE)
    }

    /// Runs copies of a recording, one after another, and waits for their end.
    ///
    /// # Errors
    /// As [`Timer::run`].
    pub fn steady(&self, recording: &mut Recording, copies: Copies) -> Result<Elapsed> {
        let (walls, passes) = self.submit(|passes| {
            passes.untimed(|pass| (0..copies.untimed).try_for_each(|_| recording.record(pass)))?;
            passes.timed(|pass| (0..copies.timed).try_for_each(|_| recording.record(pass)))
        })?;
        let wall_us = walls.submission_us + walls.wait_us;
        let device_us = match passes.first() {
            Some(time) => time / copies.timed as f64,
            None => wall_us / (copies.untimed + copies.timed) as f64,
        };
        Ok(Elapsed { device_us, wall_us })
    }

    /// Runs a recording once, waits for its end, and tells the host's time apart.
    ///
    /// # Errors
    /// As [`Timer::run`].
    pub fn parts(&self, recording: &mut Recording) -> Result<Parts> {
        let (walls, passes) = self.submit(|passes| passes.timed(|pass| recording.record(pass)))?;
        let Walls { record_us, submission_us, wait_us } = walls;
        Ok(Parts { submit_us: record_us + submission_us, wait_us, device_us: passes.first().copied() })
    }

    /// Median microseconds of a recording that finds nothing in the device's caches: `evict`, which goes over more memory than
    /// they hold, runs before each of `runs` and is not timed. `None` without timestamps.
    ///
    /// # Errors
    /// As [`Timer::run`].
    pub fn cold(&self, recording: &mut Recording, evict: &mut Recording, runs: usize) -> Result<Option<f64>> {
        if self.timestamps.is_none() {
            return Ok(None);
        }
        let (_, mut passes) = self.submit(|passes| {
            (0..runs).try_for_each(|_| {
                passes.untimed(|pass| evict.record(pass))?;
                passes.timed(|pass| recording.record(pass))
            })
        })?;
        passes.sort_by(f64::total_cmp);
        Ok(Some(median(&passes)))
    }

    /// Times every dispatch, each in a pass of its own behind untimed copies. `None` without timestamps, or with more dispatches
    /// than there are of these.
    ///
    /// # Errors
    /// As [`Timer::run`].
    pub fn profile(&self, recording: &mut Recording, copies: Copies) -> Result<Option<Profiled>> {
        let dispatches = recording.dispatches();
        if self.timestamps.is_none() || dispatches >= MOST_PASSES as usize {
            return Ok(None);
        }
        let (_, mut dispatches) = self.submit(|passes| {
            passes.untimed(|pass| (0..copies.untimed).try_for_each(|_| recording.record(pass)))?;
            (0..dispatches).try_for_each(|index| passes.timed(|pass| recording.record_some(pass, index..index + 1)))?;
            passes.timed(|_| Ok(()))
        })?;
        let empty_us = dispatches.pop().unwrap_or_default();
        Ok(Some(Profiled { dispatches, empty_us }))
    }

    /// Records passes, submits them, waits, and reads the time of each timed one; none without timestamps.
    fn submit(&self, record: impl FnOnce(&mut Passes<'_>) -> Result<()>) -> Result<(Walls, Vec<f64>)> {
        let device = self.kernels.device();
        let microseconds = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
        let begun = Instant::now();
        let encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla.bench") });
        let mut passes = Passes { encoder, timestamps: self.timestamps.as_ref(), timed: 0 };
        record(&mut passes)?;
        let Passes { mut encoder, timed, .. } = passes;
        if let Some(timestamps) = &self.timestamps {
            encoder.resolve_query_set(&timestamps.queries, 0..2 * timed, &timestamps.resolved, 0);
        }
        let walls = self.kernels.watched().scoped("timing", || {
            let commands = encoder.finish();
            let (record_us, start) = (microseconds(begun), Instant::now());
            let submission = self.kernels.queue().submit([commands]);
            let (submission_us, start) = (microseconds(start), Instant::now());
            let waited = readback::wait_for(&self.kernels, "timing", submission);
            let walls = Walls { record_us, submission_us, wait_us: microseconds(start) };
            waited.map(|()| walls)
        })??;
        let times = self.timestamps.as_ref().map_or(Ok(Vec::new()), |timestamps| self.read(timestamps, timed))?;
        Ok((walls, times))
    }

    /// Microseconds of each timed pass.
    fn read(&self, timestamps: &Timestamps, timed: u32) -> Result<Vec<f64>> {
        let region = Region::new(&timestamps.resolved, 0, 16 * u64::from(timed));
        let bytes = readback::wait(readback::read(&self.kernels, &[&region]))?.into_iter().next().unwrap_or_default();
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let elapsed = |pair: &[u64]| pair[1].saturating_sub(pair[0]) as f64 * timestamps.nanoseconds / 1e3;
        Ok(ticks.chunks_exact(2).map(elapsed).collect())
    }
}

/// Microseconds of the host for a submission: its commands, handing them over, waiting for their end.
struct Walls {
    record_us: f64,
    submission_us: f64,
    wait_us: f64,
}

/// The passes of a submission.
struct Passes<'a> {
    encoder: wgpu::CommandEncoder,
    timestamps: Option<&'a Timestamps>,
    /// Timed so far.
    timed: u32,
}

impl Passes<'_> {
    fn untimed(&mut self, record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<()>) -> Result<()> {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("egmla.bench"), timestamp_writes: None };
        record(&mut self.encoder.begin_compute_pass(&descriptor))
    }

    fn timed(&mut self, record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<()>) -> Result<()> {
        let timestamp_writes = self.timestamps.map(|timestamps| wgpu::ComputePassTimestampWrites {
            query_set: &timestamps.queries,
            beginning_of_pass_write_index: Some(2 * self.timed),
            end_of_pass_write_index: Some(2 * self.timed + 1),
        });
        self.timed += 1;
        let descriptor = wgpu::ComputePassDescriptor { label: Some("egmla.bench"), timestamp_writes };
        record(&mut self.encoder.begin_compute_pass(&descriptor))
    }
}

#[cfg(test)]
mod tests {
    use super::Copies;

    #[test]
    fn short_recordings_are_repeated_and_long_ones_are_not() {
        assert_eq!(Copies::of(10.0), Copies { untimed: 256, timed: 100 });
        assert_eq!(Copies::of(500.0), Copies { untimed: 8, timed: 2 });
        assert_eq!(Copies::of(5_000.0), Copies { untimed: 1, timed: 1 });
        assert_eq!(Copies::of(1e6), Copies { untimed: 0, timed: 1 });
        assert_eq!(Copies::of(0.0), Copies { untimed: 1, timed: 1 });
    }
}
