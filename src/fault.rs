//! Faults that a device reports between calls, kept for its owner.
//!
//! Which fault appears where:
//!
//! | fault | where | as |
//! |---|---|---|
//! | out of memory | whatever allocates, at once (error scopes) | `DeviceError::OutOfMemory` |
//! | refused by validation, or by the driver | whatever creates, at once (error scopes) | `DeviceError::Validation`, `DeviceError::Driver` |
//! | lost device | whatever allocates, compiles or records; reading back | `DeviceError::Lost` |
//! | lost device, between calls | the owner alone: [`Faults`] | `DeviceError::Lost` |
//! | an error in the owner's own encoder or pass | the owner alone: [`Faults`] | `DeviceError::Validation`, `DeviceError::OutOfMemory` |
//! | a device that hangs | who waits: [`crate::readback::finish_within`] | `DeviceError::Timeout` |
//!
//! On a lost device wgpu creates, submits and polls with success: the library detects the loss when it maps a buffer, the owner
//! by wgpu's callback, which may wait until submitted work is done and somebody polls, and by what the library detected: every
//! `DeviceError::Lost` is made here. In a browser error scopes answer later and mapping at creation succeeds: there the owner's
//! [`Faults`] and reading back report it.
//!
//! A failed call leaves the host's state unchanged: a recording's dispatches, a cache's lengths. The memory of a lost device is
//! gone: open a new device, make the same objects on it, and feed the tokens again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::Kernels;
use crate::error::{DeviceError, Error, Result, one_line};

#[derive(Debug, Default)]
struct State {
    /// Why the device was lost.
    lost: Option<String>,
    /// Errors that no scope caught, in order.
    uncaptured: Vec<Error>,
}

/// The loss of a device, and the errors that no error scope caught. Cloning shares them, and so do all kernels that come of one
/// call of [`Kernels::new`].
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    /// Watches the kernels' device from now on. Only its owner may call it: it replaces the device's handlers. Without a handler
    /// wgpu panics on an error outside of all scopes.
    pub fn watch(kernels: &Kernels) -> Self {
        let (device, faults) = (kernels.device(), kernels.faults().clone());
        let uncaptured = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            uncaptured.state().uncaptured.push(Error::wgpu("outside of any scope", &error));
        }));
        let lost = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            let reason = match reason {
                wgpu::DeviceLostReason::Destroyed => "destroyed",
                wgpu::DeviceLostReason::Unknown => "no reason given",
            };
            lost.state().lost = Some(if message.is_empty() { reason.to_owned() } else { message });
        });
        faults
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error of a call that found the device lost, by these words; from here on it is known to be.
    pub(crate) fn lost(&self, what: impl Into<String>, message: impl std::fmt::Display) -> Error {
        let message = one_line(message);
        // What wgpu gave as its reason, before or later, says more.
        self.state().lost.get_or_insert_with(|| message.clone());
        DeviceError::Lost { what: what.into(), message }.into()
    }

    /// Whether the device is known to be lost: by wgpu's word, or by a call that returned `DeviceError::Lost`.
    pub fn is_lost(&self) -> bool {
        self.state().lost.is_some()
    }

    /// Fails once the device is lost, and once per error that no scope caught. Call it after every submission, before trusting
    /// results: it costs a lock.
    ///
    /// # Errors
    /// `DeviceError::Lost`, from the loss on; else the oldest error that was not returned yet.
    pub fn check(&self) -> Result<()> {
        let lost = self.state().lost.clone();
        if let Some(message) = lost {
            return Err(self.lost("device", message));
        }
        let mut state = self.state();
        if state.uncaptured.is_empty() { Ok(()) } else { Err(state.uncaptured.remove(0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::Faults;
    use crate::error::{DeviceError, Error};

    /// Without a device: no callback comes.
    #[test]
    fn a_call_that_finds_the_device_lost_tells_every_owner() {
        let faults = Faults::default();
        let owner = faults.clone();
        assert!(owner.check().is_ok() && !owner.is_lost());
        let error = faults.lost("reading back", "not\n mapped");
        assert!(error.is_loss() && owner.is_lost());
        assert!(
            matches!(owner.check(), Err(Error::Device(DeviceError::Lost { message, .. })) if message == "not mapped")
        );
        // The first word stands.
        faults.lost("allocating", "again");
        assert!(
            matches!(owner.check(), Err(Error::Device(DeviceError::Lost { message, .. })) if message == "not mapped")
        );
    }
}
