//! Retained messages (MQTT 5 section 3.3.1.3): the newest message of every topic that was published
//! with the retain flag, kept in `DIR/retained.db` for those who subscribe later. An empty payload
//! with the flag takes the topic's message away.
//!
//! Retained messages are records in the log, and this is a consumer of it. A thread follows the log
//! (`follow.rs`) and writes its cursor in the same transaction as the messages (`table.rs`), so that a
//! kill at any moment changes no topic's message. Subscribers read what matches their filter, a page at a
//! time (`page.rs`).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::follow::{RetainedFollower, RetainedFollowerState};
use self::page::{RetainedSelection, read_retained_at, read_retained_page};
use self::table::{RETAINED_DATABASE, RETAINED_FILE_NAME, RetainedTable};
use crate::filter::TopicFilter;
use crate::log::{Log, WithheldRules};
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::retained_topics::RetainedTopics;
use crate::shares::TenantShares;
use crate::sqlite::{SqliteError, SqliteReaders, new_file_aside, open_or_set_aside, set_aside};

mod follow;
mod page;
pub(in crate::consume) mod table;
#[cfg(test)]
mod tests;

/// How long a start reads what is not consumed yet, to count its topics. A second of the log's newest is not after a kill,
/// and it is read in a part of that.
const RETAINED_COUNT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a page waits for the thread to consume what comes before it in the log.
const RETAINED_WAIT_MAX: Duration = Duration::from_secs(10);

/// A retained message, with the fields of its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedMessage {
    /// Its place in the log.
    pub offset: Offset,
    /// Its datasource.
    pub datasource: String,
    /// As the device wrote it, relative to its datasource.
    pub topic: String,
    /// The bytes the device sent; not empty.
    pub payload: Vec<u8>,
    /// The media type the client gave, or empty.
    pub content_type: String,
    /// The other MQTT 5 properties, in their wire form without the leading length; or empty. They may
    /// include an expiry, which the reader has to apply.
    pub properties: Vec<u8>,
    /// The key that let it in.
    pub key_id: KeyId,
    /// The transport that it came by.
    pub transport: Transport,
    /// A hash of the client that published it, or 0 if that is not known.
    pub publisher: u64,
    /// When its last byte was read from the socket.
    pub received_at: TimeMicros,
    /// How it was published.
    pub flags: RecordFlags,
}

impl RetainedMessage {
    /// The message as a record.
    pub fn as_record(&self) -> RecordRef<'_> {
        RecordRef {
            offset: self.offset,
            datasource: &self.datasource,
            topic: &self.topic,
            payload: &self.payload,
            content_type: &self.content_type,
            properties: &self.properties,
            key_id: self.key_id,
            transport: self.transport,
            publisher: self.publisher,
            received_at: self.received_at,
            event_at: None,
            flags: self.flags,
            note: &[],
        }
    }

    /// About how many bytes it takes in memory.
    fn weight(&self) -> usize {
        self.datasource.len()
            + self.topic.len()
            + self.payload.len()
            + self.content_type.len()
            + self.properties.len()
    }
}

/// Retained messages that match a filter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RetainedPage {
    /// Ordered by datasource and topic. May be few or none although there is a next page.
    pub messages: Vec<RetainedMessage>,
    /// Where the next page begins, if there may be one.
    pub next: Option<RetainedPageStart>,
}

/// A place between two pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedPageStart {
    datasource: String,
    /// The last topic that was scanned; empty before the first.
    topic: String,
}

impl RetainedPage {
    /// About how many bytes it takes in memory.
    pub fn weight(&self) -> usize {
        self.messages.iter().map(|message| message.weight() + size_of::<RetainedMessage>()).sum()
    }
}

impl RetainedPageStart {
    /// Behind a message of a page.
    pub fn behind(message: &RetainedMessage) -> Self {
        Self { datasource: message.datasource.clone(), topic: message.topic.clone() }
    }
}

/// Why retained messages could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RetainedError {
    /// The database could not be read or written.
    #[error("retained messages: {0}")]
    Database(#[from] SqliteError),
    /// The database has messages, and the log is empty: it has lost records, or is another one.
    #[error(
        "retained messages: {RETAINED_FILE_NAME} is at offset {consumed}, but the log ends at {log_end}: it has lost all \
         its records. Put it back if you have it; or let `headgate repair` say what it would set aside, and do it \
         with --yes"
    )]
    LogBehind {
        /// The first offset that was not consumed.
        consumed: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
    },
    /// The records before the page were not consumed in time.
    #[error("retained messages: consumed up to offset {consumed}, not yet up to {wanted}: {trouble}")]
    Behind {
        /// The first offset that was not consumed.
        consumed: Offset,
        /// The offset that had to be reached.
        wanted: Offset,
        /// Why, if that is known.
        trouble: String,
    },
    /// The gateway is shutting down.
    #[error("retained messages: the gateway is shutting down")]
    Closed,
}

/// The running consumer, and the handle to query it. Cheap to clone; the thread ends after the last clone
/// is dropped, or with [`RetainedStore::stop`].
#[derive(Clone)]
pub struct RetainedStore {
    handle: Arc<RetainedHandle>,
}

struct RetainedHandle {
    shared: Arc<RetainedFollowerState>,
    readers: SqliteReaders,
    /// A page leaves out what the thread has not removed yet.
    withheld: Arc<WithheldRules>,
    /// The turns in which pages are read.
    turns: TenantShares,
}

impl RetainedStore {
    /// Opens `dir/retained.db`, or makes it, and starts the thread that follows the log into it. A database
    /// that is damaged or ahead of the log is set aside and made again from the log. One that cannot be opened is
    /// opened by the thread once that is possible; until then no message is retained, and [`RetainedStore::trouble`]
    /// says why.
    /// Whenever more is durable, `consumed` is called with the offset below which everything is: the log
    /// need not keep that for this consumer. What `consumed` owns lives as long as this.
    ///
    /// # Errors
    /// [`RetainedError::LogBehind`]; [`RetainedError::Database`] if there is no thread for it.
    pub fn start(
        dir: &Path,
        log: Arc<dyn Log>,
        consumed: impl Fn(Offset) + Send + 'static,
    ) -> Result<Self, RetainedError> {
        let path = dir.join(RETAINED_FILE_NAME);
        let log_end = log.next_offset();
        let (opened, trouble) = match open_right(&path, &*log, log_end) {
            Ok(opened) => (Some(opened), None),
            Err(RetainedError::Database(error)) => (None, Some(unopened_words(&error))),
            Err(error) => return Err(error),
        };
        let (table, said) = opened.unzip();
        let shared = Arc::new(RetainedFollowerState::new(table.as_ref(), Box::new(consumed)));
        shared.control().begin_with(trouble);
        if let Some(said) = said.flatten() {
            shared.note_set_aside(said);
        }
        let count_until = Instant::now() + RETAINED_COUNT_TIME_MAX;
        if let Some(table) = &table
            && let Err(error) = shared.count_topics(table, &*log, || Instant::now() < count_until)
        {
            shared.note_uncounted(SqliteError::from_sqlite(&error, &path));
        }
        let withheld = log.withheld().clone();
        let follower = RetainedFollower::new(path.clone(), table, log.clone(), log_end, shared.clone());
        shared
            .control()
            .start(follower, log)
            .map_err(|error| SqliteError::failed(&path, format!("no thread for it: {error}")))?;
        let (readers, turns) = (SqliteReaders::new(path, &RETAINED_DATABASE), TenantShares::default());
        Ok(Self { handle: Arc::new(RetainedHandle { shared, readers, withheld, turns }) })
    }

    /// One page of the matching retained messages, ordered by datasource and topic. Only messages with an
    /// offset below `below` are included: whoever reads the log from `below` on gets the newer ones there.
    /// Waits first until everything below `below` is consumed. There is none as long as the database cannot be opened.
    ///
    /// With a `datasource`, `filter` applies to its topics. Without one (or with `*`) it applies to all
    /// topics, with the datasource as the first level. A page ends after about `bytes_max`, or when very
    /// many topics were scanned for it; `after` is the `next` of the page before.
    ///
    /// # Errors
    /// [`RetainedError::Behind`] if the wait takes more than ten seconds, or the database was damaged and is
    /// being made anew: ask again then. [`RetainedError::Database`],
    /// [`RetainedError::Closed`].
    pub async fn page(
        &self,
        datasource: Option<&DatasourceId>,
        filter: &TopicFilter,
        below: Offset,
        after: Option<RetainedPageStart>,
        bytes_max: usize,
    ) -> Result<RetainedPage, RetainedError> {
        if !self.handle.shared.is_open() {
            return Ok(RetainedPage::default());
        }
        self.wait_consumed(below).await?;
        let wanted = match RetainedSelection::new(datasource, filter) {
            Some(wanted) if !self.is_empty() => wanted,
            _ => return Ok(RetainedPage::default()),
        };
        let read = move |handle: &RetainedHandle| {
            let mut page = read_retained_page(&handle.readers, &wanted, below, after, bytes_max)?;
            let left_out = handle.withheld.now();
            if !left_out.is_nothing() {
                page.messages.retain(|message| !left_out.withholds(&message.as_record()));
            }
            Ok::<_, SqliteError>(page)
        };
        self.read_in_turn(datasource, below, read).await
    }

    /// The messages that are retained still of those at some offsets, in the given order; `None` for one that is not.
    /// With a `datasource` only its own are found. Waits first until the newest of them is consumed. The answer ends
    /// after about `bytes_max`, which is never before the first: the rest is to be asked for again.
    ///
    /// # Errors
    /// As [`RetainedStore::page`]; [`RetainedError::Behind`] also as long as the database cannot be opened.
    pub async fn messages_at(
        &self,
        datasource: Option<&DatasourceId>,
        offsets: Vec<Offset>,
        bytes_max: usize,
    ) -> Result<Vec<Option<RetainedMessage>>, RetainedError> {
        let Some(below) = offsets.iter().max().map(|newest| newest + 1) else { return Ok(Vec::new()) };
        if !self.handle.shared.is_open() {
            return Err(self.behind(below));
        }
        self.wait_consumed(below).await?;
        let of = datasource.filter(|datasource| !datasource.is_all()).map(|of| of.as_str().to_owned());
        let read = move |handle: &RetainedHandle| {
            let mut found = read_retained_at(&handle.readers, of.as_deref(), &offsets, bytes_max)?;
            let left_out = handle.withheld.now();
            for place in &mut found {
                if place.as_ref().is_some_and(|message| left_out.withholds(&message.as_record())) {
                    *place = None;
                }
            }
            Ok::<_, SqliteError>(found)
        };
        self.read_in_turn(datasource, below, read).await
    }

    /// Waits until everything below `below` is consumed.
    async fn wait_consumed(&self, below: Offset) -> Result<(), RetainedError> {
        let waiting = tokio::time::timeout(RETAINED_WAIT_MAX, self.wait_caught_up(below));
        waiting.await.map_err(|_| self.behind(below))
    }

    /// What is not consumed is asked for again later.
    fn behind(&self, wanted: Offset) -> RetainedError {
        let trouble = self.trouble().unwrap_or_else(|| "there is much to read".to_owned());
        RetainedError::Behind { consumed: self.handle.shared.cursor(), wanted, trouble }
    }

    /// Reads the database in a turn of the datasource, where everything below `below` is consumed. Has damage mended.
    async fn read_in_turn<T: Send + 'static>(
        &self,
        datasource: Option<&DatasourceId>,
        below: Offset,
        read: impl FnOnce(&RetainedHandle) -> Result<T, SqliteError> + Send + 'static,
    ) -> Result<T, RetainedError> {
        let share = self.handle.turns.share(datasource.unwrap_or(&DatasourceId::all()));
        let handle = self.handle.clone();
        let read = share.read_in_turn(move || read(&handle)).await.map_err(|_| RetainedError::Closed)?;
        match read {
            Err(damage) if damage.is_damage() && self.handle.shared.mend(damage.clone()).await => {
                Err(RetainedError::Behind {
                    consumed: self.handle.shared.cursor(),
                    wanted: below,
                    trouble: damage.to_string(),
                })
            }
            read => Ok(read?),
        }
    }

    /// How many messages of a datasource are retained, and the sum of their payloads in bytes. Blocks.
    ///
    /// # Errors
    /// [`RetainedError::Database`].
    pub fn count_of(&self, datasource: &DatasourceId) -> Result<(u64, u64), RetainedError> {
        Ok(self.handle.readers.read(|connection| table::count_of(connection, datasource))?)
    }

    /// The topics that have a message.
    pub fn topics(&self) -> &Arc<RetainedTopics> {
        self.handle.shared.topics()
    }

    /// Returns once everything below `offset` is consumed; never, if the thread ends first.
    pub async fn wait_caught_up(&self, offset: Offset) {
        self.handle.shared.wait_caught_up(offset).await;
    }

    /// Returns once this version of the rules about leaked keys is applied to what is handed out; never, if
    /// the thread ends first.
    pub async fn wait_reconciled(&self, version: u64) {
        self.handle.shared.wait_reconciled(version).await;
    }

    /// Whether nothing is retained of what is consumed so far. After [`RetainedStore::wait_caught_up`] the answer is
    /// exact for everything below that offset. Costs next to nothing.
    pub fn is_empty(&self) -> bool {
        self.handle.shared.is_empty()
    }

    /// What was set aside since the start, and where it is.
    pub fn set_aside(&self) -> Option<String> {
        self.handle.shared.set_aside()
    }

    /// The present error, while retained messages cannot be kept up to date.
    pub fn trouble(&self) -> Option<String> {
        self.handle.shared.control().trouble()
    }

    /// Consumes what the log already has, within the deadline, and ends the thread. The next start consumes
    /// the rest.
    pub async fn stop(&self, deadline: Instant) {
        self.handle.shared.control().stop(deadline).await;
    }
}

/// Opens `retained.db`. One that is damaged, or ahead of where the log ended at the start, is set aside: then also
/// returns what to tell the operator.
fn open_right(
    path: &Path,
    log: &dyn Log,
    log_end: Offset,
) -> Result<(RetainedTable, Option<String>), RetainedError> {
    let (mut table, damaged) = open_or_set_aside(path, || RetainedTable::open(path))?;
    let (consumed, first) = (table.cursor(), log.first_offset());
    if let Some((aside, damage)) = damaged {
        return Ok((table, Some(damage_words(&aside, &damage, first))));
    }
    if consumed <= log_end {
        return Ok((table, None));
    }
    if log_end == 0 {
        return Err(RetainedError::LogBehind { consumed, log_end });
    }
    let aside = new_file_aside(path)?;
    if let Err(error) = table.set_back(log_end, first, &aside) {
        // Nothing was deleted there, and every start would leave one more copy.
        let _ = std::fs::remove_file(&aside);
        return Err(SqliteError::from_sqlite(&error, path).into());
    }
    let said = format!(
        "{RETAINED_FILE_NAME} was at offset {consumed}, ahead of the log, which ends at {log_end}: a copy is set aside \
         as {}, and retained messages are those of the log again",
        aside.display()
    );
    Ok((table, Some(said)))
}

/// Makes the `retained.db` in a data directory that of a log that goes on at `end` from an earlier state, and begins at
/// `first`. Returns what to tell the operator, if there was anything beyond.
///
/// # Errors
/// [`RetainedError::Database`].
pub fn set_back_retained(dir: &Path, end: Offset, first: Offset) -> Result<Option<String>, RetainedError> {
    let path = dir.join(RETAINED_FILE_NAME);
    if !path.exists() {
        return Ok(None);
    }
    let mut table = match RetainedTable::open(&path) {
        // The start makes another one from the log.
        Err(damage) if damage.is_damage() => return Ok(None),
        opened => opened?,
    };
    if table.cursor() <= end {
        // The registry may have gone back too, and given a version to another rule.
        table.forget_rules().map_err(|error| SqliteError::from_sqlite(&error, &path))?;
        return Ok(None);
    }
    let aside = new_file_aside(&path)?;
    if let Err(error) = table.set_back(end, first.min(end), &aside) {
        let _ = std::fs::remove_file(&aside);
        return Err(SqliteError::from_sqlite(&error, &path).into());
    }
    Ok(Some(format!(
        "{RETAINED_FILE_NAME} was ahead of the log, which goes on at offset {end} from an earlier state: a copy is set \
         aside as {}, and retained messages are those of the log again",
        aside.display()
    )))
}

/// What to tell an operator of a `retained.db` that cannot be opened.
fn unopened_words(error: &SqliteError) -> String {
    format!("{error}. New subscribers get no retained message meanwhile; {}", error.remedy())
}

/// What to tell an operator of a damaged database that was set aside.
fn damage_words(aside: &Path, damage: &SqliteError, first: Offset) -> String {
    format!(
        "{RETAINED_FILE_NAME} was damaged and is set aside as {}; retained messages are made again from the log, from \
         offset {first} on: older ones are in that file alone ({damage})",
        aside.display()
    )
}

/// Sets a `retained.db` aside that is ahead of an empty log, with which [`RetainedStore::start`] refuses to
/// start; or only tells it, without `apply`. `None` if there is nothing to do.
///
/// # Errors
/// [`RetainedError::Database`].
pub fn repair(dir: &Path, log: &dyn Log, apply: bool) -> Result<Option<String>, RetainedError> {
    let path = dir.join(RETAINED_FILE_NAME);
    if !path.exists() || log.next_offset() > 0 {
        return Ok(None);
    }
    let consumed = match RetainedTable::open(&path) {
        // The start sees to it.
        Err(damage) if damage.is_damage() => return Ok(None),
        Err(error) => return Ok(Some(unopened_words(&error))),
        Ok(table) => table.cursor(),
    };
    if consumed == 0 {
        return Ok(None);
    }
    let aside =
        if apply { set_aside(&path)?.display().to_string() } else { "retained-set-aside-TIME.db".to_owned() };
    Ok(Some(format!(
        "{RETAINED_FILE_NAME} is at offset {consumed}, and the log is empty: it is set aside as {aside}, and no message \
         is retained any more"
    )))
}

impl Drop for RetainedHandle {
    /// Ends the thread after its present transaction if nobody has stopped it.
    fn drop(&mut self) {
        self.shared.control().stop_by(Instant::now());
    }
}
