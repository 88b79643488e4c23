//! Times are spans from now or RFC 3339 wherever a command takes one; and the newest records are a tail.

use serde_json::{Value, json};

use crate::cli::{headgate, prints, to};
use crate::common::{Gateway, scratch};

fn offsets(printed: &str) -> Vec<u64> {
    let offset = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["offset"].as_u64();
    printed.lines().map(|line| offset(line).expect("an offset")).collect()
}

#[test]
fn a_time_may_be_a_span_from_now_in_every_command_that_takes_one() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    assert_eq!(gateway.post("/v1/ingest/press-4", &source.key, &json!(1)).status, 200);
    gateway.stored("press-4", 1);
    let records = |args: &[&str]| {
        let args = [&["records", "press-4", "--json"], args].concat();
        prints(&mut to(&gateway, &args)).lines().count()
    };
    for (args, count) in [
        (&["--from", "1h"][..], 1),
        (&["--since", "1h30m"], 1),
        (&["--to", "1h"], 0),
        (&["--from", "7d", "--to", "now"], 1),
        (&["--event-from", "2h"], 1),
        (&["--event-to", "2h"], 0),
        (&["--from", "2100-01-01T00:00:00Z"], 0),
    ] {
        assert_eq!(records(args), count, "{args:?}");
    }
    assert_eq!(prints(&mut to(&gateway, &["audit", "--json", "--to", "1h"])).lines().count(), 0);
    assert!(prints(&mut to(&gateway, &["audit", "--json", "--since", "1h"])).lines().count() >= 2);
    let listed = ["quarantine", "list", "press-4", "--from", "2h", "--json"];
    let page: Value = serde_json::from_str(&prints(&mut to(&gateway, &listed))).expect("JSON");
    assert_eq!(page["records"], json!([]));
    let create = ["key", "create", "press-4", "--expires-at", "90d", "--json"];
    let created: Value = serde_json::from_str(&prints(&mut to(&gateway, &create))).expect("JSON");
    let expires = created["key"]["expires_at"].as_str().expect("a time").to_owned();
    let in_90_days = expires.as_str() > created["key"]["created_at"].as_str().expect("a time");
    assert!(in_90_days, "{created}");
    assert!(prints(&mut to(&gateway, &["key", "list", "press-4"])).contains("active, 89 d left"));
    let quarantine = ["key", "quarantine", "press-4", &source.key_id, "--since", "2h", "--json"];
    let taken: Value = serde_json::from_str(&prints(&mut to(&gateway, &quarantine))).expect("JSON");
    assert_eq!(taken["records"], 1, "{taken}");
    for args in [
        &["records", "x", "--from", "soon"][..],
        &["audit", "--to", "1w"],
        &["tail", "x", "--from", "1 h"],
        &["key", "create", "x", "--expires-at", "2020-01-01T00:00:00Z"],
        &["key", "create", "x", "--expires-at", "0s"],
        &["key", "quarantine", "x", "0123456789ab", "--since", "then"],
        &["quarantine", "list", "x", "--from", "-1h"],
        &["key", "rotate", "x", "0123456789ab", "--grace", "400d"],
    ] {
        assert_eq!(headgate(args).status().expect("it runs").code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_tail_of_the_records_is_the_newest_of_those_that_are_selected_the_oldest_first() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    for n in 0..25 {
        let path = format!("/v1/ingest/press-4/{}", if n % 2 == 0 { "even" } else { "odd" });
        assert_eq!(gateway.post(&path, &source.key, &json!({ "n": n, "text": "two\nlines" })).status, 200);
    }
    let all: Vec<u64> =
        gateway.stored("press-4", 25).iter().map(|record| record["offset"].as_u64().expect("one")).collect();
    let tail = |args: &[&str]| {
        prints(&mut to(&gateway, &[&["records", "press-4", "--format", "json"], args].concat()))
    };
    assert_eq!(offsets(&tail(&["--tail"])), all[15..], "10 by default");
    assert_eq!(offsets(&tail(&["--tail", "3"])), all[22..]);
    assert_eq!(offsets(&tail(&["--tail", "3", "--topic", "odd"])), [all[19], all[21], all[23]]);
    assert_eq!(offsets(&tail(&["--tail", "1000"])), all);
    assert_eq!(offsets(&tail(&["--tail", "2", "--to-offset", &all[5].to_string()])), all[3..5]);
    assert_eq!(offsets(&tail(&["--tail", "2", "--key", &source.key_id])), all[23..]);
    assert_eq!(tail(&["--tail", "2", "--key", "0123456789ab"]), "");
    assert_eq!(tail(&["--tail", "2", "--to", "1h"]), "");
    let csv = prints(&mut to(&gateway, &["records", "press-4", "--format", "csv", "--tail", "2"]));
    assert!(csv.starts_with("offset,") && csv.contains(&format!("\n{},", all[23])), "{csv}");
    for args in [&["--tail", "0"][..], &["--tail", "2", "--all"], &["--tail", "2", "--order", "newest"]] {
        let args = [&["records", "press-4"], args].concat();
        assert_eq!(headgate(&args).status().expect("it runs").code(), Some(2), "{args:?}");
    }
}
