//! Safetensors, in memory or in files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::{Source, TensorInfo};
use crate::error::{DataError, Error, Result, TensorError};
use crate::files;

/// Bytes of a file that are read at once: a multiple of every element's size.
const PIECE: usize = 1 << 20;

/// Where a tensor's bytes are.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Index of the file.
    file: usize,
    dtype: Dtype,
    /// First byte, counted behind the header.
    begin: usize,
    end: usize,
}

/// The tensors of headers.
#[derive(Debug, Default)]
struct Headers {
    tensors: BTreeMap<String, TensorInfo>,
    places: BTreeMap<String, Place>,
}

impl Headers {
    fn add(&mut self, file: usize, metadata: &Metadata) {
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            self.places.insert(name.clone(), Place { file, dtype: info.dtype, begin, end });
            let info = TensorInfo { shape: info.shape.clone(), dtype: format!("{:?}", info.dtype) };
            self.tensors.insert(name, info);
        }
    }

    fn place(&self, name: &str) -> Result<Place> {
        let missing = || TensorError::Missing { name: name.to_owned(), expected: Vec::new() };
        self.places.get(name).copied().ok_or_else(|| missing().into())
    }
}

/// A whole file in memory.
pub(super) struct Memory<'a> {
    headers: Headers,
    /// What stands behind the header.
    data: &'a [u8],
}

impl<'a> Memory<'a> {
    /// # Errors
    /// `DataError::Safetensors`
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self> {
        let (metadata, data) = files::metadata(bytes)?;
        let mut headers = Headers::default();
        headers.add(0, &metadata);
        Ok(Memory { headers, data })
    }
}

impl Source for Memory<'_> {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.headers.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let place = self.headers.place(name)?;
        let mut values = Vec::new();
        // The header has been checked against the length of the data.
        widen(name, place.dtype, &self.data[place.begin..place.end], &mut values)?;
        Ok(values)
    }

    fn file(&self, _: &str) -> Option<&Path> {
        None
    }
}

/// Files, opened again for each tensor: there may be more than a process may hold open.
pub(super) struct Files {
    headers: Headers,
    files: Vec<Shard>,
}

/// A file whose header has been read.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    length: u64,
    modified: Option<SystemTime>,
    /// First byte behind the header.
    data: u64,
}

impl Files {
    /// # Errors
    /// [`Error::File`] with `DataError::Io` or `DataError::Safetensors`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut files = Files { headers: Headers::default(), files: Vec::new() };
        let (shard, metadata) = Shard::open(path)?;
        files.headers.add(0, &metadata);
        files.files.push(shard);
        Ok(files)
    }
}

impl Shard {
    fn open(path: &Path) -> Result<(Self, Metadata)> {
        let (file, length, data, metadata) = files::open_metadata(path)?;
        let shard = Shard { path: path.to_owned(), length, modified: modified(&file), data };
        Ok((shard, metadata))
    }

    /// The elements of one tensor, a piece of the file at a time.
    fn read(&self, name: &str, place: Place) -> Result<Vec<f32>> {
        let io = |source| Error::from(DataError::Io(source)).in_file(&self.path);
        let (mut file, length) = files::open(&self.path)?;
        if length != self.length || modified(&file) != self.modified {
            return Err(io(io::Error::other("it has changed since its header was read")));
        }
        file.seek(SeekFrom::Start(self.data + place.begin as u64)).map_err(io)?;
        let (mut values, mut rest) = (Vec::new(), place.end - place.begin);
        let mut piece = vec![0; PIECE.min(rest)];
        while rest > 0 {
            let piece = &mut piece[..PIECE.min(rest)];
            file.read_exact(piece).map_err(io)?;
            widen(name, place.dtype, piece, &mut values)?;
            rest -= piece.len();
        }
        Ok(values)
    }
}

impl Source for Files {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.headers.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let place = self.headers.place(name)?;
        self.files[place.file].read(name, place)
    }

    fn file(&self, name: &str) -> Option<&Path> {
        let file = self.headers.places.get(name).map_or(0, |place| place.file);
        self.files.get(file).map(|shard| shard.path.as_path())
    }
}

fn modified(file: &File) -> Option<SystemTime> {
    file.metadata().ok()?.modified().ok()
}

/// Appends elements, exactly.
fn widen(name: &str, dtype: Dtype, bytes: &[u8], to: &mut Vec<f32>) -> Result<()> {
    match dtype {
        Dtype::F32 => to.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Dtype::F16 => to.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::BF16 => to.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        other => {
            return Err(Error::Tensor(TensorError::Type {
                name: name.to_owned(),
                expected: "F32, F16 or BF16",
                found: format!("{other:?}"),
            }));
        }
    }
    Ok(())
}
