//! JSON whose objects name each key once. serde_json silently keeps the last of several, so two readers of one file could see
//! different values.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Walks over a JSON text and shows every key to `seen`.
///
/// # Errors
/// Invalid JSON, or an object that names a key twice.
pub(crate) fn walk(text: &[u8], seen: &mut dyn FnMut(&str)) -> serde_json::Result<()> {
    let mut json = serde_json::Deserializer::from_slice(text);
    Walk(seen).deserialize(&mut json)?;
    json.end()
}

/// The next key of an object.
///
/// # Errors
/// Invalid JSON, or a key that `known` holds already.
pub(crate) fn next_key<'de, A: MapAccess<'de>>(
    map: &mut A,
    known: &mut HashSet<String>,
) -> Result<Option<String>, A::Error> {
    let Some(key) = map.next_key::<String>()? else { return Ok(None) };
    if !known.insert(key.clone()) {
        return Err(A::Error::custom(format_args!("`{key}` is given twice")));
    }
    Ok(Some(key))
}

/// Any value; its content is dropped.
pub(crate) struct Walk<'a>(pub &'a mut dyn FnMut(&str));

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Walk(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut known = HashSet::new();
        while let Some(key) = next_key(&mut map, &mut known)? {
            (self.0)(&key);
            map.next_value_seed(Walk(self.0))?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::walk;

    #[test]
    fn a_key_stands_once_in_each_object() {
        let read = |text: &str| walk(text.as_bytes(), &mut |_| {}).map_err(|error| error.to_string());
        for fine in [r#"{"a":1,"b":{"a":-1,"b":[]}}"#, r#"[{"a":null},{"a":true}]"#, "1.5", r#""a""#, "{}"] {
            read(fine).unwrap();
        }
        for twice in
            [r#"{"a":1,"a":1}"#, r#"{"b":{"a":1,"c":2,"a":3}}"#, r#"[0,{"a":{},"a":{}}]"#, r#"{"a":1,"\u0061":1}"#]
        {
            assert!(read(twice).unwrap_err().contains("`a` is given twice"), "{twice}");
        }
        assert!(read(&"[".repeat(1 << 20)).unwrap_err().contains("recursion limit"));
        assert!(read("{} {}").unwrap_err().contains("trailing characters"));
    }

    #[test]
    fn every_key_is_shown() {
        let mut keys = Vec::new();
        walk(br#"{"a":[{"b":{"c":1}},2],"d":"e"}"#, &mut |key| keys.push(key.to_owned())).unwrap();
        assert_eq!(keys, ["a", "b", "c", "d"]);
    }
}
