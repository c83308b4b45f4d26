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
        self.encode_with(text, true)
    }

    /// Ids of a text that already has its special tokens: none is put around it.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`].
    pub fn encode_written(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    /// The id of a token, by its content.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = guarded(|| Ok(self.tokenizer.encode_fast(text, special).map_err(error)?.get_ids().to_vec()))?;
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
///
/// A decoder sees a window of the last tokens only, so that the time of a token does not grow with the text. A window begins where
/// the text before it was complete.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// The window.
    ids: Vec<u32>,
    /// Text of the window that was returned, or is the context's.
    emitted: String,
    /// Tokens of the window behind which its text was complete: the next window begins there.
    boundary: usize,
}

/// Tokens of a window before the next can begin: enough that a decoder which looks at neighbours sees them.
const WINDOW: usize = 8;

/// Most tokens behind a boundary: bytes that are no character by then will be none.
const LONGEST: usize = 256;

impl<'a> TextStream<'a> {
    /// A stream that continues `context` and does not return its text.
    ///
    /// # Errors
    /// As [`TextTokenizer::decode`].
    pub fn new(tokenizer: &'a TextTokenizer, context: &[u32]) -> Result<Self> {
        let mut emitted = tokenizer.decode(context)?;
        let whole = complete(&emitted);
        let boundary = if whole == emitted.len() { context.len() } else { 0 };
        emitted.truncate(whole);
        Ok(TextStream { tokenizer, ids: context.to_vec(), emitted, boundary })
    }

    /// Adds a token and returns the text that became complete, which may be empty.
    ///
    /// # Errors
    /// As [`TextTokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        let whole = complete(&text);
        let behind = self.ids.len() - self.boundary;
        if whole < text.len() && behind >= LONGEST {
            let new = self.emit(&text);
            (self.ids, self.emitted, self.boundary) = (Vec::new(), String::new(), 0);
            return Ok(new);
        }
        let new = self.emit(&text[..whole]);
        if whole == text.len() && behind >= WINDOW {
            self.shorten()?;
        }
        Ok(new)
    }

    /// Begins the window at the boundary, and puts the boundary at its end, where the text is complete.
    fn shorten(&mut self) -> Result<()> {
        let text = self.tokenizer.decode(&self.ids[self.boundary..])?;
        if text.is_empty() {
            // Tokens without a text: a window of them would make what follows look like the start of a text.
            self.ids.truncate(self.boundary);
        } else {
            self.ids.drain(..self.boundary);
            self.emitted = text;
        }
        self.boundary = self.ids.len();
        Ok(())
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
        let Some(new) = text.strip_prefix(self.emitted.as_str()).map(str::to_owned) else { return String::new() };
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
    use super::{LONGEST, TextStream, TextTokenizer, WINDOW};

    /// As sentencepiece's models have it: a space before the first word, bytes for what is not in the vocabulary, one special token.
    fn of_words() -> TextTokenizer {
        let bytes = (0..256).map(|byte| format!(r#""<0x{byte:02X}>":{byte}"#)).collect::<Vec<_>>().join(",");
        let text = format!(
            r#"{{"added_tokens":[{{"id":262,"content":"</s>","special":true,"single_word":false,"lstrip":false,"rstrip":false,
                "normalized":false}}],
                "normalizer":{{"type":"Sequence","normalizers":[{{"type":"Prepend","prepend":"▁"}},
                    {{"type":"Replace","pattern":{{"String":" "}},"content":"▁"}}]}},
                "decoder":{{"type":"Sequence","decoders":[{{"type":"Replace","pattern":{{"String":"▁"}},"content":" "}},
                    {{"type":"ByteFallback"}},{{"type":"Fuse"}},{{"type":"Strip","content":" ","start":1,"stop":0}}]}},
                "model":{{"type":"BPE","byte_fallback":true,"unk_token":"<0x00>","merges":[],
                    "vocab":{{{bytes},"▁":256,"a":257,"b":258,"é":259,",":260,"c":261}}}}}}"#
        );
        TextTokenizer::from_bytes(text.as_bytes()).unwrap()
    }

    /// The text of the ids behind a context, token by token, and the longest window on the way.
    fn streamed(tokenizer: &TextTokenizer, ids: &[u32], context: usize) -> (String, usize) {
        let mut stream = TextStream::new(tokenizer, &ids[..context]).unwrap();
        let (mut text, mut longest) = (String::new(), 0);
        for &id in &ids[context..] {
            text += &stream.push(id).unwrap();
            longest = longest.max(stream.ids.len() - context.min(stream.ids.len()));
        }
        (text + &stream.finish().unwrap(), longest)
    }

    #[test]
    fn a_window_streams_what_the_whole_text_is() {
        let tokenizer = of_words();
        let text = "a b, abc é ✓✓ 😀😀😀a b  c é, ,a aaa bb".repeat(12);
        let ids = tokenizer.encode(&text).unwrap();
        for context in [0, 1, 2, 9, 40] {
            let before = tokenizer.decode(&ids[..context]).unwrap();
            // A context that ends inside a character leaves it to what follows.
            let before = before.trim_end_matches(char::REPLACEMENT_CHARACTER);
            let (streamed, longest) = streamed(&tokenizer, &ids, context);
            assert_eq!(format!("{before}{streamed}"), text, "{context}");
            assert!(longest <= 3 * WINDOW, "{longest}");
        }
    }

    #[test]
    fn tokens_without_a_text_change_nothing() {
        let tokenizer = of_words();
        let words = tokenizer.encode("a b").unwrap();
        let ids = [words.clone(), vec![262; 5 * WINDOW], words.clone()].concat();
        let (text, longest) = streamed(&tokenizer, &ids, words.len());
        assert_eq!(text, " a b");
        assert!(longest <= 2 * WINDOW, "{longest}");
    }

    #[test]
    fn bytes_that_never_become_a_character_do_not_wait_for_ever() {
        let tokenizer = of_words();
        let (text, longest) = streamed(&tokenizer, &vec![0xff; 4 * LONGEST], 0);
        assert!(text.chars().all(|c| c == char::REPLACEMENT_CHARACTER) && text.chars().count() >= 3 * LONGEST);
        assert!(longest <= LONGEST + WINDOW, "{longest}");
    }

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
