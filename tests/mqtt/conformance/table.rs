//! The tables of normative statements against the specifications' numbering and against the tests
//! that they name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The statements of a specification: section, first and last number. (None of MQTT 5's section
/// 2.2.1 has the number 1.)
type Numbering = &'static [(&'static str, u32, u32)];

const V311: Numbering = &[
    ("1.5.3", 1, 3),
    ("2.2.2", 1, 2),
    ("2.3.1", 1, 7),
    ("3.1.0", 1, 2),
    ("3.1.2", 1, 24),
    ("3.1.3", 1, 11),
    ("3.1.4", 1, 5),
    ("3.2.0", 1, 1),
    ("3.2.2", 1, 6),
    ("3.3.1", 1, 12),
    ("3.3.2", 1, 3),
    ("3.3.4", 1, 1),
    ("3.3.5", 1, 2),
    ("3.6.1", 1, 1),
    ("3.8.1", 1, 1),
    ("3.8.3", 1, 4),
    ("3.8.4", 1, 6),
    ("3.9.3", 1, 2),
    ("3.10.1", 1, 1),
    ("3.10.3", 1, 2),
    ("3.10.4", 1, 6),
    ("3.12.4", 1, 1),
    ("3.14.1", 1, 1),
    ("3.14.4", 1, 3),
    ("4.1.0", 1, 2),
    ("4.3.1", 1, 1),
    ("4.3.2", 1, 2),
    ("4.3.3", 1, 2),
    ("4.4.0", 1, 1),
    ("4.5.0", 1, 2),
    ("4.6.0", 1, 6),
    ("4.7.1", 1, 3),
    ("4.7.2", 1, 1),
    ("4.7.3", 1, 4),
    ("4.8.0", 1, 2),
    ("6.0.0", 1, 4),
    ("7.0.0", 1, 2),
    ("7.1.1", 1, 1),
    ("7.1.2", 1, 1),
];

const V5: Numbering = &[
    ("1.5.4", 1, 3),
    ("1.5.5", 1, 1),
    ("1.5.7", 1, 1),
    ("2.1.3", 1, 1),
    ("2.2.1", 2, 6),
    ("2.2.2", 1, 1),
    ("3.1.0", 1, 2),
    ("3.1.2", 1, 30),
    ("3.1.3", 1, 12),
    ("3.1.4", 1, 6),
    ("3.2.0", 1, 2),
    ("3.2.2", 1, 22),
    ("3.3.1", 1, 13),
    ("3.3.2", 1, 20),
    ("3.3.4", 1, 10),
    ("3.4.2", 1, 3),
    ("3.5.2", 1, 3),
    ("3.6.1", 1, 1),
    ("3.6.2", 1, 3),
    ("3.7.2", 1, 3),
    ("3.8.1", 1, 1),
    ("3.8.3", 1, 5),
    ("3.8.4", 1, 8),
    ("3.9.2", 1, 2),
    ("3.9.3", 1, 2),
    ("3.10.1", 1, 1),
    ("3.10.3", 1, 2),
    ("3.10.4", 1, 6),
    ("3.11.2", 1, 2),
    ("3.11.3", 1, 2),
    ("3.12.4", 1, 1),
    ("3.14.0", 1, 1),
    ("3.14.1", 1, 1),
    ("3.14.2", 1, 4),
    ("3.14.4", 1, 3),
    ("3.15.1", 1, 1),
    ("3.15.2", 1, 3),
    ("4.1.0", 1, 2),
    ("4.2.0", 1, 1),
    ("4.3.1", 1, 1),
    ("4.3.2", 1, 5),
    ("4.3.3", 1, 13),
    ("4.4.0", 1, 2),
    ("4.5.0", 1, 2),
    ("4.6.0", 1, 6),
    ("4.7.0", 1, 1),
    ("4.7.1", 1, 2),
    ("4.7.2", 1, 1),
    ("4.7.3", 1, 4),
    ("4.8.2", 1, 6),
    ("4.9.0", 1, 3),
    ("4.12.0", 1, 7),
    ("4.12.1", 1, 2),
    ("4.13.1", 1, 1),
    ("4.13.2", 1, 1),
    ("6.0.0", 1, 4),
];

#[test]
fn every_statement_of_mqtt_3_1_1_is_covered_or_says_why_not() {
    check(include_str!("mqtt-3.1.1.tsv"), V311, 141);
}

#[test]
fn every_statement_of_mqtt_5_is_covered_or_says_why_not() {
    check(include_str!("mqtt-5.0.tsv"), V5, 251);
}

fn check(table: &str, numbering: Numbering, count: usize) {
    let ids = numbering.iter().flat_map(|(section, first, last)| {
        (*first..=*last).map(move |number| format!("MQTT-{section}-{number}"))
    });
    let mut missing: BTreeSet<String> = ids.collect();
    assert_eq!(missing.len(), count, "the numbering itself");
    let sources = Sources::read();
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let [id, statement, coverage] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("three columns: {line:?}")
        };
        assert!(missing.remove(id), "{id} is no statement, or is there twice");
        assert!(!statement.trim().is_empty(), "{id} has no words");
        if let Some(reason) = coverage.strip_prefix("n/a:") {
            assert!(reason.trim().len() > 5, "{id} has no reason");
            continue;
        }
        let tests = coverage.strip_prefix("test: ").unwrap_or_else(|| panic!("{id}: {coverage:?}"));
        for test in tests.split(", ") {
            assert!(sources.has(test), "{id} names {test}, which is no test");
        }
    }
    assert!(missing.is_empty(), "not in the table: {missing:?}");
}

/// The tests' sources: each file's and each folder's name, and all the text in it.
struct Sources(Vec<(String, String)>);

impl Sources {
    fn read() -> Self {
        let mut sources = Self(Vec::new());
        for path in entries(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")) {
            if path.join("main.rs").exists() {
                sources.add(&path);
            }
        }
        sources
    }

    /// Adds a file, or a folder with what is in it, and returns its text.
    fn add(&mut self, path: &Path) -> String {
        let text = if path.is_dir() {
            entries(path).iter().map(|entry| self.add(entry)).collect()
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            std::fs::read_to_string(path).expect("a source file")
        } else {
            return String::new();
        };
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        self.0.push((name, text.clone()));
        text
    }

    /// Whether `place::test` is a function with `#[test]` in front, in a file or folder of that name.
    fn has(&self, test: &str) -> bool {
        let Some((place, name)) = test.split_once("::") else { return false };
        let definition = format!("#[test]\nfn {name}()");
        self.0.iter().any(|(found, text)| found == place && text.contains(&definition))
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("a directory of the tests");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn a_table_that_is_wrong_is_noticed() {
    let numbering: Numbering = &[("1.0.0", 1, 2)];
    let good =
        "MQTT-1.0.0-1\tone\ttest: conformance::a_ping_is_answered\nMQTT-1.0.0-2\ttwo\tn/a: on clients only\n";
    check(good, numbering, 2);
    for (what, from, to) in [
        ("a line is missing", "MQTT-1.0.0-2\ttwo\tn/a: on clients only\n", ""),
        ("a line is there twice", "MQTT-1.0.0-2", "MQTT-1.0.0-1"),
        ("a reason is missing", "on clients only", ""),
        ("a test does not exist", "a_ping_is_answered", "a_ping_is_ignored"),
        ("a test is elsewhere", "conformance::a_ping", "abuse::a_ping"),
        ("a helper is no test", "a_ping_is_answered", "last_word"),
        ("a statement has no words", "\tone\t", "\t\t"),
    ] {
        let table = good.replacen(from, to, 1);
        assert_ne!(table, good, "{what}");
        assert!(std::panic::catch_unwind(|| check(&table, numbering, 2)).is_err(), "{what}");
    }
}
