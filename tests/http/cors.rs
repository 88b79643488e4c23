//! CORS, as a browser asks: pages of the configured origins may post and read with a key, all others and the admin API
//! stay what they were.

use crate::common::{Answer, Gateway, Setup, scratch};

const PAGE: &str = "https://app.example";
const RECORDS: &str = "/v1/datasources/press-4/records";

fn with_origins(dir: &std::path::Path, origins: &str) -> Gateway {
    Setup::on(dir).set("http.cors_origins", origins).start()
}

/// What a browser asks before it sends a request of a page.
fn preflight(gateway: &Gateway, path: &str, origin: &str, method: &str) -> Answer {
    let asked = [
        ("origin", origin),
        ("access-control-request-method", method),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    gateway.request("OPTIONS", path, "", &asked, &[])
}

fn allowed(answer: &Answer) -> Option<&str> {
    assert!(
        !answer.headers.contains_key("access-control-allow-credentials"),
        "nothing that a browser sends by itself is ever allowed for"
    );
    answer.headers.get("access-control-allow-origin").map(String::as_str)
}

#[test]
fn a_page_of_a_configured_origin_may_post_and_read() {
    let dir = scratch();
    let gateway = with_origins(dir.path(), "[\"https://app.example\", \"http://localhost:3000\"]");
    let source = gateway.create("press-4");
    for (path, method) in [
        ("/v1/ingest/press-4", "POST"),
        ("/v1/ingest/press-4/", "POST"),
        ("/v1/ingest/press-4/spindle/temp", "POST"),
        (RECORDS, "GET"),
        ("/v1/datasources/press-4/latest", "GET"),
        ("/v1/datasources/press-4/stream", "GET"),
        ("/v1/datasources/press-4/schema", "GET"),
    ] {
        for origin in [PAGE, "http://localhost:3000"] {
            let answer = preflight(&gateway, path, origin, method);
            assert_eq!((answer.status, allowed(&answer)), (204, Some(origin)), "{path} {answer:?}");
            assert_eq!(answer.headers["access-control-allow-methods"], method);
            let names = &answer.headers["access-control-allow-headers"];
            assert!(
                ["authorization", "x-api-key", "content-type", "idempotency-key", "last-event-id"]
                    .iter()
                    .all(|n| names.contains(n))
            );
            assert!(answer.headers["vary"].contains("origin"));
        }
    }
    let post = |key: &str, origin: &str| {
        gateway.request("POST", "/v1/ingest/press-4", key, &[("origin", origin)], b"{}")
    };
    let answer = post(&source.key, PAGE);
    assert_eq!((answer.status, allowed(&answer)), (200, Some(PAGE)));
    assert!(answer.headers["vary"].contains("origin"));
    // A page may read why not, and when to come again.
    let answer = post("nonsense", PAGE);
    assert_eq!((answer.status, allowed(&answer)), (401, Some(PAGE)));
    assert!(answer.headers["access-control-expose-headers"].contains("retry-after"));
    let answer = gateway.request("GET", RECORDS, &gateway.admin_key(), &[("origin", PAGE)], &[]);
    assert_eq!((answer.status, allowed(&answer)), (200, Some(PAGE)));
}

#[test]
fn no_other_origin_and_no_other_path_is_allowed_for() {
    let dir = scratch();
    let gateway = with_origins(dir.path(), "[\"https://app.example\"]");
    let source = gateway.create("press-4");
    for origin in [
        "https://evil.example",
        "https://app.example.evil",
        "https://app.example:8443",
        "http://app.example",
        "https://app.example, https://evil.example",
        "null",
        "",
    ] {
        let answer = preflight(&gateway, RECORDS, origin, "GET");
        assert_eq!((answer.status, allowed(&answer)), (405, None), "{origin}");
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &[("origin", origin)], b"{}");
        assert_eq!((answer.status, allowed(&answer)), (200, None), "{origin}: it is no access control");
        assert!(answer.headers["vary"].contains("origin"));
    }
    let admin = gateway.admin_key();
    for (path, method) in [
        ("/v1/datasources", "POST"),
        ("/v1/datasources", "GET"),
        ("/v1/datasources/press-4", "GET"),
        ("/v1/datasources/press-4/keys", "GET"),
        ("/v1/refusals", "GET"),
        ("/v1/audit", "GET"),
        ("/metrics", "GET"),
        ("/", "GET"),
        ("/nothing", "GET"),
    ] {
        let answer = preflight(&gateway, path, PAGE, method);
        assert_eq!((matches!(answer.status, 404 | 405), allowed(&answer)), (true, None), "{path}");
        let answer = gateway.request("GET", path, &admin, &[("origin", PAGE)], &[]);
        assert_eq!(allowed(&answer), None, "{path}");
    }
    // What sets a schema is of the admin API, though what shows it is not.
    let body = b"{\"schemas\": []}";
    let answer =
        gateway.request("PUT", "/v1/datasources/press-4/schema", &source.key, &[("origin", PAGE)], body);
    assert_eq!((answer.status, allowed(&answer)), (403, None));
}

#[test]
fn it_is_off_unless_it_is_configured_and_may_be_on_for_all() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let answer = preflight(&gateway, RECORDS, PAGE, "GET");
    assert_eq!((answer.status, allowed(&answer)), (405, None));
    let answer = gateway.request("GET", "/livez", "", &[("origin", PAGE)], &[]);
    assert_eq!((allowed(&answer), answer.headers.get("vary")), (None, None));
    gateway.stop();
    let gateway = with_origins(dir.path(), "[\"*\"]");
    let answer = preflight(&gateway, RECORDS, "null", "GET");
    assert_eq!((answer.status, allowed(&answer)), (204, Some("*")));
    gateway.stop();
    let exit = Setup::on(dir.path()).set("http.cors_origins", "[\"https://app.example/\"]").refused();
    let said = exit.output.to_lowercase();
    assert!(said.contains("https://app.example/") && said.contains("cors_origins"), "{said}");
}
