//! Finding the retained messages that match a filter, a page at a time, while the follower keeps writing.
//!
//! The matches of a filter lie in a few ranges of the index over datasource and topic: an exact filter is
//! one look-up, `a/b/#` is the topic `a/b` and every topic that begins with `a/b/`. Within a range topics
//! are matched by name, and no page scans more than [`QUERY_SCANNED_MAX`] of them. Single messages are found by their
//! offsets.

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, params};

use super::table::{SELECT_RETAINED_AT, SELECT_RETAINED_MESSAGE, retained_message_of_row};
use super::{RetainedMessage, RetainedPage, RetainedPageStart};
use crate::consume::sink::schema::sql_offset;
use crate::filter::TopicFilter;
use crate::limits::QUERY_SCANNED_MAX;
use crate::message::{DatasourceId, Offset};
use crate::sqlite::{SqliteError, SqliteReaders};

/// The topics in a range, with their row ids; read from the index alone.
pub(super) const SELECT_RETAINED_TOPICS: &str =
    "SELECT topic, id FROM messages WHERE datasource = ?1 AND topic >= ?2 AND topic < ?3 ORDER BY topic";

/// One page, from a snapshot of the database. Blocks, so use it where blocking is allowed.
pub(super) fn read_retained_page(
    readers: &SqliteReaders,
    wanted: &RetainedSelection,
    below: Offset,
    after: Option<RetainedPageStart>,
    bytes_max: usize,
) -> Result<RetainedPage, SqliteError> {
    readers.read(|connection| RetainedScan::new(connection, wanted, below, bytes_max).page(after))
}

/// The messages at some offsets, in the given order, from a snapshot of the database; with a `datasource`, only its own.
/// `None` for one that is not retained. The answer ends after about `bytes_max`. Blocks, so use it where blocking is
/// allowed.
pub(super) fn read_retained_at(
    readers: &SqliteReaders,
    datasource: Option<&str>,
    offsets: &[Offset],
    bytes_max: usize,
) -> Result<Vec<Option<RetainedMessage>>, SqliteError> {
    readers.read(|connection| {
        let mut message = connection.prepare_cached(SELECT_RETAINED_AT)?;
        let (mut found, mut bytes) = (Vec::with_capacity(offsets.len()), 0);
        for &offset in offsets {
            if bytes >= bytes_max.max(1) {
                break;
            }
            let at = message
                .query_row(params![sql_offset(offset), datasource], retained_message_of_row)
                .optional()?;
            bytes += at.as_ref().map_or(0, RetainedMessage::weight);
            found.push(at);
        }
        Ok(found)
    })
}

/// Which messages a page is to have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RetainedSelection {
    /// The datasource of the messages; `None`: all datasources.
    datasource: Option<String>,
    /// The ranges that hold the topics; in order and disjoint.
    ranges: Vec<TopicRange>,
    /// Selects topics within the ranges.
    filter: TopicFilter,
}

/// Topics from one, inclusive, to another, exclusive.
#[derive(Debug, PartialEq, Eq)]
struct TopicRange {
    from: String,
    /// `None`: to the last.
    to: Option<String>,
}

impl RetainedSelection {
    /// Selects the topics of `datasource` that match. Without a datasource (or with `*`) `filter` has the
    /// datasource as its first level. `None` if no topic can match.
    pub(super) fn new(datasource: Option<&DatasourceId>, filter: &TopicFilter) -> Option<Self> {
        if let Some(datasource) = datasource.filter(|datasource| !datasource.is_all()) {
            return Some(Self::over(Some(datasource.as_str()), filter.clone()));
        }
        match filter.as_str().split_once('/') {
            // The rest of a filter after a level is itself a filter.
            Some(("+", rest)) => Some(Self::over(None, TopicFilter::new(rest).ok()?)),
            Some((datasource, rest)) => Some(Self::over(Some(datasource), TopicFilter::new(rest).ok()?)),
            None if filter.as_str() == "#" => Some(Self::over(None, filter.clone())),
            // A datasource without a topic below it matches nothing.
            None => None,
        }
    }

    fn over(datasource: Option<&str>, filter: TopicFilter) -> Self {
        Self {
            datasource: datasource.map(str::to_owned),
            ranges: TopicRange::all_of(filter.as_str()),
            filter,
        }
    }
}

impl TopicRange {
    fn only(topic: &str) -> Self {
        // No string lies between a string and the same string followed by a NUL.
        Self { from: topic.to_owned(), to: Some(format!("{topic}\0")) }
    }

    /// All topics that begin with `level` and a slash.
    fn under(level: &str) -> Self {
        // '0' comes right after '/'.
        Self { from: format!("{level}/"), to: Some(format!("{level}0")) }
    }

    /// The narrowest ranges that hold all matches of `filter`.
    fn all_of(filter: &str) -> Vec<Self> {
        let Some(wildcard) = filter.find(['+', '#']) else { return vec![Self::only(filter)] };
        // A wildcard fills its level, so that a slash precedes it.
        match filter[..wildcard].strip_suffix('/') {
            None => vec![Self { from: String::new(), to: None }],
            // `#` matches the level before it too.
            Some(level) if &filter[wildcard..] == "#" => vec![Self::only(level), Self::under(level)],
            Some(level) => vec![Self::under(level)],
        }
    }

    /// The end for SQLite's comparison. An empty BLOB stands for no end: every BLOB is greater than any TEXT.
    fn end_bound(&self) -> ToSqlOutput<'_> {
        ToSqlOutput::Borrowed(self.to.as_deref().map_or(ValueRef::Blob(b""), ValueRef::from))
    }
}

/// One page in the making.
struct RetainedScan<'a> {
    connection: &'a Connection,
    wanted: &'a RetainedSelection,
    below: i64,
    bytes_max: usize,
    page: RetainedPage,
    bytes: usize,
    scanned: usize,
}

impl<'a> RetainedScan<'a> {
    fn new(
        connection: &'a Connection,
        wanted: &'a RetainedSelection,
        below: Offset,
        bytes_max: usize,
    ) -> Self {
        let below = sql_offset(below);
        Self { connection, wanted, below, bytes_max, page: RetainedPage::default(), bytes: 0, scanned: 0 }
    }

    fn page(mut self, after: Option<RetainedPageStart>) -> rusqlite::Result<RetainedPage> {
        let mut at = match (after, &self.wanted.datasource) {
            (Some(after), _) => after,
            (None, Some(datasource)) => start_of_datasource(datasource.clone()),
            (None, None) => match self.next_datasource("")? {
                Some(first) => first,
                None => return Ok(self.page),
            },
        };
        loop {
            for range in &self.wanted.ranges {
                if !self.scan_range(range, &mut at)? {
                    self.page.next = Some(at);
                    return Ok(self.page);
                }
            }
            if self.wanted.datasource.is_some() {
                return Ok(self.page);
            }
            let Some(next) = self.next_datasource(&at.datasource)? else { return Ok(self.page) };
            at = next;
        }
    }

    /// Scans `range` after `at`, and moves `at`. Returns `false` if the page ends here.
    fn scan_range(&mut self, range: &TopicRange, at: &mut RetainedPageStart) -> rusqlite::Result<bool> {
        let mut names = self.connection.prepare_cached(SELECT_RETAINED_TOPICS)?;
        let mut message = self.connection.prepare_cached(SELECT_RETAINED_MESSAGE)?;
        let behind = format!("{}\0", at.topic);
        let mut rows =
            names.query(params![at.datasource, range.from.as_str().max(&behind), range.end_bound()])?;
        loop {
            if self.scanned >= QUERY_SCANNED_MAX || self.bytes >= self.bytes_max.max(1) {
                return Ok(false);
            }
            let Some(row) = rows.next()? else { return Ok(true) };
            let topic = row.get_ref(0)?.as_str()?;
            at.topic.clear();
            at.topic.push_str(topic);
            self.scanned += 1;
            if self.wanted.filter.matches(topic) {
                let found = message
                    .query_row(params![row.get::<_, i64>(1)?, self.below], retained_message_of_row)
                    .optional()?;
                self.bytes += found.as_ref().map_or(0, |found| found.weight());
                self.page.messages.extend(found);
            }
        }
    }

    fn next_datasource(&mut self, after: &str) -> rusqlite::Result<Option<RetainedPageStart>> {
        self.scanned += 1;
        self.connection
            .prepare_cached(
                "SELECT datasource FROM messages WHERE datasource > ?1 ORDER BY datasource LIMIT 1",
            )?
            .query_row([after], |row| row.get(0).map(start_of_datasource))
            .optional()
    }
}

fn start_of_datasource(datasource: String) -> RetainedPageStart {
    RetainedPageStart { datasource, topic: String::new() }
}
