//! Exit status of the program: 2 for bad usage or input, 1 for a failure while running, 130 for an interrupt.

use std::fmt::Display;

/// Why the program stops early; the text is printed as one line.
#[derive(Debug)]
pub enum Failure {
    /// The user can mend it: a wrong option, a broken file. Exit 2.
    Usage(String),
    /// It failed while running: the device was lost, a check did not hold. Exit 1.
    Run(String),
    /// Ctrl-C. Exit 130, as shells have it.
    Interrupted,
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

    /// The message, without `error: `.
    pub fn message(&self) -> &str {
        match self {
            Failure::Usage(message) | Failure::Run(message) => message,
            Failure::Interrupted => "interrupted",
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Run(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Interrupted => 130,
        }
    }
}

/// The library's errors: what the device does, and results that are not numbers, are a failed run; all else is bad input.
impl From<egmla::Error> for Failure {
    fn from(error: egmla::Error) -> Self {
        let mut cause = &error;
        while let egmla::Error::File { source, .. } = cause {
            cause = source;
        }
        match cause {
            egmla::Error::Data(egmla::error::DataError::NonFinite { .. }) => Failure::run(error),
            _ if error.is_of_device() => Failure::run(error),
            _ => Failure::usage(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Failure;

    #[test]
    fn the_device_fails_the_run_even_inside_a_file() {
        let lost = || {
            egmla::Error::Device(egmla::error::DeviceError::Driver {
                what: "upload".to_owned(),
                message: "lost".to_owned(),
            })
        };
        assert_eq!(Failure::from(lost()).exit_code(), 1);
        assert_eq!(Failure::from(lost().in_file("w.safetensors")).exit_code(), 1);
        let empty =
            egmla::Error::Argument(egmla::error::ArgumentError::Empty { what: "the step" }).in_file("x.safetensors");
        assert_eq!(Failure::from(empty).exit_code(), 2);
    }
}
