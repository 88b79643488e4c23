//! A page of records from PostgreSQL: which index is scanned for it, from where, and where it ends.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use headgate_bridge_postgres::{PostgresFault, PostgresSnapshot, PostgresTime, Row};

use super::{PostgresRecords, row_id_of_scope, topic_id};
use crate::consume::query::{PageBudget, QueryError, RecordsOrder, RecordsPage, RecordsQuery, StoredRecord};
use crate::consume::sink::postgres::text_of;
use crate::consume::sink::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use crate::filter::TopicFilter;
use crate::message::{KeyId, TimeMicros, Transport};

macro_rules! page_sql {
    ($along:literal, $order:literal) => {
        concat!(
            "SELECT e.log_offset, e.received_at, e.event_at, t.topic, o.key_id, o.transport, o.content_type,
                 CASE WHEN e.received_at >= $4 AND e.received_at < $5
                     AND coalesce(e.event_at, e.received_at) >= $6 AND coalesce(e.event_at, e.received_at) < $7
                     AND ($8::text IS NULL OR t.topic ~ $8) AND ($9::text IS NULL OR o.key_id = $9)
                 THEN coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')) END
             FROM entries e JOIN topics t ON t.id = e.topic_id JOIN origins o ON o.id = e.origin_id
             WHERE e.",
            $along,
            " = $1::bigint AND e.log_offset BETWEEN $2 AND $3 ORDER BY e.log_offset ",
            $order
        )
    };
}

/// The records of a datasource, and those of a topic; oldest first, and newest first. What is not asked for comes without
/// its payload: it counts as scanned.
const INDEXED_PAGE_SQL: [[&str; 2]; 2] = [
    [page_sql!("datasource_id", "ASC"), page_sql!("datasource_id", "DESC")],
    [page_sql!("topic_id", "ASC"), page_sql!("topic_id", "DESC")],
];

/// Which index to scan (the place in [`INDEXED_PAGE_SQL`]) for which row id, and its first and last offset.
struct IndexedScan {
    along: usize,
    id: i64,
    first: i64,
    last: i64,
}

impl PostgresRecords {
    /// See [`RecordsReader::records_within`](crate::consume::query::RecordsReader::records_within).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn records_within(
        &self,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
        budget: &mut PageBudget,
    ) -> Result<RecordsPage, QueryError> {
        let left = budget.clone();
        self.read(|snapshot| {
            *budget = left.clone();
            let Some(scan) = IndexedScan::plan(snapshot, query, filter)? else {
                return Ok(RecordsPage::default());
            };
            scan.page(snapshot, query, filter, budget)
        })
    }
}

impl IndexedScan {
    /// Chooses index and range. `None` if no record can match.
    fn plan(
        snapshot: &PostgresSnapshot<'_>,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
    ) -> Result<Option<Self>, PostgresFault> {
        let Some(datasource) = row_id_of_scope(snapshot, &query.scope)? else { return Ok(None) };
        let (along, id) = match filter.and_then(TopicFilter::exact) {
            None => (0, i64::from(datasource)),
            Some(topic) => match topic_id(snapshot, datasource, topic)? {
                Some(topic) => (1, topic),
                None => return Ok(None),
            },
        };
        let mut first = query.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1));
        let mut last = query.before_offset.map_or(i64::MAX, |before| sql_offset(before) - 1);
        if query.from.is_some() || query.to.is_some() {
            let Some((oldest, newest)) = offsets_of_times(snapshot, query.from, query.to)? else {
                return Ok(None);
            };
            (first, last) = (first.max(oldest), last.min(newest));
        }
        // The events of a datasource can be anywhere: only those of a topic have an index.
        if along == 1 && (query.event_from.is_some() || query.event_to.is_some()) {
            let (from, to) = (query.event_from, query.event_to);
            let events = offsets_of_events(snapshot, id, from, to)?;
            // Those without a time of their own.
            let others = offsets_of_times(snapshot, from, to)?;
            let Some(oldest) = events.iter().chain(&others).map(|range| range.0).min() else {
                return Ok(None);
            };
            let newest = events.iter().chain(&others).map(|range| range.1).max().unwrap_or(oldest);
            (first, last) = (first.max(oldest), last.min(newest));
        }
        Ok(Some(Self { along, id, first, last }))
    }

    /// Scans until the range or the page ends.
    fn page(
        &self,
        snapshot: &PostgresSnapshot<'_>,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
        budget: &mut PageBudget,
    ) -> Result<RecordsPage, PostgresFault> {
        let sql = INDEXED_PAGE_SQL[self.along][usize::from(query.order == RecordsOrder::Newest)];
        let regex = filter.filter(|filter| filter.exact().is_none()).map(regex_of);
        let key = query.key_id.map(|key_id| key_id.to_string());
        let [from, to, event_from, event_to] = [
            times_from(query.from),
            times_to(query.to),
            times_from(query.event_from),
            times_to(query.event_to),
        ];
        let mut page = RecordsPage::default();
        let mut texts = SharedTexts::default();
        snapshot.scan(
            sql,
            &[&self.id, &self.first, &self.last, &from, &to, &event_from, &event_to, &regex, &key],
            |row| {
                if budget.is_spent() {
                    page.next = budget.scanned_to;
                    return ControlFlow::Break(());
                }
                budget.scan(offset_from_sql(row.get(0)));
                if let Some(payload) = row.get::<_, Option<&[u8]>>(7) {
                    let record = texts.record_of(row, payload.to_vec());
                    budget.take(record.payload.len() + record.topic.len());
                    page.records.push(record);
                }
                ControlFlow::Continue(())
            },
        )?;
        Ok(page)
    }
}

/// Texts that most rows of a page share.
#[derive(Default)]
pub(super) struct SharedTexts(HashMap<String, Arc<str>>);

impl SharedTexts {
    /// The record in a row: offset, received, event, topic, key, transport, media type; its payload is given.
    pub(super) fn record_of(&mut self, row: &Row, payload: Vec<u8>) -> StoredRecord {
        StoredRecord {
            offset: offset_from_sql(row.get(0)),
            received_at: row.get::<_, PostgresTime>(1).0,
            event_at: row.get::<_, Option<PostgresTime>>(2).map(|at| at.0),
            topic: self.shared(row.get(3)),
            // Nobody but Headgate writes them.
            key_id: KeyId::parse(row.get(4)).unwrap_or(KeyId([0; 6])),
            transport: Transport::parse(row.get(5)).unwrap_or(Transport::Mqtt),
            content_type: self.shared(row.get(6)),
            payload,
        }
    }

    fn shared(&mut self, text: &str) -> Arc<str> {
        if let Some(shared) = self.0.get(text) {
            return shared.clone();
        }
        let shared: Arc<str> = text.into();
        self.0.insert(text.to_owned(), shared.clone());
        shared
    }
}

/// A beginning as it is compared: without one everything is after it.
pub(super) fn times_from(from: Option<TimeMicros>) -> PostgresTime {
    PostgresTime(from.unwrap_or(TimeMicros::MIN))
}

/// An end as it is compared.
pub(super) fn times_to(to: Option<TimeMicros>) -> PostgresTime {
    PostgresTime(to.unwrap_or(TimeMicros::MAX))
}

/// The first and the last offset that what was received in a time range can have.
fn offsets_of_times(
    snapshot: &PostgresSnapshot<'_>,
    from: Option<TimeMicros>,
    to: Option<TimeMicros>,
) -> Result<Option<(i64, i64)>, PostgresFault> {
    let row = snapshot.query_opt(
        "SELECT min(first_offset), max(first_offset) FROM time_index WHERE newest >= $1 AND oldest < $2",
        &[&times_from(from), &times_to(to)],
    )?;
    let range: Option<(Option<i64>, Option<i64>)> = row.map(|row| (row.get(0), row.get(1)));
    let range = range.and_then(|(first, last)| first.zip(last));
    Ok(range.map(|(first, last)| (first, last.saturating_add(sql_offset(TIME_INDEX_OFFSETS - 1)))))
}

/// The offsets of a topic's events in a time range.
fn offsets_of_events(
    snapshot: &PostgresSnapshot<'_>,
    topic: i64,
    from: Option<TimeMicros>,
    to: Option<TimeMicros>,
) -> Result<Option<(i64, i64)>, PostgresFault> {
    let row = snapshot.query_opt(
        "SELECT min(log_offset), max(log_offset) FROM entries
         WHERE topic_id = $1::bigint AND event_at IS NOT NULL AND event_at >= $2 AND event_at < $3",
        &[&topic, &times_from(from), &times_to(to)],
    )?;
    let range: Option<(Option<i64>, Option<i64>)> = row.map(|row| (row.get(0), row.get(1)));
    Ok(range.and_then(|(first, last)| first.zip(last)))
}

/// A regular expression of PostgreSQL's that takes the topics that a filter takes.
pub(super) fn regex_of(filter: &TopicFilter) -> String {
    let mut regex = String::from("^");
    for (place, level) in text_of(filter.as_str()).split('/').enumerate() {
        let separator = if place == 0 { "" } else { "/" };
        match level {
            // Also the level before it, without a separator.
            "#" if place == 0 => {}
            "#" => regex.push_str("(/.*)?"),
            "+" => {
                regex.push_str(separator);
                regex.push_str("[^/]*");
            }
            level => {
                regex.push_str(separator);
                for letter in level.chars() {
                    if letter.is_ascii() && !letter.is_ascii_alphanumeric() {
                        regex.push('\\');
                    }
                    regex.push(letter);
                }
            }
        }
    }
    if filter.as_str() == "#" {
        return regex;
    }
    regex.push('$');
    regex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_becomes_an_expression_that_takes_no_more_and_no_less() {
        let of = |filter| regex_of(&TopicFilter::new(filter).expect("a filter"));
        for (filter, regex) in [
            ("#", "^"),
            ("+", "^[^/]*$"),
            ("a/#", "^a(/.*)?$"),
            ("+/b.c/+", r"^[^/]*/b\.c/[^/]*$"),
            ("/+", "^/[^/]*$"),
            ("+/°C(1)/#", r"^[^/]*/°C\(1\)(/.*)?$"),
        ] {
            assert_eq!(of(filter), regex, "{filter}");
        }
    }
}
