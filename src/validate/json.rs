//! JSON as a schema has to see it: an object has each member once. Readers differ in which of two members
//! with one name they take, so a schema that checks one of them says nothing about what others read.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Why a payload has no value that a schema could check.
#[derive(Debug, PartialEq, Eq)]
pub enum JsonError {
    /// It is not JSON; the parser's words.
    Malformed(String),
    /// An object has a member twice.
    DuplicateMember {
        /// The member, as a JSON pointer (RFC 6901).
        pointer: String,
    },
}

/// Parses JSON whose objects have each member once. Names are compared as what they stand for: `"\u0074"` is
/// the same as `"t"`.
///
/// # Errors
/// [`JsonError`].
pub fn parse_unique_json(payload: &[u8]) -> Result<Value, JsonError> {
    let mut duplicate = None;
    let mut json = serde_json::Deserializer::from_slice(payload);
    let parsed = UniqueJson { duplicate: &mut duplicate }.deserialize(&mut json);
    parsed.and_then(|value| json.end().map(|()| value)).map_err(|error| match duplicate {
        Some(mut path) => {
            path.reverse();
            JsonError::DuplicateMember { pointer: path.concat() }
        }
        None => JsonError::Malformed(error.to_string()),
    })
}

/// Reads a value. A duplicate member is an error, which fills `duplicate` with the parts of its pointer,
/// innermost first.
struct UniqueJson<'d> {
    duplicate: &'d mut Option<Vec<String>>,
}

impl UniqueJson<'_> {
    /// Reads a value inside this one.
    fn inner(&mut self) -> UniqueJson<'_> {
        UniqueJson { duplicate: self.duplicate }
    }

    /// Adds the part of the pointer that leads to where an error came from, if it is that of a duplicate.
    fn add_part(&mut self, part: impl FnOnce() -> String) {
        if let Some(path) = self.duplicate {
            path.push(part());
        }
    }
}

fn member_part(name: &str) -> String {
    format!("/{}", name.replace('~', "~0").replace('/', "~1"))
}

impl<'de> DeserializeSeed<'de> for UniqueJson<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueJson<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut elements: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        loop {
            match elements.next_element_seed(self.inner()) {
                Ok(Some(element)) => array.push(element),
                Ok(None) => return Ok(Value::Array(array)),
                Err(error) => {
                    self.add_part(|| format!("/{}", array.len()));
                    return Err(error);
                }
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                *self.duplicate = Some(vec![member_part(&name)]);
                return Err(A::Error::custom("a member comes twice"));
            }
            let value = members.next_value_seed(self.inner());
            let value = value.inspect_err(|_| self.add_part(|| member_part(&name)))?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_comes_twice_is_found_at_any_depth_however_it_is_spelt() {
        for (text, pointer) in [
            (r#"{"temp":999999,"temp":20}"#, "/temp"),
            (r#"{"temp":1,"\u0074emp":20}"#, "/temp"),
            (r#"{"\u0074emp":1,"a":[],"temp":{}}"#, "/temp"),
            (r#"{"a":[0,{"b":{"c~/":1,"d":2,"c~\/":3}}]}"#, "/a/1/b/c~0~1"),
            (r#"[[],[{"":1,"":1}]]"#, "/1/0/"),
            (r#"{"a":1,"a":x"#, "/a"),
        ] {
            let pointer = pointer.to_owned();
            assert_eq!(
                parse_unique_json(text.as_bytes()),
                Err(JsonError::DuplicateMember { pointer }),
                "{text}"
            );
        }
    }

    #[test]
    fn any_other_json_is_the_value_that_serde_json_makes_of_it() {
        let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let texts = [
            r#"{"a":{"a":[{"a":1},{"a":2}]},"A":null,"b":"\u00e9\n","c":true}"#,
            r#"[0,-1,1.5,1e300,18446744073709551615,-9223372036854775808,123456789012345678901,0.1]"#,
            r#""text""#,
            " 7 ",
            "1e999",
            "{} x",
            "{",
            "",
            "\u{feff}1",
            r#"{"a":}"#,
            r#""\ud800""#,
        ];
        for text in texts.map(str::to_owned).into_iter().chain([deep(100), deep(127), deep(128), deep(500)]) {
            let expected = serde_json::from_str::<Value>(&text);
            let expected = expected.map_err(|error| JsonError::Malformed(error.to_string()));
            assert_eq!(parse_unique_json(text.as_bytes()), expected, "{text}");
        }
        assert!(matches!(parse_unique_json(b"\"\xff\""), Err(JsonError::Malformed(_))));
    }
}
