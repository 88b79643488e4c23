//! Three sinks at once, each with a cursor of its own: what is done to the records while one of them is away, catches up or
//! is killed reaches each, and nothing is there twice. It guards against an order of events that only one of them survives.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::common::postgres::PostgresServer;
use crate::common::{Gateway, Setup, Source, scratch, wait_for};
use crate::lake::offsets_in_lake;

/// Records of one request. With their padding a transaction of storage is of more than one, and large enough for samples
/// to have a transaction of their own.
const REQUEST_RECORDS: u64 = 10_000;

/// Offsets by datasource.
type OffsetsOf = BTreeMap<String, BTreeSet<u64>>;

fn fill(gateway: &Gateway, source: &Source, key: &str, topic: &str) {
    let padding = "x".repeat(150);
    let lines: String =
        (0..REQUEST_RECORDS).map(|n| format!("{{\"n\":{n},\"unit\":\"{padding}\"}}\n")).collect();
    let path = format!("/v1/ingest/{}/{topic}", source.id);
    let headers = [("content-type", "application/x-ndjson")];
    let answer = gateway.request("POST", &path, key, &headers, lines.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn leak(gateway: &Gateway, source: &Source, key_id: &str, body: &Value) {
    let path = format!("/v1/datasources/{}/keys/{key_id}/quarantine", source.id);
    let answer = gateway.post(&path, &gateway.admin_key(), body);
    assert!(matches!(answer.status, 200 | 202), "{}", answer.text());
}

fn in_postgres(server: &PostgresServer, view: &str) -> OffsetsOf {
    let mut offsets = OffsetsOf::new();
    for row in server.sql(&format!("SELECT datasource, log_offset FROM {view}")) {
        let (datasource, offset) = row.split_once('|').expect("two");
        let is_new =
            offsets.entry(datasource.to_owned()).or_default().insert(offset.parse().expect("an offset"));
        assert!(is_new, "{view}: {row} is there twice");
    }
    offsets
}

fn in_sqlite(dir: &std::path::Path, view: &str) -> OffsetsOf {
    let db = rusqlite::Connection::open(dir.join("records.db")).expect("opens");
    let mut select = db.prepare(&format!("SELECT datasource, \"offset\" FROM {view}")).expect("a view");
    let rows = select.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)));
    let mut offsets = OffsetsOf::new();
    for row in rows.expect("rows") {
        let (datasource, offset) = row.expect("a row");
        let is_new = offsets.entry(datasource).or_default().insert(offset.cast_unsigned());
        assert!(is_new, "{view}: {offset} is there twice");
    }
    offsets
}

#[test]
fn three_sinks_hold_the_same_whatever_is_done_and_killed_while_one_of_them_catches_up() {
    let (dir, mut server) = (scratch(), PostgresServer::start());
    let setup = Setup::embedded_on(dir.path())
        .set("storage.sinks", "sqlite,postgres,delta")
        .set("storage.delta.interval_s", 1);
    let setup = server.stored_into(setup);
    let mut random = SmallRng::seed_from_u64(17);
    let mut pause = |most| std::thread::sleep(Duration::from_millis(random.random_range(0..most)));
    let since = json!({ "since": "2020-01-01T00:00:00Z" });

    // Away from nearly the beginning: all of this is for later.
    let gateway = setup.start();
    let [limited, leaked, purged] = ["limited", "leaked", "purged"].map(|id| gateway.create(id));
    gateway.settle();
    server.kill();
    let made = gateway
        .post("/v1/datasources/leaked/keys", &gateway.admin_key(), &json!({ "label": "second" }))
        .json();
    let second = |of: &str| made["key"][of].as_str().expect("a text").to_owned();
    let (second_key, second_id) = (second("secret"), second("id"));
    for source in [&limited, &leaked, &purged] {
        fill(&gateway, source, &source.key, "a");
    }
    fill(&gateway, &leaked, &second_key, "b");
    leak(&gateway, &leaked, &second_id, &since);

    // In each round it catches up for a while, and is killed: the server, and then the gateway too.
    let mut gateway = Some(gateway);
    for round in 0..4 {
        let here = gateway.take().expect("it runs");
        server.begin_again();
        pause(1_500);
        match round {
            0 => {
                let limits = json!({ "limits": { "stored_bytes": 1_000_000 } }).to_string();
                let json = [("content-type", "application/json")];
                let admin = here.admin_key();
                let answer =
                    here.request("PATCH", "/v1/datasources/limited", &admin, &json, limits.as_bytes());
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
            1 => leak(&here, &leaked, &leaked.key_id, &since),
            2 => leak(&here, &leaked, &second_id, &json!({ "undo": true })),
            _ => {
                let purge = "/v1/datasources/purged?purge=true";
                let answer = here.request("DELETE", purge, &here.admin_key(), &[], &[]);
                assert!(matches!(answer.status, 200 | 202), "{}", answer.text());
            }
        }
        fill(&here, &limited, &limited.key, "c");
        fill(&here, &leaked, &second_key, "c");
        pause(1_000);
        server.kill();
        gateway = Some(match round % 2 {
            0 => here,
            _ => {
                here.kill();
                setup.start()
            }
        });
    }
    let gateway = gateway.expect("it runs");
    server.resume();
    gateway.settle();
    // What is over the limit goes in turns.
    let records = wait_for("both to have removed the same", || {
        let (sqlite, postgres) = (in_sqlite(dir.path(), "records"), in_postgres(&server, "records"));
        (sqlite == postgres && sqlite["limited"].len() < 10_000).then_some(sqlite)
    });
    gateway.stop();
    assert_eq!(in_postgres(&server, "samples"), records, "each record has its sample, once");
    let quarantined = in_sqlite(dir.path(), "quarantine");
    assert_eq!(in_postgres(&server, "quarantine"), quarantined);
    let withheld = "(SELECT 'leaked', log_offset FROM withheld_samples) w (datasource, log_offset)";
    assert_eq!(in_postgres(&server, withheld), quarantined, "samples went with their records");
    let count = |offsets: &OffsetsOf, of: &str| offsets.get(of).map_or(0, |of| of.len() as u64);
    assert_eq!(count(&quarantined, "leaked"), REQUEST_RECORDS, "of the first key");
    assert_eq!(count(&records, "leaked"), 5 * REQUEST_RECORDS, "of the second one");
    assert!(!records.keys().any(|datasource| datasource.starts_with("purged")), "{:?}", records.keys());
    assert_ne!(server.sql("SELECT next_offset FROM sample_lane"), ["0"], "transactions were large enough");
    let in_lake = offsets_in_lake(dir.path());
    assert_eq!(in_lake["leaked"], records["leaked"]);
    assert!(in_lake.keys().all(|datasource| records.contains_key(datasource)), "{:?}", in_lake.keys());
    // A file goes as a whole, and the newest one stays.
    assert!(in_lake["limited"].last() == records["limited"].last());
}

/// Samples that have a transaction of their own are behind their records when something is killed between the two.
#[test]
fn samples_that_are_missing_are_stored_before_anything_else_and_follow_the_rules_of_now() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let with =
        |sinks: &str| server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", sinks)).start();
    let send = |gateway: &Gateway, source: &Source, numbers: std::ops::Range<u64>| {
        for n in numbers {
            let answer =
                gateway.post(&format!("/v1/ingest/{}/t", source.id), &source.key, &json!({ "n": n }));
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        gateway.settle();
    };
    let lose_samples_from = |from: u64| {
        server.sql(&format!(
            "UPDATE sample_lane SET next_offset = 0; UPDATE sink SET samples_from = {from}; DELETE FROM sample_rows WHERE log_offset >= {from}"
        ))
    };
    let state = || {
        let counts = "SELECT (SELECT string_agg(value::text, ',' ORDER BY log_offset) FROM samples),
             (SELECT count(*) FROM withheld_samples), (SELECT samples_from FROM sink)";
        server.sql(counts).remove(0)
    };
    let gateway = with("sqlite,postgres");
    let source = gateway.create("press-4");
    send(&gateway, &source, 0..8);
    gateway.stop();
    lose_samples_from(3);
    assert_eq!(state(), "0,1,2|0|3");
    let gateway = with("sqlite,postgres");
    send(&gateway, &source, 8..10);
    assert_eq!(state(), "0,1,2,3,4,5,6,7,8,9|0|");
    gateway.stop();

    // They may be on their way still: whoever held the place had sent all of it when it was cut off.
    server.sql("CREATE TABLE on_its_way AS SELECT * FROM sample_rows WHERE log_offset >= 3");
    lose_samples_from(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.sql(
                "BEGIN; UPDATE sample_lane SET next_offset = (SELECT next_offset FROM sink);
                 INSERT INTO sample_rows SELECT * FROM on_its_way;
                 DO 'BEGIN
                     WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = ''Lock'') LOOP
                         PERFORM pg_sleep(0.1); PERFORM pg_stat_clear_snapshot();
                     END LOOP; END'; COMMIT",
            )
        });
        // Until the gateway waits for it.
        wait_for("it to be under way", || {
            let asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            (server.sql(asked) == ["1"]).then_some(())
        });
        let gateway = with("sqlite,postgres");
        gateway.settle();
        gateway.stop();
    });
    assert_eq!(state(), "0,1,2,3,4,5,6,7,8,9|0|3");

    // A rule comes before they do.
    lose_samples_from(4);
    let gateway = with("sqlite");
    leak(&gateway, &source, &source.key_id, &json!({ "since": "2020-01-01T00:00:00Z" }));
    gateway.stop();
    let gateway = with("sqlite,postgres");
    wait_for("the samples to be withheld", || (state() == "|10|").then_some(()));
    leak(&gateway, &source, &source.key_id, &json!({ "undo": true }));
    wait_for("the samples to be back", || (state() == "0,1,2,3,4,5,6,7,8,9|0|").then_some(()));
}
