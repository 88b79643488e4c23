//! `openapi.json`, as a document. That it says what the gateway does is checked with every answer that any test
//! receives (`tests/common/openapi.rs`), and that it has the routes that there are in `src/front/http`.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use serde_json::{Value, json};

use crate::common::{Answer, openapi};

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

#[test]
fn an_answer_that_is_not_described_is_noticed() {
    let differs = |method: &str, path: &str, status: u16, media_type: &str, body: Value| {
        let headers = [("content-type".to_owned(), media_type.to_owned())].into();
        let answer = Answer { status, headers, body: body.to_string().into_bytes() };
        openapi::compare(method, path, &answer).is_err()
    };
    let json = "application/json";
    let accepted = json!({ "accepted": 1, "first_offset": 0, "last_offset": 0 });
    let path = "/v1/ingest/press-4/spindle/temp?x";
    assert!(!differs("POST", path, 200, json, accepted.clone()));
    assert!(differs("GET", path, 200, json, accepted.clone()), "a method that there is not");
    assert!(differs("POST", "/v2/ingest/press-4", 200, json, accepted.clone()), "a path that there is not");
    assert!(differs("POST", path, 201, json, accepted.clone()), "another status");
    assert!(differs("POST", path, 200, "text/plain", accepted.clone()), "another media type");
    let mut body = accepted.clone();
    body["more"] = 1.into();
    assert!(differs("POST", path, 200, json, body), "a field that is not described");
    let mut body = accepted;
    body["accepted"] = "1".into();
    assert!(differs("POST", path, 200, json, body), "a field of another type");

    let key = json!({ "id": "0123456789ab", "label": "", "scopes": ["ingest"], "state": "active",
        "created_at": "2026-11-23T09:28:39.000120Z", "expires_at": null, "limits": {}, "accepted": 0,
        "refused": 0, "connections": 0, "last_used": null, "users": [] });
    let keys = |key: &Value| json!({ "keys": [key] });
    let path = "/v1/datasources/press-4/keys";
    assert!(!differs("GET", path, 200, json, keys(&key)));
    for (field, value) in
        [("secret", json!("hgk_")), ("created_at", json!("yesterday")), ("last_used", json!({}))]
    {
        let mut key = key.clone();
        key[field] = value;
        assert!(differs("GET", path, 200, json, keys(&key)), "{field}");
    }
}
