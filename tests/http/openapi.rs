//! `openapi.json`, as a document. That it says what the gateway does is checked with every answer that any test
//! receives (`tests/common/openapi.rs`), and that it has the routes that there are in `src/front/http`.

use std::collections::{BTreeMap, BTreeSet};
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

fn described() -> Value {
    serde_json::from_str(openapi::TEXT).expect("openapi.json is JSON")
}

/// The operations, by method and path.
fn operations(described: &Value) -> BTreeMap<String, &Value> {
    let paths = described["paths"].as_object().expect("paths").iter();
    paths
        .flat_map(|(path, operations)| {
            let operations = operations.as_object().expect("operations").iter();
            operations.map(move |(method, operation)| (format!("{method} {path}"), operation))
        })
        .collect()
}

/// Calls `visit` with every object of a JSON value and where it is.
fn visit_objects<'v>(value: &'v Value, at: &str, visit: &mut impl FnMut(&str, &'v Value)) {
    match value {
        Value::Object(members) => {
            visit(at, value);
            for (name, member) in members {
                visit_objects(member, &format!("{at}/{}", name.replace('/', "~1")), visit);
            }
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, item)| visit_objects(item, &format!("{at}/{n}"), visit));
        }
        _ => {}
    }
}

/// An example that its own schema refuses is what a reader copies first.
#[test]
fn every_example_is_what_its_schema_says() {
    let described = described();
    let mut looked_at = 0;
    visit_objects(&described, "", &mut |at, object| {
        // A media type, a parameter or a header has its schema beside its examples; a schema is one itself.
        let (schema, examples) = match (object.get("schema"), object.get("examples"), object.get("example")) {
            (Some(schema), Some(Value::Object(named)), _) => {
                (schema, named.values().map(|example| &example["value"]).collect::<Vec<_>>())
            }
            (Some(schema), _, Some(example)) => (schema, vec![example]),
            (None, Some(Value::Array(examples)), _) => (object, examples.iter().collect()),
            _ => return,
        };
        for example in examples {
            let faults = openapi::faults(schema, example);
            assert!(faults.is_empty(), "{at}: {example}: {}", faults.join("; "));
            looked_at += 1;
        }
    });
    assert!(looked_at > 50, "{looked_at}");
}

#[test]
fn every_operation_has_a_name_of_its_own_a_tag_and_words() {
    let described = described();
    let tags: BTreeSet<&str> =
        described["tags"].as_array().expect("tags").iter().filter_map(|tag| tag["name"].as_str()).collect();
    let (mut names, mut used) = (BTreeSet::new(), BTreeSet::new());
    for (place, operation) in operations(&described) {
        let name = operation["operationId"].as_str().unwrap_or_else(|| panic!("{place} has no name"));
        assert!(name.starts_with(|c: char| c.is_ascii_lowercase()), "{name}");
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{name}");
        assert!(names.insert(name), "{name} is there twice");
        let of = operation["tags"].as_array().unwrap_or_else(|| panic!("{place} has no tag"));
        let [Value::String(tag)] = of.as_slice() else { panic!("{place} has the tags {of:?}") };
        assert!(tags.contains(tag.as_str()), "{tag}");
        used.insert(tag.as_str());
        for words in ["summary", "description"] {
            assert!(operation[words].as_str().is_some_and(|text| !text.is_empty()), "{place} has no {words}");
        }
        assert!(operation["security"].is_array(), "{place} does not say who may");
    }
    assert_eq!(used, tags, "a tag is there for something");
}

/// Each refusal is there with its status, so that a program can be written against it.
#[test]
fn every_refusal_of_an_operation_is_shown_with_its_own_status() {
    let described = described();
    for (place, operation) in operations(&described) {
        for (status, response) in operation["responses"].as_object().expect("responses") {
            let reference = response["$ref"].as_str().map(|to| to.trim_start_matches('#'));
            let response =
                reference.map_or(response, |to| described.pointer(to).expect("it leads somewhere"));
            let Some(content) = response["content"].get("application/problem+json") else { continue };
            let examples = content["examples"].as_object();
            let examples = examples.unwrap_or_else(|| panic!("{place} {status} shows no problem"));
            for example in examples.values() {
                assert_eq!(example["value"]["status"].to_string(), *status, "{place}");
            }
            let has = |header: &str| response["headers"].get(header).is_some();
            match status.as_str() {
                "401" => assert!(has("WWW-Authenticate"), "{place}"),
                "429" | "503" => assert!(has("Retry-After"), "{place} {status}"),
                _ => {}
            }
        }
    }
}
