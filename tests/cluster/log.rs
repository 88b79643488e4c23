//! A gateway whose log is in JetStream, and a NATS that is not there: at the start, for a while, or with
//! limits of its own.

use std::net::TcpListener;
use std::time::Duration;

use crate::common::cluster::log_at;
use crate::common::kept::{in_storage, records_of};
use crate::common::load::{Ledger, all_kinds, number};
use crate::common::nats::{NatsServer, nats_py};
use crate::common::wire::{Next, PUBACK, Version, Wire, publish};
use crate::common::{Setup, http, http_agent, scratch, signal, wait_for};
use serde_json::json;

/// A gateway of a cluster, on this server.
fn setup(dir: &std::path::Path, server: &NatsServer) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", server.url()))
}

#[test]
fn a_gateway_that_starts_without_nats_says_what_it_waits_for_and_serves_once_that_is_there() {
    let dir = scratch();
    let mut server = NatsServer::start();
    server.kill();
    // Free until just now: where it serves is said only once it does.
    let free = || TcpListener::bind("127.0.0.1:0").and_then(|s| s.local_addr()).expect("a free port");
    let (http_addr, mqtt_addr) = (free(), free());
    let setup = setup(dir.path(), &server).set("http.listen", http_addr).set("mqtt.listen", mqtt_addr);
    let (started, starting) = std::sync::mpsc::channel();
    std::thread::spawn(move || drop(started.send(setup.start())));
    let agent = http_agent();
    let get = |path: &str| http(&agent, http_addr, "GET", path, "", &[], b"");
    wait_for("HTTP to be served", || get("/livez").ok().filter(|answer| answer.status == 200));
    let ready = get("/readyz").expect("an answer");
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("unready")));
    assert!(ready.text().contains("NATS at nats://127.0.0.1"), "{}", ready.text());
    for path in ["/v1/datasources", "/metrics", "/"] {
        let answer = get(path).expect("an answer");
        assert_eq!(answer.status, 503, "{path}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(answer.headers["retry-after"], "5");
    }
    assert!(starting.recv_timeout(Duration::from_millis(300)).is_err(), "it waits");
    server.restart();
    let gateway = starting.recv_timeout(crate::common::PATIENCE).expect("it serves once NATS is there");
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"1"), 0);
    gateway.stored("press-4", 1);
}

#[test]
fn a_gateway_whose_stream_has_no_room_says_so_and_serves_once_there_is() {
    let dir = scratch();
    let mut server = NatsServer::with_jetstream("max_file_store: 3GB", "");
    let http_addr = TcpListener::bind("127.0.0.1:0").and_then(|s| s.local_addr()).expect("a free port");
    let setup = setup(dir.path(), &server).set("http.listen", http_addr).set("log.retention_bytes", "4GiB");
    let (started, starting) = std::sync::mpsc::channel();
    std::thread::spawn(move || drop(started.send(setup.start())));
    let agent = http_agent();
    wait_for("/readyz to say why", || {
        let ready = http(&agent, http_addr, "GET", "/readyz", "", &[], b"").ok()?;
        let words = ["its maximum size is 4294967296 bytes", "max_file_store"];
        words.iter().all(|word| ready.text().contains(word)).then_some(())
    });
    server.give_room();
    let gateway = starting.recv_timeout(crate::common::PATIENCE).expect("it serves once there is room");
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"1"), 0);
}

#[test]
fn a_gateway_that_waits_for_nats_ends_when_it_is_asked_to() {
    let dir = scratch();
    let mut server = NatsServer::start();
    server.kill();
    let mut child = setup(dir.path(), &server).spawn();
    wait_for("it to have its directory", || dir.path().join("node").exists().then_some(()));
    signal(child.id(), libc::SIGTERM);
    let status = wait_for("it to end", || child.try_wait().expect("our child"));
    assert!(status.success(), "{status}");
}

#[test]
fn while_nats_is_away_http_is_told_to_come_again_and_mqtt_is_held_back() {
    let dir = scratch();
    let mut server = NatsServer::start();
    let gateway = setup(dir.path(), &server).set("intake.hold_back_ms_max", 15_000).start();
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"1"), 0);
    server.kill();
    wait_for("/readyz to say so", || {
        let ready = gateway.get("/readyz", "");
        (ready.status == 503 && ready.text().contains("NATS")).then_some(())
    });
    assert_eq!(gateway.get("/livez", "").status, 200);
    let answer = gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &[], b"2");
    assert_eq!((answer.status, answer.json()["type"].as_str()), (503, Some("/problems/unavailable")));
    assert_eq!(answer.headers["retry-after"], "5");
    wire.send(&publish(Version::V5, 1, "t", b"3"));
    assert!(matches!(wire.next_within(Duration::from_millis(500)), Next::Silent), "it is held back");
    server.restart();
    assert_eq!(wire.packet(PUBACK).reason(), 0, "the same connection, when NATS is there again");
    wait_for("/readyz to be well", || (gateway.get("/readyz", "").status == 200).then_some(()));
    let records = gateway.stored("press-4", 2);
    assert_eq!(records.iter().map(|record| &record["payload"]).collect::<Vec<_>>(), [1, 3]);
}

/// It guards against a gateway that was never ready again: its last message had no answer, and who is not ready is sent
/// no other one.
#[test]
fn a_gateway_whose_last_message_had_no_answer_is_ready_again_by_itself() {
    let dir = scratch();
    let server = NatsServer::start();
    let gateway = setup(dir.path(), &server).start();
    let source = gateway.create("press-4");
    let post = |body: &[u8]| gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &[], body);
    assert_eq!(post(b"1").status, 200);
    signal(server.pid(), libc::SIGSTOP);
    let answer = post(b"2");
    assert!(answer.status == 503 && answer.text().contains("may have been kept"), "{}", answer.text());
    signal(server.pid(), libc::SIGCONT);
    wait_for("/readyz to be well", || (gateway.get("/readyz", "").status == 200).then_some(()));
    assert_eq!(post(b"3").status, 200);
}

/// Where there is no room to say how far the consumers are, only removing makes some.
#[test]
fn retention_goes_on_while_nobody_can_be_told_how_far_the_consumers_are() {
    let dir = scratch();
    let server = NatsServer::start();
    let gateway = setup(dir.path(), &server).set("log.retention_bytes", "1MiB").start();
    let source = gateway.create("press-4");
    let body = format!("{{\"x\":\"{}\"}}", "x".repeat(20_000));
    let post = || gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &[], body.as_bytes()).status;
    (0..30).for_each(|_| assert_eq!(post(), 200));
    wait_for("the others to be told of all of it", || {
        let cursors = "kv = await js.key_value('headgate-cursors')\n\
                       print(max([int((await kv.get(key)).value) for key in await kv.keys()]))\n";
        let told = nats_py(&server.url(), cursors, &[]).stdout;
        (String::from_utf8_lossy(&told).trim() == "31").then_some(())
    });
    let refuse = "info = await js.stream_info('KV_headgate-cursors')\n\
                  info.config.max_msg_size = 1\nawait js.update_stream(info.config)\n";
    let refused = nats_py(&server.url(), refuse, &[]);
    assert!(refused.status.success(), "{}", String::from_utf8_lossy(&refused.stderr));
    wait_for("retention to remove something", || {
        assert!([200, 503].contains(&post()));
        (gateway.metric("headgate_log_first_offset") > 1.0).then_some(())
    });
    assert!(gateway.output().contains("retention cannot tell the other nodes"), "{}", gateway.output());
}

/// It guards against a leaked admin key that lived on in a cluster until NATS was there again, and then for ever: its
/// end had to be durable first, and nobody tried again.
#[test]
fn while_nats_is_away_an_admin_key_dies_at_once_by_a_leak_report_and_by_a_revocation() {
    let dir = scratch();
    let mut server = NatsServer::start();
    let gateway = setup(dir.path(), &server).start();
    let admin = gateway.admin_key();
    let create = || {
        let made = gateway.post("/v1/datasources/*/keys", &admin, &json!({ "scopes": ["admin"] })).json();
        let text = |member: &str| made["key"][member].as_str().expect("a text").to_owned();
        (text("id"), text("secret"))
    };
    let [leaked, revoked] = [create(), create()];
    let status = |key: &str| gateway.get("/v1/refusals", key).status;
    assert_eq!((status(&leaked.1), status(&revoked.1)), (200, 200));
    server.kill();
    wait_for("/readyz to say so", || (gateway.get("/readyz", "").status == 503).then_some(()));
    let report = gateway.post("/v1/leaks", "", &json!({ "secret": leaked.1 }));
    assert_eq!((report.status, &report.json()["durable"]), (202, &json!(false)), "{}", report.text());
    let answer =
        gateway.request("DELETE", &format!("/v1/datasources/*/keys/{}", revoked.0), &admin, &[], b"");
    assert_eq!((answer.status, &answer.json()["durable"]), (202, &json!(false)), "{}", answer.text());
    assert_eq!((status(&leaked.1), status(&revoked.1), status(&admin)), (401, 401, 200));
    let warnings = gateway.get("/readyz", "").json()["warnings"].to_string();
    assert!(warnings.contains(&leaked.0) && warnings.contains(&revoked.0), "{warnings}");
    // The last one is kept.
    gateway.post("/v1/leaks", "", &json!({ "secret": admin }));
    assert_eq!(status(&admin), 200);

    server.restart();
    wait_for("it to be durable", || {
        let ready = gateway.get("/readyz", "");
        (ready.status == 200 && ready.json()["warnings"] == json!([])).then_some(())
    });
    assert_eq!((status(&leaked.1), status(&revoked.1)), (401, 401));
    drop(gateway);
    let gateway = setup(dir.path(), &server).start();
    let status = |key: &str| gateway.get("/v1/refusals", key).status;
    assert_eq!((status(&leaked.1), status(&revoked.1), status(&admin)), (401, 401, 200));
}

#[test]
fn what_was_acknowledged_is_there_and_stored_once_however_often_gateway_and_server_are_killed() {
    let dir = scratch();
    let mut server = NatsServer::with("max_payload: 4MB");
    let setup = setup(dir.path(), &server).set("intake.hold_back_ms_max", 2_000);
    let ledger = Ledger::default();
    let ledger = std::sync::Arc::new(ledger);
    let mut acked = Vec::new();
    let mut gateway = setup.start();
    let source = gateway.create("press-4");
    for round in 0..6 {
        let before = ledger.acked();
        let senders = all_kinds(&gateway, &source, &ledger);
        wait_for("some acks", || (ledger.acked() > before + 300).then_some(()));
        if round % 2 == 0 {
            gateway.kill();
        } else {
            server.kill();
            std::thread::sleep(Duration::from_millis(50));
            gateway.kill();
            server.restart();
        }
        for sender in senders {
            acked.extend(sender.join().expect("a sender ends with its connection").acked);
        }
        gateway = setup.start();
    }
    gateway.settle();
    let url = server.url();
    gateway.stop();
    let kept = records_of(&*log_at(url));
    let numbers: std::collections::HashSet<u64> = kept.iter().map(|record| number(&record.payload)).collect();
    let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged and not kept: {lost:?}", lost.len(), acked.len());
    assert_eq!(in_storage(dir.path()), kept, "each record once");
}

#[test]
fn what_nats_cannot_carry_is_refused_for_good_and_said_why() {
    let dir = scratch();
    let server = NatsServer::with("max_payload: 64KB");
    let gateway = setup(dir.path(), &server).start();
    let source = gateway.create("press-4");
    let post = |topic: &str, body: &[u8]| {
        gateway.request("POST", &format!("/v1/ingest/press-4/{topic}"), &source.key, &[], body)
    };
    for topic in ["a%20b", "a//b", "a/"] {
        let answer = post(topic, b"1");
        assert_eq!(
            (answer.status, answer.json()["type"].as_str()),
            (400, Some("/problems/topic")),
            "{topic}"
        );
    }
    let answer = post("t", &[b'x'; 64 << 10]);
    assert_eq!((answer.status, answer.json()["type"].as_str()), (413, Some("/problems/too_large")));
    assert!(answer.text().contains("max_payload of nats-server"), "{}", answer.text());
    assert_eq!(post("v1.2/t", &[b'x'; 60 << 10]).status, 200);
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "a b", b"x"), 0x90);
    assert_eq!(gateway.stored("press-4", 1)[0]["topic"], "v1.2/t");
}

#[test]
fn a_data_directory_stays_with_the_kind_of_log_that_it_began_with() {
    let (of_one, of_cluster) = (scratch(), scratch());
    let server = NatsServer::start();
    Setup::embedded_on(of_one.path()).start().stop();
    let refused = setup(of_one.path(), &server).refused();
    assert!(refused.output.contains("use another one"), "{}", refused.output);
    setup(of_cluster.path(), &server).start().stop();
    let refused = Setup::embedded_on(of_cluster.path()).refused();
    assert!(refused.output.contains("use another one"), "{}", refused.output);
}
