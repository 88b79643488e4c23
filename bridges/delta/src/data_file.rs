//! A Parquet file of rows of one partition: written row group by row group into memory, and read back.

use std::collections::BTreeMap;
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use bytes::Bytes;
use jiff::Timestamp;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde_json::json;

use crate::actions::AddFile;
use crate::error::LakeError;
use crate::stats::file_stats;
use crate::table::FileSettings;

/// Rows that are read at once, at most.
const ROWS_PER_BATCH: usize = 8192;
/// About how many bytes of them: what compresses well is far larger in memory than in its file.
const BATCH_BYTES: i64 = 16 << 20;
/// The note in a file that says its partition, for those who have the file alone.
const PARTITION_KEY: &str = "partition";
/// What a folder is called whose partition value is null, by old custom.
const NULL_FOLDER: &str = "__HIVE_DEFAULT_PARTITION__";

/// The value of each partition column, as the log has it: as text.
pub type PartitionValues = BTreeMap<String, Option<String>>;

/// A file that is complete, and neither stored nor part of a table yet. Its name is its own from now on, so that it can
/// be stored twice.
#[derive(Clone, Debug)]
pub struct DataFile {
    pub(crate) action: AddFile,
    /// None once it is stored.
    pub(crate) bytes: Bytes,
    /// Since when it is stored, if it is.
    pub(crate) stored_at: Option<Instant>,
}

impl DataFile {
    /// How large it is.
    pub fn size_bytes(&self) -> usize {
        usize::try_from(self.action.size).unwrap_or(0)
    }
}

/// Writes rows of one partition. Holds one row group of rows, and the finished ones compressed.
pub struct DataFileWriter {
    partition: PartitionValues,
    writer: ArrowWriter<Vec<u8>>,
    schema: SchemaRef,
    rows: u64,
}

impl DataFileWriter {
    /// A file for rows of `schema`, which has no partition columns and need not have all others.
    ///
    /// # Errors
    ///
    /// A schema that Parquet has no form for.
    pub fn new(
        schema: SchemaRef,
        partition: PartitionValues,
        settings: &FileSettings,
    ) -> Result<Self, LakeError> {
        let properties = writer_properties(&settings.opaque_columns)
            .into_builder()
            .set_max_row_group_row_count(Some(settings.group_rows_max))
            .set_max_row_group_bytes(Some(settings.group_bytes_max))
            .build();
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
        let mut writer = ArrowWriter::try_new_with_options(Vec::new(), schema.clone(), options)?;
        writer
            .append_key_value_metadata(KeyValue::new(PARTITION_KEY.to_owned(), json!(partition).to_string()));
        Ok(Self { partition, writer, schema, rows: 0 })
    }

    /// Adds rows.
    ///
    /// # Errors
    ///
    /// Rows of another schema.
    pub fn write(&mut self, rows: &RecordBatch) -> Result<(), LakeError> {
        self.writer.write(rows)?;
        self.rows += rows.num_rows() as u64;
        Ok(())
    }

    /// The columns of its rows.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// About how large the file would be if it ended here, in bytes.
    pub fn size_bytes(&self) -> usize {
        self.writer.bytes_written() + self.writer.in_progress_size()
    }

    /// Ends the file.
    ///
    /// # Errors
    ///
    /// Those of Parquet.
    pub fn finish(mut self) -> Result<DataFile, LakeError> {
        let parquet = self.writer.finish()?;
        let bytes = Bytes::from(std::mem::take(self.writer.inner_mut()));
        let action = AddFile {
            path: new_path(&self.partition),
            partition_values: self.partition,
            size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
            modification_time: Timestamp::now().as_millisecond(),
            data_change: true,
            stats: Some(file_stats(&self.schema, &parquet, self.rows)),
        };
        Ok(DataFile { action, bytes, stored_at: None })
    }
}

/// What all files have in common. `opaque` columns have neither a dictionary nor bounds: their values seldom repeat, and
/// nobody looks for them by order.
pub(crate) fn writer_properties(opaque: &[String]) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_created_by(concat!("headgate-bridge-delta ", env!("CARGO_PKG_VERSION")).to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_offset_index_disabled(true)
        .set_statistics_truncate_length(None);
    for column in opaque {
        let path = ColumnPath::from(column.as_str());
        properties = properties
            .set_column_dictionary_enabled(path.clone(), false)
            .set_column_statistics_enabled(path, EnabledStatistics::None);
    }
    properties.build()
}

/// Reads all rows of a file, batch by batch. Types are those that Parquet has, whatever the writer has noted of its own.
pub(crate) fn read_rows(file: Bytes) -> Result<ParquetRecordBatchReader, LakeError> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)?;
    let groups = builder.metadata().row_groups().iter();
    let rows =
        groups.map(|group| BATCH_BYTES.saturating_mul(group.num_rows()) / group.total_byte_size().max(1));
    let rows = rows.min().and_then(|rows| usize::try_from(rows).ok()).unwrap_or(ROWS_PER_BATCH);
    Ok(builder.with_batch_size(rows.clamp(1, ROWS_PER_BATCH)).build()?)
}

/// The partition that a file was written for; no values for a file of others.
pub(crate) fn partition_of(file: &Bytes) -> Result<PartitionValues, LakeError> {
    let parquet = ParquetRecordBatchReaderBuilder::try_new(file.clone())?;
    let notes = parquet.metadata().file_metadata().key_value_metadata().into_iter().flatten();
    let note = notes.filter(|note| note.key == PARTITION_KEY).find_map(|note| note.value.as_deref());
    Ok(note.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default())
}

/// A new name in a folder that tells a person which partition it is. Only the log says it to a reader, so characters that
/// would have to be escaped in a path are replaced.
fn new_path(partition: &PartitionValues) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mut path = String::new();
    for (column, value) in partition {
        let value = value.as_deref().unwrap_or(NULL_FOLDER);
        let plain = |text: &str| text.chars().map(|c| if is_plain(c) { c } else { '_' }).collect::<String>();
        path.push_str(&format!("{}={}/", plain(column), plain(value)));
    }
    path.push_str(&format!("{:032x}.zstd.parquet", rand::random::<u128>()));
    path
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, StringArray};
    use arrow_schema::{DataType, Field, Schema};

    use super::*;

    /// Merges held gigabytes of payloads that a file has in a few megabytes.
    #[test]
    fn what_compresses_well_is_not_decoded_all_at_once() {
        let schema: SchemaRef = Arc::new(Schema::new(vec![Field::new("payload", DataType::Utf8, true)]));
        let settings = FileSettings { opaque_columns: vec!["payload".to_owned()], ..FileSettings::default() };
        let mut writer =
            DataFileWriter::new(schema.clone(), PartitionValues::new(), &settings).expect("a writer");
        let payload = "a".repeat(256 << 10);
        let column: ArrayRef = Arc::new(StringArray::from(vec![payload.as_str(); 512]));
        writer.write(&RecordBatch::try_new(schema, vec![column]).expect("rows")).expect("written");
        let file = writer.finish().expect("a file");
        assert!(file.size_bytes() < 1 << 20, "{} bytes", file.size_bytes());
        let mut rows = 0;
        for batch in read_rows(file.bytes).expect("Parquet") {
            let batch = batch.expect("rows");
            assert!(batch.get_array_memory_size() < 64 << 20, "{} bytes", batch.get_array_memory_size());
            rows += batch.num_rows();
        }
        assert_eq!(rows, 512);
    }
}
