//! The rows of new records in `records.db`: each in `entries` or in quarantine, with the newest values and the
//! times that they bring.

use std::thread;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params};

use super::ids::{RememberedIds, RowIds};
use super::incarnations;
use super::newest::NewestValues;
use super::payloads::{InsertedPayload, PayloadReading, PayloadValues};
use super::quarantined;
use super::retention::StoredSizes;
use super::schema::{TIME_INDEX_OFFSETS, sql_offset};
use crate::log::WithheldSnapshot;
use crate::message::{Offset, RecordFlags, RecordRef, TimeMicros};

/// Stores `records`, in the transaction that `transaction` is in. Those whose key has leaked go into quarantine, and
/// those of a purged incarnation are left out. With `keeps_samples`, also stores the numbers in their payloads. Returns
/// the newest values that they bring, which are stored too; `None` if they bring more than are to be in memory at once.
pub(super) fn insert_records<'a>(
    transaction: &Connection,
    (ids, sizes): (&mut RememberedIds, &mut StoredSizes),
    left_out: &WithheldSnapshot,
    keeps_samples: bool,
    records: impl Iterator<Item = RecordRef<'a>>,
) -> rusqlite::Result<Option<NewestValues<'a>>> {
    let mut records = records.peekable();
    let mut parts = 0;
    loop {
        let values = PayloadValues::new(keeps_samples, ids.take_open_chunks());
        let PayloadValues { mut newest, samples, mut open_chunks, .. } =
            thread::scope(|scope| -> rusqlite::Result<_> {
                let mut payloads = PayloadReading::new(scope, values);
                let places = (&mut *ids, &mut *sizes);
                insert_rows(transaction, places, left_out, &mut records, |payload| payloads.add(payload))?;
                Ok(payloads.finish())
            })?;
        samples.write(transaction, &mut open_chunks)?;
        ids.keep_open_chunks(open_chunks);
        newest.write(transaction)?;
        parts += 1;
        if records.peek().is_none() {
            return Ok((parts == 1).then_some(newest));
        }
    }
}

/// Stores the rows of `records`. Calls `each` with the payload of each that is not in quarantine, until that returns
/// `false`.
fn insert_rows<'a>(
    transaction: &Connection,
    (ids, sizes): (&mut RememberedIds, &mut StoredSizes),
    left_out: &WithheldSnapshot,
    records: impl Iterator<Item = RecordRef<'a>>,
    mut each: impl FnMut(InsertedPayload<'a>) -> bool,
) -> rusqlite::Result<()> {
    let mut times = TimeIndexRow::default();
    let mut left_out_below = 0;
    let mut entry = transaction.prepare_cached(
        "INSERT INTO entries (offset, datasource_id, topic_id, origin_id, received_us, payload, event_us)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    for record in records {
        // Many tools end a TEXT at a NUL, so that such a payload is stored as a BLOB.
        let text = std::str::from_utf8(record.payload).ok().filter(|text| !text.contains('\0'));
        let payload = text.map_or(ValueRef::Blob(record.payload), ValueRef::from);
        // A mark has no row, and so names nothing.
        if quarantined::note_superseded(transaction, &record)? {
            times.observe(transaction, record.offset, record.received_at)?;
            continue;
        }
        let Some(row) = row_ids_of(transaction, ids, left_out, &record)? else {
            left_out_below = sql_offset(record.offset) + 1;
            continue;
        };
        times.observe(transaction, record.offset, record.received_at)?;
        sizes.add(row.datasource, sql_offset(record.offset), record.payload.len());
        let is_leaked = left_out.covers(record.datasource, record.key_id, record.received_at, record.offset);
        // Also where it is withheld itself: given back, it would be there beside another redrive.
        if record.flags.contains(RecordFlags::REDRIVEN) {
            quarantined::note_redriven(transaction, &record)?;
        }
        if record.flags.contains(RecordFlags::QUARANTINED) || is_leaked {
            quarantined::insert_quarantined(transaction, &record, row, ToSqlOutput::Borrowed(payload))?;
            continue;
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
        if !each(InsertedPayload { record, row, text }) {
            break;
        }
    }
    if left_out_below > 0 {
        note_gap(transaction, left_out_below)?;
    }
    times.write(transaction)
}

/// Notes that offsets below one have no rows although something was there.
pub(super) fn note_gap(connection: &Connection, below: i64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE cursor SET whole_from = max(whole_from, min(?1, next_offset))")?
        .execute([below])?;
    Ok(())
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
