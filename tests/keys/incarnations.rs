//! A datasource that is deleted and created again under the same id begins empty: nothing of the old one comes to the
//! keys of the new one, on no way out, whatever was behind, offline, killed or rebuilt meanwhile. What it had is for
//! admins of the gateway alone, until it is purged.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::cluster::first_offset;
use crate::common::wire::{
    Connect, Message, Next, PUBLISH, SUBACK, Version, Wire, subscribe_with, user_property,
};
use crate::common::{Answer, Gateway, Source, scratch, wait_for};
use crate::create_key;

const V5: Version = Version::V5;
/// `/v1/datasources/press-4`
const PRESS: &str = "/v1/datasources/press-4";
/// How the payloads begin that a replay waits for.
const END: &str = "\"the end";
/// MQTT 5 section 3.1.2.11.2: for ever.
const SESSION_FOR_EVER: [u8; 5] = [0x11, 0xff, 0xff, 0xff, 0xff];

fn ingest(gateway: &Gateway, id: &str, topic: &str, key: &str, payload: &[u8]) -> Answer {
    gateway.request("POST", &format!("/v1/ingest/{id}/{topic}"), key, &[], payload)
}

/// What a key gets of a filter from the beginning of the log on, up to a message that is published for that and comes
/// last.
fn replay(gateway: &Gateway, key: &str, filter: &str, source: &Source) -> Vec<String> {
    static ENDS: AtomicU64 = AtomicU64::new(0);
    let end = format!("{END} {}\"", ENDS.fetch_add(1, Ordering::Relaxed));
    let mut wire = Wire::login(gateway.mqtt, V5, key);
    let from = user_property("from-offset", &first_offset().to_string());
    wire.send(&subscribe_with(V5, 1, &[(filter, 0)], &from));
    assert_eq!(wire.packet(SUBACK).codes(V5), [0]);
    assert_eq!(ingest(gateway, &source.id, "end", &source.key, end.as_bytes()).status, 200);
    let mut seen = Vec::new();
    loop {
        let payload = Message::read(V5, &wire.packet(PUBLISH)).payload;
        seen.push(String::from_utf8(payload).expect("text"));
        if seen.last() == Some(&end) {
            return seen;
        }
    }
}

/// The retained messages that a new subscriber gets.
fn retained(gateway: &Gateway, key: &str, filter: &str) -> Vec<String> {
    let mut wire = Wire::login(gateway.mqtt, V5, key);
    wire.send(&subscribe_with(V5, 1, &[(filter, 0)], &[]));
    wire.packet(SUBACK);
    let mut seen = Vec::new();
    while let Next::Packet(frame) = wire.next_within(Duration::from_millis(700)) {
        seen.push(String::from_utf8(Message::read(V5, &frame).payload).expect("text"));
    }
    seen
}

fn records_of(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["records"].as_array().expect("records").clone()
}

/// Publishes into every store that there is, and leaves a session behind.
fn fill(gateway: &Gateway, source: &Source) {
    for number in 0..3 {
        let payload = json!({ "old": number }).to_string();
        let answer = ingest(gateway, &source.id, "spindle", &source.key, payload.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let headers = [("idempotency-key", "reading-1")];
    let path = format!("/v1/ingest/{}/once", source.id);
    assert_eq!(gateway.request("POST", &path, &source.key, &headers, b"1").status, 200);
    let stay = Connect {
        client_id: "device".to_owned(),
        properties: SESSION_FOR_EVER.to_vec(),
        ..Connect::with_key(V5, &source.key)
    };
    let (mut device, _) = Wire::connect(gateway.mqtt, &stay);
    device.send(&subscribe_with(V5, 1, &[("#", 1), ("$share/workers/#", 1)], &[]));
    device.packet(SUBACK);
    device.send(&Message::new("state", b"\"old state\"").retained().at(1, 7).packet(V5));
    wait_for("the PUBACK", || match device.next() {
        Next::Packet(frame) if frame.kind() == 4 => Some(()),
        Next::Packet(_) => None,
        other => panic!("{other:?}"),
    });
    let schema = json!({ "schema": { "type": "object" } });
    let schema = gateway.request(
        "PUT",
        &format!("/v1/datasources/{}/schema", source.id),
        &gateway.admin_key(),
        &[("content-type", "application/json")],
        schema.to_string().as_bytes(),
    );
    assert_eq!(schema.status, 200, "{}", schema.text());
    assert_eq!(ingest(gateway, &source.id, "bad", &source.key, b"7").status, 422);
    gateway.settle();
}

/// Nothing of what [`fill`] has done comes to the keys of another datasource with that id.
fn begins_empty(gateway: &Gateway, new: &Source, of_all: &str) {
    let read = |path: &str| gateway.get(&format!("{PRESS}/{path}"), &new.key);
    for (key, filter) in [(&*new.key, "#"), (of_all, "press-4/#")] {
        let seen = replay(gateway, key, filter, new);
        assert!(seen.iter().all(|payload| payload.starts_with(END)), "{seen:?}");
    }
    for (key, filter) in [(&*new.key, "state"), (of_all, "press-4/state")] {
        assert_eq!(retained(gateway, key, filter), Vec::<String>::new());
    }
    gateway.settle();
    let topics =
        |records: Vec<Value>| records.into_iter().map(|r| r["topic"].clone()).filter(|t| t != "end").count();
    assert_eq!(topics(records_of(&read("records"))), 0);
    assert_eq!(topics(read("latest").json()["topics"].as_array().expect("topics").clone()), 0);
    assert_eq!(topics(records_of(&read("quarantine"))), 0);
    for old in ["records?incarnation=1", "latest?incarnation=1", "quarantine?incarnation=1"] {
        assert_eq!(read(old).status, 403, "{old}");
    }
}

fn all_key(gateway: &Gateway) -> String {
    create_key(gateway, "*", &json!({ "scopes": ["ingest", "subscribe"] })).secret
}

#[test]
fn a_datasource_that_is_created_again_begins_empty_on_every_way_out() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let of_all = all_key(&gateway);
    let old = gateway.create_open("press-4");
    fill(&gateway, &old);
    assert_eq!(ingest(&gateway, "press-4", "all", &of_all, b"{\"old\": \"of all\"}").status, 200);
    gateway.delete("press-4");
    let new = gateway.create_open("press-4");
    begins_empty(&gateway, &new, &of_all);

    // The same client identifier, group and message id mean nothing.
    let again = Connect {
        client_id: "device".to_owned(),
        clean: false,
        properties: SESSION_FOR_EVER.to_vec(),
        ..Connect::with_key(V5, &new.key)
    };
    let (mut device, connack) = Wire::connect(gateway.mqtt, &again);
    assert_eq!(connack.body[0], 0, "no session is present");
    assert_eq!(device.next_within(Duration::from_millis(500)), Next::Silent);
    device.send(&subscribe_with(V5, 1, &[("$share/workers/#", 1)], &user_property("tail", "10")));
    assert_eq!(
        device.packet(SUBACK).codes(V5),
        [1],
        "the group is new: its first member may begin in the past"
    );
    drop(device);
    let headers = [("idempotency-key", "reading-1")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/end", &new.key, &headers, b"1");
    assert_eq!((answer.status, answer.json()["duplicate"].as_bool().unwrap_or(false)), (200, false));
    assert_eq!(ingest(&gateway, "press-4", "end", &new.key, b"7").status, 200, "no schema");

    let admin = gateway.admin_key();
    let before = gateway.get(&format!("{PRESS}/records?incarnation=1"), &admin);
    assert_eq!(records_of(&before).len(), 6, "{}", before.text());
    assert_eq!(records_of(&gateway.get(&format!("{PRESS}/quarantine?incarnation=1"), &admin)).len(), 1);
    let listed = gateway.get("/v1/datasources?deleted=true", &admin).json();
    assert_eq!(
        (&listed["deleted"][0]["id"], &listed["deleted"][0]["incarnation"]),
        (&json!("press-4"), &json!(1))
    );
    assert_eq!(gateway.get(PRESS, &admin).json()["incarnation"], 2);
}

/// Whatever is removed is made again from the log, or stays away.
fn restarted_without(gateway: Gateway, dir: &Path, files: &[&str]) -> Gateway {
    gateway.kill();
    for file in files {
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(dir.join(format!("{file}{suffix}")));
        }
    }
    Gateway::start(dir)
}

#[test]
fn it_stays_empty_after_kills_and_when_the_stores_are_made_again_from_the_log() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let of_all = all_key(&gateway);
    let old = gateway.create_open("press-4");
    fill(&gateway, &old);
    gateway.delete("press-4");
    // Killed between the deletion and the creation, with what reads the log behind.
    let gateway = restarted_without(gateway, dir.path(), &["records.db", "retained.db"]);
    let new = gateway.create_open("press-4");
    begins_empty(&gateway, &new, &of_all);
    let gateway = restarted_without(gateway, dir.path(), &[]);
    begins_empty(&gateway, &new, &of_all);
    let gateway = restarted_without(gateway, dir.path(), &["records.db", "retained.db"]);
    begins_empty(&gateway, &new, &of_all);
    let before = gateway.get(&format!("{PRESS}/records?incarnation=1"), &gateway.admin_key());
    assert_eq!(records_of(&before).len(), 5, "{}", before.text());
}

fn purge(gateway: &Gateway, more: &str) -> Answer {
    let path = format!("{PRESS}?purge=true{more}");
    let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
    wait_for("the purge", || {
        let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
        (answer.status != 202 || answer.json()["done"] == true).then_some(())
    });
    answer
}

#[test]
fn a_purge_removes_what_is_stored_and_says_how_much() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let old = gateway.create_open("press-4");
    fill(&gateway, &old);
    let answer = gateway.request("DELETE", &format!("{PRESS}?purge=true"), &gateway.admin_key(), &[], &[]);
    let purged = answer.json();
    assert_eq!((answer.status, &purged["done"]), (200, &json!(true)), "{purged}");
    let counts =
        ["records", "quarantined", "retained", "sessions"].map(|name| purged[name].as_u64().expect(name));
    assert_eq!(counts, [5, 1, 1, 1], "{purged}");
    assert_eq!(purged["bytes"], 3 * "{\"old\":0}".len() as u64 + 1 + "\"old state\"".len() as u64 + 1);
    let admin = gateway.admin_key();
    for old in ["records", "latest", "quarantine"] {
        assert_eq!(gateway.get(&format!("{PRESS}/{old}?incarnation=1"), &admin).status, 404);
    }
    let listed = gateway.get("/v1/datasources?deleted=true", &admin).json();
    assert!(listed["deleted"][0]["purged_at"].is_string(), "{listed}");

    let gateway = restarted_without(gateway, dir.path(), &["records.db"]);
    let new = gateway.create_open("press-4");
    gateway.settle();
    assert_eq!(gateway.get(&format!("{PRESS}/records?incarnation=1"), &admin).status, 404);
    // The pages are overwritten, and what was written anew has none of it.
    assert_eq!(ingest(&gateway, "press-4", "end", &new.key, b"9").status, 200);
    gateway.stored("press-4", 1);
    gateway.stop();
    let stored = std::fs::read(dir.path().join("records.db")).expect("readable");
    assert!(!stored.windows(9).any(|bytes| bytes == b"old state"), "nothing is left in the file");
}

#[test]
fn a_purge_of_an_earlier_incarnation_leaves_the_present_one_alone() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let old = gateway.create_open("press-4");
    fill(&gateway, &old);
    gateway.delete("press-4");
    let new = gateway.create_open("press-4");
    assert_eq!(ingest(&gateway, "press-4", "end", &new.key, b"1").status, 200);
    gateway.stored("press-4", 1);
    // An admin of the new one alone may not.
    let own = create_key(&gateway, "press-4", &json!({ "scopes": ["admin"] })).secret;
    let path = format!("{PRESS}?purge=true&incarnation=1");
    assert_eq!(gateway.request("DELETE", &path, &own, &[], &[]).status, 403);
    let answer = purge(&gateway, "&incarnation=1").json();
    assert_eq!((&answer["records"], &answer["incarnations"]), (&json!(5), &json!([1])), "{answer}");
    assert_eq!(gateway.records("press-4").len(), 1);
    assert_eq!(ingest(&gateway, "press-4", "end", &new.key, b"1").status, 200);
    assert_eq!(purge(&gateway, "&incarnation=7").status, 404);
    let words = gateway.request("DELETE", &format!("{PRESS}?incarnation=1"), &gateway.admin_key(), &[], &[]);
    assert_eq!(words.status, 422, "{}", words.text());
}

/// What a datasource had, incarnation by incarnation.
#[derive(Default)]
struct ModelDatasource {
    /// The payloads of each, in the order of their acceptance, and whether it is purged.
    incarnations: Vec<(Vec<String>, bool)>,
    /// The newest retained payload of the present one.
    retained: Option<String>,
    present: Option<Source>,
}

/// Random numbers that a seed decides (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % end
    }

    fn percent(&mut self, part: u64) -> bool {
        self.below(100) < part
    }
}

/// Drives a gateway by a seed, and compares what every reader gets with what it should.
struct IncarnationModel {
    random: Random,
    datasources: BTreeMap<&'static str, ModelDatasource>,
    of_all: String,
    numbers: u64,
}

impl IncarnationModel {
    fn run(seed: u64, steps: usize) {
        let dir = scratch();
        let mut gateway = Gateway::start(dir.path());
        let datasources = ["a", "b"].map(|id| (id, ModelDatasource::default())).into();
        let mut model = Self { random: Random(seed), datasources, of_all: all_key(&gateway), numbers: 0 };
        for _ in 0..steps {
            let id = if model.random.percent(70) { "a" } else { "b" };
            match model.random.below(100) {
                0..55 => model.publish(&gateway, id),
                55..70 => model.delete(&gateway, id),
                70..75 => model.purge_earlier(&gateway, id),
                75..82 => gateway = restarted_without(gateway, dir.path(), &[]),
                82..86 => gateway = restarted_without(gateway, dir.path(), &["records.db", "retained.db"]),
                _ => model.compare(&gateway, id, seed),
            }
        }
        for id in ["a", "b"] {
            model.compare(&gateway, id, seed);
        }
    }

    fn publish(&mut self, gateway: &Gateway, id: &'static str) {
        let (by_all, retain) = (self.random.percent(30), self.random.percent(20));
        for _ in 0..=self.random.below(4) {
            self.numbers += 1;
            let datasource = self.datasources.get_mut(id).expect("there");
            let source = datasource.present.get_or_insert_with(|| {
                datasource.incarnations.push((Vec::new(), false));
                gateway.create_open(id)
            });
            let key = if by_all { &self.of_all } else { &source.key };
            let payload = self.numbers.to_string();
            if retain {
                let mut wire = Wire::login(gateway.mqtt, V5, key);
                let topic = if by_all { format!("{id}/state") } else { "state".to_owned() };
                wire.send(&Message::new(&topic, &payload).retained().at(1, 1).packet(V5));
                assert_eq!(wire.packet(4).reason(), 0);
                datasource.retained = Some(payload.clone());
            } else {
                assert_eq!(ingest(gateway, id, "t", key, payload.as_bytes()).status, 200);
            }
            datasource.incarnations.last_mut().expect("it is present").0.push(payload);
        }
    }

    fn delete(&mut self, gateway: &Gateway, id: &'static str) {
        let datasource = self.datasources.get_mut(id).expect("there");
        if datasource.present.take().is_none() {
            return;
        }
        datasource.retained = None;
        let purges = self.random.percent(30);
        let path = format!("/v1/datasources/{id}{}", if purges { "?purge=true" } else { "" });
        let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
        assert!([200, 202, 204].contains(&answer.status), "{}", answer.text());
        datasource.incarnations.last_mut().expect("it was present").1 = purges;
    }

    fn purge_earlier(&mut self, gateway: &Gateway, id: &'static str) {
        let datasource = self.datasources.get_mut(id).expect("there");
        let ended = datasource.incarnations.len() - usize::from(datasource.present.is_some());
        if ended == 0 {
            return;
        }
        let number = usize::try_from(self.random.below(ended as u64)).expect("small");
        let path = format!("/v1/datasources/{id}?purge=true&incarnation={}", number + 1);
        let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
        assert!([200, 202].contains(&answer.status), "{}", answer.text());
        datasource.incarnations[number].1 = true;
    }

    /// Every reader of one datasource has what is its own, and nothing else.
    fn compare(&mut self, gateway: &Gateway, id: &'static str, seed: u64) {
        let Self { datasources, of_all, .. } = self;
        let datasource = datasources.get_mut(id).expect("there");
        let admin = gateway.admin_key();
        gateway.settle();
        let payloads = |answer: &Answer| -> Vec<String> {
            records_of(answer).iter().map(|record| record["payload"].to_string()).collect()
        };
        let present = datasource.present.as_ref();
        for (at, (expected, is_purged)) in datasource.incarnations.iter().enumerate() {
            let is_present = present.is_some() && at + 1 == datasource.incarnations.len();
            let path = format!("/v1/datasources/{id}/records?limit=1000&incarnation={}", at + 1);
            let answer = gateway.get(&path, &admin);
            if *is_purged {
                assert_eq!(answer.status, 404, "seed {seed}: {id} {}", at + 1);
                continue;
            }
            assert_eq!(payloads(&answer), *expected, "seed {seed}: {id} {}", at + 1);
            if let Some(source) = present.filter(|_| is_present) {
                let own = gateway.get(&format!("/v1/datasources/{id}/records?limit=1000"), &source.key);
                assert_eq!(payloads(&own), *expected, "seed {seed}: {id}");
            }
        }
        let Some(source) = present else { return };
        let (expected, _) = datasource.incarnations.last_mut().expect("it is present");
        for (key, filter) in [(&source.key, "#".to_owned()), (of_all, format!("{id}/#"))] {
            let seen = replay(gateway, key, &filter, source);
            expected.extend(seen.last().cloned());
            assert_eq!(seen, *expected, "seed {seed}: {id} {filter}");
        }
        let kept = retained(gateway, &source.key, "state");
        assert_eq!(kept, datasource.retained.iter().cloned().collect::<Vec<_>>(), "seed {seed}: {id}");
    }
}

/// More seeds: `HEADGATE_MODEL_SEEDS=100`.
#[test]
fn whatever_is_done_each_incarnation_has_its_own_records_and_no_others() {
    let seeds = std::env::var("HEADGATE_MODEL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        (0..seeds).for_each(|seed| drop(scope.spawn(move || IncarnationModel::run(seed, 60))));
    });
}
