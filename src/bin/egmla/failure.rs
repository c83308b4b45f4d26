//! How the program ends: exit 2 for bad usage or input, exit 1 for what fails while it runs.

use std::fmt::Display;

/// Why the program stops early; the text is one line.
#[derive(Debug)]
pub enum Failure {
    /// The user can mend it: a wrong option, a broken file. Exit 2.
    Usage(String),
    /// It failed while running: the device was lost, a check did not hold. Exit 1.
    Run(String),
}

impl Failure {
    /// Bad usage or input.
    pub fn usage(message: impl Display) -> Self {
        Failure::Usage(message.to_string())
    }

    /// Failed while running.
    pub fn run(message: impl Display) -> Self {
        Failure::Run(message.to_string())
    }
}

/// The library's errors: what the device or the disk does is a failed run, all else is bad input.
impl From<egmla::Error> for Failure {
    fn from(error: egmla::Error) -> Self {
        match error {
            egmla::Error::Device { .. } => Failure::run(error),
            _ => Failure::usage(error),
        }
    }
}
