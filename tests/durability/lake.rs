//! The Delta lake beside SQLite, in a directory and in S3: what is in it and who reads it, that each record is there once
//! whatever is killed, that a lake which is away is nobody's trouble, and that leaks, deletions and purges reach it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::common::load::{Ledger, all_kinds};
use crate::common::seaweed::SeaweedServer;
use crate::common::{Gateway, Setup, Source, kept, python, scratch, wait_for};
use crate::crash::kill_again_and_again;
use crate::faults::{SmallDisk, is_root};

const ROUNDS: usize = 12;
const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

/// Prints offset, datasource, payload of each row, and its value columns. It ends itself: threads of these libraries that are
/// still at work when Python ends would abort it.
const READ: &str = r#"
import os, sys, json, deltalake
table = deltalake.DeltaTable(sys.argv[1], storage_options=json.loads(sys.argv[2])).to_pyarrow_table().to_pylist()
print(json.dumps([[r["offset"], r["datasource"], r["payload"], {k: v for k, v in r.items() if k.startswith("v_")}] for r in table]), flush=True)
os._exit(0)
"#;

/// Publishes lines of `TOPIC PAYLOAD` over MQTT, at QoS 1.
const PUBLISH: &str = r#"
import sys, paho.mqtt.client as mqtt
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.username_pw_set(sys.argv[2])
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_start()
for line in sys.argv[3].splitlines():
    topic, payload = line.split(" ", 1)
    client.publish(topic, payload, qos=1).wait_for_publish(20)
client.disconnect()
"#;

/// Reads a lake with each of the libraries that are said to read it.
const READERS: &str = r#"
import os, sys, json, datetime, deltalake, duckdb, polars as pl
place = sys.argv[1]
table = deltalake.DeltaTable(place)
assert table.metadata().partition_columns == ["datasource", "day"], table.metadata()
types = {field.name: str(field.type) for field in table.schema().fields}
rows = table.to_pyarrow_table().num_rows
hot = pl.scan_delta(place).filter(pl.col("datasource") == "press-4", pl.col("v_temp") > 21).sort("offset").collect()
frame = table.to_pandas()
lake = table.to_pyarrow_dataset()
grouped = duckdb.sql("SELECT datasource, count(*), max(v_temp) FROM lake GROUP BY 1 ORDER BY 1").fetchall()
today = datetime.datetime.now(datetime.timezone.utc).date()
days = {(today - d).days for d in pl.read_delta(place)["day"].to_list()}
print(json.dumps({"types": types, "rows": rows, "hot": hot["v_temp"].to_list(), "pandas": len(frame),
    "nulls": int(frame["v_temp"].isna().sum()), "duckdb": grouped, "days": sorted(days),
    "topics": sorted(set(frame["topic"])), "received": str(hot["received_at"].dtype)}), flush=True)
os._exit(0)
"#;

/// The rows of a lake by offset.
type LakeRows = BTreeMap<u64, Vec<Value>>;

/// A gateway with both sinks, the lake's commits a second apart.
fn lake_setup(dir: &Path) -> Setup {
    Setup::embedded_on(dir).set("storage.sinks", "sqlite,delta").set("storage.delta.interval_s", 1)
}

/// What a lake has. No record is there twice.
fn rows_in(place: &str, options: &str) -> LakeRows {
    try_rows_in(place, options).unwrap_or_else(|why| panic!("{why}"))
}

/// The same; what the reader says if it cannot read, as when a purge takes the files of the version that it reads.
fn try_rows_in(place: &str, options: &str) -> Result<LakeRows, String> {
    let output = python(READ, &[place, options]);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let rows: Vec<Vec<Value>> = serde_json::from_slice(&output.stdout).expect("JSON");
    let count = rows.len();
    let by_offset: BTreeMap<_, _> =
        rows.into_iter().map(|row| (row[0].as_u64().expect("an offset"), row)).collect();
    assert_eq!(by_offset.len(), count, "no record is in the lake twice");
    Ok(by_offset)
}

/// Those of the lake in a data directory.
fn rows(dir: &Path) -> LakeRows {
    rows_in(dir.join("lake").to_str().expect("a path in UTF-8"), "{}")
}

/// The offsets in it, by datasource.
pub fn offsets_in_lake(dir: &Path) -> BTreeMap<String, BTreeSet<u64>> {
    let mut offsets: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for (offset, row) in rows(dir) {
        offsets.entry(row[1].as_str().expect("a datasource").to_owned()).or_default().insert(offset);
    }
    offsets
}

fn sink(gateway: &Gateway) -> Value {
    let sinks = gateway.get("/v1/sinks", &gateway.admin_key()).json();
    let all = sinks["sinks"].as_array().expect("a list");
    all.iter().find(|of| of["sink"] == "delta").expect("delta is among the sinks").clone()
}

fn publish(gateway: &Gateway, source: &Source, lines: &str) {
    let output = python(PUBLISH, &[&gateway.mqtt.port().to_string(), &source.key, lines]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn send(gateway: &Gateway, source: &Source, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let answer = gateway.post(&format!("/v1/ingest/{}", source.id), &source.key, &json!({ "n": n }));
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

/// Asserts that a lake has what the log of a stopped gateway has.
fn assert_has_the_log(in_lake: &LakeRows, dir: &Path, acked: usize) {
    let in_log = kept::in_log(dir);
    eprintln!("acknowledged {acked}, in the log {}, in the lake {}", in_log.len(), in_lake.len());
    assert!(in_log.len() >= acked);
    assert_eq!(in_lake.len(), in_log.len());
    for record in &in_log {
        let text = String::from_utf8_lossy(&record.payload);
        assert_eq!(in_lake[&record.offset][2], json!(text), "offset {}", record.offset);
    }
}

#[test]
fn what_devices_publish_is_in_the_lake_once_with_a_column_for_each_value() {
    let dir = scratch();
    let gateway = lake_setup(dir.path()).start();
    let (press, boiler) = (gateway.create_open("press-4"), gateway.create_open("boiler"));
    publish(
        &gateway,
        &press,
        "spindle/temp {\"temp\":21.5,\"on\":true,\"unit\":\"C\",\"state\":{\"rpm\":900}}\n\
         spindle/temp {\"temp\":22,\"on\":false}\nspindle/temp {\"temp\":\"n/a\"}\nspindle/note hello",
    );
    publish(&gateway, &boiler, "data {\"temp\":80,\"bar\":2.5}");
    let answer = gateway.request("POST", "/v1/ingest/boiler", &boiler.key, &[OCTETS], b"\xff\x00\x01");
    assert_eq!(answer.status, 200, "{}", answer.text());
    gateway.settle();
    assert_eq!(sink(&gateway)["lag"], 0);
    let in_lake = rows(dir.path());
    assert_eq!(in_lake.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    let values = |offset: u64| in_lake[&offset][3].clone();
    let none = json!({ "v_temp": null, "v_on": null, "v_unit": null, "v_state_rpm": null, "v_bar": null });
    let with = |some: Value| {
        let mut all = none.clone();
        all.as_object_mut().expect("an object").extend(some.as_object().expect("an object").clone());
        all
    };
    assert_eq!(values(0), with(json!({ "v_temp": 21.5, "v_on": true, "v_unit": "C", "v_state_rpm": 900.0 })));
    assert_eq!(values(1), with(json!({ "v_temp": 22.0, "v_on": false })));
    assert_eq!((values(2), in_lake[&2][2].clone()), (none.clone(), json!("{\"temp\":\"n/a\"}")));
    assert_eq!(values(4), with(json!({ "v_temp": 80.0, "v_bar": 2.5 })));
    assert_eq!((values(5), in_lake[&5][2].clone()), (none.clone(), Value::Null));
    gateway.stop();

    let output = python(READERS, &[dir.path().join("lake").to_str().expect("a path in UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&read["rows"], &read["pandas"], &read["nulls"]), (&json!(6), &json!(6), &json!(3)));
    assert_eq!(read["hot"], json!([21.5, 22.0]));
    assert_eq!(read["duckdb"], json!([["boiler", 2, 80.0], ["press-4", 4, 22.0]]));
    assert_eq!(read["topics"], json!(["data", "spindle/note", "spindle/temp"]));
    assert!(matches!(read["days"].as_array().expect("a list").as_slice(), [day] if *day == 0 || *day == 1));
    for (column, delta_type) in [
        ("offset", "long"),
        ("day", "date"),
        ("received_at", "timestamp"),
        ("v_on", "boolean"),
        ("v_temp", "double"),
    ] {
        let told = read["types"][column].as_str().expect("a type");
        assert!(told.contains(delta_type), "{column}: {told}");
    }
}

#[test]
fn what_was_acknowledged_is_in_the_lake_once_whatever_was_killed() {
    let dir = scratch();
    let setup = lake_setup(dir.path());
    let (acked, _) = kill_again_and_again(&setup, ROUNDS, &[]);
    let gateway = setup.start();
    gateway.settle();
    gateway.stop();
    assert_has_the_log(&rows(dir.path()), dir.path(), acked.len());
}

/// The store is killed under load, and stays away while the gateway is killed as well.
#[test]
fn a_store_that_is_away_is_no_trouble_of_devices_and_gets_everything_once_it_is_back() {
    let (dir, mut server) = (scratch(), SeaweedServer::start());
    let setup = server.stored_into(lake_setup(dir.path()));
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    send(&gateway, &source, 0..10);
    gateway.settle();
    let ledger = Arc::new(Ledger::default());
    let senders = all_kinds(&gateway, &source, &ledger);
    server.kill();
    wait_for("the gateway to see that its lake is away", || {
        let sink = sink(&gateway);
        (sink["trouble"].is_string() && sink["lag"].as_u64() > Some(0)).then_some(())
    });
    let ready = gateway.get("/readyz", "");
    assert_eq!(ready.status, 200, "devices are served: {}", ready.text());
    assert!(ready.text().contains("lake"), "{}", ready.text());
    assert!(gateway.metric("headgate_sink_lag_records{sink=\"delta\"}") > 0.0);
    assert_eq!(gateway.metric("headgate_sink_up{sink=\"delta\"}"), 0.0);
    let before = ledger.acked();
    wait_for("devices to go on", || (ledger.acked() > before + 1_000).then_some(()));
    gateway.kill();
    let mut acked = 10;
    for sender in senders {
        acked += sender.join().expect("a sender saw only acks, and then the end").acked.len();
    }
    let gateway = setup.start();
    send(&gateway, &source, 10..20);
    server.resume();
    wait_for("the lake to catch up", || (sink(&gateway)["lag"] == 0).then_some(()));
    assert!(sink(&gateway)["trouble"].is_null());
    assert!(!gateway.output().contains("s3cret"), "a secret is in no message");
    gateway.stop();
    let in_lake = rows_in("s3://lake/plant/records", &server.storage_options());
    assert_has_the_log(&in_lake, dir.path(), acked + 10);
}

/// The lake is on a disk of its own, which is full for a while; the disk that the log is on is not.
#[test]
fn a_full_disk_under_the_lake_is_no_trouble_of_devices() {
    if !is_root("lake::a_full_disk_under_the_lake_is_no_trouble_of_devices") {
        return;
    }
    let (dir, disk) = (scratch(), SmallDisk::mount());
    let place = disk.path().join("lake");
    let place = place.to_str().expect("a path in UTF-8");
    let gateway = lake_setup(dir.path()).set("storage.delta.place", place).start();
    let source = gateway.create_open("press-4");
    send(&gateway, &source, 0..10);
    gateway.settle();
    disk.fill(0);
    send(&gateway, &source, 10..40);
    wait_for("the gateway to see that the disk is full", || {
        sink(&gateway)["trouble"].as_str().filter(|why| why.contains("No space left")).map(drop)
    });
    assert_eq!(gateway.records("press-4").len(), 40, "the other sink goes on");
    disk.empty();
    wait_for("the lake to catch up", || (sink(&gateway)["lag"] == 0).then_some(()));
    gateway.stop();
    assert_eq!(rows_in(place, "{}").len(), 40);
}

/// A lake whose place cannot be written is opened once it can be. Another log's lake is left alone.
#[test]
fn a_lake_that_cannot_be_opened_is_opened_later_and_that_of_another_log_never() {
    let (dir, other) = (scratch(), scratch());
    let place = dir.path().join("place");
    std::fs::write(&place, b"a file where the directory is to be").expect("written");
    let at_place = |dir: &Path| lake_setup(dir).set("storage.delta.place", place.display());
    let gateway = at_place(dir.path()).start();
    let source = gateway.create_open("press-4");
    send(&gateway, &source, 0..10);
    wait_for("a trouble", || sink(&gateway)["trouble"].is_string().then_some(()));
    std::fs::remove_file(&place).expect("removed");
    wait_for("the lake to be made", || (sink(&gateway)["lag"] == 0).then_some(()));
    gateway.stop();

    let gateway = at_place(other.path()).start();
    let source = gateway.create_open("press-4");
    wait_for("a trouble", || {
        sink(&gateway)["trouble"].as_str().filter(|why| why.contains("another log")).map(drop)
    });
    send(&gateway, &source, 100..120);
    gateway.stop();
    // Its log has more now than the lake, and other records.
    let gateway = at_place(other.path()).start();
    wait_for("the same trouble", || {
        sink(&gateway)["trouble"].as_str().filter(|why| why.contains("another log")).map(drop)
    });
    gateway.stop();
    assert_eq!(rows_in(place.to_str().expect("a path in UTF-8"), "{}").len(), 10);
}

/// A leak takes rows out of the lake and its undo brings them back; a purge takes them for good.
#[test]
fn rows_of_leaked_keys_and_purged_datasources_leave_the_lake() {
    let dir = scratch();
    let gateway = lake_setup(dir.path()).start();
    let (press, boiler) = (gateway.create_open("press-4"), gateway.create_open("boiler"));
    for source in [&press, &boiler] {
        send(&gateway, source, 0..10);
    }
    let in_lake_when = |holds: &dyn Fn(&LakeRows) -> bool| {
        wait_for("the lake to follow", || {
            let place = dir.path().join("lake");
            let rows = try_rows_in(place.to_str().expect("a path in UTF-8"), "{}").ok()?;
            holds(&rows).then_some(rows)
        })
    };
    let in_lake = |wanted: usize| in_lake_when(&|rows| rows.len() == wanted);
    assert!(in_lake(20).values().all(|row| row[3]["v_n"].as_f64().is_some()), "values have a column");
    let leak = |body: &Value| {
        let path = format!("/v1/datasources/press-4/keys/{}/quarantine", press.key_id);
        let answer = gateway.post(&path, &gateway.admin_key(), body);
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    leak(&json!({ "since": "2020-01-01T00:00:00Z" }));
    assert!(in_lake(10).values().all(|row| row[1] == "boiler"));
    leak(&json!({ "undo": true }));
    in_lake(20);
    gateway.delete("press-4");
    let ended = in_lake_when(&|rows| rows.values().any(|row| row[1] == "press-4~1"));
    assert_eq!(ended.len(), 20);
    let purge = "/v1/datasources/press-4?purge=true&incarnation=1";
    let answer = gateway.request("DELETE", purge, &gateway.admin_key(), &[], &[]);
    assert!(matches!(answer.status, 200 | 202), "{}", answer.text());
    in_lake(10);
    let left = |of: &str| {
        wait_for("a purge to leave no file, of an earlier version either", || {
            (parquet_files(&dir.path().join("lake"), of) == 0).then_some(())
        });
    };
    left("press-4");
    left("_aside");
}

/// The Parquet files below the folders whose name has `part`.
fn parquet_files(lake: &Path, part: &str) -> usize {
    let folders = std::fs::read_dir(lake).expect("the lake").map(|entry| entry.expect("an entry").path());
    let is_meant =
        |path: &std::path::PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().contains(part));
    folders.filter(is_meant).map(|path| files_below(&path)).sum()
}

fn files_below(path: &Path) -> usize {
    let entries = std::fs::read_dir(path).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

/// Every commit leaves a file; they are merged, the log of the table gets checkpoints, and what is over a limit goes.
#[test]
fn small_files_are_merged_and_what_is_over_a_limit_leaves_the_lake() {
    let dir = scratch();
    let setup = lake_setup(dir.path());
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    for n in 0..10 {
        send(&gateway, &source, n..n + 1);
        gateway.settle();
    }
    let files = python(FILES, &[dir.path().join("lake").to_str().expect("a path in UTF-8")]);
    let files: usize = String::from_utf8_lossy(&files.stdout).trim().parse().expect("a number");
    assert!(files < 8, "{files} files for 10 commits");
    assert_eq!(rows(dir.path()).len(), 10);
    let limits = json!({ "limits": { "stored_bytes": 1 } });
    let answer = gateway.request(
        "PATCH",
        "/v1/datasources/press-4",
        &gateway.admin_key(),
        &[("content-type", "application/json")],
        limits.to_string().as_bytes(),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    gateway.stop();
    // A start looks at once.
    let gateway = setup.start();
    wait_for("the oldest files to go", || (rows(dir.path()).len() < 10).then_some(()));
    gateway.stop();
}

const FILES: &str = r#"
import os, sys, deltalake
print(len(deltalake.DeltaTable(sys.argv[1]).file_uris()), flush=True)
os._exit(0)
"#;
