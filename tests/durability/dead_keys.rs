//! The end of a key on a full disk. It guards against a key that keeps itself alive by filling the disk: its end
//! used to need the disk first, and failed with it.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::wire::{Next, PUBACK, Version, Wire, publish};
use crate::common::{Answer, Gateway, Setup, Source, wait_for};
use crate::faults::{SmallDisk, is_root, warned, warns_no_more};

const KEY_DEAD: u8 = 0x98;
/// How long the end of a key may take, whatever the disk says; a call waits for connections for 5 s at most.
const KEY_END_MAX: Duration = Duration::from_secs(2);

fn setup(disk: &SmallDisk) -> Setup {
    Setup::embedded_on(&disk.path())
        .set("storage.sink", "none")
        .set("log.segment_bytes", 1 << 20)
        .set("intake.hold_back_ms_max", 300)
}

/// A gateway whose disk is full to the last byte, the registry's reserve included.
fn without_room() -> (SmallDisk, Gateway, Source) {
    let disk = SmallDisk::mount();
    let gateway = setup(&disk).start();
    let source = gateway.create("press-4");
    warns_no_more(&gateway);
    std::fs::remove_file(disk.path().join("registry.reserve")).expect("there is a reserve");
    disk.fill(0);
    (disk, gateway, source)
}

fn revoke(gateway: &Gateway, source: &Source) -> Answer {
    let path = format!("/v1/datasources/{}/keys/{}", source.id, source.key_id);
    let began = Instant::now();
    let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
    let took = began.elapsed();
    eprintln!("the key's end took {took:?}: {}", answer.status);
    assert!(took < KEY_END_MAX, "{took:?}");
    answer
}

fn post(gateway: &Gateway, source: &Source) -> u16 {
    let path = format!("/v1/ingest/{}/t", source.id);
    gateway.request("POST", &path, &source.key, &[], b"1").status
}

/// The actions in the audit that name the key or its datasource.
fn acts(gateway: &Gateway, source: &Source) -> Vec<String> {
    let audit = gateway.get("/v1/audit", &gateway.admin_key()).json();
    let entries = audit["entries"].as_array().expect("a list");
    let is_it = |entry: &&Value| {
        entry["key_id"] == *source.key_id || entry["key_id"].is_null() && entry["datasource"] == *source.id
    };
    entries.iter().filter(is_it).map(|entry| entry["action"].as_str().expect("a text").to_owned()).collect()
}

fn assert_undurable(answer: &Answer) {
    assert_eq!(answer.status, 202, "{}", answer.text());
    let body = answer.json();
    assert_eq!((&body["revoked"], &body["durable"]), (&json!(true), &json!(false)), "{body}");
    let detail = body["detail"].as_str().expect("a text");
    assert!(detail.contains("not durable yet") && detail.contains("the disk is full"), "{detail}");
}

#[test]
fn a_key_that_has_filled_the_disk_is_revoked_at_once_and_for_good() {
    if !is_root("dead_keys::a_key_that_has_filled_the_disk_is_revoked_at_once_and_for_good") {
        return;
    }
    let disk = SmallDisk::mount();
    let gateway = setup(&disk).start();
    let source = gateway.create("press-4");
    let mut idle = Wire::login(gateway.mqtt, Version::V5, &source.key);
    disk.fill(2 << 20);
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    loop {
        device.send(&publish(Version::V5, 1, "load", &[b'x'; 60_000]));
        match device.next() {
            Next::Packet(ack) if (ack.kind(), ack.reason()) == (PUBACK, 0) => {}
            _ => break,
        }
    }
    wait_for("the log to be full", || (gateway.get("/readyz", "").status == 503).then_some(()));
    let mut held_back = Wire::login(gateway.mqtt, Version::V5, &source.key);
    held_back.send(&publish(Version::V5, 1, "load", &[b'x'; 60_000]));

    // What was too little for a message is too much for this test.
    let mut rest = std::fs::File::create(disk.path().join("rest")).expect("made");
    while rest.write_all(&[0; 512]).is_ok() {}

    let answer = revoke(&gateway, &source);
    assert_eq!(answer.status, 204, "durable at once, by the reserve: {}", answer.text());
    gateway.says("the registry's reserve on the disk is used");
    idle.disconnected(KEY_DEAD);
    held_back.disconnected(KEY_DEAD);
    assert_eq!(post(&gateway, &source), 401);
    gateway.kill();

    disk.empty();
    let gateway = setup(&disk).start();
    assert_eq!(post(&gateway, &source), 401, "revoked still");
    assert_eq!(acts(&gateway, &source).last().map(String::as_str), Some("key.revoked"));
    wait_for("the reserve to be whole again", || {
        let reserve = std::fs::metadata(disk.path().join("registry.reserve")).ok()?;
        (reserve.len() == 1 << 20).then_some(())
    });
}

#[test]
fn without_any_room_a_revoked_key_is_dead_and_the_answer_says_that_it_is_not_durable() {
    if !is_root(
        "dead_keys::without_any_room_a_revoked_key_is_dead_and_the_answer_says_that_it_is_not_durable",
    ) {
        return;
    }
    let (disk, gateway, source) = without_room();
    let mut live = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_undurable(&revoke(&gateway, &source));
    live.disconnected(KEY_DEAD);
    assert_eq!(post(&gateway, &source), 401);
    let warning = warned(&gateway, "not durable yet");
    assert!(warning.contains(&source.key_id) && warning.contains("registry.db"), "{warning}");
    // Asked again, it says the same; and so does the command.
    assert_undurable(&revoke(&gateway, &source));
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    command.args(["key", "revoke", &source.id, &source.key_id]);
    command.env("HEADGATE_URL", format!("http://{}", gateway.http));
    let said = command.env("HEADGATE_API_KEY", gateway.admin_key()).output().expect("it runs");
    let said = String::from_utf8(said.stdout).expect("UTF-8");
    assert!(said.contains("is dead") && said.contains("not durable yet"), "{said}");

    disk.empty();
    warns_no_more(&gateway);
    gateway.says("the ends of all keys are durable now");
    gateway.kill();
    let gateway = setup(&disk).start();
    assert_eq!(post(&gateway, &source), 401, "revoked still");
    assert_eq!(acts(&gateway, &source), ["datasource.created", "key.revoked"], "written once");
}

#[test]
fn a_leak_report_on_a_full_disk_kills_the_key_and_claims_no_more_than_is_so() {
    if !is_root("dead_keys::a_leak_report_on_a_full_disk_kills_the_key_and_claims_no_more_than_is_so") {
        return;
    }
    let (disk, gateway, source) = without_room();
    let mut live = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let report = |secret: &str| {
        let answer = gateway.post("/v1/leaks", "", &json!({ "secret": secret }));
        assert_eq!(answer.status, 202, "{}", answer.text());
        answer.json()
    };
    assert!(report("nonsense").get("durable").is_none());
    let said = report(&source.key);
    assert_eq!(said["durable"], json!(false), "{said}");
    assert_eq!(report("nonsense"), said, "the same for everybody");
    live.disconnected(KEY_DEAD);
    assert_eq!(post(&gateway, &source), 401);
    assert!(warned(&gateway, "not durable yet").contains(&source.key_id));
    let count =
        |outcome: &str| gateway.metric(&format!("headgate_leak_reports_total{{outcome=\"{outcome}\"}}"));
    assert_eq!((count("revoked_not_durable"), count("revoked"), count("unknown")), (1.0, 0.0, 2.0));

    disk.empty();
    warns_no_more(&gateway);
    assert!(report("nonsense").get("durable").is_none());
    gateway.kill();
    let gateway = setup(&disk).start();
    assert_eq!(post(&gateway, &source), 401, "revoked still");
    assert_eq!(acts(&gateway, &source), ["datasource.created", "key.leaked"]);
}

#[test]
fn a_datasource_is_deleted_on_a_full_disk_with_its_keys() {
    if !is_root("dead_keys::a_datasource_is_deleted_on_a_full_disk_with_its_keys") {
        return;
    }
    let (disk, gateway, source) = without_room();
    let mut live = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let path = format!("/v1/datasources/{}", source.id);
    let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
    assert_undurable(&answer);
    live.disconnected(KEY_DEAD);
    assert_eq!(post(&gateway, &source), 401);
    assert_eq!(gateway.get(&path, &gateway.admin_key()).status, 404);
    // Asked again, it says the same.
    assert_undurable(&gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]));
    let warned = warned(&gateway, "not durable yet");
    assert!(warned.contains("deleted datasources: 1"), "{warned}");
    assert!(!warned.contains(&source.id), "/readyz is for everybody");

    disk.empty();
    warns_no_more(&gateway);
    gateway.kill();
    let gateway = setup(&disk).start();
    assert_eq!(gateway.get(&path, &gateway.admin_key()).status, 404, "deleted still");
    assert_eq!(post(&gateway, &source), 401);
    let deleted = acts(&gateway, &source).into_iter().filter(|action| action == "datasource.deleted");
    assert_eq!(deleted.count(), 1);
}

#[test]
fn on_a_full_disk_the_old_key_dies_when_its_grace_or_its_time_is_over_or_no_grace_is_asked_for() {
    if !is_root(
        "dead_keys::on_a_full_disk_the_old_key_dies_when_its_grace_or_its_time_is_over_or_no_grace_is_asked_for",
    ) {
        return;
    }
    let disk = SmallDisk::mount();
    let gateway = setup(&disk).start();
    let [graced, expired, replaced] = ["graced", "expired", "replaced"].map(|id| gateway.create(id));
    let rotate = |source: &Source, grace_s: u64| {
        let path = format!("/v1/datasources/{}/keys/{}/rotate", source.id, source.key_id);
        gateway.post(&path, &gateway.admin_key(), &json!({ "grace_seconds": grace_s }))
    };
    assert_eq!(rotate(&graced, 2).status, 201);
    let expires_at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(2);
    let path = format!("/v1/datasources/{}/keys", expired.id);
    let made = gateway.post(&path, &gateway.admin_key(), &json!({ "expires_at": expires_at.to_string() }));
    let made = made.json();
    let text = |member: &str| made["key"][member].as_str().expect("a text").to_owned();
    let expired = Source { key_id: text("id"), key: text("secret"), ..expired };
    warns_no_more(&gateway);
    std::fs::remove_file(disk.path().join("registry.reserve")).expect("there is a reserve");
    disk.fill(0);
    let mut live = [&graced, &expired, &replaced].map(|of| Wire::login(gateway.mqtt, Version::V5, &of.key));

    let answer = rotate(&replaced, 0);
    assert_eq!(answer.status, 503, "{}", answer.text());
    let detail = answer.json()["detail"].as_str().expect("a text").to_owned();
    for part in ["no new key could be made", "is dead all the same", "not durable yet", &replaced.key_id] {
        assert!(detail.contains(part), "{part:?} in {detail}");
    }
    for (wire, of) in live.iter_mut().zip([&graced, &expired, &replaced]) {
        wire.disconnected(KEY_DEAD);
        assert_eq!(post(&gateway, of), 401, "{}", of.id);
    }
    for of in [&graced, &expired, &replaced] {
        wait_for("it to be named", || warned(&gateway, "not durable yet").contains(&of.key_id).then_some(()));
    }

    disk.empty();
    warns_no_more(&gateway);
    gateway.kill();
    let gateway = setup(&disk).start();
    for of in [&graced, &expired, &replaced] {
        assert_eq!(post(&gateway, of), 401, "{} still", of.id);
    }
}
