//! The samples of stored records in `records.db`: gathered in one transaction, written as chunks
//! ([`sample_chunk`](super::sample_chunk)), and taken out and put back with their records.
//!
//! The samples of a topic go to its newest chunk until that is as large as is useful; then a new one begins. A sample's time is
//! the one that its payload states for it, or the record's event time, or the time of receipt.

use hashbrown::HashMap;
use rusqlite::{Connection, OptionalExtension, params};

use super::sample_chunk::{ChunkBase, ChunkSample, NewChunk, without_offsets};
use super::schema::{offset_from_sql, sql_offset};
use crate::limits::GATHERED_KEYS_MAX;
use crate::message::{Offset, TimeMicros};
use crate::values::SampleReader;
use crate::values::samples::JsonMember;

/// A chunk of this many bytes takes no more samples of later transactions: with its row it fills a page, which a change
/// writes as a whole.
const OPEN_CHUNK_BYTES_MAX: usize = 3 << 10;
/// A chunk of this many bytes takes no more samples of its own transaction.
const CHUNK_BYTES_MAX: usize = 16 << 10;

/// A chunk to which a topic's next samples go.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenChunk {
    pub(super) id: i64,
    pub(super) base: ChunkBase,
}

/// The open chunks by the topics' row ids. Those that are not remembered take nothing more.
pub(super) type OpenChunks = HashMap<i64, OpenChunk>;

/// What a record has for its samples.
pub(super) struct SampledRecord<'a> {
    pub(super) offset: Offset,
    pub(super) received_at: TimeMicros,
    pub(super) event_at: Option<TimeMicros>,
    pub(super) topic: &'a str,
    pub(super) content_type: &'a str,
    /// Its payload, if that is text.
    pub(super) text: Option<&'a str>,
    /// The members of its payload, if that is a JSON object and they are known.
    pub(super) members: Option<&'a [JsonMember<'a>]>,
}

/// The samples of the records of one transaction.
#[derive(Default)]
pub(super) struct NewSamples {
    reader: SampleReader,
    topics: HashMap<i64, TopicSamples>,
    /// How many topics and keys there have been.
    gathered: usize,
    /// Chunks that are full, with their topics.
    full: Vec<(i64, TopicSamples)>,
}

/// Samples of one topic, and the chunk that they go to if it is not a new one.
struct TopicSamples {
    chunk: NewChunk,
    open: Option<OpenChunk>,
}

impl TopicSamples {
    fn begin(open: Option<OpenChunk>, offset: i64, at: i64) -> Self {
        let base = open.map_or(ChunkBase { first_offset: offset, base_us: at }, |open| open.base);
        Self { chunk: NewChunk::new(base, offset), open }
    }
}

impl NewSamples {
    /// Adds the samples of the next record.
    pub(super) fn observe(&mut self, topic_id: i64, record: &SampledRecord<'_>, open: &OpenChunks) {
        let (offset, record_at) = (sql_offset(record.offset), record.event_at.unwrap_or(record.received_at));
        let SampledRecord { topic, content_type, text, members, received_at, .. } = *record;
        let read = self.reader.read_parsed(topic, content_type, text, members, received_at);
        let mut samples = read.enumerate().peekable();
        if samples.peek().is_none() {
            return;
        }
        let gathered = &mut self.gathered;
        let topic = self.topics.entry(topic_id).or_insert_with(|| {
            *gathered += 1;
            TopicSamples::begin(open.get(&topic_id).copied(), offset, record_at)
        });
        let keys = topic.chunk.keys();
        for (place, sample) in samples {
            let sample_at = sample.at.unwrap_or(record_at);
            topic.chunk.push(place, sample.key, ChunkSample { offset, at: sample_at, value: sample.value });
        }
        *gathered += topic.chunk.keys() - keys;
        if topic.chunk.bytes() >= CHUNK_BYTES_MAX {
            // The next one is not to go to the open chunk: this one does.
            let next = TopicSamples::begin(None, offset, record_at);
            self.full.push((topic_id, std::mem::replace(topic, next)));
        }
    }

    /// Whether there is so much that it is to be written before more is added.
    pub(super) fn is_full(&self) -> bool {
        self.gathered >= GATHERED_KEYS_MAX
    }

    /// Writes the samples, in the transaction that `connection` is in, and remembers which chunks are open then.
    ///
    /// # Errors
    /// The database's.
    pub(super) fn write(self, connection: &Connection, open: &mut OpenChunks) -> rusqlite::Result<()> {
        let chunks = self.full.into_iter().chain(self.topics);
        for (topic_id, samples) in chunks.filter(|(_, samples)| samples.chunk.bytes() > 0) {
            match write_samples(connection, topic_id, &samples)? {
                Some(still_open) => open.insert(topic_id, still_open),
                None => open.remove(&topic_id),
            };
        }
        Ok(())
    }
}

/// Writes samples of one topic to their chunk. Returns that if it takes more.
fn write_samples(
    connection: &Connection,
    topic_id: i64,
    samples: &TopicSamples,
) -> rusqlite::Result<Option<OpenChunk>> {
    let TopicSamples { chunk, open } = samples;
    let ChunkBase { first_offset, base_us } = chunk.base;
    if let Some(open) = open {
        // The chunk may have been removed since, and its row id given to another one.
        let earlier: Option<String> = connection
            .prepare_cached(
                "SELECT samples FROM sample_chunks
                 WHERE id = ?1 AND topic_id = ?2 AND first_offset = ?3 AND base_us = ?4",
            )?
            .query_row([open.id, topic_id, first_offset, base_us], |row| row.get(0))
            .optional()?;
        if let Some(earlier) = earlier {
            let text = chunk.text(&earlier);
            connection
                .prepare_cached(
                    "UPDATE sample_chunks SET samples = ?2, last_offset = max(last_offset, ?3),
                         oldest_us = min(oldest_us, ?4), newest_us = max(newest_us, ?5) WHERE id = ?1",
                )?
                .execute(params![open.id, text, chunk.last_offset, chunk.oldest_us, chunk.newest_us])?;
            return Ok((text.len() < OPEN_CHUNK_BYTES_MAX).then_some(*open));
        }
    }
    let text = chunk.text("");
    connection
        .prepare_cached(
            "INSERT INTO sample_chunks (topic_id, first_offset, last_offset, base_us, oldest_us, newest_us, samples)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            topic_id,
            first_offset,
            chunk.last_offset,
            base_us,
            chunk.oldest_us,
            chunk.newest_us,
            text
        ])?;
    let open = OpenChunk { id: connection.last_insert_rowid(), base: chunk.base };
    Ok((text.len() < OPEN_CHUNK_BYTES_MAX).then_some(open))
}

/// Takes out the samples of a topic's records that are in `temp.moved`.
pub(super) fn forget_moved(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    let mut select =
        connection.prepare_cached("SELECT offset FROM temp.moved WHERE topic_id = ?1 ORDER BY offset")?;
    let moved = select.query_map([topic_id], |row| row.get(0))?.collect::<rusqlite::Result<Vec<i64>>>()?;
    let (Some(first), Some(last)) = (moved.first(), moved.last()) else { return Ok(()) };
    take_out(connection, topic_id, (*first, *last), |offset| moved.binary_search(&offset).is_ok())
}

/// Takes samples of a topic out of the chunks that have records of these offsets.
fn take_out(
    connection: &Connection,
    topic_id: i64,
    (first, last): (i64, i64),
    is_removed: impl Fn(i64) -> bool,
) -> rusqlite::Result<()> {
    let mut chunks = connection.prepare_cached(
        "SELECT id FROM sample_chunks WHERE topic_id = ?1 AND last_offset >= ?2 AND first_offset <= ?3",
    )?;
    // What is changed while it is read may be read again.
    let ids = chunks
        .query_map([topic_id, first, last], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<i64>>>()?;
    let mut select = connection
        .prepare_cached("SELECT first_offset, base_us, samples FROM sample_chunks WHERE id = ?1")?;
    let mut update = connection.prepare_cached(
        "UPDATE sample_chunks SET samples = ?2, last_offset = ?3, oldest_us = ?4, newest_us = ?5 WHERE id = ?1",
    )?;
    let mut delete = connection.prepare_cached("DELETE FROM sample_chunks WHERE id = ?1")?;
    for id in ids {
        let (base, text) = select.query_row([id], |row| {
            let base = ChunkBase { first_offset: row.get(0)?, base_us: row.get(1)? };
            Ok((base, row.get::<_, String>(2)?))
        })?;
        match without_offsets(&text, base, &is_removed) {
            Some((left, _)) if left == text => {}
            Some((left, of)) => {
                update.execute(params![id, left, of.last_offset, of.oldest_us, of.newest_us])?;
            }
            None => {
                delete.execute([id])?;
            }
        }
    }
    Ok(())
}

/// Removes the chunks of a topic that have nothing behind an offset.
pub(super) fn remove_up_to(connection: &Connection, topic_id: i64, last: i64) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM sample_chunks WHERE topic_id = ?1 AND first_offset <= ?2 AND last_offset <= ?2",
        )?
        .execute([topic_id, last])?;
    Ok(())
}

/// Takes out the samples of a topic up to an offset that share a chunk with later ones.
pub(super) fn trim_up_to(connection: &Connection, topic_id: i64, last: i64) -> rusqlite::Result<()> {
    take_out(connection, topic_id, (last, last), |offset| offset <= last)
}

/// Chunks that are gathered before they are written, when records come back.
const RESTORED_CHUNKS_MAX: usize = 256;

/// Puts back the samples of a topic's records that are in `temp.moved` and in `entries`, in chunks of their own.
pub(super) fn restore_moved(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    let mut select = connection.prepare_cached(
        "SELECT e.offset, e.received_us, e.event_us, o.content_type, e.payload, t.topic
         FROM entries e JOIN origins o ON o.id = e.origin_id JOIN topics t ON t.id = e.topic_id
         WHERE e.topic_id = ?1 AND e.offset IN (SELECT offset FROM temp.moved) ORDER BY e.offset",
    )?;
    let mut rows = select.query([topic_id])?;
    let (mut samples, mut open) = (NewSamples::default(), OpenChunks::default());
    while let Some(row) = rows.next()? {
        let record = SampledRecord {
            offset: offset_from_sql(row.get(0)?),
            received_at: row.get(1)?,
            event_at: row.get(2)?,
            topic: row.get_ref(5)?.as_str()?,
            content_type: row.get_ref(3)?.as_str()?,
            text: std::str::from_utf8(row.get_ref(4)?.as_bytes()?).ok(),
            members: None,
        };
        samples.observe(topic_id, &record, &open);
        // What is gathered is bounded, however many records come back.
        if samples.full.len() >= RESTORED_CHUNKS_MAX {
            std::mem::take(&mut samples).write(connection, &mut open)?;
        }
    }
    drop(rows);
    samples.write(connection, &mut open)
}

/// Removes chunks of a datasource, up to `limit`. Returns how many.
pub(super) fn purge_some(connection: &Connection, datasource: i64, limit: i64) -> rusqlite::Result<usize> {
    connection.execute(
        "DELETE FROM sample_chunks WHERE id IN (
             SELECT c.id FROM topics t JOIN sample_chunks c ON c.topic_id = t.id WHERE t.datasource_id = ?1 LIMIT ?2
         )",
        [datasource, limit],
    )
}

#[cfg(test)]
mod model;
