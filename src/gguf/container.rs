//! The container: metadata, the list of tensors, and the bytes of one tensor when it is asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::blocks::{Kind, READ};
use crate::checkpoint::TensorInfo;
use crate::error::{DataError, Error, Result, TensorError};
use crate::files;

/// The first bytes of every GGUF file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// Most bytes of metadata and list of tensors; published files have up to some ten million.
const MOST_HEADER: u64 = 64 << 20;

/// Most keys, and most tensors; published files have up to some thousand.
const MOST_ENTRIES: u64 = 1 << 16;

/// Most values of a list; published vocabularies have some hundred thousand tokens and merges.
const MOST_VALUES: u64 = 1 << 22;

/// Most bytes of a key, as the format has it; a tensor's name has fewer.
const MOST_NAME: u64 = 65535;

/// Most extents of a tensor, as the format has it.
const MOST_EXTENTS: u32 = 4;

/// Most lists within lists. The format sets no bound, and published files have none at all.
const MOST_NESTED: u32 = 4;

/// Bytes of a file that are read at once, at least one block.
const PIECE: usize = 1 << 20;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A number. One that the file holds in f32 is the shortest decimal that f32 rounds to the same, so as it was written before:
    /// 1e-5, not 9.99999974…e-6.
    Number(f64),
    /// True or false.
    Bool(bool),
    /// A text.
    Text(String),
    /// A list.
    List(List),
}

/// A list of the metadata, whose values have one type.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "as in `Value`")]
pub enum List {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    Numbers(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
    Lists(Vec<List>),
}

/// Where a tensor stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    kind: Option<&'static Kind>,
    /// Its first byte in the file.
    begin: u64,
    /// Bytes, 0 for a type whose size is not known.
    bytes: u64,
}

trait Readable: Read + Seek + Send {}

impl<T: Read + Seek + Send> Readable for T {}

/// A GGUF file, of version 2 or 3 and little-endian: its metadata and its tensors' names are in memory, a tensor is read when it is
/// asked for.
pub struct Gguf {
    source: Mutex<Box<dyn Readable>>,
    /// The file, its length and its time when the header was read; `None` in memory.
    file: Option<(File, u64, Option<SystemTime>)>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    places: BTreeMap<String, Place>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (keys, tensors) = (self.metadata.len(), self.tensors.len());
        f.debug_struct("Gguf").field("keys", &keys).field("tensors", &tensors).finish_non_exhaustive()
    }
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::Data(DataError::Gguf(problem.into()))
}

impl Gguf {
    /// Opens a file and reads its metadata and its list of tensors.
    ///
    /// # Errors
    /// `DataError::Io` or `DataError::Gguf` in [`Error::File`].
    pub fn open(path: &Path) -> Result<Self> {
        let (file, length) = files::open(path)?;
        let io = |error: io::Error| Error::Data(DataError::Io(error)).in_file(path);
        let found = file.metadata().map_err(io)?;
        let own = file.try_clone().map_err(io)?;
        let mut gguf = Self::read_header(file, length).map_err(|error| error.in_file(path))?;
        gguf.file = Some((own, length, found.modified().ok()));
        Ok(gguf)
    }

    /// The same of a file in memory.
    ///
    /// # Errors
    /// `DataError::Gguf`
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        let length = bytes.len() as u64;
        Self::read_header(Cursor::new(bytes), length)
    }

    fn read_header(source: impl Readable + 'static, length: u64) -> Result<Self> {
        let mut header = Header { source: BufReader::new(source), at: 0, length };
        let magic = header.array("the first bytes")?;
        if magic != MAGIC {
            return Err(invalid(format!("it begins with {:?}, not GGUF", String::from_utf8_lossy(&magic))));
        }
        match header.u32("the version")? {
            2 | 3 => {}
            big if matches!(big.swap_bytes(), 2 | 3) => {
                return Err(invalid("it is big-endian, only little-endian files are read"));
            }
            other => return Err(invalid(format!("version {other}, only 2 and 3 are read"))),
        }
        let (tensors, keys) = (header.u64("the number of tensors")?, header.u64("the number of keys")?);
        // A tensor takes at least its length of name, number of extents, one extent, type and offset; a key its length, type and
        // one byte.
        header.room(tensors, 8 + 4 + 8 + 4 + 8, "tensors")?;
        header.room(keys, 8 + 4 + 1, "keys")?;
        if tensors.max(keys) > MOST_ENTRIES {
            return Err(invalid(format!("{tensors} tensors and {keys} keys, at most {MOST_ENTRIES} of each are read")));
        }

        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = header.name("a key")?;
            let value = header.u32(&key).and_then(|kind| header.value(&key, kind))?;
            if metadata.contains_key(&key) {
                return Err(invalid(format!("key `{key}` is given twice")));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(&Value::Unsigned(alignment)) if alignment.is_power_of_two() && alignment <= 1 << 20 => alignment,
            Some(other) => {
                return Err(invalid(format!("general.alignment is {other:?}, not a power of two up to 1048576")));
            }
        };
        let mut infos = BTreeMap::new();
        let mut places = BTreeMap::new();
        for _ in 0..tensors {
            let name = header.name("a tensor's name")?;
            let (info, place) = header.tensor(&name, alignment)?;
            if infos.contains_key(&name) {
                return Err(invalid(format!("tensor `{name}` is given twice")));
            }
            infos.insert(name.clone(), info);
            places.insert(name, place);
        }
        let data = header.at.next_multiple_of(alignment);
        check_places(&mut places, data, length)?;
        let source = Mutex::new(Box::new(header.source.into_inner()) as Box<dyn Readable>);
        Ok(Gguf { source, file: None, metadata, tensors: infos, places })
    }

    /// The metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors, by the file's own names; extents outermost first, other than in the file.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The elements of one tensor, row-major, in f32: exact but for one rounding in types with a sum (`Q4_1`, `Q4_K` …).
    ///
    /// # Errors
    /// `TensorError::Missing`; `TensorError::Type` for a type that is not read; `DataError::Io` where the file can no longer be read, or
    /// has changed.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let (Some(info), Some(place)) = (self.tensors.get(name), self.places.get(name)) else {
            return Err(TensorError::Missing { name: name.to_owned(), expected: Vec::new() }.into());
        };
        let Some((kind, widen)) = place.kind.and_then(|kind| Some((kind, kind.widen?))) else {
            let found = info.dtype.clone();
            return Err(TensorError::Type { name: name.to_owned(), expected: READ, found }.into());
        };
        let io = |error: io::Error| Error::Data(DataError::Io(error));
        if let Some((file, length, modified)) = &self.file {
            let found = file.metadata().map_err(io)?;
            if found.len() != *length || found.modified().ok() != *modified {
                return Err(io(io::Error::other("it has changed since its header was read")));
            }
        }
        // A reader that panicked has left a position, which the next one sets anew.
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        source.seek(SeekFrom::Start(place.begin)).map_err(io)?;
        // Both were checked against the length of the file.
        let mut left = place.bytes as usize;
        let (mut values, elements) = (Vec::new(), left / kind.bytes * kind.elements);
        values.try_reserve_exact(elements).map_err(|_| {
            let problem = format!("tensor `{name}` needs {} bytes of memory, which cannot be had", 4 * elements as u64);
            io(io::Error::new(io::ErrorKind::OutOfMemory, problem))
        })?;
        let mut piece = vec![0; left.min(PIECE / kind.bytes * kind.bytes)];
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE / kind.bytes * kind.bytes)];
            source.read_exact(piece).map_err(io)?;
            piece.chunks_exact(kind.bytes).for_each(|block| widen(block, &mut values));
            left -= piece.len();
        }
        Ok(values)
    }
}

/// Puts offsets behind the header, and refuses tensors that end past the file or share bytes.
fn check_places(places: &mut BTreeMap<String, Place>, data: u64, length: u64) -> Result<()> {
    for (name, place) in &mut *places {
        let begin = data.checked_add(place.begin);
        match begin.filter(|begin| begin.checked_add(place.bytes).is_some_and(|end| end <= length)) {
            Some(begin) => place.begin = begin,
            None => {
                let Place { begin, bytes, .. } = place;
                return Err(invalid(format!(
                    "tensor `{name}` has {bytes} bytes from byte {begin} of the tensors, which begin at byte {data} of a file of {length}"
                )));
            }
        }
    }
    let mut order: Vec<_> = places.iter().map(|(name, place)| (place.begin, place.bytes, name)).collect();
    order.sort_unstable();
    match order.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => Err(invalid(format!("tensors `{}` and `{}` share bytes", pair[0].2, pair[1].2))),
    }
}

/// The header as it is read: no count and no length is believed beyond the bytes that are left.
struct Header<R> {
    source: BufReader<R>,
    at: u64,
    length: u64,
}

impl<R: Read> Header<R> {
    /// Bytes that the header may yet have.
    fn left(&self) -> u64 {
        self.length.min(MOST_HEADER).saturating_sub(self.at)
    }

    /// Refuses `count` things of `least` bytes each that cannot be.
    fn room(&self, count: u64, least: u64, what: &str) -> Result<()> {
        match count.checked_mul(least) {
            Some(bytes) if bytes <= self.left() => Ok(()),
            _ => Err(self.short(format!("{count} {what}"))),
        }
    }

    fn short(&self, what: impl std::fmt::Display) -> Error {
        let Header { at, length, .. } = self;
        if self.length > MOST_HEADER {
            return invalid(format!("{what} at byte {at} do not fit the {MOST_HEADER} bytes of header that are read"));
        }
        invalid(format!("{what} at byte {at} do not fit a file of {length} bytes"))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.room(N as u64, 1, "bytes").map_err(|_| self.short(format_args!("{N} bytes of {what}")))?;
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes).map_err(|error| Error::Data(DataError::Io(error)))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str, most: u64) -> Result<String> {
        let length = self.u64(what)?;
        if length > most.min(self.left()) {
            return Err(self.short(format_args!("{length} bytes of {what}")));
        }
        let mut bytes = vec![0; length as usize];
        self.source.read_exact(&mut bytes).map_err(|error| Error::Data(DataError::Io(error)))?;
        self.at += length;
        String::from_utf8(bytes).map_err(|error| {
            let byte = error.utf8_error().valid_up_to();
            invalid(format!("{what} at byte {} is not UTF-8 (its byte {byte})", self.at - length))
        })
    }

    fn name(&mut self, what: &str) -> Result<String> {
        self.text(what, MOST_NAME)
    }

    fn bool(&mut self, key: &str) -> Result<bool> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(invalid(format!("key `{key}` is {other}, not 0 or 1, the values of true and false"))),
        }
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Number(shortest(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::Text(self.text(key, u64::MAX)?),
            9 => Value::List(self.list(key, 0)?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Number(f64::from_le_bytes(self.array(key)?)),
            other => return Err(invalid(format!("key `{key}` has type {other}, which is not known"))),
        })
    }

    fn list(&mut self, key: &str, depth: u32) -> Result<List> {
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 if depth < MOST_NESTED => 12,
            9 => return Err(invalid(format!("key `{key}` has lists within lists more than {MOST_NESTED} deep"))),
            other => return Err(invalid(format!("key `{key}` is a list of type {other}, which is not known"))),
        };
        self.room(count, least, "values of a list")
            .map_err(|_| self.short(format_args!("{count} values of `{key}`")))?;
        if count > MOST_VALUES {
            return Err(invalid(format!("key `{key}` has {count} values, at most {MOST_VALUES} are read")));
        }
        let mut values = |each: &mut dyn FnMut(&mut Self) -> Result<()>| (0..count).try_for_each(|_| each(self));
        macro_rules! collect {
            ($list:path, $read:expr) => {{
                let mut list = Vec::new();
                values(&mut |header| {
                    list.push($read(header)?);
                    Ok(())
                })?;
                $list(list)
            }};
        }
        Ok(match kind {
            0 => collect!(List::Unsigned, |it: &mut Self| it.array(key).map(|it| u64::from(u8::from_le_bytes(it)))),
            1 => collect!(List::Signed, |it: &mut Self| it.array(key).map(|it| i64::from(i8::from_le_bytes(it)))),
            2 => collect!(List::Unsigned, |it: &mut Self| it.array(key).map(|it| u64::from(u16::from_le_bytes(it)))),
            3 => collect!(List::Signed, |it: &mut Self| it.array(key).map(|it| i64::from(i16::from_le_bytes(it)))),
            4 => collect!(List::Unsigned, |it: &mut Self| it.u32(key).map(u64::from)),
            5 => collect!(List::Signed, |it: &mut Self| it.array(key).map(|it| i64::from(i32::from_le_bytes(it)))),
            6 => collect!(List::Numbers, |it: &mut Self| it.array(key).map(|it| shortest(f32::from_le_bytes(it)))),
            7 => collect!(List::Bools, |it: &mut Self| it.bool(key)),
            8 => collect!(List::Texts, |it: &mut Self| it.text(key, u64::MAX)),
            9 => collect!(List::Lists, |it: &mut Self| it.list(key, depth + 1)),
            10 => collect!(List::Unsigned, |it: &mut Self| it.u64(key)),
            11 => collect!(List::Signed, |it: &mut Self| it.array(key).map(i64::from_le_bytes)),
            _ => collect!(List::Numbers, |it: &mut Self| it.array(key).map(f64::from_le_bytes)),
        })
    }

    /// One entry of the list of tensors; its place counts from the first byte of the tensors.
    fn tensor(&mut self, name: &str, alignment: u64) -> Result<(TensorInfo, Place)> {
        let what = |problem: String| invalid(format!("tensor `{name}` {problem}"));
        let extents = self.u32(name)?;
        if extents == 0 || extents > MOST_EXTENTS {
            return Err(what(format!("has {extents} extents, must have 1 to {MOST_EXTENTS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..extents {
            shape.push(self.u64(name)?);
        }
        let (number, begin) = (self.u32(name)?, self.u64(name)?);
        if !begin.is_multiple_of(alignment) {
            return Err(what(format!("begins at byte {begin}, not a multiple of {alignment}, the alignment")));
        }
        let kind = Kind::of(number);
        let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent));
        let elements = match elements.map(usize::try_from) {
            // Of which a list in f32 can be made.
            Some(Ok(elements)) if elements > 0 && elements <= isize::MAX as usize / 4 => elements as u64,
            _ => return Err(what(format!("has extents {shape:?}, the innermost first: 0, or too many elements"))),
        };
        let bytes = match kind {
            None => 0,
            Some(kind) if shape[0].is_multiple_of(kind.elements as u64) => (elements / kind.elements as u64)
                .checked_mul(kind.bytes as u64)
                .ok_or_else(|| what(format!("has {elements} elements of type {}, too many", kind.name)))?,
            Some(kind) => {
                let Kind { name, elements, .. } = kind;
                return Err(what(format!("has rows of {}, not a multiple of {elements}, a block of {name}", shape[0])));
            }
        };
        let shape = shape.iter().rev().map(|&extent| extent as usize).collect();
        let dtype = kind.map_or_else(|| format!("number {number}"), |kind| kind.name.to_owned());
        Ok((TensorInfo { shape, dtype }, Place { kind, begin, bytes }))
    }
}

/// The shortest decimal that f32 rounds to the same.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}
