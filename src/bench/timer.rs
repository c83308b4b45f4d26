//! Times a recording: by the device's own clock where it has one, else by the time from submission to its end.

use std::time::Instant;

use crate::device::{Kernels, Region, scoped};
use crate::error::{Error, Result};
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

/// One submission.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Elapsed {
    /// Microseconds by the timer's clock.
    pub device_us: f64,
    /// Microseconds from submission to its end, as the host sees it.
    pub wall_us: f64,
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

impl Timer {
    /// With timestamps where the device was requested with `Features::TIMESTAMP_QUERY`.
    ///
    /// # Errors
    /// `DeviceError::Driver` when the device has no memory left or is lost.
    pub fn new(kernels: &Kernels) -> Result<Self> {
        let device = kernels.device();
        let timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            scoped(device, "timestamps", || Timestamps {
                queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("egmla.timestamps"),
                    ty: wgpu::QueryType::Timestamp,
                    count: 2,
                }),
                resolved: device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("egmla.timestamps"),
                    size: 16,
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
    /// `DeviceError::Driver` when the device refuses a kernel, has no memory left or is lost.
    pub fn run(&self, recording: &mut Recording) -> Result<Elapsed> {
        let device = self.kernels.device();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla.bench") });
        let timestamp_writes = self.timestamps.as_ref().map(|timestamps| wgpu::ComputePassTimestampWrites {
            query_set: &timestamps.queries,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        });
        {
            let descriptor = wgpu::ComputePassDescriptor { label: Some("egmla.bench"), timestamp_writes };
            recording.record(&mut encoder.begin_compute_pass(&descriptor))?;
        }
        if let Some(timestamps) = &self.timestamps {
            encoder.resolve_query_set(&timestamps.queries, 0..2, &timestamps.resolved, 0);
        }
        let wall_us = scoped(device, "timing", || {
            let commands = encoder.finish();
            let start = Instant::now();
            let submission = self.kernels.queue().submit([commands]);
            let waited = device.poll(wgpu::PollType::Wait { submission_index: Some(submission), timeout: None });
            waited.map(|_| start.elapsed().as_secs_f64() * 1e6).map_err(|error| Error::device("timing", error))
        })??;
        let device_us = match &self.timestamps {
            None => wall_us,
            Some(timestamps) => self.read(timestamps)?,
        };
        Ok(Elapsed { device_us, wall_us })
    }

    fn read(&self, timestamps: &Timestamps) -> Result<f64> {
        let region = Region::from(&timestamps.resolved);
        let bytes = readback::wait(readback::read(&self.kernels, &[&region]))?.into_iter().next().unwrap_or_default();
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let elapsed = match ticks[..] {
            [begin, end, ..] => end.saturating_sub(begin),
            _ => 0,
        };
        Ok(elapsed as f64 * timestamps.nanoseconds / 1e3)
    }
}
