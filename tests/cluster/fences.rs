//! A key that ends while a gateway, or its nats-server, is paused. What waited in their queues and sockets came in when
//! they went on, although the revocation had returned elsewhere, and devices got their acknowledgements.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::common::cluster::log_at;
use crate::common::kept::in_storage;
use crate::common::load::{Ledger, mqtt_sender, number};
use crate::common::nats::NatsServer;
use crate::common::servers::Servers;
use crate::common::wire::Version;
use crate::common::{Gateway, Setup, scratch, wait_for};

/// For how long a process stays paused after the key is dead: longer than the others wait for it.
const PAUSE: Duration = Duration::from_millis(1_500);

fn setup(dir: &Path, urls: &[String]) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", serde_json::to_string(urls).expect("JSON"))
}

fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a pid");
    // SAFETY: kill(2) on a process that this test has started and not yet waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// The offsets that a gateway has stored, once it has stored all that there is.
fn stored(gateway: &Gateway, dir: &Path) -> Vec<u64> {
    gateway.settle();
    in_storage(dir).iter().map(|record| record.offset).collect()
}

/// Loads a gateway, pauses a process, ends the key elsewhere, and lets the process go on: from the return of the
/// revocation on nothing of the key comes in anywhere, and what was acknowledged is there.
fn a_dead_key_stays_dead(
    loaded: &Gateway,
    other: &Gateway,
    (loaded_dir, other_dir): (&Path, &Path),
    (paused, url): (u32, &str),
) {
    // The cluster's first gateway has made the admin key for all.
    let admin_key = |dir: &Path| dir.join("admin.key");
    std::fs::copy(admin_key(other_dir), admin_key(loaded_dir)).expect("the admin key is there");
    let source = other.create("press-4");
    let ledger = Arc::<Ledger>::default();
    let senders: Vec<_> = (0..8).map(|_| mqtt_sender(loaded, &source, &ledger, Version::V5, 1_000)).collect();
    wait_for("the load to flow", || (ledger.acked() > 5_000).then_some(()));
    signal(paused, libc::SIGSTOP);
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let revoked = other.request("DELETE", &path, &other.admin_key(), &[], b"");
    assert_eq!(revoked.status, 204, "{}", revoked.text());
    // The fence is the last message that counts.
    let end = log_at(url.to_owned()).next_offset();
    std::thread::sleep(PAUSE);
    signal(paused, libc::SIGCONT);
    let acked: Vec<u64> =
        senders.into_iter().flat_map(|sender| sender.join().expect("a sender").acked).collect();
    // All that it had has reached the stream: the same connection carries these.
    let probe = other.create("probe");
    let body = serde_json::json!({ "n": u64::MAX });
    wait_for("the paused one to work again", || {
        (loaded.post("/v1/ingest/probe/t", &probe.key, &body).status == 200).then_some(())
    });
    other.stored("probe", 1);
    other.settle();
    let late = in_storage(other_dir).into_iter().filter(|record| record.offset >= end);
    assert_eq!(late.filter(|record| record.datasource == "press-4").count(), 0, "records of a dead key");
    wait_for("both gateways to have stored the same", || {
        (stored(loaded, loaded_dir) == stored(other, other_dir)).then_some(())
    });
    let kept: HashSet<u64> = in_storage(other_dir).iter().map(|record| number(&record.payload)).collect();
    let lost: Vec<_> = acked.iter().filter(|n| !kept.contains(n)).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged messages are no records", lost.len(), acked.len());
}

#[test]
fn what_a_paused_gateway_still_had_is_no_record() {
    let (server, first, second) = (NatsServer::start(), scratch(), scratch());
    let urls = [server.url()];
    let other = setup(first.path(), &urls).start();
    let loaded = setup(second.path(), &urls).start();
    a_dead_key_stays_dead(&loaded, &other, (second.path(), first.path()), (loaded.pid(), &urls[0]));
}

#[test]
fn what_a_paused_server_still_had_is_no_record() {
    let (servers, first, second) = (Servers::start(), scratch(), scratch());
    let urls = servers.urls();
    let replicated = |dir: &Path, urls: &[String]| setup(dir, urls).set("nats.stream.replicas", 3);
    let other = replicated(first.path(), &urls).start();
    let leaders = ["headgate", "KV_headgate-registry"].map(|stream| servers.leader_of(stream));
    let follower =
        (0..urls.len()).find(|server| !leaders.contains(server)).expect("two leaders of three servers");
    other.kill();
    let others: Vec<String> =
        urls.iter().enumerate().filter(|(n, _)| *n != follower).map(|(_, url)| url.clone()).collect();
    let other = replicated(first.path(), &others).start();
    let loaded = replicated(second.path(), &urls[follower..=follower]).start();
    a_dead_key_stays_dead(
        &loaded,
        &other,
        (second.path(), first.path()),
        (servers.pid(follower), &others[0]),
    );
}

/// A fence judged what an admin sent again by the key that it had once come in under.
#[test]
fn what_was_quarantined_under_a_key_comes_in_after_its_end() {
    let (server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &[server.url()]).start();
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    let limit = |what: serde_json::Value| {
        let patch = serde_json::json!({ "limits": { "payload_bytes": what } }).to_string();
        let json = [("content-type", "application/json")];
        let changed = gateway.request("PATCH", "/v1/datasources/press-4", &admin, &json, patch.as_bytes());
        assert_eq!(changed.status, 200, "{}", changed.text());
    };
    limit(serde_json::json!({ "max": 1, "policy": "quarantine" }));
    let sent = gateway.post("/v1/ingest/press-4/t", &source.key, &serde_json::json!({ "n": 1 }));
    assert_eq!(sent.status, 422, "{}", sent.text());
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    assert_eq!(gateway.request("DELETE", &path, &admin, &[], b"").status, 204);
    limit(serde_json::Value::Null);
    gateway.settle();
    let redriven = gateway.post("/v1/datasources/press-4/quarantine/redrive", &admin, &serde_json::json!({}));
    assert_eq!(redriven.status, 200, "{}", redriven.text());
    let records = gateway.stored("press-4", 1);
    assert_eq!(records[0]["payload"], serde_json::json!({ "n": 1 }));
    gateway.settle();
    assert_eq!(gateway.metric("headgate_log_fenced_records_total"), 0.0);
}
