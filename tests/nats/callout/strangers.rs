//! Who has no good key stays out, and who has one cannot do what is not its own.

use std::time::Instant;

use async_nats::ConnectOptions;
use futures_util::StreamExt;
use headgate::testing::ApiKey;

use super::stage::{SILENCE, Stage, reached};
use crate::common::{PATIENCE, wait_for};

fn with(key: &str) -> ConnectOptions {
    ConnectOptions::with_user_and_password("device".to_owned(), key.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_refuses_whoever_has_no_good_key_and_the_gateway_says_why() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    stage.connect(&source.key).await;
    let unknown = ApiKey::generate().expose().to_owned();
    assert!(stage.refuses(with(&unknown)).await);
    assert!(stage.refuses(ConnectOptions::with_token(unknown.clone())).await);
    assert!(stage.refuses(with("hunter2")).await);
    assert!(stage.refuses(ConnectOptions::new()).await);
    // Two keys: nobody guesses which is meant.
    let two = ConnectOptions::with_user_and_password(source.key.clone(), unknown.clone());
    assert!(stage.refuses(two).await);
    let refusals = stage.gateway.get("/v1/refusals", &stage.gateway.admin_key()).text();
    for cause in ["unknown_key", "malformed_key", "no_key", "ambiguous_key"] {
        assert!(refusals.contains(cause), "{cause} in {refusals}");
    }
    assert!(refusals.contains("127.0.0.1") && !refusals.contains(&unknown[4..20]), "{refusals}");
    // What is presented as user name and refused is in nats-server's own log, so not this one.
    assert!(!stage.nats.log().contains(&unknown));
    assert!(!stage.gateway.output().contains(&unknown[4..20]) && !stage.gateway.output().contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_fails_too_often_is_told_to_wait_and_a_good_key_gets_in_from_there() {
    let stage = Stage::with(|setup| setup.set("auth.failures_burst", 3));
    let source = stage.create("press-4", &["ingest"]);
    stage.connect(&source.key).await;
    for _ in 0..5 {
        assert!(stage.refuses(with(ApiKey::generate().expose())).await);
    }
    let refusals = stage.gateway.get("/v1/refusals", &stage.gateway.admin_key()).text();
    assert!(refusals.contains("too_many_failures"), "{refusals}");
    stage.connect(&source.key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_publishes_to_its_own_datasource_alone_and_never_into_the_stream() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let other = stage.create("press-5", &["ingest", "subscribe"]);
    let mut victim = stage.connect(&other.key).await;
    let mut seen = victim.client.subscribe("stream.press-5.>").await.expect("subscribed");
    victim.reached().await;
    let backend = stage.headgate().await;
    let mut stream = backend.subscribe("stream.press-5.>").await.expect("subscribed");
    reached(&backend).await;

    let connected = stage.connect(&source.key).await;
    for subject in [
        "ingest.press-5.t",
        "stream.press-4.t",
        "stream.press-5.t",
        "denied.press-5.t",
        "quarantine.press-5.t",
    ] {
        assert_eq!(connected.refusal(subject).await, None, "{subject}: nobody hears it");
    }
    for subject in
        ["$JS.API.INFO", "$JS.API.STREAM.PURGE.headgate", "$KV.headgate-registry.x", "$SYS.REQ.USER.AUTH"]
            .into_iter()
            // Acknowledgements of consumers, in both forms of nats-server 2.15.
            .chain(["$JS.ACK.headgate.c.1.1.1.1.0", "$JS.ACK._.ABCDEFGH.headgate.c.1.1.1.1.0"])
    {
        assert_eq!(connected.refusal(subject).await, None, "{subject}: nobody hears it");
    }
    // An answer goes where its sender says, with the gateway's permissions: not into the stream.
    for reply in ["stream.press-5.t", "ingest.press-5.t", "$JS.API.STREAM.DELETE.headgate"] {
        let sent = connected.client.publish_with_reply("ingest.press-4.t", reply, "1".into()).await;
        sent.expect("sent");
    }
    connected.publish("ingest.press-4.t", "1").await;
    for place in [&mut seen, &mut stream] {
        assert!(tokio::time::timeout(SILENCE, place.next()).await.is_err(), "it was heard");
    }
    assert!(stage.gateway.records("press-5").is_empty());
    wait_for("the records of its own", || (stage.gateway.records("press-4").len() >= 4).then_some(()));
}

/// The account hides the reply subject from the gateway: the message was kept, the answer went nowhere, and the client
/// sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_inbox_it_may_not_subscribe_to_is_refused_before_anything_is_kept() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let own = |prefix: &str| {
        with(&source.key)
            .custom_inbox_prefix(prefix)
            .request_timeout(Some(std::time::Duration::from_millis(500)))
    };
    let deaf = stage.connect_as(own("MYAPP")).await;
    for _ in 0..2 {
        assert_eq!(deaf.refusal("ingest.press-4.t").await, None, "no answer can come");
    }
    stage.gateway.says("reply_subject");
    assert!(stage.gateway.records("press-4").is_empty());
    // One that nobody waits for is kept, and so is one of the key's own inbox.
    deaf.client.publish("ingest.press-4.t", "1".into()).await.expect("sent");
    let hears = stage.connect_as(own(&format!("_INBOX_{}", source.key_id))).await;
    hears.publish("ingest.press-4.t", "2").await;
    wait_for("the records", || (stage.gateway.records("press-4").len() == 2).then_some(()));
    let refusals = stage.gateway.get("/v1/refusals?cause=reply_subject", &stage.gateway.admin_key()).text();
    assert!(refusals.contains(&source.key_id), "{refusals}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_configured_inbox_prefix_is_answered() {
    let stage = Stage::with(|setup| setup.set("nats.reply_prefixes", "_INBOX,MYAPP"));
    let source = stage.create("press-4", &["ingest"]);
    let connected = stage.connect_as(with(&source.key).custom_inbox_prefix("MYAPP")).await;
    connected.publish("ingest.press-4.t", "1").await;
}

/// They were connections of a nats-server, and none of a key's.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_are_let_in_count_among_the_connections_of_their_key() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let limits = serde_json::json!({ "limits": { "connections": { "max": 2 } } });
    let body = limits.to_string();
    let admin = stage.gateway.admin_key();
    let changed = stage.gateway.request(
        "PATCH",
        &path,
        &admin,
        &[("content-type", "application/json")],
        body.as_bytes(),
    );
    assert_eq!(changed.status, 200, "{}", changed.text());
    let first = stage.connect(&source.key).await;
    let second = stage.connect(&source.key).await;
    second.publish("ingest.press-4.t", "1").await;
    assert!(stage.refuses(with(&source.key)).await, "a third one");
    let refusals = stage.gateway.get("/v1/refusals?cause=limit_connections", &admin).text();
    assert!(refusals.contains(&source.key_id), "{refusals}");
    drop(first);
    // Its place is free once its server has said that it has left.
    let deadline = Instant::now() + PATIENCE;
    let third = loop {
        match with(&source.key).connect(stage.nats.url()).await {
            Ok(client) if client.flush().await.is_ok() => break client,
            _ => assert!(Instant::now() < deadline, "the place of one that has left stays taken"),
        }
    };
    // A key that ends takes none of them with it into the next wait.
    let begun = Instant::now();
    stage.revoke("press-4", &source.key_id);
    assert!(begun.elapsed() < std::time::Duration::from_secs(4), "{:?}", begun.elapsed());
    drop(third);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_attests_counts_on_the_gateways_side_of_the_import_alone() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    stage.connect(&source.key).await;
    // A client of the account in which the header front listens: there anybody could write the header.
    let backend = stage.headgate().await;
    let mut headers = async_nats::HeaderMap::new();
    let said = format!(r#"{{"acc":"APP","user":"press-4/{}"}}"#, source.key_id);
    headers.append("Nats-Request-Info", said.as_str());
    let asked = backend.request_with_headers("ingest.press-4.t", headers, "1".into());
    let answer = tokio::time::timeout(std::time::Duration::from_secs(5), asked).await;
    let answer = answer.expect("in time").expect("an answer");
    let code = answer.headers.as_ref().and_then(|headers| headers.get("Nats-Service-Error-Code"));
    assert_eq!(code.map(|code| code.as_str()), Some("401"));
    assert!(stage.gateway.records("press-4").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_the_curve_seed_says_why_nobody_gets_in() {
    let stage = Stage::without("xkey_seed_file");
    let source = stage.create("press-4", &["ingest"]);
    // It says so when it is asked, and it may not be listening yet when the first client comes.
    let deadline = Instant::now() + 3 * PATIENCE;
    while !stage.gateway.output().contains("it is encrypted") {
        assert!(Instant::now() < deadline, "the gateway does not say so");
        assert!(stage.refuses(with(&source.key)).await);
    }
    stage.assert_no_log_has(&[&source.key]);
}
