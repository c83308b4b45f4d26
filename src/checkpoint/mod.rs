//! Tensors by name, from wherever a checkpoint keeps them: bytes in memory or files, read one tensor at a time.

mod safetensors;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::error::{Error, Result, TensorError};
use crate::weights::HostTensor;

/// What a file says of one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The element type, as the file calls it.
    pub dtype: String,
}

/// Where a checkpoint's tensors are.
pub(crate) trait Source: Send {
    /// Every tensor, by name.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// The elements of one tensor of the list, row-major, widened to f32.
    ///
    /// # Errors
    /// `TensorError::Type` for elements that are not read; a file that cannot be read any more.
    fn read(&self, name: &str) -> Result<Vec<f32>>;

    /// The file that holds a tensor, or would: errors name it. `None` in memory.
    fn file(&self, name: &str) -> Option<&Path>;
}

/// A checkpoint: tensors are taken by name, and it tracks those never asked for.
pub struct Checkpoint<'a> {
    source: Box<dyn Source + 'a>,
    taken: RefCell<BTreeSet<String>>,
}

impl<'a> Checkpoint<'a> {
    /// Reads the header of a safetensors file in memory.
    ///
    /// # Errors
    /// `DataError::Safetensors` when the bytes are truncated, no safetensors file, or name a tensor twice.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        Ok(Checkpoint::of(safetensors::Memory::new(bytes)?))
    }

    fn of(source: impl Source + 'a) -> Self {
        Checkpoint { source: Box::new(source), taken: RefCell::default() }
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.source.tensors()
    }

    /// Whether a tensor of that name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors().contains_key(name)
    }

    /// Takes one tensor (f32, f16 or bf16) and checks its shape. NaN and infinities are kept, with a warning.
    ///
    /// # Errors
    /// `TensorError::Missing`, `TensorError::Shape` or `TensorError::Type`, in [`Error::File`] where there is a file.
    pub fn take(&self, name: &str, expected: &[usize]) -> Result<HostTensor> {
        let refused = |problem| self.in_file(name, Error::Tensor(problem));
        let Some(info) = self.tensors().get(name) else {
            return Err(refused(TensorError::Missing { name: name.to_owned(), expected: expected.to_vec() }));
        };
        if info.shape != expected {
            return Err(refused(TensorError::Shape {
                name: name.to_owned(),
                expected: expected.to_vec(),
                found: info.shape.clone(),
            }));
        }
        let data = self.source.read(name).map_err(|error| self.in_file(name, error))?;
        self.taken.borrow_mut().insert(name.to_owned());
        let non_finite = data.iter().filter(|value| !value.is_finite()).count();
        if non_finite > 0 {
            tracing::warn!("tensor `{name}` holds {non_finite} NaN or infinite values of {}", data.len());
        }
        Ok(HostTensor { name: name.to_owned(), shape: expected.to_vec(), data })
    }

    /// Refuses tensors under `prefix` that were never taken.
    ///
    /// # Errors
    /// `TensorError::Extra` with the first such name.
    pub fn refuse_rest(&self, prefix: &str) -> Result<()> {
        let taken = self.taken.borrow();
        match self.tensors().iter().find(|(name, _)| name.starts_with(prefix) && !taken.contains(*name)) {
            None => Ok(()),
            Some((name, info)) => {
                let extra = TensorError::Extra { name: name.clone(), found: info.shape.clone() };
                Err(self.in_file(name, Error::Tensor(extra)))
            }
        }
    }

    /// The same error with the file of a tensor, unless it names one.
    fn in_file(&self, name: &str, error: Error) -> Error {
        match (self.source.file(name), error) {
            (Some(path), error) if !matches!(error, Error::File { .. }) => error.in_file(path),
            (_, error) => error,
        }
    }
}

impl Checkpoint<'static> {
    /// Opens a safetensors file, or a folder with `model.safetensors`. Headers are read at once, a tensor when it is taken.
    ///
    /// # Errors
    /// [`Error::File`] with `DataError::Io`, or with what is wrong in a header.
    pub fn open(path: &Path) -> Result<Self> {
        // Readers of other formats come here, chosen by the file's extension or its first bytes.
        let file = if path.is_dir() { path.join("model.safetensors") } else { path.to_owned() };
        Ok(Checkpoint::of(safetensors::Files::open(&file)?))
    }
}
