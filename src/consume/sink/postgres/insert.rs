//! The rows of new records in PostgreSQL: each in `entries` or in quarantine, with its samples and the newest values that
//! it brings.

use std::collections::{BTreeMap, VecDeque};

use headgate_bridge_postgres::{CopyRows, PendingCopy, PostgresConnection, PostgresFault, PostgresTime};

use super::ids::{RecordNameIds, text_of};
use super::json_fit::{JsonFit, fit_of};
use super::quarantined::SAMPLE_COLUMNS;
use super::sample_lane::SampleLane;
use super::samples::SampleRows;
use super::{PostgresError, PostgresSink};
use crate::consume::sink::ids::RowIds;
use crate::consume::sink::incarnations::shown_name;
use crate::consume::sink::newest::{NewestValues, read_members};
use crate::consume::sink::quarantined::{CAUSE_KEY, CAUSE_LIMIT, CAUSE_SCHEMA, is_mark};
use crate::consume::sink::schema::{TIME_INDEX_OFFSETS, sql_offset};
use crate::limits::{POSTGRES_COPIES_UNDER_WAY_MAX, POSTGRES_COPY_BYTES, POSTGRES_COPY_RECORDS_MAX};
use crate::log::{RecordNote, WithheldSnapshot};
use crate::message::{Offset, RecordFlags, RecordRef, TimeMicros};

/// What a payload that no other reason explains is noted with.
const REFUSED_NOTE: &str = "PostgreSQL has refused it";

/// The type of the column of JSON payloads, which whoever has made the tables has chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PayloadForm {
    /// `json`: the text as it came.
    Json,
    /// `jsonb`.
    Jsonb,
}

impl PayloadForm {
    /// That of the tables.
    pub(super) fn of_table(connection: &PostgresConnection) -> Result<Self, PostgresError> {
        let row = connection.query_one(
            "SELECT atttypid = 'jsonb'::regtype FROM pg_attribute WHERE attrelid = 'entries'::regclass AND attname = 'payload'",
            &[],
        )?;
        Ok(if row.get(0) { Self::Jsonb } else { Self::Json })
    }
}

/// What of its records a transaction copies.
#[derive(Clone, Copy)]
pub(super) enum CopyScope<'l> {
    /// Everything.
    All,
    /// Everything, the samples over a connection of their own.
    BesideLane(&'l SampleLane),
    /// Samples alone: the rest is there.
    Samples,
}

impl CopyScope<'_> {
    fn has_records(self) -> bool {
        !matches!(self, Self::Samples)
    }
}

/// Rows that are copied together.
#[derive(Default)]
struct NewRows {
    entries: CopyRows,
    quarantined: CopyRows,
    samples: CopyRows,
    /// Of records in quarantine because of a leaked key.
    withheld_samples: CopyRows,
    key_sets: CopyRows,
}

impl NewRows {
    /// How many bytes they take.
    fn size_bytes(&self) -> usize {
        let all = [&self.entries, &self.quarantined, &self.samples, &self.withheld_samples, &self.key_sets];
        all.into_iter().map(CopyRows::size_bytes).sum()
    }
}

/// What the records of one transaction change beside their rows.
#[derive(Default)]
struct NewFacts<'a> {
    newest: NewestValues<'a>,
    /// The oldest and the newest time of each line of `time_index`, by its first offset.
    times: BTreeMap<Offset, (TimeMicros, TimeMicros)>,
    /// Quarantined records that were let in, each with the offset of what was.
    let_in: Vec<(Offset, Offset)>,
}

impl NewFacts<'_> {
    fn observe_time(&mut self, record: &RecordRef<'_>) {
        let at = record.received_at;
        let times = self.times.entry(record.offset - record.offset % TIME_INDEX_OFFSETS).or_insert((at, at));
        *times = (times.0.min(at), times.1.max(at));
    }
}

impl PostgresSink {
    /// Inserts records, in the present transaction. Those whose key has leaked go into quarantine, and those of a purged
    /// incarnation are left out. With `is_plain`, every payload is stored as its bytes.
    pub(super) fn insert_records(
        &mut self,
        records: &[RecordRef<'_>],
        is_plain: bool,
        scope: CopyScope<'_>,
    ) -> Result<(), PostgresError> {
        let Some(last) = records.last() else { return Ok(()) };
        self.names.make_room();
        self.names.begin_transaction(last.offset + 1);
        let left_out = self.left_out.clone().unwrap_or_default();
        let mut facts = NewFacts::default();
        let mut pending = VecDeque::new();
        let (mut added, mut copied) = (Ok(()), Ok(()));
        let mut rest = records;
        while !rest.is_empty() && added.is_ok() && copied.is_ok() {
            let mut rows = NewRows::default();
            added = self.add_part(&mut rows, &mut facts, &mut rest, &left_out, is_plain);
            pending.push_back(self.begin_copies(rows, scope));
            if facts.newest.is_full() && added.is_ok() {
                let newest = std::mem::take(&mut facts.newest);
                added = if scope.has_records() { self.write_newest(newest) } else { Ok(()) };
            }
            while pending.len() > POSTGRES_COPIES_UNDER_WAY_MAX
                && let Some(earliest) = pending.pop_front()
            {
                copied = self.finish_copies(earliest, copied);
            }
        }
        // In any case: a copy that comes after the end of the transaction would stay.
        let copied = pending.into_iter().fold(copied, |copied, later| self.finish_copies(later, copied));
        // What is wrong with a copy is why nothing else is done after it.
        copied?;
        added?;
        self.note_origins()?;
        if scope.has_records() { self.write_facts(facts) } else { Ok(()) }
    }

    /// Adds the rows of the next records: as many as are copied at once.
    fn add_part<'a>(
        &mut self,
        rows: &mut NewRows,
        facts: &mut NewFacts<'a>,
        records: &mut &[RecordRef<'a>],
        left_out: &WithheldSnapshot,
        is_plain: bool,
    ) -> Result<(), PostgresError> {
        let mut taken = 0;
        while taken < records.len().min(POSTGRES_COPY_RECORDS_MAX)
            && rows.size_bytes() < POSTGRES_COPY_BYTES
            && !facts.newest.is_full()
        {
            self.add_rows(rows, facts, &records[taken..], left_out, is_plain)?;
            taken += 1;
        }
        *records = &records[taken..];
        Ok(())
    }

    fn begin_copies(&self, rows: NewRows, scope: CopyScope<'_>) -> Vec<PendingCopy> {
        const HEAD: &str = "log_offset, received_at, event_at, datasource_id, topic_id, origin_id";
        const PAYLOAD: &str = "payload, payload_bytes, payload_note, payload_size";
        const REASON: &str = "properties, publisher, flags, cause, keyword, pointer, detail, schema_version";
        let records = scope.has_records().then_some(&self.connection);
        let samples = match scope {
            CopyScope::BesideLane(lane) => lane.connection(),
            CopyScope::All | CopyScope::Samples => &self.connection,
        };
        let mut pending = Vec::new();
        for (connection, table, columns, rows) in [
            (Some(&self.connection), "key_sets", "id, topic_id, digest, keys".to_owned(), rows.key_sets),
            (records, "entries", format!("{HEAD}, {PAYLOAD}"), rows.entries),
            (records, "quarantined", format!("{HEAD}, {PAYLOAD}, {REASON}"), rows.quarantined),
            (Some(samples), "sample_rows", SAMPLE_COLUMNS.to_owned(), rows.samples),
            (Some(samples), "withheld_samples", SAMPLE_COLUMNS.to_owned(), rows.withheld_samples),
        ] {
            if let Some(connection) = connection.filter(|_| rows.rows() > 0) {
                let copy = format!("COPY {table} ({columns}) FROM STDIN WITH (FORMAT binary)");
                pending.push(connection.begin_copy(copy, rows));
            }
        }
        pending
    }

    /// Waits for copies that were begun together, after what was `copied` before them. The first error counts.
    fn finish_copies(
        &self,
        pending: Vec<PendingCopy>,
        mut copied: Result<(), PostgresFault>,
    ) -> Result<(), PostgresFault> {
        for copy in pending {
            match self.connection.finish_copy(copy) {
                // Of several one has failed, and the others could not be made in its transaction any more.
                Err(fault) if fault.is_of_value() => copied = Err(fault),
                finished => copied = copied.and(finished),
            }
        }
        copied
    }

    fn write_facts(&self, facts: NewFacts<'_>) -> Result<(), PostgresError> {
        if !facts.let_in.is_empty() {
            let (offsets, by): (Vec<i64>, Vec<i64>) =
                facts.let_in.iter().map(|(offset, by)| (sql_offset(*offset), sql_offset(*by))).unzip();
            self.connection.execute(
                "UPDATE quarantined q SET redriven_offset = l.by FROM unnest($1::bigint[], $2::bigint[]) AS l (log_offset, by)
                 WHERE q.log_offset = l.log_offset",
                &[&offsets, &by],
            )?;
        }
        self.write_times(&facts.times)?;
        self.write_newest(facts.newest)
    }

    fn add_rows<'a>(
        &mut self,
        rows: &mut NewRows,
        facts: &mut NewFacts<'a>,
        records: &[RecordRef<'a>],
        left_out: &WithheldSnapshot,
        is_plain: bool,
    ) -> Result<(), PostgresError> {
        let Some((record, ahead)) = records.split_first() else { return Ok(()) };
        // A mark has no row, and so names nothing.
        if is_mark(record) {
            facts.observe_time(record);
            if let Some(RecordNote::Superseded { offset, by }) = RecordNote::decode(record.note) {
                facts.let_in.push((offset, by));
            }
            return Ok(());
        }
        let Some(ids) = self.ids_of_record(record, left_out, ahead)? else { return Ok(()) };
        facts.observe_time(record);
        self.sizes.add(ids.datasource, record.payload.len());
        let is_leaked = left_out.covers(record.datasource, record.key_id, record.received_at, record.offset);
        let text = std::str::from_utf8(record.payload).ok();
        // Also where it is withheld itself: given back, it would be there beside another redrive.
        if record.flags.contains(RecordFlags::REDRIVEN)
            && let Some(RecordNote::Redriven { offset, .. }) = RecordNote::decode(record.note)
        {
            facts.let_in.push((offset, record.offset));
        }
        if record.flags.contains(RecordFlags::QUARANTINED) || is_leaked {
            rows.quarantined.begin(18);
            self.add_head(&mut rows.quarantined, record, ids);
            add_quarantined(&mut rows.quarantined, record, |row| match is_leaked {
                true => add_payload(row, record.payload, text, self.form, is_plain),
                // What failed a schema or a limit was never shown to PostgreSQL.
                false => {
                    row.null();
                    row.bytes(record.payload);
                    row.null();
                    add_size(row, record.payload);
                }
            });
            return match is_leaked && !record.flags.contains(RecordFlags::QUARANTINED) {
                true => {
                    let rows =
                        SampleRows { samples: &mut rows.withheld_samples, key_sets: &mut rows.key_sets };
                    self.add_samples(rows, record, ids.topic, text, None)
                }
                false => Ok(()),
            };
        }
        rows.entries.begin(10);
        self.add_head(&mut rows.entries, record, ids);
        add_payload(&mut rows.entries, record.payload, text, self.form, is_plain);
        let mut members = Vec::new();
        let is_object = text.is_some_and(|text| read_members(text, &mut members));
        let of_object = is_object.then_some(&*members);
        let samples = SampleRows { samples: &mut rows.samples, key_sets: &mut rows.key_sets };
        self.add_samples(samples, record, ids.topic, text, of_object)?;
        let text = text.filter(|text| !text.contains('\0'));
        let row = RowIds { datasource: i64::from(ids.datasource), topic: ids.topic, origin: 0 };
        facts.newest.observe(row, record, text, is_object.then_some(&mut members));
        Ok(())
    }

    /// The fields that a record has in both tables.
    fn add_head(&self, row: &mut CopyRows, record: &RecordRef<'_>, ids: RecordNameIds) {
        row.int8(sql_offset(record.offset));
        row.timestamptz(record.received_at);
        match record.event_at {
            Some(at) => row.timestamptz(at),
            None => row.null(),
        }
        row.int4(ids.datasource);
        self.put_id(row, ids.topic);
        self.put_id(row, ids.origin);
    }

    fn ids_of_record(
        &mut self,
        record: &RecordRef<'_>,
        left_out: &WithheldSnapshot,
        ahead: &[RecordRef<'_>],
    ) -> Result<Option<RecordNameIds>, PostgresError> {
        let Some(history) = left_out.history(record.datasource) else {
            return self.name_ids(record, record.datasource, 1, ahead).map(Some);
        };
        let incarnation = history.incarnation_of(record.key_id, record.received_at, record.offset);
        if history.is_purged(incarnation) {
            return Ok(None);
        }
        let name = shown_name(record.datasource, incarnation, history);
        self.name_ids(record, &name, incarnation, ahead).map(Some)
    }

    fn write_times(&self, times: &BTreeMap<Offset, (TimeMicros, TimeMicros)>) -> Result<(), PostgresError> {
        let firsts: Vec<i64> = times.keys().map(|first| sql_offset(*first)).collect();
        let (oldest, newest): (Vec<_>, Vec<_>) =
            times.values().map(|(oldest, newest)| (PostgresTime(*oldest), PostgresTime(*newest))).unzip();
        self.connection.execute(
            "INSERT INTO time_index (first_offset, oldest, newest)
             SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[])
             ON CONFLICT (first_offset) DO UPDATE SET oldest = least(time_index.oldest, excluded.oldest),
                 newest = greatest(time_index.newest, excluded.newest)",
            &[&firsts, &oldest, &newest],
        )?;
        Ok(())
    }
}

/// The payload as JSON, or as its bytes with the reason.
fn add_payload(row: &mut CopyRows, payload: &[u8], text: Option<&str>, form: PayloadForm, is_plain: bool) {
    let note = match text.map(|text| (text, fit_of(text))) {
        Some((text, JsonFit::Fits)) if !is_plain => {
            match form {
                PayloadForm::Jsonb => row.jsonb(text),
                PayloadForm::Json => row.bytes(text.as_bytes()),
            }
            row.null();
            row.null();
            add_size(row, payload);
            return;
        }
        Some((_, JsonFit::Beyond(why))) => Some(why),
        _ => is_plain.then_some(REFUSED_NOTE),
    };
    row.null();
    row.bytes(payload);
    add_text(row, note);
    add_size(row, payload);
}

/// How many bytes were sent, which the column of JSON payloads may have written in another way.
fn add_size(row: &mut CopyRows, payload: &[u8]) {
    row.int4(i32::try_from(payload.len()).unwrap_or(i32::MAX));
}

/// What a record has in quarantine behind the fields that it has in both tables.
fn add_quarantined(row: &mut CopyRows, record: &RecordRef<'_>, add_payload: impl FnOnce(&mut CopyRows)) {
    let (cause, reason) = match RecordNote::decode(record.note) {
        Some(RecordNote::Quarantined(reason)) if reason.is_limit() => (CAUSE_LIMIT, Some(reason)),
        Some(RecordNote::Quarantined(reason)) => (CAUSE_SCHEMA, Some(reason)),
        _ => (CAUSE_KEY, None),
    };
    add_payload(row);
    row.bytes(record.properties);
    row.int8(record.publisher.cast_signed());
    row.int4(i32::from(record.flags.0));
    add_text(row, Some(cause));
    add_text(row, reason.as_ref().map(|reason| &*reason.keyword));
    add_text(row, reason.as_ref().map(|reason| &*reason.pointer));
    add_text(row, reason.as_ref().map(|reason| &*reason.words));
    match &reason {
        Some(reason) => row.int8(i64::from(reason.schema_version)),
        None => row.null(),
    }
}

fn add_text(row: &mut CopyRows, text: Option<&str>) {
    match text {
        Some(text) => row.bytes(text_of(text).as_bytes()),
        None => row.null(),
    }
}
