//! A stream or bucket that is not the one that gateways have followed: put back to an earlier state, made anew, purged,
//! gone. They acknowledged on, stored nothing, said that they were ready, and no key could be ended any more; or every key
//! was dead, and the next start made a second admin key.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use crate::common::kept::in_storage;
use crate::common::nats::{NatsServer, nats_py};
use crate::common::postgres::PostgresServer;
use crate::common::{Gateway, Setup, Source, http, http_agent, scratch, wait_for};

fn setup(dir: &Path, server: &NatsServer) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", server.url()))
        .set("data_dir", dir.display())
        .set("drain_ms_max", 2_000)
        .set("log.retention_bytes", "1GiB")
}

fn send(gateway: &Gateway, source: &Source, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let sent = gateway.post("/v1/ingest/press-4/t", &source.key, &json!({ "n": n }));
        assert_eq!(sent.status, 200, "{}", sent.text());
    }
}

/// The numbers that a gateway has stored, in the order of their offsets.
fn stored(dir: &Path) -> Vec<u64> {
    let number = |payload: &[u8]| serde_json::from_slice::<serde_json::Value>(payload).ok()?["n"].as_u64();
    in_storage(dir).iter().map(|record| number(&record.payload).expect("a number")).collect()
}

fn stored_becomes(dir: &Path, numbers: &[u64]) {
    wait_for("the records to be stored", || (stored(dir) == numbers).then_some(()));
}

/// The numbers in what was set aside of storage.
fn set_aside(dir: &Path) -> Vec<u64> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).expect("readable") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("records-set-aside-") && name.ends_with(".db") {
            let db = rusqlite::Connection::open(&path).expect("it opens");
            let sql = "SELECT json_extract(CAST(payload AS TEXT), '$.n') FROM records ORDER BY \"offset\"";
            let mut rows = db.prepare(sql).expect("the records");
            let rows = rows.query_map([], |row| row.get::<_, i64>(0).map(i64::cast_unsigned)).expect("rows");
            numbers.extend(rows.map(|row| row.expect("a number")));
        }
    }
    numbers
}

/// What `/readyz` says once it refuses for its history.
pub fn refusal(gateway: &Gateway) -> String {
    wait_for("the gateway to notice", || {
        let ready = gateway.get("/readyz", "");
        (ready.status == 503 && ready.text().contains("headgate cluster adopt")).then(|| ready.text())
    })
}

fn takes_nothing(gateway: &Gateway, source: &Source) {
    let sent = gateway.post("/v1/ingest/press-4/t", &source.key, &json!({ "n": 1_000_000 }));
    assert_eq!(sent.status, 503, "{}", sent.text());
    assert!(sent.text().contains("log_history") || sent.text().contains("another one"), "{}", sent.text());
}

pub fn decide(setup: &Setup, arguments: &[&str]) -> String {
    let output = setup.run(arguments);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Until it is ready, on the addresses that it had.
pub fn comes_back(gateway: &Gateway) {
    wait_for("the gateway to start again", || {
        let answer = http(&http_agent(), gateway.http, "GET", "/readyz", "", &[], b"");
        answer.is_ok_and(|answer| answer.status == 200).then_some(())
    });
}

fn ends_keys(gateway: &Gateway, admin: &str) {
    let made = gateway.post("/v1/datasources/press-4/keys", admin, &json!({}));
    assert_eq!(made.status, 201, "{}", made.text());
    let key = &made.json()["key"];
    let path = format!("/v1/datasources/press-4/keys/{}", key["id"].as_str().expect("an id"));
    let ended = gateway.request("DELETE", &path, admin, &[], b"");
    assert_eq!(ended.status, 204, "{}", ended.text());
}

#[test]
fn what_was_put_back_to_an_earlier_state_is_refused_until_it_is_adopted() {
    let (mut server, first, second) = (NatsServer::start(), scratch(), scratch());
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    let admin = a.admin_key();
    let source = a.create("press-4");
    let made = a.post("/v1/datasources/press-4/keys", &admin, &json!({})).json();
    let leaked = (made["key"]["id"].as_str().expect("an id").to_owned(), made["key"]["secret"].clone());
    send(&a, &source, 0..20);
    let kept = server.keep_store();
    comes_back(&a);
    comes_back(&b);
    let path = format!("/v1/datasources/press-4/keys/{}", leaked.0);
    assert_eq!(a.request("DELETE", &path, &admin, &[], b"").status, 204);
    send(&b, &source, 20..50);
    let all: Vec<u64> = (0..50).collect();
    stored_becomes(first.path(), &all);
    stored_becomes(second.path(), &all);
    // What was followed is noted every two seconds.
    wait_for("the copy of the registry", || {
        let copy = std::fs::read_to_string(first.path().join("registry-copy.json")).unwrap_or_default();
        copy.contains("revoked_at").then_some(())
    });

    server.put_back_store(kept.path());
    let begun = Instant::now();
    for gateway in [&a, &b] {
        assert!(refusal(gateway).contains("put back to an earlier state"), "{}", refusal(gateway));
        takes_nothing(gateway, &source);
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let command = setup(first.path(), &server);
    let told = decide(&command, &["cluster", "adopt"]);
    assert!(
        told.contains("the log goes on at offset 21") && told.contains("nothing is changed yet"),
        "{told}"
    );
    assert!(told.contains("1 keys that this gateway knows as dead"), "{told}");
    takes_nothing(&a, &source);
    b.kill();

    decide(&command, &["cluster", "adopt", "--yes"]);
    comes_back(&a);
    let b = setup(second.path(), &server).start();
    send(&a, &source, 50..55);
    let after: Vec<u64> = (0..20).chain(50..55).collect();
    for dir in [first.path(), second.path()] {
        stored_becomes(dir, &after);
        assert_eq!(set_aside(dir), (20..50).collect::<Vec<_>>());
    }
    // A key that had ended beyond the state that was put back stays dead.
    let secret = leaked.1.as_str().expect("a secret");
    assert_eq!(b.post("/v1/ingest/press-4/t", secret, &json!({ "n": 0 })).status, 401);
    ends_keys(&b, &admin);
    ends_keys(&a, &admin);
}

/// No check waits for the disk.
#[test]
fn what_was_put_back_is_refused_while_the_data_directory_stands_still() {
    let (mut server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let source = gateway.create("press-4");
    send(&gateway, &source, 0..3);
    let kept = server.keep_store();
    comes_back(&gateway);
    // Whoever opens such a file to write it waits until somebody reads it.
    wait_for("a file that stands still", || {
        let made = Command::new("mkfifo").arg(dir.path().join("history.new")).status().expect("mkfifo runs");
        made.success().then_some(())
    });
    send(&gateway, &source, 3..6);
    server.put_back_store(kept.path());
    refusal(&gateway);
    takes_nothing(&gateway, &source);
    gateway.kill();
}

#[test]
fn what_is_put_back_as_it_was_needs_no_decision() {
    let (mut server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let source = gateway.create("press-4");
    send(&gateway, &source, 0..5);
    let earlier = server.keep_store();
    comes_back(&gateway);
    send(&gateway, &source, 5..10);
    stored_becomes(dir.path(), &(0..10).collect::<Vec<_>>());
    let newest = server.keep_store();
    comes_back(&gateway);
    server.put_back_store(earlier.path());
    refusal(&gateway);
    server.put_back_store(newest.path());
    comes_back(&gateway);
    send(&gateway, &source, 10..12);
    stored_becomes(dir.path(), &(0..12).collect::<Vec<_>>());
}

#[test]
fn a_stream_that_is_gone_is_refused_and_made_anew_when_that_is_adopted() {
    let (server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    send(&gateway, &source, 0..10);
    stored_becomes(dir.path(), &(0..10).collect::<Vec<_>>());
    let deleted = nats_py(&server.url(), "await js.delete_stream('headgate')\n", &[]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    assert!(refusal(&gateway).contains("the stream headgate is gone"), "{}", refusal(&gateway));
    takes_nothing(&gateway, &source);
    decide(&setup(dir.path(), &server), &["cluster", "adopt", "--yes"]);
    comes_back(&gateway);
    send(&gateway, &source, 10..13);
    stored_becomes(dir.path(), &[10, 11, 12]);
    assert_eq!(set_aside(dir.path()), (0..10).collect::<Vec<_>>());
    ends_keys(&gateway, &admin);
}

/// The stream was put back, and a gateway that did not know more has gone on with it.
struct GrownLog {
    server: NatsServer,
    known: TempDir,
    fresh: TempDir,
    source: Source,
    on: Gateway,
}

/// Numbers 0..20 are in both histories, 20..50 in the one that `known` has followed, 100..105 in the one that goes on.
fn log_that_has_grown_since() -> GrownLog {
    let (mut server, known, fresh) = (NatsServer::start(), scratch(), scratch());
    let a = setup(known.path(), &server).start();
    let source = a.create("press-4");
    send(&a, &source, 0..20);
    let kept = server.keep_store();
    comes_back(&a);
    send(&a, &source, 20..50);
    stored_becomes(known.path(), &(0..50).collect::<Vec<_>>());
    a.kill();
    server.put_back_store(kept.path());
    let on = setup(fresh.path(), &server).start();
    send(&on, &source, 100..105);
    GrownLog { server, known, fresh, source, on }
}

#[test]
fn what_has_grown_since_it_was_put_back_is_one_history_in_each_store_when_it_is_adopted() {
    let GrownLog { server, known, fresh, source, on } = log_that_has_grown_since();
    decide(&setup(known.path(), &server), &["cluster", "adopt", "--yes"]);
    let a = setup(known.path(), &server).start();
    comes_back(&on);
    send(&a, &source, 105..107);
    let all: Vec<u64> = (0..20).chain(100..107).collect();
    stored_becomes(known.path(), &all);
    stored_becomes(fresh.path(), &all);
    assert_eq!(set_aside(known.path()), (20..50).collect::<Vec<_>>());
}

#[test]
fn missing_records_come_behind_what_has_grown_since_and_each_is_once_in_each_store() {
    let GrownLog { server, known, fresh, source, on } = log_that_has_grown_since();
    let command = setup(known.path(), &server);
    let told = decide(&command, &["cluster", "restore", "--records"]);
    assert!(told.contains("30 records from offset 21 on are published again"), "{told}");
    assert!(told.contains("behind what the log has by now"), "{told}");
    decide(&command, &["cluster", "restore", "--records", "--yes"]);
    let a = setup(known.path(), &server).start();
    comes_back(&on);
    send(&a, &source, 105..107);
    let all: Vec<u64> = (0..20).chain(100..105).chain(20..50).chain(105..107).collect();
    stored_becomes(known.path(), &all);
    stored_becomes(fresh.path(), &all);
    assert_eq!(set_aside(known.path()), (20..50).collect::<Vec<_>>());
}

/// Each gets the offset that it had: stores that have it keep it, and the others get it.
#[test]
fn missing_records_are_published_again_where_they_were() {
    let (mut server, first, second) = (NatsServer::start(), scratch(), scratch());
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    let (source, admin) = (a.create("press-4"), a.admin_key());
    send(&a, &source, 0..20);
    let kept = server.keep_store();
    comes_back(&a);
    comes_back(&b);
    send(&a, &source, 20..30);
    stored_becomes(second.path(), &(0..30).collect::<Vec<_>>());
    b.kill();
    // A key that has let in one record, and is dead.
    let made = a.post("/v1/datasources/press-4/keys", &admin, &json!({})).json();
    let dead = made["key"]["secret"].as_str().expect("a secret").to_owned();
    assert_eq!(a.post("/v1/ingest/press-4/t", &dead, &json!({ "n": 1_000 })).status, 200);
    let path = format!("/v1/datasources/press-4/keys/{}", made["key"]["id"].as_str().expect("an id"));
    assert_eq!(a.request("DELETE", &path, &admin, &[], b"").status, 204);
    send(&a, &source, 30..50);
    let all: Vec<u64> = (0..30).chain([1_000]).chain(30..50).collect();
    stored_becomes(first.path(), &all);
    let offsets = |dir: &Path| in_storage(dir).iter().map(|record| record.offset).collect::<Vec<_>>();
    let had = offsets(first.path());
    wait_for("the copy of the registry", || {
        let copy = std::fs::read_to_string(first.path().join("registry-copy.json")).unwrap_or_default();
        copy.contains("revoked_at").then_some(())
    });

    server.put_back_store(kept.path());
    refusal(&a);
    // One that knows nothing does not go on beside it.
    waits_at_its_start(scratch().path(), &server, "a gateway that runs has followed more than this");
    let command = setup(first.path(), &server);
    let told = decide(&command, &["cluster", "restore", "--records"]);
    assert!(told.contains("30 records from offset 21 on are published again"), "{told}");
    assert!(told.contains("1 records stay out") && told.contains("the offsets that they had"), "{told}");
    decide(&command, &["cluster", "restore", "--records", "--yes"]);
    comes_back(&a);
    let b = setup(second.path(), &server).start();
    send(&b, &source, 50..55);
    stored_becomes(first.path(), &all.iter().copied().chain(50..55).collect::<Vec<_>>());
    stored_becomes(second.path(), &(0..55).collect::<Vec<_>>());
    assert_eq!(offsets(first.path())[..had.len()], had);
    for dir in [first.path(), second.path()] {
        assert_eq!(set_aside(dir), [0; 0]);
    }
    let again = decide(&command, &["cluster", "restore", "--records", "--yes"]);
    assert!(again.contains("there is nothing to decide"), "{again}");
    assert_eq!(a.post("/v1/ingest/press-4/t", &dead, &json!({ "n": 0 })).status, 401);
}

/// The bucket that is put back has the mark of a deletion in the place of what was made again.
#[test]
fn what_was_deleted_before_a_backup_and_made_again_after_it_is_restored() {
    let (mut server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let admin = gateway.admin_key();
    let source = gateway.create("press-4");
    gateway.create("press-9");
    gateway.delete("press-9");
    send(&gateway, &source, 0..3);
    let kept = server.keep_store();
    comes_back(&gateway);
    let again = gateway.create("press-9");
    send(&gateway, &source, 3..5);
    wait_for("the copy of the registry", || {
        let copy = std::fs::read_to_string(dir.path().join("registry-copy.json")).unwrap_or_default();
        copy.contains(&again.key_id).then_some(())
    });
    server.put_back_store(kept.path());
    refusal(&gateway);
    decide(&setup(dir.path(), &server), &["cluster", "restore", "--yes"]);
    comes_back(&gateway);
    let sent = gateway.post("/v1/ingest/press-9/t", &again.key, &json!({ "n": 1 }));
    assert_eq!(sent.status, 200, "{}", sent.text());
    ends_keys(&gateway, &admin);
}

#[test]
fn a_stream_that_is_gone_has_its_records_again_where_they_were() {
    let (server, first, second) = (NatsServer::start(), scratch(), scratch());
    let gateway = setup(first.path(), &server).start();
    let source = gateway.create("press-4");
    send(&gateway, &source, 0..10);
    stored_becomes(first.path(), &(0..10).collect::<Vec<_>>());
    let deleted = nats_py(&server.url(), "await js.delete_stream('headgate')\n", &[]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    refusal(&gateway);
    wait_for("the copy of the registry", || first.path().join("registry-copy.json").exists().then_some(()));
    decide(&setup(first.path(), &server), &["cluster", "restore", "--records", "--yes"]);
    comes_back(&gateway);
    send(&gateway, &source, 10..12);
    let fresh = setup(second.path(), &server).start();
    send(&fresh, &source, 12..13);
    stored_becomes(first.path(), &(0..13).collect::<Vec<_>>());
    stored_becomes(second.path(), &(0..13).collect::<Vec<_>>());
    assert_eq!(set_aside(first.path()), [0; 0]);
}

/// What a start had opened was of a history that ended before the start did.
#[test]
fn a_start_that_the_history_overtakes_begins_again() {
    let (mut server, first, second) = (NatsServer::start(), scratch(), scratch());
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    let source = a.create("press-4");
    send(&a, &source, 0..20);
    let kept = server.keep_store();
    comes_back(&a);
    comes_back(&b);
    send(&a, &source, 20..50);
    stored_becomes(first.path(), &(0..50).collect::<Vec<_>>());
    a.kill();
    server.put_back_store(kept.path());
    refusal(&b);
    decide(&setup(second.path(), &server), &["cluster", "adopt", "--yes"]);
    comes_back(&b);
    let of_new_epoch = server.keep_store();
    comes_back(&b);
    send(&b, &source, 60..70);
    b.kill();

    // It waits for its records.db, which it has to set back, with its log open.
    let lock = rusqlite::Connection::open(first.path().join("records.db")).expect("it opens");
    lock.execute_batch("BEGIN IMMEDIATE").expect("nobody else writes");
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = free.local_addr().expect("bound");
    drop(free);
    let mut child = setup(first.path(), &server).set("http.listen", addr).spawn();
    wait_for("the start to open records.db", || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", child.id())).ok()?;
        let mut open = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        open.any(|path| path.ends_with("records.db")).then_some(())
    });
    server.put_back_store(of_new_epoch.path());
    lock.execute_batch("ROLLBACK").expect("rolled back");
    drop(lock);
    wait_for("it to be ready", || {
        let answer = http(&http_agent(), addr, "GET", "/readyz", "", &[], b"");
        answer.is_ok_and(|answer| answer.status == 200).then_some(())
    });
    for n in 70..75 {
        let body = json!({ "n": n }).to_string();
        let sent =
            http(&http_agent(), addr, "POST", "/v1/ingest/press-4/t", &source.key, &[], body.as_bytes());
        assert_eq!(sent.expect("an answer").status, 200);
    }
    stored_becomes(first.path(), &(0..20).chain(70..75).collect::<Vec<_>>());
    child.kill().expect("our child");
    child.wait().expect("our child");
}

/// Starts a gateway that does not join and makes no admin key, because of what these words are of.
fn waits_at_its_start(dir: &Path, server: &NatsServer, words: &str) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = free.local_addr().expect("bound");
    drop(free);
    let mut child = setup(dir, server).set("http.listen", addr).spawn();
    wait_for("the start to say why it waits", || {
        let answer = http(&http_agent(), addr, "GET", "/readyz", "", &[], b"").ok()?;
        answer.text().contains(words).then_some(())
    });
    child.kill().expect("our child");
    child.wait().expect("our child");
    assert!(!dir.join("admin.key").exists());
}

#[test]
fn where_all_is_gone_a_new_gateway_begins_no_second_cluster_beside_one_that_knows_it() {
    let (server, dir, other) = (NatsServer::start(), scratch(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    send(&gateway, &source, 0..3);
    wait_for("the copy of the registry", || {
        let copy = std::fs::read_to_string(dir.path().join("registry-copy.json")).unwrap_or_default();
        copy.contains("press-4").then_some(())
    });
    let all = "for stream in await js.streams_info():\n    await js.delete_stream(stream.config.name)\n";
    let deleted = nats_py(&server.url(), all, &[]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    refusal(&gateway);
    waits_at_its_start(other.path(), &server, "a gateway that runs");
    decide(&setup(dir.path(), &server), &["cluster", "restore", "--yes"]);
    comes_back(&gateway);
    send(&gateway, &source, 3..5);
    stored_becomes(dir.path(), &[3, 4]);
    ends_keys(&gateway, &admin);
}

/// What makes a registry one without keys, in the words of nats-py.
fn a_lost_registry_is_refused_and_restored(loss: &str, words: &str) {
    let (server, dir, other) = (NatsServer::start(), scratch(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    send(&gateway, &source, 0..10);
    wait_for("the copy of the registry", || {
        let copy = std::fs::read_to_string(dir.path().join("registry-copy.json")).unwrap_or_default();
        copy.contains("press-4").then_some(())
    });
    let lost = nats_py(&server.url(), loss, &[]);
    assert!(lost.status.success(), "{}", String::from_utf8_lossy(&lost.stderr));
    assert!(refusal(&gateway).contains(words), "{}", refusal(&gateway));
    takes_nothing(&gateway, &source);

    // Neither one that knew it nor one that did not makes a second registry.
    gateway.kill();
    std::fs::remove_file(dir.path().join("admin.key")).expect("it is there");
    for dir in [&dir, &other] {
        waits_at_its_start(dir.path(), &server, "headgate cluster restore");
    }
    let refused = setup(dir.path(), &server).run(&["cluster", "adopt", "--yes"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--new-registry"));

    std::fs::write(dir.path().join("admin.key"), &admin).expect("written");
    decide(&setup(dir.path(), &server), &["cluster", "restore", "--yes"]);
    let gateway = setup(dir.path(), &server).start();
    send(&gateway, &source, 10..12);
    stored_becomes(dir.path(), &(0..12).collect::<Vec<_>>());
    ends_keys(&gateway, &admin);
    let fresh = setup(other.path(), &server).start();
    assert!(!other.path().join("admin.key").exists());
    ends_keys(&fresh, &admin);
}

#[test]
fn a_registry_that_was_purged_is_refused_and_restored() {
    a_lost_registry_is_refused_and_restored("await js.purge_stream('KV_headgate-registry')\n", "is empty");
}

#[test]
fn a_registry_that_is_gone_is_refused_and_restored() {
    a_lost_registry_is_refused_and_restored("await js.delete_stream('KV_headgate-registry')\n", "is gone");
}

#[test]
fn a_new_registry_is_begun_on_purpose_alone() {
    let (server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).start();
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    send(&gateway, &source, 0..3);
    let purge = "await js.purge_stream('KV_headgate-registry', subject='$KV.headgate-registry.key.>')\n";
    let lost = nats_py(&server.url(), purge, &[]);
    assert!(lost.status.success(), "{}", String::from_utf8_lossy(&lost.stderr));
    assert!(refusal(&gateway).contains("rows were purged"), "{}", refusal(&gateway));
    decide(&setup(dir.path(), &server), &["cluster", "adopt", "--new-registry", "--yes"]);
    comes_back(&gateway);
    assert_ne!(gateway.admin_key(), admin);
    ends_keys(&gateway, &gateway.admin_key());
}

#[test]
fn what_one_postgresql_has_beyond_an_adopted_state_is_set_aside_once() {
    let (mut server, postgres) = (NatsServer::start(), PostgresServer::start());
    let (first, second) = (scratch(), scratch());
    let set = |dir: &Path, server: &NatsServer| {
        postgres.stored_into(setup(dir, server).set("storage.sinks", "postgres"))
    };
    let (a, b) = (set(first.path(), &server).start(), set(second.path(), &server).start());
    let source = a.create("press-4");
    let becomes = |numbers: &[u64]| {
        let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
        let sql = "SELECT string_agg(payload->>'n', ',' ORDER BY log_offset) FROM records";
        wait_for("the records to be stored", || {
            postgres.try_sql(sql).is_ok_and(|rows| rows == [numbers.join(",")]).then_some(())
        });
    };
    send(&a, &source, 0..20);
    becomes(&(0..20).collect::<Vec<_>>());
    let kept = server.keep_store();
    comes_back(&a);
    comes_back(&b);
    send(&b, &source, 20..50);
    becomes(&(0..50).collect::<Vec<_>>());

    server.put_back_store(kept.path());
    refusal(&a);
    refusal(&b);
    decide(&set(second.path(), &server), &["cluster", "adopt", "--yes"]);
    comes_back(&a);
    comes_back(&b);
    send(&a, &source, 50..55);
    send(&b, &source, 55..60);
    becomes(&(0..20).chain(50..60).collect::<Vec<_>>());
    let aside = postgres
        .sql("SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'set_aside_%_records'");
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert_eq!(postgres.sql(&format!("SELECT count(*) FROM {}", aside[0])), ["30"]);
}
