//! Queries: reading stored records, a page at a time, while storage keeps writing.
//!
//! Three bounds limit a page: its records, their bytes, and the records scanned for it. The last bound
//! is for filters that few records pass: their pages may be short or empty and still have a next one, so
//! that no request scans a whole database.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};

use super::latest::{self, LatestPage};
use super::sink::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use super::sink::sqlite::RECORDS_FILE_NAME;
use crate::filter::{FilterError, TopicFilter};
use crate::limits::{QUERIES_MAX, QUERY_BYTES_MAX, QUERY_RECORDS_MAX, QUERY_SCANNED_MAX};
use crate::message::{DatasourceId, KeyId, Offset, TimeMicros, Transport};

/// How long a query waits while another process has the whole database locked.
const QUERY_LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Reads `records.db`. Blocks, so call it where blocking is allowed. Cheap to clone.
#[derive(Clone)]
pub struct RecordsReader {
    pool: Arc<RecordsConnectionPool>,
}

/// Connections that no query uses at the moment.
struct RecordsConnectionPool {
    path: PathBuf,
    idle: Mutex<Vec<Connection>>,
}

/// Which records to read.
#[derive(Debug, Clone)]
pub struct RecordsQuery {
    /// The datasource of the records.
    pub datasource: DatasourceId,
    /// A topic or an MQTT filter (`+`, `#`).
    pub topic: Option<String>,
    /// Received at or after.
    pub from: Option<TimeMicros>,
    /// Received before.
    pub to: Option<TimeMicros>,
    /// Only records with a greater offset.
    pub after_offset: Option<Offset>,
    /// Only records let in by this key.
    pub key_id: Option<KeyId>,
    /// At most this many, and never more than [`QUERY_RECORDS_MAX`].
    pub limit: usize,
}

/// One stored record.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredRecord {
    /// Its place in the log.
    pub offset: Offset,
    /// As the device wrote it.
    pub topic: Arc<str>,
    /// The bytes that the device sent.
    pub payload: Vec<u8>,
    /// The media type, or empty.
    pub content_type: Arc<str>,
    /// The key that let it in.
    pub key_id: KeyId,
    /// The transport that it came by.
    pub transport: Transport,
    /// When it was received.
    pub received_at: TimeMicros,
}

/// A page of records, and where the next one starts.
#[derive(Debug, Default)]
pub struct RecordsPage {
    /// Ordered by offset. May be empty although there is a next page.
    pub records: Vec<StoredRecord>,
    /// `after_offset` of the next page, if there may be one.
    pub next: Option<Offset>,
}

/// Why a query failed.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The topic in the query is neither a topic nor a filter.
    #[error("topic: {0}")]
    Filter(#[from] FilterError),
    /// The database could not be read.
    #[error("query: {0}")]
    Database(#[from] rusqlite::Error),
}

impl RecordsReader {
    /// Opens `dir/records.db`, which storage has made.
    ///
    /// # Errors
    /// [`QueryError::Database`] if the file is missing or unreadable.
    pub fn open(dir: &Path) -> Result<Self, QueryError> {
        let query = Self {
            pool: Arc::new(RecordsConnectionPool {
                path: dir.join(RECORDS_FILE_NAME),
                idle: Mutex::default(),
            }),
        };
        query
            .read(|connection| Ok(connection.query_row("SELECT next_offset FROM cursor", [], |_| Ok(()))?))?;
        Ok(query)
    }

    /// One page of records, in the order of their offsets.
    ///
    /// # Errors
    /// [`QueryError::Filter`] for a topic that is not valid; [`QueryError::Database`].
    pub fn records(&self, query: &RecordsQuery) -> Result<RecordsPage, QueryError> {
        let filter = query.topic.as_deref().map(TopicFilter::new).transpose()?;
        self.read(|connection| {
            let Some(scan) = RecordsScan::plan(connection, query, filter.as_ref())? else {
                return Ok(RecordsPage::default());
            };
            Ok(scan.page(connection, query, filter.as_ref())?)
        })
    }

    /// The newest values of a datasource's topics, ordered by topic name, starting after `after_topic`.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn latest(
        &self,
        datasource: &DatasourceId,
        after_topic: Option<&str>,
    ) -> Result<LatestPage, QueryError> {
        self.read(|connection| {
            let topics_of = datasource_row_id(connection, datasource)?;
            let mut page = LatestPage { datasource: datasource.clone(), topics: Vec::new(), next: None };
            if let Some(id) = topics_of {
                latest::read_latest_page(connection, id, after_topic, &mut page)?;
            }
            Ok(page)
        })
    }

    /// Runs `read` on a snapshot of the database, whatever storage writes meanwhile.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, QueryError>,
    ) -> Result<T, QueryError> {
        let idle = self.pool.idle.lock().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => open_read_only(&self.pool.path)?,
        };
        let answer = {
            let transaction = connection.transaction()?;
            read(&transaction)?
        };
        let mut idle = self.pool.idle.lock();
        if idle.len() < QUERIES_MAX {
            idle.push(connection);
        }
        Ok(answer)
    }
}

fn open_read_only(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(QUERY_LOCK_WAIT_MAX)?;
    Ok(connection)
}

pub(super) fn datasource_row_id(
    connection: &Connection,
    datasource: &DatasourceId,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT id FROM datasources WHERE datasource = ?1")?
        .query_row([datasource.as_str()], |row| row.get(0))
        .optional()
}

/// Which index to scan, and its first and last offset.
struct RecordsScan {
    along: ScanIndex,
    first: i64,
    last: i64,
}

enum ScanIndex {
    Datasource(i64),
    Topic(i64),
}

impl RecordsScan {
    /// Chooses index and range. `None` if no record can match.
    fn plan(
        connection: &Connection,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
    ) -> rusqlite::Result<Option<Self>> {
        let Some(datasource) = datasource_row_id(connection, &query.datasource)? else { return Ok(None) };
        let along = match filter.and_then(TopicFilter::exact) {
            None => ScanIndex::Datasource(datasource),
            Some(topic) => {
                let topic: Option<i64> = connection
                    .prepare_cached("SELECT id FROM topics WHERE datasource_id = ?1 AND topic = ?2")?
                    .query_row(params![datasource, topic], |row| row.get(0))
                    .optional()?;
                let Some(topic) = topic else { return Ok(None) };
                ScanIndex::Topic(topic)
            }
        };
        let (mut first, mut last) =
            (query.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1)), i64::MAX);
        if query.from.is_some() || query.to.is_some() {
            let rows: (Option<i64>, Option<i64>) = connection
                .prepare_cached(
                    "SELECT min(first_offset), max(first_offset) FROM time_index
                     WHERE newest_us >= ?1 AND oldest_us < ?2",
                )?
                .query_row(
                    [query.from.unwrap_or(TimeMicros::MIN), query.to.unwrap_or(TimeMicros::MAX)],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )?;
            let (Some(oldest), Some(newest)) = rows else { return Ok(None) };
            first = first.max(oldest);
            last = newest.saturating_add(sql_offset(TIME_INDEX_OFFSETS - 1));
        }
        Ok(Some(Self { along, first, last }))
    }

    fn page(
        &self,
        connection: &Connection,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
    ) -> rusqlite::Result<RecordsPage> {
        let (sql, id) = match self.along {
            ScanIndex::Datasource(id) => (RECORDS_PAGE_SQL[0], id),
            ScanIndex::Topic(id) => (RECORDS_PAGE_SQL[1], id),
        };
        let limit = query.limit.clamp(1, QUERY_RECORDS_MAX);
        let mut names = PageNameCache {
            connection,
            filter,
            key_id: query.key_id,
            topics: HashMap::new(),
            origins: HashMap::new(),
        };
        let mut page = RecordsPage::default();
        let (mut scanned, mut bytes, mut last) = (0, 0, None);
        let mut statement = connection.prepare_cached(sql)?;
        let mut rows = statement.query([id, self.first, self.last])?;
        // Cheap conditions come first, so that a row that fails them costs no look-up and no payload copy.
        while let Some(row) = rows.next()? {
            if page.records.len() == limit || bytes >= QUERY_BYTES_MAX || scanned == QUERY_SCANNED_MAX {
                page.next = last;
                break;
            }
            let offset = offset_from_sql(row.get(0)?);
            (scanned, last) = (scanned + 1, Some(offset));
            let received_at: TimeMicros = row.get(1)?;
            if query.from.is_some_and(|from| received_at < from)
                || query.to.is_some_and(|to| received_at >= to)
            {
                continue;
            }
            let Some(topic) = names.wanted_topic(row.get(2)?)? else { continue };
            let Some(origin) = names.wanted_origin(row.get(3)?)? else { continue };
            let payload = payload_bytes_of_row(row, 4)?;
            bytes += payload.len() + topic.len();
            page.records.push(StoredRecord {
                offset,
                topic,
                payload,
                content_type: origin.content_type,
                key_id: origin.key_id,
                transport: origin.transport,
                received_at,
            });
        }
        Ok(page)
    }
}

/// The records of a datasource, and those of a topic. SQLite orders the rows of one index entry by their
/// keys, which are the offsets, so that neither query sorts.
const RECORDS_PAGE_SQL: [&str; 2] = [
    "SELECT offset, received_us, topic_id, origin_id, payload FROM entries
     WHERE datasource_id = ?1 AND offset BETWEEN ?2 AND ?3 ORDER BY offset",
    "SELECT offset, received_us, topic_id, origin_id, payload FROM entries
     WHERE topic_id = ?1 AND offset BETWEEN ?2 AND ?3 ORDER BY offset",
];

/// A payload, whether it is stored as TEXT or as BLOB.
pub(super) fn payload_bytes_of_row(row: &Row<'_>, column: usize) -> rusqlite::Result<Vec<u8>> {
    Ok(row.get_ref(column)?.as_bytes()?.to_vec())
}

/// The names that the rows of one page refer to, each looked up once. `None` stands for a name that the
/// query excludes.
struct PageNameCache<'q> {
    connection: &'q Connection,
    filter: Option<&'q TopicFilter>,
    key_id: Option<KeyId>,
    topics: HashMap<i64, Option<Arc<str>>>,
    origins: HashMap<i64, Option<RecordOrigin>>,
}

/// The columns that most records of one sender share.
#[derive(Clone)]
pub(super) struct RecordOrigin {
    pub(super) key_id: KeyId,
    pub(super) transport: Transport,
    pub(super) content_type: Arc<str>,
}

impl PageNameCache<'_> {
    fn wanted_topic(&mut self, id: i64) -> rusqlite::Result<Option<Arc<str>>> {
        if let Some(topic) = self.topics.get(&id) {
            return Ok(topic.clone());
        }
        let topic: Arc<str> = self
            .connection
            .prepare_cached("SELECT topic FROM topics WHERE id = ?1")?
            .query_row([id], |row| row.get(0))?;
        let wanted = self.filter.is_none_or(|filter| filter.matches(&topic)).then_some(topic);
        self.topics.insert(id, wanted.clone());
        Ok(wanted)
    }

    fn wanted_origin(&mut self, id: i64) -> rusqlite::Result<Option<RecordOrigin>> {
        if let Some(origin) = self.origins.get(&id) {
            return Ok(origin.clone());
        }
        let origin = self
            .connection
            .prepare_cached("SELECT key_id, transport, content_type FROM origins WHERE id = ?1")?
            .query_row([id], origin_of_row)?;
        let wanted = self.key_id.is_none_or(|key_id| key_id == origin.key_id).then_some(origin);
        self.origins.insert(id, wanted.clone());
        Ok(wanted)
    }
}

pub(super) fn origin_of_row(row: &Row<'_>) -> rusqlite::Result<RecordOrigin> {
    let unreadable = |column, error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error);
    let key_id = KeyId::parse(row.get_ref(0)?.as_str()?).map_err(|error| unreadable(0, error.into()))?;
    let name = row.get_ref(1)?.as_str()?;
    let transport =
        Transport::parse(name).ok_or_else(|| unreadable(1, format!("no transport: {name}").into()))?;
    Ok(RecordOrigin { key_id, transport, content_type: row.get(2)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::sink::sqlite::SqliteSink;
    use crate::consume::testing::{EPOCH, record};
    use crate::message::RecordRef;

    const TOPICS: [&str; 4] = ["spindle/temp", "spindle/rpm", "spindle", "door"];
    const DATASOURCES: [&str; 3] = ["press-4", "press-5", "press-6"];
    const SECOND: TimeMicros = 1_000_000;

    fn id(datasource: &str) -> DatasourceId {
        DatasourceId::new(datasource).expect("slug")
    }

    fn all_of(datasource: &str) -> RecordsQuery {
        RecordsQuery {
            datasource: id(datasource),
            topic: None,
            from: None,
            to: None,
            after_offset: None,
            key_id: None,
            limit: QUERY_RECORDS_MAX,
        }
    }

    fn stored<'a>(dir: &Path, records: impl Iterator<Item = RecordRef<'a>>, next: Offset) -> RecordsReader {
        let mut sink = SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens");
        sink.store(records, next, false).expect("stored");
        RecordsReader::open(dir).expect("opens")
    }

    /// Twenty thousand records of several datasources, topics, keys and transports. The clock is
    /// set back twice while they come, once far and once by little.
    fn mixed() -> Vec<RecordRef<'static>> {
        let mut clock = EPOCH;
        (0..20_000_u64)
            .map(|offset| {
                clock += match offset {
                    7_000 => -3_600 * SECOND,
                    12_345 => -2 * SECOND,
                    _ => 100_000,
                };
                // Independent of each other: each from other bits of the same hash.
                let mixture = offset.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let pick = |of: u64, bits: u64| usize::try_from((mixture >> (8 * bits)) % of).expect("small");
                let mut record = record(offset, DATASOURCES[pick(3, 1)], TOPICS[pick(4, 2)], b"{\"t\": 1}");
                record.key_id = KeyId([u8::try_from(pick(3, 3)).expect("small"); 6]);
                record.transport = [Transport::Mqtt, Transport::Http][pick(2, 4)];
                record.content_type = ["", "application/json"][pick(2, 5)];
                record.received_at = clock;
                record
            })
            .collect()
    }

    #[test]
    fn every_combination_of_conditions_gives_exactly_the_records_that_meet_them_page_by_page() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let records = mixed();
        let query = stored(dir.path(), records.iter().copied(), 20_000);
        let times = [
            (None, None),
            (Some(EPOCH + 300 * SECOND), None),
            (None, Some(EPOCH + 500 * SECOND)),
            (Some(EPOCH + 1_200 * SECOND), Some(EPOCH + 1_234 * SECOND)),
            // An hour that occurred twice, and one that never occurred.
            (Some(EPOCH - 2_700 * SECOND), Some(EPOCH - 2_600 * SECOND)),
            (Some(EPOCH + 40_000 * SECOND), Some(EPOCH + 50_000 * SECOND)),
        ];
        let filters =
            [None, Some("spindle/temp"), Some("spindle/#"), Some("+"), Some("+/rpm"), Some("no/such")];
        let keys = [None, Some(KeyId([1; 6])), Some(KeyId([9; 6]))];
        let mut found_some = 0;
        for (from, to) in times {
            for topic in filters {
                for key_id in keys {
                    for after in [None, Some(11_111)] {
                        let mut asked = RecordsQuery {
                            from,
                            to,
                            topic: topic.map(str::to_owned),
                            key_id,
                            after_offset: after,
                            limit: 700,
                            ..all_of("press-5")
                        };
                        let filter = topic.map(|topic| TopicFilter::new(topic).expect("a filter"));
                        let expected: Vec<Offset> = records
                            .iter()
                            .filter(|r| r.datasource == "press-5")
                            .filter(|r| after.is_none_or(|after| r.offset > after))
                            .filter(|r| from.is_none_or(|from| r.received_at >= from))
                            .filter(|r| to.is_none_or(|to| r.received_at < to))
                            .filter(|r| key_id.is_none_or(|key_id| r.key_id == key_id))
                            .filter(|r| filter.as_ref().is_none_or(|filter| filter.matches(r.topic)))
                            .map(|r| r.offset)
                            .collect();
                        let mut found = Vec::new();
                        loop {
                            let page = query.records(&asked).expect("reads");
                            assert!(page.records.len() <= 700);
                            found.extend(page.records.iter().map(|record| record.offset));
                            let Some(next) = page.next else { break };
                            asked.after_offset = Some(next);
                        }
                        assert_eq!(found, expected, "{asked:?}");
                        found_some += usize::from(!found.is_empty());
                    }
                }
            }
        }
        assert!(found_some > 50, "{found_some}");
    }

    #[test]
    fn a_record_comes_back_as_it_was_sent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sent = record(3, "press-4", "spindle/temp °C", b"\xff\x00{");
        sent.content_type = "image/x";
        sent.transport = Transport::Nats;
        let query = stored(dir.path(), [sent].into_iter(), 4);
        let page = query.records(&all_of("press-4")).expect("reads");
        let expected = StoredRecord {
            offset: 3,
            topic: sent.topic.into(),
            payload: sent.payload.to_vec(),
            content_type: "image/x".into(),
            key_id: sent.key_id,
            transport: Transport::Nats,
            received_at: sent.received_at,
        };
        assert_eq!((page.records, page.next), (vec![expected], None));
        assert!(query.records(&all_of("press-9")).expect("reads").records.is_empty());
    }

    #[test]
    fn a_page_says_whether_there_may_be_another() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let query = stored(dir.path(), (0..10).map(|offset| record(offset, "press-4", "a", b"1")), 10);
        let page = |after_offset, limit| {
            let page =
                query.records(&RecordsQuery { after_offset, limit, ..all_of("press-4") }).expect("reads");
            (page.records.len(), page.next)
        };
        assert_eq!(page(None, 9), (9, Some(8)));
        assert_eq!(page(Some(8), 9), (1, None));
        assert_eq!(page(None, 10), (10, None));
        assert_eq!(page(Some(9), 10), (0, None));
        assert_eq!(page(Some(Offset::MAX), 10), (0, None));
    }

    #[test]
    fn a_page_ends_after_so_many_bytes_and_goes_on_with_the_next() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let payload = vec![b'x'; 1 << 20];
        let query = stored(dir.path(), (0..20).map(|offset| record(offset, "press-4", "a", &payload)), 20);
        let first = query.records(&all_of("press-4")).expect("reads");
        assert_eq!((first.records.len(), first.next), (16, Some(15)));
        let rest =
            query.records(&RecordsQuery { after_offset: first.next, ..all_of("press-4") }).expect("reads");
        assert_eq!((rest.records.len(), rest.next), (4, None));
    }

    #[test]
    fn a_filter_that_few_records_pass_gives_short_pages_and_finds_them_all() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let wanted = QUERY_SCANNED_MAX as u64 + 10;
        let topic = |offset| if offset == wanted { "rare/one" } else { "common" };
        let records = (0..=wanted).map(|offset| record(offset, "press-4", topic(offset), b"1"));
        let query = stored(dir.path(), records, wanted + 1);
        let rare = RecordsQuery { topic: Some("rare/+".to_owned()), ..all_of("press-4") };
        let first = query.records(&rare).expect("reads");
        assert_eq!((first.records.len(), first.next), (0, Some(QUERY_SCANNED_MAX as u64 - 1)));
        let second = query.records(&RecordsQuery { after_offset: first.next, ..rare }).expect("reads");
        assert_eq!(second.records.iter().map(|record| record.offset).collect::<Vec<_>>(), [wanted]);
        assert_eq!(second.next, None);
    }

    #[test]
    fn a_topic_that_is_no_filter_is_an_error_of_its_own() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
        let bad = RecordsQuery { topic: Some("a/#/b".to_owned()), ..all_of("press-4") };
        assert!(matches!(query.records(&bad), Err(QueryError::Filter(_))));
    }

    #[test]
    fn pages_are_read_along_an_index_and_never_sorted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
        for (along, index) in [("datasource_id", "entries_datasource"), ("topic_id", "entries_topic")] {
            let sql = RECORDS_PAGE_SQL[usize::from(along == "topic_id")];
            let plan = query
                .read(|connection| {
                    let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}"))?;
                    let steps = statement.query_map([1, 2, 3], |row| row.get::<_, String>(3))?;
                    Ok(steps.collect::<rusqlite::Result<Vec<_>>>()?)
                })
                .expect("explained");
            let expected = format!("SEARCH entries USING INDEX {index} ({along}=? AND rowid>? AND rowid<?)");
            assert_eq!(plan, [expected]);
        }
    }

    #[test]
    fn a_query_sees_what_is_stored_while_storage_writes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let count = || query.records(&all_of("press-4")).expect("reads").records.len();
        let records = (1..3).map(|offset| {
            assert_eq!(count(), 1, "what is not committed is not seen");
            record(offset, "press-4", "a", b"1")
        });
        sink.store(records, 3, false).expect("stored");
        assert_eq!(count(), 3);
    }
}
