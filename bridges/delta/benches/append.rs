//! How many rows of 128-byte JSON a table in a directory takes each second, with their columns built, and beside it what
//! building and encoding alone take: `cargo bench -p headgate-bridge-delta`.

#![allow(clippy::expect_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_delta::array::builder::{
    Float64Builder, Int64Builder, StringBuilder, TimestampMicrosecondBuilder,
};
use headgate_bridge_delta::array::{ArrayRef, RecordBatch};
use headgate_bridge_delta::schema::Schema;
use headgate_bridge_delta::{
    BucketAccess, ColumnType, DataFile, DataFileWriter, FileSettings, LakePlace, LakeTable, TableAppend,
    TableColumn, TableSpec,
};

const ROWS_PER_COMMIT: i64 = 300_000;
const COMMITS: i64 = 10;

fn spec() -> TableSpec {
    TableSpec {
        name: "bench".to_owned(),
        columns: vec![
            TableColumn::required("offset", ColumnType::Long),
            TableColumn::required("day", ColumnType::Date),
            TableColumn::required("received_at", ColumnType::Timestamp),
            TableColumn::nullable("topic", ColumnType::Text),
            TableColumn::nullable("key_id", ColumnType::Text),
            TableColumn::nullable("payload", ColumnType::Text),
            TableColumn::nullable("v_value", ColumnType::Double),
        ],
        partitions: vec!["day".to_owned()],
        order_column: "offset".to_owned(),
        app_id: "bench".to_owned(),
        files: FileSettings { opaque_columns: vec!["payload".to_owned()], ..FileSettings::default() },
        checkpoint_commits: 50,
    }
}

/// One file of rows as a sink builds it, one by one.
fn file(first: i64) -> DataFile {
    let spec = spec();
    let (mut offset, mut at) = (Int64Builder::new(), TimestampMicrosecondBuilder::new());
    let (mut topic, mut key, mut payload) =
        (StringBuilder::new(), StringBuilder::new(), StringBuilder::new());
    let mut value = Float64Builder::new();
    for n in first..first + ROWS_PER_COMMIT {
        let reading = n.wrapping_mul(2_654_435_761) % 100_000;
        let text = format!(
            r#"{{"value":{reading},"unit":"mm/s","machine":"press-4","axis":"spindle","state":"running","batch":"{:016x}","n":{n:012}}}"#,
            reading * 7_919 + n
        );
        offset.append_value(n);
        at.append_value(1_796_000_000_000_000 + n * 3);
        topic.append_value("spindle/vibration");
        key.append_value("0a1b2c3d4e5f");
        payload.append_value(&text[..text.len().min(128)]);
        #[allow(clippy::cast_precision_loss)]
        value.append_value(reading as f64);
    }
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(offset.finish()),
        Arc::new(at.finish().with_timezone("UTC")),
        Arc::new(topic.finish()),
        Arc::new(key.finish()),
        Arc::new(payload.finish()),
        Arc::new(value.finish()),
    ];
    let fields =
        spec.columns.iter().filter(|c| c.name != "day").map(TableColumn::arrow_field).collect::<Vec<_>>();
    let schema = Arc::new(Schema::new(fields));
    let partition = BTreeMap::from([("day".to_owned(), Some("2026-11-30".to_owned()))]);
    let mut writer = DataFileWriter::new(schema.clone(), partition, &spec.files).expect("writer");
    writer.write(&RecordBatch::try_new(schema, arrays).expect("rows")).expect("written");
    writer.finish().expect("file")
}

fn say(what: &str, took: Duration, bytes: usize) {
    let rows = (ROWS_PER_COMMIT * COMMITS) as f64;
    println!("{what}: {:.0} rows/s, {:.1} bytes a row", rows / took.as_secs_f64(), bytes as f64 / rows);
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    for _ in 0..3 {
        let began = Instant::now();
        let bytes = (0..COMMITS).map(|n| file(n * ROWS_PER_COMMIT).size_bytes()).sum();
        say("built and encoded", began.elapsed(), bytes);

        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().to_str().expect("a path in UTF-8");
        let store = LakePlace::parse(path, BucketAccess::default()).expect("place").open().expect("store");
        let mut table = runtime.block_on(LakeTable::open(store, spec())).expect("table");
        let began = Instant::now();
        for n in 0..COMMITS {
            let append = TableAppend {
                previous: table.cursor(),
                through: (n + 1) * ROWS_PER_COMMIT - 1,
                columns: Vec::new(),
                files: vec![file(n * ROWS_PER_COMMIT)],
                ..TableAppend::default()
            };
            runtime.block_on(table.append(&append)).expect("committed");
        }
        let bytes = table.snapshot().files().filter_map(|file| usize::try_from(file.size).ok()).sum();
        say("committed to a directory", began.elapsed(), bytes);
    }
}
