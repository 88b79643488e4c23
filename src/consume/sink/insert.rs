//! The rows of new records in `records.db`: each in `entries` or in quarantine, with the newest values and the
//! times that they bring.

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params};

use super::ids::{RememberedIds, RowIds};
use super::incarnations;
use super::newest::{NewestValues, read_members};
use super::quarantined;
use super::retention::StoredSizes;
use super::samples::{NewSamples, SampledRecord};
use super::schema::{TIME_INDEX_OFFSETS, sql_offset};
use crate::log::WithheldSnapshot;
use crate::message::{Offset, RecordFlags, RecordRef, TimeMicros};

/// Stores `records`, in the transaction that `transaction` is in. Those whose key has leaked go into quarantine, and
/// those of a purged incarnation are left out. With `keeps_samples`, also stores the numbers in their payloads.
pub(super) fn insert_records<'a>(
    transaction: &Connection,
    (ids, sizes): (&mut RememberedIds, &mut StoredSizes),
    left_out: &WithheldSnapshot,
    keeps_samples: bool,
    records: impl Iterator<Item = RecordRef<'a>>,
) -> rusqlite::Result<()> {
    let mut newest = NewestValues::default();
    let mut samples = NewSamples::default();
    // Of the present record; kept for its allocation.
    let mut members = Vec::new();
    let mut times = TimeIndexRow::default();
    let mut entry = transaction.prepare_cached(
        "INSERT INTO entries (offset, datasource_id, topic_id, origin_id, received_us, payload, event_us)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    for record in records {
        let Some(row) = row_ids_of(transaction, ids, left_out, &record)? else { continue };
        // Many tools end a TEXT at a NUL, so that such a payload is stored as a BLOB.
        let text = std::str::from_utf8(record.payload).ok().filter(|text| !text.contains('\0'));
        let payload = text.map_or(ValueRef::Blob(record.payload), ValueRef::from);
        times.observe(transaction, record.offset, record.received_at)?;
        if quarantined::note_superseded(transaction, &record)? {
            continue;
        }
        sizes.add(row.datasource, sql_offset(record.offset), record.payload.len());
        let is_leaked = left_out.covers(record.datasource, record.key_id, record.received_at, record.offset);
        if record.flags.contains(RecordFlags::QUARANTINED) || is_leaked {
            quarantined::insert_quarantined(transaction, &record, row, ToSqlOutput::Borrowed(payload))?;
            continue;
        }
        if record.flags.contains(RecordFlags::REDRIVEN) {
            quarantined::note_redriven(transaction, &record)?;
        }
        entry.execute(params![
            sql_offset(record.offset),
            row.datasource,
            row.topic,
            row.origin,
            record.received_at,
            ToSqlOutput::Borrowed(payload),
            record.event_at,
        ])?;
        let is_object = text.is_some_and(|text| read_members(text, &mut members));
        if keeps_samples {
            let RecordRef { offset, received_at, event_at, topic, content_type, .. } = record;
            let sampled = SampledRecord {
                offset,
                received_at,
                event_at,
                topic,
                content_type,
                text,
                members: is_object.then_some(&*members),
            };
            samples.observe(row.topic, &sampled, &ids.open_chunks);
        }
        newest.observe(row.topic, &record, text, is_object.then_some(&mut members));
        if samples.is_full() {
            std::mem::take(&mut samples).write(transaction, &mut ids.open_chunks)?;
        }
        if newest.is_full() {
            std::mem::take(&mut newest).write(transaction)?;
        }
    }
    samples.write(transaction, &mut ids.open_chunks)?;
    times.write(transaction)?;
    newest.write(transaction)
}

/// The row ids of a record, under its incarnation. `None` if that is purged.
#[inline]
fn row_ids_of(
    transaction: &Connection,
    ids: &mut RememberedIds,
    left_out: &WithheldSnapshot,
    record: &RecordRef<'_>,
) -> rusqlite::Result<Option<RowIds>> {
    let Some(history) = left_out.history(record.datasource) else {
        return ids.row_ids(transaction, record, record.datasource, 1).map(Some);
    };
    let incarnation = history.incarnation_of(record.key_id, record.received_at, record.offset);
    if history.is_purged(incarnation) {
        return Ok(None);
    }
    let name = incarnations::shown_name(record.datasource, incarnation, history);
    ids.row_ids(transaction, record, &name, incarnation).map(Some)
}

/// The row of `time_index` for the present records: its first offset, oldest and newest time.
#[derive(Default)]
struct TimeIndexRow {
    row: Option<(Offset, TimeMicros, TimeMicros)>,
}

impl TimeIndexRow {
    fn observe(&mut self, transaction: &Connection, offset: Offset, at: TimeMicros) -> rusqlite::Result<()> {
        let first = offset - offset % TIME_INDEX_OFFSETS;
        match &mut self.row {
            Some((row, oldest, newest)) if *row == first => {
                (*oldest, *newest) = ((*oldest).min(at), (*newest).max(at));
            }
            _ => {
                self.write(transaction)?;
                self.row = Some((first, at, at));
            }
        }
        Ok(())
    }

    fn write(&mut self, transaction: &Connection) -> rusqlite::Result<()> {
        let Some((first, oldest, newest)) = self.row.take() else { return Ok(()) };
        transaction
            .prepare_cached(
                "INSERT INTO time_index (first_offset, oldest_us, newest_us) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET oldest_us = min(oldest_us, excluded.oldest_us),
                                           newest_us = max(newest_us, excluded.newest_us)",
            )?
            .execute(params![sql_offset(first), oldest, newest])?;
        Ok(())
    }
}
