//! The tokenizer of a GGUF file, as the `tokenizer.json` that it came from.
//!
//! A file holds tokens with their types, and merges or scores, but of the rest of a tokenizer a name only, `tokenizer.ggml.pre`:
//! what that means is a table here, from the models' own files.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::config::{boolean, text};
use super::container::{Gguf, List, Value};
use crate::decoder::{TextRules, TextTokenizer};
use crate::error::{DataError, Error, Result};

/// GPT-2's expression stands in the library's byte-level splitter.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];
/// What files have whose converter did not name a splitter: no model's own, and that of the format's library.
const UNNAMED: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
];

/// Types of tokens.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Most bytes of a token of which merges are made: each is looked up by all its parts.
const MOST_MERGED: usize = 256;

fn split(pattern: &str) -> Json {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// The byte-level splitter: every byte is a character, and with `expression` GPT-2's splits before.
fn byte_level(expression: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": expression})
}

fn error(problem: impl Into<String>) -> Error {
    Error::Data(DataError::Tokenizer(problem.into()))
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String]> {
    match gguf.metadata().get(key) {
        Some(Value::List(List::Texts(list))) => Ok(list),
        None => Err(error(format!("`{key}` is missing"))),
        Some(_) => Err(error(format!("`{key}` is no list of texts"))),
    }
}

/// The splitter of a byte-level tokenizer by its name, its normalizer, and whether a piece that is a token is not merged anew.
fn pre_tokenizer(name: &str) -> Result<(Json, Json, bool)> {
    let sequence = |splits: Vec<Json>| json!({"type": "Sequence", "pretokenizers": splits});
    let before = |patterns: &[&str]| {
        let splits = patterns.iter().copied().map(split).chain([byte_level(false)]);
        sequence(splits.collect())
    };
    Ok(match name {
        "gpt-2" => (byte_level(true), Json::Null, false),
        "smollm" => {
            (sequence(vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]), Json::Null, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (before(&[LLAMA3]), Json::Null, true),
        "qwen2" => (before(&[QWEN2]), json!({"type": "NFC"}), false),
        "deepseek-v3" => (before(&DEEPSEEK_V3), Json::Null, false),
        "default" => {
            tracing::warn!(
                "`tokenizer.ggml.pre` does not name how text is split: tokens may differ from the model's own"
            );
            (before(&UNNAMED), Json::Null, false)
        }
        other => {
            let known = "gpt-2, smollm, llama-bpe, qwen2, deepseek-v3 and default";
            return Err(error(format!("`tokenizer.ggml.pre` is `{other}`, only {known} are read")));
        }
    })
}

/// Merges in the order of their results' scores, the highest first, as transformers makes them of a SentencePiece model: those of
/// every token that two others make up.
fn merges(tokens: &[String], scores: &[f64], merged: impl Fn(usize) -> bool) -> Vec<[String; 2]> {
    let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let mut found = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, token)| merged(*id) && token.len() <= MOST_MERGED) {
        let length = token.chars().count();
        for (left, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (first, second) = token.split_at(at);
            if known.contains(first) && known.contains(second) {
                found.push((id, (left, length - left), [first, second]));
            }
        }
    }
    // Of one score: the longer left part, the longer right part, the token that came first.
    found.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(b.1.cmp(&a.1)).then(a.0.cmp(&b.0)));
    found.into_iter().map(|(_, _, parts)| parts.map(str::to_owned)).collect()
}

/// The text of a `tokenizer.json`.
fn tokenizer_json(gguf: &Gguf) -> Result<String> {
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let types = match gguf.metadata().get("tokenizer.ggml.token_type") {
        None => &vec![1; tokens.len()],
        Some(Value::List(List::Signed(types))) => types,
        Some(_) => return Err(error("`tokenizer.ggml.token_type` is no list of whole numbers")),
    };
    if types.len() != tokens.len() {
        return Err(error(format!("{} tokens, but {} types of tokens", tokens.len(), types.len())));
    }
    let mut vocabulary = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert(token.clone(), id.into()) {
            return Err(error(format!("tokens {first} and {id} are both `{token}`")));
        }
    }
    let special = |which: &str| -> Result<Option<(u32, &String)>> {
        let Some(id) = gguf.special_id(which)? else { return Ok(None) };
        let token = tokens.get(id as usize).ok_or_else(|| {
            error(format!("`tokenizer.ggml.{which}_token_id` is {id}, but there are {} tokens", tokens.len()))
        })?;
        Ok(Some((id, token)))
    };
    let (model, normalizer, splitter, decoder, begins) = match text(gguf, "tokenizer.ggml.model")? {
        Some("gpt2") => {
            let name = text(gguf, "tokenizer.ggml.pre")?.unwrap_or("default");
            let (splitter, normalizer, ignore_merges) = pre_tokenizer(name)?;
            // Two tokens with a space between: a token has none, unless it is the first character.
            let parts = |merge: &'_ String| {
                let at = merge.char_indices().skip(1).find(|(_, it)| *it == ' ').map(|(at, _)| at);
                at.map(|at| [merge[..at].to_owned(), merge[at + 1..].to_owned()])
                    .ok_or_else(|| error(format!("merge `{merge}` is not of two tokens")))
            };
            let merges = texts(gguf, "tokenizer.ggml.merges")?.iter().map(parts).collect::<Result<Vec<_>>>()?;
            let model = json!({"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges});
            (model, normalizer, splitter, byte_level(true), ignore_merges)
        }
        Some("llama") => {
            let scores = match gguf.metadata().get("tokenizer.ggml.scores") {
                Some(Value::List(List::Numbers(scores))) if scores.len() == tokens.len() => scores,
                _ => return Err(error("`tokenizer.ggml.scores` is no list of a number per token")),
            };
            let merges = merges(tokens, scores, |id| !matches!(types[id], UNKNOWN | CONTROL | USER_DEFINED));
            let unknown = special("unknown")?.map(|(_, token)| token);
            let model = json!({
                "type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": true, "fuse_unk": true,
                "unk_token": unknown,
            });
            let prefix = boolean(gguf, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
            let mut decoders = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "ByteFallback"}),
                json!({"type": "Fuse"}),
            ];
            if prefix {
                normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
                decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            }
            (
                model,
                json!({"type": "Sequence", "normalizers": normalizers}),
                Json::Null,
                json!({"type": "Sequence", "decoders": decoders}),
                true,
            )
        }
        Some(other) => {
            return Err(error(format!("`tokenizer.ggml.model` is `{other}`, only gpt2 and llama are read")));
        }
        None => return Err(error("`tokenizer.ggml.model` is missing")),
    };
    let added = tokens.iter().zip(types).enumerate().filter_map(|(id, (token, kind))| {
        let special = match *kind {
            UNKNOWN | CONTROL => true,
            USER_DEFINED => false,
            _ => return None,
        };
        Some(json!({
            "id": id, "content": token, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }))
    });
    let added: Vec<_> = added.collect();

    let around = |which: &str, default: bool| -> Result<Option<(u32, &String)>> {
        if !boolean(gguf, &format!("tokenizer.ggml.add_{which}_token"))?.unwrap_or(default) {
            return Ok(None);
        }
        let missing =
            || error(format!("`tokenizer.ggml.{which}_token_id` is missing, but texts are to have that token"));
        special(which)?.ok_or_else(missing).map(Some)
    };
    let (first, last) = (around("bos", begins)?, around("eos", false)?);
    let token = |(_, token): (u32, &String)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let processor = match first.or(last) {
        None => Json::Null,
        Some(_) => {
            let of = |parts: &[&str]| -> Vec<Json> {
                let texts = parts.iter().map(|part| text(part));
                first.map(token).into_iter().chain(texts).chain(last.map(token)).collect()
            };
            let known = first
                .into_iter()
                .chain(last)
                .map(|(id, token)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})));
            json!({
                "type": "TemplateProcessing", "single": of(&["A"]), "pair": of(&["A", "B"]),
                "special_tokens": known.collect::<Map<_, _>>(),
            })
        }
    };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": splitter, "post_processor": processor, "decoder": decoder, "model": model,
    })
    .to_string())
}

impl Gguf {
    /// The tokenizer: byte-level BPE (`gpt2`), or SentencePiece's BPE (`llama`).
    ///
    /// # Errors
    /// `DataError::Tokenizer` for another kind, a way of splitting text that is not known, or tokens, merges and ids that do not fit
    /// each other.
    pub fn tokenizer(&self) -> Result<TextTokenizer> {
        TextTokenizer::from_bytes(self.tokenizer_json()?.as_bytes())
    }

    /// The same as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Gguf::tokenizer`].
    pub fn tokenizer_json(&self) -> Result<String> {
        tokenizer_json(self)
    }

    /// Which tokens end a text (`eos`, `eot`), and how a conversation is written.
    ///
    /// # Errors
    /// [`crate::Error::Config`] where an id or the template has another type, `DataError::Tokenizer` for an id beyond the tokens.
    pub fn text_rules(&self) -> Result<TextRules> {
        let tokens = texts(self, "tokenizer.ggml.tokens")?;
        let mut rules = TextRules { chat_template: self.chat_template()?.map(str::to_owned), ..TextRules::default() };
        for which in ["eos", "eot"] {
            let id = self.special_id(which)?;
            rules.eos_token_ids.extend(id.filter(|id| !rules.eos_token_ids.contains(id)));
        }
        for (which, name) in
            [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
        {
            let Some(id) = self.special_id(which)? else { continue };
            let beyond = || error(format!("`{which}` is token {id}, beyond the vocabulary of {}", tokens.len()));
            rules.special_tokens.insert(name.to_owned(), tokens.get(id as usize).ok_or_else(beyond)?.clone());
        }
        Ok(rules)
    }
}
