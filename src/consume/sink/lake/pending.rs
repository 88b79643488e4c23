//! Records that wait for their commit, as columns, for each datasource and day.

use std::sync::Arc;

use hashbrown::HashMap;
use headgate_bridge_delta::array::builder::{
    BinaryBuilder, Int64Builder, StringBuilder, TimestampMicrosecondBuilder,
};
use headgate_bridge_delta::array::{ArrayRef, RecordBatch};
use headgate_bridge_delta::schema::{Field, Schema};
use headgate_bridge_delta::{
    DataFile, DataFileWriter, FileSettings, LakeError, PartitionValues, TableColumn, TableSchema,
};

use super::columns::{self, day_of, day_text, partition, table_spec};
use super::cursor_of;
use super::values::{COLUMN_ROWS_FIRST, ValueBuilders, ValueColumns};
use crate::consume::sink::incarnations::shown_name;
use crate::log::WithheldSnapshot;
use crate::message::{KeyId, RecordRef};

/// What a record takes in memory beside its texts and values, about.
const ROW_BYTES: usize = 96;
/// What the columns of a file take before they have rows, about.
const GROUP_BYTES: usize = 4 << 10;
/// The bytes that a column of texts has room for at first.
const FIRST_TEXT_BYTES: usize = 256;

/// Which rows go into one file: those of a datasource and day that are in the table, or aside.
#[derive(Clone, PartialEq, Eq, Hash)]
struct RowGroup {
    datasource: String,
    day: i64,
    is_aside: bool,
}

/// Records that wait.
pub(super) struct PendingRows {
    groups: HashMap<RowGroup, RowColumns>,
    values: ValueColumns,
    bytes: usize,
    /// The text of the newest key id: most records follow one of the same key.
    key_text: Option<(KeyId, String)>,
}

/// What is committed together.
pub(super) struct PendingFiles {
    pub(super) files: Vec<DataFile>,
    pub(super) aside: Vec<DataFile>,
    /// Columns that may be new to the table.
    pub(super) columns: Vec<TableColumn>,
}

impl PendingRows {
    /// None, for a table of `schema`, which may get `value_columns_max` columns of values in all.
    pub(super) fn new(schema: &TableSchema, value_columns_max: usize) -> Self {
        Self {
            groups: HashMap::new(),
            values: ValueColumns::new(schema, value_columns_max),
            bytes: 0,
            key_text: None,
        }
    }

    /// About how much memory they take.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a record that is not in quarantine. One of a leaked key goes aside, one of a purged incarnation nowhere.
    pub(super) fn push(&mut self, record: &RecordRef<'_>, left_out: &WithheldSnapshot) {
        let day = day_of(record.received_at);
        let RecordRef { datasource, key_id, received_at, offset, .. } = *record;
        let is_aside = left_out.covers(datasource, key_id, received_at, offset);
        let datasource = match left_out.history(datasource) {
            None => datasource.into(),
            Some(history) => {
                let incarnation = history.incarnation_of(key_id, received_at, offset);
                if history.is_purged(incarnation) {
                    return;
                }
                shown_name(datasource, incarnation, history)
            }
        };
        if self.key_text.as_ref().is_none_or(|(known, _)| *known != key_id) {
            self.key_text = Some((key_id, key_id.to_string()));
        }
        let key_text = self.key_text.as_ref().map_or("", |(_, text)| text);
        let group = self.groups.entry(RowGroup { datasource, day, is_aside }).or_insert_with(|| {
            self.bytes += GROUP_BYTES;
            RowColumns::default()
        });
        self.bytes += record.payload.len() + record.topic.len() + record.content_type.len() + ROW_BYTES;
        self.bytes += group.push(record, key_text, &mut self.values);
    }

    /// Takes them. None wait afterwards.
    pub(super) fn take(&mut self) -> TakenRows {
        self.bytes = 0;
        TakenRows {
            groups: std::mem::take(&mut self.groups),
            columns: self.values.columns().to_vec(),
            new: self.values.take_new(),
        }
    }
}

/// Records that are committed together, and the columns of values as they were then.
pub(super) struct TakenRows {
    groups: HashMap<RowGroup, RowColumns>,
    columns: Vec<TableColumn>,
    new: Vec<TableColumn>,
}

impl TakenRows {
    /// Makes files of them.
    pub(super) fn into_files(self, settings: &FileSettings) -> Result<PendingFiles, LakeError> {
        let mut made = PendingFiles { files: Vec::new(), aside: Vec::new(), columns: self.new };
        for (group, rows) in self.groups {
            let partition = partition(&group.datasource, &day_text(group.day));
            let file = rows.into_file(partition, &self.columns, settings)?;
            if group.is_aside { made.aside.push(file) } else { made.files.push(file) }
        }
        Ok(made)
    }
}

/// The rows of one file, column by column.
struct RowColumns {
    offset: Int64Builder,
    received_at: TimestampMicrosecondBuilder,
    event_at: TimestampMicrosecondBuilder,
    topic: StringBuilder,
    key_id: StringBuilder,
    transport: StringBuilder,
    content_type: StringBuilder,
    payload: StringBuilder,
    payload_bytes: BinaryBuilder,
    values: ValueBuilders,
    rows: usize,
}

impl Default for RowColumns {
    fn default() -> Self {
        let text = || StringBuilder::with_capacity(COLUMN_ROWS_FIRST, FIRST_TEXT_BYTES);
        let time = || TimestampMicrosecondBuilder::with_capacity(COLUMN_ROWS_FIRST);
        Self {
            offset: Int64Builder::with_capacity(COLUMN_ROWS_FIRST),
            received_at: time(),
            event_at: time(),
            topic: text(),
            key_id: text(),
            transport: text(),
            content_type: text(),
            payload: text(),
            payload_bytes: BinaryBuilder::with_capacity(COLUMN_ROWS_FIRST, 0),
            values: ValueBuilders::default(),
            rows: 0,
        }
    }
}

impl RowColumns {
    /// Adds a row. Returns what its values take in memory, about, in bytes.
    fn push(&mut self, record: &RecordRef<'_>, key_text: &str, values: &mut ValueColumns) -> usize {
        self.offset.append_value(cursor_of(record.offset));
        self.received_at.append_value(record.received_at);
        self.event_at.append_option(record.event_at);
        self.topic.append_value(record.topic);
        self.key_id.append_value(key_text);
        self.transport.append_value(record.transport.as_str());
        self.content_type.append_option((!record.content_type.is_empty()).then_some(record.content_type));
        let text = std::str::from_utf8(record.payload).ok();
        self.payload.append_option(text);
        self.payload_bytes.append_option(text.is_none().then_some(record.payload));
        if let Some(text) = text {
            self.values.read(text, record.datasource, self.rows, values);
        }
        self.rows += 1;
        self.values.take_growth()
    }

    fn into_file(
        mut self,
        partition: PartitionValues,
        values: &[TableColumn],
        settings: &FileSettings,
    ) -> Result<DataFile, LakeError> {
        let (mut fields, mut arrays): (Vec<Field>, Vec<ArrayRef>) = (Vec::new(), Vec::new());
        for column in table_spec().columns {
            let Some(array) = self.finish_column(&column.name) else { continue };
            fields.push(column.arrow_field());
            arrays.push(array);
        }
        for (column, array) in self.values.finish(self.rows, values) {
            fields.push(column.arrow_field());
            arrays.push(array);
        }
        let schema = Arc::new(Schema::new(fields));
        let mut writer = DataFileWriter::new(schema.clone(), partition, settings)?;
        writer.write(&RecordBatch::try_new(schema, arrays)?)?;
        writer.finish()
    }

    /// `None` for columns of partitions.
    fn finish_column(&mut self, name: &str) -> Option<ArrayRef> {
        Some(match name {
            columns::OFFSET => Arc::new(self.offset.finish()),
            columns::RECEIVED_AT => Arc::new(self.received_at.finish().with_timezone("UTC")),
            columns::EVENT_AT => Arc::new(self.event_at.finish().with_timezone("UTC")),
            columns::TOPIC => Arc::new(self.topic.finish()),
            columns::KEY_ID => Arc::new(self.key_id.finish()),
            columns::TRANSPORT => Arc::new(self.transport.finish()),
            columns::CONTENT_TYPE => Arc::new(self.content_type.finish()),
            columns::PAYLOAD => Arc::new(self.payload.finish()),
            columns::PAYLOAD_BYTES => Arc::new(self.payload_bytes.finish()),
            _ => return None,
        })
    }
}
