//! Faults of the machine: a disk that is full, files that are torn or damaged, a database that
//! somebody else has locked, a shutdown in the middle of everything. Whatever happens, nothing is
//! acknowledged that is not kept, and an operator is told what is the matter.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::kept::{Kept, in_log, in_storage};
use crate::common::load::{Ledger, all_kinds, number};
use crate::common::steady::Steady;
use crate::common::wire::{
    Connect, DISCONNECT, Message, Next, PINGREQ, PINGRESP, PUBACK, REASON_STRING, Version, Wire, publish,
    subscribe,
};
use crate::common::{Gateway, Setup, Source, scratch, wait_for};
use headgate_format::log::frame::FrameFormat;
use headgate_format::log::segment::SegmentHeader;

/// A small disk of its own: a file system in memory that only this test's thread, and what it starts,
/// can see. It is gone with them, however they end.
pub(super) struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    const BYTES: usize = 32 << 20;

    /// Needs the rights of root, if only in a user namespace.
    pub(super) fn mount() -> Self {
        let dir = scratch();
        let path = std::ffi::CString::new(dir.path().as_os_str().as_encoded_bytes()).expect("no NUL");
        let options = std::ffi::CString::new(format!("size={},mode=700", Self::BYTES)).expect("no NUL");
        let (tmpfs, root) = (c"tmpfs".as_ptr(), c"/".as_ptr());
        let null = std::ptr::null();
        // SAFETY: every pointer is null or to a string with a NUL at its end that outlives the call.
        // unshare(2) separates this thread's view of the mounts from everybody else's.
        let failed = unsafe {
            libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(null, root, null, libc::MS_REC | libc::MS_PRIVATE, null.cast()) != 0
                || libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, options.as_ptr().cast()) != 0
        };
        assert!(!failed, "cannot mount a small disk: {}", std::io::Error::last_os_error());
        Self { dir }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Takes room until `left` bytes are free.
    pub(super) fn fill(&self, left: u64) {
        let mut filler = std::fs::File::create(self.dir.path().join("filler")).expect("made");
        let chunk = vec![0; 64 << 10];
        while filler.write_all(&chunk).is_ok() {}
        let bytes = filler.metadata().expect("its size").len();
        filler.set_len(bytes - left).expect("cut");
    }

    /// Gives that room back.
    pub(super) fn empty(&self) {
        std::fs::remove_file(self.dir.path().join("filler")).expect("it was filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let path = std::ffi::CString::new(self.dir.path().as_os_str().as_encoded_bytes()).expect("no NUL");
        // SAFETY: the pointer is to a string with a NUL at its end.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Whether the test runs here, as root. For anybody else it runs once more, as root of a user
/// namespace, and has to pass there.
pub(super) fn is_root(test: &str) -> bool {
    // SAFETY: geteuid(2) always succeeds.
    if unsafe { libc::geteuid() } == 0 {
        return true;
    }
    let status = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--"])
        .arg(std::env::current_exe().expect("our own path"))
        .args(["--exact", test, "--nocapture"])
        .status();
    assert!(status.expect("unshare runs").success(), "{test} failed in a user namespace");
    false
}

#[test]
fn a_full_disk_is_said_clearly_and_room_is_enough_to_go_on() {
    if is_root("a_full_disk_is_said_clearly_and_room_is_enough_to_go_on") {
        a_full_disk("none");
    }
}

#[test]
fn a_full_disk_that_storage_is_on_too_is_no_different() {
    if is_root("a_full_disk_that_storage_is_on_too_is_no_different") {
        a_full_disk("sqlite");
    }
}

fn a_full_disk(sink: &str) {
    const HOLD_BACK: Duration = Duration::from_millis(500);
    let disk = SmallDisk::mount();
    let setup = Setup::on(&disk.path())
        .set("storage.sink", sink)
        .set("log.segment_bytes", 1 << 20)
        .set("intake.hold_back_ms_max", HOLD_BACK.as_millis());
    let gateway = setup.start();
    let source = gateway.create("press-4");
    let mut idle = Wire::login(gateway.mqtt, Version::V5, &source.key);
    disk.fill(8 << 20);

    let ledger = Ledger::default();
    let mut acked = Vec::new();
    let message = || {
        let (n, mut json) = ledger.message();
        json["pad"] = "x".repeat(60_000).into();
        (n, json.to_string().into_bytes())
    };

    // MQTT 5: acks until there is no room, then a while of nothing, then the reason.
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let goodbye = loop {
        let (n, payload) = message();
        let sent_at = Instant::now();
        wire.send(&publish(Version::V5, 1, "load", &payload));
        match wire.next() {
            Next::Packet(ack) if (ack.kind(), ack.reason()) == (PUBACK, 0) => acked.push(n),
            Next::Packet(goodbye) if goodbye.kind() == DISCONNECT => {
                assert!(sent_at.elapsed() >= HOLD_BACK / 2, "held back for {:?}", sent_at.elapsed());
                break goodbye;
            }
            other => panic!("after {} acks: {other:?}", acked.len()),
        }
        assert!(acked.len() < 1000, "the disk never fills");
    };
    wire.closed();
    assert_eq!(goodbye.reason(), 0x89, "server busy");
    let words = goodbye.text(REASON_STRING).expect("a reason string");
    assert!(words.contains("the disk is full"), "{words}");
    assert!(acked.len() > 10, "there was room at first: {} acks", acked.len());

    // MQTT 3.1.1 has no words for it: no ack, and the end.
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    wire.send(&publish(Version::V311, 1, "load", &message().1));
    wire.closed();

    let answer = gateway.request("POST", "/v1/ingest/press-4/load", &source.key, &[], &message().1);
    assert_eq!(answer.status, 503, "{}", answer.text());
    let retry_after: u64 = answer.headers["retry-after"].parse().expect("seconds");
    assert!((1..=60).contains(&retry_after), "{retry_after}");
    assert!(answer.text().contains("the disk is full"), "{}", answer.text());

    let ready = gateway.get("/readyz", "");
    assert_eq!(ready.status, 503, "{}", ready.text());
    assert!(ready.text().contains("the disk is full"), "{}", ready.text());
    assert_eq!(gateway.get("/livez", "").status, 200);
    idle.send(&PINGREQ);
    idle.packet(PINGRESP);

    // Somebody is held back at the moment in which there is room again: it never notices more than
    // a slow ack.
    let (n, payload) = message();
    idle.send(&publish(Version::V5, 1, "load", &payload));
    disk.empty();
    let ack = idle.packet(PUBACK);
    assert_eq!(ack.reason(), 0);
    acked.push(n);
    wait_for("/readyz to say 200 again", || (gateway.get("/readyz", "").status == 200).then_some(()));
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    let (n, payload) = message();
    assert_eq!(wire.publish(Version::V311, 2, "load", &payload), 0);
    acked.push(n);
    let (n, payload) = message();
    let answer = gateway.request("POST", "/v1/ingest/press-4/load", &source.key, &[], &payload);
    assert_eq!(answer.status, 200, "{}", answer.text());
    acked.push(n);

    if sink == "sqlite" {
        gateway.settle();
    }
    let exit = gateway.stop();
    assert!(exit.output.contains("the disk is full"), "the log says so too:\n{}", exit.output);
    let kept = in_log(&disk.path());
    assert_acked_once(&acked, &kept);
    if sink == "sqlite" {
        assert!(in_storage(&disk.path()) == kept, "storage holds exactly what the log holds");
    }
}

/// Everything acknowledged is kept, and nothing is kept twice.
fn assert_acked_once(acked: &[u64], kept: &[Kept]) {
    let numbers: HashSet<u64> = kept.iter().map(|record| number(&record.payload)).collect();
    assert_eq!(numbers.len(), kept.len(), "no message is kept twice");
    let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
    assert!(lost.is_empty(), "{} acknowledged and not kept: {lost:?}", lost.len());
}

/// A data directory whose log holds `count` records in as many commits, and whose gateway was killed.
/// Storage is empty.
fn killed_after(count: u16) -> (tempfile::TempDir, Source) {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("storage.sink", "none").start();
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    for n in 0..count {
        let payload = format!("reading {n}");
        assert_eq!(wire.publish(Version::V311, 1, "spindle", payload.as_bytes()), 0);
    }
    gateway.kill();
    (dir, source)
}

/// The newest file of a log.
fn newest_segment(dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(dir.join("log")).expect("the log's directory");
    files.map(|file| file.expect("an entry").path()).max().expect("a segment")
}

/// Where the commits in a segment's bytes begin, one frame each, and where the last one ends.
fn commits(segment: &[u8]) -> (Vec<usize>, usize) {
    let header = SegmentHeader::decode(segment).expect("a segment");
    let format = FrameFormat::of_segment(&header);
    let (mut begin, mut at) = (Vec::new(), header.header_bytes());
    while let Some(frame) = format.decode(&segment[at.min(segment.len())..], at as u64) {
        begin.push(at);
        at += usize::try_from(frame.frame_bytes()).expect("short");
    }
    (begin, at)
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("copied");
        }
    }
}

/// A way to damage the newest segment, given its path and its bytes.
type Damage = dyn Fn(&Path, &[u8]);

#[test]
fn a_torn_tail_costs_nothing_that_was_whole() {
    const COUNT: u16 = 20;
    let (dir, source) = killed_after(COUNT);
    let cut = |at: usize| -> Box<Damage> {
        Box::new(move |path, bytes| std::fs::write(path, &bytes[..at]).expect("written"))
    };
    let write_at = |at: usize, what: Vec<u8>| -> Box<Damage> {
        Box::new(move |path, bytes| {
            let mut bytes = bytes.to_vec();
            bytes.resize(bytes.len().max(at + what.len()), 0);
            bytes[at..at + what.len()].copy_from_slice(&what);
            std::fs::write(path, bytes).expect("written");
        })
    };
    let segment = std::fs::read(newest_segment(dir.path())).expect("readable");
    let (begin, end) = commits(&segment);
    assert_eq!(begin.len(), usize::from(COUNT), "a commit for each message");
    let last = *begin.last().expect("20");
    let unfinished: Box<Damage> = Box::new(|path, _| {
        let next = path.with_file_name(format!("{COUNT:020}.log"));
        std::fs::write(next, b"headgate\x01").expect("written");
    });
    let damages: [(&str, u16, Box<Damage>); 9] = [
        ("one byte short", COUNT - 1, cut(end - 1)),
        ("half the last commit's header", COUNT - 1, cut(last + 18)),
        ("one byte of the last commit", COUNT - 1, cut(last + 1)),
        ("cut between two commits", COUNT - 1, cut(last)),
        ("cut right behind the last", COUNT, cut(end)),
        ("the last commit's end never reached the disk", COUNT - 1, write_at(end - 4, vec![0; 4])),
        ("garbage behind the last commit", COUNT, write_at(end, vec![0xA5; 1000])),
        (
            "a header behind the last commit, and nothing else",
            COUNT,
            write_at(end, segment[last..last + 36].to_vec()),
        ),
        ("a new segment that never got its header", COUNT, unfinished),
    ];
    for (what, whole, damage) in damages {
        let copy = scratch();
        copy_dir(dir.path(), copy.path());
        damage(&newest_segment(copy.path()), &segment);
        let gateway = Setup::on(copy.path()).set("storage.sink", "none").start();
        let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
        assert_eq!(wire.publish(Version::V311, 1, "spindle", b"after"), 0, "{what}");
        drop(wire);
        gateway.stop();
        let kept: Vec<_> =
            in_log(copy.path()).into_iter().map(|record| (record.offset, record.payload)).collect();
        let before = (0..whole).map(|n| (n.into(), format!("reading {n}").into_bytes()));
        let expected: Vec<_> = before.chain([(whole.into(), b"after".to_vec())]).collect();
        assert_eq!(kept, expected, "{what}");
    }
}

#[test]
fn what_the_log_has_lost_and_storage_has_is_set_aside_before_its_offsets_are_given_anew() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    for _ in 0..5 {
        assert_eq!(wire.publish(Version::V311, 1, "spindle", b"x"), 0);
    }
    gateway.settle();
    gateway.kill();
    let path = newest_segment(dir.path());
    let segment = std::fs::read(&path).expect("readable");
    let (begin, _) = commits(&segment);
    std::fs::write(&path, &segment[..begin[3]]).expect("written");

    let gateway = Setup::on(dir.path()).start();
    let warning = warned(&gateway, "records-set-aside-");
    assert!(warning.contains("offset 3") && warning.contains("2 records"), "{warning}");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    assert_eq!(wire.publish(Version::V311, 1, "spindle", b"y"), 0);
    gateway.settle();
    gateway.stop();
    let kept = in_log(dir.path());
    assert_eq!(
        kept.iter().map(|record| (record.offset, &record.payload[..])).collect::<Vec<_>>(),
        [(0, &b"x"[..]), (1, b"x"), (2, b"x"), (3, b"y")]
    );
    assert!(in_storage(dir.path()) == kept);
}

#[test]
fn damage_in_the_middle_is_named_and_passed_over_only_when_told_to() {
    const COUNT: u16 = 20;
    let (dir, _) = killed_after(COUNT);
    let path = newest_segment(dir.path());
    let mut segment = std::fs::read(&path).expect("readable");
    let (begin, end) = commits(&segment);
    for at in [begin[10], begin[14]] {
        segment[at + 45] ^= 0x10;
    }
    std::fs::write(&path, &segment).expect("written");

    let setup = Setup::on(dir.path());
    for _ in 0..2 {
        let exit = setup.refused();
        assert!(!exit.status.success());
        let file = path.file_name().expect("a name").to_str().expect("ASCII");
        for part in [file, "offset 10 to 10", "1 more place", "log.accept_corruption"] {
            assert!(exit.output.contains(part), "{part:?} in\n{}", exit.output);
        }
    }
    let after = std::fs::read(&path).expect("readable");
    assert!(after[..end] == segment[..end], "a start that is refused changes no commit");

    let gateway = setup.set("log.accept_corruption", true).start();
    let records = gateway.stored("press-4", usize::from(COUNT) - 2);
    assert_eq!(gateway.metric("headgate_log_lost_records_total"), 2.0);
    let warning = warned(&gateway, "2 records are lost");
    assert!(warning.contains("log.accept_corruption"), "{warning}");
    let stored: Vec<_> = records.iter().map(|r| (r["offset"].as_u64(), r["payload"].as_str())).collect();
    let texts: Vec<String> = (0..COUNT).map(|n| format!("reading {n}")).collect();
    let whole = (0..u64::from(COUNT)).filter(|n| ![10, 14].contains(n));
    let expected: Vec<_> =
        whole.map(|n| (Some(n), Some(texts[usize::try_from(n).expect("small")].as_str()))).collect();
    assert_eq!(stored, expected);
    let exit = gateway.stop();
    for offset in [10, 14] {
        let lost = |line: &&str| {
            line.contains("ERROR") && line.contains("lost") && line.contains(&format!("from={offset}"))
        };
        assert!(exit.output.lines().find(lost).is_some(), "offset {offset} is reported:\n{}", exit.output);
    }
}

/// Waits until `/readyz` warns with a text that holds `part`. Messages have to be taken all the same.
pub(super) fn warned(gateway: &Gateway, part: &str) -> String {
    wait_for("/readyz to warn", || {
        let ready = gateway.get("/readyz", "");
        assert_eq!(ready.status, 200, "{}", ready.text());
        let ready = ready.json();
        let mut warnings = ready["warnings"].as_array().expect("a list").iter().filter_map(|w| w.as_str());
        warnings.find(|warning| warning.contains(part)).map(str::to_owned)
    })
}

/// Waits until `/readyz` warns of nothing.
pub(super) fn warns_no_more(gateway: &Gateway) {
    let none = serde_json::json!({ "status": "ready", "reasons": [], "warnings": [] });
    wait_for("/readyz to be well", || (gateway.get("/readyz", "").json() == none).then_some(()));
}

#[test]
fn sessions_that_cannot_be_written_are_warned_of() {
    if !is_root("sessions_that_cannot_be_written_are_warned_of") {
        return;
    }
    let disk = SmallDisk::mount();
    let gateway =
        Setup::on(&disk.path()).set("storage.sink", "none").set("log.segment_bytes", 1 << 20).start();
    let body = serde_json::json!({ "name": "press-4", "scopes": ["subscribe"] });
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &body).json();
    let key = created["key"]["secret"].as_str().expect("a secret");
    warns_no_more(&gateway);
    let connect =
        Connect { client_id: "line-3".to_owned(), clean: false, ..Connect::with_key(Version::V311, key) };
    let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
    disk.fill(0);
    let filters: Vec<String> = (0..100).map(|n| format!("{n}/{}", "long".repeat(100))).collect();
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    wire.send(&subscribe(Version::V311, 1, &filters));
    let warning = warned(&gateway, "sessions.db");
    assert!(warning.contains("the disk is full"), "{warning}");
    disk.empty();
    warns_no_more(&gateway);
}

#[test]
fn retained_messages_that_cannot_be_written_are_warned_of() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    warns_no_more(&gateway);
    let db = rusqlite::Connection::open(dir.path().join("retained.db")).expect("retained.db opens");
    db.busy_timeout(Duration::from_secs(10)).expect("a setting");
    db.execute_batch("BEGIN IMMEDIATE").expect("the database can be locked");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    wire.send(&Message::new("state", "on").at(1, 1).retained().packet(Version::V311));
    wire.packet(PUBACK);
    let warning = warned(&gateway, "retained.db");
    assert!(warning.contains("in use by another process"), "{warning}");
    db.execute_batch("ROLLBACK").expect("the database can be unlocked");
    warns_no_more(&gateway);
}

#[test]
fn a_locked_database_delays_storage_and_no_ack() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let steady = Steady::start(gateway.mqtt, &source.key);
    gateway.stored("press-4", 1);

    let db = rusqlite::Connection::open(dir.path().join("records.db")).expect("records.db opens");
    db.busy_timeout(Duration::from_secs(10)).expect("a setting");
    db.execute_batch("BEGIN EXCLUSIVE").expect("the database can be locked");
    let cursor = gateway.metric("headgate_storage_cursor");
    wait_for("the log to go on", || {
        (gateway.metric("headgate_log_next_offset") > cursor + 500.0).then_some(())
    });
    let cursor_after = gateway.metric("headgate_storage_cursor");
    assert!((cursor_after - cursor).abs() < f64::EPSILON, "storage waits: {cursor} to {cursor_after}");
    db.execute_batch("ROLLBACK").expect("the database can be unlocked");

    let latencies = steady.stop();
    assert!(latencies.p99() < Duration::from_millis(250), "p99 {:?}", latencies.p99());
    assert!(latencies.max() < Duration::from_secs(1), "max {:?}", latencies.max());
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), latencies.count() + 1, "storage has caught up");
}

#[test]
fn a_shutdown_under_load_keeps_every_ack_and_takes_its_leave() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let ledger = Arc::new(Ledger::default());
    let senders = all_kinds(&gateway, &source, &ledger);
    let mut idle = Wire::login(gateway.mqtt, Version::V5, &source.key);
    wait_for("some load", || (ledger.acked() > 2000).then_some(()));

    let asked_at = Instant::now();
    gateway.terminate();
    idle.disconnected(0x8B);
    let exit = gateway.wait();
    let took = asked_at.elapsed();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.output);
    assert!(took < Duration::from_secs(10), "the drain took {took:?}");

    let sent: Vec<_> =
        senders.into_iter().map(|sender| sender.join().expect("only acks, then the end")).collect();
    // In the order of `all_kinds`: MQTT 3.1.1 twice, MQTT 5 three times, then HTTP.
    for sent in &sent[..2] {
        assert_eq!(sent.goodbye, None, "MQTT 3.1.1 has no words for it");
    }
    for sent in &sent[2..5] {
        assert_eq!(sent.goodbye, Some(0x8B), "MQTT 5 is told that the gateway shuts down");
    }
    for sent in &sent[5..] {
        assert!(matches!(sent.goodbye, None | Some(503)), "{:?}", sent.goodbye);
    }
    let acked: Vec<u64> = sent.into_iter().flat_map(|sent| sent.acked).collect();
    let kept = in_log(dir.path());
    assert_acked_once(&acked, &kept);
    assert!(in_storage(dir.path()) == kept, "the drain has stored everything");
}

#[test]
fn a_second_gateway_on_the_same_directory_is_turned_away() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let exit = Setup::on(dir.path()).refused();
    assert!(!exit.status.success());
    assert!(exit.output.contains("another gateway is using the data directory"), "{}", exit.output);
    let (mut wire, _) = Wire::connect(gateway.mqtt, &Connect::with_key(Version::V5, &source.key));
    assert_eq!(wire.publish(Version::V5, 1, "spindle", b"still here"), 0);
}
