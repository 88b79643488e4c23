//! `records.db` as a copy of the log: its records in the order of the log, as far as it has what they were.
//!
//! It does not keep the properties of MQTT 5, the publisher and the retain flag of records that were let through.

use std::path::Path;

use rusqlite::types::FromSqlError;
use rusqlite::{Connection, Row};

use super::quarantined::{CAUSE_KEY, CAUSE_LIMIT};
use super::schema::{RECORDS_DATABASE, offset_from_sql, sql_offset};
use super::sqlite::RECORDS_FILE_NAME;
use crate::log::{QuarantineReason, RecordNote};
use crate::message::{KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::sqlite::{SqliteError, SqliteReaders};

/// Records from an offset on, in quarantine or not. Both halves come in the order of their keys.
const SELECT_COPIED: &str = "
    SELECT e.offset, d.datasource, t.topic, o.key_id, o.transport, o.content_type, e.received_us, e.event_us,
        CAST(e.payload AS BLOB), x'' AS properties, 0 AS publisher, 0 AS flags, NULL AS cause, NULL AS keyword,
        NULL AS pointer, NULL AS detail, NULL AS schema_version, NULL AS redriven_offset
    FROM entries e
    JOIN datasources d ON d.id = e.datasource_id JOIN topics t ON t.id = e.topic_id JOIN origins o ON o.id = e.origin_id
    WHERE e.offset >= ?1
    UNION ALL
    SELECT q.offset, d.datasource, t.topic, o.key_id, o.transport, o.content_type, q.received_us, q.event_us,
        CAST(q.payload AS BLOB), q.properties, q.publisher, q.flags, q.cause, q.keyword, q.pointer, q.detail,
        q.schema_version, q.redriven_offset
    FROM quarantined q
    JOIN datasources d ON d.id = q.datasource_id JOIN topics t ON t.id = q.topic_id JOIN origins o ON o.id = q.origin_id
    WHERE q.offset >= ?1
    ORDER BY 1 LIMIT ?2";

/// Content of the records that are read at once, in bytes; one may be larger.
const COPIED_PAGE_BYTES_MAX: usize = 8 << 20;

/// A `records.db`, for reading.
pub struct RecordCopy {
    readers: SqliteReaders,
}

/// One record of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedRecord {
    /// Its place in the log.
    pub offset: Offset,
    /// The key that let it in.
    pub key_id: KeyId,
    /// When it was received.
    pub received_at: TimeMicros,
    /// What was sent.
    pub payload: Vec<u8>,
    /// It is in quarantine, and was sent through intake again and let in, itself or in its place.
    pub was_let_in: bool,
    datasource: String,
    topic: String,
    transport: Transport,
    content_type: String,
    event_at: Option<TimeMicros>,
    properties: Vec<u8>,
    publisher: u64,
    flags: RecordFlags,
    note: Vec<u8>,
}

impl RecordCopy {
    /// That of a data directory; `None` if there is none.
    pub fn in_dir(dir: &Path) -> Option<Self> {
        let path = dir.join(RECORDS_FILE_NAME);
        path.exists().then(|| Self { readers: SqliteReaders::new(path, &RECORDS_DATABASE) })
    }

    /// The first offset of the log that it has not taken yet.
    ///
    /// # Errors
    /// [`SqliteError`].
    pub fn cursor(&self) -> Result<Offset, SqliteError> {
        let cursor = |connection: &Connection| {
            connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0).map(offset_from_sql))
        };
        self.readers.read(cursor)
    }

    /// The newest of its records.
    ///
    /// # Errors
    /// [`SqliteError`].
    pub fn newest(&self) -> Result<Option<CopiedRecord>, SqliteError> {
        let last = |connection: &Connection| {
            let sql = "SELECT max(ifnull((SELECT max(offset) FROM entries), 0),
                ifnull((SELECT max(offset) FROM quarantined), 0))";
            connection.query_row(sql, [], |row| row.get(0).map(offset_from_sql))
        };
        Ok(self.read(self.readers.read(last)?, 1)?.pop())
    }

    /// Its records from an offset on, in order: at most `max`, and not many more bytes than are to be in memory at once. Empty
    /// at the end only.
    ///
    /// # Errors
    /// [`SqliteError`].
    pub fn read(&self, from: Offset, max: usize) -> Result<Vec<CopiedRecord>, SqliteError> {
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        self.readers.read(|connection| {
            let mut select = connection.prepare(SELECT_COPIED)?;
            let (mut records, mut bytes) = (Vec::new(), 0);
            for record in select.query_map([sql_offset(from), limit], copied_record_of_row)? {
                let record = record?;
                bytes += record.bytes();
                records.push(record);
                if bytes >= COPIED_PAGE_BYTES_MAX {
                    break;
                }
            }
            Ok(records)
        })
    }
}

impl CopiedRecord {
    /// The record.
    pub fn record(&self) -> RecordRef<'_> {
        // One of an earlier incarnation is called `press-4~1`.
        let datasource = self.datasource.split('~').next().unwrap_or_default();
        RecordRef {
            offset: self.offset,
            datasource,
            topic: &self.topic,
            payload: &self.payload,
            content_type: &self.content_type,
            properties: &self.properties,
            key_id: self.key_id,
            transport: self.transport,
            publisher: self.publisher,
            received_at: self.received_at,
            event_at: self.event_at,
            flags: self.flags,
            note: &self.note,
        }
    }

    /// Whether it is of an incarnation that has ended: its datasource was deleted, and may have a successor.
    pub fn has_ended(&self) -> bool {
        self.datasource.contains('~')
    }

    fn bytes(&self) -> usize {
        self.payload.len() + self.properties.len() + self.note.len() + self.topic.len()
    }
}

fn copied_record_of_row(row: &Row<'_>) -> rusqlite::Result<CopiedRecord> {
    let key_id = KeyId::parse(row.get_ref(3)?.as_str()?).map_err(FromSqlError::other)?;
    let transport = Transport::parse(row.get_ref(4)?.as_str()?).ok_or(FromSqlError::InvalidType)?;
    let cause: Option<String> = row.get(12)?;
    let flags = RecordFlags(row.get(11)?);
    let (flags, note) = match cause.as_deref() {
        None => (flags, Vec::new()),
        // It was let through, and is withheld by a rule. What it was redriven from is not known.
        Some(CAUSE_KEY) => (flags.without(RecordFlags::QUARANTINED.with(RecordFlags::REDRIVEN)), Vec::new()),
        Some(cause) => (flags, quarantine_note(row, cause)?),
    };
    Ok(CopiedRecord {
        offset: offset_from_sql(row.get(0)?),
        datasource: row.get(1)?,
        topic: row.get(2)?,
        key_id,
        transport,
        content_type: row.get(5)?,
        received_at: row.get(6)?,
        event_at: row.get(7)?,
        payload: row.get(8)?,
        properties: row.get(9)?,
        publisher: row.get::<_, i64>(10)?.cast_unsigned(),
        flags,
        note,
        was_let_in: row.get::<_, Option<i64>>(17)?.is_some(),
    })
}

/// Why it is in quarantine since it came.
fn quarantine_note(row: &Row<'_>, cause: &str) -> rusqlite::Result<Vec<u8>> {
    let text = |column: usize| row.get::<_, Option<String>>(column).map(Option::unwrap_or_default);
    let keyword = if cause == CAUSE_LIMIT { QuarantineReason::LIMIT.to_owned() } else { text(13)? };
    let reason = QuarantineReason {
        keyword: keyword.into(),
        pointer: text(14)?.into(),
        words: text(15)?.into(),
        schema_version: row.get::<_, Option<u32>>(16)?.unwrap_or(0),
    };
    Ok(RecordNote::Quarantined(reason).encode())
}

/// Names a datasource in the `records.db` of this directory as the sink does once it is deleted.
#[cfg(test)]
pub fn end_datasource(dir: &Path, id: &str) {
    let database = Connection::open(dir.join(RECORDS_FILE_NAME)).expect("opens");
    let sql = "UPDATE datasources SET datasource = datasource || '~1' WHERE datasource = ?1";
    assert_eq!(database.execute(sql, [id]).expect("written"), 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::sink::sqlite::SqliteSink;
    use crate::consume::testing::{quarantine_note, record};

    #[test]
    fn records_come_as_they_were_and_in_the_order_of_the_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert!(RecordCopy::in_dir(dir.path()).is_none());
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let note = quarantine_note();
        let plain = |offset, payload: &'static [u8]| record(offset, "press-4", "a/b", payload);
        let records = [
            RecordRef { event_at: Some(-5), content_type: "text/plain", ..plain(3, b"21") },
            RecordRef {
                flags: RecordFlags::QUARANTINED,
                note: &note,
                properties: &[1],
                publisher: u64::MAX,
                ..plain(4, b"{}")
            },
            plain(7, b"\xff\0"),
        ];
        sink.store(records.iter().copied(), 9, true).expect("stored");
        let copy = RecordCopy::in_dir(dir.path()).expect("it is there");
        assert_eq!(copy.cursor().expect("read"), 9);
        assert_eq!(copy.newest().expect("read").expect("there is one").offset, 7);
        let read = copy.read(0, 10).expect("read");
        for (copied, record) in read.iter().zip(&records) {
            let publisher = if record.note.is_empty() { 0 } else { record.publisher };
            assert_eq!(copied.record(), RecordRef { publisher, ..*record });
        }
        let offsets = |from, max| -> Vec<_> {
            copy.read(from, max).expect("read").iter().map(|record| record.offset).collect()
        };
        assert_eq!((offsets(0, 2), offsets(4, 9)), (vec![3, 4], vec![4, 7]));
    }

    #[test]
    fn it_is_known_what_was_let_in_again_and_what_is_of_a_datasource_that_has_ended() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let (note, again) = (quarantine_note(), RecordNote::Redriven { offset: 2, received_at: 9 }.encode());
        let quarantined = |offset| RecordRef {
            flags: RecordFlags::QUARANTINED,
            note: &note,
            ..record(offset, "p", "a", b"1")
        };
        let redriven = RecordRef { flags: RecordFlags::REDRIVEN, note: &again, ..record(4, "p", "a", b"1") };
        let records = [record(1, "press-4", "a", b"1"), quarantined(2), quarantined(3), redriven];
        sink.store(records.iter().copied(), 5, true).expect("stored");
        end_datasource(dir.path(), "press-4");
        let copy = RecordCopy::in_dir(dir.path()).expect("it is there");
        let told = |record: &CopiedRecord| (record.offset, record.has_ended(), record.was_let_in);
        let read: Vec<_> = copy.read(0, 10).expect("read").iter().map(told).collect();
        assert_eq!(read, [(1, true, false), (2, false, true), (3, false, false), (4, false, false)]);
    }

    #[test]
    fn a_page_ends_at_its_bytes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let payload = vec![0xff; COPIED_PAGE_BYTES_MAX / 2];
        sink.store((1..6).map(|offset| record(offset, "p", "a", &payload)), 6, true).expect("stored");
        let copy = RecordCopy::in_dir(dir.path()).expect("it is there");
        let count = |from| copy.read(from, 10).expect("read").len();
        assert_eq!([count(0), count(3), count(5), count(6)], [2, 2, 1, 0]);
    }
}
