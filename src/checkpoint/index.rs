//! `model.safetensors.index.json`: which file of a folder holds which tensor.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Component, Path};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{DataError, Error, Result};
use crate::json::{Walk, next_key};

/// Most bytes of an index; that of a model of a million millions of parameters has some tens of millions.
pub(super) const MOST: u64 = 64 << 20;

/// The file of every tensor, by the tensor's name.
type Map = BTreeMap<String, String>;

/// The file of every tensor, by the tensor's name; each is a name, no path.
///
/// # Errors
/// `DataError::Index`
pub(super) fn parse(text: &str) -> Result<Map> {
    let refused = |problem: String| Err(Error::Data(DataError::Index(problem)));
    match serde_json::from_str(text) {
        Ok(Index(Some(WeightMap(map)))) if !map.is_empty() => Ok(map),
        Ok(_) => refused("`weight_map` is missing, or names no tensor".to_owned()),
        Err(error) => refused(error.to_string()),
    }
}

/// The whole text. Keys but `weight_map` are passed over.
struct Index(Option<WeightMap>);

struct WeightMap(Map);

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let (mut index, mut seen) = (Index(None), HashSet::new());
        while let Some(key) = next_key(&mut map, &mut seen)? {
            match key.as_str() {
                "weight_map" => index.0 = Some(map.next_value()?),
                _ => map.next_value_seed(Walk(&mut |_| {}))?,
            }
        }
        Ok(index)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("`weight_map`, an object of tensors and their files")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut files = Map::new();
        while let Some(tensor) = map.next_key::<String>()? {
            let file: String = map
                .next_value()
                .map_err(|error| A::Error::custom(format_args!("the file of tensor `{tensor}`: {error}")))?;
            if !is_name(&file) {
                let problem =
                    format_args!("the file of tensor `{tensor}` is {file:?}, which is not the name of a file");
                return Err(A::Error::custom(problem));
            }
            if files.contains_key(&tensor) {
                return Err(A::Error::custom(format_args!("`{tensor}` is given twice")));
            }
            files.insert(tensor, file);
        }
        Ok(WeightMap(files))
    }
}

/// Whether a text is the name of a file in the same folder, on every system.
pub(super) fn is_name(text: &str) -> bool {
    let mut parts = Path::new(text).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == text);
    plain && !text.contains(|c: char| c.is_control() || c == '\\' || c == ':')
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{is_name, parse};

    #[test]
    fn an_index_is_read_or_refused_in_one_line() {
        let map = parse(r#"{"metadata":{"total_size":9},"weight_map":{"a":"x.safetensors","b":"y"}}"#).unwrap();
        assert_eq!(
            map.into_iter().collect::<Vec<_>>(),
            [("a".into(), "x.safetensors".into()), ("b".into(), "y".into())]
        );
        for (text, part) in [
            ("", "EOF"),
            ("[]", "expected an object"),
            (r#"[{"a":"x"}]"#, "expected an object"),
            ("{}", "`weight_map` is missing"),
            (r#"{"weight_map":[]}"#, "expected `weight_map`, an object"),
            (r#"{"weight_map":{}}"#, "names no tensor"),
            (r#"{"weight_map":{"a":1}}"#, "the file of tensor `a`: invalid type: integer `1`"),
            (r#"{"weight_map":{"a":"x"},"weight_map":{"a":"x"}}"#, "`weight_map` is given twice"),
            (r#"{"weight_map":{"a":"x","a":"y"}}"#, "`a` is given twice"),
            (r#"{"weight_map":{"a":"../x"}}"#, r#"the file of tensor `a` is "../x""#),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        assert!(is_name("model-00001-of-00163.safetensors") && is_name("..x"));
        for path in ["", ".", "..", "/x", "a/b", "../x", "./x", "x/", "a\\b", "C:x", "a\0", "a\n"] {
            assert!(!is_name(path), "{path:?}");
        }
    }
}
