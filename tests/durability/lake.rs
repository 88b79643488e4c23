//! The Delta lake beside SQLite: a gateway that is killed again and again under load leaves each record that is in the log in
//! the lake, once; rows of leaked keys and purged datasources leave it. Read by deltalake (delta-rs).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Setup, kept, python, scratch, wait_for};
use crate::crash::kill_again_and_again;

const ROUNDS: usize = 20;

/// Prints offset, datasource, payload of each row, and its value column `v_t` if there is one.
const READ: &str = r#"
import sys, json, deltalake
table = deltalake.DeltaTable(sys.argv[1]).to_pyarrow_table().to_pylist()
print(json.dumps([[r["offset"], r["datasource"], r["payload"], r.get("v_t")] for r in table]))
"#;

/// A gateway with both sinks, the lake's commits a second apart.
fn lake_setup(dir: &Path) -> Setup {
    Setup::embedded_on(dir).set("storage.sinks", "sqlite,delta").set("storage.delta.interval_s", 1)
}

/// The rows of the lake by offset. None is there twice.
fn rows(dir: &Path) -> BTreeMap<u64, Vec<Value>> {
    let place = dir.join("lake");
    let output = python(READ, &[place.to_str().expect("a path in UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Vec<Value>> = serde_json::from_slice(&output.stdout).expect("JSON");
    let count = rows.len();
    let by_offset: BTreeMap<_, _> =
        rows.into_iter().map(|row| (row[0].as_u64().expect("an offset"), row)).collect();
    assert_eq!(by_offset.len(), count, "no record is in the lake twice");
    by_offset
}

#[test]
fn what_was_acknowledged_is_in_the_lake_once_whatever_was_killed() {
    let dir = scratch();
    let setup = lake_setup(dir.path());
    let (acked, _) = kill_again_and_again(&setup, ROUNDS, &[]);
    let gateway = setup.start();
    gateway.settle();
    gateway.stop();
    let (in_log, in_lake) = (kept::in_log(dir.path()), rows(dir.path()));
    eprintln!("acknowledged {}, in the log {}, in the lake {}", acked.len(), in_log.len(), in_lake.len());
    assert!(in_log.len() >= acked.len());
    assert_eq!(in_lake.len(), in_log.len());
    for record in &in_log {
        let text = String::from_utf8_lossy(&record.payload);
        assert_eq!(in_lake[&record.offset][2], json!(text), "offset {}", record.offset);
    }
}

/// A leak takes rows out of the lake and its undo brings them back; a purge takes them for good.
#[test]
fn rows_of_leaked_keys_and_purged_datasources_leave_the_lake() {
    let dir = scratch();
    let gateway = lake_setup(dir.path()).start();
    let (press, boiler) = (gateway.create_open("press-4"), gateway.create_open("boiler"));
    for n in 0..10 {
        for (id, key) in [("press-4", &press.key), ("boiler", &boiler.key)] {
            let path = format!("/v1/ingest/{id}");
            let answer = gateway.post(&path, key, &json!({ "t": n }));
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    }
    let in_lake_when = |holds: &dyn Fn(&BTreeMap<u64, Vec<Value>>) -> bool| {
        wait_for("the lake to follow", || {
            let rows = rows(dir.path());
            holds(&rows).then_some(rows)
        })
    };
    let in_lake = |wanted: usize| in_lake_when(&|rows| rows.len() == wanted);
    assert!(in_lake(20).values().all(|row| row[3].as_f64().is_some()), "values have a column");
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
    let left = std::fs::read_dir(dir.path().join("lake"));
    let names: Vec<_> = left.expect("the lake").map(|entry| entry.expect("an entry").file_name()).collect();
    let files = |name: &std::ffi::OsString| {
        std::fs::read_dir(dir.path().join("lake").join(name)).map_or(0, Iterator::count)
    };
    let of_press = names.iter().filter(|name| name.to_string_lossy().contains("press-4"));
    for partition in of_press {
        let days = dir.path().join("lake").join(partition);
        let days = std::fs::read_dir(days).expect("days").map(|day| day.expect("a day").path());
        let parquet: usize = days.map(|day| std::fs::read_dir(day).expect("files").count()).sum();
        assert_eq!(parquet, 0, "a purge leaves no file of an earlier version");
    }
    assert!(names.iter().filter(|name| *name == "_aside").all(|name| files(name) == 0), "nothing is aside");
}
