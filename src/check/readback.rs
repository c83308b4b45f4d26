//! Reads device memory back: the one place, beside the program, that submits and maps.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result};
use crate::kernel::{Kernels, Region, scoped};

/// A map request's answer, and who waits for it.
#[derive(Default)]
struct Answer {
    result: Option<Result<(), wgpu::BufferAsyncError>>,
    waker: Option<Waker>,
}

/// Copies regions to the host, in one submission after everything that was submitted before.
///
/// Works in a browser too: there the future is woken by the page's event loop.
///
/// # Errors
/// [`Error::Device`] when the device is lost or out of memory.
pub async fn read(kernels: &Kernels, queue: &wgpu::Queue, regions: &[&Region]) -> Result<Vec<Vec<u8>>> {
    let device = kernels.device();
    // Copies are whole words.
    let padded = |region: &Region| region.size.next_multiple_of(4);
    let total: u64 = regions.iter().map(|region| padded(region)).sum();
    if total == 0 {
        return Ok(regions.iter().map(|_| Vec::new()).collect());
    }
    let staging = scoped(device, "reading back", || {
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
        queue.submit([encoder.finish()]);
        staging
    })?;
    let answer = Arc::new(Mutex::new(Answer::default()));
    let lock = |answer: &Arc<Mutex<Answer>>| -> Option<Waker> {
        answer.lock().unwrap_or_else(PoisonError::into_inner).waker.take()
    };
    let sender = answer.clone();
    staging.map_async(wgpu::MapMode::Read, .., move |result| {
        sender.lock().unwrap_or_else(PoisonError::into_inner).result = Some(result);
        if let Some(waker) = lock(&sender) {
            waker.wake();
        }
    });
    device.poll(wgpu::PollType::wait_indefinitely()).map_err(|error| Error::device("reading back", error))?;
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
    .map_err(|error| Error::device("reading back (the device may be lost)", error))?;
    let bytes = {
        let view = staging.get_mapped_range(..).map_err(|error| Error::device("reading back", error))?;
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

/// Reads regions of f32.
///
/// # Errors
/// As [`read`].
pub async fn read_f32(kernels: &Kernels, queue: &wgpu::Queue, regions: &[&Region]) -> Result<Vec<Vec<f32>>> {
    let bytes = read(kernels, queue, regions).await?;
    Ok(bytes.into_iter().map(|bytes| bytemuck::pod_collect_to_vec(&bytes)).collect())
}

/// Runs one of the futures above to its end; on native backends they are ready at once.
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
/// [`Error::Device`] when the device is lost or out of memory.
pub fn submit(recording: &crate::kernel::Recording, queue: &wgpu::Queue) -> Result<()> {
    let device = recording.kernels().device();
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla") });
    recording.encode(&mut encoder)?;
    scoped(device, "submitting", || {
        queue.submit([encoder.finish()]);
    })
}
