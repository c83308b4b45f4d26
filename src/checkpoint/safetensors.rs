//! Safetensors, in memory or in files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::{Source, TensorInfo, fp8, index};
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
        let mut values = reserved(name, place)?;
        // The header has been checked against the length of the data.
        widen(name, place.dtype, &self.data[place.begin..place.end], &mut values)?;
        Ok(values)
    }

    fn file(&self, _: &str) -> Option<&Path> {
        None
    }
}

/// Files, opened again for each tensor: there may be more than a process may hold open.
#[derive(Default)]
pub(super) struct Files {
    headers: Headers,
    files: Vec<Shard>,
    /// What was opened: the file, or the index of the files.
    path: PathBuf,
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
    /// One file.
    ///
    /// # Errors
    /// [`Error::File`] with `DataError::Io` or `DataError::Safetensors`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut files = Files { path: path.to_owned(), ..Files::default() };
        files.add(path)?;
        Ok(files)
    }

    /// A folder: `model.safetensors`, else its index.
    ///
    /// # Errors
    /// As [`Files::open`] and [`Files::index`].
    pub(super) fn folder(folder: &Path) -> Result<Self> {
        let [file, index] = ["model.safetensors", "model.safetensors.index.json"].map(|name| folder.join(name));
        // A link to nothing is there, too, and will say so.
        let is_there = |path: &Path| path.symlink_metadata().is_ok();
        match (is_there(&file), is_there(&index)) {
            (false, true) => Files::index(&index),
            (true, _) => Files::open(&file),
            (false, false) => {
                let torch = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
                let torch = torch.iter().find(|name| is_there(&folder.join(name)));
                let beside = torch.map(|name| format!(" but {name}: convert it with safetensors.torch.save_file"));
                let problem = format!(
                    "is a directory that holds neither model.safetensors nor model.safetensors.index.json{}",
                    beside.unwrap_or_default()
                );
                let error = io::Error::new(io::ErrorKind::NotFound, problem);
                Err(Error::from(DataError::Io(error)).in_file(folder))
            }
        }
    }

    /// The files that an index names, beside it.
    ///
    /// # Errors
    /// [`Error::File`] with `DataError::Index`, or of a file as [`Files::open`].
    pub(super) fn index(path: &Path) -> Result<Self> {
        let bytes = files::read(path, index::MOST)?;
        let in_index = |problem: String| Error::Data(DataError::Index(problem)).in_file(path);
        if let Some(found) = files::foreign(&bytes) {
            return Err(in_index(found.to_owned()));
        }
        let text = String::from_utf8(bytes).map_err(|error| in_index(error.utf8_error().to_string()))?;
        let map = index::parse(&text).map_err(|error| error.in_file(path))?;
        let mut files = Files { path: path.to_owned(), ..Files::default() };
        let names: BTreeSet<&str> = map.values().map(String::as_str).collect();
        for name in &names {
            let shard = path.with_file_name(name);
            if shard.symlink_metadata().is_err() {
                return Err(in_index(format!("it names the file {name}, which is not there")));
            }
            files.add(&shard)?;
        }
        let place = |tensor: &str| files.headers.places.get(tensor).map(|place| place.file);
        let names: Vec<_> = names.into_iter().collect();
        match map.iter().find(|(tensor, name)| place(tensor).map(|file| names[file]) != Some(name.as_str())) {
            None => Ok(files),
            Some((tensor, name)) => Err(in_index(format!("tensor `{tensor}` is listed in {name}, but is not there"))),
        }
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let (shard, metadata) = Shard::open(path)?;
        let number = self.files.len();
        for name in metadata.offset_keys() {
            if let Some(other) = self.headers.places.get(&name) {
                let other = self.files[other.file].path.display();
                let problem = format!("tensor `{name}` is here and in {other}");
                return Err(Error::Data(DataError::Index(problem)).in_file(path));
            }
        }
        self.headers.add(number, &metadata);
        self.files.push(shard);
        Ok(())
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
        let mut rest = place.end - place.begin;
        let mut values = reserved(name, place)?;
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
        let shard = self.headers.places.get(name).and_then(|place| self.files.get(place.file));
        Some(shard.map_or(&self.path, |shard| &shard.path))
    }
}

fn modified(file: &File) -> Option<SystemTime> {
    file.metadata().ok()?.modified().ok()
}

/// Room for the elements of a tensor.
fn reserved(name: &str, place: Place) -> Result<Vec<f32>> {
    let (mut values, elements) = (Vec::new(), (place.end - place.begin) * 8 / place.dtype.bitsize());
    values.try_reserve_exact(elements).map_err(|_| {
        let problem = format!("tensor `{name}` needs {} bytes of memory, which cannot be had", 4 * elements as u64);
        Error::from(DataError::Io(io::Error::new(io::ErrorKind::OutOfMemory, problem)))
    })?;
    Ok(values)
}

/// Appends elements, exactly.
fn widen(name: &str, dtype: Dtype, bytes: &[u8], to: &mut Vec<f32>) -> Result<()> {
    match dtype {
        Dtype::F32 => to.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Dtype::F16 => to.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::BF16 => to.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::F8_E4M3 => to.extend(bytes.iter().map(|&code| fp8::value(code))),
        other => {
            return Err(Error::Tensor(TensorError::Type {
                name: name.to_owned(),
                expected: "F32, F16, BF16 or F8_E4M3",
                found: format!("{other:?}"),
            }));
        }
    }
    Ok(())
}
