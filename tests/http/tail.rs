//! `headgate tail`, as people and scripts run it: what it prints, that it goes on after a kill, and how it ends.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use serde_json::Value;

use crate::cli::{fails, prints, to};
use crate::common::{Gateway, Setup, scratch, wait_for};

fn post(gateway: &Gateway, key: &str, topic: &str, payload: &str) {
    let path = format!("/v1/ingest/press-4/{topic}");
    let answer = gateway.request("POST", &path, key, &[], payload.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn tail_prints_what_there_is_and_what_comes_in_and_ends_after_so_many() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    for n in 0..3 {
        post(&gateway, &source.key, "spindle/temp", &format!("{{\"t\": {n}}}"));
    }
    post(&gateway, &source.key, "other", "\u{1b}[2Jred");
    let tail = |args: &[&str]| to(&gateway, &[&["tail", "press-4"], args].concat());
    let printed = prints(&mut tail(&["--from", "1h", "--limit", "4"]));
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 4, "{printed}");
    assert!(lines[0].ends_with(" spindle/temp {\"t\": 0}"), "{printed}");
    assert!(lines[3].ends_with(" other \u{fffd}[2Jred"), "{printed}");
    let printed = prints(&mut tail(&["--last", "1", "--topic", "spindle/#", "--limit", "1", "--json"]));
    let stored = gateway.stored("press-4", 4);
    assert_eq!(serde_json::from_str::<Value>(&printed).expect("JSON"), stored[2]);
    let offset = stored[1]["offset"].to_string();
    let printed = prints(&mut tail(&["--from", &offset, "--limit", "2"]));
    assert!(printed.starts_with(&format!("{offset} ")), "{printed}");
    let since = stored[3]["received_at"].as_str().expect("a time").to_owned();
    assert!(prints(&mut tail(&["--from", &since, "--limit", "1"])).contains(" other "));
    for (args, words) in
        [(&["tail", "press-9"][..], "datasource"), (&["tail", "press-4", "--topic", "a#"], "filter")]
    {
        assert!(fails(&mut to(&gateway, args)).contains(words), "{args:?}");
    }
    let bad = tail(&["--from", "yesterday"]).output().expect("headgate runs");
    assert_eq!(bad.status.code(), Some(2), "{}", String::from_utf8_lossy(&bad.stderr));
    let mut denied = to(&gateway, &["tail", "press-4"]);
    denied.env("HEADGATE_API_KEY", "hgk_none");
    fails(&mut denied);
}

#[test]
fn tail_goes_on_after_a_kill_and_ends_with_its_key() {
    let dir = scratch();
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let setup = Setup::on(dir.path()).set("http.listen", port);
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    let mut command = to(&gateway, &["tail", "press-4", "--from", "0"]);
    command.env("HEADGATE_API_KEY", &source.key).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tail = command.spawn().expect("headgate runs");
    let mut lines = BufReader::new(tail.stdout.take().expect("piped")).lines();
    let mut next = || lines.next().expect("a line").expect("text");
    post(&gateway, &source.key, "a", "1");
    assert!(next().ends_with(" a 1"));
    gateway.kill();
    let gateway = setup.start();
    post(&gateway, &source.key, "a", "2");
    assert!(next().ends_with(" a 2"));
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
    let status = wait_for("it to end", || tail.try_wait().expect("our child"));
    assert_eq!(status.code(), Some(1));
    let mut said = String::new();
    tail.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(said.contains("connecting again") && said.contains("revoked"), "{said}");
}
