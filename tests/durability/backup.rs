//! Backups and restoring them. They guard against a backup that lacks what was acknowledged, does not start, brings a
//! revoked key back, or is changed by the log that it shares files with; and against half a backup that looks whole.

use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::kept::{in_log, in_storage};
use crate::common::load::{Ledger, all_kinds, number};
use crate::common::wire::{Connect, Message, PUBCOMP, PUBREC, PUBREL, Version, Wire, ack};
use crate::common::{Gateway, Setup, Source, http, http_agent, scratch, wait_for};
use crate::dead_ends::{aside, publish_some, used_directory};
use crate::faults::{SmallDisk, is_root};

const SEGMENT_BYTES: u64 = 1 << 20;
const BACKUPS: usize = 6;

fn headgate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
        command.env_remove(name);
    }
    command.args(arguments).output().expect("headgate runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// What a command that has to succeed prints.
fn prints(arguments: &[&str]) -> String {
    let output = headgate(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// What a command that has to fail says.
fn fails(arguments: &[&str]) -> String {
    let output = headgate(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).expect("text")
}

fn restored(backup: &Path, data_dir: &Path) -> String {
    prints(&["restore", text(backup), "--data-dir", text(data_dir)])
}

/// Begins a backup. It has to begin.
fn begin(gateway: &Gateway, dir: &Path) {
    begin_at(gateway, dir, true);
}

fn begin_at(gateway: &Gateway, dir: &Path, is_fast: bool) {
    let answer = gateway.post("/v1/backup", &gateway.admin_key(), &json!({ "dir": dir, "fast": is_fast }));
    assert_eq!(answer.status, 202, "{}", answer.text());
}

/// The last backup, once it has ended.
fn ended(gateway: &Gateway) -> Value {
    wait_for("the backup to end", || {
        let answer = gateway.get("/v1/backup", &gateway.admin_key());
        assert_eq!(answer.status, 200, "{}", answer.text());
        let backup = answer.json()["backup"].clone();
        (backup["state"] != "running").then_some(backup)
    })
}

/// A backup that has to be made.
fn made(gateway: &Gateway, dir: &Path) -> Value {
    begin(gateway, dir);
    let backup = ended(gateway);
    assert_eq!(backup["state"], "done", "{backup}");
    backup
}

/// As [`made`], with rests between its pieces.
fn made_paced(gateway: &Gateway, dir: &Path) -> Value {
    begin_at(gateway, dir, false);
    let backup = ended(gateway);
    assert_eq!(backup["state"], "done", "{backup}");
    backup
}

/// The names in a directory, in order.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("readable");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
    names.sort();
    names
}

/// Senders that note what was acknowledged before they send more.
struct NotedSenders {
    acked: Arc<Mutex<Vec<u64>>>,
    is_over: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl NotedSenders {
    fn start(gateway: &Gateway, source: &Source, ledger: &Arc<Ledger>) -> Self {
        let (acked, is_over) = (Arc::<Mutex<Vec<u64>>>::default(), Arc::<AtomicBool>::default());
        let sender = |size: usize| {
            let (addr, source, ledger) = (gateway.http, source.clone(), ledger.clone());
            let (acked, is_over) = (acked.clone(), is_over.clone());
            std::thread::spawn(move || {
                let (agent, path) = (http_agent(), format!("/v1/ingest/{}/load", source.id));
                let json = [("content-type", "application/json")];
                while !is_over.load(Ordering::Relaxed) {
                    let (numbers, messages): (Vec<u64>, Vec<Value>) =
                        (0..size).map(|_| ledger.message()).unzip();
                    let body = Value::from(messages).to_string();
                    let answer = http(&agent, addr, "POST", &path, &source.key, &json, body.as_bytes());
                    // A log at its budget says to come again.
                    if answer.is_ok_and(|answer| answer.status == 200) {
                        acked.lock().expect("no holder panics").extend(numbers);
                    }
                }
            })
        };
        let threads = [1, 5, 50].map(sender).into();
        Self { acked, is_over, threads }
    }

    fn acked(&self) -> Vec<u64> {
        self.acked.lock().expect("no holder panics").clone()
    }

    fn end(self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a sender does not panic"));
    }
}

/// What was true before a backup began.
struct Before {
    dir: PathBuf,
    acked: Vec<u64>,
    next_offset: u64,
    revoked: String,
    /// The answer to the request with this id.
    once: (String, Value),
    client_id: String,
}

fn session_of(client_id: &str, key: &str) -> Connect {
    let (client_id, clean) = (client_id.to_owned(), false);
    Connect { client_id, clean, ..Connect::with_key(Version::V311, key) }
}

fn open_exchange(gateway: &Gateway, client_id: &str, key: &str) {
    let (mut wire, _) = Wire::connect(gateway.mqtt, &session_of(client_id, key));
    wire.send(&Message::new("exchange", "{\"exchange\":1}").at(2, 7).packet(Version::V311));
    wire.packet(PUBREC);
}

fn post_once(gateway: &Gateway, source: &Source, id: &str) -> Value {
    let headers = [("content-type", "application/json"), ("idempotency-key", id)];
    let path = format!("/v1/ingest/{}/once", source.id);
    let answer = gateway.request("POST", &path, &source.key, &headers, b"[{\"once\":1},{\"once\":2}]");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn revoked_key(gateway: &Gateway, source: &Source) -> String {
    let (admin, path) = (gateway.admin_key(), format!("/v1/datasources/{}/keys", source.id));
    let key = gateway.post(&path, &admin, &json!({ "scopes": ["ingest"] })).json()["key"].clone();
    let id = key["id"].as_str().expect("an id");
    let answer = gateway.request("DELETE", &format!("{path}/{id}"), &admin, &[], &[]);
    assert_eq!(answer.status, 204, "{}", answer.text());
    key["secret"].as_str().expect("a secret").to_owned()
}

/// Each backup is made under load, while retention removes segments and the log writes others over. All are restored at
/// the end: what the log has done since then has changed none of them.
#[test]
fn a_backup_under_full_load_has_what_was_acknowledged_before_it_and_stays_as_it_was() {
    let (dir, backups) = (scratch(), scratch());
    let setup = Setup::embedded_on(dir.path())
        .set("log.segment_bytes", SEGMENT_BYTES)
        .set("log.retention_bytes", 12 * SEGMENT_BYTES);
    let gateway = setup.start();
    let (source, others) = (gateway.create("press-4"), gateway.create("others"));
    let (ledger, noise) = (Arc::<Ledger>::default(), Arc::<Ledger>::default());
    let noisy = all_kinds(&gateway, &others, &noise);
    let senders = NotedSenders::start(&gateway, &source, &ledger);
    wait_for("the log to have several segments", || {
        let files = std::fs::read_dir(dir.path().join("log")).expect("a log").flatten();
        (files.filter(|file| file.path().extension().is_some_and(|name| name == "log")).count() > 3)
            .then_some(())
    });
    let mut all = Vec::new();
    for nth in 0..BACKUPS {
        let so_far = senders.acked().len();
        wait_for("the load to go on", || (senders.acked().len() > so_far + 500).then_some(()));
        let (once, client_id) = (format!("once-{nth}"), format!("device-{nth}"));
        open_exchange(&gateway, &client_id, &others.key);
        let answer = post_once(&gateway, &others, &once);
        let revoked = revoked_key(&gateway, &source);
        let (acked, to) = (senders.acked(), backups.path().join(format!("backup-{nth}")));
        let backup = made(&gateway, &to);
        let next_offset = backup["next_offset"].as_u64().expect("an offset");
        all.push(Before { dir: to, acked, next_offset, revoked, once: (once, answer), client_id });
    }
    senders.end();
    gateway.kill();
    noisy.into_iter().for_each(|sender| drop(sender.join().expect("a sender does not panic")));
    let linked = std::fs::read_dir(all[0].dir.join("log")).expect("a log").flatten();
    assert!(linked.count() > 2, "the log had several segments");
    // Two at a time.
    let (source, others) = (&source, &others);
    std::thread::scope(|scope| {
        for half in all.chunks(all.len().div_ceil(2)) {
            scope.spawn(move || half.iter().for_each(|before| check_restored(before, source, others)));
        }
    });
}

fn check_restored(before: &Before, source: &Source, others: &Source) {
    let dir = scratch();
    let data = dir.path().join("data");
    let said = restored(&before.dir, &data);
    assert!(said.contains(&format!("the next record gets offset {}", before.next_offset)), "{said}");
    let gateway = Setup::embedded_on(&data).start();
    let ingest =
        |key: &str| gateway.request("POST", "/v1/ingest/press-4/load", key, &[], b"{\"n\":4000000000}");
    assert_eq!(ingest(&before.revoked).status, 401, "it was revoked before");
    let answer = ingest(&source.key);
    assert_eq!((answer.status, &answer.json()["first_offset"]), (200, &before.next_offset.into()));
    let mut again = before.once.1.clone();
    again["duplicate"] = true.into();
    assert_eq!(post_once(&gateway, others, &before.once.0), again, "known already");
    // The device never saw that its message was taken: it comes again, and is not kept again.
    let (mut wire, _) = Wire::connect(gateway.mqtt, &session_of(&before.client_id, &others.key));
    wire.send(&Message::new("exchange", "{\"exchange\":1}").at(2, 7).again().packet(Version::V311));
    wire.packet(PUBREC);
    wire.send(&ack(PUBREL, 7));
    wire.packet(PUBCOMP);
    assert_eq!(gateway.metric("headgate_log_next_offset"), before.next_offset as f64 + 1.0);
    gateway.settle();
    gateway.stop();

    let (log, stored) = (in_log(&data), in_storage(&data));
    assert!(stored.iter().zip(0..).all(|(record, offset)| record.offset == offset), "offsets go 0, 1, 2, …");
    let first = log.first().expect("records").offset;
    assert!(stored.iter().skip_while(|record| record.offset < first).eq(&log), "the log is the end of it");
    let of_load = stored.iter().filter(|record| record.datasource == "press-4");
    let numbers: Vec<u64> = of_load.map(|record| number(&record.payload)).collect();
    let distinct: HashSet<u64> = numbers.iter().copied().collect();
    assert_eq!(distinct.len(), numbers.len(), "nothing is there twice");
    let lost: Vec<_> = before.acked.iter().filter(|n| !distinct.contains(n)).collect();
    assert!(
        lost.is_empty(),
        "{} of {} acknowledged before and lost: {lost:?}",
        lost.len(),
        before.acked.len()
    );
}

#[test]
fn a_gateway_that_is_killed_in_the_middle_leaves_no_backup_that_looks_whole() {
    let (dir, backups) = (scratch(), scratch());
    // Large enough that a kill comes in time.
    let setup = Setup::embedded_on(dir.path()).set("log.segment_bytes", SEGMENT_BYTES);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    let body = Value::from((0..400).map(|n| json!({ "n": n, "pad": "x".repeat(500) })).collect::<Vec<_>>());
    for _ in 0..60 {
        let answer = gateway.post("/v1/ingest/press-4/t", &source.key, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    gateway.settle();
    gateway.stop();
    let to = backups.path().join("b");
    let (mut whole, mut none) = (0, 0);
    for round in 0..8_u64 {
        let gateway = setup.start();
        begin(&gateway, &to);
        std::thread::sleep(Duration::from_millis(round * round * 4));
        gateway.kill();
        if to.exists() {
            let data = scratch();
            restored(&to, data.path());
            std::fs::remove_dir_all(&to).expect("removed");
            whole += 1;
        } else {
            none += 1;
        }
    }
    eprintln!("{whole} backups were complete, {none} were not there");
    assert!(none > 0, "the first kill comes at once");
    let gateway = setup.start();
    made(&gateway, &to);
    assert_eq!(names(backups.path()), ["b"], "what the kills have left is removed");
    // What a kill leaves in write-ahead logs is in a backup of the directory too.
    let answer = gateway.post("/v1/ingest/press-4/t", &source.key, &json!({ "n": 7_777 }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    gateway.settle();
    let last = revoked_key(&gateway, &source);
    gateway.kill();
    let (later, data) = (backups.path().join("later"), scratch());
    prints(&["backup", text(&later), "--data-dir", text(dir.path())]);
    restored(&later, data.path());
    let gateway = Setup::embedded_on(data.path()).start();
    assert_eq!(gateway.post("/v1/ingest/press-4/t", &last, &json!({})).status, 401);
    gateway.settle();
    assert_eq!(gateway.stored("press-4", 60 * 400 + 1).len(), 60 * 400 + 1);
}

#[test]
fn a_gateway_that_is_stopped_in_the_middle_ends_and_leaves_nothing() {
    let (dir, backups) = (scratch(), scratch());
    let gateway = Setup::embedded_on(dir.path()).start();
    publish_some(&gateway, &gateway.create("press-4"), 100);
    begin(&gateway, &backups.path().join("b"));
    gateway.stop();
    let names = names(backups.path());
    assert!(names.is_empty() || names == ["b"], "{names:?}");
}

#[test]
fn a_disk_without_room_for_it_is_said_and_nothing_is_left_there() {
    if !is_root("a_disk_without_room_for_it_is_said_and_nothing_is_left_there") {
        return;
    }
    let (dir, disk) = (scratch(), SmallDisk::mount());
    std::fs::create_dir(disk.path()).expect("made");
    let gateway = Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    publish_some(&gateway, &source, 50);
    gateway.settle();
    let room = std::fs::metadata(dir.path().join("records.db")).expect("stored").len();
    for left in [0, 64 << 10, room] {
        disk.fill(left);
        let answer =
            gateway.post("/v1/backup", &gateway.admin_key(), &json!({ "dir": disk.path().join("b") }));
        let why = match answer.status {
            202 => {
                let backup = ended(&gateway);
                assert_eq!(backup["state"], "failed", "{backup}");
                backup["error"].to_string()
            }
            503 => answer.text(),
            _ => panic!("{}", answer.text()),
        };
        let is_named = ["make room", "disk is full", "No space left"].iter().any(|words| why.contains(words));
        assert!(is_named, "{left} bytes free: {why}");
        assert!(names(&disk.path()).is_empty(), "{left} bytes free: {:?}", names(&disk.path()));
        disk.empty();
    }
    publish_some(&gateway, &source, 1);
    made(&gateway, &disk.path().join("b"));
}

#[test]
fn what_was_set_aside_is_in_the_backup_and_so_is_every_secret_at_its_owners_alone() {
    let (dir, _) = used_directory(30);
    std::fs::write(dir.path().join("records.db"), "no database, and long enough to see that".repeat(200))
        .expect("written");
    let backups = scratch();
    let to = backups.path().join("b");
    let gateway = Setup::embedded_on(dir.path()).start();
    gateway.settle();
    let [lost] = &aside(dir.path(), "records")[..] else { panic!("one is set aside") };
    // Somebody has made a copy of it, and a backup with such a name could not be restored.
    let copy = format!("{} (copy).db", lost.to_str().expect("text").trim_end_matches(".db"));
    std::fs::copy(lost, &copy).expect("copied");
    made_paced(&gateway, &to);
    assert!(gateway.output().contains("(copy).db"), "it is left out, and that is said: {}", gateway.output());
    let data = scratch();
    restored(&to, data.path());
    assert!(names(data.path()).iter().all(|name| !name.contains("copy")));
    let again = data.path().join(lost.file_name().expect("a name"));
    assert!(std::fs::read(again).expect("there") == std::fs::read(lost).expect("there"));
    assert_eq!(in_storage(data.path()), in_storage(dir.path()));
    for root in [to.as_path(), data.path()] {
        for place in [root.to_owned(), root.join("log")] {
            assert_eq!(std::fs::metadata(&place).expect("there").permissions().mode() & 0o7777, 0o700);
            for name in names(&place) {
                let file = std::fs::metadata(place.join(&name)).expect("there");
                assert!(file.is_dir() || file.permissions().mode() & 0o7777 == 0o600, "{name}");
            }
        }
    }
    // The restored gateway knows the first admin key, and makes no other.
    let admin = gateway.admin_key();
    let other = Setup::embedded_on(data.path()).start();
    assert_eq!(other.admin_key(), admin);
    assert_eq!(other.get("/v1/audit", &admin).status, 200);
}

#[test]
fn a_store_that_cannot_be_read_is_named_and_there_is_no_backup_without_it() {
    let (dir, _) = used_directory(10);
    let stored = rusqlite::Connection::open(dir.path().join("records.db")).expect("opens");
    stored.execute_batch("PRAGMA user_version = 99").expect("set");
    let gateway = Setup::embedded_on(dir.path()).start();
    let backups = scratch();
    begin(&gateway, &backups.path().join("b"));
    let backup = ended(&gateway);
    let error = backup["error"].as_str().expect("words");
    assert!(error.contains("records.db") && error.contains("format 99"), "{error}");
    assert!(names(backups.path()).is_empty());
}

#[test]
fn a_backup_is_no_data_directory_and_what_is_damaged_or_in_the_way_is_refused() {
    let (dir, _) = used_directory(20);
    let backups = scratch();
    let (to, data) = (backups.path().join("b"), backups.path().join("data"));
    let said = prints(&["backup", text(&to), "--data-dir", text(dir.path())]);
    assert!(said.contains("everything up to offset"), "{said}");
    let refused = Setup::embedded_on(&to).refused();
    assert!(refused.output.contains("is a backup"), "{}", refused.output);
    assert!(!to.join("LOCK").exists(), "nothing has changed in it");

    for name in names(&to).into_iter().filter(|name| name != "log") {
        let path = to.join(&name);
        let whole = std::fs::read(&path).expect("readable");
        for at in [0, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).expect("written");
            let why = fails(&["restore", text(&to), "--data-dir", text(&data)]);
            assert!(why.contains(&name) && why.contains("use another"), "{name}, byte {at}: {why}");
            assert!(!data.exists(), "{name}, byte {at}");
        }
        std::fs::write(&path, whole).expect("written");
    }
    let segment = to.join("log").join(&names(&to.join("log"))[0]);
    let moved = to.join("elsewhere");
    std::fs::rename(&segment, &moved).expect("moved");
    std::os::unix::fs::symlink(&moved, &segment).expect("made");
    fails(&["restore", text(&to), "--data-dir", text(&data)]);
    std::fs::remove_file(&segment).expect("removed");
    assert!(fails(&["restore", text(&to), "--data-dir", text(&data)]).contains("is missing"));
    std::fs::rename(&moved, &segment).expect("moved");

    // A directory with data is left as it is, unless its content is to be moved aside.
    let before = names(dir.path());
    let why = fails(&["restore", text(&to), "--data-dir", text(dir.path())]);
    assert!(why.contains("not empty") && why.contains("--replace"), "{why}");
    assert_eq!(names(dir.path()), before);
    let said = prints(&["restore", text(&to), "--data-dir", text(dir.path()), "--replace"]);
    assert!(said.contains("before-restore-"), "{said}");
    let aside = names(dir.path()).into_iter().find(|name| name.starts_with("before-restore-"));
    assert!(dir.path().join(aside.expect("moved")).join("registry.db").exists());
    Setup::embedded_on(dir.path()).start().stop();

    let inside = fails(&["restore", text(&to), "--data-dir", text(&to.join("data"))]);
    assert!(inside.contains("one in the other"), "{inside}");
}

#[test]
fn a_restore_that_was_interrupted_starts_nothing_and_goes_on() {
    let (dir, _) = used_directory(20);
    let backups = scratch();
    let (to, data) = (backups.path().join("b"), backups.path().join("data"));
    prints(&["backup", text(&to), "--data-dir", text(dir.path())]);
    // As a kill leaves it: while files are copied, and while what was there is moved aside.
    std::fs::create_dir_all(data.join("log")).expect("made");
    std::fs::write(data.join("registry.db"), "half").expect("written");
    std::fs::write(data.join("restore.unfinished"), "copying\n").expect("written");
    let refused = Setup::embedded_on(&data).refused();
    assert!(refused.output.contains("was interrupted"), "{}", refused.output);
    restored(&to, &data);
    Setup::embedded_on(&data).start().stop();

    std::fs::create_dir(data.join("before-restore-20261130T000000Z")).expect("made");
    std::fs::rename(data.join("records.db"), data.join("before-restore-20261130T000000Z/records.db"))
        .expect("moved");
    std::fs::write(data.join("restore.unfinished"), "before-restore-20261130T000000Z\n").expect("written");
    restored(&to, &data);
    let moved = names(&data.join("before-restore-20261130T000000Z"));
    assert!(["records.db", "registry.db", "log"].iter().all(|name| moved.contains(&(*name).to_owned())));
    assert_eq!(in_log(&data), in_log(dir.path()));
}

/// Moves what is in a data directory aside, as a restore does, but for what `stays` says.
fn move_aside(data: &Path, aside: &str, stays: &[&str]) {
    let to = data.join(aside);
    std::fs::create_dir(&to).expect("made");
    for name in names(data).into_iter().filter(|name| name != aside && !stays.contains(&name.as_str())) {
        std::fs::rename(data.join(&name), to.join(&name)).expect("moved");
    }
}

/// What was there was moved aside before anybody looked for room, and nothing led back.
#[test]
fn a_restore_without_room_changes_nothing_and_an_interrupted_one_can_be_undone() {
    if !is_root("backup::a_restore_without_room_changes_nothing_and_an_interrupted_one_can_be_undone") {
        return;
    }
    let (dir, _) = used_directory(20);
    let (backups, disk) = (scratch(), SmallDisk::mount());
    let (to, data) = (backups.path().join("b"), disk.path());
    prints(&["backup", text(&to), "--data-dir", text(dir.path())]);
    restored(&to, &data);
    let (before, records) = (names(&data), in_log(&data));
    let replace = ["restore", text(&to), "--data-dir", text(&data), "--replace"];
    let undo = ["restore", "--undo", "--data-dir", text(&data)];

    disk.fill(16 << 10);
    assert!(fails(&replace).contains("make room"));
    assert_eq!(names(&data), before, "nothing has moved");
    disk.empty();
    assert!(fails(&undo).contains("nothing to undo"));

    // As a kill leaves it: in the middle of moving, and in the middle of copying.
    let aside = "before-restore-20261130T000000Z";
    let marks = [(aside.to_owned(), &["LOCK", "registry.db"][..]), (format!("copying {aside}"), &["LOCK"])];
    for (mark, stays) in marks {
        move_aside(&data, aside, stays);
        if mark != aside {
            std::fs::create_dir(data.join("log")).expect("made");
            std::fs::write(data.join("registry.db"), "half").expect("written");
        }
        std::fs::write(data.join("restore.unfinished"), format!("{mark}\n")).expect("written");
        disk.fill(16 << 10);
        let why = fails(&replace);
        assert!(why.contains("make room") && why.contains("--undo"), "{mark}: {why}");
        disk.empty();
        let refused = Setup::embedded_on(&data).refused();
        assert!(refused.output.contains("headgate restore --undo"), "{mark}: {}", refused.output);
        assert!(prints(&undo).contains("what it was before"), "{mark}");
        assert_eq!((names(&data), in_log(&data)), (before.clone(), records.clone()), "{mark}");
    }
    // One that was interrupted while it copied says where the old data is when it has gone on.
    move_aside(&data, aside, &["LOCK"]);
    std::fs::write(data.join("restore.unfinished"), format!("copying {aside}\n")).expect("written");
    assert!(restored(&to, &data).contains(aside));
    Setup::embedded_on(&data).start().stop();
}

#[test]
fn what_cannot_be_moved_aside_leaves_the_data_directory_as_it_was() {
    if !is_root("backup::what_cannot_be_moved_aside_leaves_the_data_directory_as_it_was") {
        return;
    }
    let (dir, _) = used_directory(20);
    let (backups, disk) = (scratch(), SmallDisk::mount());
    let (to, data) = (backups.path().join("b"), disk.path());
    prints(&["backup", text(&to), "--data-dir", text(dir.path())]);
    std::fs::create_dir_all(data.join("log")).expect("made");
    std::fs::write(data.join("admin.key"), "before").expect("written");
    // In the mount namespace of this thread alone, which is gone with it.
    let mounted = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(data.join("log")).status();
    assert!(mounted.expect("mount runs").success());
    let why = fails(&["restore", text(&to), "--data-dir", text(&data), "--replace"]);
    assert!(why.contains("cannot be moved aside") && why.contains("mount point"), "{why}");
    assert_eq!(names(&data), ["LOCK", "admin.key", "log"], "no mark, and nothing aside");
}

#[test]
fn where_a_backup_may_be_is_checked_and_only_an_admin_of_all_may_ask() {
    let (dir, backups) = (scratch(), scratch());
    let gateway = Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    let made_key =
        gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &json!({ "scopes": ["admin"] }));
    let of_one = made_key.json()["key"]["secret"].as_str().expect("a secret").to_owned();
    let body = json!({ "dir": backups.path().join("b") });
    for (key, status) in [("", 401), (source.key.as_str(), 403), (of_one.as_str(), 403)] {
        assert_eq!(gateway.post("/v1/backup", key, &body).status, status);
        assert_eq!(gateway.get("/v1/backup", key).status, status);
    }
    let admin = gateway.admin_key();
    assert_eq!(gateway.get("/v1/backup", &admin).json()["backup"], Value::Null);
    std::fs::write(backups.path().join("file"), "").expect("written");
    for place in
        ["relative".into(), dir.path().join("b"), dir.path().join("log/b"), backups.path().join("file")]
    {
        let answer = gateway.post("/v1/backup", &admin, &json!({ "dir": place }));
        assert_eq!(answer.status, 409, "{}", answer.text());
    }
    assert_eq!(gateway.post("/v1/backup", &admin, &json!({ "dir": 7 })).status, 400);
    assert_eq!(names(backups.path()), ["file"]);
    let busy = fails(&["backup", text(&backups.path().join("b")), "--data-dir", text(dir.path())]);
    assert!(busy.contains("another gateway is using"), "{busy}");
    // What was done is in the audit, with where.
    made(&gateway, &backups.path().join("b"));
    let audit = gateway.get("/v1/audit?limit=1000", &admin).text();
    assert!(audit.contains("backup.begun") && audit.contains("backup.made"), "{audit}");
}

/// A spare segment is a file that the log writes over; one that a backup has is none. This is measured at the files:
/// the backup's has another name and keeps its content.
#[test]
fn the_log_writes_no_file_over_that_a_backup_has() {
    let (dir, backups) = (scratch(), scratch());
    let setup = Setup::embedded_on(dir.path())
        .set("log.segment_bytes", SEGMENT_BYTES)
        .set("log.retention_bytes", 4 * SEGMENT_BYTES);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    let body = Value::from((0..200).map(|n| json!({ "n": n, "pad": "x".repeat(500) })).collect::<Vec<_>>());
    let publish = |times: usize| {
        for _ in 0..times {
            wait_for("the log to take it", || {
                (gateway.post("/v1/ingest/press-4/t", &source.key, &body).status == 200).then_some(())
            });
        }
    };
    publish(15);
    gateway.settle();
    let backup = made_paced(&gateway, &backups.path().join("b"));
    assert!(backup["linked_bytes"].as_u64().expect("a number") > SEGMENT_BYTES / 2, "{backup}");
    let log = backups.path().join("b/log");
    let files = |what: &str| -> Vec<(String, u64, Vec<u8>)> {
        let read = |name: String| {
            let path = log.join(&name);
            let links = std::fs::metadata(&path).expect(what).nlink();
            let bytes = std::fs::read(path).expect(what);
            (name, links, bytes)
        };
        names(&log).into_iter().map(read).collect()
    };
    let before = files("there");
    assert!(before.iter().any(|(_, links, _)| *links > 1), "on one disk segments are linked");
    let deadline = Instant::now() + Duration::from_secs(60);
    while files("there").iter().any(|(_, links, _)| *links > 1) {
        assert!(Instant::now() < deadline, "retention removes what is linked");
        publish(5);
    }
    publish(10);
    let after = files("still there");
    assert!(before.iter().zip(&after).all(|(before, after)| before.0 == after.0 && before.2 == after.2));
    restored(&backups.path().join("b"), &backups.path().join("data"));
}
