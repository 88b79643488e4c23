//! Stores that cannot be opened: of a newer version, another program's, locked, no file at all. It guards against a
//! file on the disk that stops a start: every one but the registry only costs what it is for, until it is put right.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use crate::common::kept::{in_log, in_storage};
use crate::common::wire::{
    Connect, Message, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, Version, Wire, ack, publish,
    subscribe,
};
use crate::common::{Gateway, PATIENCE, Setup, Source, wait_for};
use crate::dead_ends::{aside, publish_some, repaired, retained, used_directory};
use crate::faults::{warned, warns_no_more};

const RECORDS: usize = 20;

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

fn by_hand(path: &Path, sql: &str) -> Connection {
    let connection = Connection::open(path).expect("opens");
    connection.execute_batch(sql).expect("runs");
    connection
}

/// A way to make a database unusable, which returns what keeps it so, and words that have to be said of it.
type Trouble = fn(&Path) -> (Option<Connection>, &'static str);

const TROUBLES: [(&str, Trouble); 6] = [
    ("newer", |path| {
        drop(by_hand(path, "PRAGMA user_version = 99; CREATE TABLE newer (x)"));
        (None, "format 99")
    }),
    ("foreign", |path| {
        std::fs::remove_file(path).expect("removed");
        drop(by_hand(path, "CREATE TABLE mine (x); INSERT INTO mine VALUES (7)"));
        (None, "Headgate has not made")
    }),
    ("locked", |path| {
        let locked = by_hand(path, "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE");
        (Some(locked), "in use by another process")
    }),
    ("a directory", |path| {
        std::fs::remove_file(path).expect("removed");
        std::fs::create_dir(path).expect("made");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("set");
        (None, "it is a directory")
    }),
    ("a link to nothing", |path| {
        std::fs::remove_file(path).expect("removed");
        symlink("/nowhere/at-all.db", path).expect("made");
        (None, "it is a link to /nowhere/at-all.db")
    }),
    ("a directory in the place of its write-ahead log", |path| {
        drop(by_hand(path, "PRAGMA wal_checkpoint(TRUNCATE)"));
        std::fs::create_dir_all(beside(path, "-wal")).expect("made");
        (None, ".db-wal: it is a directory")
    }),
];

/// What an attempt to open it must not change; of a directory its mode too. Not to be taken of a database that this
/// process has locked: to close the file gives up the locks.
fn fingerprint(path: &Path) -> (Option<blake3::Hash>, Option<u32>) {
    let file = std::fs::symlink_metadata(path).expect("it is there");
    (std::fs::read(path).ok().map(|bytes| blake3::hash(&bytes)), file.is_dir().then(|| file.mode() & 0o777))
}

/// Devices and subscribers are served, whatever the stores say.
fn serves(gateway: &Gateway, source: &Source, client: &str) {
    let answer = gateway.request("POST", &format!("/v1/ingest/{}/t", source.id), &source.key, &[], b"1");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let connect = Connect {
        client_id: client.to_owned(),
        clean: false,
        ..Connect::with_key(Version::V311, &source.key)
    };
    let (mut device, _) = Wire::connect(gateway.mqtt, &connect);
    assert_eq!(device.publish(Version::V311, 1, "spindle", b"served"), 0);
    // An exchange of a session that outlives its connection.
    device.send(&Message::new("spindle", "served").at(2, 2).packet(Version::V311));
    device.packet(PUBREC);
    device.send(&ack(PUBREL, 2));
    device.packet(PUBCOMP);
    let body = serde_json::json!({ "scopes": ["subscribe"] });
    let path = format!("/v1/datasources/{}/keys", source.id);
    let made = gateway.post(&path, &gateway.admin_key(), &body).json();
    let key = made["key"]["secret"].as_str().expect("a secret");
    let mut backend = Wire::login(gateway.mqtt, Version::V311, key);
    backend.send(&subscribe(Version::V311, 1, &["live/#"]));
    assert_ne!(backend.packet(SUBACK).codes(Version::V311), [0x80]);
    device.send(&publish(Version::V311, 77, "live/a", b"now"));
    device.packet(PUBACK);
    let message = Message::read(Version::V311, &backend.packet(PUBLISH));
    assert_eq!(message.payload, b"now");
}

#[test]
fn no_store_but_the_registry_stops_a_start_and_each_comes_back_without_another() {
    std::thread::scope(|scope| {
        for stem in ["records", "retained", "sessions"] {
            scope.spawn(move || {
                TROUBLES.iter().for_each(|(what, trouble)| stops_no_start(stem, what, *trouble));
            });
        }
    });
}

fn stops_no_start(stem: &str, what: &str, trouble: Trouble) {
    let (dir, source) = used_directory(RECORDS);
    let path = dir.path().join(format!("{stem}.db"));
    let (lock, words) = trouble(&path);
    let before = lock.is_none().then(|| fingerprint(&path));
    let gateway = Setup::embedded_on(dir.path()).start();
    let warning = warned(&gateway, &format!("{stem}.db"));
    assert!(warning.contains(words) && warning.contains("again") | warning.contains("move"), "{warning}");
    eprintln!("{stem}, {what}: {warning}");
    serves(&gateway, &source, "line-1");
    if stem == "records" {
        let query = format!("/v1/datasources/{}/records", source.id);
        let answer = gateway.get(&query, &gateway.admin_key());
        let may_be_read = what == "a directory in the place of its write-ahead log";
        assert!(answer.status == 503 || may_be_read && answer.status == 200, "{}", answer.text());
    }
    warned(&gateway, &format!("{stem}.db"));
    assert_eq!(lock.is_none().then(|| fingerprint(&path)), before, "{stem}, {what}: it is left alone");
    assert!(aside(dir.path(), stem).is_empty(), "{stem}, {what}");

    // Put right, without a restart.
    match (lock, what) {
        (Some(lock), _) => drop(lock),
        (None, "a directory in the place of its write-ahead log") => {
            std::fs::remove_dir(beside(&path, "-wal")).expect("empty");
        }
        (None, _) => std::fs::rename(&path, dir.path().join("moved-away")).expect("moved"),
    }
    warns_no_more(&gateway);
    serves(&gateway, &source, "line-2");
    gateway.settle();
    assert_eq!(retained(&gateway), format!("on {RECORDS}"), "{stem}, {what}");
    gateway.stop();
    assert_eq!(in_storage(dir.path()), in_log(dir.path()), "{stem}, {what}");
}

#[test]
fn a_gateway_that_cannot_open_its_stores_does_not_wait_for_them_when_it_ends() {
    let (dir, source) = used_directory(1);
    let lock = |stem: &str| {
        by_hand(&dir.path().join(format!("{stem}.db")), "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE")
    };
    let locks = ["records", "retained", "sessions"].map(lock);
    let gateway = Setup::embedded_on(dir.path()).set("drain_ms_max", 10 * PATIENCE.as_millis()).start();
    serves(&gateway, &source, "line-1");
    gateway.stop();
    drop(locks);
    let gateway = Setup::embedded_on(dir.path()).start();
    warns_no_more(&gateway);
    gateway.stop();
    assert_eq!(in_storage(dir.path()), in_log(dir.path()));
}

#[test]
fn a_session_that_began_while_the_database_was_locked_is_kept_and_takes_the_place_of_the_earlier_one() {
    let (dir, source) = used_directory(1);
    let setup = Setup::embedded_on(dir.path());
    let connect = |gateway: &Gateway| {
        let connect = Connect {
            client_id: "line-3".to_owned(),
            clean: false,
            ..Connect::with_key(Version::V311, &source.key)
        };
        let (wire, connack) = Wire::connect(gateway.mqtt, &connect);
        (wire, connack.body[0] & 1 == 1)
    };
    let gateway = setup.start();
    assert!(!connect(&gateway).1);
    gateway.stop();
    let locked = by_hand(&dir.path().join("sessions.db"), "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE");
    let gateway = setup.start();
    warned(&gateway, "sessions.db");
    assert!(!connect(&gateway).1, "the earlier session is not known");
    drop(locked);
    warns_no_more(&gateway);
    gateway.stop();
    let db = Connection::open(dir.path().join("sessions.db")).expect("opens");
    let count = "SELECT count(*) FROM sessions WHERE client_id = 'line-3'";
    assert_eq!(db.query_row(count, [], |row| row.get::<_, i64>(0)).expect("reads"), 1);
    drop(db);
    let gateway = setup.start();
    assert!(connect(&gateway).1, "the one of the last run is");
}

#[test]
fn a_purge_while_its_stores_cannot_be_read_ends_the_keys_at_once_and_is_made_once_they_can() {
    const LOCKED: [&[&str]; 3] = [&["records"], &["retained"], &["records", "retained"]];
    std::thread::scope(|scope| {
        for stems in LOCKED {
            scope.spawn(move || purge_while_locked(stems));
        }
    });
}

fn purge_while_locked(stems: &[&str]) {
    let (dir, source) = used_directory(RECORDS);
    let lock = |stem: &&str| {
        let path = dir.path().join(format!("{stem}.db"));
        by_hand(&path, "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE")
    };
    let locks: Vec<_> = stems.iter().map(lock).collect();
    let gateway = Setup::embedded_on(dir.path()).start();
    stems.iter().for_each(|stem| drop(warned(&gateway, &format!("{stem}.db"))));
    let path = format!("/v1/datasources/{}?purge=true", source.id);
    let purge = || gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
    let answer = purge();
    assert_eq!(answer.status, 202, "{stems:?}: {}", answer.text());
    assert_eq!(answer.json()["done"], false, "{stems:?}");
    let ingest = format!("/v1/ingest/{}/t", source.id);
    assert_eq!(gateway.request("POST", &ingest, &source.key, &[], b"1").status, 401, "{stems:?}");
    // To ask again is safe.
    assert_eq!(purge().status, 202, "{stems:?}");
    drop(locks);
    warns_no_more(&gateway);
    wait_for("the purge", || (purge().status == 200).then_some(()));
    gateway.stop();
    for (stem, table) in [("records", "records"), ("retained", "messages")] {
        let db = Connection::open(dir.path().join(format!("{stem}.db"))).expect("opens");
        let count = format!("SELECT count(*) FROM {table}");
        let count = db.query_row(&count, [], |row| row.get::<_, i64>(0)).expect("reads");
        assert_eq!(count, 0, "{stem}.db, {stems:?}");
    }
}

#[test]
fn storage_that_was_locked_while_the_log_lost_records_takes_none_for_another() {
    let (dir, source) = used_directory(RECORDS);
    // A log of the same directory from before, as a copy or a snapshot brings it back.
    let log = dir.path().join("log");
    std::fs::remove_dir_all(&log).expect("removed");
    std::fs::create_dir(&log).expect("made");
    let path = dir.path().join("records.db");
    std::fs::remove_file(dir.path().join("retained.db")).expect("removed");
    let locked = by_hand(&path, "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE");
    let gateway = Setup::embedded_on(dir.path()).start();
    publish_some(&gateway, &source, 2 * RECORDS);
    drop(locked);
    let warning = warned(&gateway, "records-set-aside-");
    assert!(warning.contains("does not fit the log"), "{warning}");
    gateway.settle();
    gateway.stop();
    assert_eq!(in_storage(dir.path()), in_log(dir.path()));
}

#[test]
fn a_registry_that_cannot_be_used_is_refused_with_words_and_nothing_of_it_is_lost() {
    let (dir, source) = used_directory(3);
    let (path, kept) = (dir.path().join("registry.db"), dir.path().join("kept.db"));
    std::fs::copy(&path, &kept).expect("copied");
    let setup = Setup::embedded_on(dir.path());
    for (what, trouble) in &TROUBLES[..5] {
        let (lock, words) = trouble(&path);
        let before = lock.is_none().then(|| fingerprint(&path));
        let exit = setup.refused();
        let output = exit.output;
        // A link to nothing is nothing.
        let words = if *what == "a link to nothing" { "registry.db is missing or empty" } else { words };
        assert!(output.contains(words) && output.contains("registry.db"), "{what}: {output}");
        let go_on = ["headgate repair", "start again", "use a newer one"];
        assert!(go_on.iter().any(|words| output.contains(words)), "{what}: {output}");
        assert_eq!(lock.is_none().then(|| fingerprint(&path)), before, "{what}: it is left alone");
        drop(lock);
        match std::fs::symlink_metadata(&path).expect("there").is_dir() {
            true => std::fs::remove_dir(&path).expect("removed"),
            false => std::fs::remove_file(&path).expect("removed"),
        }
        std::fs::copy(&kept, &path).expect("copied");
    }

    // On purpose, another program's is set aside.
    std::fs::remove_file(&path).expect("removed");
    drop(by_hand(&path, "CREATE TABLE mine (x)"));
    assert!(repaired(dir.path(), &["--new-registry"]).contains("registry-set-aside-TIME.db"));
    repaired(dir.path(), &["--new-registry", "--yes"]);
    let [foreign] = &aside(dir.path(), "registry")[..] else { panic!("one file is set aside") };
    by_hand(foreign, "SELECT x FROM mine");
    let gateway = setup.start();
    assert_eq!(gateway.get("/v1/datasources", &gateway.admin_key()).status, 200);
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &[], b"1").status, 401);
}

#[test]
fn the_write_ahead_log_of_a_registry_that_is_gone_is_never_lost() {
    for is_empty in [true, false] {
        let (dir, _) = used_directory(3);
        let path = dir.path().join("registry.db");
        std::fs::remove_file(&path).expect("removed");
        if is_empty {
            std::fs::write(&path, b"").expect("written");
        }
        let wal = vec![7; 70_000];
        std::fs::write(beside(&path, "-wal"), &wal).expect("written");
        let exit = Setup::embedded_on(dir.path()).refused();
        assert!(
            exit.output.contains("headgate repair") && exit.output.contains("registry.db"),
            "{}",
            exit.output
        );
        assert!(repaired(dir.path(), &["--new-registry"]).contains("registry.db-wal"));
        assert_eq!(std::fs::read(beside(&path, "-wal")).expect("there"), wal);
        repaired(dir.path(), &["--new-registry", "--yes"]);
        let names = std::fs::read_dir(dir.path()).expect("readable").map(|file| file.expect("there").path());
        let is_aside = |path: &PathBuf| {
            path.to_str().is_some_and(|path| path.contains("registry-set-aside-") && path.ends_with("-wal"))
        };
        let asides: Vec<_> = names.filter(is_aside).collect();
        let [aside] = &asides[..] else { panic!("{asides:?}") };
        assert_eq!(std::fs::read(aside).expect("readable"), wal);
        let gateway = Setup::embedded_on(dir.path()).start();
        gateway.create("press-5");
    }
}

#[test]
fn a_rule_file_of_an_earlier_version_that_cannot_be_read_is_warned_of() {
    let (dir, source) = used_directory(3);
    let path = dir.path().join("quarantine.db");
    drop(by_hand(&path, "PRAGMA user_version = 7; CREATE TABLE changes (x)"));
    let gateway = Setup::embedded_on(dir.path()).start();
    let warning = warned(&gateway, "quarantine.db");
    assert!(warning.contains("format 7") && warning.contains("leaked keys"), "{warning}");
    serves(&gateway, &source, "line-1");
    let keys = format!("/v1/datasources/{}/keys/{}/quarantine", source.id, source.key_id);
    let since = serde_json::json!({ "since": "2026-01-01T00:00:00Z" });
    let answer = gateway.post(&keys, &gateway.admin_key(), &since);
    assert!(answer.status == 503 && answer.text().contains("quarantine.db"), "{}", answer.text());
    std::fs::rename(&path, dir.path().join("moved-away")).expect("moved");
    warns_no_more(&gateway);
    assert_eq!(gateway.post(&keys, &gateway.admin_key(), &since).status, 200);
}
