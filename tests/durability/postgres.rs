//! PostgreSQL as a sink, with a real server: what is stored and how, that it is there once whatever is killed, that a server
//! which is away is nobody's trouble, TLS, and who may write.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::common::load::{Ledger, all_kinds, number};
use crate::common::postgres::{PASSWORD, PostgresServer};
use crate::common::tls::Identity;
use crate::common::{Gateway, Setup, Source, kept, scratch, wait_for};

const ROUNDS: usize = 12;
const WIDE_IDS: &str = include_str!("../../src/consume/sink/postgres/wide_ids.sql");

fn send(gateway: &Gateway, source: &Source, topic: &str, payload: &[u8]) -> u64 {
    let path = format!("/v1/ingest/{}/{topic}", source.id);
    let headers = [("content-type", "application/octet-stream")];
    let answer = gateway.request("POST", &path, &source.key, &headers, payload);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["last_offset"].as_u64().expect("an offset")
}

fn sink(gateway: &Gateway) -> Value {
    let sinks = gateway.get("/v1/sinks", &gateway.admin_key()).json();
    let of_postgres =
        sinks["sinks"].as_array().and_then(|sinks| sinks.iter().find(|of| of["sink"] == "postgres").cloned());
    of_postgres.expect("postgres is among the sinks")
}

/// Everything that PostgreSQL has, in order: offset, and the number in each payload.
fn numbers_in(server: &PostgresServer) -> Vec<(u64, u64)> {
    let rows = server.sql("SELECT log_offset, payload->>'n' FROM records ORDER BY log_offset");
    let number = |text: &str| text.parse().expect("a number");
    rows.iter()
        .map(|row| row.split_once('|').map(|(offset, n)| (number(offset), number(n))).expect("two"))
        .collect()
}

#[test]
fn what_is_stored_is_what_was_sent_and_a_value_that_cannot_be_stops_nothing() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway =
        server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "sqlite,postgres")).start();
    let source = gateway.create("press-4");
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let payloads: [&[u8]; 11] = [
        br#"{"t": 21.50, "state": {"rpm": 900}, "on": true, "unit": "C"}"#,
        b"on",
        b"\xff\x00\x01",
        b"",
        br#"{"a": "x\u0000y"}"#,
        br#"{"a": "\ud800"}"#,
        br#"{"big": 1e999999}"#,
        deep.as_bytes(),
        b"{\"nul\": 1}\0",
        br#"{"\u0000": 1, "t": 5}"#,
        br#"{"t": 22}"#,
    ];
    for payload in payloads {
        send(&gateway, &source, "spindle/temp", payload);
    }
    gateway.settle();
    let rows = server.sql(
        "SELECT log_offset, datasource, topic, transport, payload, payload_bytes IS NULL, payload_note FROM records ORDER BY 1",
    );
    assert_eq!(rows.len(), payloads.len());
    assert_eq!(
        rows[0],
        r#"0|press-4|spindle/temp|http|{"t": 21.50, "on": true, "unit": "C", "state": {"rpm": 900}}|t|"#
    );
    for (place, note) in [(4, "u0000"), (5, "surrogate"), (6, "numeric"), (7, "nested"), (9, "u0000")] {
        assert!(rows[place].contains("|f|it ") && rows[place].contains(note), "{}", rows[place]);
    }
    let bytes = server.sql("SELECT encode(payload_bytes, 'hex') FROM records WHERE payload_bytes IS NOT NULL ORDER BY log_offset");
    let expected: Vec<String> = payloads[1..10]
        .iter()
        .map(|payload| payload.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    assert_eq!(bytes, expected);
    assert_eq!(
        server.sql("SELECT key, value FROM samples WHERE log_offset IN (0, 10) ORDER BY log_offset, key"),
        ["on|1", "state.rpm|900", "t|21.5", "t|22"]
    );
    assert_eq!(server.sql("SELECT value, log_offset FROM latest WHERE key = 't'"), ["22|10"]);
    assert_eq!(server.sql("SELECT value FROM latest WHERE key = 'unit'"), ["\"C\""]);
    assert_eq!(sink(&gateway)["lag"], 0);
    assert_eq!(gateway.metric("headgate_sink_cursor{sink=\"postgres\"}"), payloads.len() as f64);
}

/// Payloads and names as somebody would choose them who wants the server to refuse a row: what it refuses is known before,
/// since one row that it does not take costs a transaction.
#[test]
fn no_payload_and_no_name_is_refused_by_the_server() {
    const PIECES: [&str; 36] = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        " ",
        "\n",
        "\"",
        "\"a\"",
        "\"a\":",
        "\\",
        "\\u0000",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"\\udc00\\ud800\"",
        "\"\\ud83d\\ude00\"",
        "\"\\uD83D\\u0041\"",
        "1",
        "-",
        "-0",
        "0",
        ".5",
        "1e5",
        "1E+0400",
        "1e-400",
        "1e401",
        "1e99999999999",
        "true",
        "null",
        "NaN",
        "Infinity",
        "\u{feff}",
        "\u{7f}",
        "\0",
        "\u{1}",
    ];
    let mut random = SmallRng::seed_from_u64(11);
    let mut payloads: Vec<Vec<u8>> = (0..600)
        .map(|n| {
            let count = random.random_range(1..12);
            let pieces: Vec<_> = (0..count).map(|_| PIECES[random.random_range(0..PIECES.len())]).collect();
            // Half of them are nearly JSON.
            let values = pieces.iter().filter(|piece| serde_json::from_str::<Value>(piece).is_ok());
            let text = match n % 2 {
                0 => pieces.concat(),
                _ => format!("[{}]", values.copied().collect::<Vec<_>>().join(",")),
            };
            text.into_bytes()
        })
        .collect();
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let digits = |count: usize| "7".repeat(count);
    let members: String = (0..20_000).map(|n| format!("\"k{n}\":{n},")).collect();
    payloads.extend(
        [
            nested(255),
            nested(256),
            nested(257),
            digits(999),
            digits(1_001),
            digits(100_000),
            format!("0.{}1", "0".repeat(990)),
            format!("0.{}1e-400", "0".repeat(990)),
            format!("{}e400", digits(1_000)),
            format!("[{}]", vec!["1e400"; 300].join(",")),
            format!("{{{members}\"end\":1}}"),
            format!("{{\"{}\":1}}", "k".repeat(300_000)),
            format!("\"{}\"", "x".repeat((1 << 20) - 2)),
            format!("{{\"a\":\"{}\"}}", "\\u0001".repeat(100_000)),
        ]
        .map(String::into_bytes),
    );
    payloads.extend([b"\"\xff\"".to_vec(), b"{\"a\":\"\xed\xa0\x80\"}".to_vec(), vec![0; 1 << 20]]);
    let topics =
        ["a'b\"c;--%27", "%24x", "%C2%B0(1)%5Ca", "$1", "{}", "a%20b", "%F0%9F%98%80", "x%01y", "%E2%90%80"];

    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway =
        server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "sqlite,postgres")).start();
    let source = gateway.create("press-4");
    let headers = [("content-type", "application/octet-stream")];
    let mut sent = 0;
    for (payload, topic) in payloads.iter().zip(topics.iter().cycle()) {
        let path = format!("/v1/ingest/press-4/{topic}");
        let status = gateway.request("POST", &path, &source.key, &headers, payload).status;
        // Some names are no topics.
        assert!(matches!(status, 200 | 400), "{topic}: {status}");
        sent += u64::from(status == 200);
    }
    assert!(sent > 400, "{sent}");
    gateway.settle();
    let stored = "SELECT count(*), count(*) FILTER (WHERE payload_note LIKE '%refused%') FROM records";
    assert_eq!(server.sql(stored), [format!("{sent}|0")]);
    assert!(!gateway.output().contains("cannot take a payload"));
    // What is no JSON there is what was sent, byte for byte.
    let bytes = "SELECT log_offset, encode(payload_bytes, 'hex') FROM records WHERE payload_bytes IS NOT NULL ORDER BY 1";
    let in_postgres = server.sql(bytes);
    gateway.stop();
    let in_sqlite = kept::in_storage(dir.path());
    assert!(in_postgres.len() > 100 && in_postgres.len() < in_sqlite.len() - 100, "{}", in_postgres.len());
    for row in in_postgres {
        let (offset, hex) = row.split_once('|').expect("two");
        let offset: u64 = offset.parse().expect("an offset");
        let kept = in_sqlite.iter().find(|kept| kept.offset == offset).expect("it is in SQLite");
        assert!(kept.payload.iter().map(|byte| format!("{byte:02x}")).collect::<String>() == hex, "{offset}");
    }
    let topics_of = |rows: Vec<String>| rows.into_iter().collect::<HashSet<String>>();
    let in_sqlite = topics_of(in_sqlite.into_iter().map(|kept| kept.topic).collect());
    assert_eq!(topics_of(server.sql("SELECT DISTINCT topic FROM records")), in_sqlite);
}

/// Names are the devices' to choose: what they invent goes with its records, and what is read is the same.
#[test]
fn keys_that_a_device_invents_take_no_room_of_their_own() {
    const INVENTED: u64 = 200;
    let (dir, server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres"));
    let gateway = setup.start();
    let source = gateway.create("press-4");
    let lines: String =
        (0..INVENTED).map(|n| format!("{{\"t\":{n},\"k{n}\":1,\"a\\u0000{n}\":2}}\n")).collect();
    let ndjson = [("content-type", "application/x-ndjson")];
    let publish = |gateway: &Gateway| {
        let answer = gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &ndjson, lines.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
        gateway.settle();
    };
    publish(&gateway);
    gateway.stop();
    // One that knows nothing of what is there.
    let gateway = setup.start();
    publish(&gateway);
    let sets = || server.sql("SELECT count(*) FROM key_sets").remove(0).parse::<u64>().expect("a number");
    assert!(sets() < INVENTED / 2, "{} sets of keys", sets());
    let counts = "SELECT count(*), count(DISTINCT key), sum(value) FROM samples";
    let all = format!("{}|{}|{}", 6 * INVENTED, 1 + 2 * INVENTED, INVENTED * (INVENTED - 1) + 6 * INVENTED);
    assert_eq!(server.sql(counts), std::slice::from_ref(&all));
    let points = |key: &str| {
        let path = format!("/v1/datasources/press-4/series?topic=t&key={key}&step=1d&agg=count");
        let series = gateway.get(&path, &gateway.admin_key()).json();
        let counted =
            series["points"].as_array().expect("points").iter().map(|point| point["count"].as_u64());
        counted.flatten().sum::<u64>()
    };
    assert_eq!((points("t"), points("k0"), points("k199"), points("k200")), (400, 2, 2, 0));
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    for (body, shown) in
        [(json!({ "since": "2020-01-01T00:00:00Z" }), "0|0|"), (json!({ "undo": true }), &*all)]
    {
        assert_eq!(gateway.post(&path, &gateway.admin_key(), &body).status, 200);
        assert_eq!(server.sql(counts), [shown]);
    }
    // They are of another incarnation then.
    gateway.delete("press-4");
    let ended = "SELECT count(*) FROM samples WHERE datasource = 'press-4~1'";
    wait_for("the end of the incarnation", || {
        (server.sql(ended) == [(6 * INVENTED).to_string()]).then_some(())
    });
}

/// A fleet that comes for the first time: each topic is new, and learnt with those that come with it.
#[test]
fn new_topics_that_come_together_are_stored_as_each_by_itself() {
    const TOPICS: u64 = 3_000;
    let (dir, server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres"));
    let gateway = setup.start();
    let lines: String =
        (0..TOPICS).map(|n| format!("t{n},host=a v={n},w=1\nt{n},host=a v={n}\nt{} v=1\n", n / 2)).collect();
    for source in [gateway.create("press-4"), gateway.create("press-5")] {
        let (path, text) =
            (format!("/v1/ingest/{}?precision=ns", source.id), [("content-type", "text/plain")]);
        let answer = gateway.request("POST", &path, &source.key, &text, lines.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    gateway.settle();
    let counts = "SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM topics), (SELECT count(*) FROM samples),
         (SELECT count(DISTINCT (datasource, topic)) FROM samples), (SELECT count(*) FROM latest WHERE key = 'v')";
    let topics = 2 * (TOPICS + TOPICS / 2);
    let expected = format!("{}|{topics}|{}|{topics}|{topics}", 6 * TOPICS, 8 * TOPICS);
    assert_eq!(server.sql(counts), [expected]);
    let elsewhere = "SELECT count(*) FROM samples WHERE topic ~ 'host' AND key = 'v' AND topic <> format('t%s/host=a', value)";
    assert_eq!(server.sql(elsewhere), ["0"]);
}

/// Topics and media types are the senders' to choose: what no limit counts and nothing removes fills the disk.
#[test]
fn topics_and_media_types_go_with_their_last_record() {
    const COUNT: usize = 40;
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres")).start();
    let sources = [gateway.create_open("press-4"), gateway.create_open("press-5")];
    let send_all = || {
        for n in 0..COUNT {
            for source in &sources {
                let media_type = format!("text/x-{n}");
                let path = format!("/v1/ingest/{}/new/{n}", source.id);
                let headers = [("content-type", &*media_type)];
                assert_eq!(gateway.request("POST", &path, &source.key, &headers, b"{\"t\": 1}").status, 200);
            }
        }
        gateway.settle();
    };
    let patch = |path: &str, method: &str, body: &Value| {
        let json = [("content-type", "application/json")];
        let answer = gateway.request(method, path, &gateway.admin_key(), &json, body.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    let limit = |bytes: u64| {
        patch("/v1/datasources/press-4", "PATCH", &json!({ "limits": { "stored_bytes": bytes } }));
    };
    let counts = |datasource: &str| {
        let of = format!(
            "FROM datasources d JOIN topics t ON t.datasource_id = d.id WHERE d.datasource = '{datasource}'"
        );
        let sql = format!(
            "SELECT (SELECT count(*) {of}), (SELECT count(*) FROM key_sets WHERE topic_id IN (SELECT t.id {of})),
                 (SELECT count(*) FROM origins o JOIN datasources d ON d.id = o.datasource_id
                  WHERE d.datasource = '{datasource}'),
                 (SELECT count(*) FROM records WHERE datasource = '{datasource}')"
        );
        server.sql(&sql).remove(0)
    };
    send_all();
    let all = format!("{COUNT}|{COUNT}|{COUNT}|{COUNT}");
    assert_eq!((counts("press-4"), counts("press-5")), (all.clone(), all.clone()));
    let schema = json!({ "schema": { "type": "object" } });
    patch("/v1/datasources/press-4/schema", "PUT", &schema);
    let refused = gateway.request("POST", "/v1/ingest/press-4/refused", &sources[0].key, &[], b"7");
    assert_eq!(refused.status, 422, "{}", refused.text());
    gateway.settle();
    // The one in quarantine is the newest.
    limit(70);
    wait_for("topics to go with their records", || (counts("press-4").starts_with("1|0|")).then_some(()));
    assert_eq!(server.sql("SELECT topic FROM quarantine"), ["refused"]);
    limit(1);
    wait_for("the last to go", || (counts("press-4") == "0|0|0|0").then_some(()));
    assert_eq!(server.sql("SELECT count(*) FROM key_sets"), [COUNT.to_string()]);
    assert_eq!(counts("press-5"), all);
    // What is remembered of them is what is there.
    limit(1 << 20);
    send_all();
    assert_eq!(counts("press-4"), all);
    let misnamed = "SELECT count(*) FROM records
         WHERE replace(topic, 'new/', 'text/x-') <> content_type";
    assert_eq!(server.sql(misnamed), ["0"]);
    assert_eq!(counts("press-5"), format!("{COUNT}|{COUNT}|{COUNT}|{}", 2 * COUNT));
}

/// An id is given once. 25 days of a thousand new topics a second used up what an `int` has, and everybody's storage stood
/// still for ever, since the refusal was taken for that of a value.
#[test]
fn ids_have_room_beyond_those_of_an_int_whose_end_is_told() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres"));
    let gateway = setup.start();
    let source = gateway.create("press-4");
    send(&gateway, &source, "a", br#"{"t": 1}"#);
    gateway.settle();
    gateway.stop();
    // As in large tables of an earlier format.
    server.sql("GRANT SELECT ON records TO PUBLIC");
    server.sql(&WIDE_IDS.replace("TYPE bigint", "TYPE int"));
    let gateway = setup.start();
    send(&gateway, &source, "b", br#"{"t": 2}"#);
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 2);
    server.sql("ALTER SEQUENCE topics_id_seq RESTART WITH 2147483647");
    send(&gateway, &source, "c", br#"{"t": 3}"#);
    gateway.settle();
    for topic in ["d", "e"] {
        send(&gateway, &source, topic, br#"{"t": 4}"#);
    }
    wait_for("the end of the ids to be told", || {
        let trouble = sink(&gateway)["trouble"].to_string();
        (trouble.contains("no id left") && trouble.contains("topics_id_seq")).then_some(())
    });
    server.sql(WIDE_IDS);
    gateway.settle();
    server.sql(
        "ALTER SEQUENCE origins_id_seq RESTART WITH 3000000000; ALTER SEQUENCE key_sets_id_seq RESTART WITH 3000000000",
    );
    gateway.stop();
    let gateway = setup.start();
    let headers = [("content-type", "text/x-new")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/f", &source.key, &headers, br#"{"u": 5}"#);
    assert_eq!(answer.status, 200, "{}", answer.text());
    gateway.settle();
    let ids =
        "SELECT (SELECT max(id) FROM topics), (SELECT max(id) FROM origins), (SELECT max(id) FROM key_sets)";
    let ids = server.sql(ids).remove(0);
    let ids: Vec<u64> = ids.split('|').map(|id| id.parse().expect("a number")).collect();
    assert!(ids[0] > 2_147_483_648 && ids[1] == 3_000_000_000 && ids[2] >= 3_000_000_000, "{ids:?}");
    let topics = |rows: &[Value]| rows.iter().map(|row| row["topic"].to_string()).collect::<String>();
    assert_eq!(topics(&gateway.records("press-4")), r#""a""b""c""d""e""f""#);
    for (topic, key) in [("d", "t"), ("f", "u")] {
        let path = format!("/v1/datasources/press-4/series?topic={topic}&key={key}&step=1d&agg=count");
        let series = gateway.get(&path, &gateway.admin_key()).json();
        let counts = series["points"].as_array().expect("points").iter().map(|point| point["count"].as_u64());
        assert_eq!(counts.flatten().sum::<u64>(), 1, "{series}");
    }
    let may_read = "SELECT count(*) FROM information_schema.table_privileges
         WHERE table_name = 'records' AND grantee = 'PUBLIC'";
    assert_eq!(server.sql(may_read), ["1"]);
}

/// Run by another role than the gateway's the views became that one's, and the gateway could neither read nor change them.
#[test]
fn widening_ids_leaves_the_views_to_whom_they_belong() {
    let (dir, server) = (scratch(), PostgresServer::start());
    server.sql("CREATE ROLE gate LOGIN PASSWORD 'of the gate'; GRANT CREATE ON DATABASE postgres TO gate");
    let setup = Setup::embedded_on(dir.path())
        .set("storage.sinks", "postgres")
        .set("storage.postgres.url", format!("postgres://gate@127.0.0.1:{}/postgres", server.port))
        .set("storage.postgres.password", "of the gate");
    let gateway = setup.start();
    let source = gateway.create("press-4");
    send(&gateway, &source, "a", br#"{"t": 1}"#);
    gateway.settle();
    gateway.stop();
    server.sql(
        "CREATE ROLE analyst; GRANT SELECT ON records TO analyst WITH GRANT OPTION; GRANT SELECT (topic) ON latest TO PUBLIC;
         ALTER VIEW samples SET (security_barrier = true)",
    );
    let views = || {
        server.sql(
            "SELECT relname, pg_get_userbyid(relowner), relacl, reloptions,
                 (SELECT string_agg(attname || attacl::text, ' ') FROM pg_attribute WHERE attrelid = c.oid)
             FROM pg_class c WHERE relkind = 'v' AND relnamespace = 'headgate'::regnamespace ORDER BY relname",
        )
    };
    let before = views();
    assert_eq!(before.len(), 4, "{before:?}");
    // By a superuser.
    server.sql(&WIDE_IDS.replace("TYPE bigint", "TYPE int"));
    assert_eq!(views(), before);
    server.sql(WIDE_IDS);
    assert_eq!(views(), before);
    assert_eq!(server.sql("SET ROLE gate; SELECT topic FROM records"), ["a"]);
    let gateway = setup.start();
    send(&gateway, &source, "b", br#"{"t": 2}"#);
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 2);
}

/// The rows of a hypertable are in other tables, which were not counted: a start wrote all of them anew under a lock.
#[test]
fn ids_stay_as_they_are_where_rows_are_in_other_tables() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres"));
    let gateway = setup.start();
    let source = gateway.create("press-4");
    send(&gateway, &source, "a", br#"{"t": 1}"#);
    gateway.settle();
    gateway.stop();
    server.sql("CREATE TABLE public.chunk () INHERITS (sample_rows)");
    for (change, is_wide) in [("SELECT", false), ("DROP TABLE public.chunk", true)] {
        // As format 3 has them.
        server.sql(&WIDE_IDS.replace("TYPE bigint", "TYPE int"));
        server.sql(
            "DROP INDEX quarantined_topic;
             ALTER TABLE origins DROP COLUMN datasource_id, DROP COLUMN used_below, ADD UNIQUE (key_id, transport, content_type);
             UPDATE headgate_format SET version = 3",
        );
        server.sql(change);
        let gateway = setup.start();
        wait_for("the tables to be brought up to date", || {
            (server.sql("SELECT version FROM headgate_format") == ["4"]).then_some(())
        });
        gateway.stop();
        for table in ["entries", "sample_rows"] {
            let kind = format!(
                "SELECT format_type(atttypid, NULL) FROM pg_attribute
                 WHERE attrelid = 'headgate.{table}'::regclass AND attname = 'topic_id'"
            );
            assert_eq!(server.sql(&kind), [if is_wide { "bigint" } else { "integer" }], "{table}");
        }
    }
}

#[test]
fn leak_surgery_its_undo_deletion_and_purge_reach_it() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway =
        server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "sqlite,postgres")).start();
    let source = gateway.create("press-4");
    for n in 0..10 {
        send(&gateway, &source, "t", json!({ "n": n }).to_string().as_bytes());
    }
    gateway.settle();
    let counts = || {
        server
            .sql(
                "SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM quarantine), (SELECT count(*) FROM samples),
                    (SELECT count(*) FROM withheld_samples), (SELECT value FROM latest)",
            )
            .remove(0)
    };
    assert_eq!(counts(), "10|0|10|0|9");
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    let answer = gateway.post(&path, &gateway.admin_key(), &json!({ "since": "2020-01-01T00:00:00Z" }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(counts(), "0|10|0|10|");
    // What comes in under the key later is not covered.
    send(&gateway, &source, "t", br#"{"n": 10}"#);
    gateway.settle();
    assert_eq!(counts(), "1|10|1|10|10");
    let answer = gateway.post(&path, &gateway.admin_key(), &json!({ "undo": true }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(counts(), "11|0|11|0|10");

    gateway.delete("press-4");
    wait_for("the end of the incarnation", || {
        (server.sql("SELECT DISTINCT datasource FROM records") == ["press-4~1"]).then_some(())
    });
    let again = gateway.create("press-4");
    send(&gateway, &again, "t", br#"{"n": 11}"#);
    gateway.settle();
    assert_eq!(server.sql("SELECT value FROM samples WHERE datasource = 'press-4'"), ["11"]);
    let purge = gateway.request(
        "DELETE",
        "/v1/datasources/press-4?incarnation=1&purge=true",
        &gateway.admin_key(),
        &[],
        b"",
    );
    assert!(matches!(purge.status, 200 | 202), "{}", purge.text());
    wait_for("the purge", || (counts() == "1|0|1|0|11").then_some(()));
    assert_eq!(server.sql("SELECT datasource FROM datasources"), ["press-4"]);
}

/// A gateway that is killed, and then a server that is, in every round and under load.
#[test]
fn what_was_acknowledged_is_there_once_whatever_is_killed() {
    let (dir, mut server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "sqlite,postgres"));
    let mut random = SmallRng::seed_from_u64(15);
    let mut pause = |from, to| std::thread::sleep(Duration::from_millis(random.random_range(from..to)));
    let ledger = Arc::new(Ledger::default());
    let mut acked = Vec::new();
    let mut gateway = setup.start();
    let source = gateway.create("press-4");
    for _ in 0..ROUNDS {
        let before = ledger.acked();
        let cursor = sink(&gateway)["cursor"].as_u64();
        let senders = all_kinds(&gateway, &source, &ledger);
        wait_for("the first ack of the round", || (ledger.acked() > before).then_some(()));
        // The server is back from the round before, and something is stored.
        wait_for("records to come to the server", || {
            (sink(&gateway)["cursor"].as_u64() > cursor).then_some(())
        });
        pause(0, 100);
        server.kill();
        // It begins again by itself, whatever the gateway does meanwhile.
        server.begin_again();
        pause(0, 250);
        gateway.kill();
        for sender in senders {
            let sent = sender.join().expect("a sender saw only acks, and then the end");
            assert_eq!(sent.goodbye, None, "a sink that is away is nobody's trouble");
            acked.extend(sent.acked);
        }
        gateway = setup.start();
    }
    gateway.settle();
    gateway.stop();
    server.wait_until_up();
    let in_log: Vec<_> =
        kept::in_log(dir.path()).iter().map(|record| (record.offset, number(&record.payload))).collect();
    assert!(acked.len() > ROUNDS * 50, "the gateway was under load: {} acks", acked.len());
    let stored = numbers_in(&server);
    assert!(
        stored == in_log,
        "PostgreSQL holds what the log holds, offset by offset: {} of {}",
        stored.len(),
        in_log.len()
    );
    let stored: HashSet<u64> = stored.into_iter().map(|(_, n)| n).collect();
    assert!(acked.iter().all(|n| stored.contains(n)), "nothing that was acknowledged is missing");
    let samples = server.sql("SELECT count(*), count(DISTINCT log_offset) FROM samples");
    assert_eq!(samples, [format!("{0}|{0}", in_log.len())]);
}

#[test]
fn a_server_that_is_away_is_seen_and_caught_up_with() {
    let (dir, mut server) = (scratch(), PostgresServer::start());
    let setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "sqlite,postgres"));
    let gateway = setup.start();
    let source = gateway.create("press-4");
    send(&gateway, &source, "t", br#"{"n": 0}"#);
    gateway.settle();
    server.kill();
    let begun = Instant::now();
    for n in 1..50 {
        send(&gateway, &source, "t", json!({ "n": n }).to_string().as_bytes());
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
    let state =
        wait_for("the trouble to show", || Some(sink(&gateway)).filter(|sink| sink["trouble"].is_string()));
    assert!(state["lag"].as_u64() > Some(0), "{state}");
    let ready = gateway.get("/readyz", "");
    assert!(ready.status == 200 && ready.text().contains("PostgreSQL at 127.0.0.1"), "{}", ready.text());
    assert_eq!(gateway.metric("headgate_sink_up{sink=\"postgres\"}"), 0.0);
    wait_for("SQLite goes on", || {
        (gateway.metric("headgate_sink_cursor{sink=\"sqlite\"}") == 50.0).then_some(())
    });
    server.resume();
    gateway.settle();
    assert_eq!(numbers_in(&server), (0..50).map(|n| (n, n)).collect::<Vec<_>>());
    let state = sink(&gateway);
    assert!(state["trouble"].is_null() && state["last_error"]["error"].is_string(), "{state}");
    gateway.stop();

    // A start does not wait for it, and a password that is wrong is told without being shown.
    let gateway = setup.clone().set("storage.postgres.password", "wr0ng-passw0rd").start();
    let state =
        wait_for("the trouble to show", || Some(sink(&gateway)).filter(|sink| sink["trouble"].is_string()));
    assert!(state["trouble"].as_str().is_some_and(|words| words.contains("28P01")), "{state}");
    send(&gateway, &source, "t", br#"{"n": 50}"#);
    let output = gateway.stop().output;
    assert!(!output.contains("wr0ng-passw0rd") && !output.contains(PASSWORD), "{output}");
    let gateway = setup.start();
    gateway.settle();
    assert_eq!(numbers_in(&server).len(), 51);
}

#[test]
fn a_second_gateway_with_another_log_writes_nothing() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres")).start();
    let source = gateway.create("press-4");
    send(&gateway, &source, "t", br#"{"n": 0}"#);
    gateway.settle();
    let second = scratch();
    let setup = server.stored_into(Setup::embedded_on(second.path()).set("storage.sinks", "postgres"));
    let other = setup.start();
    let source = other.create("press-5");
    for n in 1..5 {
        send(&other, &source, "t", json!({ "n": n }).to_string().as_bytes());
    }
    let trouble = |gateway: &Gateway| sink(gateway)["trouble"].as_str().map(str::to_owned);
    let words = wait_for("the second one to see that", || trouble(&other));
    assert!(words.contains("another gateway writes") || words.contains("does not fit the log"), "{words}");
    gateway.stop();
    // Also once the first one has gone: what is there is not of this log.
    other.kill();
    let other = setup.start();
    let words = wait_for("it to see that", || trouble(&other));
    assert!(words.contains("does not fit the log"), "{words}");
    assert_eq!(numbers_in(&server), [(0, 0)]);
}

#[test]
fn tls_is_verified_as_sslmode_says() {
    let certificates = scratch();
    let issuer = Identity::issuer(certificates.path(), "issuer");
    let (of_server, other) =
        (issuer.issue(certificates.path(), "server"), Identity::issuer(certificates.path(), "other"));
    let mut server = PostgresServer::start();
    let read = |path| std::fs::read(path).expect("a certificate");
    let certificate = server.put_file("server.pem", &read(&of_server.certificate));
    let key = server.put_file("server.key", &read(&of_server.key));
    server.use_tls(&certificate, &key);
    let gateway_with = |ssl_mode: &str, ca: Option<&Identity>| {
        let dir = scratch();
        let mut setup = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres"));
        setup = setup.set("storage.postgres.url", format!("{}?sslmode={ssl_mode}", server.url()));
        setup = setup.set("storage.postgres.schema", ssl_mode);
        if let Some(ca) = ca {
            setup = setup.set("storage.postgres.ca", ca.certificate.display());
        }
        (setup.start(), dir)
    };
    for (ssl_mode, ca) in [
        ("disable", None),
        ("prefer", None),
        ("require", None),
        ("verify-ca", Some(&issuer)),
        ("verify-full", Some(&issuer)),
    ] {
        let (gateway, _dir) = gateway_with(ssl_mode, ca);
        let source = gateway.create("press-4");
        send(&gateway, &source, "t", br#"{"n": 0}"#);
        gateway.settle();
        let is_tls = server.sql(
            "SELECT bool_or(s.ssl) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE a.application_name = 'headgate'",
        );
        assert_eq!(is_tls, [if ssl_mode == "disable" { "f" } else { "t" }], "{ssl_mode}");
    }
    for ssl_mode in ["require", "verify-ca", "verify-full"] {
        let (gateway, _dir) = gateway_with(ssl_mode, Some(&other));
        let words = wait_for("the certificate to be refused", || {
            sink(&gateway)["trouble"].as_str().map(str::to_owned)
        });
        assert!(words.contains("certificate"), "{ssl_mode}: {words}");
    }
}

#[test]
fn a_certificate_of_the_gateways_own_is_shown_to_a_server_that_wants_one() {
    let certificates = scratch();
    let issuer = Identity::issuer(certificates.path(), "issuer");
    let of_server = issuer.issue(certificates.path(), "server");
    let of_gateway = issuer.issue(certificates.path(), "headgate");
    let mut server = PostgresServer::start();
    let read = |path| std::fs::read(path).expect("a certificate");
    let certificate = server.put_file("server.pem", &read(&of_server.certificate));
    let key = server.put_file("server.key", &read(&of_server.key));
    let trusted = server.put_file("issuer.pem", &read(&issuer.certificate));
    server.use_tls(&certificate, &key);
    server.want_certificates(&trusted);
    let identity = |key: &std::path::Path| {
        format!("sslcert={}&sslkey={}", of_gateway.certificate.display(), key.display())
    };
    let start = |parameters: &str| {
        let dir = scratch();
        let url = format!("{}?sslmode=require&{parameters}", server.url());
        let setup = Setup::embedded_on(dir.path()).set("storage.sinks", "postgres");
        (setup.set("storage.postgres.url", url).start(), dir)
    };
    let (gateway, _dir) = start(&identity(&of_gateway.key));
    let source = gateway.create("press-4");
    send(&gateway, &source, "t", br#"{"n": 0}"#);
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 1);
    gateway.stop();
    for (parameters, expected) in
        [(String::new(), "certificate"), (identity(&certificates.path().join("no.key")), "no.key")]
    {
        let (gateway, _dir) = start(&parameters);
        let words = wait_for("it to be refused", || sink(&gateway)["trouble"].as_str().map(str::to_owned));
        assert!(words.contains(expected), "{parameters}: {words}");
    }
}

/// The dashboard's own queries, as Grafana would send them.
#[test]
fn the_queries_of_the_dashboard_give_what_is_stored() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = server.stored_into(Setup::embedded_on(dir.path()).set("storage.sinks", "postgres")).start();
    let source = gateway.create("press-4");
    for n in 0..3 {
        send(&gateway, &source, "spindle", json!({ "n": n, "on": true }).to_string().as_bytes());
    }
    gateway.settle();
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/grafana/postgres/dashboard.json");
    let dashboard: Value =
        serde_json::from_slice(&std::fs::read(path).expect("the dashboard")).expect("JSON");
    let asked = |query: &Value| {
        let mut sql = query.as_str().expect("a query").to_owned();
        for (macro_, stands_for) in [
            ("$__timeGroup(time, $__interval)", "floor(extract(epoch FROM time) / 60) * 60"),
            ("$__timeGroup(received_at, '1m')", "floor(extract(epoch FROM received_at) / 60) * 60"),
            ("$__timeFilter(time)", "time BETWEEN now() - interval '1 hour' AND now()"),
            ("$__timeFilter(received_at)", "received_at BETWEEN now() - interval '1 hour' AND now()"),
            ("${source:sqlstring}", "'press-4'"),
            ("${topic:sqlstring}", "'spindle'"),
            ("${key:sqlstring}", "'n','on'"),
        ] {
            sql = sql.replace(macro_, stands_for);
        }
        assert!(!sql.contains('$'), "{sql}");
        server.sql(&sql)
    };
    let variables: Vec<_> = dashboard["templating"]["list"]
        .as_array()
        .expect("variables")
        .iter()
        .map(|of| asked(&of["query"]))
        .collect();
    assert_eq!(variables, [vec!["press-4"], vec!["spindle"], vec!["n", "on"]]);
    let panels: Vec<_> = dashboard["panels"]
        .as_array()
        .expect("panels")
        .iter()
        .map(|of| asked(&of["targets"][0]["rawSql"]))
        .collect();
    assert!(
        panels[0].iter().any(|row| row.contains("|n|")) && panels[0].iter().any(|row| row.contains("|on|1")),
        "{panels:?}"
    );
    assert!(panels[1].iter().all(|row| row.contains("|press-4|")) && !panels[1].is_empty(), "{panels:?}");
    assert!(panels[2][0].starts_with("spindle|n|2|"), "{panels:?}");
}
