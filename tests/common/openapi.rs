//! Every answer of the API that a test receives, held against the gateway's description of itself: that the
//! status is one of those of the operation, the media type one of those of the status, and the body what its
//! schema says, with no field that the schema does not name; a refusal is of a type that the status has an example of. A
//! test needs nothing for that: [`http`](super::http) calls [`check`], and [`EventStream`](super::events::EventStream)
//! [`check_event`].

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use jsonschema::Validator;
use serde_json::{Map, Value, json};

use super::Answer;

/// `openapi.json`, as it is written.
pub const TEXT: &str = include_str!("../../src/front/http/openapi.json");

const SCHEMAS: &str = "#/components/schemas/";

static DESCRIPTION: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(TEXT).expect("openapi.json is JSON"));

/// Fails if the API does not say of itself that it may answer this.
pub fn check(method: &str, target: &str, answer: &Answer) {
    if let Err(difference) = compare(method, target, answer) {
        panic!(
            "{method} {target} was answered {}, and openapi.json {difference}:\n{:?}\n{}",
            answer.status,
            answer.headers,
            answer.text()
        );
    }
}

/// What differs, as the end of a sentence.
pub fn compare(method: &str, target: &str, answer: &Answer) -> Result<(), String> {
    let path = target.split('?').next().unwrap_or(target);
    // A slash at the end names no topic.
    let path = if path.starts_with("/v1/ingest/") { path.strip_suffix('/').unwrap_or(path) } else { path };
    // The answer to HEAD is that to GET without its body.
    let wanted = if method == "HEAD" { "get".to_owned() } else { method.to_lowercase() };
    let status = answer.status.to_string();
    let operation = operations(path).map(|(path, operations)| (path, operations.get(&wanted)));
    let is_operation = matches!(operation, Some((_, Some(_))));
    let (place, response) = match operation {
        // Browsers ask before they send; that is no operation of the API.
        Some((_, None)) if method == "OPTIONS" && answer.status == 204 && answer.body.is_empty() => {
            return Ok(());
        }
        // A key in the URL is refused wherever that leads, and a gateway that starts says so to everybody.
        Some((_, None)) if [401, 405, 503].contains(&answer.status) => problem("a method that there is not"),
        None if [401, 404, 503].contains(&answer.status) => problem("a path that there is not"),
        None => return Err("has no such path".to_owned()),
        Some((path, None)) => return Err(format!("has no {wanted} {path}")),
        Some((path, Some(operation))) => {
            let response = operation["responses"].get(&status);
            // The administration may have a listener of its own, and is not found at the others then.
            let elsewhere =
                || Some(problem("a path that is served elsewhere").1).filter(|_| answer.status == 404);
            let response = response.or_else(elsewhere);
            let response = response.ok_or_else(|| format!("has no {status} for {wanted} {path}"))?;
            (format!("{wanted} {path} {status}"), resolved(response))
        }
    };
    let empty = answer.body.is_empty();
    let Some(content) = response.get("content") else {
        return if empty { Ok(()) } else { Err(format!("has no body for {place}")) };
    };
    let media_type = answer.headers.get("content-type").map(String::as_str).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default();
    let described = content.get(media_type);
    let described = described.ok_or_else(|| format!("has no {media_type:?} for {place}"))?;
    if method == "HEAD" || !(media_type == "application/json" || media_type.ends_with("+json")) {
        return Ok(());
    }
    let body: Value = serde_json::from_slice(&answer.body).map_err(|error| format!("has JSON: {error}"))?;
    let validator = validator(format!("{place} {media_type}"), &described["schema"]);
    let errors = validator.iter_errors(&body);
    let errors: Vec<String> =
        errors.map(|error| format!("{error} (at {:?})", error.instance_path().to_string())).collect();
    if !errors.is_empty() {
        return Err(format!("differs for {place}: {}", errors.join("; ")));
    }
    let kind = body["type"].as_str().unwrap_or_default().trim_start_matches("/problems/");
    let is_unknown = is_operation && media_type == "application/problem+json";
    match is_unknown && described["examples"].get(kind).is_none() {
        true => Err(format!("has no example of {kind} for {place}")),
        false => Ok(()),
    }
}

/// Fails if an event, or a line, of a stream is not what the component `schema` says.
pub fn check_event(schema: &str, name: &str, data: &Value) {
    let variants = DESCRIPTION["components"]["schemas"][schema]["oneOf"].as_array().expect("variants");
    let is_of =
        |variant: &&Value| variant["properties"]["event"]["const"].as_str().unwrap_or("message") == name;
    let variant = variants.iter().find(is_of).unwrap_or_else(|| panic!("{schema} has no event {name}"));
    let validator = validator(format!("{schema} {name}"), &variant["properties"]["data"]["contentSchema"]);
    let errors: Vec<String> = validator.iter_errors(data).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{name} differs from {schema}: {}\n{data}", errors.join("; "));
}

/// Fails if a value is not what the component `schema` says.
pub fn check_value(schema: &str, value: &Value) {
    let validator = validator(schema.to_owned(), &json!({ "$ref": format!("{SCHEMAS}{schema}") }));
    let errors: Vec<String> = validator.iter_errors(value).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "it differs from {schema}: {}\n{value}", errors.join("; "));
}

/// What is wrong with a value by a schema of the description, as it is written there.
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let mut root = schema.clone();
    root["components"] = json!({ "schemas": DESCRIPTION["components"]["schemas"] });
    let options = jsonschema::options().should_validate_formats(true).offline();
    let validator = options.build(&root).expect("openapi.json has JSON Schemas");
    validator.iter_errors(value).map(|error| error.to_string()).collect()
}

/// What is answered where there is no operation.
fn problem(place: &str) -> (String, &'static Value) {
    (place.to_owned(), &DESCRIPTION["components"]["responses"]["NotFound"])
}

/// The described path that a path is one of, with its operations. Of two, the one with fewer parameters.
fn operations(path: &str) -> Option<(&'static str, &'static Map<String, Value>)> {
    let paths = DESCRIPTION["paths"].as_object().expect("paths").iter();
    let found = paths.filter(|(template, _)| is_one_of(path, template));
    let (template, operations) = found.min_by_key(|(template, _)| template.matches('{').count())?;
    Some((template, operations.as_object().expect("operations")))
}

/// A parameter is one segment of a path; a topic, which stands last, any number.
fn is_one_of(path: &str, template: &str) -> bool {
    let (mut segments, mut parts) = (path.split('/'), template.split('/'));
    loop {
        match (segments.next(), parts.next()) {
            (None, None) => return true,
            (Some(segment), Some("{topic}")) => return !(segment.is_empty() && segments.next().is_none()),
            (Some(segment), Some(part)) if part.starts_with('{') && !segment.is_empty() => {}
            (Some(segment), Some(part)) if segment == part => {}
            _ => return false,
        }
    }
}

fn resolved(response: &'static Value) -> &'static Value {
    let Some(reference) = response.get("$ref").and_then(Value::as_str) else { return response };
    DESCRIPTION.pointer(reference.trim_start_matches('#')).expect("a reference leads somewhere")
}

/// The validator of a schema, which is made once in a process.
fn validator(place: String, schema: &Value) -> Arc<Validator> {
    static MADE: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);
    // A panic of another test leaves what is in there as it was.
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let make = || {
        let schemas = DESCRIPTION["components"]["schemas"].as_object().expect("schemas");
        let all = |is_part| -> Map<String, Value> {
            schemas.iter().map(|(name, schema)| (name.clone(), closed(schema, is_part))).collect()
        };
        let mut root = closed(schema, false);
        root["components"] = json!({ "schemas": all(false) });
        root["parts"] = all(true).into();
        let options = jsonschema::options().should_validate_formats(true).offline();
        Arc::new(options.build(&root).expect("openapi.json has JSON Schemas"))
    };
    made.entry(place).or_insert_with(make).clone()
}

/// The schema without room for fields that it does not name. A part of an `allOf` or its like does not name those
/// of the others: there the whole is closed.
fn closed(schema: &Value, is_part: bool) -> Value {
    let Value::Object(schema) = schema else { return schema.clone() };
    let names = schema.contains_key("properties") || schema.contains_key("allOf");
    let each = |parts: &Value, is_part| match parts {
        Value::Array(parts) => parts.iter().map(|part| closed(part, is_part)).collect(),
        other => other.clone(),
    };
    let mut out: Map<String, Value> = schema
        .iter()
        .map(|(keyword, value)| {
            let value = match (keyword.as_str(), value) {
                ("properties", Value::Object(fields)) => {
                    fields.iter().map(|(name, field)| (name.clone(), closed(field, false))).collect()
                }
                ("items" | "additionalProperties", value) => closed(value, false),
                ("allOf", parts) => each(parts, true),
                ("oneOf" | "anyOf", parts) => each(parts, is_part || names),
                ("$ref", Value::String(to)) if is_part => to.replace(SCHEMAS, "#/parts/").into(),
                (_, value) => value.clone(),
            };
            (keyword.clone(), value)
        })
        .collect();
    if names && !is_part && !schema.contains_key("additionalProperties") {
        out.insert("unevaluatedProperties".to_owned(), false.into());
    }
    out.into()
}
