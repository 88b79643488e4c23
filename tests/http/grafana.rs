//! The example for Grafana (`config/grafana`): every query of its dashboard, as the Infinity datasource would send it. They
//! guard against a dashboard that stays empty since a path, a parameter or a member of an answer has another name.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Gateway, scratch};

fn config(path: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/grafana").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything in a document that asks a URL.
fn queries(value: &Value) -> Vec<&Value> {
    let mut found: Vec<&Value> = match value {
        Value::Object(members) => members.values().flat_map(queries).collect(),
        Value::Array(items) => items.iter().flat_map(queries).collect(),
        _ => Vec::new(),
    };
    if value["url"].is_string() && value["url_options"].is_object() {
        found.push(value);
    }
    found
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer} in {value}"))
}

/// What Grafana makes of a text with variables.
fn filled(text: &str, from: &str, to: &str) -> String {
    let variables = [
        ("${datasource}", "press-4"),
        ("${topic}", "spindle/temp"),
        ("${key}", "value"),
        ("${__from:date:iso}", from),
        ("${__to:date:iso}", to),
    ];
    let filled = variables.into_iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value));
    assert!(!filled.contains('$'), "a variable that nobody fills: {filled}");
    filled
}

#[test]
fn every_query_of_the_dashboard_finds_what_it_shows() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    for n in 0..20 {
        let body = format!("{{\"value\":{n}.5}}");
        let headers = [("content-type", "application/json")];
        let answer = gateway.request(
            "POST",
            "/v1/ingest/press-4/spindle/temp",
            &source.key,
            &headers,
            body.as_bytes(),
        );
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let records = gateway.stored("press-4", 20);
    gateway.settle();
    let from = text(&records[0], "/received_at").to_owned();

    let datasource = config("provisioning/datasources/headgate.yaml");
    let value_of = |name: &str| {
        let line = datasource.lines().find_map(|line| line.trim_start_matches([' ', '-']).strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {datasource}")).trim().to_owned()
    };
    let (kind, uid, header) = (value_of("type:"), value_of("uid:"), value_of("apiKeyKey:"));
    assert_eq!(value_of("apiKeyType:"), "header");

    let dashboard: Value = serde_json::from_str(&config("dashboards/headgate.json")).expect("JSON");
    let queries = queries(&dashboard);
    assert!(queries.len() >= 6, "{}", queries.len());
    for query in queries {
        assert_eq!((text(query, "/datasource/type"), text(query, "/datasource/uid")), (&*kind, &*uid));
        assert_eq!(text(query, "/url_options/method"), "GET");
        let parameters = query.pointer("/url_options/params").and_then(Value::as_array).expect("parameters");
        let parameters: Vec<String> = parameters
            .iter()
            .map(|one| {
                let value = filled(text(one, "/value"), &from, "2100-01-01T00:00:00.000Z");
                format!("{}={}", text(one, "/key"), value.replace(':', "%3A").replace('/', "%2F"))
            })
            .collect();
        let url = format!("{}?{}", filled(text(query, "/url"), "", ""), parameters.join("&"));
        let answer = gateway.request("GET", &url, "", &[(&header, &source.key)], b"");
        assert_eq!(answer.status, 200, "{url}: {}", answer.text());
        let answer = answer.json();
        let rows = answer[text(query, "/root_selector")].as_array().expect("the rows that it selects");
        let row = rows.iter().find(|row| !row["value"].is_null() || row.get("value").is_none());
        let row = row.unwrap_or_else(|| panic!("{url} shows nothing: {answer}"));
        for column in query["columns"].as_array().expect("columns") {
            assert!(!row[text(column, "/selector")].is_null(), "{url}: {column} in {row}");
        }
    }
}
