//! The session: a key is exchanged for a cookie, which opens what the key does to the gateway's own page, and to no other,
//! as long as the key lives.

use serde_json::{Value, json};

use crate::common::events::EventStream;
use crate::common::{Answer, Gateway, scratch};

/// Somebody who has signed in.
struct SignedIn {
    cookie: String,
    csrf: String,
}

impl SignedIn {
    fn new(gateway: &Gateway, key: &str) -> Self {
        let answer = gateway.request("POST", "/v1/session", key, &[], &[]);
        assert_eq!(answer.status, 201, "{}", answer.text());
        let line = &answer.headers["set-cookie"];
        let cookie = line.split(';').next().expect("a cookie").to_owned();
        Self { cookie, csrf: answer.json()["csrf"].as_str().expect("a text").to_owned() }
    }

    fn ask(&self, gateway: &Gateway, method: &str, path: &str, more: &[(&str, &str)], body: &[u8]) -> Answer {
        let own = [("cookie", self.cookie.as_str())];
        gateway.request(method, path, "", &[&own[..], more].concat(), body)
    }

    /// A request as the page sends it.
    fn send(&self, gateway: &Gateway, method: &str, path: &str, body: &Value) -> Answer {
        let more = [
            ("x-headgate-csrf", self.csrf.as_str()),
            ("sec-fetch-site", "same-origin"),
            ("content-type", "application/json"),
        ];
        self.ask(gateway, method, path, &more, body.to_string().as_bytes())
    }
}

fn create_key(gateway: &Gateway, datasource: &str, scopes: &[&str]) -> (String, String) {
    let path = format!("/v1/datasources/{datasource}/keys");
    let answer = gateway.post(&path, &gateway.admin_key(), &json!({ "scopes": scopes }));
    assert_eq!(answer.status, 201, "{}", answer.text());
    let text = |name: &str| answer.json()["key"][name].as_str().expect("a text").to_owned();
    (text("id"), text("secret"))
}

#[test]
fn a_session_opens_to_the_page_what_its_key_opens() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let begun = gateway.request("POST", "/v1/session", &admin, &[], &[]);
    let line = &begun.headers["set-cookie"];
    assert!(line.starts_with("headgate-session=") && !line.contains("Secure"), "{line}");
    for part in ["; Path=/", "; HttpOnly", "; SameSite=Strict", "; Max-Age=43200"] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(!begun.text().contains(&admin) && !line.contains(&admin), "the key itself");
    let page = SignedIn::new(&gateway, &admin);
    let created = page.send(&gateway, "POST", "/v1/datasources", &json!({ "name": "press-4" }));
    assert_eq!(created.status, 201, "{}", created.text());
    assert_eq!(page.ask(&gateway, "GET", "/v1/datasources", &[], &[]).status, 200);
    let shown = page.ask(&gateway, "GET", "/v1/session", &[], &[]);
    assert_eq!((shown.status, &shown.json()["csrf"]), (200, &json!(page.csrf)));
    assert_eq!(shown.json()["key"]["datasource"], "*");
    let audit = page.ask(&gateway, "GET", "/v1/audit", &[], &[]).json();
    let who = audit["entries"].as_array().expect("a list").last().expect("an entry")["who"].to_string();
    assert!(who.contains(shown.json()["key"]["id"].as_str().expect("an id")), "{who}");

    let ended = page.send(&gateway, "DELETE", "/v1/session", &json!({}));
    assert_eq!(ended.status, 204);
    assert!(ended.headers["set-cookie"].contains("Max-Age=0"));
    assert_eq!(page.ask(&gateway, "GET", "/v1/datasources", &[], &[]).status, 401);
    assert_eq!(page.ask(&gateway, "GET", "/v1/session", &[], &[]).status, 204, "there is none");
}

#[test]
fn no_other_page_can_use_the_cookie() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let page = SignedIn::new(&gateway, &gateway.admin_key());
    let own = format!("http://{}", gateway.http);
    let json_type = ("content-type", "application/json");
    let csrf = ("x-headgate-csrf", page.csrf.as_str());
    let body = br#"{"name": "a"}"#;
    let other = SignedIn::new(&gateway, &gateway.admin_key());
    for (what, more) in [
        ("no proof", &[json_type][..]),
        ("an empty one", &[json_type, ("x-headgate-csrf", "")]),
        ("that of another session", &[json_type, ("x-headgate-csrf", &other.csrf)]),
        ("another site", &[json_type, csrf, ("sec-fetch-site", "cross-site")]),
        ("another port of this host", &[json_type, csrf, ("sec-fetch-site", "same-site")]),
        ("what a person typed changes nothing", &[json_type, csrf, ("sec-fetch-site", "none")]),
        ("another origin", &[json_type, csrf, ("origin", "http://evil.example")]),
        ("another origin of this host", &[json_type, csrf, ("origin", "http://127.0.0.1:1")]),
        ("no origin", &[json_type, csrf, ("origin", "null")]),
    ] {
        assert_eq!(page.ask(&gateway, "POST", "/v1/datasources", more, body).status, 401, "{what}");
    }
    for site in ["cross-site", "same-site"] {
        let more = [("sec-fetch-site", site)];
        assert_eq!(page.ask(&gateway, "GET", "/v1/datasources", &more, &[]).status, 401, "{site}");
        assert_eq!(page.ask(&gateway, "GET", "/v1/live", &more, &[]).status, 401, "{site}");
        assert_eq!(page.ask(&gateway, "GET", "/v1/session", &more, &[]).status, 204, "{site}");
    }
    let right = [json_type, csrf, ("origin", own.as_str())];
    assert_eq!(page.ask(&gateway, "POST", "/v1/datasources", &right, body).status, 201);
    // Two cookies of the name: another page of this host may have set one.
    let twice = format!("{}; {}", page.cookie, other.cookie);
    assert_eq!(gateway.request("GET", "/v1/datasources", "", &[("cookie", &twice)], &[]).status, 401);
    // A key in the request is what counts, and a wrong one is wrong.
    assert_eq!(
        gateway.request("GET", "/v1/datasources", "hgk_wrong", &[("cookie", &page.cookie)], &[]).status,
        401
    );
}

#[test]
fn a_session_publishes_nothing_and_makes_no_other_session() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let page = SignedIn::new(&gateway, &gateway.admin_key());
    for path in ["/v1/ingest/press-4", "/v1/ingest/press-4/a/b", "/v1/import", "/v1/session"] {
        assert_eq!(page.send(&gateway, "POST", path, &json!({ "a": 1 })).status, 401, "{path}");
    }
    assert_eq!(page.send(&gateway, "POST", "/api/v2/write?bucket=press-4&org=a", &json!(1)).status, 401);
    assert_eq!(gateway.records_in_log(), 0.0);
}

#[test]
fn a_session_ends_with_its_key_at_once() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let (id, secret) = create_key(&gateway, "press-4", &["subscribe"]);
    let (page, second) = (SignedIn::new(&gateway, &secret), SignedIn::new(&gateway, &secret));
    let latest =
        |page: &SignedIn| page.ask(&gateway, "GET", "/v1/datasources/press-4/latest", &[], &[]).status;
    assert_eq!((latest(&page), latest(&second)), (200, 200));
    let path = format!("/v1/datasources/press-4/keys/{id}");
    assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
    assert_eq!((latest(&page), latest(&second)), (401, 401));

    // At the end of its grace, and with its datasource.
    let (id, secret) = create_key(&gateway, "press-4", &["subscribe"]);
    let page = SignedIn::new(&gateway, &secret);
    let path = format!("/v1/datasources/press-4/keys/{id}/rotate");
    assert_eq!(gateway.post(&path, &gateway.admin_key(), &json!({ "grace_seconds": 0 })).status, 201);
    assert_eq!(latest(&page), 401);
    let (_, secret) = create_key(&gateway, "press-4", &["admin"]);
    let page = SignedIn::new(&gateway, &secret);
    gateway.delete("press-4");
    gateway.create("press-4");
    assert_eq!(latest(&page), 401, "it is of the datasource before");
}

#[test]
fn a_session_is_no_more_than_its_key() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    gateway.create("press-5");
    assert_eq!(
        gateway.request("POST", "/v1/session", &source.key, &[], &[]).status,
        403,
        "it only publishes"
    );
    let (_, secret) = create_key(&gateway, "press-4", &["subscribe"]);
    let page = SignedIn::new(&gateway, &secret);
    assert_eq!(page.ask(&gateway, "GET", "/v1/datasources/press-4/latest", &[], &[]).status, 200);
    assert_eq!(page.ask(&gateway, "GET", "/v1/datasources/press-5/latest", &[], &[]).status, 401);
    assert_eq!(page.ask(&gateway, "GET", "/v1/datasources/press-4/keys", &[], &[]).status, 403);
    assert_eq!(page.send(&gateway, "POST", "/v1/datasources/press-4/keys", &json!({})).status, 403);
}

#[test]
fn what_a_page_watches_ends_with_its_session() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let page = SignedIn::new(&gateway, &gateway.admin_key());
    let mut watched =
        EventStream::ask_with(gateway.http, "/v1/live", &[("cookie", &page.cookie)]).expect("an answer");
    assert!(watched.head.starts_with("HTTP/1.1 200 "), "{}", watched.head);
    assert_eq!(watched.event().expect("an event").name, "hello");
    gateway.create("press-4");
    let stream = page.ask(&gateway, "GET", "/v1/datasources/press-4/stream", &[], &[]);
    assert_eq!(stream.status, 401, "it would outlive the session");
    assert_eq!(page.send(&gateway, "DELETE", "/v1/session", &json!({})).status, 204);
    let end = std::iter::from_fn(|| watched.event()).find(|event| event.name == "end");
    assert_eq!(end.expect("the end").data["reason"], "session_over");
}

#[test]
fn no_more_sessions_are_kept_than_a_person_has() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let first = SignedIn::new(&gateway, &admin);
    let rest: Vec<_> = (0..16).map(|_| SignedIn::new(&gateway, &admin)).collect();
    let is_open = |page: &SignedIn| page.ask(&gateway, "GET", "/v1/datasources", &[], &[]).status == 200;
    assert!(!is_open(&first) && rest.iter().all(is_open));
}
