//! A reader of JSON objects, key by key.

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

    /// The value, `None` when absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().map(u32::try_from) {
            Some(Ok(number)) => Ok(Some(number)),
            _ => Err(self.error(key, format!("{value} is not a whole number from 0 to {}", u32::MAX))),
        }
    }

    pub(super) fn required_integer(&self, key: &str) -> Result<u32> {
        self.integer(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.error(key, format!("{value} is not a finite number"))),
        }
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

    /// Refuses keys that are in none of the lists: a misspelt option must not pass as its default.
    pub(super) fn refuse_unknown(&self, known: &[&[&str]]) -> Result<()> {
        for key in self.map.keys() {
            if !known.iter().any(|list| list.contains(&key.as_str())) {
                return Err(self.error(key, "is not known"));
            }
        }
        Ok(())
    }
}

pub(super) fn parse_object(text: &str) -> Result<Map<String, Value>> {
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
