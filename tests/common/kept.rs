//! What was kept, read without the gateway's help: the log through the library, storage with SQLite.

use std::path::Path;

use headgate::testing::Log;

/// A record, in the log or in storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub offset: u64,
    pub datasource: String,
    pub topic: String,
    pub payload: Vec<u8>,
}

/// Every record in the log of a gateway that has ended, in order.
pub fn in_log(dir: &Path) -> Vec<Kept> {
    records_of(&*super::cluster::log_of(dir))
}

/// Every record in a log, in order.
pub fn records_of(log: &dyn Log) -> Vec<Kept> {
    let mut kept = Vec::new();
    let mut from = log.first_offset();
    while from < log.next_offset() {
        let batches = log.read(from, 1 << 20).expect("the log is readable");
        assert!(!batches.is_empty(), "records from {from} to {}", log.next_offset());
        for batch in batches {
            kept.extend(batch.records().map(|record| Kept {
                offset: record.offset,
                datasource: record.datasource.to_owned(),
                topic: record.topic.to_owned(),
                payload: record.payload.to_vec(),
            }));
            from = batch.next_offset();
        }
    }
    kept
}

/// Every record in `records.db`, in order.
pub fn in_storage(dir: &Path) -> Vec<Kept> {
    let db = rusqlite::Connection::open(dir.join("records.db")).expect("records.db opens");
    let sql = "SELECT \"offset\", datasource, topic, payload FROM records ORDER BY \"offset\"";
    let mut rows = db.prepare(sql).expect("the view of records");
    let rows = rows.query_map([], |row| {
        Ok(Kept {
            offset: row.get::<_, i64>(0)?.cast_unsigned(),
            datasource: row.get(1)?,
            topic: row.get(2)?,
            payload: row.get_ref(3)?.as_bytes()?.to_vec(),
        })
    });
    rows.expect("rows").collect::<Result<_, _>>().expect("rows")
}
