//! GGUF files: a model in one file, as llama.cpp has them. Container, quantised types, names and layouts of the tensors, and the
//! configuration; with feature `decoder` the tokenizer, too.
//!
//! [`crate::Checkpoint::open`] and `ModelFolder::open` take such a file for a checkpoint or a model's folder.

mod blocks;
mod config;
mod container;
mod names;
#[cfg(feature = "decoder")]
mod tokenizer;

use std::io::Read;
use std::path::Path;

pub use container::{Gguf, List, Value};

use crate::checkpoint::Source;
use crate::error::Result;
use crate::files;

/// Whether a path is that of a GGUF file, by its extension or its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    let begins = || {
        let (mut file, _) = files::open(path).ok()?;
        let mut first = container::MAGIC;
        first.fill(0);
        file.read_exact(&mut first).ok().filter(|()| first == container::MAGIC)
    };
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    !path.is_dir() && (named || begins().is_some())
}

/// The text of a `config.json`: of that file, or what one of a GGUF file's model would say.
///
/// # Errors
/// As [`files::read_text`], or as [`Gguf::open`] and, in [`crate::Error::File`], [`Gguf::config_json`].
pub fn read_config(path: &Path) -> Result<String> {
    match is_gguf(path) {
        false => files::read_text(path, files::MOST_CONFIG),
        true => Gguf::open(path)?.config_json().map_err(|error| error.in_file(path)),
    }
}

/// The tensors of a file under the names of a checkpoint.
///
/// # Errors
/// [`crate::Error::File`] with what is wrong in the file, or with an architecture that is not read.
pub(crate) fn open(path: &Path) -> Result<impl Source + use<>> {
    let gguf = Gguf::open(path)?;
    names::Names::new(gguf, Some(path.to_owned())).map_err(|error| error.in_file(path))
}

impl Gguf {
    /// What a `config.json` of this model would say: for `AttentionConfig`, `DecoderConfig` and `ModelSummary`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an architecture that is not read, or a key that is missing or of another type;
    /// [`crate::Error::Unsupported`] for a part of a split file.
    pub fn config_json(&self) -> Result<String> {
        config::config_json(self)
    }

    /// The template of a conversation, in Jinja.
    ///
    /// # Errors
    /// [`crate::Error::Config`] where it is no text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        config::text(self, "tokenizer.chat_template")
    }

    /// The id of a special token: `bos`, `eos`, `eot` (end of a turn), `unknown`, `padding` …
    ///
    /// # Errors
    /// [`crate::Error::Config`] where it is no id.
    pub fn special_id(&self, which: &str) -> Result<Option<u32>> {
        config::integer(self, &format!("tokenizer.ggml.{which}_token_id"))
    }
}
