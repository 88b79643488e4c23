//! One Delta lake for all gateways of a cluster: whoever commits first writes, another one takes its place, and whoever was
//! cut off writes nothing twice.

use std::path::Path;

use serde_json::json;

use crate::common::nats::NatsServer;
use crate::common::{Gateway, Setup, python, scratch, signal, wait_for};
use crate::history::{comes_back, decide, refusal};
use crate::sinks::{send, sink};

/// Prints how many rows there are, how many offsets and how many different numbers, and the least of these.
const COUNT: &str = r#"
import os, sys, json, deltalake
rows = deltalake.DeltaTable(sys.argv[1]).to_pyarrow_table().to_pylist()
numbers = [json.loads(r["payload"])["n"] for r in rows]
print(len(rows), len({r["offset"] for r in rows}), len(set(numbers)), min(numbers, default=-1), flush=True)
os._exit(0)
"#;

/// As [`COUNT`], of what was set aside beside the table.
const COUNT_ASIDE: &str = r#"
import os, sys, json, glob, pyarrow.parquet as pq
rows = []
for path in glob.glob(sys.argv[1] + "/_set_aside_*/**/*.parquet", recursive=True):
    rows += pq.ParquetFile(path).read().to_pylist()
numbers = [json.loads(r["payload"])["n"] for r in rows]
print(len(rows), len({r["offset"] for r in rows}), len(set(numbers)), min(numbers, default=-1), flush=True)
os._exit(0)
"#;

fn counts_of(program: &str, lake: &Path) -> String {
    let output = python(program, &[lake.to_str().expect("a path in UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn setup(dir: &Path, nats: &NatsServer, lake: &Path) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", nats.url()))
        .set("drain_ms_max", 2_000)
        .set("log.retention_bytes", "1GiB")
        .set("storage.sinks", "delta")
        .set("storage.delta.place", lake.display())
        .set("storage.delta.interval_s", 1)
}

fn wait_until_level(gateway: &Gateway) {
    wait_for("a gateway to see that the lake has everything", || {
        let sink = sink(gateway);
        (sink["lag"] == 0 && sink["trouble"].is_null()).then_some(())
    });
}

#[test]
fn gateways_share_a_lake_and_one_that_stood_still_writes_nothing_twice() {
    let nats = NatsServer::start();
    let (dir_a, dir_b, lake) = (scratch(), scratch(), scratch());
    let start = |dir: &Path| setup(dir, &nats, lake.path()).start();
    let counts = || counts_of(COUNT, lake.path());
    let a = start(dir_a.path());
    let admin_key = |dir: &Path| dir.join("admin.key");
    std::fs::copy(admin_key(dir_a.path()), admin_key(dir_b.path())).expect("the admin key is there");
    let b = start(dir_b.path());
    let source = a.create("press-4");
    wait_for("the second one to know the key", || {
        (b.request("POST", "/v1/ingest/press-4/t", &source.key, &[], b"{\"n\": 0}").status == 200)
            .then_some(())
    });
    send(&a, &source, 1..100);
    send(&b, &source, 100..200);
    for gateway in [&a, &b] {
        wait_until_level(gateway);
    }
    assert_eq!(counts(), "200 200 200 0");

    // It stands still with records that it has read and not committed, which the other one commits.
    send(&a, &source, 200..250);
    signal(a.pid(), libc::SIGSTOP);
    send(&b, &source, 250..300);
    wait_until_level(&b);
    assert_eq!(counts(), "300 300 300 0");
    signal(a.pid(), libc::SIGCONT);
    send(&a, &source, 300..400);
    for gateway in [&a, &b] {
        wait_until_level(gateway);
    }
    assert_eq!(counts(), "400 400 400 0");

    // What one gateway is told of a leaked key, both leave out from then on.
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    let answer = b.post(&path, &b.admin_key(), &json!({ "since": "2020-01-01T00:00:00Z" }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    wait_for("the rows of the key to leave the lake", || (counts() == "0 0 0 -1").then_some(()));
    let answer = a.post(&path, &a.admin_key(), &json!({ "undo": true }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    wait_for("them to come back", || (counts() == "400 400 400 0").then_some(()));

    b.kill();
    send(&a, &source, 400..500);
    wait_until_level(&a);
    assert_eq!(counts(), "500 500 500 0");
}

/// The lake kept the records of a history that had ended, and took none of the new one up to where it was.
#[test]
fn a_lake_goes_back_with_a_log_that_was_put_back_and_keeps_what_is_beyond_beside_it() {
    let (mut nats, dir_a, dir_b, lake) = (NatsServer::start(), scratch(), scratch(), scratch());
    let a = setup(dir_a.path(), &nats, lake.path()).start();
    std::fs::copy(dir_a.path().join("admin.key"), dir_b.path().join("admin.key")).expect("the admin key");
    let b = setup(dir_b.path(), &nats, lake.path()).start();
    let source = a.create("press-4");
    send(&a, &source, 0..20);
    wait_until_level(&a);
    let kept = nats.keep_store();
    comes_back(&a);
    comes_back(&b);
    send(&a, &source, 20..50);
    wait_until_level(&a);
    wait_until_level(&b);
    assert_eq!(counts_of(COUNT, lake.path()), "50 50 50 0");

    nats.put_back_store(kept.path());
    refusal(&a);
    refusal(&b);
    decide(&setup(dir_a.path(), &nats, lake.path()), &["cluster", "adopt", "--yes"]);
    comes_back(&a);
    comes_back(&b);
    send(&b, &source, 50..60);
    wait_until_level(&a);
    wait_until_level(&b);
    assert_eq!(counts_of(COUNT, lake.path()), "30 30 30 0");
    assert_eq!(counts_of(COUNT_ASIDE, lake.path()), "30 30 30 20");
}
