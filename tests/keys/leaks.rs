//! Leak reports: who has found a key's secret revokes it with that alone, and learns nothing of others.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::wire::{Version, Wire};
use crate::common::{Answer, Gateway, scratch, wait_for};
use crate::{KEY_DEAD, acts, audited, create_key, listed, post};

fn report(gateway: &Gateway, body: &Value) -> Answer {
    gateway.post("/v1/leaks", "", body)
}

#[test]
fn a_reported_key_is_dead_and_the_audit_has_its_id_the_place_and_the_last_offset() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let second = create_key(&gateway, "press-4", &json!({}));
    for _ in 0..3 {
        assert_eq!(post(&gateway, "press-4", &source.key), 200);
    }
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let url = format!("https://example.org/{}", "x".repeat(2_000));
    // As GitHub's secret scanning sends it.
    let found = json!([
        { "token": source.key, "type": "headgate_api_key", "url": url, "source": "content" },
        { "token": "hgk_no_such_key", "type": "headgate_api_key", "url": "" },
    ]);
    assert_eq!(report(&gateway, &found).status, 202);
    device.disconnected(KEY_DEAD);
    assert_eq!(post(&gateway, "press-4", &source.key), 401);
    assert_eq!(post(&gateway, "press-4", &second.secret), 200);
    let entry = acts(&gateway, "key.leaked", &source.key_id).pop().expect("an entry");
    assert_eq!((&entry["who"], &entry["address"]), (&json!("leak report"), &json!("127.0.0.1")));
    assert_eq!(entry["what"]["last_offset"], crate::common::cluster::first_offset() + 2);
    assert_eq!(entry["what"]["url"].as_str().expect("a text").len(), 500);
    wait_for("the histogram", || (gateway.metric("headgate_revocation_seconds_count") == 1.0).then_some(()));

    assert_eq!(report(&gateway, &json!({ "secret": second.secret, "url": second.secret })).status, 202);
    assert_eq!(post(&gateway, "press-4", &second.secret), 401);
    let entry = acts(&gateway, "key.leaked", &second.id).pop().expect("an entry");
    assert!(!entry.to_string().contains(&second.secret), "not even where it is said to be");
}

#[test]
fn the_answer_tells_nothing_of_what_was_reported() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let dead = gateway.create("gone");
    gateway.delete("gone");
    let elsewhere = scratch();
    let unknown = Gateway::start(elsewhere.path()).admin_key();
    let entries = audited(&gateway).len();
    let bodies = [
        json!({ "secret": unknown }).to_string(),
        json!({ "secret": dead.key }).to_string(),
        json!({ "secret": "nonsense" }).to_string(),
        json!([]).to_string(),
        json!([{ "token": unknown, "url": null }]).to_string(),
        json!([{ "token": "nonsense", "type": 5, "source": { "line": 1 } }]).to_string(),
    ];
    let send = |body: &str| {
        let began = Instant::now();
        let answer = gateway.request("POST", "/v1/leaks", "", &[], body.as_bytes());
        (answer.status, answer.text(), began.elapsed())
    };
    let mut answers: Vec<_> = bodies.iter().map(|body| send(body)).collect();
    assert_eq!(audited(&gateway).len(), entries, "nothing has changed");
    answers.push(send(&json!({ "secret": source.key }).to_string()));
    assert_eq!(post(&gateway, "press-4", &source.key), 401);
    let (status, text, _) = answers[0].clone();
    assert_eq!(status, 202);
    for (other_status, other_text, took) in &answers {
        assert_eq!((other_status, other_text), (&status, &text));
        assert!((Duration::from_millis(200)..Duration::from_secs(2)).contains(took), "{took:?}");
    }
}

/// Half a report was thanked for, and nobody looked at what was in it.
#[test]
fn what_is_no_report_is_refused_whole() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    for body in [
        String::new(),
        "no JSON at all".to_owned(),
        "null".to_owned(),
        json!({}).to_string(),
        json!({ "token": source.key }).to_string(),
        json!({ "secret": [source.key] }).to_string(),
        json!({ "secret": source.key, "url": {} }).to_string(),
        json!([source.key]).to_string(),
        json!([[source.key, null]]).to_string(),
        json!([{ "token": source.key }, { "token": null }]).to_string(),
        json!([{ "token": source.key }, { "secret": source.key }]).to_string(),
    ] {
        let answer = gateway.request("POST", "/v1/leaks", "", &[], body.as_bytes());
        assert_eq!(answer.status, 400, "{body}: {}", answer.text());
        assert!(answer.text().contains("The accepted forms are"), "{}", answer.text());
    }
    assert_eq!(post(&gateway, "press-4", &source.key), 200);
}

#[test]
fn the_last_admin_key_is_kept_and_that_is_said_loudly_and_another_one_is_not() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let last = listed(&gateway, "*")[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(report(&gateway, &json!({ "secret": gateway.admin_key() })).status, 202);
    assert_eq!(gateway.get("/v1/datasources", &gateway.admin_key()).status, 200);
    assert_eq!(acts(&gateway, "key.leaked_and_kept", &last).len(), 1);
    gateway.says("the last admin key");
    assert!(gateway.output().contains("ERROR"));

    let second = create_key(&gateway, "*", &json!({ "scopes": ["admin"] }));
    assert_eq!(report(&gateway, &json!({ "secret": second.secret })).status, 202);
    assert_eq!(gateway.get("/v1/datasources", &second.secret).status, 401);
    assert_eq!(acts(&gateway, "key.leaked", &second.id).len(), 1);
}

#[test]
fn reports_are_bounded_in_number_and_in_size() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let large = json!({ "secret": "x".repeat(100_000) });
    assert_eq!(report(&gateway, &large).status, 413);
    // A hundred secrets are looked at, and no more.
    let mut many = vec![json!({ "token": "nonsense" }); 100];
    many.push(json!({ "token": source.key }));
    assert_eq!(report(&gateway, &Value::Array(many)).status, 202);
    assert_eq!(post(&gateway, "press-4", &source.key), 200);

    let statuses: Vec<_> = std::thread::scope(|scope| {
        let sending: Vec<_> =
            (0..40).map(|_| scope.spawn(|| report(&gateway, &json!({ "secret": "nonsense" })))).collect();
        sending.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let limited: Vec<_> = statuses.iter().filter(|answer| answer.status == 429).collect();
    assert!(limited.len() >= 10, "{}", limited.len());
    assert!(statuses.iter().any(|answer| answer.status == 202));
    assert!(limited.iter().all(|answer| answer.headers.contains_key("retry-after")));
    assert!(limited[0].text().contains("leak_reports"), "{}", limited[0].text());
}
