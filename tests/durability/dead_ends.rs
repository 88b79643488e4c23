//! No dead ends: whatever a crash, a copy or an operator has left of the data directory, the gateway starts
//! and serves devices, or says what happened and how to go on.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::common::kept::{in_log, in_storage};
use crate::common::steady::Steady;
use crate::common::wire::{Connect, Message, PUBACK, PUBLISH, SUBACK, Version, Wire, ack, subscribe};
use crate::common::{Gateway, Setup, Source, scratch, wait_for};

/// Publishes `count` messages, each acknowledged, and one retained at the end.
fn publish_some(gateway: &Gateway, source: &Source, count: usize) {
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    for n in 0..count {
        assert_eq!(wire.publish(Version::V311, 1, "spindle", format!("reading {n}").as_bytes()), 0);
    }
    wire.send(&Message::new("state", format!("on {count}")).at(1, 1).retained().packet(Version::V311));
    wire.packet(PUBACK);
}

/// A directory on which a gateway ran, with `count` records and a retained one.
fn used_directory(count: usize) -> (tempfile::TempDir, Source) {
    let dir = scratch();
    let gateway = Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    publish_some(&gateway, &source, count);
    gateway.settle();
    gateway.stop();
    (dir, source)
}

/// The files in `dir` whose names begin with `stem-set-aside-`, without those of write-ahead logs.
fn aside(dir: &Path, stem: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).expect("readable").map(|file| file.expect("an entry").path());
    let begin = format!("{stem}-set-aside-");
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    let mut files: Vec<_> =
        files.filter(|path| name(path).starts_with(&begin) && name(path).ends_with(".db")).collect();
    files.sort();
    files
}

/// The one file that was set aside of `stem`: `/readyz` warns with its name, and so does the log.
fn named_aside(gateway: &Gateway, stem: &str) -> PathBuf {
    let files = aside(gateway.dir(), stem);
    let [file] = &files[..] else { panic!("one file is set aside: {files:?}\n{}", gateway.output()) };
    let name = file.to_str().expect("text").to_owned();
    let ready = gateway.get("/readyz", "");
    assert_eq!(ready.status, 200, "{}", ready.text());
    assert!(ready.text().contains(&name), "{}", ready.text());
    gateway.says(&name);
    assert_eq!(mode(file), 0o600);
    file.clone()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it is there").permissions().mode() & 0o7777
}

/// Overwrites a file from its first byte on, as a disk that has lost it would give it back.
fn ruin(path: &Path) {
    let bytes = std::fs::read(path).expect("readable");
    std::fs::write(path, vec![0x5A; bytes.len()]).expect("writable");
}

/// The retained message of `state`.
fn retained(gateway: &Gateway) -> String {
    let body = json!({ "scopes": ["subscribe"] });
    let made = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &body).json();
    let key = made["key"]["secret"].as_str().expect("a secret");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, key);
    wire.send(&subscribe(Version::V311, 1, &["state"]));
    wire.packet(SUBACK);
    let message = Message::read(Version::V311, &wire.packet(PUBLISH));
    String::from_utf8(message.payload).expect("text")
}

/// Copies the files of a directory, without those in it.
fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for file in std::fs::read_dir(from).expect("readable") {
        let file = file.expect("an entry");
        if file.file_type().expect("its type").is_file() {
            std::fs::copy(file.path(), to.join(file.file_name())).expect("copied");
        }
    }
}

/// The payloads of the records in a file that was set aside.
fn payloads_aside(file: &Path) -> Vec<String> {
    let db = rusqlite::Connection::open(file).expect("opens");
    let mut select = db.prepare("SELECT payload FROM records ORDER BY offset").expect("a table of records");
    let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("rows");
    rows.map(|row| row.expect("text")).collect()
}

#[test]
fn a_damaged_store_is_set_aside_and_built_again_and_devices_never_notice() {
    for stem in ["records", "retained", "sessions"] {
        let (dir, source) = used_directory(20);
        let stored = in_storage(dir.path());
        ruin(&dir.path().join(format!("{stem}.db")));
        let gateway = Setup::embedded_on(dir.path()).start();
        let file = named_aside(&gateway, stem);
        assert!(std::fs::read(&file).expect("readable").starts_with(&[0x5A; 64]), "it is kept as it was");
        let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
        assert_eq!(wire.publish(Version::V311, 1, "spindle", b"after"), 0);
        gateway.settle();
        assert_eq!(retained(&gateway), "on 20");
        gateway.stop();
        let again = in_storage(dir.path());
        assert_eq!(again[..stored.len()], stored[..], "{stem}");
        assert_eq!(again, in_log(dir.path()), "{stem}");

        // The next start has nothing to say of it any more, and leaves the file where it is.
        let gateway = Setup::embedded_on(dir.path()).start();
        assert!(!gateway.get("/readyz", "").text().contains("set-aside"));
        assert_eq!(aside(dir.path(), stem), [file]);
    }
}

/// Overwrites the first page of a table or index, which is read when it is used and not when the file is opened.
fn ruin_root_page(path: &Path, table: &str) {
    let db = rusqlite::Connection::open(path).expect("opens");
    let root: i64 = db
        .query_row("SELECT rootpage FROM sqlite_master WHERE name = ?1", [table], |row| row.get(0))
        .expect("its first page");
    let page: i64 = db.query_row("PRAGMA page_size", [], |row| row.get(0)).expect("a size");
    drop(db);
    let mut bytes = std::fs::read(path).expect("readable");
    let (root, page) = (usize::try_from(root).expect("small"), usize::try_from(page).expect("small"));
    bytes[(root - 1) * page..root * page].fill(0x5A);
    std::fs::write(path, bytes).expect("writable");
}

#[test]
fn damage_that_is_found_while_the_gateway_runs_is_no_different() {
    for (stem, table) in [("records", "entries"), ("retained", "sqlite_autoindex_messages_1")] {
        let (dir, source) = used_directory(20);
        ruin_root_page(&dir.path().join(format!("{stem}.db")), table);
        let gateway = Setup::embedded_on(dir.path()).start();
        publish_some(&gateway, &source, 21);
        wait_for("it to be set aside", || (!aside(dir.path(), stem).is_empty()).then_some(()));
        assert_eq!(retained(&gateway), "on 21");
        assert_eq!(gateway.stored("press-4", 43).len(), 43, "queries read the new database");
        named_aside(&gateway, stem);
        gateway.stop();
        assert_eq!(in_storage(dir.path()), in_log(dir.path()));
    }
}

#[test]
fn a_copy_that_took_the_log_before_the_stores_starts_and_goes_on_at_the_end_of_the_log() {
    let (dir, copy) = (scratch(), scratch());
    let gateway = Setup::embedded_on(dir.path()).set("log.segment_bytes", 1 << 20).start();
    let source = gateway.create("press-4");
    publish_some(&gateway, &source, 10);
    gateway.settle();
    copy_files(&dir.path().join("log"), &copy.path().join("log"));
    publish_some(&gateway, &source, 12);
    gateway.settle();
    gateway.kill();
    copy_files(dir.path(), copy.path());

    let gateway = Setup::embedded_on(copy.path()).start();
    assert_eq!(gateway.metric("headgate_log_next_offset"), 11.0);
    let (records, _) = (named_aside(&gateway, "records"), named_aside(&gateway, "retained"));
    let lost: Vec<_> = (0..12).map(|n| format!("reading {n}")).chain(["on 12".to_owned()]).collect();
    assert_eq!(payloads_aside(&records), lost);
    assert_eq!(retained(&gateway), "on 10", "what the log says");
    publish_some(&gateway, &source, 3);
    assert_eq!(retained(&gateway), "on 3");
    gateway.settle();
    gateway.stop();
    assert_eq!(in_storage(copy.path()), in_log(copy.path()));
    assert_eq!(in_log(copy.path()).len(), 15);
}

#[test]
fn every_plain_copy_of_a_busy_gateway_starts() {
    let dir = scratch();
    let gateway = Setup::embedded_on(dir.path()).set("log.segment_bytes", 1 << 20).start();
    let source = gateway.create("press-4");
    let steady = Steady::start(gateway.mqtt, &source.key);
    gateway.stored("press-4", 200);
    let copies: Vec<_> = (0..6)
        .map(|_| {
            let copy = scratch();
            copy_files(&dir.path().join("log"), &copy.path().join("log"));
            let stored = gateway.metric("headgate_storage_cursor");
            wait_for("storage to go on", || {
                (gateway.metric("headgate_storage_cursor") > stored + 20.0).then_some(())
            });
            copy_files(dir.path(), copy.path());
            copy
        })
        .collect();
    steady.stop();
    gateway.stop();
    for copy in copies {
        let gateway = Setup::embedded_on(copy.path()).start();
        assert!(gateway.output().contains("records-set-aside-"), "{}", gateway.output());
        publish_some(&gateway, &source, 3);
        gateway.settle();
        gateway.stop();
        assert_eq!(in_storage(copy.path()), in_log(copy.path()));
    }
}

#[test]
fn a_session_that_is_ahead_of_the_log_gets_what_comes_next() {
    let (dir, source) = used_directory(5);
    let setup = Setup::embedded_on(dir.path());
    let gateway = setup.start();
    let body = json!({ "scopes": ["subscribe"] });
    let made = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &body).json();
    let key = made["key"]["secret"].as_str().expect("a secret");
    let connect =
        Connect { client_id: "line-3".to_owned(), clean: false, ..Connect::with_key(Version::V311, key) };
    let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
    wire.send(&subscribe(Version::V311, 1, &["spindle"]));
    wire.packet(SUBACK);
    gateway.stop();
    let db = rusqlite::Connection::open(dir.path().join("sessions.db")).expect("opens");
    db.execute_batch("UPDATE sessions SET cursor = 1000; UPDATE subscriptions SET from_offset = 1000")
        .expect("changed");
    drop(db);

    for n in [1, 2] {
        let gateway = setup.start();
        if n == 1 {
            gateway.says("they go on at its end");
        }
        publish_some(&gateway, &source, n);
        let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
        for message in 0..n {
            let got = Message::read(Version::V311, &wire.packet(PUBLISH));
            assert_eq!(got.payload, format!("reading {message}").into_bytes());
            wire.send(&ack(PUBACK, got.packet_id));
        }
        wire.send(&[0xE0, 0]);
        wire.closed();
        gateway.stop();
    }
}
