//! A file in memory without being read: the crate's one `unsafe`.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a whole file for reading.
///
/// # Errors
/// [`Error::Io`] when the system refuses it; [`Error::Safetensors`] in [`Error::File`] when it is empty, since an empty
/// range cannot be mapped.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if metadata.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    if metadata.len() == 0 {
        return Err(Error::Safetensors("the file is empty".to_owned()).in_file(path));
    }
    // SAFETY: the mapping is private to this crate and only read. A file that another process truncates or rewrites
    // meanwhile breaks this, as it does every reader of mapped checkpoints: tensors are copied out when a model is
    // loaded, and the mapping goes with its `ModelFolder`.
    #[allow(unsafe_code, reason = "mapping a file has no safe form; see SAFETY")]
    let mapped = unsafe { Mmap::map(&file) };
    mapped.map_err(io)
}
