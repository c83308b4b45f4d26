//! Readers of untrusted files. They accept regular files only, so that none waits for a pipe or reads a device without end, and
//! take no more memory than the content justifies.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{ArgumentError, DataError, Error, Result};
use crate::json::{Walk, next_key};

/// Most bytes of a `config.json`; published ones have some thousands.
pub const MOST_CONFIG: u64 = 4 << 20;

/// Most bytes of a `tokenizer.json`; published ones have some tens of millions.
pub const MOST_TOKENIZER: u64 = 256 << 20;

/// Most bytes of a safetensors header, as the format's own reader has it.
const MOST_HEADER: u64 = 100_000_000;

/// Bytes that hold the length of a safetensors header.
const LENGTH: usize = 8;

/// Bytes that tell what a file is that is none.
const BEGINNING: u64 = 64;

/// Reads a whole file of `most` bytes at most.
///
/// # Errors
/// `DataError::Io` for a path that is no regular file or cannot be read, `ArgumentError::OutOfRange` in [`Error::File`] for a
/// larger file.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    let refused = |found| {
        Error::Argument(ArgumentError::OutOfRange { what: "the size of the file in bytes", found, limit: most })
            .in_file(path)
    };
    if length > most {
        return Err(refused(length));
    }
    let mut bytes = Vec::new();
    append(&mut bytes, file, most.saturating_add(1))
        .map_err(|source| Error::from(DataError::Io(source)).in_file(path))?;
    // The file may have grown since, or be one of the kernel's, which report no length.
    match bytes.len() as u64 {
        found if found > most => Err(refused(found)),
        _ => Ok(bytes),
    }
}

/// Reads a whole file of text.
///
/// # Errors
/// As [`read()`], and `DataError::Utf8` in [`Error::File`].
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|error| Error::Data(DataError::Utf8 { byte: error.utf8_error().valid_up_to() }).in_file(path))
}

/// Reads a whole safetensors file: the header first, its tensors only if the header fits the file's length.
///
/// # Errors
/// `DataError::Io` as [`read()`]; `DataError::Safetensors` in [`Error::File`] for a header that is invalid or does not fit.
pub fn read_safetensors(path: &Path) -> Result<Vec<u8>> {
    let (mut file, length, mut bytes, _) = open_safetensors(path)?;
    let rest = length - bytes.len() as u64;
    append(&mut bytes, &mut file, rest).map_err(|source| Error::from(DataError::Io(source)).in_file(path))?;
    // The file may have been cut meanwhile: its tensors then end past it, which `tensors` refuses.
    Ok(bytes)
}

/// The tensors of a safetensors file in memory.
///
/// # Errors
/// `DataError::Safetensors` when the bytes are no whole safetensors file, or name a tensor twice.
pub(crate) fn tensors(bytes: &[u8]) -> Result<SafeTensors<'_>> {
    metadata(bytes)?;
    SafeTensors::deserialize(bytes).map_err(|error| Error::Data(DataError::Safetensors(error.to_string())))
}

/// The header of a safetensors file in memory, and what stands behind it.
///
/// # Errors
/// As [`tensors`].
pub(crate) fn metadata(bytes: &[u8]) -> Result<(Metadata, &[u8])> {
    let whole = bytes.len() as u64;
    let start = LENGTH + header_length(bytes, whole)?;
    // `header_length` has checked that the header ends within the bytes.
    let (header, data) = (&bytes[LENGTH..start], &bytes[start..]);
    Ok((check_header(header, data.len() as u64)?, data))
}

/// The header of a safetensors file: the file, its length, the first byte behind the header, and the tensors.
///
/// # Errors
/// As [`read_safetensors`].
pub(crate) fn open_metadata(path: &Path) -> Result<(File, u64, u64, Metadata)> {
    let (file, length, bytes, metadata) = open_safetensors(path)?;
    Ok((file, length, bytes.len() as u64, metadata))
}

/// A regular file and its length. The type is checked before opening, because opening a pipe waits for its other end, and again
/// after, because the name may then point to another file.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::from(DataError::Io(source)).in_file(path);
    let regular = |found: std::fs::Metadata| match (found.is_file(), found.is_dir()) {
        (true, _) => Ok(found.len()),
        (_, true) => Err(io(io::Error::new(io::ErrorKind::IsADirectory, "is a directory, not a file"))),
        _ => Err(io(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"))),
    };
    regular(std::fs::metadata(path).map_err(io)?)?;
    let file = File::open(path).map_err(io)?;
    let length = regular(file.metadata().map_err(io)?)?;
    Ok((file, length))
}

/// A safetensors file, its length, and the bytes to the end of its header, which has been checked.
fn open_safetensors(path: &Path) -> Result<(File, u64, Vec<u8>, Metadata)> {
    let (mut file, length) = open(path)?;
    let io = |source| Error::from(DataError::Io(source)).in_file(path);
    let mut bytes = Vec::new();
    append(&mut bytes, &mut file, LENGTH as u64).map_err(io)?;
    let header = match header_length(&bytes, length) {
        Ok(header) => header,
        Err(_) => {
            // Its beginning says what it is.
            append(&mut bytes, &mut file, BEGINNING).map_err(io)?;
            header_length(&bytes, length).map_err(|error| error.in_file(path))?
        }
    };
    append(&mut bytes, &mut file, header as u64).map_err(io)?;
    let tensors = check_header(&bytes[LENGTH..], length.saturating_sub(bytes.len() as u64));
    let tensors = tensors.map_err(|error| error.in_file(path))?;
    Ok((file, length, bytes, tensors))
}

/// Reads `count` more bytes, or as many as there are.
fn append(bytes: &mut Vec<u8>, file: impl Read, count: u64) -> io::Result<()> {
    file.take(count).read_to_end(bytes).map(drop)
}

/// Bytes of the header of a safetensors file of `whole` bytes that begins with `first`.
fn header_length(first: &[u8], whole: u64) -> Result<usize> {
    let invalid = |problem: String| {
        let problem = foreign(first).map(|found| format!("{problem}; {found}")).unwrap_or(problem);
        Err(Error::Data(DataError::Safetensors(problem)))
    };
    let Some(length) = first.first_chunk::<LENGTH>() else { return invalid(format!("{whole} bytes are no header")) };
    let header = u64::from_le_bytes(*length);
    if header > MOST_HEADER {
        return invalid(format!("a header of {header} bytes, at most {MOST_HEADER} are read"));
    }
    if header > whole.saturating_sub(LENGTH as u64) {
        return invalid(format!("a header of {header} bytes in a file of {whole}"));
    }
    Ok(header as usize)
}

/// What a file is that stands where another is expected, by its first bytes; `None` where they say nothing.
pub(crate) fn foreign(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes.trim_ascii_start();
    let begins = |word: &str| text.get(..word.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(word.as_bytes()));
    match bytes {
        [] => Some("the file is empty"),
        [b'P', b'K', 3, 4, ..] => {
            Some("it is a zip archive, as torch.save writes: convert it with safetensors.torch.save_file")
        }
        [0x80, 2..=5, ..] => {
            Some("it is a Python pickle, as torch.save wrote: convert it with safetensors.torch.save_file")
        }
        [b'G', b'G', b'U', b'F', ..] => Some("it is a GGUF file"),
        _ if begins("version https://git-lfs") => {
            Some("it is the pointer that git-LFS keeps in place of the file: git lfs pull fetches the file")
        }
        _ if begins("<!doctype html") || begins("<html") || begins("<?xml") => {
            Some("it is a web page, as a server's message of an error")
        }
        _ => None,
    }
}

/// Checks that a header names each tensor once and that the tensors take exactly `data` bytes. The format's own reader checks
/// each tensor, but adds their ends up without checking for overflow.
fn check_header(header: &[u8], data: u64) -> Result<Metadata> {
    let invalid = |problem: String| Err(Error::Data(DataError::Safetensors(problem)));
    let text = match std::str::from_utf8(header) {
        Ok(text) => text,
        Err(error) => return invalid(format!("the header is not UTF-8 (byte {})", error.valid_up_to())),
    };
    match serde_json::from_str(text) {
        Err(error) => return invalid(format!("the header: {error}")),
        Ok(Header { end }) if end == data => {}
        Ok(Header { end }) => {
            return invalid(format!("the header tells of {end} bytes of tensors, the file has {data}"));
        }
    }
    serde_json::from_str(text).map_err(|error| Error::Data(DataError::Safetensors(error.to_string())))
}

/// End of the last tensor.
struct Header {
    end: u64,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Tensors)
    }
}

struct Tensors;

#[derive(serde::Deserialize)]
struct Tensor {
    data_offsets: (u64, u64),
}

impl<'de> Visitor<'de> for Tensors {
    type Value = Header;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { end: 0 };
        let mut seen = HashSet::new();
        while let Some(name) = next_key(&mut map, &mut seen)? {
            if name == "__metadata__" {
                map.next_value_seed(Walk(&mut |_| {}))?;
                continue;
            }
            let (begin, end) = map.next_value::<Tensor>()?.data_offsets;
            if end < begin {
                return Err(A::Error::custom(format_args!("tensor `{name}` begins at byte {begin} and ends at {end}")));
            }
            header.end = header.end.max(end);
        }
        Ok(header)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;

    use super::{open_metadata, read, read_safetensors, read_text, tensors};

    /// A file of this header and as many bytes of tensors.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn tensor(name: &str, shape: &str, offsets: &str) -> String {
        format!(r#""{name}":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    /// The defect of a file: reading it from memory and from a folder must report the same.
    fn refused(bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        fs::write(&path, bytes).unwrap();
        let problem = tensors(bytes).map(drop).unwrap_err().to_string();
        let error = open_metadata(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: {problem}", path.display()));
        assert_eq!(read_safetensors(&path).unwrap_err().to_string(), error.to_string());
        problem
    }

    #[test]
    fn a_whole_file_is_read() {
        let bytes = file(&format!(r#"{{{},"__metadata__":{{"a":"b"}}}}"#, tensor("w", "[3]", "[0,3]")), 3);
        assert_eq!(tensors(&bytes).unwrap().tensor("w").unwrap().data(), [0; 3]);
        tensors(&file("{}", 0)).unwrap();
    }

    #[test]
    fn headers_that_do_not_fit_are_refused() {
        let header = |tensors: &[String], data| refused(&file(&format!("{{{}}}", tensors.join(",")), data));
        assert!(refused(b"").ends_with("0 bytes are no header; the file is empty"));
        assert!(refused(b"1234567").ends_with("7 bytes are no header"));
        assert!(refused(&[0xff; 64]).contains("a header of 18446744073709551615 bytes"));
        assert!(refused(&60u64.to_le_bytes()).ends_with("a header of 60 bytes in a file of 8"));
        assert!(refused(&file("\u{0}", 0)).contains("the header: "));
        assert!(refused(&file("[]", 0)).contains("the header: "));
        assert!(refused(&file(&r#"{"a":"#.repeat(1000), 0)).contains("the header: "));
        let mut bytes = file("{}", 0);
        bytes[9] = 0xff;
        assert!(refused(&bytes).ends_with("the header is not UTF-8 (byte 1)"));
        let past = header(&[tensor("w", "[3]", "[0,3]")], 2);
        assert!(past.ends_with("the header tells of 3 bytes of tensors, the file has 2"), "{past}");
        assert!(header(&[tensor("w", "[3]", "[0,3]")], 4).contains("3 bytes of tensors, the file has 4"));
        assert!(header(&[tensor("w", "[3]", "[3,0]")], 3).contains("tensor `w` begins at byte 3 and ends at 0"));
        assert!(header(&[tensor("w", "[3]", "[-1,3]")], 3).contains("the header: "));
        let overlapping = [tensor("a", "[3]", "[0,3]"), tensor("b", "[3]", "[1,4]")];
        assert!(header(&overlapping, 4).starts_with("not a valid safetensors file"));
        assert!(header(&[tensor("a", "[2]", "[1,3]")], 3).starts_with("not a valid safetensors file"), "a hole");
        let shape = "[1152921504606846976,1152921504606846976]";
        assert!(header(&[tensor("w", shape, "[0,0]")], 0).starts_with("not a valid safetensors file"));
        assert!(
            header(&[tensor("w", "[1152921504606846976]", "[0,3]")], 3).starts_with("not a valid safetensors file")
        );
    }

    #[test]
    fn a_tensor_stands_once() {
        let twice = [tensor("w", "[3]", "[0,3]"), tensor("w", "[3]", "[0,3]")].join(",");
        assert!(refused(&file(&format!("{{{twice}}}"), 3)).contains("`w` is given twice"));
        let metadata = r#"{"__metadata__":{"a":"b","a":"c"}}"#;
        assert!(refused(&file(metadata, 0)).contains("`a` is given twice"));
    }

    #[test]
    fn ends_that_wrap_around_are_refused() {
        // Eight tensors of 2^61 - 1 bytes and one more end just below 2^64: 8 + header + end wraps around to a small number,
        // which the format's own reader compares with the length of the file.
        let each = (1u64 << 61) - 1;
        let header = |last: u64| {
            let mut tensors: Vec<_> = (0..8)
                .map(|i| tensor(&format!("w{i}"), &format!("[{each}]"), &format!("[{},{}]", i * each, (i + 1) * each)))
                .collect();
            tensors.push(tensor("w8", &format!("[{}]", last - 8 * each), &format!("[{},{last}]", 8 * each)));
            format!("{{{}}}", tensors.join(","))
        };
        let end = u64::MAX - 7;
        let text = header(end);
        assert_eq!((8 + text.len() as u64).wrapping_add(end), text.len() as u64);
        assert!(refused(&file(&text, 0)).contains("bytes of tensors, the file has 0"));
    }

    #[test]
    fn files_that_are_none_and_files_that_are_too_large_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let problem = |path: &str, most| read(&folder.path().join(path), most).unwrap_err().to_string();
        assert!(problem("none", 9).contains("none: "));
        assert!(problem(".", 9).ends_with("is a directory, not a file"));
        fs::write(folder.path().join("text"), "ab\u{e4}").unwrap();
        assert_eq!(read(&folder.path().join("text"), 4).unwrap().len(), 4);
        assert!(problem("text", 3).ends_with("text: the size of the file in bytes is 4, must be at most 3"));
        fs::write(folder.path().join("text"), b"ab\xff").unwrap();
        let error = read_text(&folder.path().join("text"), 4).unwrap_err().to_string();
        assert!(error.ends_with("text: not UTF-8 text (byte 2)"), "{error}");
        #[cfg(unix)]
        {
            assert!(read("/dev/zero".as_ref(), 9).unwrap_err().to_string().ends_with("is not a regular file"));
            // The kernel says that it is empty.
            #[cfg(target_os = "linux")]
            assert!(read("/proc/self/status".as_ref(), 9).unwrap_err().to_string().contains("must be at most 9"));
        }
    }
}
