//! A reader of JSON objects, key by key.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;

/// A JSON object read key by key, with errors that name the key.
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Prefix of the keys in messages, as `rope_scaling.`.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Keys { map, prefix }
    }

    pub(super) fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::config(&format!("{}{key}", self.prefix), problem)
    }

    /// Whether there is the key, be it null.
    pub(super) fn holds(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value, `None` when absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // Some programs write 64.0.
        match value.as_f64() {
            Some(number) if number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number) => {
                Ok(Some(number as u32))
            }
            _ => Err(self.error(key, format!("{} is not a whole number from 0 to {}", self.shown(key), u32::MAX))),
        }
    }

    pub(super) fn required_integer(&self, key: &str) -> Result<u32> {
        self.integer(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.error(key, format!("{} is not a finite number", self.shown(key)))),
        }
    }

    /// A list of finite numbers that must be there.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = self.get(key).ok_or_else(|| self.error(key, "is missing"))?.as_array();
        let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>());
        numbers.ok_or_else(|| self.error(key, format!("{} is not a list of numbers", self.shown(key))))
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, format!("{value} is not true or false")))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format!("{value} is not a text")))
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.error(key, format!("{value} is not an object")))
    }

    /// Refuses keys that are in none of the lists, and not null: a misspelt option must not pass as its default.
    pub(super) fn refuse_unknown(&self, known: &[&[&str]]) -> Result<()> {
        let unknown = |key: &&String| self.get(key).is_some() && !known.iter().any(|list| list.contains(&key.as_str()));
        let unknown: Vec<_> = self.map.keys().filter(unknown).map(String::as_str).collect();
        if unknown.is_empty() { Ok(()) } else { Err(self.error(&unknown.join("`, `"), "is not known")) }
    }

    /// The value as an error shows it: in full where it is short.
    pub(super) fn shown(&self, key: &str) -> String {
        match self.get(key) {
            None => "null".to_owned(),
            Some(value @ (Value::Array(_) | Value::Object(_))) => summary(value).to_owned(),
            Some(value) => value.to_string(),
        }
    }
}

/// What JSON has no word for and Python's writer writes, as texts: where such a key is read, it is no number; where not, it does
/// no harm.
fn without_special_numbers(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !WORDS.iter().any(|word| text.contains(word)) {
        return text.into();
    }
    let (mut out, mut rest, mut quoted) = (String::with_capacity(text.len() + 16), text, false);
    while let Some(first) = rest.chars().next() {
        let word = WORDS.iter().find(|word| !quoted && rest.starts_with(**word));
        let taken = match (word, first) {
            (Some(word), _) => word.len(),
            // An escaped quote does not end a text.
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, _) => first.len_utf8(),
        };
        quoted ^= first == '"';
        let quote = if word.is_some() { "\"" } else { "" };
        out.extend([quote, &rest[..taken], quote]);
        rest = &rest[taken..];
    }
    out.into()
}

pub(super) fn parse_object(text: &str) -> Result<Map<String, Value>> {
    let text = &*without_special_numbers(text.strip_prefix('\u{feff}').unwrap_or(text));
    json::walk(text.as_bytes(), &mut |_| {})?;
    match serde_json::from_str(text)? {
        Value::Object(map) => Ok(map),
        other => Err(Error::config("(top level)", format!("{} is not an object", summary(&other)))),
    }
}

fn summary(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
