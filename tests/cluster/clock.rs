//! A gateway whose clock is days ahead. It emptied the stream, because it judged ages by its own clock, and ended keys
//! that had days left, at every gateway.

use std::path::PathBuf;

use serde_json::json;

use crate::common::nats::NatsServer;
use crate::common::{Setup, scratch, wait_for};

/// What fakes the clock of a process (Debian's libfaketime).
fn fake_time_library() -> PathBuf {
    let of = |machine: &str| PathBuf::from(format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketime.so.1"));
    let found = ["x86_64", "aarch64"].map(of).into_iter().find(|path| path.exists());
    found.expect("libfaketime: tests/run installs it")
}

#[test]
fn a_gateway_whose_clock_is_ahead_is_not_ready_and_neither_removes_nor_ends_anything() {
    let (server, right, wrong) = (NatsServer::start(), scratch(), scratch());
    let setup = |dir: &std::path::Path| {
        Setup::embedded_on(dir)
            .set("log.backend", "jetstream")
            .set("nats.servers", format!("[\"{}\"]", server.url()))
            .set("log.retention_s", 7 * 86_400)
            .set("intake.dedup_window_s", 60)
    };
    let gateway = setup(right.path()).start();
    let source = gateway.create("press-4");
    let in_five_days = (jiff::Timestamp::now() + jiff::SignedDuration::from_hours(5 * 24)).to_string();
    let path = "/v1/datasources/press-4/keys";
    let made = gateway.post(path, &gateway.admin_key(), &json!({ "expires_at": in_five_days }));
    let key = made.json()["key"]["secret"].as_str().expect("a secret").to_owned();
    let send = || gateway.post("/v1/ingest/press-4/t", &key, &json!({ "value": 1 })).status;
    assert_eq!(send(), 200);
    gateway.stored("press-4", 1);

    let ahead = setup(wrong.path())
        .with_env("LD_PRELOAD", fake_time_library().to_str().expect("text"))
        .with_env("FAKETIME", "+8d")
        .with_env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .start();
    let ready = wait_for("it to see its clock", || {
        Some(ahead.request("GET", "/readyz", "", &[], b"")).filter(|answer| answer.status == 503)
    });
    assert!(ready.text().contains("s ahead of that of the NATS servers"), "{}", ready.text());
    // Retention and deadlines have had their turns by then: every 5 s and every second.
    std::thread::sleep(std::time::Duration::from_secs(6));
    assert_eq!(send(), 200, "the key has five days left");
    assert_eq!(ahead.post("/v1/ingest/press-4/t", &key, &json!({ "value": 1 })).status, 200);
    let first_offset = gateway.metric("headgate_log_first_offset");
    assert!(first_offset <= 1.0, "the stream begins at {first_offset}");
    assert_eq!(gateway.request("GET", "/readyz", "", &[], b"").status, 200);
    let _ = source;
}
