//! The commands, as people and scripts run them: the real binary, its exit code, and what it prints.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::common::cluster::first_offset;
use crate::common::{Gateway, scratch, wait_for};
use serde_json::Value;

/// The command, with nothing of this environment's Headgate in it.
pub fn headgate(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// The command against a gateway of this test, with the admin key of its data directory.
pub fn to(gateway: &Gateway, args: &[&str]) -> Command {
    let mut command = headgate(args);
    command.env("HEADGATE_URL", format!("http://{}", gateway.http)).env("HEADGATE_DATA_DIR", gateway.dir());
    command
}

/// `headgate publish` against a gateway of this test, with a datasource's own key.
fn publish(gateway: &Gateway, key: &str, args: &[&str]) -> Command {
    let addr = gateway.mqtt.to_string();
    let args = [&["publish", "--addr", &addr], args].concat();
    let mut command = to(gateway, &args);
    command.env("HEADGATE_API_KEY", key);
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("headgate runs")
}

/// What a command that has to succeed prints.
pub fn prints(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// What a command that has to fail says: one line, and nothing on standard output.
pub fn fails(command: &mut Command) -> String {
    fails_with(command, &[1, 3, 4, 5])
}

/// The same, of a command that has to end with one of these exit codes.
pub fn fails_with(command: &mut Command, codes: &[i32]) -> String {
    let output = run(command);
    let code = output.status.code().expect("it ends by itself");
    assert!(codes.contains(&code), "{command:?}: {code}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{command:?}");
    let error = String::from_utf8(output.stderr).expect("text");
    assert!(error.starts_with("headgate: ") && error.lines().count() == 1, "{error}");
    error
}

/// Writes a file into a directory and returns its path.
fn file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("text").to_owned()
}

#[test]
fn check_config_says_what_a_good_file_sets() {
    let dir = scratch();
    let good = file(dir.path(), "good.toml", "[mqtt]\nlisten = \"127.0.0.1:11883\"\n");
    let said = prints(&mut headgate(&["check-config", &good]));
    assert!(
        said.contains("OK") && said.contains("127.0.0.1:11883") && said.contains("127.0.0.1:8080"),
        "{said}"
    );
}

#[test]
fn check_config_fails_on_what_serve_would_fail_on_and_names_it() {
    let dir = scratch();
    for (text, named) in [
        ("[mqtt]\nlissen = \"127.0.0.1:1\"\n", "lissen"),
        ("[mqtt]\nlisten = \"nowhere\"\n", "listen"),
        ("[mqtt]\nreceive_maximum = 0\n", "mqtt.receive_maximum"),
        ("[trace]\nfilter = \"headgate=loud\"\n", "trace.filter"),
    ] {
        let bad = file(dir.path(), "bad.toml", text);
        let said = fails(&mut headgate(&["check-config", &bad]));
        assert!(said.contains(named), "{text:?}: {said}");
        assert_eq!(fails(&mut headgate(&["serve", "--config", &bad])), said);
    }
    let no_toml = file(dir.path(), "no.toml", "[mqtt]\nlisten = nowhere\n");
    let output = run(&mut headgate(&["check-config", &no_toml]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("line 2") && said.contains("no.toml"), "{said}");
    let missing = dir.path().join("missing.toml");
    assert!(fails(headgate(&["check-config"]).arg(missing)).contains("missing.toml"));
}

#[test]
fn a_usage_error_is_exit_code_2() {
    for args in [&["nope"][..], &[], &["records"], &["bench", "--qos", "2"], &["publish", "ds"]] {
        assert_eq!(run(&mut headgate(args)).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_command_without_a_key_says_where_it_looked() {
    let dir = scratch();
    let said = fails(headgate(&["datasource", "list"]).env("HEADGATE_DATA_DIR", dir.path()));
    for place in ["HEADGATE_API_KEY ", "HEADGATE_API_KEY_FILE ", "admin.key"] {
        assert!(said.contains(place), "{place}: {said}");
    }
}

#[test]
fn the_gateways_own_admin_key_is_not_sent_to_another_machine() {
    let dir = scratch();
    file(dir.path(), "admin.key", "hgk_secret");
    let mut command = headgate(&["datasource", "list"]);
    command.env("HEADGATE_DATA_DIR", dir.path()).env("HEADGATE_URL", "http://192.0.2.1:8080");
    let said = fails(&mut command);
    assert!(said.contains("no API key for http://192.0.2.1:8080") && !said.contains("hgk_"), "{said}");
}

#[test]
fn a_datasource_is_created_used_shown_and_deleted() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());

    let said = prints(&mut to(&gateway, &["datasource", "create", "Press 4"]));
    let key = said.lines().find_map(|line| line.strip_prefix("key  ")).expect("the key is shown").trim();
    assert!(key.starts_with("hgk_"), "{said}");
    assert_eq!(said.matches(key).count(), 1, "the key stands in no line to paste: {said}");
    for line in ["datasource  press-4", "shown once, keep it now", "mosquitto_pub ", "curl ", "python3 "] {
        assert!(said.contains(line), "{line}: {said}");
    }

    prints(&mut publish(&gateway, key, &["press-4", "spindle/temp", r#"{"value": 21.50}"#]));
    gateway.settle();
    let shown = prints(&mut to(&gateway, &["records", "press-4", "--format", "json"]));
    let record: Value = serde_json::from_str(&shown).expect("one record, one line of JSON");
    assert_eq!((&record["topic"], &record["transport"]), (&"spindle/temp".into(), &"mqtt".into()));
    assert!(shown.contains(r#""payload":{"value": 21.50}"#), "digit for digit: {shown}");

    assert!(prints(&mut to(&gateway, &["datasource", "list"])).contains("press-4"));
    assert!(prints(&mut to(&gateway, &["datasource", "show", "press-4"])).contains("Press 4"));
    prints(&mut to(&gateway, &["datasource", "delete", "press-4"]));
    fails(&mut publish(&gateway, key, &["press-4", "spindle/temp", "late"]));
    let said = fails(&mut to(&gateway, &["datasource", "show", "press-4"]));
    assert!(said.contains("not found: ") && said.contains("press-4"), "{said}");

    let exit = gateway.stop();
    assert!(!exit.output.contains("hgk_"), "no key in what the gateway prints: {}", exit.output);
}

#[test]
fn a_key_is_created_listed_by_its_id_and_revoked() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let first = gateway.create("press-4");
    let mut create = to(&gateway, &["key", "create", "press-4", "--label", "laptop", "--json"]);
    let created: Value = serde_json::from_str(&prints(&mut create)).expect("JSON");
    let text = |pointer| created.pointer(pointer).and_then(Value::as_str).expect(pointer);
    let (id, secret) = (text("/key/id"), text("/key/secret"));

    let listed = prints(&mut to(&gateway, &["key", "list", "press-4"]));
    assert!(listed.contains(id) && listed.contains(&first.key_id) && listed.contains("laptop"), "{listed}");
    assert!(!listed.contains("hgk_"), "{listed}");

    prints(&mut publish(&gateway, secret, &["press-4", "t", "before"]));
    prints(&mut to(&gateway, &["key", "revoke", "press-4", id]));
    fails(&mut publish(&gateway, secret, &["press-4", "t", "after"]));
    prints(&mut publish(&gateway, &first.key, &["press-4", "t", "another key"]));
    gateway.settle();
    let payloads: Vec<Value> = gateway.records("press-4").iter().map(|r| r["payload"].clone()).collect();
    assert_eq!(payloads, ["before", "another key"]);
}

#[test]
fn publish_sends_lines_of_standard_input_and_of_a_file() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let other = gateway.create("press-5");

    let mut command = publish(&gateway, &source.key, &["press-4", "lines"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("headgate runs");
    child.stdin.take().expect("piped").write_all(b"one\n\ntwo\r\nthree").expect("written");
    let output = child.wait_with_output().expect("it ends with its input");
    assert!(
        output.status.success() && output.stdout.starts_with(b"3 published and acknowledged"),
        "{output:?}"
    );

    let path = file(dir.path(), "readings", "1\n2\n3\n4\n");
    prints(&mut publish(&gateway, &source.key, &["press-4", "file", "--file", &path]));
    // An admin key is good for every datasource: the command names the one that was asked for.
    prints(&mut publish(&gateway, &gateway.admin_key(), &["press-4", "admin", "5"]));
    // A datasource's key is not.
    fails(&mut publish(&gateway, &other.key, &["press-4", "wrong", "6"]));

    gateway.settle();
    let csv = prints(&mut to(&gateway, &["records", "press-4", "--format", "csv"]));
    let cells: Vec<_> =
        csv.lines().skip(1).map(|l| l.split(',').skip(2).take(2).collect::<Vec<_>>()).collect();
    let expected = "lines one,lines two,lines three,file 1,file 2,file 3,file 4,admin 5";
    let expected: Vec<Vec<&str>> = expected.split(',').map(|pair| pair.split(' ').collect()).collect();
    assert_eq!(cells, expected, "{csv}");
    assert_eq!(gateway.records("press-5").len(), 0);
}

#[test]
fn records_come_up_to_a_limit_or_all_in_either_order_and_by_filter() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let lines: String = (0..2_500).map(|n| format!("{n}\n")).collect();
    let path = file(dir.path(), "readings", &lines);
    prints(&mut publish(&gateway, &source.key, &["press-4", "a/b", "--file", &path]));
    prints(&mut publish(&gateway, &source.key, &["press-4", "c", "last"]));
    gateway.settle();

    let count = |args: &[&str]| {
        let args = [&["records", "press-4", "--format", "json"], args].concat();
        prints(&mut to(&gateway, &args)).lines().count()
    };
    assert_eq!(count(&[]), 100, "the default");
    assert_eq!(count(&["--limit", "2400"]), 2_400);
    assert_eq!(count(&["--limit", "100000"]), 2_501);
    assert_eq!(count(&["--limit", "100000", "--topic", "a/#"]), 2_500);
    assert_eq!(count(&["--all"]), 2_501);
    assert_eq!(count(&["--all", "--to-offset", "7", "--from-offset", "2"]), 5);
    let shown = |args: &[&str]| {
        let args = [&["records", "press-4", "--order", "newest", "--limit", "2"], args].concat();
        prints(&mut to(&gateway, &args))
    };
    let newest = shown(&["--format", "ndjson"]);
    let offsets: Vec<u64> = newest
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["offset"].as_u64().expect("a number"))
        .collect();
    assert_eq!(offsets, [2_500, 2_499].map(|offset| offset + first_offset()), "{newest}");
    let further = shown(&["--format", "csv", "--cursor", &offsets[1].to_string(), "--topic", "a/b"]);
    let further: Vec<&str> = further.lines().skip(1).filter_map(|line| line.split(',').nth(3)).collect();
    assert_eq!(further, ["2498", "2497"]);
    assert!(shown(&[]).contains("last"), "a table");
    assert_eq!(count(&["--from", "2100-01-01T00:00:00Z"]), 0);
    assert_eq!(count(&["--to", "2100-01-01T00:00:00Z", "--limit", "5"]), 5);
    let wrong = run(&mut to(&gateway, &["records", "press-4", "--format", "json", "--from", "yesterday"]));
    assert_eq!(wrong.status.code(), Some(2));
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(said.contains("2026-11-23T09:00:00Z") && said.contains("15m"), "{said}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let lines = format!("{}\n", "x".repeat(100)).repeat(2_000);
    let path = file(dir.path(), "readings", &lines);
    prints(&mut publish(&gateway, &source.key, &["press-4", "t", "--file", &path]));
    gateway.settle();

    let mut command = to(&gateway, &["records", "press-4", "--limit", "2000", "--format", "csv"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("headgate runs");
    let mut first = String::new();
    // The reader takes a line and goes; more than a pipe holds is still to come.
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut first).expect("a line");
    let output = child.wait_with_output().expect("it ends");
    assert!(first.starts_with("offset,"), "{first}");
    assert_eq!(output.status.code(), Some(141), "as if SIGPIPE had ended it");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn serve_says_where_and_how_to_connect() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    // The last of the lines.
    gateway.says(dir.path().join("admin.key").to_str().expect("text"));
    let said = gateway.output();
    assert!(said.contains(&format!("mqtt://{}", gateway.mqtt)), "{said}");
    assert!(said.contains(&format!("http://{}", gateway.http)), "{said}");
    gateway.stop();
}

/// A child that is killed when the test is over, however it ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn serve_serves_on_when_nobody_reads_what_it_says() {
    let dir = scratch();
    let mut command = headgate(&["serve", "--data-dir"]);
    command
        .arg(dir.path())
        .env("HEADGATE_MQTT__LISTEN", "127.0.0.1:0")
        .env("HEADGATE_HTTP__LISTEN", "127.0.0.1:0");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("headgate runs");
    drop(child.stdout.take());
    let mut log = BufReader::new(child.stderr.take().expect("piped"));
    let mut child = Killed(child);
    let mut line = String::new();
    while !line.contains("serving") {
        line.clear();
        assert!(log.read_line(&mut line).expect("readable") > 0, "it ended before it served");
    }
    let http =
        line.split("http_addr=").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("an address");
    let answer = ureq::get(format!("http://{http}/livez")).call().expect("it serves");
    assert_eq!(answer.status(), 200);
    assert!(child.0.try_wait().expect("our child").is_none(), "it is still there");
}

#[test]
fn the_demo_replays_all_readings_and_leaves_nothing_behind() {
    let temporary = scratch();
    let started = Instant::now();
    let mut command = headgate(&["demo", "--once"]);
    let said = prints(command.env("TMPDIR", temporary.path()));
    assert!(started.elapsed() < Duration::from_secs(60), "it took {:?}", started.elapsed());
    assert!(said.contains("37,342 sent = acknowledged = stored"), "{said}");
    assert!(said.contains("91 attempts refused, 0 of them stored"), "{said}");
    for (sensor, readings, newest) in [
        ("machine-temperature", "22,695", "96.90386085"),
        ("ambient-temperature", "7,267", "72.58408858"),
        ("lane-occupancy-6005", "2,380", "5.56"),
        ("speed-6005", "2,500", "83"),
        ("travel-time-387", "2,500", "305"),
    ] {
        let row = said.lines().find(|line| line.contains(sensor) && line.matches(readings).count() == 3);
        assert!(row.is_some(), "{sensor}: {said}");
        let value = format!("\"value\": {newest}}}");
        assert!(said.lines().any(|line| line.contains(sensor) && line.contains(&value)), "{sensor}: {said}");
    }
    assert!(!said.contains("hgk_"), "{said}");
    let left: Vec<_> = std::fs::read_dir(temporary.path()).expect("readable").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_demo_keeps_its_records_in_a_data_directory_that_was_given() {
    let dir = scratch();
    let config = "[mqtt]\nlisten = \"127.0.0.1:0\"\n[http]\nlisten = \"127.0.0.1:0\"\n";
    let config = file(dir.path(), "free-ports.toml", config);
    let data = dir.path().join("data");
    for sensor in ["machine-temperature", "machine-temperature-2"] {
        prints(headgate(&["demo", "--once", "--config", &config, "--data-dir"]).arg(&data));
        let gateway = Gateway::start(&data);
        assert_eq!(gateway.records(sensor).len(), 22_695);
        gateway.stop();
    }
}

#[test]
fn bench_by_itself_starts_a_gateway_and_reports_what_it_acknowledged() {
    let temporary = scratch();
    for args in [&["--qos", "1"][..], &["--qos", "0"], &["--protocol", "5", "--window", "5000"]] {
        let args = [&["bench", "--json", "--seconds", "0.5", "--warmup", "0.1", "--connections", "5"], args]
            .concat();
        let report = prints(headgate(&args).env("TMPDIR", temporary.path()));
        let report: Value = serde_json::from_str(&report).expect("JSON");
        assert!(report["acked"].as_u64().expect("a count") > 0, "{report}");
        assert!(report["acked_per_second"].as_f64().expect("a rate") > 0.0, "{report}");
        let latency = |name: &str| report["latency_us"][name].as_f64().expect("a latency");
        assert!(0.0 < latency("p50") && latency("p50") <= latency("p99") && latency("p99") <= latency("max"));
        if args.contains(&"5000") {
            assert_eq!(report["window"], 1024, "the gateway's receive maximum holds");
        }
    }
    let left: Vec<_> = std::fs::read_dir(temporary.path()).expect("readable").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_bench_counts_as_acknowledged_is_in_the_log() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("bench");
    let addr = gateway.mqtt.to_string();
    let args = ["bench", "--addr", &addr, "--json", "--seconds", "0.3", "--warmup", "0"];
    let mut command = headgate(&args);
    let report: Value =
        serde_json::from_str(&prints(command.env("HEADGATE_API_KEY", &source.key))).expect("JSON");
    let acked = report["acked"].as_u64().expect("a count");
    assert!(acked > 0, "{report}");
    gateway.settle();
    #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
    let acked = acked as f64;
    assert!(gateway.metric("headgate_log_next_offset") >= acked, "{acked}");
}

#[test]
fn bench_fails_with_the_reason_when_it_is_refused() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("bench");
    let addr = gateway.mqtt.to_string();
    let bench = |key: &str| {
        let mut command = headgate(&["bench", "--addr", &addr, "--seconds", "0.1", "--connections", "2"]);
        command.env("HEADGATE_API_KEY", key);
        command
    };
    prints(&mut bench(&source.key));
    gateway.delete("bench");
    let said = fails(&mut bench(&source.key));
    assert!(said.contains("not authorized") && !said.contains("hgk_"), "{said}");
    let mut without_key = headgate(&["bench", "--addr", &addr]);
    assert!(fails(&mut without_key).contains("HEADGATE_API_KEY"));
}

#[test]
fn bench_fails_when_its_key_dies_under_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("bench");
    let addr = gateway.mqtt.to_string();
    let mut command =
        headgate(&["bench", "--addr", &addr, "--seconds", "60", "--connections", "2", "--protocol", "5"]);
    command.env("HEADGATE_API_KEY", &source.key).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn().expect("headgate runs"));
    wait_for("the load to arrive", || (gateway.metric("headgate_log_next_offset") > 0.0).then_some(()));
    gateway.delete("bench");
    let status = wait_for("bench to give up", || child.0.try_wait().expect("our child"));
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_schema_is_set_by_command_and_what_it_stopped_is_listed_and_redriven() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let file = dir.path().join("schema.json");
    std::fs::write(&file, "{\"type\": \"number\"}").expect("written");
    let file = file.to_str().expect("a path of text");
    let shown = prints(&mut to(&gateway, &["schema", "set", "press-4", file]));
    assert!(shown.contains("\"version\": 1"), "{shown}");
    prints(&mut publish(&gateway, &source.key, &["press-4", "spindle/rpm", "41"]));
    let refused = run(&mut publish(&gateway, &source.key, &["press-4", "spindle/temp", "{}"]));
    assert!(!String::from_utf8_lossy(&refused.stderr).contains(&source.key));
    let listed = wait_for("the message to be in quarantine", || {
        let listed = prints(&mut to(&gateway, &["quarantine", "list", "press-4", "--topic", "spindle/#"]));
        listed.contains("spindle/temp").then_some(listed)
    });
    assert!(listed.contains("version 1") && !listed.contains("spindle/rpm"), "{listed}");
    let answer = prints(&mut to(&gateway, &["quarantine", "redrive", "press-4"]));
    assert!(answer.starts_with("0 let in, 0 let in before, 1 still failing"), "{answer}");
    prints(&mut to(&gateway, &["schema", "clear", "press-4"]));
    let answer = prints(&mut to(&gateway, &["quarantine", "redrive", "press-4"]));
    assert!(answer.starts_with("1 let in, 0 let in before, 0 still failing"), "{answer}");
    gateway.stored("press-4", 2);
    let inferred: Value =
        serde_json::from_str(&prints(&mut to(&gateway, &["schema", "infer", "press-4"]))).expect("JSON");
    assert_eq!(inferred["type"], serde_json::json!(["integer", "object"]));

    let since = ["--since", "2020-01-01T00:00:00Z"];
    let quarantine = ["key", "quarantine", "press-4", &source.key_id];
    let answer = prints(&mut to(&gateway, &[&quarantine[..], &since].concat()));
    assert!(answer.starts_with("2 records that this key let in are in quarantine"), "{answer}");
    assert!(gateway.records("press-4").is_empty());
    let answer = prints(&mut to(&gateway, &[&quarantine[..], &["--undo"]].concat()));
    assert!(answer.starts_with("0 records that this key let in"), "{answer}");
    assert_eq!(gateway.records("press-4").len(), 2);
}

/// The backup's directory is the gateway's, and the command may stand elsewhere.
#[test]
fn a_running_gateway_is_backed_up_and_what_is_restored_serves_the_same_keys() {
    let (dir, backups) = (scratch(), scratch());
    let gateway = crate::common::Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    let body = serde_json::json!([{ "n": 1 }, { "n": 2 }]);
    assert_eq!(gateway.post("/v1/ingest/press-4/t", &source.key, &body).status, 200);
    let said = prints(to(&gateway, &["backup", "b"]).current_dir(backups.path()));
    assert!(said.contains("everything up to offset 2"), "{said}");
    let again = fails(to(&gateway, &["backup", "b"]).current_dir(backups.path()));
    assert!(again.contains("not empty"), "{again}");
    gateway.stop();
    let (backup, data) = (backups.path().join("b"), backups.path().join("data"));
    let text = |path: &Path| path.to_str().expect("text").to_owned();
    let said = prints(&mut headgate(&["restore", &text(&backup), "--data-dir", &text(&data)]));
    assert!(said.contains("the next record gets offset 2"), "{said}");
    let gateway = crate::common::Setup::embedded_on(&data).start();
    let answer = gateway.post("/v1/ingest/press-4/t", &source.key, &body);
    assert_eq!((answer.status, answer.json()["first_offset"].as_u64()), (200, Some(2)));
    assert_eq!(gateway.stored("press-4", 4).len(), 4);
}

#[test]
fn datasources_move_to_another_gateway_with_their_keys_and_every_conflict_is_named_before_anything_is_done() {
    let (dir_a, dir_b) = (scratch(), scratch());
    let (a, b) = (Gateway::start(dir_a.path()), Gateway::start(dir_b.path()));
    let (press, oven) = (a.create("press-4"), a.create("oven"));
    let limits = serde_json::json!({ "limits": { "messages_per_s": 70 } });
    let patched = a.request(
        "PATCH",
        "/v1/datasources/press-4",
        &a.admin_key(),
        &[("content-type", "application/json")],
        limits.to_string().as_bytes(),
    );
    assert_eq!(patched.status, 200, "{}", patched.text());
    let schema = serde_json::json!({ "schema": { "required": ["n"] } });
    let set = a.request(
        "PUT",
        "/v1/datasources/oven/schema",
        &a.admin_key(),
        &[("content-type", "application/json")],
        schema.to_string().as_bytes(),
    );
    assert_eq!(set.status, 200, "{}", set.text());
    let exported = prints(&mut to(&a, &["export"]));
    assert_eq!(exported.lines().count(), 2, "{exported}");
    assert!(!exported.contains(&press.key) && !exported.contains("hgk_"), "no secret: {exported}");
    let one = prints(&mut to(&a, &["export", "oven"]));
    assert!(exported.contains(one.trim()), "{one}");
    let all = file(dir_a.path(), "exported.jsonl", &exported);

    // One of the two is there already: then neither comes.
    let taken = b.create("oven");
    let said = fails(&mut to(&b, &["import", &all]));
    assert!(said.contains("nothing is imported") && said.contains("there is a datasource oven"), "{said}");
    assert_eq!(b.get("/v1/datasources/press-4", &b.admin_key()).status, 404);
    let said = prints(&mut to(&b, &["import", &all, "--rename"]));
    assert!(said.contains("oven as oven-2: 1 keys") && said.contains("press-4: 1 keys"), "{said}");
    for (key, path, body, status) in [
        (&press.key, "/v1/ingest/press-4/t", "{}", 200),
        (&oven.key, "/v1/ingest/oven-2/t", "{\"n\":1}", 200),
        (&oven.key, "/v1/ingest/oven-2/t", "{\"m\":1}", 422),
        (&oven.key, "/v1/ingest/oven/t", "{\"n\":1}", 401),
        (&taken.key, "/v1/ingest/oven/t", "{}", 200),
    ] {
        let answer = b.request("POST", path, key, &[("content-type", "application/json")], body.as_bytes());
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
    }
    let press_there = b.get("/v1/datasources/press-4", &b.admin_key()).json();
    assert_eq!(press_there["limits"]["messages_per_s"]["max"], 70, "{press_there}");
    // A key has one owner, whatever the datasource is called.
    let said = fails(&mut to(&b, &["import", &all, "--rename"]));
    assert!(said.contains(&press.key_id) && said.contains(&oven.key_id), "{said}");
    let broken = file(dir_a.path(), "broken.jsonl", "{\"id\":\"x\"}\n");
    assert!(fails(&mut to(&b, &["import", &broken])).contains("no datasource that a gateway has exported"));
    let created_at = "2026-11-30T00:00:00Z";
    let key = |digit: &str| serde_json::json!({ "digest": digit.repeat(64), "scopes": ["ingest"], "created_at": created_at });
    let many = serde_json::json!({
        "headgate_export": 1, "id": "mill", "name": "Mill", "limits": { "keys": 1 }, "keys": [key("a"), key("b")]
    });
    let refused = b.post("/v1/import?check=true", &b.admin_key(), &many);
    assert_eq!((refused.status, &refused.json()["limit_name"]), (422, &"keys".into()), "{}", refused.text());
    for (key, status) in [("", 401), (press.key.as_str(), 403)] {
        assert_eq!(b.get("/v1/datasources/press-4/export", key).status, status);
        assert_eq!(b.post("/v1/import", key, &serde_json::json!({})).status, status);
    }
    assert_eq!(b.get("/v1/datasources/none/export", &b.admin_key()).status, 404);
    assert!(b.get("/v1/audit?limit=1000", &b.admin_key()).text().contains("datasource.imported"));
}
