//! Text to token ids and back, whole or as it comes.

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// The tokenizer of a `tokenizer.json`.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    vocab_size: u64,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

/// The tokenizer's own words, on one line.
fn error(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
}

impl TextTokenizer {
    /// Reads the content of a `tokenizer.json`. Truncation and padding that stand in it are switched off: a text is
    /// encoded whole.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the bytes are no tokenizer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(error)?;
        tokenizer.with_truncation(None).map_err(error)?;
        tokenizer.with_padding(None);
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |&id| u64::from(id) + 1);
        Ok(TextTokenizer { tokenizer, vocab_size })
    }

    /// One more than the highest id: rows that a model's embedding must have.
    pub fn vocab_size(&self) -> u64 {
        self.vocab_size
    }

    /// Ids of a text, with the special tokens that the tokenizer itself puts around one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a text that the vocabulary cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode_fast(text, true).map_err(error)?.get_ids().to_vec())
    }

    /// Text of ids, without special tokens. Bytes that are no UTF-8 come out as U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(error)
    }
}

/// Text that grows token by token and is handed out only where it is complete: a character whose bytes are spread over
/// tokens is held back until the last of them.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    ids: Vec<u32>,
    emitted: String,
}

impl<'a> TextStream<'a> {
    /// A stream that continues `context`, whose own text is not handed out.
    ///
    /// # Errors
    /// As [`TextTokenizer::decode`].
    pub fn new(tokenizer: &'a TextTokenizer, context: &[u32]) -> Result<Self> {
        let mut emitted = tokenizer.decode(context)?;
        emitted.truncate(complete(&emitted));
        Ok(TextStream { tokenizer, ids: context.to_vec(), emitted })
    }

    /// Adds a token and returns the text that became complete, which may be empty.
    ///
    /// # Errors
    /// As [`TextTokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(self.emit(&text[..complete(&text)]))
    }

    /// Returns what was held back: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`TextTokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(self.emit(&text))
    }

    fn emit(&mut self, text: &str) -> String {
        // What was handed out cannot be taken back: a decoder that rewrites the past adds nothing.
        let new = text.strip_prefix(self.emitted.as_str()).unwrap_or_default().to_owned();
        self.emitted.push_str(&new);
        new
    }
}

/// Bytes of `text` before its trailing replacement characters.
fn complete(text: &str) -> usize {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER).len()
}
