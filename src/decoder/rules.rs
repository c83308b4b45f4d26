//! What a model's folder says about texts: which tokens end one, and how a conversation is written.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::tokenizer::TextTokenizer;
use crate::error::{Error, Result};
use crate::{files, json};

/// Most bytes of a chat template; published ones have some thousands.
const MOST_TEMPLATE: u64 = 1 << 20;

/// When a text ends, and how a conversation is written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextRules {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// A Jinja template that writes a conversation as text.
    pub chat_template: Option<String>,
    /// Special tokens by their names in templates, as `bos_token`.
    pub special_tokens: BTreeMap<String, String>,
}

impl TextRules {
    /// Reads those of a folder with this `config.json`. `eos_token_id` of `generation_config.json` comes before that of
    /// `config.json`, and that before `eos_token` of `tokenizer_config.json`; `chat_template.jinja` before `chat_template` of
    /// `tokenizer_config.json`, of whose named templates it is `default`.
    ///
    /// # Errors
    /// [`Error::File`] of a file that is there and cannot be read, or with the key of what has another type.
    pub fn read(folder: &Path, config: &str, tokenizer: &TextTokenizer) -> Result<Self> {
        let generation = read_object(&folder.join("generation_config.json"))?;
        let of_tokenizer_path = folder.join("tokenizer_config.json");
        let of_tokenizer = read_object(&of_tokenizer_path)?;
        let in_tokenizer = |error: Error| error.in_file(&of_tokenizer_path);

        let special_tokens = special_tokens(&of_tokenizer);
        let mut eos_token_ids =
            ids(&generation).map_err(|error| error.in_file(folder.join("generation_config.json")))?;
        if eos_token_ids.is_none() {
            // The configuration's own reader has read it.
            let config = serde_json::from_str(config).unwrap_or_default();
            eos_token_ids = ids(&config).map_err(|error| error.in_file(folder.join("config.json")))?;
        }
        let of_text =
            || special_tokens.get("eos_token").and_then(|token| tokenizer.token_id(token)).into_iter().collect();
        let template = folder.join("chat_template.jinja");
        let chat_template = match exists(&template) {
            true => Some(files::read_text(&template, MOST_TEMPLATE)?),
            false => chat_template(&of_tokenizer).map_err(in_tokenizer)?,
        };
        Ok(TextRules { eos_token_ids: eos_token_ids.unwrap_or_else(of_text), chat_template, special_tokens })
    }
}

/// Whether there is something of that name, if only a link to nothing: that is refused where it is read.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The object of a file; an empty one where there is no file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !exists(path) {
        return Ok(Map::new());
    }
    // Some hold every special token of a large vocabulary.
    let bytes = files::read(path, files::MOST_TOKENIZER)?;
    let parse = || {
        json::walk(&bytes, &mut |_| {})?;
        serde_json::from_slice(&bytes)
    };
    parse().map_err(|error| Error::from(error).in_file(path))
}

/// `eos_token_id`: a number or a list.
fn ids(object: &Map<String, Value>) -> Result<Option<Vec<u32>>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match object.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    let problem = || Error::config("eos_token_id", "is neither a token id nor a list of token ids");
    ids.map(Some).ok_or_else(problem)
}

/// The keys that end in `_token`: texts, or objects with a `content`.
fn special_tokens(object: &Map<String, Value>) -> BTreeMap<String, String> {
    let content = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    let named = object.iter().filter(|(key, _)| key.ends_with("_token"));
    named.filter_map(|(key, value)| Some((key.clone(), content(value)?))).collect()
}

/// `chat_template`: a text, or a list of texts with names.
fn chat_template(object: &Map<String, Value>) -> Result<Option<String>> {
    let refused = |problem: String| Err(Error::config("chat_template", problem));
    let template = match object.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(template)) => template,
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            match default.and_then(|entry| entry.get("template")?.as_str()) {
                Some(template) => template,
                None => return refused("is a list without a template of the name `default`".to_owned()),
            }
        }
        Some(_) => return refused("is neither a text nor a list of named texts".to_owned()),
    };
    match template.len() as u64 {
        length if length > MOST_TEMPLATE => refused(format!("has {length} bytes, at most {MOST_TEMPLATE} are read")),
        _ => Ok(Some(template.to_owned())),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::{TextRules, TextTokenizer};

    const TOKENIZER: &str = r#"{"model":{"type":"WordLevel","vocab":{"a":0,"</s>":7},"unk_token":"a"}}"#;

    fn read(config: Value, files: &[(&str, String)]) -> crate::Result<TextRules> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let tokenizer = TextTokenizer::from_bytes(TOKENIZER.as_bytes()).unwrap();
        TextRules::read(folder.path(), &config.to_string(), &tokenizer)
    }

    #[test]
    fn the_end_of_a_text_is_that_of_the_file_that_says_most() {
        let generation = |value: Value| ("generation_config.json", json!({"eos_token_id": value}).to_string());
        let tokenizer = |value: Value| ("tokenizer_config.json", json!({"eos_token": value}).to_string());
        let ids = |config: Value, files: &[(&str, String)]| read(config, files).unwrap().eos_token_ids;
        assert_eq!(ids(json!({}), &[]), [0; 0]);
        assert_eq!(ids(json!({"eos_token_id": 3}), &[]), [3]);
        assert_eq!(ids(json!({"eos_token_id": 3}), &[generation(json!([1, 2]))]), [1, 2]);
        assert_eq!(ids(json!({"eos_token_id": 3}), &[generation(Value::Null)]), [3]);
        assert_eq!(ids(json!({"eos_token_id": null}), &[tokenizer(json!("</s>"))]), [7]);
        assert_eq!(ids(json!({}), &[tokenizer(json!({"content": "</s>"}))]), [7]);
        assert_eq!(ids(json!({}), &[tokenizer(json!("absent"))]), [0; 0]);
        for wrong in [json!("2"), json!([1, -2]), json!(1u64 << 32), json!(1.5)] {
            let error = read(json!({}), &[generation(wrong)]).unwrap_err().to_string();
            assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
        }
        let broken = read(json!({}), &[("generation_config.json", "{".to_owned())]).unwrap_err().to_string();
        assert!(broken.contains("generation_config.json"), "{broken}");
    }

    #[test]
    fn a_template_is_a_text_or_that_of_the_default_name_or_a_file() {
        let of = |value: Value| ("tokenizer_config.json", json!({"chat_template": value}).to_string());
        let template = |files: &[(&str, String)]| read(json!({}), files).map(|rules| rules.chat_template);
        assert_eq!(template(&[]).unwrap(), None);
        assert_eq!(template(&[of(json!("x"))]).unwrap().unwrap(), "x");
        let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(template(&[of(named.clone())]).unwrap().unwrap(), "d");
        assert_eq!(template(&[of(named), ("chat_template.jinja", "file".to_owned())]).unwrap().unwrap(), "file");
        for wrong in [json!(3), json!([{"name": "tool_use", "template": "t"}]), json!("x".repeat(2 << 20))] {
            let error = template(&[of(wrong)]).unwrap_err().to_string();
            assert!(error.contains("tokenizer_config.json") && error.contains("chat_template"), "{error}");
        }
    }
}
