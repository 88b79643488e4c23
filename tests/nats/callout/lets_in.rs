//! Who has a key gets in, and what it publishes is a record of that key.

use std::process::Command;

use async_nats::{ConnectOptions, HeaderMap};
use futures_util::StreamExt;

use super::stage::{SILENCE, Stage};
use crate::common::{PATIENCE, python};

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_as_user_name_as_password_and_as_token_and_its_records_name_it() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let key = || source.key.clone();
    stage.connect(&source.key).await;
    let ways = [
        ConnectOptions::with_user_and_password("device".to_owned(), key()),
        ConnectOptions::with_user_and_password(key(), String::new()),
        ConnectOptions::with_token(key()),
    ];
    for (n, way) in ways.into_iter().enumerate() {
        let connected = stage.connect_as(way).await;
        assert_eq!(connected.publish("ingest.press-4.spindle.temp", "21.5").await, n as u64);
    }
    for record in stage.gateway.stored("press-4", 3) {
        assert_eq!(record["key_id"], source.key_id.as_str());
        assert_eq!((&record["topic"], &record["transport"]), (&"spindle/temp".into(), &"nats".into()));
    }
    stage.assert_no_log_has(&[&source.key, &source.key[4..20]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_keys_of_one_datasource_are_told_apart_and_none_can_pass_for_the_other() {
    let stage = Stage::set();
    let first = stage.create("press-4", &["ingest"]);
    let (second_id, second) = stage.create_key("press-4", &serde_json::json!({}));
    let honest = stage.connect(&first.key).await;
    let liar = stage.connect(&second).await;
    honest.publish("ingest.press-4.t", "1").await;
    let said = format!(r#"{{"acc":"APP","user":"press-4/{}"}}"#, first.key_id);
    for name in ["Nats-Request-Info", "nats-request-info", "Headgate-Key-Id"] {
        let mut headers = HeaderMap::new();
        headers.append(name, said.as_str());
        headers.append(name, said.as_str());
        let subject = "ingest.press-4.t".to_owned();
        liar.client.request_with_headers(subject, headers, "2".into()).await.expect("answered");
    }
    let records = stage.gateway.stored("press-4", 4);
    let key_ids: Vec<_> = records.iter().map(|record| record["key_id"].as_str().expect("one")).collect();
    assert_eq!(key_ids, [first.key_id.as_str(), &second_id, &second_id, &second_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_nobody_waits_for_is_let_in_too() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    let connected = stage.connect(&source.key).await;
    connected.client.publish("ingest.press-4.t", "1".into()).await.expect("sent");
    connected.client.flush().await.expect("flushed");
    assert_eq!(stage.gateway.stored("press-4", 1)[0]["key_id"], source.key_id.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_sees_its_datasource_and_no_other() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["subscribe"]);
    let mut connected = stage.connect(&source.key).await;
    let backend = stage.headgate().await;
    let mut own = connected.client.subscribe("stream.press-4.>").await.expect("subscribed");
    let mut others = Vec::new();
    for subject in ["stream.press-5.>", "stream.*.t", "stream.>", ">", "ingest.press-4.>", "$JS.>"] {
        others.push(connected.client.subscribe(subject).await.expect("asked"));
    }
    connected.reached().await;
    // As the gateway sends records on: what is tried here is who sees them.
    for subject in ["stream.press-5.t", "stream.press-4.t"] {
        backend.publish(subject, "1".into()).await.expect("sent");
    }
    let seen = tokio::time::timeout(PATIENCE, own.next()).await.expect("in time").expect("a record");
    assert_eq!(seen.subject.as_str(), "stream.press-4.t");
    for other in &mut others {
        assert!(tokio::time::timeout(SILENCE, other.next()).await.is_err(), "it sees too much");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_for_all_datasources_publishes_to_each() {
    let stage = Stage::set();
    stage.create("press-4", &["ingest"]);
    stage.create("press-5", &["ingest"]);
    let all = serde_json::json!({ "scopes": ["ingest"] });
    let (key_id, key) = stage.create_key("*", &all);
    let connected = stage.connect(&key).await;
    for (offset, datasource) in ["press-4", "press-5"].into_iter().enumerate() {
        let subject = format!("ingest.{datasource}.t");
        assert_eq!(connected.publish(&subject, "1").await, offset as u64);
        assert_eq!(stage.gateway.stored(datasource, 1)[0]["key_id"], key_id.as_str());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_works_on_nats_servers_websocket_and_mqtt_ports() {
    let stage = Stage::set();
    let source = stage.create("press-4", &["ingest"]);
    stage.connect(&source.key).await;
    let program = "import asyncio, sys\nimport nats\n\
                   async def main():\n    nc = await nats.connect(sys.argv[1], user='device', password=sys.argv[2])\n    \
                   print((await nc.jetstream().publish('ingest.press-4.ws', b'1')).seq)\n    await nc.close()\n\
                   asyncio.run(main())\n";
    let websocket = format!("ws://127.0.0.1:{}", stage.websocket);
    let output = python(program, &[&websocket, &source.key]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0");
    for qos in ["0", "1"] {
        let sent = Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &stage.mqtt.to_string(), "-u", "device", "-P", &source.key])
            .args(["-t", "ingest/press-4/mqtt/temp", "-m", "21.5", "-q", qos])
            .output()
            .expect("mosquitto_pub runs");
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    }
    let records = stage.gateway.stored("press-4", 3);
    let topics: Vec<_> = records.iter().map(|record| record["topic"].as_str().expect("one")).collect();
    assert_eq!(topics, ["ws", "mqtt/temp", "mqtt/temp"]);
    assert!(records.iter().all(|record| record["key_id"] == source.key_id.as_str()));
    stage.assert_no_log_has(&[&source.key]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_may_have_an_inbox_of_its_own_and_can_be_kept_to_it() {
    let stage = Stage::with(|setup| setup.set("nats.callout.shared_inbox", false));
    let source = stage.create("press-4", &["ingest"]);
    let other = stage.create("press-5", &["ingest"]);
    let with = |key: &str, prefix: String| {
        ConnectOptions::with_user_and_password("device".to_owned(), key.to_owned())
            .custom_inbox_prefix(prefix)
    };
    let own = stage.connect_as(with(&source.key, format!("_INBOX_{}", source.key_id))).await;
    let mut spy = stage.connect(&other.key).await;
    let mut seen = Vec::new();
    for subject in [format!("_INBOX_{}.>", source.key_id), "_INBOX.>".to_owned(), "_R_.>".to_owned()] {
        seen.push(spy.client.subscribe(subject).await.expect("asked"));
    }
    spy.reached().await;
    own.publish("ingest.press-4.t", "1").await;
    for one in &mut seen {
        assert!(tokio::time::timeout(SILENCE, one.next()).await.is_err(), "an answer to somebody else");
    }
}

/// nats-server 2.15 has a second form of `$JS.ACK`: what only the first one is allowed is never acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn the_backend_that_setup_shows_acknowledges_in_both_forms() {
    for flags in ["", "feature_flags { js_ack_fc_v2: true }\n"] {
        let stage = Stage::with_server(|text| {
            let mut inside = false;
            let lines = text.lines().map(|line| {
                inside = inside || line.contains("# { user: \"line-4\"");
                let line = if inside { line.replacen("# ", "", 1) } else { line.to_owned() };
                inside = inside && !line.ends_with("} }");
                line + "\n"
            });
            let text: String = lines.collect();
            flags.to_owned()
                + &text.replace("password: \"…\", permissions", "password: \"line-4\", permissions").replace(
                    "\"headgate\", \"callout\", \"system\" ]",
                    "\"headgate\", \"callout\", \"system\", \"line-4\" ]",
                )
        });
        let source = stage.create("press-4", &["ingest"]);
        let connected = stage.connect(&source.key).await;
        connected.publish("ingest.press-4.t", "1").await;
        let js = async_nats::jetstream::new(stage.headgate().await);
        let stream = js.get_stream("headgate").await.expect("the stream");
        let config = async_nats::jetstream::consumer::pull::Config {
            durable_name: Some("line-4".to_owned()),
            ..Default::default()
        };
        stream.create_consumer(config).await.expect("made");
        let options =
            async_nats::ConnectOptions::with_user_and_password("line-4".to_owned(), "line-4".to_owned());
        let backend = options.connect(stage.nats.url()).await.expect("a user of the configuration");
        let js = async_nats::jetstream::new(backend);
        let stream = js.get_stream("headgate").await.expect("it may look");
        let consumer: async_nats::jetstream::consumer::PullConsumer =
            stream.get_consumer("line-4").await.expect("it may look");
        let mut messages =
            consumer.fetch().max_messages(1).expires(PATIENCE).messages().await.expect("asked");
        let message = messages.next().await.expect("one").expect("a message");
        let reply = message.reply.as_ref().expect("a place to acknowledge").to_string();
        assert_eq!(reply.split('.').count() > 9, !flags.is_empty(), "{reply}");
        message.double_ack().await.expect("it may acknowledge");
        drop(stage);
    }
}
