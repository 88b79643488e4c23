//! The validated stream on NATS: every record of the log once, in order and with what is known of it, for
//! any client of NATS; whoever is killed, whatever is away, and never at a device's cost.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::common::load::{Ledger, all_kinds, http_sender, mqtt_sender};
use crate::common::nats::{NatsServer, nats_py};
use crate::common::servers::Servers;
use crate::common::wire::{Version, Wire};
use crate::common::{Gateway, Setup, Source, kept, scratch, wait_for};

/// Room for JetStream to promise on a small disk.
const LOG_BYTES: u64 = 1 << 30;

/// A message as the stream has it.
struct Streamed {
    sequence: u64,
    subject: String,
    headers: HeaderMap,
    payload: Vec<u8>,
}

impl Streamed {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.as_str()).unwrap_or_default()
    }

    fn offset(&self) -> u64 {
        self.header("Headgate-Offset").parse().expect("a number")
    }
}

/// A gateway that sends its stream on to these servers.
fn setup(dir: &Path, urls: &[String]) -> Setup {
    let servers = serde_json::to_string(urls).expect("JSON");
    Setup::on(dir).set("nats.servers", servers).set("log.retention_bytes", LOG_BYTES)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

/// Everything on the stream, in its order. A server that has just been started may need a moment.
fn on_stream(url: &str) -> Vec<Streamed> {
    wait_for("the stream to be readable", || run(read_stream(url)).ok())
}

async fn read_stream(url: &str) -> Result<Vec<Streamed>, async_nats::Error> {
    let client = async_nats::connect(url).await?;
    let stream = jetstream::new(client).get_stream("headgate").await?;
    let count = usize::try_from(stream.cached_info().state.messages)?;
    let mut all = Vec::with_capacity(count);
    if count > 0 {
        let consumer = stream.create_consumer(pull::OrderedConfig::default()).await?;
        let mut messages = consumer.messages().await?.take(count);
        while let Some(message) = messages.next().await {
            let message = message?;
            let sequence = message.info()?.stream_sequence;
            let (subject, headers) = (message.subject.to_string(), message.headers.clone());
            let payload = message.payload.to_vec();
            all.push(Streamed { sequence, subject, headers: headers.unwrap_or_default(), payload });
        }
    }
    Ok(all)
}

/// How many messages the stream has; 0 while there is none.
fn stream_count(url: &str) -> u64 {
    run(async {
        let Ok(client) = async_nats::connect(url).await else { return 0 };
        let stream = jetstream::new(client).get_stream("headgate").await;
        stream.map_or(0, |stream| stream.cached_info().state.messages)
    })
}

/// Waits until everything that the log had when this was called is on the stream.
fn sent(gateway: &Gateway) {
    let end = gateway.metric("headgate_log_next_offset");
    wait_for("the stream to reach the end of the log", || {
        (gateway.metric("headgate_egress_cursor") >= end).then_some(())
    });
}

fn ingest(gateway: &Gateway, source: &Source, topic: &str, payload: &str) {
    let path = format!("/v1/ingest/{}/{topic}", source.id);
    let answer =
        gateway.request("POST", &path, &source.key, &[("content-type", "text/plain")], payload.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// What `/readyz` warns of. Messages have to be taken all the same.
fn warnings(gateway: &Gateway) -> String {
    let answer = gateway.get("/readyz", "");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["warnings"].to_string()
}

fn warned(gateway: &Gateway, of: &str) {
    wait_for(&format!("a warning of {of:?}"), || warnings(gateway).contains(of).then_some(()));
}

/// The stream has exactly what the log of a gateway that has ended has, in order.
fn assert_same_as_log(dir: &Path, stream: &[Streamed]) {
    let log = kept::in_log(dir);
    assert_eq!(stream.len(), log.len(), "as many on the stream as in the log");
    for (record, message) in log.iter().zip(stream) {
        assert_eq!((message.sequence, message.offset()), (record.offset + 1, record.offset));
        assert_eq!(message.subject, format!("stream.{}.{}", record.datasource, record.topic));
        assert!(message.payload == record.payload, "the payload at offset {}", record.offset);
    }
}

/// What a nats-py program printed, line by line.
fn printed(url: &str, program: &str, arguments: &[&str]) -> Vec<Value> {
    let output = nats_py(url, program, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

const SHOW: &str = "
def show(m):
    print(json.dumps({'subject': m.subject, 'payload': m.data.decode(), 'headers': m.headers,
        'seq': m.metadata.sequence.stream}), flush=True)
";

#[test]
fn any_client_of_nats_gets_every_record_in_order_with_what_is_known_of_it() {
    let nats = NatsServer::start();
    let dir = scratch();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    let (press, oven) = (gateway.create("press-4"), gateway.create("oven"));
    ingest(&gateway, &press, "spindle/temp", "1");
    ingest(&gateway, &oven, "v1.2/temp", "2");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &press.key);
    assert_eq!(wire.publish(Version::V5, 1, "spindle/temp", b"3"), 0);
    ingest(&gateway, &press, "spindle/rpm", "4");
    sent(&gateway);

    let all = on_stream(&nats.url());
    let subjects: Vec<_> = all.iter().map(|message| message.subject.as_str()).collect();
    let (temp, rpm) = ("stream.press-4.spindle.temp", "stream.press-4.spindle.rpm");
    assert_eq!(subjects, [temp, "stream.oven.v1//2.temp", temp, rpm]);
    gateway.settle();
    let mut records = gateway.records("press-4");
    records.extend(gateway.records("oven"));
    for record in &records {
        let offset = record["offset"].as_u64().expect("a number");
        let message = all.iter().find(|message| message.offset() == offset).expect("it is on the stream");
        for (header, field) in [
            ("Headgate-Key-Id", "key_id"),
            ("Headgate-Received-At", "received_at"),
            ("Headgate-Transport", "transport"),
        ] {
            assert_eq!(message.header(header), record[field], "{header} at offset {offset}");
        }
        let id = message.header("Nats-Msg-Id");
        assert!(id.ends_with(&format!("-{offset}")) && id.len() > 10, "{id}");
    }
    assert_eq!(all[0].header("Content-Type"), "text/plain");
    assert_eq!(all[2].headers.get("Content-Type"), None, "nobody gave one");

    // A durable consumer of one datasource goes on where it stopped, whoever asks for it.
    let durable = format!(
        "{SHOW}
sub = await js.pull_subscribe('stream.press-4.>', durable='line-3')
for m in await sub.fetch(int(sys.argv[2]), timeout=10):
    show(m)
    await m.ack_sync()
"
    );
    let payloads = |lines: &[Value]| lines.iter().map(|line| line["payload"].clone()).collect::<Vec<_>>();
    let first = printed(&nats.url(), &durable, &["2"]);
    assert_eq!(payloads(&first), ["1", "3"]);
    assert_eq!(first[1]["headers"]["Headgate-Transport"], "mqtt");
    assert_eq!(payloads(&printed(&nats.url(), &durable, &["1"])), ["4"]);

    // Ephemeral ones: from a sequence, from a time, and what comes while they listen.
    let replay = format!(
        "{SHOW}
from nats.js.api import ConsumerConfig, DeliverPolicy
config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=3)
sub = await js.subscribe('stream.>', ordered_consumer=True, config=config)
show(await sub.next_msg(timeout=10))
show(await sub.next_msg(timeout=10))
"
    );
    assert_eq!(payloads(&printed(&nats.url(), &replay, &[])), ["3", "4"]);
    std::thread::sleep(Duration::from_millis(5));
    let time = run(async { time_of(&nats.url(), 2).await });
    let replay = format!(
        "{SHOW}
from nats.js.api import ConsumerConfig, DeliverPolicy
config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_TIME, opt_start_time=sys.argv[2])
sub = await js.pull_subscribe('stream.*.v1//2.temp', config=config)
show((await sub.fetch(1, timeout=10))[0])
"
    );
    assert_eq!(payloads(&printed(&nats.url(), &replay, &[&time])), ["2"]);
    gateway.stop();
    assert_same_subjects_as_log(dir.path(), &all);
}

/// When JetStream got a message, as it says itself.
async fn time_of(url: &str, sequence: u64) -> String {
    let client = async_nats::connect(url).await.expect("connects");
    let stream = jetstream::new(client).get_stream("headgate").await.expect("there is the stream");
    let message = stream.get_raw_message(sequence).await.expect("a message");
    jiff::Timestamp::from_nanosecond(message.time.unix_timestamp_nanos()).expect("a time").to_string()
}

fn assert_same_subjects_as_log(dir: &Path, stream: &[Streamed]) {
    let offsets: Vec<_> = stream.iter().map(Streamed::offset).collect();
    let log: Vec<_> = kept::in_log(dir).iter().map(|record| record.offset).collect();
    assert_eq!(offsets, log);
}

#[test]
fn a_topic_that_is_no_subject_is_left_out_and_counted_and_what_follows_it_comes() {
    let nats = NatsServer::with("max_payload: 64KB\n");
    let dir = scratch();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let large = vec![b'x'; 70_000];
    for (id, topic, payload) in [
        (1, "a b", &b"1"[..]),
        (2, "ok", b"2"),
        (3, "a//b", b"3"),
        (4, "large", &large),
        (5, "ok", b"5"),
        (6, "/x", b"6"),
    ] {
        assert_eq!(wire.publish(Version::V5, id, topic, payload), 0);
    }
    sent(&gateway);
    let payloads = |url: &str| on_stream(url).iter().map(|m| m.payload.clone()).collect::<Vec<_>>();
    assert_eq!(payloads(&nats.url()), [b"2", b"5"]);
    let skipped = |gateway: &Gateway, reason: &str| {
        gateway.metric(&format!("headgate_egress_skipped_total{{reason=\"{reason}\"}}"))
    };
    assert_eq!((skipped(&gateway, "topic"), skipped(&gateway, "size")), (3.0, 1.0));
    assert_eq!(gateway.metric("headgate_egress_sent_total"), 2.0);
    assert_eq!(gateway.metric("headgate_egress_lag_records"), 0.0);
    gateway.says("cannot go to the stream on NATS");
    // The last record of the log is one that cannot go: a start does not stumble over it.
    gateway.kill();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    sent(&gateway);
    ingest(&gateway, &source, "ok", "7");
    sent(&gateway);
    assert_eq!(payloads(&nats.url()), [b"2", b"5", b"7"]);
}

#[test]
fn what_is_in_quarantine_is_not_on_the_stream() {
    let mut nats = NatsServer::start();
    let dir = scratch();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    let source = gateway.create("press-4");
    let leaked = gateway.create("oven");
    let schema = json!({"schema": {"type": "number"}}).to_string();
    let json = [("content-type", "application/json")];
    let path = "/v1/datasources/press-4/schema";
    let answer = gateway.request("PUT", path, &gateway.admin_key(), &json, schema.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"1"), 0);
    assert_eq!(wire.publish(Version::V5, 2, "t", b"\"refused\""), 0x99);
    assert_eq!(wire.publish(Version::V5, 3, "t", b"3"), 0);
    sent(&gateway);
    nats.kill();
    warned(&gateway, "NATS");
    ingest(&gateway, &leaked, "t", "leaked");
    let path = format!("/v1/datasources/oven/keys/{}/quarantine", leaked.key_id);
    let answer = gateway.post(&path, &gateway.admin_key(), &json!({"since": "2020-01-01T00:00:00Z"}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(wire.publish(Version::V5, 4, "t", b"4"), 0);
    nats.restart();
    sent(&gateway);
    let payloads: Vec<_> = on_stream(&nats.url()).iter().map(|message| message.payload.clone()).collect();
    assert_eq!(payloads, [b"1", b"3", b"4"]);
}

#[test]
fn whatever_is_killed_the_stream_has_each_record_once_and_in_order() {
    const ROUNDS: usize = 7;
    let seed: u64 = std::env::var("CRASH_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| rand::make_rng::<SmallRng>().random());
    eprintln!("CRASH_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut nats = NatsServer::start();
    let dir = scratch();
    let setup = setup(dir.path(), &[nats.url()]);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    gateway.kill();

    let ledger = Arc::new(Ledger::default());
    for round in 0..ROUNDS {
        let mut pause = |from, to| std::thread::sleep(Duration::from_millis(random.random_range(from..to)));
        let gateway = setup.start();
        let (before, on_stream) = (ledger.acked(), stream_count(&nats.url()));
        let senders = all_kinds(&gateway, &source, &ledger);
        wait_for("the first ack of the round", || (ledger.acked() > before).then_some(()));
        wait_for("the stream to grow", || (stream_count(&nats.url()) > on_stream).then_some(()));
        pause(20, 200);
        match round % 3 {
            0 => {}
            1 => {
                nats.kill();
                pause(0, 300);
                nats.restart();
                pause(0, 300);
            }
            _ => {
                nats.kill();
                pause(0, 50);
            }
        }
        gateway.kill();
        if round % 3 == 2 {
            nats.restart();
        }
        for sender in senders {
            sender.join().expect("a sender saw only acks, and then the end");
        }
    }
    let gateway = setup.start();
    sent(&gateway);
    gateway.stop();
    let stream = on_stream(&nats.url());
    eprintln!("{} acknowledged, {} on the stream", ledger.acked(), stream.len());
    assert!(stream.len() > ROUNDS * 100, "the gateway was under load: {}", stream.len());
    assert_same_as_log(dir.path(), &stream);
}

#[test]
fn in_a_cluster_the_stream_survives_the_end_of_any_server() {
    let mut servers = Servers::start();
    let urls = servers.urls();
    let dir = scratch();
    let gateway = setup(dir.path(), &urls).set("nats.stream.replicas", 3).start();
    let source = gateway.create("press-4");
    let ledger = Arc::new(Ledger::default());
    let senders = [
        http_sender(&gateway, &source, &ledger, 1),
        http_sender(&gateway, &source, &ledger, 10),
        mqtt_sender(&gateway, &source, &ledger, Version::V5, 1),
    ];
    // Each of them is the leader of something, and the client is connected to one.
    for server in 0..3 {
        let sent = gateway.metric("headgate_egress_sent_total");
        wait_for("the stream to grow", || {
            (gateway.metric("headgate_egress_sent_total") > sent + 100.0).then_some(())
        });
        servers.kill(server);
        std::thread::sleep(Duration::from_millis(400));
        servers.restart(server);
        servers.settle();
    }
    gateway.terminate();
    for sender in senders {
        sender.join().expect("a sender saw only acks, and then the end");
    }
    assert!(gateway.wait().status.success(), "it drains");
    let gateway = setup(dir.path(), &urls).set("nats.stream.replicas", 3).start();
    sent(&gateway);
    gateway.stop();
    assert_same_as_log(dir.path(), &on_stream(&urls[0]));
}

#[test]
fn nats_that_is_away_is_a_warning_and_no_device_notices() {
    let mut nats = NatsServer::start();
    let url = nats.url();
    nats.kill();
    let dir = scratch();
    let gateway = setup(dir.path(), std::slice::from_ref(&url)).start();
    let source = gateway.create("press-4");
    for n in 0..100 {
        ingest(&gateway, &source, "t", &n.to_string());
    }
    warned(&gateway, &url);
    assert_eq!(gateway.metric("headgate_egress_lag_records"), 100.0);
    nats.restart();
    sent(&gateway);
    assert_eq!(on_stream(&url).len(), 100);
    wait_for("no warning", || (warnings(&gateway) == "[]").then_some(()));
    // Neither does one that ends have to wait for NATS.
    nats.kill();
    ingest(&gateway, &source, "t", "100");
    warned(&gateway, "NATS");
    let begun = std::time::Instant::now();
    gateway.stop();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_log_id_that_cannot_be_read_is_a_warning_and_no_device_notices() {
    let (dir, server) = (scratch(), NatsServer::start());
    let path = dir.path().join("log.id");
    std::fs::create_dir(&path).expect("made");
    let gateway = setup(dir.path(), &[server.url()]).start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, "t", "1");
    warned(&gateway, "log.id");
    std::fs::remove_dir(&path).expect("removed");
    sent(&gateway);
    assert_eq!(on_stream(&server.url()).len(), 1);
}

#[test]
fn a_stream_that_is_configured_differently_is_left_as_it_is() {
    let nats = NatsServer::start();
    let made = nats_py(
        &nats.url(),
        "await js.add_stream(name='headgate', subjects=['stream.>'], retention='workqueue')\n",
        &[],
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let dir = scratch();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, "t", "1");
    warned(&gateway, "its retention is not by limits");
    assert!(warnings(&gateway).contains("its subjects are"), "{}", warnings(&gateway));
    assert_eq!(stream_count(&nats.url()), 0);

    // Limits of its own are the operator's business.
    let remade = nats_py(
        &nats.url(),
        "await js.delete_stream('headgate')\n\
         await js.add_stream(name='headgate', subjects=['quarantine.>', 'stream.>'], max_msgs=1)\n",
        &[],
    );
    assert!(remade.status.success(), "{}", String::from_utf8_lossy(&remade.stderr));
    ingest(&gateway, &source, "t", "2");
    sent(&gateway);
    let kept = on_stream(&nats.url());
    assert_eq!(kept.iter().map(|message| (message.sequence, message.offset())).collect::<Vec<_>>(), [(2, 1)]);
}

#[test]
fn a_stream_of_another_log_gets_nothing_of_this_one() {
    let nats = NatsServer::start();
    let (dir, other) = (scratch(), scratch());
    let setup_one = setup(dir.path(), &[nats.url()]);
    let gateway = setup_one.start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, "t", "1");
    sent(&gateway);
    gateway.stop();
    let earlier = scratch();
    copy(dir.path(), earlier.path());

    let gateway = setup_one.start();
    ingest(&gateway, &source, "t", "2");
    ingest(&gateway, &source, "t", "3");
    sent(&gateway);
    gateway.stop();

    let gateway = setup(other.path(), &[nats.url()]).start();
    warned(&gateway, "was not sent by this log");
    gateway.stop();

    // The same log, put back to an earlier state: it ends before the stream, and later it differs.
    let gateway = setup(earlier.path(), &[nats.url()]).start();
    warned(&gateway, "the log ends before");
    ingest(&gateway, &source, "t", "not 2");
    ingest(&gateway, &source, "t", "not 3");
    ingest(&gateway, &source, "t", "4");
    warned(&gateway, "another record at offset 2");
    assert_eq!(stream_count(&nats.url()), 3);

    // Deleted, it is made again of what the log has.
    let deleted = nats_py(&nats.url(), "await js.delete_stream('headgate')\n", &[]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    sent(&gateway);
    gateway.stop();
    assert_same_as_log(earlier.path(), &on_stream(&nats.url()));
}

/// Runs the command on files alone.
fn headgate(arguments: &[&str]) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_headgate")).args(arguments).output();
    let output = output.expect("headgate runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two histories from one backup would have two records at one offset, under one `Nats-Msg-Id`.
#[test]
fn a_restored_log_goes_on_where_the_stream_is_and_mixes_nothing_into_one_that_is_further() {
    let nats = NatsServer::start();
    let (dir, backups) = (scratch(), scratch());
    let gateway = Setup::embedded_on(dir.path()).set("nats.servers", format!("[\"{}\"]", nats.url()));
    let gateway = gateway.set("log.retention_bytes", LOG_BYTES).start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, "t", "0");
    ingest(&gateway, &source, "t", "1");
    sent(&gateway);
    gateway.stop();
    let text = |name: &str| backups.path().join(name).to_str().expect("text").to_owned();
    headgate(&["backup", &text("b"), "--data-dir", dir.path().to_str().expect("text")]);
    let restored = |name: &str| {
        headgate(&["restore", &text("b"), "--data-dir", &text(name)]);
        setup(&backups.path().join(name), &[nats.url()]).start()
    };
    let id_in = |dir: &Path| std::fs::read_to_string(dir.join("log.id")).expect("an id");

    // The stream has what the backup has: the restored log goes on with it, under an id of its own.
    let gateway = restored("one");
    assert_ne!(id_in(gateway.dir()), id_in(dir.path()));
    ingest(&gateway, &source, "t", "2 of one");
    sent(&gateway);
    gateway.stop();
    assert_same_as_log(&backups.path().join("one"), &on_stream(&nats.url()));
    let ids: Vec<_> = on_stream(&nats.url()).iter().map(|m| m.header("Nats-Msg-Id").to_owned()).collect();
    assert!(ids[1].starts_with(id_in(dir.path()).trim()), "{ids:?}");
    assert!(ids[2].starts_with(id_in(&backups.path().join("one")).trim()), "{ids:?}");

    // Another one does not know what the first has sent.
    let gateway = restored("two");
    warned(&gateway, "was not sent by this log");
    gateway.stop();

    // Of the log that it comes from it knows how far it has the same.
    headgate(&["backup", &text("later"), "--data-dir", &text("one")]);
    let gateway = setup(&backups.path().join("one"), &[nats.url()]).start();
    ingest(&gateway, &source, "t", "3 of one");
    sent(&gateway);
    gateway.stop();
    headgate(&["restore", &text("later"), "--data-dir", &text("three")]);
    let gateway = setup(&backups.path().join("three"), &[nats.url()]).start();
    for _ in 0..3 {
        ingest(&gateway, &source, "t", "of three");
    }
    warned(&gateway, "of the log that this one was restored from, and this one has its own from offset 3 on");
    assert_eq!(stream_count(&nats.url()), 4);
    let deleted = nats_py(&nats.url(), "await js.delete_stream('headgate')\n", &[]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    sent(&gateway);
    gateway.stop();
    assert_same_as_log(&backups.path().join("three"), &on_stream(&nats.url()));
}

#[test]
fn what_was_deleted_from_the_stream_is_not_sent_again_while_the_gateway_runs() {
    let nats = NatsServer::start();
    let dir = scratch();
    let gateway = setup(dir.path(), &[nats.url()]).start();
    let source = gateway.create("press-4");
    for n in 0..3 {
        ingest(&gateway, &source, "t", &n.to_string());
    }
    sent(&gateway);
    run(async {
        let client = async_nats::connect(nats.url()).await.expect("connects");
        let stream = jetstream::new(client).get_stream("headgate").await.expect("there is the stream");
        stream.delete_message(3).await.expect("deleted");
    });
    ingest(&gateway, &source, "t", "3");
    sent(&gateway);
    let offsets = |url: &str| on_stream(url).iter().map(Streamed::offset).collect::<Vec<_>>();
    assert_eq!(offsets(&nats.url()), [0, 1, 3]);
    let purged = nats_py(&nats.url(), "await js.purge_stream('headgate')\n", &[]);
    assert!(purged.status.success(), "{}", String::from_utf8_lossy(&purged.stderr));
    ingest(&gateway, &source, "t", "4");
    sent(&gateway);
    assert_eq!(offsets(&nats.url()), [4]);
}

#[test]
fn a_datasource_that_is_created_again_begins_empty_on_the_stream() {
    let (dir, server) = (scratch(), NatsServer::start());
    let gateway = setup(dir.path(), &[server.url()]).start();
    let (old, other) = (gateway.create("press-4"), gateway.create("press-5"));
    for (source, payload) in [(&old, "1"), (&other, "2"), (&old, "3")] {
        ingest(&gateway, source, "t", payload);
    }
    sent(&gateway);
    gateway.delete("press-4");
    let payloads = || -> Vec<String> {
        let stream = on_stream(&server.url());
        stream.iter().map(|streamed| String::from_utf8_lossy(&streamed.payload).into_owned()).collect()
    };
    // Counted first: what is removed while it is read would be waited for.
    let has_only = |count| {
        wait_for("the stream to have that many", || (stream_count(&server.url()) == count).then_some(()))
    };
    has_only(1);
    assert_eq!(payloads(), ["2"]);
    let new = gateway.create("press-4");
    ingest(&gateway, &new, "t", "4");
    sent(&gateway);
    gateway.kill();
    // The next run does not know what was removed already, and leaves what came since.
    let gateway = setup(dir.path(), &[server.url()]).start();
    ingest(&gateway, &new, "t", "5");
    sent(&gateway);
    has_only(3);
    assert_eq!(payloads(), ["2", "4", "5"]);
    gateway.delete("press-4");
    has_only(1);
    assert_eq!(payloads(), ["2"]);
}

/// Only its leader says what such a stream has, as it does for servers that lag behind it.
#[test]
fn a_stream_without_direct_gets_keeps_nothing_of_a_deleted_datasource() {
    let (dir, server) = (scratch(), NatsServer::start());
    let made = nats_py(
        &server.url(),
        "await js.add_stream(name='headgate', subjects=['quarantine.>', 'stream.>'], allow_direct=False)\n",
        &[],
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let gateway = setup(dir.path(), &[server.url()]).start();
    let (old, other) = (gateway.create("press-4"), gateway.create("press-5"));
    for (source, payload) in [(&old, "1"), (&other, "2"), (&old, "3")] {
        ingest(&gateway, source, "t", payload);
    }
    sent(&gateway);
    gateway.kill();
    // Deleted and created again while nobody tells the stream.
    let gateway = Setup::on(dir.path()).set("log.retention_bytes", LOG_BYTES).start();
    gateway.delete("press-4");
    let new = gateway.create("press-4");
    ingest(&gateway, &new, "t", "4");
    gateway.kill();
    let gateway = setup(dir.path(), &[server.url()]).start();
    sent(&gateway);
    let payloads = || -> Vec<String> {
        let stream = on_stream(&server.url());
        stream.iter().map(|streamed| String::from_utf8_lossy(&streamed.payload).into_owned()).collect()
    };
    assert_eq!(payloads(), ["2", "4"]);
    gateway.delete("press-4");
    wait_for("the stream to have one message", || (stream_count(&server.url()) == 1).then_some(()));
    assert_eq!(payloads(), ["2"]);
}

#[test]
fn what_leaves_the_log_unsent_stops_no_device_and_is_told() {
    let mut nats = NatsServer::start();
    let dir = scratch();
    let setup = setup(dir.path(), &[nats.url()])
        .set("log.segment_bytes", 1 << 20)
        .set("log.retention_bytes", 4 << 20);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, "t", "first");
    sent(&gateway);
    nats.kill();
    let payload = "x".repeat(50_000);
    let path = format!("/v1/ingest/{}/t", source.id);
    for _ in 0..200 {
        // Storage may need a moment to let go of what it has; NATS is not waited for.
        wait_for("the message to be taken", || {
            let answer = gateway.request("POST", &path, &source.key, &[], payload.as_bytes());
            (answer.status == 200).then_some(())
        });
    }
    let first = gateway.metric("headgate_log_first_offset");
    assert!(first > 1.0, "the log has let go of what was not sent");
    nats.restart();
    sent(&gateway);
    let stream = on_stream(&nats.url());
    assert_eq!((stream[0].offset(), stream[1].sequence), (0, 2));
    let missing = stream[1].offset() - 1;
    assert!(missing > 0);
    assert_eq!(stream[1].header("Headgate-Skipped"), missing.to_string());
    assert!(stream[2..].iter().all(|message| message.header("Headgate-Skipped").is_empty()));
    assert!(stream[1..].windows(2).all(|pair| pair[1].offset() == pair[0].offset() + 1), "no other gap");
    let gone = gateway.metric("headgate_egress_skipped_total{reason=\"gone\"}");
    assert_eq!(gone.to_string(), missing.to_string());
    gateway.says("records have left the log before NATS took them");
}

/// Copies a directory with all that is in it.
fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("its type").is_dir() {
            std::fs::create_dir_all(&target).expect("made");
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}
