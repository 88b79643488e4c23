//! `/metrics` and what is made of it: Prometheus' own tool reads them, the alerts and the dashboard of `config/` name none
//! that there is not, and what each datasource sends is counted once and told to nobody who may not know it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::tls::Identity;
use crate::common::wire::{self, Connect, Version, Wire};
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

fn config(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(path)
}

/// Prometheus' tool, where `tests/run` puts it or wherever it is installed.
fn promtool(arguments: &[&str], input: &str) -> Output {
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../promtool");
    let program = if own.exists() { own } else { PathBuf::from("promtool") };
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(config("prometheus"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool (tests/run has it)");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A key for all datasources with these scopes.
fn key_for_all(gateway: &Gateway, scope: &str) -> String {
    let answer = gateway.post(
        "/v1/datasources/*/keys",
        &gateway.admin_key(),
        &json!({ "scopes": [scope], "label": scope }),
    );
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["key"]["secret"].as_str().expect("the secret").to_owned()
}

fn publish(gateway: &Gateway, datasource: &str, key: &str, body: &str, status: u16) {
    let headers = [("content-type", "application/json")];
    let path = format!("/v1/ingest/{datasource}");
    let answer = gateway.request("POST", &path, key, &headers, body.as_bytes());
    assert_eq!(answer.status, status, "{}", answer.text());
}

/// A gateway with certificates that has let in, refused, quarantined and delivered, and what it says of that.
fn busy_gateway(dir: &Path) -> Gateway {
    let identity = Identity::issuer(dir, "issuer").issue(dir, "gateway");
    let setup = ["http", "mqtt"].iter().fold(Setup::on(&dir.join("data")), |setup, front| {
        setup
            .set(&format!("{front}.tls.certificate"), identity.certificate.display())
            .set(&format!("{front}.tls.key"), identity.key.display())
    });
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    let mut subscriber = Wire::login(gateway.mqtt, Version::V5, &source.key);
    subscriber.send(&wire::subscribe(Version::V5, 1, &["#"]));
    subscriber.packet(wire::SUBACK);
    let schema =
        json!({ "schemas": [{ "filter": "strict", "schema": { "type": "object", "required": ["x"] } }] });
    let path = "/v1/datasources/press-4/schema";
    let set = gateway.request("PUT", path, &gateway.admin_key(), &[], schema.to_string().as_bytes());
    assert!(set.status < 300, "{}", set.text());
    publish(&gateway, "press-4", &source.key, "[1,2,3]", 200);
    let headers = [("content-type", "application/json")];
    let failed = gateway.request("POST", "/v1/ingest/press-4/strict", &source.key, &headers, b"{}");
    assert_eq!(failed.status, 422, "{}", failed.text());
    publish(&gateway, "press-4", "no key", "1", 401);
    (0..3).for_each(|_| drop(subscriber.packet(wire::PUBLISH)));
    // A revocation, whose time is measured.
    let (made, admin) = (json!({ "scopes": ["ingest"] }), gateway.admin_key());
    let key = gateway.post("/v1/datasources/press-4/keys", &admin, &made).json();
    let id = key["key"]["id"].as_str().expect("its id").to_owned();
    let revoked = gateway.request("DELETE", &format!("/v1/datasources/press-4/keys/{id}"), &admin, &[], b"");
    assert_eq!(revoked.status, 204, "{}", revoked.text());
    gateway.settle();
    for name in ["headgate_mqtt_subscribers", "headgate_disk_free_bytes"] {
        wait_for(name, || (gateway.metric(name) > 0.0).then_some(()));
    }
    gateway
}

/// The names of metrics in an expression: what stands where no function, keyword or label can.
fn names_in(expression: &str) -> BTreeSet<String> {
    let mut depth_of_labels = 0;
    let (mut word, mut names) = (String::new(), BTreeSet::new());
    for c in expression.chars().chain([' ']) {
        match c {
            '{' => depth_of_labels += 1,
            '}' => depth_of_labels -= 1,
            _ => {}
        }
        if c.is_ascii_alphanumeric() || c == '_' || c == ':' {
            word.push(c);
            continue;
        }
        let is_metric = word.starts_with("headgate_") || word.starts_with("process_") || word == "up";
        if is_metric && (depth_of_labels == 0 || c == '{') {
            names.insert(std::mem::take(&mut word));
        }
        word.clear();
    }
    names
}

/// The names of the samples in `/metrics`.
fn sample_names(metrics: &str) -> BTreeSet<String> {
    let samples = metrics.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    samples.map(|line| line.split(['{', ' ']).next().expect("a name").to_owned()).collect()
}

fn expressions(value: &Value) -> Vec<&str> {
    match value {
        Value::Object(members) => {
            let own = ["expr", "definition"].iter().filter_map(|name| members.get(*name)?.as_str());
            own.chain(members.values().flat_map(expressions)).collect()
        }
        Value::Array(items) => items.iter().flat_map(expressions).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn prometheus_reads_the_metrics_and_finds_nothing_to_say_and_dashboard_and_alerts_name_what_is_there() {
    let dir = scratch();
    let gateway = busy_gateway(dir.path());
    let metrics = gateway.metrics();
    let checked = promtool(&["check", "metrics"], &metrics);
    assert!(checked.status.success() && said(&checked).trim().is_empty(), "{}", said(&checked));

    let there = sample_names(&metrics);
    let dashboard = std::fs::read_to_string(config("grafana/prometheus/dashboard.json")).expect("readable");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    let shown = expressions(&dashboard);
    assert!(shown.len() > 40, "{}", shown.len());
    let rules = std::fs::read_to_string(config("prometheus/headgate.rules.yml")).expect("readable");
    // Only with NATS, and of the server that scrapes.
    let elsewhere = ["headgate_egress_lag_records", "up"];
    let described = include_str!("../../src/observe/metrics.rs");
    assert!(described.contains("\"headgate_egress_lag_records\""));
    let rules =
        rules.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
    let of_rules = names_in(&rules.replace("headgate.rules", "").replace("'headgate ", " "));
    assert!(of_rules.len() > 20, "{of_rules:?}");
    for name in shown.iter().flat_map(|expression| names_in(expression)).chain(of_rules) {
        assert!(there.contains(&name) || elsewhere.contains(&&*name), "there is no {name} in\n{metrics}");
    }
    // Each expression is one that Prometheus understands.
    let recorded: Vec<Value> = shown
        .iter()
        .filter(|expression| !expression.starts_with("label_values"))
        .enumerate()
        .map(|(n, expression)| {
            let expression = expression.replace("$__rate_interval", "5m");
            json!({ "record": format!("panel:{n}"), "expr": expression })
        })
        .collect();
    let file = dir.path().join("panels.yml");
    // JSON is YAML.
    std::fs::write(&file, json!({ "groups": [{ "name": "panels", "rules": recorded }] }).to_string())
        .expect("written");
    let checked = promtool(&["check", "rules", file.to_str().expect("UTF-8")], "");
    assert!(checked.status.success(), "{}", said(&checked));
}

#[test]
fn each_alert_fires_when_it_has_to_and_not_otherwise() {
    for arguments in [["check", "rules", "headgate.rules.yml"], ["test", "rules", "headgate.rules.test.yml"]]
    {
        let output = promtool(&arguments, "");
        assert!(output.status.success(), "{}", said(&output));
    }
    // The file of the key is not here.
    let checked = promtool(&["check", "config", "--syntax-only", "prometheus.yml"], "");
    assert!(checked.status.success(), "{}", said(&checked));
    let read = |file: &str| std::fs::read_to_string(config("prometheus").join(file)).expect("readable");
    let (rules, tests) = (read("headgate.rules.yml"), read("headgate.rules.test.yml"));
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let fires = tests.split("alertname: ").skip(1).any(|case| {
            case.lines().next() == Some(alert)
                && case.lines().nth(1).is_some_and(|line| line.ends_with("exp_alerts:"))
        });
        assert!(fires, "no test has {alert} fire");
    }
}

#[test]
fn what_a_datasource_sends_is_told_to_those_who_may_see_all_and_begins_anew_with_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create_open("press-4"), gateway.create("press-5"));
    publish(&gateway, "press-4", &a.key, "[1,2,3]", 200);
    publish(&gateway, "press-5", &b.key, "1", 200);
    publish(&gateway, "press-5", &a.key, "1", 401);
    let all = key_for_all(&gateway, "ingest");
    let mut device = Wire::login(gateway.mqtt, Version::V5, &all);
    assert_eq!(device.publish(Version::V5, 1, "press-4/x", b"12345"), 0);
    assert_eq!(device.publish(Version::V5, 2, "press-5/x", b"12345"), 0);
    let of =
        |what: &str, id: &str| gateway.metric(&format!("headgate_datasource_{what}{{datasource=\"{id}\"}}"));
    assert_eq!(of("messages_total", "press-4"), 4.0);
    assert_eq!(of("bytes_total", "press-4"), 8.0);
    assert_eq!(of("messages_total", "press-5"), 2.0);
    assert!(of("refused_total", "press-5") >= 1.0, "{}", gateway.metrics());
    assert_eq!(of("messages_total", "_other"), 0.0);
    let newest = gateway.stored("press-4", 4);
    let at = of("last_message_timestamp_seconds", "press-4");
    let said = newest[3]["received_at"].as_str().expect("a time").to_owned();
    let expected: f64 = said[17..26].parse().expect("seconds");
    assert!((at % 60.0 - expected).abs() < 0.001, "{at} is not {said}");

    // To nobody else.
    let open = gateway.get("/metrics", "");
    assert_eq!(open.status, 200);
    for hidden in ["press-4", "press-5", "headgate_datasource_"] {
        assert!(!open.text().contains(hidden), "{hidden}");
    }
    let reader = key_for_all(&gateway, "subscribe");
    assert!(gateway.get("/metrics", &reader).text().contains("datasource=\"press-4\""));
    for (key, status) in [(&*a.key, 403), (&b.key, 403), (&all, 403), ("hgk_unknown", 401)] {
        let answer = gateway.get("/metrics", key);
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(!answer.text().contains("headgate_"), "{}", answer.text());
    }

    // Deleted and created again, it begins with nothing, and the others are not charged with what it was.
    gateway.delete("press-4");
    assert!(!gateway.metrics().contains("press-4"));
    assert_eq!(of("messages_total", "_other"), 0.0);
    let again = gateway.create("press-4");
    assert!(!gateway.metrics().contains("datasource=\"press-4\""), "it has sent nothing");
    publish(&gateway, "press-4", &again.key, "1", 200);
    assert_eq!(of("messages_total", "press-4"), 1.0);
    assert_eq!(of("messages_total", "_other"), 0.0);
}

#[test]
fn nothing_that_a_stranger_sends_adds_a_series() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("auth.failures_exempt", "127.0.0.0/8").start();
    let source = gateway.create("press-4");
    publish(&gateway, "press-4", &source.key, "1", 200);
    for name in
        ["headgate_mqtt_sessions ", "headgate_disk_free_bytes ", "headgate_store_bytes{store=\"records\"}"]
    {
        wait_for(name, || gateway.metrics().contains(name).then_some(()));
    }
    let try_all = |round: usize| {
        for n in 0..20 {
            let other = format!("/v1/ingest/machine-{round}-{n}");
            for (method, path) in [
                ("POST", &*other),
                ("GET", &*format!("/{round}/{n}")),
                ("DELETE", "/metrics"),
                ("GET", &*format!("/problems/page-{round}-{n}")),
                ("POST", "/v1/ingest/press-4%22%7D%201"),
            ] {
                let answer = gateway.request(method, path, "not a key", &[], b"");
                assert!(answer.status >= 400, "{method} {path}: {}", answer.status);
            }
        }
        let metrics = gateway.metrics();
        let series = metrics.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()));
        series.collect::<BTreeSet<_>>()
    };
    let first = try_all(0);
    let second = try_all(1);
    assert_eq!(second.difference(&first).collect::<Vec<_>>(), Vec::<&String>::new());
    for series in &second {
        assert!(["machine-", "page-", "%22"].iter().all(|sent| !series.contains(sent)), "{series}");
    }
}

#[test]
fn how_many_datasources_have_series_can_be_changed_while_it_runs() {
    let dir = scratch();
    let file = dir.path().join("headgate.toml");
    let write =
        |max: &str| std::fs::write(&file, format!("[metrics]\ndatasources_max = {max}\n")).expect("written");
    write("1");
    let gateway = Setup::on(&dir.path().join("data")).set("config", file.display()).start();
    for (id, body) in [("press-4", "[1,2,3]"), ("press-5", "1")] {
        let source = gateway.create(id);
        publish(&gateway, id, &source.key, body, 200);
    }
    let of = |id: &str| {
        let name = format!("headgate_datasource_messages_total{{datasource=\"{id}\"}} ");
        let metrics = gateway.metrics();
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse::<f64>().ok())
    };
    assert_eq!((of("press-4"), of("press-5"), of("_other")), (Some(3.0), None, Some(1.0)));
    let reload = |max: &str| {
        write(max);
        signal(gateway.pid(), libc::SIGHUP);
    };
    reload("0");
    wait_for("no series of datasources", || of("_other").is_none().then_some(()));
    assert!(!gateway.metrics().contains("headgate_datasource_"));
    reload("5");
    wait_for("series again", || of("press-5"));
    assert_eq!((of("press-4"), of("press-5"), of("_other")), (Some(3.0), Some(0.0), Some(1.0)));
    drop(gateway);
    let refused = Setup::on(&dir.path().join("data")).set("metrics.datasources_max", 1001).refused();
    assert!(refused.output.contains("metrics.datasources_max"), "{}", refused.output);
}

#[test]
fn a_certificate_s_end_and_a_pair_that_cannot_be_used_are_in_the_metrics() {
    let dir = scratch();
    let gateway = busy_gateway(dir.path());
    let shown = Command::new("openssl")
        .args(["x509", "-enddate", "-noout", "-dateopt", "iso_8601", "-in"])
        .arg(dir.path().join("gateway.pem"))
        .output()
        .expect("openssl");
    let shown = String::from_utf8_lossy(&shown.stdout).trim().replace("notAfter=", "").replace(' ', "T");
    let ends_at = shown.parse::<jiff::Timestamp>().expect("a time").as_second() as f64;
    for listener in ["http", "mqtt"] {
        let of =
            |what: &str| gateway.metric(&format!("headgate_certificate_{what}{{listener=\"{listener}\"}}"));
        assert_eq!(of("expiry_timestamp_seconds"), ends_at);
        assert_eq!(of("current"), 1.0);
        let loaded_at = of("loaded_timestamp_seconds");
        assert!(loaded_at > 1.7e9 && loaded_at < ends_at, "{loaded_at}");
    }
    std::fs::write(dir.path().join("gateway.pem"), "half of a certi").expect("written");
    let current = "headgate_certificate_current{listener=\"mqtt\"}";
    wait_for("the files to be read", || (gateway.metric(current) == 0.0).then_some(()));
    assert_eq!(gateway.metric("headgate_certificate_expiry_timestamp_seconds{listener=\"mqtt\"}"), ends_at);
}

#[test]
fn subscribers_and_what_they_are_sent_are_counted() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let connect = Connect {
        clean: false,
        client_id: "away".to_owned(),
        // The session expiry interval.
        properties: wire::four_bytes(0x11, 600),
        ..Connect::with_key(Version::V5, &source.key)
    };
    let (mut away, _) = Wire::connect(gateway.mqtt, &connect);
    away.send(&wire::subscribe(Version::V5, 1, &["#"]));
    away.packet(wire::SUBACK);
    drop(away);
    let mut subscriber = Wire::login(gateway.mqtt, Version::V5, &source.key);
    subscriber.send(&wire::subscribe(Version::V5, 1, &["#"]));
    subscriber.packet(wire::SUBACK);
    publish(&gateway, "press-4", &source.key, "[1,2,3,4]", 200);
    (0..4).for_each(|_| drop(subscriber.packet(wire::PUBLISH)));
    for (name, value) in [
        ("headgate_delivered_total{transport=\"mqtt\"}", 4.0),
        ("headgate_mqtt_sessions", 2.0),
        ("headgate_mqtt_sessions_away", 1.0),
        ("headgate_mqtt_subscribers", 1.0),
        ("headgate_session_away_lag_records", 4.0),
        ("headgate_subscriber_lag_records", 0.0),
        ("headgate_datasources", 1.0),
        ("headgate_ready", 1.0),
    ] {
        wait_for(name, || (gateway.metric(name) == value).then_some(()));
    }
    for store in ["records", "registry", "sessions"] {
        let name = format!("headgate_store_bytes{{store=\"{store}\"}}");
        wait_for(&name, || (gateway.metric(&name) > 0.0).then_some(()));
    }
    let open = gateway.metric("process_open_fds");
    assert!(open > 5.0 && open <= gateway.metric("process_max_fds"), "{open}");
    let version = gateway.get("/v1/version", "").json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let metrics = gateway.metrics();
    let line = metrics.lines().find(|line| line.starts_with("headgate_build_info{")).expect("it is there");
    assert!(line.contains(&format!("version={}", version["version"])), "{line}");
}
