//! The newest values in PostgreSQL, and the number of the newest record of each topic.

use std::collections::HashSet;

use super::PostgresError;
use super::PostgresSink;
use super::ids::text_of;
use crate::consume::sink::newest::{KeptValue, NewestEntry, NewestValues};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::limits::{LATEST_KEYS_PER_TOPIC_MAX, LATEST_LOOK_BACK_MAX};
use crate::message::{KeyId, RecordFlags, RecordRef, Transport};

/// How many records are read at once when values are looked for: each may be as large as a payload may be.
const LOOK_BACK_PAGE_RECORDS: i64 = 64;

/// Rows of `latest_values`, by columns.
#[derive(Default)]
struct NewestColumns {
    topics: Vec<i64>,
    keys: Vec<String>,
    values: Vec<Option<String>>,
    bytes: Vec<Option<Vec<u8>>>,
    offsets: Vec<i64>,
    received_us: Vec<i64>,
}

impl NewestColumns {
    fn add(&mut self, topic: i64, entry: &NewestEntry<'_>) {
        let (value, bytes) = match entry.kept() {
            KeptValue::Json(json) => (Some(json.into_owned()), None),
            KeptValue::Bytes(bytes) => (None, Some(bytes.to_vec())),
            KeptValue::TooLong => (None, None),
        };
        self.topics.push(topic);
        self.keys.push(text_of(&entry.key).into_owned());
        self.values.push(value);
        self.bytes.push(bytes);
        self.offsets.push(sql_offset(entry.offset));
        self.received_us.push(entry.received_at);
    }
}

impl PostgresSink {
    /// Writes the values that new records bring, in the present transaction.
    pub(super) fn write_newest(&self, newest: NewestValues<'_>) -> Result<(), PostgresError> {
        let (mut topics, mut offsets) = (Vec::new(), Vec::new());
        let mut columns = NewestColumns::default();
        for (topic, offset, entries) in newest.into_topics() {
            topics.push(topic);
            offsets.push(sql_offset(offset));
            entries.iter().for_each(|entry| columns.add(topic, entry));
        }
        if topics.is_empty() {
            return Ok(());
        }
        self.connection.execute(
            "UPDATE topics t SET latest_offset = greatest(t.latest_offset, n.latest_offset)
             FROM unnest($1::bigint[], $2::bigint[]) AS n (id, latest_offset) WHERE t.id = n.id",
            &[&topics, &offsets],
        )?;
        self.put_values(&columns)?;
        self.forget_oldest(&topics)
    }

    /// Writes values where they are newer than the present ones.
    fn put_values(&self, columns: &NewestColumns) -> Result<(), PostgresError> {
        // A key that has no NUL may be another one with its picture: of the same row, one counts.
        self.connection.execute(
            "INSERT INTO latest_values (topic_id, key, value, value_bytes, log_offset, received_at)
             SELECT DISTINCT ON (topic_id, key) topic_id, key, value, value_bytes, log_offset,
                 'epoch'::timestamptz + received_us * interval '1 microsecond'
             FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bytea[], $5::bigint[], $6::bigint[])
                 AS n (topic_id, key, value, value_bytes, log_offset, received_us)
             ORDER BY topic_id, key, log_offset DESC
             ON CONFLICT (topic_id, key) DO UPDATE SET value = excluded.value, value_bytes = excluded.value_bytes,
                 log_offset = excluded.log_offset, received_at = excluded.received_at
             WHERE excluded.log_offset >= latest_values.log_offset",
            &[
                &columns.topics,
                &columns.keys,
                &columns.values,
                &columns.bytes,
                &columns.offsets,
                &columns.received_us,
            ],
        )?;
        Ok(())
    }

    /// Deletes the oldest values of topics beyond [`LATEST_KEYS_PER_TOPIC_MAX`].
    fn forget_oldest(&self, topics: &[i64]) -> Result<(), PostgresError> {
        let keys_max = i64::try_from(LATEST_KEYS_PER_TOPIC_MAX).unwrap_or(i64::MAX);
        self.connection.execute(
            "DELETE FROM latest_values v USING (
                 SELECT topic_id, key, row_number() OVER (PARTITION BY topic_id ORDER BY log_offset DESC, key) AS place
                 FROM latest_values WHERE topic_id IN (
                     SELECT topic_id FROM latest_values WHERE topic_id = ANY($1::bigint[]) GROUP BY topic_id HAVING count(*) > $2)
             ) o WHERE v.topic_id = o.topic_id AND v.key = o.key AND o.place > $2",
            &[&topics, &keys_max],
        )?;
        Ok(())
    }

    /// Forgets the values of topics whose records are in `moved` and no longer in `entries`, and looks for their
    /// replacements in the newest records that are left.
    pub(super) fn forget_moved_values(&self) -> Result<(), PostgresError> {
        for topic in self.moved_topics()? {
            let gone = self.connection.query(
                "DELETE FROM latest_values v USING moved m
                 WHERE v.topic_id = $1::bigint AND m.topic_id = $1::bigint AND m.log_offset = v.log_offset RETURNING v.key",
                &[&topic],
            )?;
            self.set_latest_offset(topic)?;
            let mut wanted: HashSet<String> = gone.iter().map(|row| row.get(0)).collect();
            let (mut below, mut looked_at) = (i64::MAX, 0);
            while !wanted.is_empty() && looked_at < LATEST_LOOK_BACK_MAX {
                let rows = self.connection.query(
                    "SELECT e.log_offset, (extract(epoch FROM e.received_at) * 1000000)::bigint,
                         coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')), o.content_type, t.topic
                     FROM entries e JOIN origins o ON o.id = e.origin_id JOIN topics t ON t.id = e.topic_id
                     WHERE e.topic_id = $1::bigint AND e.log_offset < $2 ORDER BY e.log_offset DESC LIMIT $3",
                    &[&topic, &below, &LOOK_BACK_PAGE_RECORDS],
                )?;
                let Some(last) = rows.last() else { break };
                below = last.get(0);
                looked_at += rows.len();
                // Each record by itself, the newest first: what it has is what is wanted, or it is older.
                self.put_rows(topic, &rows, |key| wanted.remove(key))?;
            }
        }
        Ok(())
    }

    /// Restores the values of records that are in `moved` and back in `entries`, where they are newer than the present
    /// ones.
    pub(super) fn restore_moved_values(&self) -> Result<(), PostgresError> {
        let topics = self.moved_topics()?;
        for topic in &topics {
            self.set_latest_offset(*topic)?;
            let mut from = -1_i64;
            loop {
                let rows = self.connection.query(
                    "SELECT e.log_offset, (extract(epoch FROM e.received_at) * 1000000)::bigint,
                         coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')), o.content_type, t.topic
                     FROM entries e JOIN moved m ON m.log_offset = e.log_offset
                     JOIN origins o ON o.id = e.origin_id JOIN topics t ON t.id = e.topic_id
                     WHERE e.topic_id = $1::bigint AND e.log_offset > $2 ORDER BY e.log_offset LIMIT $3",
                    &[topic, &from, &LOOK_BACK_PAGE_RECORDS],
                )?;
                let Some(last) = rows.last() else { break };
                from = last.get(0);
                self.put_rows(*topic, &rows, |_| true)?;
            }
        }
        self.forget_oldest(&topics)
    }

    /// Writes the values of records of one topic (offset, time, payload, media type, topic) whose keys are wanted. The rows are in order, whichever.
    fn put_rows(
        &self,
        topic: i64,
        rows: &[headgate_bridge_postgres::Row],
        mut is_wanted: impl FnMut(&str) -> bool,
    ) -> Result<(), PostgresError> {
        let mut columns = NewestColumns::default();
        for row in rows {
            let payload: Vec<u8> = row.get(2);
            let record = RecordRef {
                offset: offset_from_sql(row.get(0)),
                datasource: "",
                topic: row.get(4),
                payload: &payload,
                content_type: row.get(3),
                properties: b"",
                key_id: KeyId([0; 6]),
                transport: Transport::Mqtt,
                publisher: 0,
                received_at: row.get(1),
                event_at: None,
                flags: RecordFlags::default(),
                note: b"",
            };
            let text = std::str::from_utf8(&payload).ok().filter(|text| !text.contains('\0'));
            let mut newest = NewestValues::default();
            newest.observe_payload(topic, &record, text);
            for (_, _, entries) in newest.into_topics() {
                let wanted = entries.iter().filter(|entry| is_wanted(&text_of(&entry.key)));
                wanted.for_each(|entry| columns.add(topic, entry));
            }
        }
        self.put_values(&columns)
    }

    fn set_latest_offset(&self, topic: i64) -> Result<(), PostgresError> {
        self.connection.execute(
            "UPDATE topics SET latest_offset =
                 coalesce((SELECT max(log_offset) FROM entries WHERE topic_id = $1::bigint), -1) WHERE id = $1::bigint",
            &[&topic],
        )?;
        Ok(())
    }

    /// The topics of the records in `moved`.
    pub(super) fn moved_topics(&self) -> Result<Vec<i64>, PostgresError> {
        let rows = self.connection.query("SELECT DISTINCT topic_id::bigint FROM moved", &[])?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
