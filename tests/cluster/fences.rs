//! A key that ends while a gateway, or its nats-server, is paused. What waited in their queues and sockets came in when
//! they went on, although the revocation had returned elsewhere, and devices got their acknowledgements.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::cluster::log_at;
use crate::common::kept::in_storage;
use crate::common::load::{Ledger, mqtt_sender, number};
use crate::common::nats::NatsServer;
use crate::common::servers::Servers;
use crate::common::wire::Version;
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

/// For how long a process stays paused after the key is dead: longer than the others wait for it.
const PAUSE: Duration = Duration::from_millis(1_500);
/// Within what time all work again: a leader may have to be elected first, on a busy machine.
const RECOVERY_MAX: Duration = Duration::from_secs(45);

fn setup(dir: &Path, urls: &[String]) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", serde_json::to_string(urls).expect("JSON"))
        .set("log.retention_bytes", "1GiB")
}

/// The offsets that a gateway has stored, once it has stored all that there is.
fn stored(gateway: &Gateway, dir: &Path) -> Vec<u64> {
    gateway.settle();
    in_storage(dir).iter().map(|record| record.offset).collect()
}

/// When the key is revoked, at the other gateway.
#[derive(Clone, Copy, PartialEq)]
enum Revoked {
    /// While the processes are paused: the others do it without them.
    Meanwhile,
    /// Right before they are paused: nobody can do it without them, and it returns after they go on.
    Before,
}

/// Two gateways and the way to the log's stream.
struct Pair<'a> {
    loaded: (&'a Gateway, &'a Path),
    other: (&'a Gateway, &'a Path),
    url: &'a str,
}

/// Loads a gateway, pauses processes, ends the key elsewhere, and lets the processes go on: from the return of the
/// revocation on nothing of the key comes in anywhere, what was acknowledged is there, and all go on by themselves.
fn a_dead_key_stays_dead(
    Pair { loaded: (loaded, loaded_dir), other: (other, other_dir), url }: &Pair<'_>,
    paused: &[u32],
    revoked: Revoked,
) {
    // The cluster's first gateway has made the admin key for all.
    let admin_key = |dir: &Path| dir.join("admin.key");
    std::fs::copy(admin_key(other_dir), admin_key(loaded_dir)).expect("the admin key is there");
    let source = other.create("press-4");
    let probe = other.create("probe");
    let ledger = Arc::<Ledger>::default();
    let senders: Vec<_> = (0..8).map(|_| mqtt_sender(loaded, &source, &ledger, Version::V5, 1_000)).collect();
    wait_for("the load to flow", || (ledger.acked() > 5_000).then_some(()));
    let (admin, path) = (other.admin_key(), format!("/v1/datasources/press-4/keys/{}", source.key_id));
    let revoke = || {
        let revoked = other.request("DELETE", &path, &admin, &[], b"");
        assert!([204, 503].contains(&revoked.status), "{}", revoked.text());
        revoked.status == 204
    };
    let end = std::thread::scope(|scope| {
        let revoking = (revoked == Revoked::Before).then(|| scope.spawn(revoke));
        paused.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
        let is_revoked = revoked == Revoked::Meanwhile && {
            assert!(revoke());
            true
        };
        // The fence is the last message that counts.
        let end = is_revoked.then(|| log_at((*url).to_owned()).next_offset());
        std::thread::sleep(PAUSE);
        paused.iter().for_each(|pid| signal(*pid, libc::SIGCONT));
        end.unwrap_or_else(|| {
            let is_revoked = revoking.is_some_and(|revoking| revoking.join().expect("an answer"));
            // What was refused meanwhile is asked again, as its answer says.
            if !is_revoked {
                wait_for("the key to be revoked", || revoke().then_some(()));
            }
            log_at((*url).to_owned()).next_offset()
        })
    });
    let went_on = Instant::now();
    let acked: Vec<u64> =
        senders.into_iter().flat_map(|sender| sender.join().expect("a sender").acked).collect();
    // All that it had has reached the stream: the same connection carries these.
    let body = serde_json::json!({ "n": u64::MAX });
    wait_for("the paused one to work again", || {
        (loaded.post("/v1/ingest/probe/t", &probe.key, &body).status == 200).then_some(())
    });
    wait_for("all to be ready by themselves", || {
        [loaded, other].iter().all(|gateway| gateway.get("/readyz", "").status == 200).then_some(())
    });
    assert!(went_on.elapsed() < RECOVERY_MAX, "{:?}", went_on.elapsed());
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
    // Each gateway counts what it has found behind the end of the key, and lists it for the datasource.
    let shut_out = other.metric("headgate_log_fenced_records_total");
    let listed = other.get("/v1/refusals?cause=fenced&datasource=press-4", &admin).json();
    let counted: u64 = listed["refusals"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|refusal| {
            assert_eq!(refusal["key_id"], source.key_id.as_str(), "{refusal}");
            refusal["count"].as_u64().expect("a count")
        })
        .sum();
    assert!((counted > 0) == (shut_out > 0.0), "{shut_out} were shut out: {listed}");
}

#[test]
fn what_a_paused_gateway_still_had_is_no_record() {
    let (server, first, second) = (NatsServer::start(), scratch(), scratch());
    let urls = [server.url()];
    let other = setup(first.path(), &urls).start();
    let loaded = setup(second.path(), &urls).start();
    let pair = Pair { loaded: (&loaded, second.path()), other: (&other, first.path()), url: &urls[0] };
    a_dead_key_stays_dead(&pair, &[loaded.pid()], Revoked::Meanwhile);
}

/// Who stands still, of three servers and two gateways.
enum Still {
    Server,
    GatewayAndServer,
    Servers,
    /// The machine that all of them are on.
    All,
}

/// One gateway has its load over a server that leads nothing, the other one works with the two others.
fn a_dead_key_stays_dead_of_a_replicated_log(still: &Still, revoked: Revoked) {
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
    let all_servers = (0..urls.len()).map(|server| servers.pid(server));
    let paused: Vec<u32> = match still {
        Still::Server => vec![servers.pid(follower)],
        Still::GatewayAndServer => vec![loaded.pid(), servers.pid(follower)],
        Still::Servers => all_servers.collect(),
        Still::All => all_servers.chain([loaded.pid(), other.pid()]).collect(),
    };
    let pair = Pair { loaded: (&loaded, second.path()), other: (&other, first.path()), url: &others[0] };
    a_dead_key_stays_dead(&pair, &paused, revoked);
}

#[test]
fn what_a_paused_server_still_had_is_no_record() {
    a_dead_key_stays_dead_of_a_replicated_log(&Still::Server, Revoked::Meanwhile);
}

#[test]
fn what_a_paused_gateway_and_its_server_still_had_is_no_record() {
    a_dead_key_stays_dead_of_a_replicated_log(&Still::GatewayAndServer, Revoked::Meanwhile);
}

#[test]
fn what_all_servers_still_had_when_they_stood_still_is_no_record() {
    a_dead_key_stays_dead_of_a_replicated_log(&Still::Servers, Revoked::Before);
}

#[test]
fn what_a_suspended_machine_still_had_is_no_record() {
    a_dead_key_stays_dead_of_a_replicated_log(&Still::All, Revoked::Before);
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
