//! `openapi.json`, as a document. That it says what the gateway does is checked with every answer that any test
//! receives (`tests/common/openapi.rs`), and that it has the routes that there are in `src/front/http`.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::common::openapi;

/// JSON in which no object has a key twice: of two, others take the last without a word.
struct Unambiguous;

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(Keys)
    }
}

struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = Unambiguous;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unambiguous, A::Error> {
        let mut keys = BTreeSet::new();
        while let Some((key, Unambiguous)) = map.next_entry::<String, _>()? {
            if let Some(twice) = keys.replace(key) {
                return Err(serde::de::Error::custom(format!("{twice:?} is there twice")));
            }
        }
        Ok(Unambiguous)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Unambiguous, A::Error> {
        while seq.next_element::<Unambiguous>()?.is_some() {}
        Ok(Unambiguous)
    }

    fn visit_unit<E>(self) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unambiguous, E> {
        Ok(Unambiguous)
    }
}

#[test]
fn nothing_is_described_twice() {
    let read = |text: &str| serde_json::from_str::<Unambiguous>(text).map(drop).map_err(|e| e.to_string());
    read(openapi::TEXT).expect("openapi.json");
    assert!(
        read(r#"{"a": [{"b": 1, "c": null, "b": 1.5}]}"#)
            .expect_err("twice")
            .contains("\"b\" is there twice")
    );
}
