//! The API as a client meets it that has read nothing but openapi.json: schemathesis sends what the description allows and
//! what it forbids, and holds each answer against it. `hooks.py` says which refusals are right although no schema can
//! foresee them.
//!
//! A run repeats with its seed: HEADGATE_TEST_SEED sets another one, to look for more.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::{Gateway, PATIENCE, Setup, Source, openapi, scratch};

/// What is never let in here, with the reason.
const NEVER_LET_IN: [(&str, &str); 6] = [
    ("beginBackup", "left out: it writes on the disk"),
    ("openMqtt", "left out: see the test below"),
    ("showOpenapi", "the run begins with it, and does not ask again"),
    ("disconnectClient", "no client is connected"),
    ("endSession", "the run has a key and no session"),
    ("readDashboardFile", "its paths are those that the page names"),
];

/// Something to read, to quarantine and to revoke.
fn fill(gateway: &Gateway) -> Source {
    let source = gateway.create_open("press-4");
    let schema = json!({ "schemas": [{ "filter": "strict/#", "schema": { "type": "number" } }] });
    let path = "/v1/datasources/press-4/schema";
    let answer = gateway.request("PUT", path, &gateway.admin_key(), &[], schema.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    for n in 0..5 {
        let message = json!({ "temp": f64::from(n) + 0.5, "on": true });
        assert_eq!(gateway.post("/v1/ingest/press-4/spindle/temp", &source.key, &message).status, 200);
    }
    assert_eq!(gateway.post("/v1/ingest/press-4/strict/temp", &source.key, &json!("warm")).status, 422);
    source
}

/// Runs schemathesis to its end. What it says, and the statuses that each operation was answered with.
fn examine(gateway: &Gateway, source: &Source, dir: &Path) -> (bool, String, BTreeMap<String, Vec<u16>>) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/http/contract");
    let seed = std::env::var("HEADGATE_TEST_SEED").unwrap_or_else(|_| "1".to_owned());
    let keys = gateway.get("/v1/datasources/*/keys", &gateway.admin_key()).json();
    let seen = dir.join("seen.json");
    let mut command = Command::new(format!("{}/../venv/bin/st", env!("CARGO_TARGET_TMPDIR")));
    command
        .arg("--config-file")
        .arg(here.join("schemathesis.toml"))
        .arg("run")
        .arg(format!("http://{}/openapi.json", gateway.http))
        .args(["--checks", "all", "--seed", &seed])
        .args(std::env::var("HEADGATE_TEST_SCHEMATHESIS").unwrap_or_default().split_whitespace())
        .current_dir(dir)
        .env("CONTRACT_HOOKS", here.join("hooks.py"))
        .env("CONTRACT_SEEN", &seen)
        .env("CONTRACT_OWN_KEY_ID", keys["keys"][0]["id"].as_str().expect("an id"))
        .env("CONTRACT_KEY_ID", &source.key_id)
        .env("HEADGATE_API_KEY", gateway.admin_key())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().expect("there is schemathesis (tests/run installs it)");
    let mut said = Vec::new();
    child.stdout.take().expect("piped").read_to_end(&mut said).expect("it says something");
    let is_good = child.wait().expect("it ends").success();
    let said = String::from_utf8_lossy(&said);
    // A request with ten thousand numbers is no help to anybody.
    let lines = said.lines().map(|line| line.chars().take(600).collect::<String>());
    let said = lines.collect::<Vec<_>>().join("\n");
    let seen = std::fs::read_to_string(&seen).unwrap_or_else(|error| panic!("{error}\n{said}"));
    (is_good, said, serde_json::from_str(&seen).expect("statuses by operation"))
}

#[test]
fn the_gateway_takes_what_is_described_and_refuses_what_is_not() {
    let dir = scratch();
    let setup = Setup::on(&dir.path().join("data"));
    let gateway = setup.set("trusted_proxies", "[\"127.0.0.1\"]").set("proxy_protocol", "off").start();
    let source = fill(&gateway);
    let (is_good, said, seen) = examine(&gateway, &source, dir.path());
    assert!(is_good, "{said}");
    // Whoever is kept out finds nothing wrong.
    let answer = gateway.get("/v1/datasources", &gateway.admin_key());
    assert_eq!(answer.status, 200, "the run has ended its own key: {said}");
    let was_let_in = |name: &str| {
        seen.get(name).is_some_and(|statuses| statuses.iter().any(|status| (101..300).contains(status)))
    };
    let described: Value = serde_json::from_str(openapi::TEXT).expect("openapi.json");
    let operations = described["paths"].as_object().expect("paths").values();
    let operations = operations.flat_map(|path| path.as_object().expect("operations").values());
    let names = operations.map(|operation| operation["operationId"].as_str().expect("a name"));
    let never: Vec<&str> = names
        .filter(|name| !was_let_in(name) && !NEVER_LET_IN.iter().any(|(left, _)| left == name))
        .collect();
    assert!(never.is_empty(), "no request of these was ever let in: {never:?} of {seen:?}");
}

/// The first line of the answer to a request for a WebSocket with these headers, and its body.
fn shake_hands(gateway: &Gateway, headers: &[(&str, &str)]) -> (u16, String) {
    let mut tcp = TcpStream::connect(gateway.http).expect("it listens");
    let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(tcp, "GET /mqtt HTTP/1.1\r\nhost: g\r\n{lines}\r\n").expect("it reads");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut answer = Vec::new();
    let mut some = [0; 4096];
    while !String::from_utf8_lossy(&answer).contains("\r\n\r\n") {
        match tcp.read(&mut some).expect("an answer") {
            0 => break,
            n => answer.extend_from_slice(&some[..n]),
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{answer}")), answer)
}

/// What schemathesis cannot send: each header that a handshake has to have is described, and its schema tells a good value.
#[test]
fn a_handshake_needs_the_headers_that_are_described_and_no_others() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let described: Value = serde_json::from_str(openapi::TEXT).expect("openapi.json");
    let operation = &described["paths"]["/mqtt"]["get"];
    let good =
        |parameter: &Value| match parameter["schema"].get("const").or(parameter["schema"]["enum"].get(0)) {
            Some(value) => value.as_str().expect("a text").to_owned(),
            None => "dGhlIHNhbXBsZSBub25jZQ==".to_owned(),
        };
    let parameters = operation["parameters"].as_array().expect("parameters");
    let headers: Vec<(&str, String)> =
        parameters.iter().map(|each| (each["name"].as_str().expect("a name"), good(each))).collect();
    for (parameter, (_, value)) in parameters.iter().zip(&headers) {
        assert_eq!(parameter["required"], true);
        assert!(openapi::faults(&parameter["schema"], &json!(value)).is_empty(), "{parameter}");
    }
    let send = |left_out: Option<usize>, changed: Option<&str>| {
        let mut sent: Vec<(&str, &str)> = Vec::new();
        for (n, (name, value)) in headers.iter().enumerate() {
            match (left_out == Some(n), changed) {
                (false, _) => sent.push((*name, value.as_str())),
                (true, Some(other)) => sent.push((*name, other)),
                (true, None) => {}
            }
        }
        shake_hands(&gateway, &sent)
    };
    let (status, answer) = send(None, None);
    assert_eq!(status, 101, "{answer}");
    for (n, (name, _)) in headers.iter().enumerate() {
        for changed in [None, Some("other")] {
            let (status, answer) = send(Some(n), changed);
            assert!(operation["responses"].get(status.to_string()).is_some(), "{answer}");
            assert!([400, 426].contains(&status), "{name}: {answer}");
        }
    }
}
