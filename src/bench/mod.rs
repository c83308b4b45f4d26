//! The one table of measured rows: what `egmla bench`, `egmla tune` and the criterion benches time.
//!
//! A [`Row`] is a kernel alone or one step of a layer. [`Row::prepare`] sets up its buffers and records it;
//! [`schedule::measure`] times the recordings in turns, so that a drift of the machine affects every row alike. FLOPs and
//! bytes are those of [`Cost`].

pub mod host;
pub mod report;
pub mod roofline;
mod rows;
pub mod schedule;
pub mod timer;
pub mod tokens;
pub mod tuning;

use serde::{Deserialize, Serialize};

use crate::cost::Cost;
use crate::device::{Kernels, Region};
use crate::error::{DataError, Error, Result};
use crate::readback;
use crate::recording::Recording;

pub use rows::{Stock, paper_120m, rows};

/// Which rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    /// Caches of up to 8192 tokens: minutes on a software adapter.
    Quick,
    /// Every row.
    Full,
}

/// One bench row: a name, and its set-up.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    id: String,
    path: &'static str,
    storage: &'static str,
    suite: Suite,
    work: rows::Work,
}

impl Row {
    /// `decode/egmla_120m_r64/expanded/t8192`
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The kernel, or the decode path of a layer.
    pub fn path(&self) -> &'static str {
        self.path
    }

    /// How weights and cache are stored, where they are not stored alike.
    pub fn storage(&self) -> &'static str {
        self.storage
    }

    /// Whether a suite holds it.
    pub fn is_in(&self, suite: Suite) -> bool {
        self.suite <= suite
    }

    /// Uploads what the row needs and records its one step. The recording may be submitted any number of times.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a path that this version does not have; what the device refuses.
    pub fn prepare(&self, kernels: &Kernels, stock: &mut Stock) -> Result<Prepared> {
        rows::prepare(&self.work, kernels, stock)
    }
}

/// A row on the device.
pub struct Prepared {
    /// One step.
    pub recording: Recording,
    /// FLOPs and bytes of the step.
    pub cost: Cost,
    /// f32 results.
    pub output: Region,
    /// The same in f64 on the CPU, where a kernel's definition takes seconds at most.
    pub reference: Option<Box<dyn Fn()>>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("recording", &self.recording).field("cost", &self.cost).finish_non_exhaustive()
    }
}

impl Prepared {
    /// Reads the results of an earlier submission.
    ///
    /// # Errors
    /// `DataError::NonFinite` for one that is not finite: a wrong result is not worth timing.
    pub fn verify(&self) -> Result<()> {
        let values = readback::wait(readback::read_f32(self.recording.kernels(), &[&self.output]))?
            .into_iter()
            .next()
            .unwrap_or_default();
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(index) => {
                Err(Error::Data(DataError::NonFinite { what: "result of a bench row", index, value: values[index] }))
            }
        }
    }
}
