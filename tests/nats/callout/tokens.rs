//! Access tokens over NATS: in the place of a key, with the subjects that are left of its own.

use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::ends::closed;
use super::stage::{SILENCE, Stage};
use crate::common::PATIENCE;

fn token(stage: &Stage, datasource: &str, key_id: &str, wanted: &Value) -> String {
    let path = format!("/v1/datasources/{datasource}/keys/{key_id}/tokens");
    let answer = stage.gateway.post(&path, &stage.gateway.admin_key(), wanted);
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["token"].as_str().expect("a token").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_nats_for_its_topics_and_its_records_name_the_key() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest", "subscribe"]);
    let whole = stage.connect(&token(&stage, "press-4", &source.key_id, &json!({}))).await;
    assert_eq!(whole.publish("ingest.press-4.spindle.temp", "21.5").await, 0);
    let narrow = token(&stage, "press-4", &source.key_id, &json!({ "topics": ["a/#"] }));
    let mut narrow = stage.connect(&narrow).await;
    let mut own = narrow.client.subscribe("stream.press-4.a.>").await.expect("subscribed");
    let mut all = narrow.client.subscribe("stream.press-4.>").await.expect("asked");
    let mut other = narrow.client.subscribe("stream.press-4.z").await.expect("asked");
    let mut answers = narrow.client.subscribe(format!("_INBOX_{}.>", source.key_id)).await.expect("asked");
    narrow.reached().await;
    for subject in ["ingest.press-4.a.b", "ingest.press-4.z", "ingest.press-4.a"] {
        narrow.client.publish(subject, "1".into()).await.expect("sent");
    }
    narrow.client.flush().await.expect("flushed");
    let records = stage.gateway.stored("press-4", 3);
    let topics: Vec<&str> = records.iter().map(|record| record["topic"].as_str().expect("one")).collect();
    assert_eq!(topics, ["spindle/temp", "a/b", "a"]);
    assert!(records.iter().all(|record| record["key_id"] == source.key_id.as_str()));
    let backend = stage.headgate().await;
    for subject in ["stream.press-4.z", "stream.press-4.a.b"] {
        backend.publish(subject, "1".into()).await.expect("sent");
    }
    let seen = tokio::time::timeout(PATIENCE, own.next()).await.expect("in time").expect("a record");
    assert_eq!(seen.subject.as_str(), "stream.press-4.a.b");
    for not_its_own in [&mut all, &mut other, &mut answers] {
        assert!(tokio::time::timeout(SILENCE, not_its_own.next()).await.is_err(), "it sees too much");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_one_level_reads_nothing_below_it_and_takes_nothing_from_a_queue_group() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest", "subscribe"]);
    let narrow = token(&stage, "press-4", &source.key_id, &json!({ "topics": ["a/+"] }));
    let mut narrow = stage.connect(&narrow).await;
    let mut level = narrow.client.subscribe("stream.press-4.a.*").await.expect("subscribed");
    let mut below = narrow.client.subscribe("stream.press-4.a.>").await.expect("asked");
    let mut deep = narrow.client.subscribe("stream.press-4.a.*.>").await.expect("asked");
    let taking = narrow.client.queue_subscribe("stream.press-4.a.*", "workers".to_owned());
    let mut taking = taking.await.expect("asked");
    narrow.reached().await;
    let whole = stage.connect(&token(&stage, "press-4", &source.key_id, &json!({}))).await;
    let mut taking_all = {
        let queued = whole.client.queue_subscribe("stream.press-4.>", "workers".to_owned());
        queued.await.expect("asked")
    };
    let mut all = whole.client.subscribe("stream.press-4.>").await.expect("subscribed");
    whole.client.flush().await.expect("flushed");
    let backend = stage.headgate().await;
    for subject in ["stream.press-4.a.b.c", "stream.press-4.a.b"] {
        backend.publish(subject, "1".into()).await.expect("sent");
    }
    let seen = tokio::time::timeout(PATIENCE, level.next()).await.expect("in time").expect("a record");
    assert_eq!(seen.subject.as_str(), "stream.press-4.a.b");
    for subject in ["stream.press-4.a.b.c", "stream.press-4.a.b"] {
        let seen = tokio::time::timeout(PATIENCE, all.next()).await.expect("in time").expect("a record");
        assert_eq!(seen.subject.as_str(), subject);
    }
    for not_its_own in [&mut deep, &mut taking, &mut taking_all] {
        assert!(tokio::time::timeout(SILENCE, not_its_own.next()).await.is_err(), "it sees too much");
    }
    while let Ok(Some(seen)) = tokio::time::timeout(SILENCE, below.next()).await {
        assert_eq!(seen.subject.as_str(), "stream.press-4.a.b", "it sees too much");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_header_a_token_is_judged_message_by_message() {
    let stage = Stage::set();
    let (first, second) = (stage.create("press-4", &["ingest"]), stage.create("press-5", &["ingest"]));
    let carrier = stage.connect(&stage.create_key("*", &json!({ "scopes": ["ingest"] })).1).await;
    let narrow = token(&stage, "press-4", &first.key_id, &json!({ "topics": ["a/#"] }));
    let send = async |subject: &str, presented: &str| {
        let mut headers = HeaderMap::new();
        headers.append("Authorization", format!("Bearer {presented}"));
        let asked = carrier.client.request_with_headers(subject.to_owned(), headers, "1".into());
        let answer = asked.await.expect("answered");
        let code = answer.headers.as_ref().and_then(|headers| headers.get("Nats-Service-Error-Code"));
        code.map(|code| code.as_str().to_owned())
    };
    assert_eq!(send("ingest.press-4.a.b", &narrow).await, None);
    assert_eq!(send("ingest.press-4.z", &narrow).await.as_deref(), Some("403"));
    assert_eq!(send("ingest.press-5.a.b", &narrow).await.as_deref(), Some("401"));
    assert_eq!(send("ingest.press-4.a.b", &narrow[..60]).await.as_deref(), Some("401"));
    assert_eq!(stage.gateway.stored("press-4", 1)[0]["key_id"], first.key_id.as_str());
    assert_eq!(send("ingest.press-5.a", &second.key).await, None);
    stage.assert_no_log_has(&[&narrow, &narrow[4..30]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_its_token_and_at_once_with_its_key() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let made = Instant::now();
    let short = stage.connect(&token(&stage, "press-4", &source.key_id, &json!({ "ttl_s": 3 }))).await;
    let long = stage.connect(&token(&stage, "press-4", &source.key_id, &json!({ "ttl_s": 600 }))).await;
    closed(short).await;
    let took = made.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(long.client.flush().await.is_ok());
    stage.revoke("press-4", &source.key_id);
    closed(long).await;
}
