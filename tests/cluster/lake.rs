//! One Delta lake for all gateways of a cluster: whoever commits first writes, another one takes its place, and whoever was
//! cut off writes nothing twice.

use serde_json::json;

use crate::common::nats::NatsServer;
use crate::common::{Gateway, Setup, python, scratch, wait_for};
use crate::sinks::{send, signal, sink};

/// Prints how many rows there are, how many offsets and how many different numbers, and the least of these.
const COUNT: &str = r#"
import os, sys, json, deltalake
rows = deltalake.DeltaTable(sys.argv[1]).to_pyarrow_table().to_pylist()
numbers = [json.loads(r["payload"])["n"] for r in rows]
print(len(rows), len({r["offset"] for r in rows}), len(set(numbers)), min(numbers, default=-1), flush=True)
os._exit(0)
"#;

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
    let start = |dir: &std::path::Path| {
        Setup::embedded_on(dir)
            .set("log.backend", "jetstream")
            .set("nats.servers", format!("[\"{}\"]", nats.url()))
            .set("storage.sinks", "delta")
            .set("storage.delta.place", lake.path().display())
            .set("storage.delta.interval_s", 1)
            .start()
    };
    let counts = || {
        let output = python(COUNT, &[lake.path().to_str().expect("a path in UTF-8")]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let a = start(dir_a.path());
    let admin_key = |dir: &std::path::Path| dir.join("admin.key");
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
    signal(&a, libc::SIGSTOP);
    send(&b, &source, 250..300);
    wait_until_level(&b);
    assert_eq!(counts(), "300 300 300 0");
    signal(&a, libc::SIGCONT);
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
