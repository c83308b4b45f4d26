//! Text to token ids and back, whole or as it comes.

use std::cell::Cell;
use std::panic::AssertUnwindSafe;

use tokenizers::Tokenizer;

use crate::error::{DataError, Error, Result};
use crate::json;

/// Most regular expressions of a tokenizer. Published ones have some three; each may be compiled to ten mebibytes, however few
/// characters it has.
const MOST_PATTERNS: usize = 16;

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

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread now would be one of the tokenizers library, returned as `DataError::Tokenizer`: a panic hook
/// then prints nothing. Contradictory settings of a tokenizer make that library panic in several places.
pub fn panics_are_caught() -> bool {
    CAUGHT.get()
}

/// Calls into the tokenizers library.
fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = CAUGHT.replace(true);
    // After a panic no value is used again: reading failed, or a text was not encoded or decoded. The library ignores poisoned
    // locks of its caches.
    let result = std::panic::catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(before);
    result.unwrap_or_else(|cause| {
        let words =
            cause.downcast_ref::<&str>().copied().or_else(|| cause.downcast_ref::<String>().map(String::as_str));
        Err(error(format_args!("its library failed: {}", words.unwrap_or("it does not say why"))))
    })
}

/// The tokenizer's own words, on one line.
fn error(error: impl std::fmt::Display) -> Error {
    Error::Data(DataError::Tokenizer(error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")))
}

impl TextTokenizer {
    /// Reads the content of a `tokenizer.json`. Its truncation and padding are switched off: a text is encoded whole.
    ///
    /// # Errors
    /// `DataError::Tokenizer` when the bytes are no tokenizer, or one of more than 16 regular expressions.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut patterns = 0;
        json::walk(bytes, &mut |key| patterns += usize::from(key == "Regex")).map_err(error)?;
        if patterns > MOST_PATTERNS {
            let problem = format!("{patterns} regular expressions, at most {MOST_PATTERNS} are compiled");
            return Err(Error::Data(DataError::Tokenizer(problem)));
        }
        guarded(|| {
            let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(error)?;
            tokenizer.with_truncation(None).map_err(error)?;
            tokenizer.with_padding(None);
            let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |&id| u64::from(id) + 1);
            Ok(TextTokenizer { tokenizer, vocab_size })
        })
    }

    /// One more than the highest id: the fewest entries of a model's embedding.
    pub fn vocab_size(&self) -> u64 {
        self.vocab_size
    }

    /// Ids of a text, with the special tokens that the tokenizer itself puts around one.
    ///
    /// # Errors
    /// `DataError::Tokenizer` for a text that the vocabulary cannot express, or a special token beyond the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = guarded(|| Ok(self.tokenizer.encode_fast(text, true).map_err(error)?.get_ids().to_vec()))?;
        match ids.iter().find(|&&id| u64::from(id) >= self.vocab_size) {
            None => Ok(ids),
            Some(id) => {
                let size = self.vocab_size;
                Err(Error::Data(DataError::Tokenizer(format!(
                    "it puts id {id} around a text, beyond its vocabulary of {size}"
                ))))
            }
        }
    }

    /// Text of ids, without special tokens. Bytes that are no UTF-8 come out as U+FFFD.
    ///
    /// # Errors
    /// `DataError::Tokenizer` when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        // Some decoders fail on no token at all.
        if ids.is_empty() {
            return Ok(String::new());
        }
        guarded(|| self.tokenizer.decode(ids, true).map_err(error))
    }
}

/// Text that grows token by token and is returned once complete: a character whose bytes span several tokens is held back until
/// the last of them.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    ids: Vec<u32>,
    emitted: String,
}

impl<'a> TextStream<'a> {
    /// A stream that continues `context` and does not return its text.
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
        // Returned text is final: a decoder that rewrites the past adds nothing.
        let new = text.strip_prefix(self.emitted.as_str()).unwrap_or_default().to_owned();
        self.emitted.push_str(&new);
        new
    }
}

/// Bytes of `text` before its trailing replacement characters.
fn complete(text: &str) -> usize {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER).len()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::TextTokenizer;

    #[test]
    fn a_tokenizer_of_many_regular_expressions_is_refused() {
        let of = |patterns: usize| {
            let split = r#"{"type":"Split","pattern":{"Regex":"\\w{9}"},"behavior":"Removed","invert":false}"#;
            let splits = vec![split; patterns].join(",");
            let text = format!(
                r#"{{"model":{{"type":"WordLevel","vocab":{{"a":0}},"unk_token":"a"}},
                    "pre_tokenizer":{{"type":"Sequence","pretokenizers":[{splits}]}}}}"#
            );
            TextTokenizer::from_bytes(text.as_bytes()).map(|tokenizer| tokenizer.vocab_size())
        };
        assert_eq!(of(16).unwrap(), 1);
        let refused = of(17).unwrap_err().to_string();
        assert_eq!(refused, "tokenizer: 17 regular expressions, at most 16 are compiled");
    }

    /// A tokenizer that knows `a`, with one more setting.
    fn with(setting: &str) -> crate::Result<TextTokenizer> {
        let text = format!(r#"{{"model":{{"type":"WordLevel","vocab":{{"a":0}},"unk_token":"a"}},{setting}}}"#);
        TextTokenizer::from_bytes(text.as_bytes())
    }

    #[test]
    fn what_the_tokenizers_library_panics_on_is_an_error() {
        let tokenizer = with(r#""pre_tokenizer":{"type":"FixedLength","length":0}"#).unwrap();
        let at_encoding = tokenizer.encode("a").unwrap_err().to_string();
        assert!(at_encoding.starts_with("tokenizer: its library failed: "), "{at_encoding}");
        assert!(!super::panics_are_caught());
    }

    #[test]
    fn special_tokens_are_within_the_vocabulary() {
        let of = |id: u32| {
            let processor = format!(r#""post_processor":{{"type":"BertProcessing","sep":["a",{id}],"cls":["a",0]}}"#);
            with(&processor).unwrap().encode("a")
        };
        assert_eq!(of(0).unwrap(), [0, 0, 0]);
        assert_eq!(of(5).unwrap_err().to_string(), "tokenizer: it puts id 5 around a text, beyond its vocabulary of 1");
    }

    #[test]
    fn no_token_is_no_text_whatever_the_decoder() {
        let tokenizer = with(r#""decoder":{"type":"BPEDecoder","suffix":"</w>"}"#).unwrap();
        assert_eq!(tokenizer.decode(&[]).unwrap(), "");
        assert_eq!(tokenizer.decode(&[0]).unwrap(), "a");
    }
}
