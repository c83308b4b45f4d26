//! JSON whose objects name each key once: serde_json keeps the last of several and says nothing, so that two readers of one
//! file could see two different things.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Any value, of which nothing is kept; an object in it that names a key twice is an error.
pub(crate) struct Distinct;

/// The next key of an object.
///
/// # Errors
/// What the text itself says, or that `seen` holds the key already.
pub(crate) fn next_key<'de, A: MapAccess<'de>>(
    map: &mut A,
    seen: &mut HashSet<String>,
) -> Result<Option<String>, A::Error> {
    let Some(key) = map.next_key::<String>()? else { return Ok(None) };
    if !seen.insert(key.clone()) {
        return Err(A::Error::custom(format_args!("`{key}` is given twice")));
    }
    Ok(Some(key))
}

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Walk)
    }
}

struct Walk;

impl<'de> Visitor<'de> for Walk {
    type Value = Distinct;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_str<E>(self, _: &str) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Distinct, A::Error> {
        while seq.next_element::<Distinct>()?.is_some() {}
        Ok(Distinct)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Distinct, A::Error> {
        let mut seen = HashSet::new();
        while next_key(&mut map, &mut seen)?.is_some() {
            map.next_value::<Distinct>()?;
        }
        Ok(Distinct)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::Distinct;

    #[test]
    fn a_key_stands_once_in_each_object() {
        let read = |text: &str| serde_json::from_str::<Distinct>(text).map(drop).map_err(|error| error.to_string());
        for fine in [r#"{"a":1,"b":{"a":-1,"b":[]}}"#, r#"[{"a":null},{"a":true}]"#, "1.5", r#""a""#, "{}"] {
            read(fine).unwrap();
        }
        for twice in
            [r#"{"a":1,"a":1}"#, r#"{"b":{"a":1,"c":2,"a":3}}"#, r#"[0,{"a":{},"a":{}}]"#, r#"{"a":1,"\u0061":1}"#]
        {
            assert!(read(twice).unwrap_err().contains("`a` is given twice"), "{twice}");
        }
        assert!(read(&"[".repeat(1 << 20)).unwrap_err().contains("recursion limit"));
    }
}
