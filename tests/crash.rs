//! What an ack promises, under the worst: a gateway that is killed again and again, at random
//! moments, while many clients publish, on one data directory all along. In the end every message
//! that was acknowledged is in the log and in storage, and none is there twice.

mod common;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use headgate::config::Config;
use headgate::log::Log;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use common::wire::{Connect, Next, PUBACK, Version, Wire, publish};
use common::{Gateway, Setup, Source, http, http_agent, scratch, wait_for};

const ROUNDS: usize = 24;
/// A gateway is also killed this often while it is still starting, and recovering.
const KILLED_WHILE_STARTING: usize = 8;
const SEGMENT_BYTES: u64 = 1 << 20;

/// Numbers that are given to messages, and how many have been acknowledged.
#[derive(Default)]
struct Ledger {
    next: AtomicU64,
    acked: AtomicU64,
}

impl Ledger {
    /// A number that no message has had, in a payload whose size varies with it.
    fn message(&self) -> (u64, Value) {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let pad = "x".repeat(usize::try_from(n * 37 % 400).expect("small"));
        (n, json!({ "n": n, "pad": pad }))
    }

    fn ack(&self, acked: &mut Vec<u64>, numbers: impl IntoIterator<Item = u64>) {
        let before = acked.len();
        acked.extend(numbers);
        let count = u64::try_from(acked.len() - before).expect("small");
        self.acked.fetch_add(count, Ordering::Relaxed);
    }
}

/// Publishes with `window` messages under way until the connection ends. Returns the numbers that
/// were acknowledged.
fn mqtt_sender(
    gateway: &Gateway,
    source: &Source,
    ledger: &Arc<Ledger>,
    version: Version,
    window: u16,
) -> JoinHandle<Vec<u64>> {
    let (addr, key, ledger) = (gateway.mqtt, source.key.clone(), ledger.clone());
    std::thread::spawn(move || {
        let mut acked = Vec::new();
        let mut wire = Wire::open(addr);
        wire.send(&Connect::with_key(version, &key).packet());
        let Next::Packet(_connack) = wire.next() else { return acked };
        let mut under_way = HashMap::new();
        let mut free: Vec<u16> = (1..=window).collect();
        loop {
            let mut burst = Vec::new();
            for packet_id in free.drain(..) {
                let (n, payload) = ledger.message();
                under_way.insert(packet_id, n);
                burst.extend(publish(version, packet_id, "crash", payload.to_string().as_bytes()));
            }
            wire.send(&burst);
            // One ack is waited for; those that came with it are taken along.
            let mut patience = common::PATIENCE;
            loop {
                match wire.next_within(patience) {
                    Next::Packet(frame) => {
                        assert_eq!(frame.kind(), PUBACK, "{frame:?}");
                        assert_eq!(frame.reason(), 0, "{frame:?}");
                        let n = under_way.remove(&frame.packet_id()).expect("an ack for what was sent");
                        ledger.ack(&mut acked, [n]);
                        free.push(frame.packet_id());
                        patience = Duration::ZERO;
                    }
                    Next::Silent if patience.is_zero() => break,
                    Next::Silent => panic!("no ack for {} messages within {patience:?}", under_way.len()),
                    Next::Closed => return acked,
                }
            }
        }
    })
}

/// Posts `size` messages a request, one after another, until the gateway is gone.
fn http_sender(
    gateway: &Gateway,
    source: &Source,
    ledger: &Arc<Ledger>,
    size: usize,
) -> JoinHandle<Vec<u64>> {
    let (addr, source, ledger) = (gateway.http, source.clone(), ledger.clone());
    std::thread::spawn(move || {
        let mut acked = Vec::new();
        let agent = http_agent();
        let path = format!("/v1/ingest/{}/crash", source.id);
        let json = [("content-type", "application/json")];
        loop {
            let (numbers, messages): (Vec<u64>, Vec<Value>) = (0..size).map(|_| ledger.message()).unzip();
            let body = if size == 1 { messages[0].to_string() } else { Value::from(messages).to_string() };
            let Ok(answer) = http(&agent, addr, "POST", &path, &source.key, &json, body.as_bytes()) else {
                return acked;
            };
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(answer.json()["accepted"], size, "{}", answer.text());
            ledger.ack(&mut acked, numbers);
        }
    })
}

#[test]
fn what_was_acknowledged_survives_every_kill_and_is_stored_once() {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::make_rng::<SmallRng>().random());
    eprintln!("CRASH_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut millis = |from, to| Duration::from_millis(random.random_range(from..to));

    let dir = scratch();
    // Small segments, so that kills also meet the change from one to the next.
    let setup = Setup::on(dir.path()).set("log.segment_bytes", SEGMENT_BYTES);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    gateway.kill();

    let ledger = Arc::new(Ledger::default());
    let mut acked = Vec::new();
    for round in 0..ROUNDS {
        if round % (ROUNDS / KILLED_WHILE_STARTING) == 0 {
            let mut starting = setup.spawn();
            std::thread::sleep(millis(0, 60));
            starting.kill().expect("our child can be killed");
            starting.wait().expect("our child can be waited for");
        }
        let gateway = setup.start();
        let before = ledger.acked.load(Ordering::Relaxed);
        let mqtt = [
            (Version::V311, 1),
            (Version::V311, 100),
            (Version::V5, 1),
            (Version::V5, 20),
            (Version::V5, 500),
        ];
        let mut senders: Vec<_> =
            mqtt.map(|(version, window)| mqtt_sender(&gateway, &source, &ledger, version, window)).into();
        senders.extend([1, 1, 50].map(|size| http_sender(&gateway, &source, &ledger, size)));
        wait_for("the first ack of the round", || {
            (ledger.acked.load(Ordering::Relaxed) > before).then_some(())
        });
        std::thread::sleep(millis(50, 400));
        gateway.kill();
        for sender in senders {
            acked.append(&mut sender.join().expect("a sender saw only acks, and then the end"));
        }
    }
    let exit = setup.start().stop();

    let in_log = read_log(dir.path());
    let stored = read_storage(dir.path());
    eprintln!("acknowledged {}, in the log {}, stored {}", acked.len(), in_log.len(), stored.len());
    assert!(acked.len() > ROUNDS * 100, "the gateway was under load: {} acks", acked.len());
    assert!(log_bytes(dir.path()) > 2 * SEGMENT_BYTES, "the log had several segments");

    let numbers: HashSet<u64> = in_log.values().copied().collect();
    assert_eq!(numbers.len(), in_log.len(), "no message is in the log twice");
    let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
    assert!(lost.is_empty(), "{} acknowledged and not in the log: {lost:?}", lost.len());
    let sent = ledger.next.load(Ordering::Relaxed);
    assert!(numbers.iter().all(|n| *n < sent), "nothing is in the log that nobody sent");

    let offsets: Vec<u64> = in_log.keys().copied().collect();
    let all: Vec<u64> = (0..u64::try_from(in_log.len()).expect("small")).collect();
    assert_eq!(offsets, all, "offsets are contiguous from 0");
    assert_eq!(stored, in_log, "storage holds what the log holds, offset by offset\n{}", exit.output);
}

/// The message number at every offset, from the log's own files.
fn read_log(dir: &std::path::Path) -> BTreeMap<u64, u64> {
    let config = headgate::config::Log { segment_bytes: SEGMENT_BYTES, ..Config::default().log };
    let log = Log::open(dir, &config).expect("the log opens");
    let mut found = BTreeMap::new();
    let mut from = log.first_offset();
    while from < log.next_offset() {
        for batch in log.read(from, 1 << 20).expect("the log is readable") {
            for record in batch.records() {
                assert_eq!((record.datasource, record.topic), ("press-4", "crash"));
                found.insert(record.offset, number(record.payload));
            }
            from = batch.next_offset();
        }
    }
    found
}

/// The message number at every offset, from `records.db`.
fn read_storage(dir: &std::path::Path) -> BTreeMap<u64, u64> {
    let db = rusqlite::Connection::open(dir.join("records.db")).expect("records.db opens");
    let mut rows = db.prepare("SELECT \"offset\", payload FROM records").expect("a table of records");
    let rows = rows.query_map([], |row| {
        let payload = row.get_ref(1)?;
        Ok((row.get::<_, i64>(0)?.cast_unsigned(), number(payload.as_bytes()?)))
    });
    let rows: Vec<(u64, u64)> = rows.expect("rows").collect::<Result<_, _>>().expect("rows");
    let found: BTreeMap<u64, u64> = rows.iter().copied().collect();
    assert_eq!(found.len(), rows.len(), "no offset is stored twice");
    found
}

fn number(payload: &[u8]) -> u64 {
    let json: Value = serde_json::from_slice(payload).expect("a payload is stored as it was sent");
    json["n"].as_u64().expect("a number")
}

fn log_bytes(dir: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(dir.join("log")).expect("the log's directory");
    files.map(|file| file.expect("an entry").metadata().expect("its size").len()).sum()
}
