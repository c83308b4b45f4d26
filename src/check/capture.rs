//! Exports recordings instead of running them, for a host without Rust: shaders, override constants, grids and bindings, and the
//! first content of every buffer.
//!
//! A [`Capture`] takes the library's own recordings, so that nothing is described twice, and reads the first content of their
//! buffers back from the device. No kernel runs, so a buffer that the host writes after its first use is refused.

use std::cell::RefCell;
use std::collections::HashMap;

use serde::Serialize;

use super::compare::Tolerance;
use super::guarded::{GUARD_WORDS, Guarded};
use super::view::View;
use crate::adapter::PlanContext;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, KernelError, Result};
use crate::op::Access;
use crate::readback;
use crate::recording::Recording;

/// Bytes, each content stored once.
#[derive(Debug, Default)]
pub struct Blobs {
    bytes: Vec<u8>,
    known: HashMap<Vec<u8>, usize>,
}

/// A piece of [`Blobs::bytes`], or one repeated word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Blob {
    /// Every word is the same.
    Fill {
        /// The word.
        fill: u32,
    },
    /// Bytes at a place.
    At {
        /// First byte; a multiple of 8.
        at: usize,
        /// Bytes.
        bytes: usize,
    },
}

impl Blobs {
    /// All of it, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds bytes, unless they are there.
    pub fn add(&mut self, bytes: &[u8]) -> Blob {
        let at = self.known.get(bytes).copied().unwrap_or_else(|| {
            self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
            let at = self.bytes.len();
            self.bytes.extend_from_slice(bytes);
            self.known.insert(bytes.to_vec(), at);
            at
        });
        Blob::At { at, bytes: bytes.len() }
    }

    /// Adds whole words; one repeated word takes no room.
    pub fn add_words(&mut self, words: &[u32]) -> Blob {
        match words.first() {
            Some(&fill) if words.iter().all(|&word| word == fill) => Blob::Fill { fill },
            _ => self.add(bytemuck::cast_slice(words)),
        }
    }
}

/// A buffer before anything runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BufferData {
    /// Its size in bytes.
    pub bytes: u64,
    /// Its content.
    pub first: Blob,
}

/// A storage binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BindingData {
    /// Its number.
    pub binding: u32,
    /// `var<storage, read_write>` where true, else `var<storage, read>`.
    pub write: bool,
    /// Index of the buffer.
    pub buffer: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// An action of the host.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// Runs a kernel.
    Dispatch {
        /// Stem of `shaders/<kernel>.wgsl`.
        kernel: &'static str,
        /// Whether the file needs `enable subgroups;`, which naga neither needs nor accepts.
        subgroups: bool,
        /// Values of the override constants.
        overrides: Vec<(&'static str, f64)>,
        /// Workgroups in x, y and z.
        grid: [u32; 3],
        /// The uniform at binding 0.
        params: Blob,
        /// Storage bindings.
        bindings: Vec<BindingData>,
    },
    /// Reads a region back and checks that the guard words around it are unchanged.
    Read {
        /// Index of the buffer.
        buffer: usize,
        /// Guard words before the region, and behind it.
        guard: usize,
        /// Words of the region.
        words: usize,
    },
}

/// A dispatch without the numbers of its buffers.
type Constant<'a> = (&'static str, &'a [(&'static str, f64)], [u32; 3], &'a [u8], Vec<(u32, bool, u64, u64)>);

impl Action {
    fn constant<'a>(&'a self, blobs: &'a Blobs) -> Option<Constant<'a>> {
        let Action::Dispatch { kernel, overrides, grid, params: Blob::At { at, bytes }, bindings, .. } = self else {
            return None;
        };
        let bindings = bindings.iter().map(|one| (one.binding, one.write, one.offset, one.size)).collect();
        Some((kernel, overrides, *grid, &blobs.bytes[*at..at + bytes], bindings))
    }
}

/// A word whose first content differs between two recordings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Index of the buffer, in the first.
    pub buffer: usize,
    /// Its word.
    pub word: usize,
    /// First content in the first recording.
    pub here: u32,
    /// First content in the other.
    pub there: u32,
}

/// A comparison: views of readings, one after another, and the values expected there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonData {
    /// Number of the reading, and what of it.
    pub parts: Vec<(usize, View)>,
    /// The reference's result, in f64.
    pub expected: Blob,
    /// The tolerance.
    pub tolerance: ToleranceData,
}

/// A [`Tolerance`], and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ToleranceData {
    /// [`Tolerance::relative`]
    pub relative: f64,
    /// [`Tolerance::element`]
    pub element: f64,
}

impl From<Tolerance> for ToleranceData {
    fn from(tolerance: Tolerance) -> Self {
        ToleranceData { relative: tolerance.relative, element: tolerance.element() }
    }
}

#[derive(Debug, Default)]
struct State {
    blobs: Blobs,
    buffers: Vec<BufferData>,
    /// Every buffer by its index, and the words that it began with.
    known: Vec<(wgpu::Buffer, Vec<u32>)>,
    actions: Vec<Action>,
    readings: usize,
    comparisons: Vec<ComparisonData>,
}

/// Takes recordings in place of a device.
#[derive(Debug)]
pub struct Capture {
    kernels: Kernels,
    state: RefCell<State>,
}

/// The captured data.
#[derive(Debug)]
pub struct Captured {
    /// Every buffer that was used.
    pub buffers: Vec<BufferData>,
    /// Actions, in order.
    pub actions: Vec<Action>,
    /// Comparisons.
    pub comparisons: Vec<ComparisonData>,
    /// The bytes.
    pub blobs: Blobs,
}

impl Capture {
    /// Plans are made for `context`, which need not be that of the device; buffers live on the device.
    pub fn new(kernels: &Kernels, context: PlanContext) -> Self {
        Capture { kernels: kernels.planned_for(context), state: RefCell::default() }
    }

    /// The kernels to record with.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Takes a recording.
    ///
    /// # Errors
    /// A buffer that the host wrote to since its first use, or a lost device.
    pub fn submit(&self, recording: &mut Recording) -> Result<()> {
        recording.write();
        // The host may not write between the dispatches of a recording: once for each buffer is enough.
        let mut indices: Vec<(wgpu::Buffer, usize)> = Vec::new();
        for dispatch in recording.dispatched() {
            let mut bindings = Vec::new();
            let declared = (1..).zip(dispatch.bindings);
            for ((binding, declared), (buffer, offset, size)) in declared.zip(dispatch.regions) {
                let index = match indices.iter().find(|(known, _)| *known == buffer) {
                    Some((_, index)) => *index,
                    None => {
                        let index = self.buffer(&buffer)?;
                        indices.push((buffer, index));
                        index
                    }
                };
                let write = declared.access == Access::Write;
                bindings.push(BindingData { binding, write, buffer: index, offset, size });
            }
            let state = &mut *self.state.borrow_mut();
            state.actions.push(Action::Dispatch {
                kernel: dispatch.spec.name,
                subgroups: dispatch.spec.features.contains(wgpu::Features::SUBGROUP),
                overrides: dispatch.overrides.to_vec(),
                grid: dispatch.grid,
                params: state.blobs.add(dispatch.params),
                bindings,
            });
        }
        Ok(())
    }

    /// Reads a whole region behind guard words, after what was submitted before; returns the number of the reading.
    ///
    /// # Errors
    /// As [`Capture::submit`].
    pub fn read(&self, region: &Guarded) -> Result<usize> {
        let buffer = self.buffer(&region.region.buffer)?;
        Ok(self.push_read(buffer, GUARD_WORDS, region.words()))
    }

    /// The same of the first `words` of the buffer that the last dispatch wrote to, which has no guards.
    ///
    /// # Errors
    /// `ArgumentError::Empty` when nothing was submitted.
    pub fn read_last(&self, words: usize) -> Result<usize> {
        let of = |action: &Action| match action {
            Action::Dispatch { bindings, .. } => {
                bindings.iter().rev().find(|binding| binding.write && binding.offset == 0).copied()
            }
            Action::Read { .. } => None,
        };
        let last = self.state.borrow().actions.last().and_then(of);
        let last = last.ok_or(Error::Argument(ArgumentError::Empty { what: "the recording whose result is read" }))?;
        Ok(self.push_read(last.buffer, 0, words))
    }

    fn push_read(&self, buffer: usize, guard: usize, words: usize) -> usize {
        let mut state = self.state.borrow_mut();
        state.actions.push(Action::Read { buffer, guard, words });
        state.readings += 1;
        state.readings - 1
    }

    /// Adds a comparison.
    pub fn compare(&self, parts: Vec<(usize, View)>, expected: &[f64], tolerance: Tolerance) {
        let state = &mut *self.state.borrow_mut();
        let expected = state.blobs.add(bytemuck::cast_slice(expected));
        state.comparisons.push(ComparisonData { parts, expected, tolerance: tolerance.into() });
    }

    /// Takes the actions so far out, for programs that share their buffers; readings count from 0 again.
    pub fn take_actions(&self) -> Vec<Action> {
        let mut state = self.state.borrow_mut();
        state.readings = 0;
        std::mem::take(&mut state.actions)
    }

    /// The words that are not the same at first in the buffers that two recordings of the same shape use.
    ///
    /// # Errors
    /// `KernelError::Problem` where more than such words differs: kernels, overrides, grids, parameters, bindings or sizes.
    pub fn differences(&self, own: &[Action], other: &Capture, others: &[Action]) -> Result<Vec<Difference>> {
        let (here, there) = (self.state.borrow(), other.state.borrow());
        let differ = |problem: &str| {
            Error::Kernel(KernelError::Problem {
                kernel: "check",
                problem: format!("two recordings differ: {problem}"),
            })
        };
        if own.len() != others.len() {
            return Err(differ("in their number of actions"));
        }
        let mut found = Vec::new();
        let mut seen = Vec::new();
        for (a, b) in own.iter().zip(others) {
            let pairs = match (a, b) {
                (Action::Dispatch { bindings: a_bindings, .. }, Action::Dispatch { bindings: b_bindings, .. }) => {
                    if a.constant(&here.blobs) != b.constant(&there.blobs) {
                        return Err(differ("in a dispatch"));
                    }
                    a_bindings.iter().zip(b_bindings).map(|(a, b)| (a.buffer, b.buffer)).collect()
                }
                (
                    Action::Read { buffer: a, guard, words },
                    Action::Read { buffer: b, guard: other_guard, words: other_words },
                ) if guard == other_guard && words == other_words => vec![(*a, *b)],
                _ => return Err(differ("in an action")),
            };
            for (a, b) in pairs {
                if seen.contains(&(a, b)) {
                    continue;
                }
                seen.push((a, b));
                let (a_words, b_words) = (&here.known[a].1, &there.known[b].1);
                if a_words.len() != b_words.len() {
                    return Err(differ("in the size of a buffer"));
                }
                let words = a_words.iter().zip(b_words).enumerate().filter(|(_, (here, there))| here != there);
                found.extend(words.map(|(word, (&here, &there))| Difference { buffer: a, word, here, there }));
            }
        }
        Ok(found)
    }

    /// Everything that was captured.
    pub fn finish(self) -> Captured {
        let State { blobs, buffers, actions, comparisons, .. } = self.state.into_inner();
        Captured { buffers, actions, comparisons, blobs }
    }

    /// The index of a buffer; a new one is written down.
    fn buffer(&self, buffer: &wgpu::Buffer) -> Result<usize> {
        let index = self.state.borrow().known.iter().position(|(known, _)| known == buffer);
        // The buffer of an absent argument cannot be read back, and no kernel reads it.
        let words = match buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            true => self.content(buffer)?,
            false => vec![0; buffer.size() as usize / 4],
        };
        let state = &mut *self.state.borrow_mut();
        match index {
            Some(index) if state.known[index].1 == words => Ok(index),
            Some(_) => Err(Error::Kernel(KernelError::Problem {
                kernel: "check",
                problem: "the host wrote to a buffer that a kernel had used: this cannot be captured".to_owned(),
            })),
            None => {
                let first = state.blobs.add_words(&words);
                state.buffers.push(BufferData { bytes: buffer.size(), first });
                state.known.push((buffer.clone(), words));
                Ok(state.known.len() - 1)
            }
        }
    }

    fn content(&self, buffer: &wgpu::Buffer) -> Result<Vec<u32>> {
        let whole = Region::from(buffer);
        let bytes = readback::wait(readback::read(&self.kernels, &[&whole]))?;
        Ok(bytes.iter().flat_map(|bytes| bytemuck::pod_collect_to_vec::<u8, u32>(bytes)).collect())
    }
}
