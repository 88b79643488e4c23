//! Reads that are answered from PostgreSQL: the same answers as from SQLite, whatever is asked; nothing that a slow client
//! holds there; a server that is away, which is said with what to do; tables of an earlier format. They guard against two
//! stores that drift apart, and against readers that hold up the one that writes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::postgres::PostgresServer;
use crate::common::{Answer, Gateway, PATIENCE, Setup, Source, scratch, wait_for};

const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

fn both(server: &PostgresServer, dir: &std::path::Path, read_from: &str) -> Gateway {
    let setup = Setup::embedded_on(dir).set("storage.sinks", "sqlite,postgres");
    server.stored_into(setup).set("storage.read_from", read_from).start()
}

fn post(gateway: &Gateway, key: &str, topic: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    gateway.request("POST", &format!("/v1/ingest/press-4/{topic}"), key, headers, body)
}

/// Records of several topics, keys and shapes, with event times and without, in quarantine and not. JSON is written as
/// `jsonb` writes it.
fn fill(gateway: &Gateway) -> (Source, String) {
    let source = gateway.create_open("press-4");
    let admin = gateway.admin_key();
    let other = gateway.post("/v1/datasources/press-4/keys", &admin, &json!({ "label": "other" })).json();
    let other_key = other["key"]["secret"].as_str().expect("a secret").to_owned();
    for n in 0..300_u32 {
        let topic = ["spindle/temp", "spindle/rpm", "spindle", "%C2%B0(1)/a.b", "door"][n as usize % 5];
        let key = if n % 7 == 0 { &other_key } else { &source.key };
        let said = format!("2026-11-23T09:{:02}:{:02}Z", n / 60, n * 37 % 60);
        let is_json = !matches!(n % 11, 3 | 4);
        let with_time = [("content-type", "application/json"), ("event-time", &*said)];
        let headers = match n % 3 {
            0 => &[][..],
            1 if is_json => &with_time[..],
            1 => &with_time[1..],
            _ => &with_time[..usize::from(is_json)],
        };
        let body = match n % 11 {
            3 => format!("text {n}").into_bytes(),
            4 => vec![0xff, 0, u8::try_from(n % 256).expect("small")],
            5 => n.to_string().into_bytes(),
            _ => format!("{{\"n\": {n}, \"on\": {}, \"deep\": {{\"x\": {}.50}}}}", n % 2 == 0, n % 13)
                .into_bytes(),
        };
        let answer = post(gateway, key, topic, headers, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let lines = "cpu,host=a v=1 1795426119000000000\ncpu,host=a v=2.5 1795426179000000000";
    let headers = [("content-type", "text/plain")];
    let answer =
        gateway.request("POST", "/v1/ingest/press-4?precision=ns", &source.key, &headers, lines.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let schema = json!({ "schema": { "type": "object" } }).to_string();
    let json = [("content-type", "application/json")];
    let path = "/v1/datasources/press-4/schema";
    let answer = gateway.request("PUT", path, &admin, &json, schema.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    for body in [&b"7"[..], b"\"x\"", b"\xff"] {
        assert_eq!(post(gateway, &source.key, "refused/a", &[], body).status, 422);
    }
    gateway.settle();
    (source, other["key"]["id"].as_str().expect("an id").to_owned())
}

/// Everything that can be asked, as paths.
fn questions(other_key: &str) -> Vec<String> {
    let mut paths = Vec::new();
    let topics = [
        "",
        "topic=spindle%2Ftemp",
        "topic=spindle%2F%23",
        "topic=%2B",
        "topic=%2B%2Frpm",
        "topic=%23",
        "topic=no",
        "topic=%C2%B0(1)%2F%2B",
        "topic=a%00b",
        "topic=a%00%2F%23",
    ];
    let ranges = [
        "",
        "from=2026-01-01T00:00:00Z",
        "to=2026-01-01T00:00:00Z",
        "event_from=2026-11-23T09:01:00Z&event_to=2026-11-23T09:03:30Z",
        "event_to=2026-11-23T09:02:00Z",
        "from_offset=20&to_offset=200",
    ];
    let key = format!("key_id={other_key}");
    for topic in topics {
        for range in ranges {
            for more in [
                "",
                "order=newest",
                &key,
                "limit=7",
                "order=newest&limit=3&cursor=150",
                "format=csv",
                "format=ndjson&order=newest",
            ] {
                paths.push(format!("records?{topic}&{range}&{more}"));
            }
        }
    }
    for agg in ["avg", "min", "max", "first", "last", "count", "sum"] {
        for (topic, key) in [
            ("spindle%2Ftemp", "n"),
            ("door", "deep.x"),
            ("spindle", ""),
            ("cpu%2Fhost=a", "v"),
            ("no", "n"),
            ("door", "a%00"),
        ] {
            for range in
                ["", "step=30s&points=10000", "from=2026-11-23T09:01:00Z&to=2026-11-23T09:02:00Z&step=7s"]
            {
                paths.push(format!("series?topic={topic}&key={key}&agg={agg}&{range}"));
            }
        }
    }
    for path in [
        "latest?",
        "latest?after_topic=door",
        "latest?after_topic=a%00",
        "schema?",
        "quarantine?",
        "quarantine?limit=2",
        "quarantine?topic=refused%2F%2B",
        "quarantine?topic=other",
    ] {
        paths.push(path.to_owned());
    }
    paths
        .into_iter()
        .map(|path| format!("/v1/datasources/press-4/{path}").replace("?&", "?").replace("&&", "&"))
        .collect()
}

#[test]
fn whatever_is_asked_the_answers_are_those_of_sqlite() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = both(&server, dir.path(), "sqlite");
    let (_, other_key) = fill(&gateway);
    let admin = gateway.admin_key();
    let questions = questions(&other_key);
    let ask_all = |gateway: &Gateway| -> Vec<(u16, String)> {
        let ask = |path: &String| {
            let answer = gateway.get(path.trim_end_matches(['&', '?']), &admin);
            (answer.status, answer.text())
        };
        // On a few connections at once.
        std::thread::scope(|scope| {
            let parts = questions.chunks(questions.len().div_ceil(4));
            let asking: Vec<_> =
                parts.map(|part| scope.spawn(move || part.iter().map(ask).collect::<Vec<_>>())).collect();
            asking.into_iter().flat_map(|part| part.join().expect("all are answered")).collect()
        })
    };
    let compare = |of_sqlite: &[(u16, String)], of_postgres: &[(u16, String)]| {
        let mut rows = 0;
        for ((question, sqlite), postgres) in questions.iter().zip(of_sqlite).zip(of_postgres) {
            assert_eq!(postgres, sqlite, "{question}");
            rows += usize::from(sqlite.0 == 200 && sqlite.1.len() > 200);
        }
        assert!(rows > questions.len() / 4, "{rows} of {} have an answer", questions.len());
    };
    let of_sqlite = ask_all(&gateway);
    gateway.stop();
    let gateway = both(&server, dir.path(), "postgres");
    compare(&of_sqlite, &ask_all(&gateway));

    // Also after leak surgery and its undo, and with what retention has left.
    let path = format!("/v1/datasources/press-4/keys/{other_key}/quarantine");
    let leaked = gateway.post(&path, &admin, &json!({ "since": "2020-01-01T00:00:00Z" }));
    assert_eq!(leaked.status, 200, "{}", leaked.text());
    let of_postgres = (ask_all(&gateway), leaked.json());
    gateway.stop();
    let gateway = both(&server, dir.path(), "sqlite");
    compare(&ask_all(&gateway), &of_postgres.0);
    let again = gateway.post(&path, &admin, &json!({ "since": "2020-01-01T00:00:00Z" })).json();
    assert_eq!(of_postgres.1, again);
    assert_eq!(gateway.post(&path, &admin, &json!({ "undo": true })).status, 200);
    compare(&of_sqlite, &ask_all(&gateway));
    let limits = json!({ "limits": { "stored_bytes": 12_000 } }).to_string();
    let json = [("content-type", "application/json")];
    assert_eq!(
        gateway.request("PATCH", "/v1/datasources/press-4", &admin, &json, limits.as_bytes()).status,
        200
    );
    let removed = |gateway: &Gateway| {
        gateway.get("/v1/datasources/press-4/records?limit=1", &admin).json()["removed_below"].as_u64()
    };
    let below = wait_for("SQLite to have removed the oldest", || removed(&gateway));
    wait_for("PostgreSQL to have removed the oldest", || {
        (server.sql("SELECT max(removed_below) FROM retention") == [below.to_string()]).then_some(())
    });
    let of_sqlite = ask_all(&gateway);
    gateway.stop();
    let gateway = both(&server, dir.path(), "postgres");
    compare(&of_sqlite, &ask_all(&gateway));
}

#[test]
fn a_slow_client_holds_no_transaction_and_readers_are_few() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = both(&server, dir.path(), "postgres");
    let source = gateway.create_open("press-4");
    let padding = "x".repeat(4_000);
    for first in (0..3_600).step_by(1_200) {
        let lines: String =
            (first..first + 1_200).map(|n| format!("{{\"n\": {n}, \"x\": \"{padding}\"}}\n")).collect();
        assert_eq!(post(&gateway, &source.key, "a", &[NDJSON], lines.as_bytes()).status, 200);
    }
    gateway.settle();
    // More than there are connections.
    let mut slow: Vec<TcpStream> = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(gateway.http).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let path = "/v1/datasources/press-4/records?format=ndjson";
        let head = format!("GET {path} HTTP/1.0\r\nauthorization: {}\r\n\r\n", source.key);
        stream.write_all(head.as_bytes()).expect("sent");
        stream.read_exact(&mut [0; 4096]).expect("the beginning");
        slow.push(stream);
    }
    wait_for("no transaction to be open", || {
        let open = "SELECT count(*) FROM pg_stat_activity
            WHERE application_name = 'headgate' AND xact_start IS NOT NULL AND query NOT LIKE 'COPY%'";
        (server.sql(open) == ["0"]).then_some(())
    });
    let connections: u32 = server
        .sql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'headgate%'")[0]
        .parse()
        .expect("a number");
    assert!(connections <= 6, "two that write and four that read: {connections}");
    // Each goes on to its end.
    for stream in &mut slow {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("the rest");
        assert!(rest.lines().last().is_some_and(|line| line.contains("\"n\": 3599")), "to the end");
    }
}

#[test]
fn a_server_that_is_away_is_said_with_what_to_do_and_is_read_again_when_it_is_back() {
    let (dir, mut server) = (scratch(), PostgresServer::start());
    let gateway = both(&server, dir.path(), "postgres");
    let source = gateway.create_open("press-4");
    for n in 0..10 {
        assert_eq!(post(&gateway, &source.key, "a", &[], format!("{{\"n\": {n}}}").as_bytes()).status, 200);
    }
    gateway.settle();
    let admin = gateway.admin_key();
    let paths = ["records", "records?format=csv", "latest", "series?topic=a&key=n", "quarantine", "schema"];
    let ask = |path: &str| gateway.get(&format!("/v1/datasources/press-4/{path}"), &admin);
    for path in paths {
        assert_eq!(ask(path).status, 200, "{path}");
    }
    server.kill();
    let begun = Instant::now();
    for path in paths {
        let answer = ask(path);
        assert_eq!(answer.status, 503, "{path}: {}", answer.text());
        let retry: u64 = answer.headers["retry-after"].parse().expect("seconds");
        assert!((1..60).contains(&retry), "{retry}");
        let problem = answer.json();
        assert!(problem["detail"].as_str().is_some_and(|words| words.contains("PostgreSQL")), "{problem}");
        assert!(!answer.text().contains(&server.port.to_string()), "not where it is: {problem}");
        // Devices go on as ever.
        assert_eq!(post(&gateway, &source.key, "a", &[], b"{\"n\": 10}").status, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let refusals = gateway.get("/v1/refusals", &admin).text();
    assert!(refusals.contains("store_away"), "{refusals}");
    server.resume();
    wait_for("reads to be answered again", || {
        let page = ask("records?limit=100");
        (page.status == 200 && page.json()["records"].as_array().map(Vec::len) == Some(16)).then_some(())
    });
    // Connections that were idle when the server was restarted are no trouble.
    server.kill();
    server.resume();
    wait_for("reads to be answered again", || (ask("records").status == 200).then_some(()));
}

/// A table of format 1 has no sizes of payloads and no index of times.
#[test]
fn tables_of_an_earlier_format_are_brought_up_to_date_and_read() {
    let (dir, server) = (scratch(), PostgresServer::start());
    let gateway = both(&server, dir.path(), "sqlite");
    fill(&gateway);
    let admin = gateway.admin_key();
    gateway.stop();
    // What that was.
    server.sql(
        "ALTER TABLE entries DROP COLUMN payload_size; ALTER TABLE quarantined DROP COLUMN payload_size;
         DROP TABLE time_index; DROP TABLE retention; DROP INDEX entries_event;
         DROP TABLE sample_lane; ALTER TABLE sink DROP COLUMN samples_from;
         DROP INDEX quarantined_topic; INSERT INTO topics (datasource_id, topic, latest_offset) VALUES (1, 'of no record', -1);
         ALTER TABLE origins DROP COLUMN datasource_id, DROP COLUMN used_below, ADD UNIQUE (key_id, transport, content_type);
         CREATE TABLE series (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, topic_id int NOT NULL,
             key text COLLATE \"C\" NOT NULL, UNIQUE (topic_id, key));
         CREATE TABLE sample_values (time timestamptz NOT NULL, log_offset bigint NOT NULL,
             value double precision NOT NULL, series_id int NOT NULL);
         INSERT INTO series (topic_id, key) SELECT DISTINCT k.topic_id, n.key FROM key_sets k, unnest(k.keys) AS n (key);
         INSERT INTO sample_values SELECT r.time, r.log_offset, n.value, s.id
             FROM sample_rows r JOIN key_sets k ON k.id = r.key_set_id
             CROSS JOIN LATERAL unnest(k.keys, r.numbers) AS n (key, value)
             JOIN series s ON s.topic_id = r.topic_id AND s.key = n.key;
         CREATE OR REPLACE VIEW samples AS SELECT d.datasource, t.topic, s.key, v.time, v.value, v.log_offset
             FROM sample_values v JOIN series s ON s.id = v.series_id JOIN topics t ON t.id = s.topic_id
             JOIN datasources d ON d.id = t.datasource_id;
         DROP TABLE sample_rows, withheld_samples, key_sets;
         CREATE TABLE withheld_samples (LIKE sample_values);
         CREATE INDEX sample_values_offset ON sample_values USING brin (log_offset) WITH (pages_per_range = 32);
         UPDATE headgate_format SET version = 1",
    );
    let gateway = both(&server, dir.path(), "postgres");
    let path = "/v1/datasources/press-4/records?from=2020-01-01T00:00:00Z&limit=1000";
    let page = wait_for("the tables to be made", || {
        let answer = gateway.get(path, &admin);
        (answer.status == 200).then(|| answer.json())
    });
    assert_eq!(page["records"].as_array().map(Vec::len), Some(302));
    let shown = gateway.get("/v1/datasources/press-4/series?topic=cpu%2Fhost=a&key=v&step=1m", &admin).json();
    assert_eq!(shown["points"].as_array().map(Vec::len), Some(2), "{shown}");
    assert_eq!(server.sql("SELECT version FROM headgate_format"), ["4"]);
    assert_eq!(server.sql("SELECT topic FROM topics WHERE topic = 'of no record'"), [""; 0]);
    // What is removed of them is counted as they are.
    let limits = json!({ "limits": { "stored_bytes": 4_000 } }).to_string();
    let json = [("content-type", "application/json")];
    let answer = gateway.request("PATCH", "/v1/datasources/press-4", &admin, &json, limits.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let path = "/v1/datasources/press-4/records?limit=1000";
    let count = || gateway.get(path, &admin).json()["records"].as_array().map(Vec::len);
    wait_for("the oldest to be removed", || count().filter(|count| *count < 60));
    let (left, samples) = (count(), server.sql("SELECT count(DISTINCT log_offset) FROM sample_rows"));
    assert!(left > Some(10), "{left:?}");
    assert!(samples[0].parse::<usize>().ok() <= left, "samples go with their records: {samples:?}");
}
