//! Rotation: both keys work during the grace, the list tells who still uses the old one, and it retires
//! by itself, or not at all if the rotation is undone.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::wire::{Connect, Version, Wire};
use crate::common::{Gateway, Setup, scratch, wait_for};
use crate::{KEY_DEAD, Made, acts, audited, create_key, listed, post, refused, revoke, rotate, shown};

#[test]
fn a_rotated_key_works_until_its_grace_ends_and_then_retires_by_itself() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let rotated_at = Instant::now();
    let answer = rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 3 }));
    let new = Made::of(&answer);
    assert_eq!(answer.json()["replaced"]["id"], source.key_id);

    // Both work, and what is connected stays so.
    assert_eq!((post(&gateway, "press-4", &source.key), post(&gateway, "press-4", &new.secret)), (200, 200));
    assert_eq!(device.publish(Version::V5, 1, "t", b"1"), 0);
    let old = shown(&gateway, "press-4", &source.key_id);
    assert_eq!((&old["state"], &old["replaced_by"]), (&json!("rotating"), &json!(new.id)));
    assert_eq!(old["grace_ends_at"], answer.json()["replaced"]["grace_ends_at"]);
    assert_eq!(shown(&gateway, "press-4", &new.id)["replaces"], source.key_id);

    device.disconnected(KEY_DEAD);
    let lived = rotated_at.elapsed();
    assert!((Duration::from_millis(2_900)..Duration::from_millis(4_500)).contains(&lived), "{lived:?}");
    assert_eq!((post(&gateway, "press-4", &source.key), post(&gateway, "press-4", &new.secret)), (401, 200));
    // In a cluster it is dead here before that is written down for all.
    wait_for("the old key to be off the list", || {
        let ids: Vec<_> = listed(&gateway, "press-4").iter().map(|key| key["id"].clone()).collect();
        (ids == [json!(new.id)]).then_some(())
    });
    let retired = wait_for("the audit", || acts(&gateway, "key.retired", &source.key_id).pop());
    assert_eq!(retired["who"], "system");
    wait_for("the histogram", || (gateway.metric("headgate_revocation_seconds_count") >= 1.0).then_some(()));
}

#[test]
fn a_grace_goes_on_over_a_restart_and_ends_even_while_the_gateway_is_down() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create("a"), gateway.create("b"));
    let new_a = Made::of(&rotate(&gateway, "a", &a.key_id, &json!({ "grace_seconds": 1 })));
    let new_b = Made::of(&rotate(&gateway, "b", &b.key_id, &json!({ "grace_seconds": 3600 })));
    gateway.kill();
    std::thread::sleep(Duration::from_millis(1_100)); // The grace is a time: it has to pass.
    let gateway = Gateway::start(dir.path());
    assert_eq!((post(&gateway, "a", &a.key), post(&gateway, "a", &new_a.secret)), (401, 200));
    assert_eq!((post(&gateway, "b", &b.key), post(&gateway, "b", &new_b.secret)), (200, 200));
    assert_eq!(shown(&gateway, "b", &b.key_id)["state"], "rotating");
    let undone = rotate(&gateway, "b", &b.key_id, &json!({ "undo": true }));
    assert_eq!(undone.status, 200, "{}", undone.text());
    assert_eq!((post(&gateway, "b", &b.key), post(&gateway, "b", &new_b.secret)), (200, 401));
}

#[test]
fn a_rotation_is_undone_the_old_key_lives_and_the_new_one_is_dead() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let new = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 2 })));
    let rotated = Instant::now();
    let mut device = Wire::login(gateway.mqtt, Version::V5, &new.secret);
    let mut stays = Wire::login(gateway.mqtt, Version::V5, &source.key);

    let undone = rotate(&gateway, "press-4", &source.key_id, &json!({ "undo": true }));
    assert_eq!(undone.status, 200, "{}", undone.text());
    assert_eq!(undone.json()["key"]["state"], "active");
    assert_eq!(undone.json()["revoked"], new.id);
    device.disconnected(KEY_DEAD);
    assert_eq!((post(&gateway, "press-4", &source.key), post(&gateway, "press-4", &new.secret)), (200, 401));
    // The moment at which it would have retired has to pass.
    std::thread::sleep(Duration::from_millis(2_200).saturating_sub(rotated.elapsed()));
    assert_eq!(stays.publish(Version::V5, 1, "t", b"1"), 0);
    assert_eq!(post(&gateway, "press-4", &source.key), 200);
    assert_eq!(acts(&gateway, "key.rotation_undone", &source.key_id).len(), 1);
    let again = rotate(&gateway, "press-4", &source.key_id, &json!({ "undo": true }));
    assert_eq!(again.status, 409, "{}", again.text());
}

#[test]
fn without_a_grace_the_old_key_is_dead_when_the_call_returns() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let new = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 0 })));
    assert_eq!((post(&gateway, "press-4", &source.key), post(&gateway, "press-4", &new.secret)), (401, 200));
    device.disconnected(KEY_DEAD);
}

#[test]
fn the_new_key_is_as_the_old_one_and_a_day_is_the_grace_that_nobody_asked_for() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let wanted = json!({ "label": "line 2", "scopes": ["ingest", "subscribe"],
        "expires_at": "2099-01-01T00:00:00Z", "limits": { "payload_bytes": 1000 } });
    let old = create_key(&gateway, "press-4", &wanted);
    let answer = rotate(&gateway, "press-4", &old.id, &json!({}));
    let new = Made::of(&answer);
    let (old, new) = (shown(&gateway, "press-4", &old.id), shown(&gateway, "press-4", &new.id));
    for field in ["label", "scopes", "expires_at", "limits"] {
        assert_eq!(old[field], new[field], "{field}");
        assert!(!new[field].is_null(), "{field}");
    }
    let time = |value: &serde_json::Value| -> jiff::Timestamp {
        value.as_str().expect("a time").parse().expect("RFC 3339")
    };
    let grace = time(&old["grace_ends_at"]).duration_since(time(&new["created_at"])).as_secs();
    assert!((86_395..=86_400).contains(&grace), "{grace}");
}

#[test]
fn what_does_not_go_together_is_refused_and_changes_nothing() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let other = gateway.create("other");
    let status =
        |key_id: &str, wanted: &serde_json::Value| rotate(&gateway, "press-4", key_id, wanted).status;
    assert_eq!(status("000000000000", &json!({})), 404);
    assert_eq!(status(&other.key_id, &json!({})), 404, "another datasource's");
    assert_eq!(status("nonsense", &json!({})), 400);
    assert_eq!(status(&source.key_id, &json!({ "grace_seconds": 366 * 86_400 + 1 })), 400);
    assert_eq!(status(&source.key_id, &json!({ "grace_seconds": -1 })), 400);
    assert_eq!(status(&source.key_id, &json!({ "grace_seconds": 5, "undo": true })), 400);
    assert_eq!(status(&source.key_id, &json!({ "grace": 5 })), 400);
    assert_eq!(status(&source.key_id, &json!({ "undo": true })), 409, "not being rotated");
    let device = gateway.post(
        &format!("/v1/datasources/press-4/keys/{}/rotate", source.key_id),
        &source.key,
        &json!({}),
    );
    assert_eq!(device.status, 403);
    assert_eq!(listed(&gateway, "press-4").len(), 1);

    // A chain is undone from its end.
    let second = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({})));
    assert_eq!(status(&source.key_id, &json!({})), 409, "being rotated already");
    let third = Made::of(&rotate(&gateway, "press-4", &second.id, &json!({})));
    assert_eq!(status(&source.key_id, &json!({ "undo": true })), 409);
    assert_eq!(status(&second.id, &json!({ "undo": true })), 200);
    assert_eq!(status(&source.key_id, &json!({ "undo": true })), 200);
    assert_eq!(post(&gateway, "press-4", &third.secret), 401);
    assert_eq!(post(&gateway, "press-4", &second.secret), 401);
    assert_eq!(post(&gateway, "press-4", &source.key), 200);
}

#[test]
fn the_last_admin_key_can_be_rotated_and_neither_it_nor_its_heir_leaves_nobody() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = listed(&gateway, "*")[0]["id"].as_str().expect("an id").to_owned();
    let new = Made::of(&rotate(&gateway, "*", &admin, &json!({})));
    let refused = revoke(&gateway, "*", &new.id);
    assert_eq!(refused.status, 409, "the other one is about to retire: {}", refused.text());
    assert_eq!(revoke(&gateway, "*", &admin).status, 204);
    let answer = gateway.get("/v1/datasources", &new.secret);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn the_list_tells_who_still_uses_the_old_key_and_goes_on_after_a_restart() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    assert_eq!(shown(&gateway, "press-4", &source.key_id)["last_used"], json!(null));
    let new = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({})));
    let connect = Connect { client_id: "pump-7".to_owned(), ..Connect::with_key(Version::V5, &source.key) };
    let (mut device, _) = Wire::connect(gateway.mqtt, &connect);
    for packet_id in 1..=3 {
        assert_eq!(device.publish(Version::V5, packet_id, "t", b"1"), 0);
    }
    assert_eq!(device.publish(Version::V5, 4, "$a", b"1"), 0x90, "refused for its topic");
    assert_eq!(post(&gateway, "press-4", &new.secret), 200);

    let old = shown(&gateway, "press-4", &source.key_id);
    assert_eq!((&old["accepted"], &old["refused"]), (&json!(3), &json!(1)));
    assert_eq!(old["connections"], 1);
    let last = &old["last_used"];
    assert_eq!((&last["client_id"], &last["transport"]), (&json!("pump-7"), &json!("mqtt")));
    assert_eq!(
        (&last["address"], &last["offset"]),
        (&json!("127.0.0.1"), &json!(crate::common::cluster::first_offset() + 2))
    );
    let used_at: jiff::Timestamp = last["at"].as_str().expect("a time").parse().expect("RFC 3339");
    assert!(jiff::Timestamp::now().duration_since(used_at).as_secs() < 5);
    assert_eq!(old["users"].as_array().expect("a list").len(), 1);
    let heir = shown(&gateway, "press-4", &new.id);
    assert_eq!((&heir["accepted"], &heir["last_used"]["transport"]), (&json!(1), &json!("http")));

    drop(device);
    gateway.stop();
    let gateway = Gateway::start(dir.path());
    let after = shown(&gateway, "press-4", &source.key_id);
    for field in ["accepted", "refused", "last_used", "users", "state"] {
        assert_eq!(after[field], old[field], "{field}");
    }
    assert_eq!(after["connections"], 0);
    assert_eq!(post(&gateway, "press-4", &source.key), 200);
    let after = shown(&gateway, "press-4", &source.key_id);
    assert_eq!((&after["accepted"], &after["last_used"]["transport"]), (&json!(4), &json!("http")));
    assert_eq!(after["users"].as_array().expect("a list").len(), 2, "the one of before is still named");
}

#[test]
fn those_who_use_a_key_are_bounded_and_the_newest_are_told() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    for number in 0..12 {
        let client_id = format!("device-{number}");
        Wire::connect(gateway.mqtt, &Connect { client_id, ..Connect::with_key(Version::V311, &source.key) });
    }
    let users = shown(&gateway, "press-4", &source.key_id)["users"].clone();
    let names: Vec<_> =
        users.as_array().expect("a list").iter().map(|user| user["client_id"].clone()).collect();
    let newest: Vec<_> = (4..12).rev().map(|number| json!(format!("device-{number}"))).collect();
    assert_eq!(names, newest);
}

#[test]
fn use_is_not_written_for_each_message() {
    let dir = scratch();
    // It is about the file that a gateway alone has.
    let gateway = Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    let size = || std::fs::metadata(dir.path().join("registry.db-wal")).expect("there").len();
    let before = size();
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    for packet_id in 1..=500 {
        assert_eq!(device.publish(Version::V5, packet_id, "t", b"1"), 0);
    }
    assert_eq!(shown(&gateway, "press-4", &source.key_id)["accepted"], 500);
    // One write of it every 5 s, of a few pages: 500 would be megabytes.
    assert!(size() - before < 200_000, "{} bytes", size() - before);
    assert_eq!(audited(&gateway).len(), 2, "its own key and this datasource");
}

#[test]
fn a_key_that_was_rotated_at_once_is_refused_everywhere() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 0 }));
    refused(&gateway, "press-4", &source.key);
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&Connect::with_key(Version::V5, &source.key).packet());
    assert_eq!(wire.packet(crate::common::wire::CONNACK).reason(), 0x87);
}
