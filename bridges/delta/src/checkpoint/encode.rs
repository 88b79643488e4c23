//! A table's actions as rows of a checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::builder::{MapBuilder, MapFieldNames, StringBuilder};
use arrow_array::{
    ArrayRef, BooleanArray, Int32Array, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;

use crate::actions::LogAction;
use crate::data_file::writer_properties;
use crate::error::LakeError;
use crate::snapshot::TableSnapshot;

/// Actions that are turned into columns at once.
const ACTIONS_PER_BATCH: usize = 8192;

/// The file, and how many actions it has.
pub(crate) fn encode(snapshot: &TableSnapshot) -> Result<(Bytes, i64), LakeError> {
    let mut actions = snapshot.actions().peekable();
    let mut writer: Option<ArrowWriter<Vec<u8>>> = None;
    let mut count = 0;
    while actions.peek().is_some() {
        let rows: Vec<LogAction> = actions.by_ref().take(ACTIONS_PER_BATCH).collect();
        count += i64::try_from(rows.len()).unwrap_or(i64::MAX);
        let batch = action_batch(&rows)?;
        let writer = match &mut writer {
            Some(writer) => writer,
            none => none.insert(ArrowWriter::try_new_with_options(
                Vec::new(),
                batch.schema(),
                ArrowWriterOptions::new()
                    .with_properties(writer_properties(&[]))
                    .with_skip_arrow_metadata(true),
            )?),
        };
        writer.write(&batch)?;
    }
    let Some(writer) = writer else {
        return Err(LakeError::LogDamaged("a table without actions".to_owned()));
    };
    Ok((writer.into_inner()?.into(), count))
}

/// Collects the children of a struct column.
#[derive(Default)]
struct StructColumns {
    fields: Vec<Field>,
    arrays: Vec<ArrayRef>,
}

impl StructColumns {
    fn with(mut self, name: &str, array: ArrayRef) -> Self {
        self.fields.push(Field::new(name, array.data_type().clone(), true));
        self.arrays.push(array);
        self
    }

    /// The struct, null in rows that have no action of this kind.
    fn finish(self, is_there: impl Iterator<Item = bool>) -> ArrayRef {
        let nulls = NullBuffer::from_iter(is_there);
        Arc::new(StructArray::new(Fields::from(self.fields), self.arrays, Some(nulls)))
    }
}

fn action_batch(rows: &[LogAction]) -> Result<RecordBatch, LakeError> {
    let columns = [
        ("protocol", protocol_column(rows)),
        ("metaData", metadata_column(rows)),
        ("txn", transaction_column(rows)),
        ("add", add_column(rows)),
        ("remove", remove_column(rows)),
    ];
    let fields: Vec<Field> =
        columns.iter().map(|(name, c)| Field::new(*name, c.data_type().clone(), true)).collect();
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, c)| c).collect())?)
}

fn texts<'a>(values: impl Iterator<Item = Option<&'a str>>) -> ArrayRef {
    Arc::new(values.collect::<StringArray>())
}

fn longs(values: impl Iterator<Item = Option<i64>>) -> ArrayRef {
    Arc::new(values.collect::<Int64Array>())
}

fn flags(values: impl Iterator<Item = Option<bool>>) -> ArrayRef {
    Arc::new(values.collect::<BooleanArray>())
}

type TextMap = BTreeMap<String, Option<String>>;

fn maps<'a>(values: impl Iterator<Item = Option<&'a TextMap>>) -> ArrayRef {
    let names =
        MapFieldNames { entry: "key_value".to_owned(), key: "key".to_owned(), value: "value".to_owned() };
    let mut maps = MapBuilder::new(Some(names), StringBuilder::new(), StringBuilder::new());
    for map in values {
        for (key, value) in map.into_iter().flatten() {
            maps.keys().append_value(key);
            maps.values().append_option(value.as_ref());
        }
        // Keys and values have the same number by construction.
        let _ = maps.append(map.is_some());
    }
    Arc::new(maps.finish())
}

fn optional(map: &BTreeMap<String, String>) -> TextMap {
    map.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect()
}

fn protocol_column(rows: &[LogAction]) -> ArrayRef {
    let protocols = || rows.iter().map(|r| r.protocol);
    let ints = |values: Vec<Option<i32>>| -> ArrayRef { Arc::new(Int32Array::from(values)) };
    StructColumns::default()
        .with("minReaderVersion", ints(protocols().map(|p| p.map(|p| p.min_reader_version)).collect()))
        .with("minWriterVersion", ints(protocols().map(|p| p.map(|p| p.min_writer_version)).collect()))
        .finish(protocols().map(|p| p.is_some()))
}

fn metadata_column(rows: &[LogAction]) -> ArrayRef {
    let metadata = || rows.iter().map(|r| r.meta_data.as_ref());
    let options: Vec<Option<TextMap>> = metadata().map(|m| m.map(|m| optional(&m.format.options))).collect();
    let configuration: Vec<Option<TextMap>> =
        metadata().map(|m| m.map(|m| optional(&m.configuration))).collect();
    let format = StructColumns::default()
        .with("provider", texts(metadata().map(|m| m.map(|m| m.format.provider.as_str()))))
        .with("options", maps(options.iter().map(Option::as_ref)))
        .finish(metadata().map(|m| m.is_some()));
    StructColumns::default()
        .with("id", texts(metadata().map(|m| m.map(|m| m.id.as_str()))))
        .with("name", texts(metadata().map(|m| m?.name.as_deref())))
        .with("description", texts(metadata().map(|m| m?.description.as_deref())))
        .with("format", format)
        .with("schemaString", texts(metadata().map(|m| m.map(|m| m.schema_string.as_str()))))
        .with("partitionColumns", text_lists(metadata().map(|m| m.map(|m| m.partition_columns.as_slice()))))
        .with("createdTime", longs(metadata().map(|m| m?.created_time)))
        .with("configuration", maps(configuration.iter().map(Option::as_ref)))
        .finish(metadata().map(|m| m.is_some()))
}

fn text_lists<'a>(lists: impl Iterator<Item = Option<&'a [String]>>) -> ArrayRef {
    let lists: Vec<Option<&[String]>> = lists.collect();
    let values: StringArray = lists.iter().flatten().flat_map(|list| list.iter().map(Some)).collect();
    let offsets = OffsetBuffer::from_lengths(lists.iter().map(|list| list.map_or(0, <[String]>::len)));
    let nulls = NullBuffer::from_iter(lists.iter().map(Option::is_some));
    let element = Arc::new(Field::new("element", DataType::Utf8, true));
    Arc::new(ListArray::new(element, offsets, Arc::new(values), Some(nulls)))
}

fn transaction_column(rows: &[LogAction]) -> ArrayRef {
    let transactions = || rows.iter().map(|r| r.txn.as_ref());
    StructColumns::default()
        .with("appId", texts(transactions().map(|t| t.map(|t| t.app_id.as_str()))))
        .with("version", longs(transactions().map(|t| t.map(|t| t.version))))
        .with("lastUpdated", longs(transactions().map(|t| t?.last_updated)))
        .finish(transactions().map(|t| t.is_some()))
}

fn add_column(rows: &[LogAction]) -> ArrayRef {
    let adds = || rows.iter().map(|r| r.add.as_ref());
    StructColumns::default()
        .with("path", texts(adds().map(|a| a.map(|a| a.path.as_str()))))
        .with("partitionValues", maps(adds().map(|a| a.map(|a| &a.partition_values))))
        .with("size", longs(adds().map(|a| a.map(|a| a.size))))
        .with("modificationTime", longs(adds().map(|a| a.map(|a| a.modification_time))))
        // What a checkpoint adds is no change.
        .with("dataChange", flags(adds().map(|a| a.map(|_| false))))
        .with("stats", texts(adds().map(|a| a?.stats.as_deref())))
        .finish(adds().map(|a| a.is_some()))
}

fn remove_column(rows: &[LogAction]) -> ArrayRef {
    let removes = || rows.iter().map(|r| r.remove.as_ref());
    StructColumns::default()
        .with("path", texts(removes().map(|r| r.map(|r| r.path.as_str()))))
        .with("deletionTimestamp", longs(removes().map(|r| r?.deletion_timestamp)))
        .with("dataChange", flags(removes().map(|r| r.map(|_| false))))
        .with("extendedFileMetadata", flags(removes().map(|r| r?.extended_file_metadata)))
        .with("partitionValues", maps(removes().map(|r| r?.partition_values.as_ref())))
        .with("size", longs(removes().map(|r| r?.size)))
        .finish(removes().map(|r| r.is_some()))
}
