//! One PostgreSQL for all gateways of a cluster: one of them writes, another takes its place, and whoever was cut off
//! changes nothing.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common::nats::NatsServer;
use crate::common::postgres::PostgresServer;
use crate::common::{Gateway, Setup, Source, scratch, signal, wait_for};
use crate::sinks::{send, sink};

/// Longer than a gateway keeps its place without a sign of life.
const STOPPED: Duration = Duration::from_secs(13);

/// Two gateways of a cluster that store into one PostgreSQL; the first one writes, and both have let in a message with 0.
fn pair(
    nats: &NatsServer,
    server: &PostgresServer,
    dirs: [&std::path::Path; 2],
) -> (Gateway, Gateway, Source) {
    let start = |dir: &std::path::Path| {
        let setup = Setup::embedded_on(dir)
            .set("log.backend", "jetstream")
            .set("nats.servers", format!("[\"{}\"]", nats.url()))
            .set("storage.sinks", "postgres");
        server.stored_into(setup).start()
    };
    let a = start(dirs[0]);
    wait_for("the first one to write", || {
        (sink(&a)["is_writer"] == true
            && server
                .try_sql("SELECT 1 FROM sink WHERE owner IS NOT NULL")
                .is_ok_and(|rows| !rows.is_empty()))
        .then_some(())
    });
    // The cluster's first gateway has made the admin key for all.
    let admin_key = |dir: &std::path::Path| dir.join("admin.key");
    std::fs::copy(admin_key(dirs[0]), admin_key(dirs[1])).expect("the admin key is there");
    let b = start(dirs[1]);
    let source = a.create("press-4");
    wait_for("the second one to know the key", || {
        (b.request("POST", "/v1/ingest/press-4/t", &source.key, &[], b"{\"n\": 0}").status == 200)
            .then_some(())
    });
    (a, b, source)
}

#[test]
fn gateways_share_it_and_one_that_stood_still_writes_nothing_twice() {
    let (nats, server) = (NatsServer::start(), PostgresServer::start());
    let (dir_a, dir_b) = (scratch(), scratch());
    let (a, b, source) = pair(&nats, &server, [dir_a.path(), dir_b.path()]);
    send(&a, &source, 1..100);
    wait_for("the second one to see that the first one writes", || {
        let sink = sink(&b);
        (sink["is_writer"] == false && sink["lag"] == 0).then_some(())
    });

    signal(a.pid(), libc::SIGSTOP);
    send(&b, &source, 100..200);
    std::thread::sleep(STOPPED);
    send(&b, &source, 200..300);
    wait_for("the second one to write", || {
        let sink = sink(&b);
        (sink["is_writer"] == true && sink["lag"] == 0).then_some(())
    });
    signal(a.pid(), libc::SIGCONT);
    send(&a, &source, 300..400);
    wait_for("the first one to see that", || {
        let sink = sink(&a);
        (sink["is_writer"] == false && sink["lag"] == 0).then_some(())
    });

    // A gateway that ends gives its place away at once; so does one whose connection has ended.
    b.kill();
    send(&a, &source, 400..500);
    wait_for("the first one to write again", || {
        let sink = sink(&a);
        (sink["is_writer"] == true && sink["lag"] == 0).then_some(())
    });
    let rows = server.sql("SELECT count(*), count(DISTINCT payload->>'n'), min(payload->>'n'), count(DISTINCT log_offset) FROM records");
    assert_eq!(rows, ["500|500|0|500"]);
    assert_eq!(server.sql("SELECT count(*) FROM samples"), ["500"]);
}

#[test]
fn all_answer_from_it_and_one_removes_what_is_over_a_limit() {
    let (nats, server) = (NatsServer::start(), PostgresServer::start());
    let (dir_a, dir_b) = (scratch(), scratch());
    let (a, b, source) = pair(&nats, &server, [dir_a.path(), dir_b.path()]);
    send(&a, &source, 1..30);
    send(&b, &source, 30..60);
    let admin = a.admin_key();
    let page = |gateway: &Gateway| {
        let answer = gateway.get("/v1/datasources/press-4/records?limit=1000", &admin);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let count = |page: &Value| page["records"].as_array().map(Vec::len);
    wait_for("all to be stored", || (count(&page(&a)) == Some(60)).then_some(()));
    assert_eq!(page(&a), page(&b));
    // What 20 of them take.
    let limits = json!({ "limits": { "stored_bytes": 20 * (64 + 9) } }).to_string();
    let headers = [("content-type", "application/json")];
    let answer = b.request("PATCH", "/v1/datasources/press-4", &admin, &headers, limits.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let left = wait_for("the oldest to be removed", || {
        Some(page(&b)).filter(|page| count(page) <= Some(20) && page["removed_below"].is_u64())
    });
    assert_eq!(page(&a), left);
    assert_eq!(count(&left), Some(20), "{left}");
    assert_eq!(left["records"][19]["payload"]["n"], 59);
    assert_eq!(server.sql("SELECT count(*) FROM samples"), ["20"]);
}
