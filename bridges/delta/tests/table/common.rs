//! A table of readings for tests, and its rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use futures_util::TryStreamExt;
use headgate_bridge_delta::array::cast::AsArray;
use headgate_bridge_delta::array::types::Int64Type;
use headgate_bridge_delta::array::{
    ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use headgate_bridge_delta::object_store::{ObjectStore, ObjectStoreExt};
use headgate_bridge_delta::schema::Schema;
use headgate_bridge_delta::{
    ColumnType, DataFile, DataFileWriter, FileSettings, LakeError, LakeTable, PartitionValues, RowTarget,
    RowTargets, TableAppend, TableColumn, TableSnapshot, TableSpec,
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// The first moment of 2026-11-30, in microseconds.
pub(crate) const DAY_US: i64 = 1_796_000_400_000_000 / 86_400_000_000 * 86_400_000_000;

/// Small files are merged early, so that few rows show it.
pub(crate) fn spec() -> TableSpec {
    TableSpec {
        name: "readings".to_owned(),
        columns: vec![
            TableColumn::required("offset", ColumnType::Long),
            TableColumn::required("datasource", ColumnType::Text),
            TableColumn::required("day", ColumnType::Date),
            TableColumn::nullable("topic", ColumnType::Text),
            TableColumn::required("received_at", ColumnType::Timestamp),
            TableColumn::nullable("payload", ColumnType::Text),
        ],
        partitions: vec!["datasource".to_owned(), "day".to_owned()],
        order_column: "offset".to_owned(),
        app_id: "headgate".to_owned(),
        files: FileSettings {
            group_rows_max: 1000,
            merge_files_min: 3,
            opaque_columns: vec!["payload".to_owned()],
            ..FileSettings::default()
        },
        checkpoint_commits: 5,
    }
}

pub(crate) fn partition(datasource: &str, day: &str) -> PartitionValues {
    BTreeMap::from([
        ("datasource".to_owned(), Some(datasource.to_owned())),
        ("day".to_owned(), Some(day.to_owned())),
    ])
}

/// The column of the values of a datasource.
pub(crate) fn value_column(datasource: &str) -> TableColumn {
    TableColumn::nullable(format!("v_{}", datasource.replace('-', "_")), ColumnType::Double)
}

/// A file of the rows with these offsets: value `offset / 2` in the column of the datasource.
pub(crate) fn file(datasource: &str, day: &str, offsets: impl IntoIterator<Item = i64>) -> DataFile {
    let offsets: Vec<i64> = offsets.into_iter().collect();
    let spec = spec();
    let mut fields: Vec<_> = spec
        .columns
        .iter()
        .filter(|c| !spec.partitions.contains(&c.name))
        .map(TableColumn::arrow_field)
        .collect();
    fields.push(value_column(datasource).arrow_field());
    let text = |f: fn(i64) -> String| -> ArrayRef {
        Arc::new(offsets.iter().map(|o| Some(f(*o))).collect::<StringArray>())
    };
    let times = offsets.iter().map(|o| Some(DAY_US + o * 1_000_001));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(offsets.clone())),
        text(|offset| format!("line/{}", offset % 3)),
        Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC")),
        text(|offset| format!(r#"{{"t":{}}}"#, offset as f64 / 2.0)),
        Arc::new(offsets.iter().map(|o| Some(*o as f64 / 2.0)).collect::<Float64Array>()),
    ];
    let schema = Arc::new(Schema::new(fields));
    let mut writer =
        DataFileWriter::new(schema.clone(), partition(datasource, day), &spec.files).expect("writer");
    writer.write(&RecordBatch::try_new(schema, columns).expect("rows")).expect("written");
    writer.finish().expect("file")
}

/// Appends one file of each datasource with the next `rows` offsets, dealt out in turn.
pub(crate) async fn append_next(
    table: &mut LakeTable,
    datasources: &[&str],
    day: &str,
    rows: i64,
) -> Result<(), LakeError> {
    let previous = table.cursor();
    let first = previous.map_or(0, |cursor| cursor + 1);
    let count = datasources.len() as i64;
    let offsets = |nth: usize| (first..first + rows).filter(move |o| o % count == nth as i64);
    let append = TableAppend {
        previous,
        through: first + rows - 1,
        columns: datasources.iter().map(|d| value_column(d)).collect(),
        files: datasources
            .iter()
            .enumerate()
            .filter(|(nth, _)| offsets(*nth).next().is_some())
            .map(|(nth, datasource)| file(datasource, day, offsets(nth)))
            .collect(),
        ..TableAppend::default()
    };
    table.append(&append).await.map(|_| ())
}

/// The offsets in a version of a table. Each is there once.
pub(crate) async fn offsets(table: &LakeTable, snapshot: &TableSnapshot) -> Result<BTreeSet<i64>, LakeError> {
    let mut offsets = BTreeSet::new();
    for file in snapshot.files() {
        let mut rows = 0;
        for batch in table.read_file(file).await? {
            let batch = batch?;
            for offset in offset_column(&batch) {
                assert!(offsets.insert(*offset), "{offset} is there twice");
            }
            rows += batch.num_rows() as u64;
        }
        assert_eq!(file.rows(), Some(rows), "what the log says of {}", file.path);
    }
    Ok(offsets)
}

/// The offsets aside. Each is there once.
pub(crate) async fn offsets_aside(table: &LakeTable) -> Result<BTreeSet<i64>, LakeError> {
    let mut offsets = BTreeSet::new();
    for batch in table.read_aside().await?.iter().flat_map(|(_, batches)| batches) {
        for offset in offset_column(batch) {
            assert!(offsets.insert(*offset), "{offset} is aside twice");
        }
    }
    Ok(offsets)
}

/// The offsets in all files of a folder. Each is there once.
pub(crate) async fn offsets_in(store: &Arc<dyn ObjectStore>, folder: &str) -> BTreeSet<i64> {
    let mut offsets = BTreeSet::new();
    let folder = headgate_bridge_delta::object_store::path::Path::from(folder);
    let objects: Vec<_> = store.list(Some(&folder)).try_collect().await.expect("listed");
    for object in objects {
        let bytes = store.get(&object.location).await.expect("there").bytes().await.expect("read");
        let rows = ParquetRecordBatchReaderBuilder::try_new(bytes).expect("Parquet").build().expect("rows");
        for offset in rows.flat_map(|batch| offset_column(&batch.expect("rows")).to_vec()) {
            assert!(offsets.insert(offset), "{offset} is there twice");
        }
    }
    offsets
}

/// The rows of a batch by where they belong.
pub(crate) fn sorted(batch: &RecordBatch, target: impl Fn(i64) -> RowTarget) -> RowTargets {
    let targets: Vec<RowTarget> = offset_column(batch).iter().map(|offset| target(*offset)).collect();
    let different: BTreeSet<&RowTarget> = targets.iter().collect();
    let rows_of = |wanted: &RowTarget| targets.iter().map(|target| Some(target == wanted)).collect();
    different.into_iter().map(|target| (target.clone(), rows_of(target))).collect()
}

fn offset_column(batch: &RecordBatch) -> &[i64] {
    batch.column_by_name("offset").expect("offsets").as_primitive::<Int64Type>().values()
}

pub(crate) async fn open(store: &Arc<dyn ObjectStore>) -> LakeTable {
    LakeTable::open(store.clone(), spec()).await.expect("table")
}

/// Runs a Python program that reads tables; what it prints.
pub(crate) fn python(program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin/python3");
    let mut command = Command::new(python);
    // Threads of these libraries that are still at work when Python ends would abort it.
    let program = format!("{program}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n");
    command.args(["-c", &program]).args(arguments).envs(environment.iter().copied());
    let output = command.output().expect("python3 with deltalake and polars: tests/run installs them");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}
