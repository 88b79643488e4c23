//! No dead ends: whatever a crash, a copy or an operator has left of the data directory, the gateway starts
//! and serves devices, or says what happened and how to go on.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::json;

use crate::common::kept::{in_log, in_storage};
use crate::common::steady::Steady;
use crate::common::wire::{Connect, Message, PUBACK, PUBLISH, SUBACK, Version, Wire, ack, subscribe};
use crate::common::{Gateway, Setup, Source, scratch, wait_for};

/// Publishes `count` messages, each acknowledged, and one retained at the end.
pub(super) fn publish_some(gateway: &Gateway, source: &Source, count: usize) {
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    for n in 0..count {
        assert_eq!(wire.publish(Version::V311, 1, "spindle", format!("reading {n}").as_bytes()), 0);
    }
    wire.send(&Message::new("state", format!("on {count}")).at(1, 1).retained().packet(Version::V311));
    wire.packet(PUBACK);
}

/// A directory on which a gateway ran, with `count` records and a retained one.
pub(super) fn used_directory(count: usize) -> (tempfile::TempDir, Source) {
    let dir = scratch();
    let gateway = Setup::embedded_on(dir.path()).start();
    let source = gateway.create("press-4");
    publish_some(&gateway, &source, count);
    gateway.settle();
    gateway.stop();
    (dir, source)
}

/// The files in `dir` whose names begin with `stem-set-aside-`, without those of write-ahead logs.
pub(super) fn aside(dir: &Path, stem: &str) -> Vec<PathBuf> {
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

fn repair(dir: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    command.arg("repair").arg("--data-dir").arg(dir).args(options);
    command.output().expect("headgate runs")
}

/// What it printed; it has to succeed.
pub(super) fn repaired(dir: &Path, options: &[&str]) -> String {
    let output = repair(dir, options);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Overwrites a file from its first byte on, as a disk that has lost it would give it back.
fn ruin(path: &Path) {
    // A write-ahead log that was left beside it may have every page.
    drop(rusqlite::Connection::open(path).and_then(|db| db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")));
    let bytes = std::fs::read(path).expect("readable");
    std::fs::write(path, vec![0x5A; bytes.len()]).expect("writable");
}

/// The retained message of `state`.
pub(super) fn retained(gateway: &Gateway) -> String {
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
        gateway.says("was damaged and is set aside as");
        assert_eq!(retained(&gateway), "on 21");
        wait_for("the new database", || {
            let answer = gateway.get("/v1/datasources/press-4/records?limit=1", &gateway.admin_key());
            let is_there = answer.status == 200;
            assert!(is_there || answer.text().contains("records.db is only being made"), "{}", answer.text());
            is_there.then_some(())
        });
        assert_eq!(gateway.stored("press-4", 43).len(), 43, "queries read the new database");
        named_aside(&gateway, stem);
        gateway.stop();
        assert_eq!(in_storage(dir.path()), in_log(dir.path()));
    }
}

#[test]
fn a_registry_that_is_gone_is_never_replaced_in_silence() {
    for gone in [true, false] {
        let (dir, source) = used_directory(5);
        let (path, backup) = (dir.path().join("registry.db"), dir.path().join("registry.backup"));
        std::fs::rename(&path, &backup).expect("renamed");
        if !gone {
            std::fs::write(&path, b"").expect("written");
        }
        let setup = Setup::embedded_on(dir.path());
        for _ in 0..2 {
            let exit = setup.refused();
            assert!(!exit.status.success());
            for part in ["registry.db", "offset 6", "backup", "headgate repair", "--new-registry"] {
                assert!(exit.output.contains(part), "{part:?} in\n{}", exit.output);
            }
        }

        // Put back, everything is as it was.
        std::fs::rename(&backup, &path).expect("renamed");
        let gateway = setup.start();
        publish_some(&gateway, &source, 1);
        gateway.stop();

        // On purpose, and not without being told.
        std::fs::remove_file(&path).expect("removed");
        let earlier = std::fs::read_to_string(dir.path().join("admin.key")).expect("readable");
        let told = repaired(dir.path(), &["--new-registry"]);
        assert!(told.contains("--yes") && told.contains("every device needs another key"), "{told}");
        setup.refused();
        repaired(dir.path(), &["--new-registry", "--yes"]);
        let gateway = setup.start();
        assert_ne!(gateway.admin_key(), earlier.trim(), "the key of the lost registry opens nothing");
        let source = gateway.create("press-4");
        publish_some(&gateway, &source, 1);
        gateway.stop();
        assert_eq!(in_log(dir.path()).len(), 10, "the log goes on");
    }
}

#[test]
fn an_admin_key_that_is_empty_or_cut_is_replaced() {
    let (dir, _) = used_directory(1);
    let path = dir.path().join("admin.key");
    let whole = std::fs::read_to_string(&path).expect("readable");
    for left in ["", "\n", &whole[..20]] {
        std::fs::write(&path, left).expect("written");
        let gateway = Setup::embedded_on(dir.path()).start();
        assert_ne!(gateway.admin_key(), whole.trim());
        assert_eq!(gateway.get("/v1/datasources", &gateway.admin_key()).status, 200);
        assert_eq!(gateway.get("/v1/datasources", whole.trim()).status, 401, "the earlier one is dead");
        assert_eq!(mode(&path), 0o600);
        gateway.stop();
    }
    let kept = std::fs::read_to_string(&path).expect("readable");
    let gateway = Setup::embedded_on(dir.path()).start();
    assert_eq!(gateway.admin_key(), kept.trim(), "a whole one stays");
}

#[test]
fn nobody_but_the_owner_reads_the_data_directory_whoever_made_it() {
    let (dir, source) = used_directory(3);
    let chmod = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("our own file");
    };
    let files = |dir: &Path| -> Vec<PathBuf> {
        let all = |dir: &Path| -> Vec<PathBuf> {
            std::fs::read_dir(dir).expect("readable").map(|file| file.expect("an entry").path()).collect()
        };
        all(dir).into_iter().chain(all(&dir.join("log"))).filter(|path| path.is_file()).collect()
    };
    files(dir.path()).iter().for_each(|path| chmod(path, 0o644));
    chmod(&dir.path().join("log"), 0o755);
    chmod(dir.path(), 0o755);
    let gateway = Setup::embedded_on(dir.path()).start();
    publish_some(&gateway, &source, 3);
    gateway.settle();
    let there = files(dir.path());
    assert!(there.iter().any(|path| path.ends_with("records.db-wal")), "{there:?}");
    for path in &there {
        assert_eq!(mode(path), 0o600, "{}", path.display());
    }
    for path in [dir.path(), &dir.path().join("log")] {
        assert_eq!(mode(path), 0o700, "{}", path.display());
    }
}

#[test]
fn strangers_take_no_descriptor_that_the_log_needs() {
    const STRANGERS: usize = 300;
    let dir = scratch();
    let gateway = Setup::embedded_on(dir.path())
        .set("log.segment_bytes", 1 << 20)
        .set("mqtt.connect_ms_max", 60_000)
        .open_files_max(256)
        .start();
    gateway.says("mqtt.connections_max and http.connections_max are lowered");
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V311, &source.key);
    let crowd = |addr| -> Vec<std::net::TcpStream> {
        (0..STRANGERS).map(|_| std::net::TcpStream::connect(addr).expect("the kernel takes it")).collect()
    };
    let (at_mqtt, at_http) = (crowd(gateway.mqtt), crowd(gateway.http));
    // More than three segments, each of which needs a descriptor.
    let payload = vec![b'x'; 60_000];
    for _ in 0..60 {
        assert_eq!(wire.publish(Version::V311, 1, "spindle", &payload), 0);
    }
    drop(at_http);
    gateway.settle();
    assert_eq!(gateway.get("/readyz", "").json()["warnings"], json!([]));
    drop(at_mqtt);
    assert_eq!(wire.publish(Version::V311, 1, "spindle", b"small"), 0);
    gateway.settle();
    gateway.stop();
    assert_eq!(in_log(dir.path()).len(), 61);
    assert_eq!(in_storage(dir.path()), in_log(dir.path()));
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
    assert_eq!(retained(&gateway), "on 12", "whoever is told so, it is in retained.db");
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
fn a_log_that_is_gone_is_refused_until_somebody_accepts_it() {
    let (dir, source) = used_directory(5);
    let stored = in_storage(dir.path());
    std::fs::remove_dir_all(dir.path().join("log")).expect("removed");
    let setup = Setup::embedded_on(dir.path());
    let refused = || {
        let exit = setup.refused();
        assert!(!exit.status.success());
        for part in ["records.db holds everything up to offset 6", "the log ends at 0", "headgate repair"] {
            assert!(exit.output.contains(part), "{part:?} in\n{}", exit.output);
        }
    };
    refused();
    let told = repaired(dir.path(), &[]);
    for part in ["records.db", "retained.db", "set aside", "--yes"] {
        assert!(told.contains(part), "{part:?} in {told}");
    }
    assert_eq!(in_storage(dir.path()), stored, "nothing is changed yet");
    refused();

    let done = repaired(dir.path(), &["--yes"]);
    let files = [aside(dir.path(), "records"), aside(dir.path(), "retained")].concat();
    assert_eq!(files.len(), 2);
    for file in &files {
        assert!(done.contains(file.to_str().expect("text")), "{done}");
        assert_eq!(mode(file), 0o600);
    }
    assert_eq!(payloads_aside(&files[0]).len(), 6);
    assert!(repaired(dir.path(), &["--yes"]).contains("nothing is to be repaired"));
    let gateway = setup.start();
    publish_some(&gateway, &source, 2);
    gateway.settle();
    assert!(!repair(dir.path(), &[]).status.success(), "not while a gateway uses it");
    gateway.stop();
    assert_eq!(in_storage(dir.path()), in_log(dir.path()));
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
