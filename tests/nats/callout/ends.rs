//! A key that dies takes its NATS connections with it, whoever let them in.

use std::time::{Duration, Instant};

use async_nats::{ConnectOptions, Event};
use serde_json::json;

use super::stage::{Connected, Stage, in_seconds};
use crate::common::{PATIENCE, signal, wait_for};

fn with(key: &str) -> ConnectOptions {
    ConnectOptions::with_user_and_password("device".to_owned(), key.to_owned())
}

/// Waits until the connection is closed.
pub(crate) async fn closed(mut connected: Connected) {
    loop {
        if matches!(connected.event().await, Event::Disconnected | Event::Closed) {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_loses_its_live_connections_before_the_call_returns_and_does_not_come_back() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest", "subscribe"]);
    let other = stage.create("press-5", &["ingest"]);
    let connected = [
        stage.connect(&source.key).await,
        stage.connect(&source.key).await,
        stage.connect(&source.key).await,
    ];
    let mut bystander = stage.connect(&other.key).await;
    connected[0].publish("ingest.press-4.t", "1").await;
    let called = Instant::now();
    stage.revoke("press-4", &source.key_id);
    let took = called.elapsed();
    let connections = stage.user("system", "system.password").await;
    let query = json!({ "auth": true, "acc": "APP" }).to_string();
    let answer = connections.request("$SYS.REQ.SERVER.PING.CONNZ", query.into()).await.expect("answered");
    let answer = String::from_utf8_lossy(&answer.payload).into_owned();
    assert!(!answer.contains(&source.key_id), "still there when the call has returned: {answer}");
    assert!(answer.contains(&other.key_id), "{answer}");
    for connected in connected {
        closed(connected).await;
    }
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(stage.refuses(with(&source.key)).await);
    bystander.publish("ingest.press-5.t", "1").await;
    assert!(tokio::time::timeout(Duration::from_millis(200), bystander.event()).await.is_err());
    stage.assert_no_log_has(&[&source.key, &other.key]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_loses_its_connections_on_every_server_of_a_cluster_whoever_let_them_in() {
    let mut stage = Stage::cluster();
    let source = stage.create("press-4", &["ingest"]);
    let mut connected = Vec::new();
    for server in &stage.others {
        let one = stage.connect_to(&server.url(), with(&source.key)).await;
        one.publish("ingest.press-4.t", "1").await;
        connected.push(one);
    }
    connected.push(stage.connect(&source.key).await);
    // Another gateway, which has let nobody in.
    stage.gateway.terminate();
    let next = start_after(&stage.setup);
    std::mem::replace(&mut stage.gateway, next).wait();
    stage.connect(&source.key).await;
    let called = Instant::now();
    stage.revoke("press-4", &source.key_id);
    assert!(called.elapsed() < Duration::from_secs(2), "{:?}", called.elapsed());
    for one in connected {
        closed(one).await;
    }
}

/// A server that is asleep answers nothing, and goes on with its clients when it wakes.
async fn revoke_while_a_server_sleeps(is_new_gateway: bool) {
    let mut stage = Stage::cluster();
    let source = stage.create("press-4", &["ingest"]);
    let asleep = stage.connect_to(&stage.others[0].url(), with(&source.key)).await;
    let awake = stage.connect_to(&stage.others[1].url(), with(&source.key)).await;
    for one in [&asleep, &awake] {
        one.publish("ingest.press-4.t", "1").await;
    }
    signal(stage.others[0].pid(), libc::SIGSTOP);
    if is_new_gateway {
        // One that knows nothing of the clients of a server that does not answer.
        stage.gateway.terminate();
        let next = start_after(&stage.setup);
        std::mem::replace(&mut stage.gateway, next).wait();
        stage.connect(&source.key).await;
    }
    let called = Instant::now();
    stage.revoke("press-4", &source.key_id);
    let took = called.elapsed();
    closed(awake).await;
    signal(stage.others[0].pid(), libc::SIGCONT);
    let woken = Instant::now();
    closed(asleep).await;
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert!(woken.elapsed() < Duration::from_secs(5), "{:?}", woken.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_loses_its_connections_on_a_server_that_slept_meanwhile() {
    revoke_while_a_server_sleeps(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_loses_its_connections_on_a_server_that_slept_when_the_gateway_started() {
    revoke_while_a_server_sleeps(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_expires_a_grace_that_ends_and_a_deleted_datasource_close_connections_too() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let (_, expiring) = stage.create_key("press-4", &json!({ "expires_at": in_seconds(4) }));
    let first = stage.connect(&expiring).await;
    let second = stage.connect(&source.key).await;
    let path = format!("/v1/datasources/press-4/keys/{}/rotate", source.key_id);
    let rotated = stage.gateway.post(&path, &stage.gateway.admin_key(), &json!({ "grace_seconds": 1 }));
    assert_eq!(rotated.status, 201, "{}", rotated.text());
    let new = rotated.json()["key"]["secret"].as_str().expect("a secret").to_owned();
    let third = stage.connect(&new).await;
    closed(second).await;
    third.publish("ingest.press-4.t", "1").await;
    closed(first).await;
    stage.gateway.delete("press-4");
    closed(third).await;
    for key in [&expiring, &source.key, &new] {
        assert!(stage.refuses(with(key)).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_system_user_what_is_published_under_a_dead_key_is_refused() {
    let stage = Stage::without("system_user");
    let source = stage.create("press-4", &["ingest"]);
    let connected = stage.connect(&source.key).await;
    connected.publish("ingest.press-4.t", "1").await;
    stage.revoke("press-4", &source.key_id);
    assert_eq!(connected.refusal("ingest.press-4.t").await.as_deref(), Some("401"));
    connected.client.publish("ingest.press-4.t", "2".into()).await.expect("sent");
    connected.client.flush().await.expect("flushed");
    wait_for("both to be counted", || {
        let refused = r#"headgate_refused_total{transport="nats",cause="revoked_key"}"#;
        (stage.gateway.metric(refused) >= 2.0).then_some(())
    });
    assert_eq!(stage.gateway.stored("press-4", 1).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_itself_ends_a_permission_when_its_key_expires() {
    let stage = Stage::without("system_user");
    stage.create("press-4", &["ingest"]);
    let (_, expiring) = stage.create_key("press-4", &json!({ "expires_at": in_seconds(3) }));
    let connected = stage.connect(&expiring).await;
    connected.publish("ingest.press-4.t", "1").await;
    closed(connected).await;
    assert!(stage.refuses(with(&expiring)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_key_died_while_no_gateway_was_at_nats_ends_when_one_is() {
    let mut stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let connected = stage.connect(&source.key).await;
    stage.gateway.terminate();
    let away = stage.setup.clone().set("config", "");
    let next = start_after(&away);
    std::mem::replace(&mut stage.gateway, next).wait();
    stage.revoke("press-4", &source.key_id);
    stage.gateway.terminate();
    let next = start_after(&stage.setup);
    std::mem::replace(&mut stage.gateway, next).wait();
    closed(connected).await;
}

/// Starts a gateway as soon as the one before has left the directory.
fn start_after(setup: &crate::common::Setup) -> crate::common::Gateway {
    wait_for("the data directory to be free", || setup.try_start().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_no_gateway_answers_clients_are_refused_and_those_that_are_in_stay() {
    let mut stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let connected = stage.connect(&source.key).await;
    stage.gateway.terminate();
    wait_for("the gateway to leave NATS", || stage.gateway.output().contains("stopped").then_some(()));
    let asked = Instant::now();
    assert!(stage.refuses(with(&source.key)).await);
    assert!(asked.elapsed() < PATIENCE, "after the server's patience, not the client's");
    stage.assert_no_log_has(&[&source.key]);
    stage.gateway = start_after(&stage.setup);
    let again = stage.connect(&source.key).await;
    assert_eq!(again.publish("ingest.press-4.t", "1").await, 0);
    assert_eq!(connected.publish("ingest.press-4.t", "2").await, 1);
}
