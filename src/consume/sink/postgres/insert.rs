//! The rows of new records in PostgreSQL: each in `entries` or in quarantine, with its samples and the newest values that
//! it brings.

use headgate_bridge_postgres::{CopyRows, PostgresConnection};

use super::ids::{RecordNameIds, text_of};
use super::json_fit::{JsonFit, fit_of};
use super::{PostgresError, PostgresSink};
use crate::consume::sink::incarnations::shown_name;
use crate::consume::sink::newest::NewestValues;
use crate::consume::sink::quarantined::{CAUSE_KEY, CAUSE_LIMIT, CAUSE_SCHEMA};
use crate::consume::sink::schema::sql_offset;
use crate::log::{RecordNote, WithheldSnapshot};
use crate::message::{Offset, RecordFlags, RecordRef};

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

/// The rows of one transaction.
struct NewRows<'a> {
    entries: CopyRows,
    quarantined: CopyRows,
    samples: CopyRows,
    /// Of records in quarantine because of a leaked key.
    withheld_samples: CopyRows,
    newest: NewestValues<'a>,
    /// Quarantined records that were let in, each with the offset of what was.
    let_in: Vec<(Offset, Offset)>,
}

impl PostgresSink {
    /// Inserts records, in the present transaction. Those whose key has leaked go into quarantine, and those of a purged
    /// incarnation are left out. With `is_plain`, every payload is stored as its bytes.
    pub(super) fn insert_records(
        &mut self,
        records: &[RecordRef<'_>],
        is_plain: bool,
    ) -> Result<(), PostgresError> {
        if records.is_empty() {
            return Ok(());
        }
        let left_out = self.left_out.clone().unwrap_or_default();
        let mut rows = NewRows {
            entries: CopyRows::new(),
            quarantined: CopyRows::new(),
            samples: CopyRows::new(),
            withheld_samples: CopyRows::new(),
            newest: NewestValues::default(),
            let_in: Vec::new(),
        };
        for record in records {
            self.add_rows(&mut rows, record, &left_out, is_plain)?;
        }
        self.write_rows(rows)
    }

    fn add_rows<'a>(
        &mut self,
        rows: &mut NewRows<'a>,
        record: &RecordRef<'a>,
        left_out: &WithheldSnapshot,
        is_plain: bool,
    ) -> Result<(), PostgresError> {
        let Some(ids) = self.ids_of_record(record, left_out)? else { return Ok(()) };
        if record.flags.contains(RecordFlags::QUARANTINED.with(RecordFlags::REDRIVEN)) {
            if let Some(RecordNote::Superseded { offset, by }) = RecordNote::decode(record.note) {
                rows.let_in.push((offset, by));
            }
            return Ok(());
        }
        let is_leaked = left_out.covers(record.datasource, record.key_id, record.received_at, record.offset);
        let text = std::str::from_utf8(record.payload).ok();
        if record.flags.contains(RecordFlags::QUARANTINED) || is_leaked {
            add_quarantined(&mut rows.quarantined, record, ids, |row| match is_leaked {
                true => add_payload(row, record.payload, text, self.form, is_plain),
                // What failed a schema or a limit was never shown to PostgreSQL.
                false => {
                    row.null();
                    row.bytes(record.payload);
                    row.null();
                }
            });
            return match is_leaked && !record.flags.contains(RecordFlags::QUARANTINED) {
                true => self.add_samples(&mut rows.withheld_samples, record, ids.topic),
                false => Ok(()),
            };
        }
        if record.flags.contains(RecordFlags::REDRIVEN)
            && let Some(RecordNote::Redriven { offset, .. }) = RecordNote::decode(record.note)
        {
            rows.let_in.push((offset, record.offset));
        }
        rows.entries.begin(9);
        add_head(&mut rows.entries, record, ids);
        add_payload(&mut rows.entries, record.payload, text, self.form, is_plain);
        rows.newest.observe_payload(i64::from(ids.topic), record, text.filter(|text| !text.contains('\0')));
        self.add_samples(&mut rows.samples, record, ids.topic)
    }

    fn ids_of_record(
        &mut self,
        record: &RecordRef<'_>,
        left_out: &WithheldSnapshot,
    ) -> Result<Option<RecordNameIds>, PostgresError> {
        let Some(history) = left_out.history(record.datasource) else {
            return self.name_ids(record, record.datasource, 1).map(Some);
        };
        let incarnation = history.incarnation_of(record.key_id, record.received_at, record.offset);
        if history.is_purged(incarnation) {
            return Ok(None);
        }
        let name = shown_name(record.datasource, incarnation, history);
        self.name_ids(record, &name, incarnation).map(Some)
    }

    fn write_rows(&mut self, rows: NewRows<'_>) -> Result<(), PostgresError> {
        let copy = |table: &str, columns: &str, rows: CopyRows| match rows.rows() {
            0 => Ok(()),
            _ => {
                let copy = format!("COPY {table} ({columns}) FROM STDIN WITH (FORMAT binary)");
                self.connection.copy_in(&copy, rows)
            }
        };
        const HEAD: &str = "log_offset, received_at, event_at, datasource_id, topic_id, origin_id";
        const PAYLOAD: &str = "payload, payload_bytes, payload_note";
        copy("entries", &format!("{HEAD}, {PAYLOAD}"), rows.entries)?;
        copy(
            "quarantined",
            &format!(
                "{HEAD}, {PAYLOAD}, properties, publisher, flags, cause, keyword, pointer, detail, schema_version"
            ),
            rows.quarantined,
        )?;
        copy("sample_values", "time, log_offset, value, series_id", rows.samples)?;
        copy("withheld_samples", "time, log_offset, value, series_id", rows.withheld_samples)?;
        if !rows.let_in.is_empty() {
            let (offsets, by): (Vec<i64>, Vec<i64>) =
                rows.let_in.iter().map(|(offset, by)| (sql_offset(*offset), sql_offset(*by))).unzip();
            self.connection.execute(
                "UPDATE quarantined q SET redriven_offset = l.by FROM unnest($1::bigint[], $2::bigint[]) AS l (log_offset, by)
                 WHERE q.log_offset = l.log_offset",
                &[&offsets, &by],
            )?;
        }
        self.write_newest(rows.newest)
    }
}

/// The fields that a record has in both tables.
fn add_head(row: &mut CopyRows, record: &RecordRef<'_>, ids: RecordNameIds) {
    row.int8(sql_offset(record.offset));
    row.timestamptz(record.received_at);
    match record.event_at {
        Some(at) => row.timestamptz(at),
        None => row.null(),
    }
    row.int4(ids.datasource);
    row.int4(ids.topic);
    row.int4(ids.origin);
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
            return;
        }
        Some((_, JsonFit::Beyond(why))) => Some(why),
        _ => is_plain.then_some(REFUSED_NOTE),
    };
    row.null();
    row.bytes(payload);
    add_text(row, note);
}

fn add_quarantined(
    row: &mut CopyRows,
    record: &RecordRef<'_>,
    ids: RecordNameIds,
    add_payload: impl FnOnce(&mut CopyRows),
) {
    let (cause, reason) = match RecordNote::decode(record.note) {
        Some(RecordNote::Quarantined(reason)) if reason.is_limit() => (CAUSE_LIMIT, Some(reason)),
        Some(RecordNote::Quarantined(reason)) => (CAUSE_SCHEMA, Some(reason)),
        _ => (CAUSE_KEY, None),
    };
    row.begin(17);
    add_head(row, record, ids);
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
