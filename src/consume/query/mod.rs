//! Queries: reading stored records, a page at a time, while storage keeps writing.
//!
//! Three bounds limit a page: its records, their bytes, and the records scanned for it. The last bound
//! is for filters that few records pass: their pages may be short or empty and still have a next one, so
//! that no request scans a whole database.

mod postgres;
mod range;
mod row;
mod scan;
pub mod series;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use headgate_bridge_postgres::PostgresFault;
use rusqlite::Connection;

use self::postgres::PostgresRecords;
use self::scan::RecordsScan;
use super::latest::{self, LatestPage};
use super::sink::latest_board::LatestBoard;
use super::sink::schema::RECORDS_DATABASE;
use super::sink::sqlite::RECORDS_FILE_NAME;
use crate::config::PostgresConfig;
use crate::filter::{FilterError, TopicFilter};
#[cfg(test)]
use crate::limits::LATEST_TOPICS_MAX;
use crate::limits::{
    QUERY_BYTES_MAX, QUERY_PIECE_BYTES, QUERY_PIECE_SCANNED, QUERY_RECORDS_MAX, QUERY_SCANNED_MAX,
};
use crate::message::{DatasourceId, KeyId, Offset, TimeMicros, Transport};
use crate::sqlite::{SqliteError, SqliteReaders};

pub(super) use super::sink::incarnations::row_id_of_scope;
pub use range::StoredRange;
pub(super) use row::{origin_of_row, payload_bytes_of_row};

/// Reads what is stored, from the sink that reads are answered from. Blocks, so call it where blocking is allowed. Cheap
/// to clone.
#[derive(Clone)]
pub enum RecordsReader {
    /// From `records.db`.
    Sqlite(SqliteRecords),
    /// From PostgreSQL.
    Postgres(PostgresRecords),
}

/// Reads `records.db`.
#[derive(Clone)]
pub struct SqliteRecords {
    readers: Arc<SqliteReaders>,
    /// What is shown from memory.
    board: Arc<LatestBoard>,
}

/// Which records to read.
#[derive(Debug, Clone)]
pub struct RecordsQuery {
    /// The scope of the incarnation of the datasource that the records are of.
    pub scope: DatasourceId,
    /// A topic or an MQTT filter (`+`, `#`).
    pub topic: Option<String>,
    /// Received at or after.
    pub from: Option<TimeMicros>,
    /// Received before.
    pub to: Option<TimeMicros>,
    /// Measured at or after; the time of receipt counts where nobody says when that was.
    pub event_from: Option<TimeMicros>,
    /// Measured before.
    pub event_to: Option<TimeMicros>,
    /// Only records with a greater offset.
    pub after_offset: Option<Offset>,
    /// Only records with a lower offset.
    pub before_offset: Option<Offset>,
    /// Which come first.
    pub order: RecordsOrder,
    /// Only records let in by this key.
    pub key_id: Option<KeyId>,
    /// At most this many.
    pub limit: usize,
}

/// Which of the records come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RecordsOrder {
    /// Those with the lowest offsets.
    #[default]
    Oldest,
    /// Those with the highest offsets.
    Newest,
}

impl RecordsQuery {
    /// Whether a record of these times is among those that are asked for.
    fn has_times(&self, received_at: TimeMicros, event_at: Option<TimeMicros>) -> bool {
        let is_within = |at: TimeMicros, from: Option<TimeMicros>, to: Option<TimeMicros>| {
            from.is_none_or(|from| at >= from) && to.is_none_or(|to| at < to)
        };
        is_within(received_at, self.from, self.to)
            && is_within(event_at.unwrap_or(received_at), self.event_from, self.event_to)
    }

    /// Goes on behind the record with this offset, in its order. The place stays valid whatever is removed meanwhile.
    pub fn go_on_at(&mut self, cursor: Offset) {
        match self.order {
            RecordsOrder::Oldest => {
                self.after_offset = Some(self.after_offset.map_or(cursor, |after| after.max(cursor)));
            }
            RecordsOrder::Newest => self.end_before(cursor),
        }
    }

    /// Leaves out this offset and all above it.
    pub fn end_before(&mut self, offset: Offset) {
        self.before_offset = Some(self.before_offset.map_or(offset, |before| before.min(offset)));
    }
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
    /// When it was measured, if its sender has said so.
    pub event_at: Option<TimeMicros>,
}

/// A page of records, and where the next one starts.
#[derive(Debug, Default)]
pub struct RecordsPage {
    /// In the order that was asked for. May be empty although there is a next page.
    pub records: Vec<StoredRecord>,
    /// Where the next page [goes on](RecordsQuery::go_on_at), if there may be one.
    pub next: Option<Offset>,
}

/// What a record takes in a piece beside its bytes, as it is rendered.
const RECORD_MEMORY_BYTES: usize = 256;

/// What is left of the bounds of one page.
#[derive(Debug, Clone)]
pub struct PageBudget {
    records: usize,
    bytes: usize,
    scanned: usize,
    /// What is left of the bytes of a piece of the page, if it is read in pieces.
    piece_bytes: usize,
    /// What is left of the records that are scanned for a piece.
    piece_scanned: usize,
    /// The record that was scanned last: the next page starts after it.
    pub(super) scanned_to: Option<Offset>,
}

impl PageBudget {
    /// For a page of up to `limit` records, at least 1 and at most [`QUERY_RECORDS_MAX`].
    pub fn new(limit: usize) -> Self {
        Self {
            piece_bytes: usize::MAX,
            piece_scanned: usize::MAX,
            records: limit.clamp(1, QUERY_RECORDS_MAX),
            bytes: QUERY_BYTES_MAX,
            scanned: QUERY_SCANNED_MAX,
            scanned_to: None,
        }
    }

    /// For up to `limit` records of any size, which have to be read in pieces.
    pub fn without_bounds(limit: usize) -> Self {
        Self { records: limit.max(1), bytes: usize::MAX, scanned: usize::MAX, ..Self::new(1) }
    }

    /// Begins a piece of the page, of about [`QUERY_PIECE_BYTES`], for which at most [`QUERY_PIECE_SCANNED`] records are
    /// scanned.
    pub fn begin_piece(&mut self) {
        (self.piece_bytes, self.piece_scanned) = (QUERY_PIECE_BYTES, QUERY_PIECE_SCANNED);
    }

    /// Whether the page ends here, and not only a piece of it.
    pub fn is_page_spent(&self) -> bool {
        self.records == 0 || self.bytes == 0 || self.scanned == 0
    }

    /// Whether the page or the piece ends here.
    pub(super) fn is_spent(&self) -> bool {
        self.is_page_spent() || self.piece_bytes == 0 || self.piece_scanned == 0
    }

    /// Counts a record that is looked at.
    pub(super) fn scan(&mut self, offset: Offset) {
        self.scanned -= 1;
        self.piece_scanned -= 1;
        self.scanned_to = Some(offset);
    }

    /// Counts a record that the page takes, with its bytes.
    pub fn take(&mut self, bytes: usize) {
        self.records -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.piece_bytes = self.piece_bytes.saturating_sub(bytes + RECORD_MEMORY_BYTES);
    }
}

/// Why a query failed.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The topic in the query is neither a topic nor a filter.
    #[error("topic: {0}")]
    Filter(#[from] FilterError),
    /// The database could not be read.
    #[error("query: {0}")]
    Database(#[from] SqliteError),
    /// PostgreSQL cannot be reached now, or lets nobody in. What it says is in the gateway's own log.
    #[error("PostgreSQL cannot be reached")]
    PostgresAway,
    /// Too many read from PostgreSQL at once.
    #[error("all connections to PostgreSQL are in use")]
    PostgresBusy,
    /// PostgreSQL did not do what it was asked.
    #[error(transparent)]
    Postgres(#[from] PostgresFault),
    /// What is in PostgreSQL cannot be read as it is.
    #[error("PostgreSQL: {0}")]
    PostgresUnfit(String),
}

impl RecordsReader {
    /// A reader of `dir/records.db`, which storage makes. It is opened when it is read.
    pub fn new(dir: &Path) -> Self {
        let readers = SqliteReaders::new(dir.join(RECORDS_FILE_NAME), &RECORDS_DATABASE);
        Self::Sqlite(SqliteRecords { readers: Arc::new(readers), board: Arc::default() })
    }

    /// A reader of what PostgreSQL has. It connects when it is read.
    pub fn of_postgres(config: &PostgresConfig) -> Self {
        Self::Postgres(PostgresRecords::new(config))
    }

    /// Shows the newest values from `board` as far as they are there. PostgreSQL has its own.
    #[must_use]
    pub fn with_board(self, board: Arc<LatestBoard>) -> Self {
        match self {
            Self::Sqlite(records) => Self::Sqlite(SqliteRecords { board, ..records }),
            Self::Postgres(records) => Self::Postgres(records),
        }
    }

    /// One page of records.
    #[cfg(test)]
    pub fn records(&self, query: &RecordsQuery) -> Result<RecordsPage, QueryError> {
        self.records_within(query, &mut PageBudget::new(query.limit))
    }

    /// The next records of a page of which `budget` is left.
    ///
    /// # Errors
    /// [`QueryError::Filter`] for a topic that is not valid; [`QueryError::Database`].
    pub fn records_within(
        &self,
        query: &RecordsQuery,
        budget: &mut PageBudget,
    ) -> Result<RecordsPage, QueryError> {
        let filter = query.topic.as_deref().map(TopicFilter::new).transpose()?;
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.records_within(query, filter.as_ref(), budget),
        };
        stored.read(|connection| {
            let Some(scan) = RecordsScan::plan(connection, query, filter.as_ref())? else {
                return Ok(RecordsPage::default());
            };
            scan.page(connection, query, filter.as_ref(), budget)
        })
    }

    /// One page of the newest values.
    #[cfg(test)]
    pub fn latest(&self, scope: &DatasourceId, after_topic: Option<&str>) -> Result<LatestPage, QueryError> {
        self.latest_within(scope, after_topic, &mut PageBudget::new(LATEST_TOPICS_MAX))
    }

    /// The newest values of the topics of a datasource, in the incarnation with this scope, ordered by topic name,
    /// starting after `after_topic`: the next topics of a page of which `budget` is left.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn latest_within(
        &self,
        scope: &DatasourceId,
        after_topic: Option<&str>,
        budget: &mut PageBudget,
    ) -> Result<LatestPage, QueryError> {
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.latest_within(scope, after_topic, budget),
        };
        stored.read(|connection| {
            let topics_of = row_id_of_scope(connection, scope)?;
            let (datasource, _) = scope.of_scope();
            let mut page = LatestPage { datasource, topics: Vec::new(), next: None };
            if let Some(id) = topics_of {
                latest::read_latest_page(connection, id, after_topic, budget, &mut page)?;
            }
            Ok(page)
        })
    }

    /// As [`RecordsReader::latest_within`], each topic with the JSON that it is shown as. Returns the topic after which it goes
    /// on, if there are more.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn latest_json_within(
        &self,
        scope: &DatasourceId,
        after_topic: Option<&str>,
        budget: &mut PageBudget,
        each: &mut dyn FnMut(&str, &[u8]),
    ) -> Result<Option<String>, QueryError> {
        if let Self::Sqlite(stored) = self
            && let Some(next) = stored.board.read(scope, after_topic, budget, each)
        {
            return Ok(next);
        }
        let page = self.latest_within(scope, after_topic, budget)?;
        for topic in &page.topics {
            match serde_json::to_vec(topic) {
                Ok(json) => each(&topic.topic, &json),
                // Into memory, of values that have a JSON form.
                Err(error) => tracing::error!(%error, "a topic has no JSON form"),
            }
        }
        Ok(page.next)
    }

    /// How many records are stored of an incarnation, how many are in quarantine, and the sum of the payloads of both in
    /// bytes.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn count_of(&self, scope: &DatasourceId) -> Result<(u64, u64, u64), QueryError> {
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.count_of(scope),
        };
        stored.read(|connection| {
            let Some(id) = row_id_of_scope(connection, scope)? else { return Ok((0, 0, 0)) };
            let count = |table: &str| {
                let select = format!(
                    "SELECT count(*), coalesce(sum(octet_length(payload)), 0) FROM {table} WHERE datasource_id = ?1"
                );
                connection.query_row(&select, [id], |row| {
                    Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get::<_, i64>(1)?.unsigned_abs()))
                })
            };
            let ((records, bytes), (quarantined, more)) = (count("entries")?, count("quarantined")?);
            Ok((records, quarantined, bytes + more))
        })
    }
}

impl SqliteRecords {
    /// Runs `read` on a snapshot of the database, whatever storage writes meanwhile.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, QueryError> {
        Ok(self.readers.read(read)?)
    }
}
