//! What other people's programs make of a table: deltalake (delta-rs) and Polars, by their Python packages.

use std::sync::Arc;

use headgate_bridge_delta::object_store::ObjectStore;
use headgate_bridge_delta::{BucketAccess, LakePlace, LakeTable, RowTarget};

use crate::common::{append_next, offsets, open, python, sorted, spec};

const DAY: &str = "2026-11-30";

fn directory_store(directory: &tempfile::TempDir) -> Arc<dyn ObjectStore> {
    let path = directory.path().to_str().expect("a path in UTF-8");
    LakePlace::parse(path, BucketAccess::default()).expect("place").open().expect("store")
}

/// Prints what a person would look at; the checks are in the test.
const READ: &str = r#"
import sys, datetime
import deltalake, polars
t = deltalake.DeltaTable(sys.argv[1])
a = t.to_pyarrow_table()
assert str(a.schema.field("received_at").type) == "timestamp[us, tz=UTC]", a.schema
assert sorted(a["offset"].to_pylist()) == sorted(set(a["offset"].to_pylist()))
p = polars.read_delta(sys.argv[1])
assert p.height == a.num_rows
day = datetime.date(2026, 11, 30)
some = polars.scan_delta(sys.argv[1]).filter((polars.col("datasource") == "press-4") & (polars.col("day") == day)
    & (polars.col("received_at") > polars.lit(p["received_at"].max()) - datetime.timedelta(seconds=10))).collect()
narrow = polars.scan_delta(sys.argv[1]).filter(polars.col("offset") == p["offset"].max()).collect()
assert narrow.height == 1
for offset, value, payload in p.filter(polars.col("datasource") == "press-4").select("offset", "v_press_4", "payload").rows():
    assert value == offset / 2 and payload == '{"t":%s}' % (offset // 2 if offset % 2 == 0 else offset / 2), (offset, value, payload)
print(a.num_rows, p["offset"].max(), some.height, t.version(), t.transaction_version("headgate"))
"#;

#[tokio::test]
async fn deltalake_and_polars_read_what_was_appended_merged_and_cut_out() {
    let directory = tempfile::tempdir().expect("directory");
    let store = directory_store(&directory);
    let mut table = open(&store).await;
    for _ in 0..12 {
        append_next(&mut table, &["press-4", "boiler"], DAY, 100).await.expect("appended");
    }
    assert!(table.compact(10).await.expect("merged") >= 2);
    let report = table
        .rewrite(
            |file| file.partition("datasource") == Some("boiler"),
            |partition, batch| {
                let stays = || RowTarget::Table(partition.clone());
                Ok(sorted(batch, |o| if o < 1000 { stays() } else { RowTarget::Aside }))
            },
        )
        .await
        .expect("rewritten");
    assert_eq!(report.rows_removed, 100);
    let path = directory.path().to_str().expect("a path in UTF-8");
    let version = table.snapshot().version();
    assert_eq!(python(READ, &[path], &[]), format!("1100 1198 5 {version} 1199"));
    // With what is left in the log after its first part is gone, and without the files of earlier versions.
    table.checkpoint().await.expect("checkpoint");
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert!(table.expire_log(std::time::Duration::ZERO).await.expect("expired") > 10);
    let vacuumed =
        table.vacuum(std::time::Duration::ZERO, std::time::Duration::ZERO).await.expect("vacuumed");
    assert!(vacuumed.removed >= 24 && vacuumed.orphans == 0, "{vacuumed:?}");
    assert_eq!(python(READ, &[path], &[]), format!("1100 1198 5 {version} 1199"));
}

/// Merges, checkpoints and rows of deltalake in our table.
const WRITE: &str = r#"
import sys, datetime
import deltalake, pyarrow
t = deltalake.DeltaTable(sys.argv[1])
t.optimize.compact()
utc = datetime.timezone.utc
rows = pyarrow.table({
    "offset": pyarrow.array([1000000], pyarrow.int64()), "datasource": ["guest"], "day": [datetime.date(2026, 11, 30)],
    "topic": ["t"], "received_at": pyarrow.array([datetime.datetime.now(utc)], pyarrow.timestamp("us", "UTC")), "payload": ["x"]})
deltalake.write_deltalake(sys.argv[1], rows, mode="append", schema_mode="merge")
t = deltalake.DeltaTable(sys.argv[1])
t.create_checkpoint()
t.optimize.compact()
print(t.version())
"#;

#[tokio::test]
async fn a_table_that_deltalake_has_written_too_goes_on() {
    let directory = tempfile::tempdir().expect("directory");
    let store = directory_store(&directory);
    let mut ours = open(&store).await;
    for _ in 0..7 {
        append_next(&mut ours, &["press-4", "boiler"], DAY, 10).await.expect("appended");
    }
    let path = directory.path().to_str().expect("a path in UTF-8");
    python(WRITE, &[path], &[]);
    // One that has it open, and one that opens it.
    append_next(&mut ours, &["press-4", "boiler"], DAY, 10).await.expect("appended");
    let mut table = LakeTable::open(store, spec()).await.expect("opened");
    assert_eq!(table.cursor(), Some(79));
    for _ in 0..3 {
        append_next(&mut table, &["press-4", "boiler"], DAY, 10).await.expect("appended");
    }
    table.compact(10).await.expect("merged");
    let found = offsets(&table, table.snapshot()).await.expect("readable");
    assert_eq!(found, (0..110).chain([1_000_000]).collect());
}
