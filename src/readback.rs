//! Reads device memory back: the one module of the library, with `check` and `bench`, that submits and maps.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::attention::LatentCache;
use crate::device::{Kernels, Region};
use crate::error::{DeviceError, Error, Result};
use crate::recording::Recording;

/// The answer to a map request, and the waker that it wakes.
#[derive(Default)]
struct Answer {
    result: Option<Result<(), wgpu::BufferAsyncError>>,
    waker: Option<Waker>,
}

/// Copies regions to the host, in one submission after all earlier ones.
///
/// Works in a browser too: the page's event loop wakes the future.
///
/// # Errors
/// `DeviceError::Lost`, `DeviceError::OutOfMemory`; `DeviceError::Validation` for a region of another device. Never a number that
/// the device did not write.
pub async fn read(kernels: &Kernels, regions: &[&Region]) -> Result<Vec<Vec<u8>>> {
    let what = "reading back";
    let (device, watched) = (kernels.device(), kernels.watched());
    // Copies are whole words.
    let padded = |region: &Region| region.size.next_multiple_of(4);
    let total: u64 = regions.iter().map(|region| padded(region)).sum();
    if total == 0 {
        return Ok(regions.iter().map(|_| Vec::new()).collect());
    }
    let answer = Arc::new(Mutex::new(Answer::default()));
    let sender = answer.clone();
    let (staging, submission) = watched.scoped(what, || {
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("egmla.readback"),
            size: total,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut at = 0;
        for region in regions {
            encoder.copy_buffer_to_buffer(&region.buffer, region.offset, &staging, at, padded(region));
            at += padded(region);
        }
        let submission = kernels.queue().submit([encoder.finish()]);
        // Within the scope, which also catches wgpu's errors about the mapping.
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            let waker = {
                let mut answer = sender.lock().unwrap_or_else(PoisonError::into_inner);
                answer.result = Some(result);
                answer.waker.take()
            };
            // Outside of the lock: the woken task may ask for the answer at once.
            if let Some(waker) = waker {
                waker.wake();
            }
        });
        (staging, submission)
    })?;
    wait_for(kernels, what, submission)?;
    poll_fn(|context| {
        let mut answer = answer.lock().unwrap_or_else(PoisonError::into_inner);
        match answer.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                answer.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    })
    .await
    // After a valid submission, mapping fails only on a lost device.
    .map_err(|error| kernels.faults().lost(what, error))?;
    let bytes = {
        let view = staging.get_mapped_range(..).map_err(|error| kernels.faults().lost(what, error))?;
        let mut at = 0;
        regions
            .iter()
            .map(|region| {
                let part = view[at..at + region.size as usize].to_vec();
                at += padded(region) as usize;
                part
            })
            .collect()
    };
    staging.unmap();
    Ok(bytes)
}

/// Lets wgpu see what is done, and waits for it if `how` says so.
fn poll(kernels: &Kernels, what: &str, how: wgpu::PollType) -> Result<()> {
    let polled = kernels.device().poll(how).map(drop);
    polled.map_err(|error| kernels.watched().lost_or(what, Error::device(what, error)))
}

/// Waits until a submission is done.
pub(crate) fn wait_for(kernels: &Kernels, what: &str, submission: wgpu::SubmissionIndex) -> Result<()> {
    poll(kernels, what, wgpu::PollType::Wait { submission_index: Some(submission), timeout: None })
}

/// Waits until all submitted work is done, for at most `timeout`: for callers who would rather open a new device than wait for
/// one that hangs. In a browser, which watches over the GPU itself, it returns at once.
///
/// # Errors
/// `DeviceError::Timeout`, `DeviceError::Lost`. After a timeout the work still runs: wait again, or read its results.
pub fn finish_within(kernels: &Kernels, timeout: Duration) -> Result<()> {
    let (watched, what) = (kernels.watched(), "waiting for the device");
    let done = Arc::new(AtomicBool::new(false));
    let sender = done.clone();
    watched.scoped(what, || kernels.queue().on_submitted_work_done(move || sender.store(true, Ordering::Release)))?;
    if cfg!(target_arch = "wasm32") {
        return Ok(());
    }
    let start = Instant::now();
    // wgpu's own wait has a timeout, which Mesa's software Vulkan does not keep.
    while !done.load(Ordering::Acquire) {
        poll(kernels, what, wgpu::PollType::Poll)?;
        if start.elapsed() >= timeout {
            return Err(Error::Device(DeviceError::Timeout { what: what.to_owned(), seconds: timeout.as_secs_f64() }));
        }
        std::thread::sleep(Duration::from_micros(200).min(timeout));
    }
    watched.alive(what)
}

/// Submits the copies that uploads left to wgpu, and waits for them: until then it keeps their bytes in the host's memory, too.
///
/// # Errors
/// `DeviceError::Lost`, or what else wgpu reports while it waits.
#[cfg(feature = "decoder")]
pub(crate) fn finish_uploads(kernels: &Kernels) -> Result<()> {
    wait_for(kernels, "uploading", kernels.queue().submit([]))
}

/// Reads regions of f32.
///
/// # Errors
/// As [`read`].
pub async fn read_f32(kernels: &Kernels, regions: &[&Region]) -> Result<Vec<Vec<f32>>> {
    let bytes = read(kernels, regions).await?;
    Ok(bytes.into_iter().map(|bytes| bytemuck::pod_collect_to_vec(&bytes)).collect())
}

/// A sequence of a cache as bytes: reads its rows back and hands them to [`LatentCache::save_sequence`].
///
/// # Errors
/// `ArgumentError::OutOfRange` for a sequence that does not exist; as [`read`].
pub async fn save_sequence(cache: &LatentCache, sequence: usize) -> Result<Vec<u8>> {
    let regions = cache.sequence_regions(sequence)?;
    let rows = read(cache.kernels(), &regions.iter().collect::<Vec<_>>()).await?;
    cache.save_sequence(sequence, &rows)
}

/// Runs one of the futures above to its end; on native backends it is ready at once.
///
/// # Errors
/// Those of the future.
pub fn wait<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return result;
        }
        std::thread::yield_now();
    }
}

/// Submits a recording and waits for nothing.
///
/// # Errors
/// As [`Recording::record`](crate::recording::Recording::record); nothing is then submitted. Reading back reports a device that
/// is lost later.
pub fn submit(recording: &mut Recording) -> Result<()> {
    let kernels = recording.kernels().clone();
    let device = kernels.device();
    kernels.watched().scoped("submitting", || {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla") });
        recording.encode(&mut encoder)?;
        kernels.queue().submit([encoder.finish()]);
        Ok(())
    })?
}
