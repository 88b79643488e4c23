//! The board held against the database, whatever happens.

use super::*;
use crate::consume::query::RecordsReader;
use crate::consume::sink::retention::StoredLimits;
use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
use crate::consume::testing::record;
use crate::limits::{LATEST_BOARD_BYTES_MAX, LATEST_KEYS_PER_TOPIC_MAX, LATEST_TOPICS_MAX};
use crate::log::{WithheldChange, WithheldRule, WithheldRules};
use crate::message::{Offset, RecordRef};
use crate::seeded_random::SeededRandom;

const PAYLOADS: [&[u8]; 9] = [
    br#"{"t": 21.50, "unit": "C"}"#,
    br#"{"t": 2, "a\"b": {"deep": [1, null]}}"#,
    b"{\"t\":\n 3,\r\n\"list\": [\n1 ]}",
    b"20",
    b"on",
    b"\xff\x00",
    b"a\0b",
    b"{}",
    br#"{"big": 1e999, "t": "x"}"#,
];

fn press() -> DatasourceId {
    DatasourceId::new("press-4").expect("a slug")
}

fn shown(reader: &RecordsReader) -> Vec<String> {
    let mut topics = Vec::new();
    let mut each = |_: &str, json: &[u8]| topics.push(String::from_utf8(json.to_vec()).expect("text"));
    let mut budget = PageBudget::new(LATEST_TOPICS_MAX);
    reader.latest_json_within(&press(), None, &mut budget, &mut each).expect("reads");
    topics
}

/// A store with a board, and who reads it with and without.
struct Stored {
    sink: SqliteSink,
    board: Arc<LatestBoard>,
    with: RecordsReader,
    without: RecordsReader,
    end: Offset,
}

impl Stored {
    fn new(dir: &std::path::Path) -> Self {
        let mut sink = SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens");
        let board = Arc::<LatestBoard>::default();
        sink.show_on(board.clone());
        let with = RecordsReader::new(dir).with_board(board.clone());
        Self { sink, board, with, without: RecordsReader::new(dir), end: 0 }
    }

    fn store(&mut self, records: &[(&str, &[u8])]) {
        let records: Vec<RecordRef<'_>> = records
            .iter()
            .zip(self.end..)
            .map(|((topic, payload), offset)| RecordRef {
                event_at: (offset % 3 == 0).then_some(i64::try_from(offset).expect("small")),
                content_type: if offset % 2 == 0 { "application/json" } else { "" },
                ..record(offset, "press-4", topic, payload)
            })
            .collect();
        self.end += records.len() as u64;
        self.sink.store(records.into_iter(), self.end, false).expect("stored");
    }

    fn is_shown(&self) -> bool {
        matches!(self.board.places.lock().get(&press()), Some(BoardPlace { state: BoardState::Shown(_), .. }))
    }
}

#[test]
fn the_board_says_what_the_database_says_whatever_happens() {
    for seed in 0..20 {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut random, mut stored) = (SeededRandom(seed), Stored::new(dir.path()));
        let rules = WithheldRules::default();
        let mut was_shown = false;
        for step in 0..60 {
            match random.below(12) {
                0 => {
                    let key_id = record(0, "press-4", "a", b"").key_id;
                    let since = record(stored.end / 2, "press-4", "a", b"").received_at;
                    let rule = WithheldRule { datasource: press(), key_id, since, below: stored.end };
                    rules.push(WithheldChange::Withhold(rule));
                    stored.sink.reconcile(&rules).expect("reconciled");
                }
                1 => {
                    let key_id = record(0, "press-4", "a", b"").key_id;
                    rules.push(WithheldChange::GiveBack(press(), key_id));
                    stored.sink.reconcile(&rules).expect("reconciled");
                }
                2 => {
                    let limits = StoredLimits { bytes: Some(random.below(2_000) as u64), age_us: None };
                    stored.sink.prune_some(&press(), limits, 0).expect("pruned");
                }
                _ => {
                    let records: Vec<(&str, &[u8])> = (0..1 + random.below(4))
                        .map(|_| (["a", "b", "c/\"d"][random.below(3)], PAYLOADS[random.below(9)]))
                        .collect();
                    stored.store(&records);
                }
            }
            assert_eq!(shown(&stored.with), shown(&stored.without), "seed {seed}, step {step}");
            was_shown |= stored.is_shown();
        }
        assert!(was_shown, "seed {seed}");
    }
}

#[test]
fn a_datasource_is_on_the_board_once_it_was_asked_for_and_keeps_its_newest_keys() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut stored = Stored::new(dir.path());
    stored.store(&[("a", b"1")]);
    assert!(!stored.is_shown());
    assert_eq!(shown(&stored.with).len(), 1);
    for n in 0..LATEST_KEYS_PER_TOPIC_MAX + 3 {
        stored.store(&[("a", format!(r#"{{"k{n}": {n}, "always": 1}}"#).as_bytes())]);
        assert!(stored.is_shown());
    }
    assert_eq!(shown(&stored.with), shown(&stored.without));
    drop(stored.sink);
    assert!(stored.board.places.lock().is_empty(), "nobody keeps it up to date");
}

#[test]
fn what_is_too_large_is_read_from_the_database() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut stored = Stored::new(dir.path());
    let large = vec![b'x'; LATEST_BOARD_BYTES_MAX / 8];
    shown(&stored.with);
    for topic in ["a", "b", "c", "d", "e", "f", "g", "h", "i"] {
        stored.store(&[(topic, &large)]);
        assert_eq!(shown(&stored.with), shown(&stored.without));
    }
    assert!(!stored.is_shown());
    stored.store(&[("a", b"1")]);
    assert!(!stored.is_shown());
}

#[test]
fn pages_are_the_same_from_the_board() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut stored = Stored::new(dir.path());
    shown(&stored.with);
    let topics: Vec<String> = (0..10).map(|n| format!("t/{n}")).collect();
    let records: Vec<(&str, &[u8])> = topics.iter().map(|topic| (&**topic, PAYLOADS[0])).collect();
    stored.store(&records);
    assert!(stored.is_shown());
    for reader in [&stored.with, &stored.without] {
        let (mut after, mut pages) = (None::<String>, Vec::new());
        loop {
            let (mut budget, mut count) = (PageBudget::new(4), 0);
            let next =
                reader.latest_json_within(&press(), after.as_deref(), &mut budget, &mut |_, _| count += 1);
            pages.push(count);
            after = next.expect("reads");
            if after.is_none() {
                break;
            }
        }
        assert_eq!(pages, [4, 4, 2]);
    }
}
