//! What is kept once: a request with an `Idempotency-Key`, sent as often as it takes.

use std::collections::HashMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::cluster::first_offset;
use crate::common::{Answer, Gateway, Setup, Source, kept, scratch, signal, wait_for};
use serde_json::{Value, json};

const DUPLICATES: &str = "headgate_duplicates_total{transport=\"http\"}";
const ACCEPTED: &str = "headgate_accepted_total{transport=\"http\"}";

/// Posts a body under an idempotency key.
fn post(gateway: &Gateway, source: &Source, key: &str, body: &Value) -> Answer {
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    let path = format!("/v1/ingest/{}/t", source.id);
    gateway.request("POST", &path, &source.key, &headers, body.to_string().as_bytes())
}

/// Posts it and expects a yes.
fn accepted(gateway: &Gateway, source: &Source, key: &str, body: &Value) -> Value {
    let answer = post(gateway, source, key, body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// The answer to records that are kept, counted from the first in the log.
fn first_time(first: u64, last: u64) -> Value {
    let begin = first_offset();
    json!({ "accepted": last - first + 1, "first_offset": begin + first, "last_offset": begin + last })
}

fn again(first: u64, last: u64) -> Value {
    let mut answer = first_time(first, last);
    answer["duplicate"] = true.into();
    answer
}

#[test]
fn the_same_key_again_is_answered_as_the_first_time_and_nothing_is_kept_again() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (press, oven) = (gateway.create("press-4"), gateway.create("oven"));
    assert_eq!(accepted(&gateway, &press, "a", &json!([1, 2, 3])), first_time(0, 2));
    assert_eq!(accepted(&gateway, &press, "a", &json!([1, 2, 3])), again(0, 2));
    // Quotes around it are the header's, not the key's.
    assert_eq!(accepted(&gateway, &press, "\"a\"", &json!([1, 2, 3])), again(0, 2));
    // Other messages under it are refused: they would be lost if they were taken for a repetition.
    for other in [json!({ "value": 4 }), json!([1, 2]), json!([1, 2, 3, 3]), json!([3, 2, 1])] {
        let refused = post(&gateway, &press, "a", &other);
        assert_eq!((refused.status, &refused.json()["type"]), (422, &json!("/problems/id_conflict")));
        let named = format!("offset {}", first_offset());
        assert!(refused.text().contains(&named), "{}", refused.text());
    }
    let path = format!("/v1/ingest/{}/other-topic", press.id);
    let headers = [("content-type", "application/json"), ("idempotency-key", "a")];
    assert_eq!(gateway.request("POST", &path, &press.key, &headers, b"[1, 2, 3]").status, 422);
    assert_eq!(accepted(&gateway, &press, "b", &json!([1])), first_time(3, 3));
    // Another datasource has keys of its own.
    assert_eq!(accepted(&gateway, &oven, "a", &json!([1])), first_time(4, 4));
    assert_eq!(accepted(&gateway, &oven, "a", &json!([1])), again(4, 4));
    assert_eq!(gateway.records_in_log(), 5.0);
    assert_eq!(gateway.metric(ACCEPTED), 5.0);
    // Counted as the messages that came, not as those that they were taken for.
    assert_eq!(gateway.metric(DUPLICATES), 3.0 + 3.0 + 1.0);
    assert_eq!(gateway.metric("headgate_dedup_evicted_total"), 0.0);
}

#[test]
fn of_many_at_once_with_one_key_exactly_one_is_kept_and_what_differs_is_refused() {
    const CLIENTS: usize = 8;
    const ROUNDS: usize = 20;
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let barrier = Barrier::new(CLIENTS);
    // Even clients send the same under a key, odd ones something else.
    let answers: Vec<Vec<Answer>> = std::thread::scope(|scope| {
        let client = |n: usize| {
            let (gateway, source, barrier) = (&gateway, &source, &barrier);
            scope.spawn(move || {
                let mut answers = Vec::new();
                for round in 0..ROUNDS {
                    barrier.wait();
                    let body = json!([n % 2, n % 2]);
                    answers.push(post(gateway, source, &format!("round {round}"), &body));
                }
                answers
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        clients.into_iter().map(|client| client.join().expect("every request is answered")).collect()
    });
    for round in 0..ROUNDS {
        let of_round: Vec<_> = answers.iter().map(|answers| &answers[round]).collect();
        let first = 2 * round as u64;
        let refused = of_round.iter().filter(|answer| answer.status == 422).count();
        let accepted = of_round.iter().filter(|answer| answer.status == 200);
        let accepted: Vec<_> = accepted.map(|answer| answer.json()).collect();
        let count = |expected: Value| accepted.iter().filter(|answer| **answer == expected).count();
        let (firsts, others) = (count(first_time(first, first + 1)), count(again(first, first + 1)));
        assert_eq!((firsts, others, refused), (1, CLIENTS / 2 - 1, CLIENTS / 2), "{accepted:?}");
    }
    assert_eq!(gateway.records_in_log(), 2.0 * ROUNDS as f64);
}

/// A client whose answer was lost to a kill cannot know whether the message was kept: it sends it again.
#[test]
fn a_request_that_is_sent_until_it_is_answered_is_kept_once_however_often_the_gateway_is_killed() {
    const ROUNDS: u64 = 6;
    const CLIENTS: u64 = 4;
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("log.segment_bytes", 1 << 20).set("storage.sink", "none");
    let mut gateway = setup.start();
    let source = gateway.create("press-4");
    let mut sent = 0;
    let mut unanswered = Vec::new();
    let padding = "x".repeat(4 << 10);
    for round in 0..ROUNDS {
        let killed = AtomicBool::new(false);
        let answered = std::sync::atomic::AtomicU64::new(0);
        let numbers = std::sync::atomic::AtomicU64::new(sent);
        let lost: Vec<u64> = std::thread::scope(|scope| {
            let (gateway, source, padding) = (&gateway, &source, &padding);
            let (killed, answered, numbers) = (&killed, &answered, &numbers);
            let client = move || {
                let mut lost = Vec::new();
                while !killed.load(Ordering::SeqCst) {
                    let number = numbers.fetch_add(1, Ordering::SeqCst);
                    let body = json!({ "number": number, "padding": padding }).to_string();
                    let key = number.to_string();
                    let headers = [("idempotency-key", key.as_str())];
                    let path = "/v1/ingest/press-4/t";
                    match gateway.try_request("POST", path, &source.key, &headers, body.as_bytes()) {
                        Ok(answer) if answer.status == 200 => {
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        _ => lost.push(number),
                    }
                }
                lost
            };
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
            wait_for("some requests to be answered", || {
                (answered.load(Ordering::SeqCst) > 50 + 20 * round).then_some(())
            });
            signal(gateway.pid(), libc::SIGKILL);
            killed.store(true, Ordering::SeqCst);
            let lost = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
            lost.collect::<Vec<_>>().concat()
        });
        sent = numbers.load(Ordering::SeqCst);
        unanswered.extend(lost);
        gateway.kill();
        gateway = setup.start();
    }
    assert!(!unanswered.is_empty(), "the kills came while requests were under way");
    for number in unanswered.iter().copied().chain([0, sent / 2]) {
        let body = json!({ "number": number, "padding": padding });
        accepted(&gateway, &source, &number.to_string(), &body);
    }
    gateway.stop();
    let mut times: HashMap<u64, u64> = HashMap::new();
    for record in kept::in_log(dir.path()) {
        let json: Value = serde_json::from_slice(&record.payload).expect("JSON");
        *times.entry(json["number"].as_u64().expect("a number")).or_default() += 1;
    }
    let wrong: Vec<_> = (0..sent).filter(|number| times.get(number) != Some(&1)).collect();
    assert!(wrong.is_empty(), "of {sent}, not there exactly once: {wrong:?}");
}

#[test]
fn after_the_window_the_same_key_is_a_new_one() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.dedup_window_s", 1).start();
    let source = gateway.create("press-4");
    // The window begins when the message is kept, which is before it is acknowledged.
    let started = Instant::now();
    assert_eq!(accepted(&gateway, &source, "a", &json!(1)), first_time(0, 0));
    assert_eq!(accepted(&gateway, &source, "a", &json!(1)), again(0, 0));
    wait_for("the key to be forgotten", || {
        (accepted(&gateway, &source, "a", &json!(1)) == first_time(1, 1)).then_some(())
    });
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn an_attempt_that_was_refused_leaves_its_key_free() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.payload_bytes_max", 100).start();
    let source = gateway.create("press-4");
    let refused = post(&gateway, &source, "a", &json!([1, "x".repeat(200)]));
    assert_eq!(refused.status, 413, "{}", refused.text());
    let refused =
        post(&gateway, &Source { key: gateway.create("oven").key, ..source.clone() }, "a", &json!(1));
    assert_eq!(refused.status, 401, "{}", refused.text());
    assert_eq!(accepted(&gateway, &source, "a", &json!([1])), first_time(0, 0));
}

#[test]
fn a_key_of_1_to_128_printable_bytes_is_taken_and_no_other() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    for (n, key) in ["a", "a b", "\"", &"a".repeat(128), "µ-metre"].into_iter().enumerate() {
        assert_eq!(accepted(&gateway, &source, key, &json!(1)), first_time(n as u64, n as u64), "{key:?}");
    }
    for key in ["", "\"\"", &"a".repeat(129), "a\tb"] {
        let refused = post(&gateway, &source, key, &json!(1));
        assert_eq!(refused.status, 400, "{key:?}: {}", refused.text());
        let problem = refused.json();
        assert_eq!(problem["type"], "/problems/malformed");
        assert!(problem["detail"].as_str().is_some_and(|words| words.contains("1 to 128")), "{problem}");
    }
    let twice = [("idempotency-key", "a"), ("idempotency-key", "b")];
    let refused = gateway.request("POST", "/v1/ingest/press-4", &source.key, &twice, b"1");
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert_eq!(gateway.metric("headgate_refused_total{transport=\"http\",cause=\"message_id\"}"), 4.0);
}
