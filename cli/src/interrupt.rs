//! Ctrl-C: finishes the step at hand, restores the terminal, keeps older files or what was measured, and exits with status 130.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::console;
use crate::failure::Failure;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Undone if the step at hand does not end in time.
static UNDO: Mutex<Vec<Box<dyn FnOnce() + Send>>> = Mutex::new(Vec::new());

/// Time for the step at hand to end by itself.
const PATIENCE: Duration = Duration::from_secs(2);

/// From here on Ctrl-C asks the run to end. A run that does not within two seconds (a kernel that is being compiled, a long step)
/// is ended from outside, as it is by a second Ctrl-C.
pub fn watch() {
    watch_with(|| {
        // The handler must return, or nobody hears the second.
        std::thread::spawn(|| {
            std::thread::sleep(PATIENCE);
            leave();
        });
    });
}

/// The same for a run that has results to keep, and is not ended before it has: only a second Ctrl-C does.
pub fn watch_patiently() {
    watch_with(|| console::note("interrupted: what was measured is kept; once more ends it at once"));
}

fn watch_with(first: impl Fn() + Send + 'static) {
    let watched = ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::SeqCst) {
            leave();
        }
        first();
    });
    if let Err(error) = watched {
        tracing::warn!("Ctrl-C will end the program at once: {error}");
    }
}

/// Whether the run was asked to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Fails once the run was asked to end: called before every step.
pub fn check() -> Result<(), Failure> {
    if asked() { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Runs `undo` where the program is ended from outside; whoever ends by itself cleans up by itself.
pub fn undo(undo: impl FnOnce() + Send + 'static) {
    UNDO.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(undo));
}

fn leave() -> ! {
    let undo = std::mem::take(&mut *UNDO.lock().unwrap_or_else(PoisonError::into_inner));
    undo.into_iter().for_each(|undo| undo());
    console::error(Failure::Interrupted.message());
    std::process::exit(Failure::Interrupted.exit_code().into())
}
