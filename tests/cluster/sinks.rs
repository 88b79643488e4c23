//! What the tests of shared sinks do to gateways.

use serde_json::{Value, json};

use crate::common::{Gateway, Source};

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
