//! What an ack promises, under the worst: a gateway that is killed again and again, at random
//! moments, while many clients publish, on one data directory all along. In the end every message
//! that was acknowledged is in the log and in storage, and none is there twice.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::common::load::{Ledger, all_kinds, number};
use crate::common::{Setup, kept, scratch, wait_for};

const ROUNDS: usize = 24;
/// In every so manieth round the gateway is also killed while it starts, and recovers.
const KILL_WHILE_STARTING_EVERY: usize = 3;
const SEGMENT_BYTES: u64 = 1 << 20;

#[test]
fn what_was_acknowledged_survives_every_kill_and_is_stored_once() {
    let dir = scratch();
    // Small segments, so that kills also meet the change from one to the next.
    let setup = Setup::on(dir.path()).set("log.segment_bytes", SEGMENT_BYTES);
    let (acked, sent) = kill_again_and_again(&setup, ROUNDS, &[]);
    let gateway = setup.start();
    gateway.settle();
    gateway.stop();

    let in_log = kept::in_log(dir.path());
    let in_storage = kept::in_storage(dir.path());
    eprintln!("acknowledged {}, in the log {}, stored {}", acked.len(), in_log.len(), in_storage.len());
    assert!(acked.len() > ROUNDS * 100, "the gateway was under load: {} acks", acked.len());
    assert!(log_bytes(dir.path()) > 2 * SEGMENT_BYTES, "the log had several segments");

    let numbers: HashSet<u64> = in_log.iter().map(|record| number(&record.payload)).collect();
    assert_eq!(numbers.len(), in_log.len(), "no message is in the log twice");
    assert!(numbers.iter().all(|n| *n < sent), "nothing is in the log that nobody sent");
    let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
    assert!(lost.is_empty(), "{} acknowledged and not in the log: {lost:?}", lost.len());

    assert!(in_log.iter().zip(0..).all(|(record, offset)| record.offset == offset), "offsets go 0, 1, 2, …");
    assert!(in_storage == in_log, "storage holds exactly what the log holds, offset by offset");
}

/// Retention removes segments all the time, and each new one is written over one of those.
#[test]
fn what_was_acknowledged_survives_every_kill_while_segments_are_written_over() {
    let dir = scratch();
    let setup = Setup::embedded_on(dir.path())
        .set("log.segment_bytes", SEGMENT_BYTES)
        .set("log.retention_bytes", 2 * SEGMENT_BYTES);
    let (acked, sent) = kill_again_and_again(&setup, ROUNDS, &[503, 0x89]);
    let gateway = setup.start();
    gateway.settle();
    gateway.stop();

    let (in_log, stored) = (kept::in_log(dir.path()), kept::in_storage(dir.path()));
    let first_offset = in_log.first().map_or(0, |record| record.offset);
    assert!(first_offset > 0, "retention has removed segments");
    assert!(log_bytes(dir.path()) <= 2 * SEGMENT_BYTES);
    let numbers: HashSet<u64> = stored.iter().map(|record| number(&record.payload)).collect();
    assert_eq!(numbers.len(), stored.len(), "no message is stored twice");
    assert!(numbers.iter().all(|n| *n < sent), "nothing is stored that nobody sent");
    let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
    assert!(lost.is_empty(), "{} acknowledged and not stored: {lost:?}", lost.len());
    let behind = stored.iter().filter(|record| record.offset >= first_offset);
    assert!(behind.eq(&in_log), "the log holds the end of what is stored, offset by offset");
    assert!(stored.iter().zip(0..).all(|(record, offset)| record.offset == offset), "offsets go 0, 1, 2, …");
}

/// Kills a gateway in each of some rounds, under load. Until then it acknowledges everything, or says one of these. Returns what
/// was acknowledged, and how much was sent.
pub(crate) fn kill_again_and_again(setup: &Setup, rounds: usize, may_say: &[u16]) -> (Vec<u64>, u64) {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::make_rng::<SmallRng>().random());
    eprintln!("CRASH_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut millis = |from, to| Duration::from_millis(random.random_range(from..to));

    let gateway = setup.start();
    let source = gateway.create("press-4");
    gateway.kill();

    let ledger = Arc::new(Ledger::default());
    let mut acked = Vec::new();
    for round in 0..rounds {
        if round % KILL_WHILE_STARTING_EVERY == 0 {
            let mut starting = setup.spawn();
            std::thread::sleep(millis(0, 60));
            starting.kill().expect("our child can be killed");
            starting.wait().expect("our child can be waited for");
        }
        let gateway = setup.start();
        let before = ledger.acked();
        let senders = all_kinds(&gateway, &source, &ledger);
        wait_for("the first ack of the round", || (ledger.acked() > before).then_some(()));
        std::thread::sleep(millis(50, 400));
        gateway.kill();
        for sender in senders {
            let sent = sender.join().expect("a sender saw only acks, and then the end");
            let is_expected = sent.goodbye.is_none_or(|goodbye| may_say.contains(&goodbye));
            assert!(is_expected, "a gateway that is killed says nothing: {:?}", sent.goodbye);
            acked.extend(sent.acked);
        }
    }
    (acked, ledger.sent())
}

fn log_bytes(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir.join("log")).expect("the log's directory");
    files.map(|file| file.expect("an entry").metadata().expect("its size").len()).sum()
}
