//! What the tests of shared sinks do to gateways.

use serde_json::{Value, json};

use crate::common::{Gateway, Source};

/// Sends a signal to a gateway.
pub fn signal(gateway: &Gateway, signal: i32) {
    let pid = libc::pid_t::try_from(gateway.pid()).expect("a process id");
    // SAFETY: kill(2) takes two integers; the child has not been waited for, so the id is its.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// What a gateway says of its first sink.
pub fn sink(gateway: &Gateway) -> Value {
    gateway.get("/v1/sinks", &gateway.admin_key()).json()["sinks"][0].clone()
}

/// Sends numbered messages, one after the other.
pub fn send(gateway: &Gateway, source: &Source, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let body = json!({ "n": n }).to_string();
        let answer = gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &[], body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}
