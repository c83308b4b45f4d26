//! The files of `egmla attend`: input tensors, checked, and an output that appears whole or not at all.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use egmla::Error;
use egmla::config::AttentionConfig;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::failure::Failure;
use crate::interrupt;

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source }.into())
}

fn problem(path: &Path, text: impl Display) -> Failure {
    Failure::usage(format!("{}: {text}", path.display()))
}

/// The tokens of all sequences, one sequence after another.
#[derive(Debug, PartialEq)]
pub struct Input {
    /// `[tokens, width]`
    pub hidden: Vec<f32>,
    /// The layer's `hidden_size`.
    pub width: usize,
    /// `[tokens]`, when the layer has a gate.
    pub token_ids: Option<Vec<u32>>,
    /// Tokens of each sequence; their sum is `tokens`.
    pub lengths: Vec<u32>,
}

impl Input {
    /// Reads the input file and checks it against the layer.
    pub fn read(path: &Path, config: &AttentionConfig) -> Result<Self, Failure> {
        let bytes = read(path)?;
        Self::parse(&bytes, config).map_err(|text| problem(path, text))
    }

    fn parse(bytes: &[u8], config: &AttentionConfig) -> Result<Self, String> {
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|error| Error::Safetensors(error.to_string()).to_string())?;
        let mut names = tensors.names();
        names.sort();
        for name in names {
            if !["hidden_states", "token_ids", "sequence_lengths"].contains(&name) {
                return Err(format!(
                    "tensor `{name}` is not expected; the input holds hidden_states, token_ids and sequence_lengths"
                ));
            }
        }
        let width = config.hidden_size as usize;
        let hidden = tensors
            .tensor("hidden_states")
            .map_err(|_| format!("tensor `hidden_states` is missing (expected shape [tokens, {width}])"))?;
        let &[tokens, found] = hidden.shape() else {
            return Err(format!("tensor `hidden_states` has shape {:?}, expected [tokens, {width}]", hidden.shape()));
        };
        if found != width {
            return Err(format!("tensor `hidden_states` has shape {:?}, expected [tokens, {width}]", hidden.shape()));
        }
        if hidden.dtype() != Dtype::F32 {
            return Err(format!("tensor `hidden_states` has element type {:?}, expected F32", hidden.dtype()));
        }
        if tokens == 0 {
            return Err("tensor `hidden_states` is empty: it holds 0 tokens".to_owned());
        }
        if tokens > i32::MAX as usize {
            return Err(format!("tensor `hidden_states` holds {tokens} tokens, at most {} can be run", i32::MAX));
        }
        let hidden: Vec<f32> =
            hidden.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let non_finite = hidden.iter().filter(|value| !value.is_finite()).count();
        if non_finite > 0 {
            tracing::warn!("tensor `hidden_states` holds {non_finite} NaN or infinite values of {}", hidden.len());
        }
        Ok(Input {
            hidden,
            width,
            token_ids: token_ids(&tensors, config, tokens)?,
            lengths: sequence_lengths(&tensors, tokens)?,
        })
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.hidden.len() / self.width
    }
}

/// The ids, checked; `None` without a gate, which is all that looks at them.
fn token_ids(tensors: &SafeTensors<'_>, config: &AttentionConfig, tokens: usize) -> Result<Option<Vec<u32>>, String> {
    let view = match (tensors.tensor("token_ids"), &config.gate) {
        (Err(_), None) => return Ok(None),
        (Err(_), Some(_)) => {
            return Err(format!("tensor `token_ids` is missing (expected shape [{tokens}]); the gate needs it"));
        }
        (Ok(view), _) => view,
    };
    if view.shape() != [tokens] {
        return Err(format!("tensor `token_ids` has shape {:?}, expected [{tokens}]", view.shape()));
    }
    let ids = integers("token_ids", &view)?;
    let vocab_size = config.gate.as_ref().map(|gate| gate.vocab_size);
    let mut checked = Vec::with_capacity(ids.len());
    for (index, &id) in ids.iter().enumerate() {
        let within = u32::try_from(id).ok().filter(|&id| vocab_size.is_none_or(|size| id < size));
        match (within, vocab_size) {
            (Some(id), _) => checked.push(id),
            (None, Some(size)) if id >= 0 => {
                return Err(Error::TokenId { index, id: id.unsigned_abs(), vocab_size: size }.to_string());
            }
            (None, size) => {
                let most = size.unwrap_or(u32::MAX) - u32::from(size.is_some());
                return Err(format!("token id {id} at position {index} is not between 0 and {most}"));
            }
        }
    }
    Ok(config.gate.is_some().then_some(checked))
}

fn sequence_lengths(tensors: &SafeTensors<'_>, tokens: usize) -> Result<Vec<u32>, String> {
    let Ok(view) = tensors.tensor("sequence_lengths") else { return Ok(vec![tokens as u32]) };
    if view.shape().len() != 1 {
        return Err(format!("tensor `sequence_lengths` has shape {:?}, expected [batch]", view.shape()));
    }
    let lengths = integers("sequence_lengths", &view)?;
    let mut sum = 0u64;
    let mut checked = Vec::with_capacity(lengths.len());
    for (index, &length) in lengths.iter().enumerate() {
        let length = u32::try_from(length)
            .map_err(|_| format!("`sequence_lengths` [{index}] is {length}, must be between 0 and {}", u32::MAX))?;
        sum += u64::from(length);
        checked.push(length);
    }
    if sum != tokens as u64 {
        return Err(format!("`sequence_lengths` add up to {sum}, but `hidden_states` holds {tokens} tokens"));
    }
    Ok(checked)
}

/// Elements of a u32 or i64 tensor.
fn integers(name: &str, view: &TensorView<'_>) -> Result<Vec<i64>, String> {
    let data = view.data();
    match view.dtype() {
        Dtype::U32 => Ok(data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect()),
        Dtype::I64 => Ok(data
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect()),
        other => Err(format!("tensor `{name}` has element type {other:?}, expected U32 or I64")),
    }
}

/// A place that can be written to. What is there stays until the new file is whole.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    partial: PathBuf,
}

impl Output {
    /// Checks that the file can be written, before anything is computed for it. Leaves nothing there.
    pub fn check(path: &Path) -> Result<Self, Failure> {
        if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(problem(path, "is not the name of a file"));
        }
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) && fs::canonicalize(path).is_err() {
            return Err(problem(path, "is a link to nothing"));
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(problem(path, "is a directory, not a file to write to")),
            Ok(found) if !found.is_file() => return Err(problem(path, "is not a regular file")),
            Ok(found) if found.permissions().readonly() => return Err(problem(path, "is read-only")),
            _ => {}
        }
        // A link keeps pointing where it does: the file behind it is replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        // A killed run may have left one behind: take the first name that is free.
        let name = |n: u32| path.with_file_name(format!(".egmla.{}.{n}.partial", std::process::id()));
        let partial = (0..100).map(name).find(|name| !name.exists()).unwrap_or_else(|| name(0));
        let unfinished = partial.clone();
        interrupt::undo(move || drop(fs::remove_file(unfinished)));
        let output = Output { path, partial };
        output.create().map(drop).map_err(|error| output.not_writable(&error))?;
        output.remove();
        Ok(output)
    }

    /// Refuses to replace a file that the run reads.
    pub fn refuse_input(&self, option: &str, input: &Path) -> Result<(), Failure> {
        if fs::canonicalize(input).is_ok_and(|input| input == self.path) || same_file(input, &self.path) {
            return Err(problem(&self.path, format_args!("is the --{option} file: choose another output")));
        }
        Ok(())
    }

    /// Writes `hidden_states` `[tokens, width]`.
    pub fn write(&self, hidden: &[f32], width: usize) -> Result<(), Failure> {
        let bytes: Vec<u8> = hidden.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = vec![hidden.len() / width, width];
        let view = TensorView::new(Dtype::F32, shape, &bytes).map_err(Failure::run)?;
        let bytes = safetensors::serialize([("hidden_states", view)], None).map_err(Failure::run)?;
        let written = self.create().and_then(|mut file| {
            // Who could read the file before can read it after, and nobody else.
            if let Ok(old) = fs::metadata(&self.path) {
                file.set_permissions(old.permissions())?;
            }
            file.write_all(&bytes)?;
            file.sync_all()
        });
        // Up to here the old file stands, and whoever interrupts the run keeps it.
        let replaced = match written {
            Ok(()) if interrupt::asked() => Err(Failure::Interrupted),
            Ok(()) => fs::rename(&self.partial, &self.path).map_err(|error| self.not_written(&error)),
            Err(error) => Err(self.not_written(&error)),
        };
        if replaced.is_err() {
            self.remove();
        }
        replaced
    }

    fn create(&self) -> io::Result<File> {
        File::create_new(&self.partial)
    }

    /// What cannot be removed was not written.
    fn remove(&self) {
        let _ = fs::remove_file(&self.partial);
    }

    fn not_written(&self, error: &io::Error) -> Failure {
        Failure::run(format!("{}: {error}", self.path.display()))
    }

    fn not_writable(&self, error: &io::Error) -> Failure {
        problem(&self.path, format_args!("cannot be written: {error}"))
    }
}

/// Two names of one file, as hard links are.
#[cfg(unix)]
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn same_file(_: &Path, _: &Path) -> bool {
    false
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::{AttentionConfig, Input, Output};
    use crate::failure::Failure;

    fn config(gate: &str) -> AttentionConfig {
        let text = format!(
            r#"{{"hidden_size":2,"num_attention_heads":1,"kv_lora_rank":1,"qk_nope_head_dim":1,"qk_rope_head_dim":0,
                "v_head_dim":1,"embedding_gate":{gate}}}"#
        );
        AttentionConfig::from_json(&text).unwrap()
    }

    fn gated() -> AttentionConfig {
        config(r#"{"vocab_size":4,"embed_dim":1}"#)
    }

    fn bytes<const N: usize, T: Copy>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&value| to(value)).collect()
    }

    /// A file of the named tensors.
    fn file(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    fn hidden(tokens: usize) -> (&'static str, Dtype, Vec<usize>, Vec<u8>) {
        ("hidden_states", Dtype::F32, vec![tokens, 2], bytes(&vec![0.5f32; tokens * 2], f32::to_le_bytes))
    }

    fn parse(
        config: &AttentionConfig,
        tokens: usize,
        more: &[(&str, Dtype, &[usize], Vec<u8>)],
    ) -> Result<Input, String> {
        let (name, dtype, shape, data) = hidden(tokens);
        let mut tensors = vec![(name, dtype, shape.as_slice(), data)];
        tensors.extend(more.iter().cloned());
        Input::parse(&file(&tensors), config)
    }

    fn i64s(values: &[i64]) -> Vec<u8> {
        bytes(values, i64::to_le_bytes)
    }

    fn u32s(values: &[u32]) -> Vec<u8> {
        bytes(values, u32::to_le_bytes)
    }

    #[test]
    fn ids_and_lengths_are_read_as_u32_or_i64() {
        let expected = Input { hidden: vec![0.5; 6], width: 2, token_ids: Some(vec![3, 0, 1]), lengths: vec![2, 0, 1] };
        let wide = parse(
            &gated(),
            3,
            &[
                ("token_ids", Dtype::I64, &[3], i64s(&[3, 0, 1])),
                ("sequence_lengths", Dtype::I64, &[3], i64s(&[2, 0, 1])),
            ],
        );
        assert_eq!(wide.as_ref(), Ok(&expected));
        let narrow = parse(
            &gated(),
            3,
            &[
                ("token_ids", Dtype::U32, &[3], u32s(&[3, 0, 1])),
                ("sequence_lengths", Dtype::U32, &[3], u32s(&[2, 0, 1])),
            ],
        );
        assert_eq!(narrow.as_ref(), Ok(&expected));
        assert_eq!(expected.tokens(), 3);
    }

    #[test]
    fn without_a_gate_ids_are_not_needed_and_not_kept() {
        let plain = config("null");
        assert_eq!(parse(&plain, 2, &[]).unwrap().token_ids, None);
        let given = parse(&plain, 2, &[("token_ids", Dtype::U32, &[2], u32s(&[7, 9]))]);
        assert_eq!(given.unwrap().token_ids, None);
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_numbers() {
        let ids = |values: &[i64]| vec![("token_ids", Dtype::I64, [values.len()], i64s(values))];
        let refused = |values: &[i64]| {
            let tensors = ids(values);
            let (name, dtype, shape, data) = &tensors[0];
            parse(&gated(), 2, &[(*name, *dtype, shape, data.clone())]).unwrap_err()
        };
        assert_eq!(refused(&[1, 4]), "token id 4 at position 1 is outside of the vocabulary of 4");
        assert_eq!(refused(&[1, 1 << 40]), "token id 1099511627776 at position 1 is outside of the vocabulary of 4");
        assert_eq!(refused(&[-3, 0]), "token id -3 at position 0 is not between 0 and 3");
        assert_eq!(refused(&[0, 1, 2]), "tensor `token_ids` has shape [3], expected [2]");
        assert!(parse(&gated(), 2, &[]).unwrap_err().starts_with("tensor `token_ids` is missing (expected shape [2])"));
        let float = ("token_ids", Dtype::F32, &[2][..], bytes(&[0f32; 2], f32::to_le_bytes));
        assert!(parse(&gated(), 2, &[float]).unwrap_err().contains("has element type F32, expected U32 or I64"));

        let plain = config("null");
        let lengths = |values: &[i64]| {
            let shape = [values.len()];
            parse(&plain, 2, &[("sequence_lengths", Dtype::I64, &shape, i64s(values))]).unwrap_err()
        };
        assert_eq!(lengths(&[1, 2]), "`sequence_lengths` add up to 3, but `hidden_states` holds 2 tokens");
        assert_eq!(lengths(&[]), "`sequence_lengths` add up to 0, but `hidden_states` holds 2 tokens");
        assert!(lengths(&[3, -1]).starts_with("`sequence_lengths` [1] is -1, must be"), "{}", lengths(&[3, -1]));
        let square = ("sequence_lengths", Dtype::U32, &[1, 1][..], u32s(&[2]));
        assert!(parse(&plain, 2, &[square]).unwrap_err().contains("has shape [1, 1], expected [batch]"));

        assert!(parse(&plain, 0, &[]).unwrap_err().contains("holds 0 tokens"));
        let extra = ("attention_mask", Dtype::U32, &[1][..], u32s(&[1]));
        assert!(parse(&plain, 2, &[extra]).unwrap_err().starts_with("tensor `attention_mask` is not expected"));
        let of = |dtype, shape: &[usize], data| Input::parse(&file(&[("hidden_states", dtype, shape, data)]), &plain);
        assert_eq!(
            of(Dtype::F32, &[1, 3], bytes(&[0f32; 3], f32::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has shape [1, 3], expected [tokens, 2]"
        );
        assert_eq!(
            of(Dtype::F32, &[2], bytes(&[0f32; 2], f32::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has shape [2], expected [tokens, 2]"
        );
        assert_eq!(
            of(Dtype::F64, &[1, 2], bytes(&[0f64; 2], f64::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has element type F64, expected F32"
        );
        let missing = Input::parse(&file(&[]), &plain).unwrap_err();
        assert_eq!(missing, "tensor `hidden_states` is missing (expected shape [tokens, 2])");
        let (name, dtype, shape, data) = hidden(2);
        let whole = file(&[(name, dtype, &shape, data)]);
        assert!(Input::parse(&whole[..whole.len() - 1], &plain).unwrap_err().starts_with("not a valid safetensors"));
    }

    #[test]
    fn an_output_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let entries = || std::fs::read_dir(folder.path()).unwrap().count();
        let output = Output::check(&folder.path().join("y")).unwrap();
        assert_eq!(entries(), 0, "checking leaves nothing");
        output.write(&[1.0, 2.0], 2).unwrap();
        assert_eq!(entries(), 1, "no partial file is left");
        let refused = |path| Output::check(path).unwrap_err();
        assert!(matches!(refused(folder.path()), Failure::Usage(text) if text.contains("is a directory")));
        let nowhere = folder.path().join("none/y");
        assert!(matches!(refused(&nowhere), Failure::Usage(text) if text.contains("cannot be written")));
    }
}
