//! The commands that look into something: what is known of a client, the machine, what stored records have in common; and
//! what a shell and `man` know of the commands.

use std::net::TcpListener;

use serde_json::{Value, json};

use crate::cli::{fails_with, headgate, prints, to};
use crate::common::{Gateway, scratch};

#[test]
fn a_client_is_explained_by_its_keys_and_refusals() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let addr = gateway.mqtt.to_string();
    let published = std::process::Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-i", "press-sensor", "-q", "1"])
        .args(["-u", &source.key, "-t", "t", "-m", "1"])
        .status();
    assert!(published.expect("mosquitto_pub is installed (tests/run does it)").success(), "{addr}");
    let refused = std::process::Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-i", "press-sensor", "-q", "1"])
        .args(["-u", "hgk_none", "-t", "t", "-m", "1"])
        .output();
    assert!(!refused.expect("it runs").status.success());
    let said = prints(&mut to(&gateway, &["explain", "press-sensor"]));
    for words in
        [source.key_id.as_str(), "of press-4", "over mqtt from 127.0.0.1", "malformed_key", "what to do:"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    let by_address = prints(&mut to(&gateway, &["explain", "127.0.0.1", "--json"]));
    let by_address: Value = serde_json::from_str(&by_address).expect("JSON");
    let keys = by_address["keys"].as_array().expect("a list");
    assert!(keys.iter().any(|key| key["client_id"] == "press-sensor"), "{by_address}");
    let only = ["explain", "press-sensor", "--datasource", "press-4", "--json"];
    let only: Value = serde_json::from_str(&prints(&mut to(&gateway, &only))).expect("JSON");
    assert_eq!(only["keys"][0]["datasource"], "press-4");
    let said = fails_with(&mut to(&gateway, &["explain", "nobody"]), &[4]);
    assert!(said.contains("nothing is known of nobody"), "{said}");
}

#[test]
fn a_refusal_is_listed_with_its_words_and_every_cause_has_advice() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let answer = gateway.request("POST", "/v1/ingest/press-4/a+b", &source.key, &[], b"1");
    assert_eq!(answer.status, 400);
    let said = prints(&mut to(&gateway, &["refusals"]));
    assert!(said.contains("topic: ") && said.contains("wildcards") && said.contains(" ago"), "{said}");
    let causes = prints(&mut headgate(&["refusals", "--causes", "--json"]));
    let causes: Vec<Value> = serde_json::from_str(&causes).expect("JSON");
    assert!(causes.len() > 50, "{}", causes.len());
    let table = prints(&mut headgate(&["refusals", "--causes"]));
    for cause in &causes {
        let (name, advice) = (cause["cause"].as_str().expect("a name"), cause["advice"].as_str());
        assert!(advice.is_some_and(|advice| advice.len() > 20), "{name}");
        assert!(table.contains(&format!("│ {name} ")), "{name}:\n{table}");
    }
}

#[test]
fn a_doctor_looks_at_the_machine_with_and_without_a_gateway() {
    let dir = scratch();
    let doctor = |gateway: &Gateway| {
        let mut command = to(gateway, &["doctor", "--json"]);
        command
            .env("HEADGATE_MQTT__LISTEN", gateway.mqtt.to_string())
            .env("HEADGATE_HTTP__LISTEN", gateway.http.to_string());
        serde_json::from_str::<Value>(&prints(&mut command)).expect("JSON")
    };
    let found = |report: &Value, what: &str| {
        let findings = report["findings"].as_array().expect("a list").iter();
        findings.filter(|finding| finding["what"] == what).cloned().collect::<Vec<_>>()
    };
    let gateway = Gateway::start(dir.path());
    let report = doctor(&gateway);
    // Where a relative path leads to a directory, it is no directory to be made.
    let above = dir.path().parent().expect("a directory above");
    let mut relative = headgate(&["doctor", "--data-dir"]);
    relative.arg(dir.path().strip_prefix(above).expect("it is there")).current_dir(above);
    let said =
        relative.env("HEADGATE_URL", format!("http://{}", gateway.http)).output().expect("headgate runs");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(!said.contains("is not there yet"), "{said}");
    for what in
        ["configuration", "data directory", "disk", "sync", "open files", "storage in SQLite", "gateway"]
    {
        assert_eq!(found(&report, what).len(), 1, "{what}: {report:#}");
    }
    for what in ["port of MQTT", "port of HTTP"] {
        let port = &found(&report, what)[0];
        assert!(
            port["found"].as_str().is_some_and(|words| words.contains("the gateway that runs")),
            "{port}"
        );
    }
    assert!(found(&report, "sync")[0]["found"].as_str().is_some_and(|words| words.contains("median of 50")));

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("bound").to_string();
    let other = scratch();
    let mut command = headgate(&["doctor", "--data-dir"]);
    command.arg(other.path().join("data")).env("HEADGATE_URL", "http://127.0.0.1:1");
    command.env("HEADGATE_HTTP__LISTEN", "127.0.0.1:0").env("HEADGATE_MQTT__LISTEN", &addr);
    command.env("HEADGATE_NATS__SERVERS", "nats://127.0.0.1:1");
    let output = command.output().expect("headgate runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let bad: Vec<&str> = said.lines().filter(|line| line.starts_with("bad ")).collect();
    assert!(
        bad.len() == 1 && bad[0].contains("port of MQTT") && bad[0].contains("another program"),
        "{said}"
    );
    for words in ["warn  NATS: ", "not there yet", "ok    port of HTTP", "ok    gateway: none runs here"] {
        assert!(said.contains(words), "{words}:\n{said}");
    }
    let config = other.path().join("bad.toml");
    std::fs::write(&config, "[mqtt]\nlissen = 1\n").expect("written");
    let output = headgate(&["doctor", "--config"]).arg(&config).output().expect("headgate runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("bad   configuration: "), "{said}");
}

#[test]
fn shells_and_the_manual_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = prints(&mut headgate(&["completions", shell]));
        assert!(script.contains("datasource") && script.contains("expires-at"), "{shell}");
    }
    let checked = std::process::Command::new("bash")
        .args(["-n", "-c", &prints(&mut headgate(&["completions", "bash"]))])
        .status();
    assert!(checked.expect("bash").success());
    let dir = scratch();
    let pages = dir.path().join("man");
    prints(headgate(&["man"]).arg(&pages));
    let page = |name: &str| std::fs::read_to_string(pages.join(name)).expect(name);
    assert!(page("headgate.1").contains("Exit codes"));
    assert!(page("headgate-key-list.1").contains("datasource"));
}

/// A topic whose newest values were whole was called one of integers, and `21.5` would have been quarantined.
#[test]
fn a_schema_is_inferred_from_all_of_the_time_and_says_from_how_much() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let headers = [("content-type", "application/json")];
    let send = |values: Vec<Value>| {
        let body = Value::from(values).to_string();
        let answer = gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &headers, body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    send((0..20).map(|n| json!({ "value": 20 + n })).collect());
    gateway.stored("press-4", 20);
    let infer = || {
        let output = to(&gateway, &["schema", "infer", "press-4"]).output().expect("headgate runs");
        assert!(output.status.success(), "{output:?}");
        let schema: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (schema["properties"]["value"]["type"].clone(), String::from_utf8(output.stderr).expect("text"))
    };
    let (of_all, said) = infer();
    assert_eq!(of_all, "integer", "all that are stored are whole");
    assert!(said.contains("20 records examined, all that are stored") && said.contains("t: 20"), "{said}");
    send(vec![json!({ "value": 21.5 })]);
    for _ in 0..4 {
        send((0..1_500).map(|n| json!({ "value": n })).collect());
    }
    gateway.settle();
    let (of_some, said) = infer();
    assert_eq!(of_some, "number");
    assert!(said.contains("not all that are stored"), "{said}");
}
