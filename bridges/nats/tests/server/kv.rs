//! Buckets, on a real nats-server.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::{SOON, Server, soon};
use bytes::Bytes;
use headgate_bridge_nats::kv::{KV_BATCH_ROWS_MAX, KvPut, KvUpdate, KvWatch};
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats};

fn settings() -> KvBucketSettings {
    KvBucketSettings { name: "test".to_owned(), replicas: 1, age_max: None, writes: KvWrites::Batched }
}

async fn bucket(nats: &Nats) -> KvBucket {
    soon(KvBucket::open(nats, &settings())).await.expect("opens")
}

fn put(key: &str, value: &str) -> KvPut {
    KvPut { key: key.to_owned(), value: Some(Bytes::copy_from_slice(value.as_bytes())), expected: None }
}

fn delete(key: &str) -> KvPut {
    KvPut { key: key.to_owned(), value: None, expected: None }
}

/// The rows that a watch has reported.
#[derive(Default)]
struct Copy(BTreeMap<String, Bytes>);

impl Copy {
    fn apply(&mut self, update: KvUpdate) {
        if update.all {
            self.0.clear();
        }
        for row in update.rows {
            match row.value {
                Some(value) => drop(self.0.insert(row.key, value)),
                None => drop(self.0.remove(&row.key)),
            }
        }
    }

    async fn of(watch: &mut KvWatch) -> Self {
        let mut copy = Copy::default();
        let first = soon(watch.next()).await;
        assert!(first.all);
        copy.apply(first);
        copy
    }

    fn rows(&self) -> Vec<(&str, &str)> {
        let text = |value| std::str::from_utf8(value).expect("text");
        self.0.iter().map(|(key, value)| (key.as_str(), text(value))).collect()
    }
}

fn keys(update: &KvUpdate) -> Vec<(&str, bool)> {
    update.rows.iter().map(|row| (row.key.as_str(), row.value.is_some())).collect()
}

#[tokio::test]
async fn rows_are_written_together_or_not_at_all() {
    let server = Server::start();
    let nats = server.connect().await;
    let bucket = bucket(&nats).await;
    assert_eq!(bucket.put_all(&[put("a.1", "x"), put("a.2", "y")], Some(0)).await.expect("written"), 2);
    // Another writer was first: for the whole bucket, and for one row.
    let stale = bucket.put_all(&[put("a.1", "z"), put("a.3", "z")], Some(1)).await;
    assert!(matches!(stale, Err(KvError::Conflict)), "{stale:?}");
    let taken = KvPut { expected: Some(0), ..put("a.2", "z") };
    let stale = bucket.put_all(&[put("a.1", "z"), taken], None).await;
    assert!(matches!(stale, Err(KvError::Conflict)), "{stale:?}");
    let mut watch = bucket.watch();
    assert_eq!(Copy::of(&mut watch).await.rows(), [("a.1", "x"), ("a.2", "y")]);

    assert_eq!(bucket.put_all(&[delete("a.1"), put("a.3", "z")], Some(2)).await.expect("written"), 4);
    let update = soon(watch.next()).await;
    assert_eq!((keys(&update), update.revision), (vec![("a.1", false), ("a.3", true)], 4));
    let gone = bucket.get("a.1").await.expect("read");
    assert_eq!((gone.value, gone.revision), (None, 3));
    assert_eq!(bucket.get("a.9").await.expect("read").revision, 0);
    assert_eq!(Copy::of(&mut bucket.watch()).await.rows(), [("a.2", "y"), ("a.3", "z")]);
}

#[tokio::test]
async fn of_many_who_write_at_once_one_is_first() {
    let server = Server::start();
    let nats = server.connect().await;
    let bucket = bucket(&nats).await;
    for round in 0..20 {
        let last = round * 2;
        let attempts = (0..5).map(|n| {
            let (bucket, n) = (bucket.clone(), n.to_string());
            async move { bucket.put_all(&[put("x", &n), put(&format!("y.{n}"), "")], Some(last)).await }
        });
        let results = futures_util::future::join_all(attempts).await;
        let written = results.iter().filter(|result| result.is_ok()).count();
        let conflicts = results.iter().filter(|result| matches!(result, Err(KvError::Conflict))).count();
        assert_eq!((written, conflicts), (1, 4), "{results:?}");
    }
}

#[tokio::test]
async fn what_does_not_fit_is_said_to_be_too_large() {
    let server = Server::start();
    let nats = server.connect().await;
    let bucket = bucket(&nats).await;
    let many: Vec<_> = (0..=KV_BATCH_ROWS_MAX).map(|n| put(&format!("n.{n}"), "")).collect();
    assert!(matches!(bucket.put_all(&many, None).await, Err(KvError::TooLarge(_))));
    let written = bucket.put_all(&many[1..], None).await.expect("as many as fit");
    assert_eq!(written, KV_BATCH_ROWS_MAX as u64);
    let long = "x".repeat(2 << 20);
    let result = bucket.put_all(&[put("a", ""), put("b", &long)], None).await;
    assert!(matches!(result, Err(KvError::TooLarge(_))), "{result:?}");
    assert_eq!(bucket.get("a").await.expect("read").revision, 0);
}

#[tokio::test]
async fn a_watch_goes_on_without_a_gap_after_a_restart_of_nats() {
    let mut server = Server::start();
    let nats = server.connect().await;
    let bucket = bucket(&nats).await;
    let mut watch = bucket.watch();
    let mut copy = Copy::of(&mut watch).await;
    let mut last = 0;
    for round in 0..4 {
        for n in 0..50 {
            let rows = [put(&format!("r.{n}"), &format!("{round}")), put("newest", &format!("{round}.{n}"))];
            last = bucket.put_all(&rows, Some(last)).await.expect("written");
        }
        server.kill();
        // While the outcome is unknown, the writer waits for it.
        while nats.trouble().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let away = bucket.put_all(&[put("never", "")], None).await;
        assert!(matches!(away, Err(KvError::Away(_))), "{away:?}");
        server.restart();
        let deadline = tokio::time::Instant::now() + SOON;
        last = loop {
            match bucket.put_all(&[put("back", &format!("{round}"))], Some(last)).await {
                Ok(revision) => break revision,
                Err(KvError::Away(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => panic!("{error}"),
            }
            assert!(tokio::time::Instant::now() < deadline, "NATS does not come back");
        };
        loop {
            let update = soon(watch.next()).await;
            assert!(!update.all);
            let revision = update.revision;
            copy.apply(update);
            if revision == last {
                break;
            }
        }
        let mut fresh = bucket.watch();
        assert_eq!(copy.rows(), Copy::of(&mut fresh).await.rows());
    }
}

#[tokio::test]
async fn a_watch_that_is_far_behind_gets_states_that_there_were() {
    let server = Server::start();
    let nats = server.connect().await;
    let bucket = bucket(&nats).await;
    let mut watch = bucket.watch();
    let mut copy = Copy::of(&mut watch).await;
    // Two rows that always have the same value.
    let writer = tokio::spawn({
        let bucket = bucket.clone();
        async move {
            for n in 0..300 {
                let rows = [put("left", &n.to_string()), put("right", &n.to_string())];
                bucket.put_all(&rows, None).await.expect("written");
            }
        }
    });
    while copy.rows() != [("left", "299"), ("right", "299")] {
        copy.apply(soon(watch.next()).await);
        assert_eq!(copy.0.get("left"), copy.0.get("right"));
    }
    writer.await.expect("no panic");
}

#[tokio::test]
async fn to_sync_is_to_have_seen_what_was_written_before() {
    let server = Server::start();
    let (nats, other) = (server.connect().await, server.connect().await);
    let (bucket, elsewhere) = (bucket(&nats).await, bucket(&other).await);
    let mut watch = bucket.watch();
    let seen = watch.seen();
    let mut copy = Copy::of(&mut watch).await;
    let (told, mut copies) = tokio::sync::watch::channel(Vec::new());
    let reader = tokio::spawn(async move {
        loop {
            copy.apply(watch.next().await);
            let rows: Vec<_> = copy.rows().iter().map(|(key, value)| format!("{key}={value}")).collect();
            told.send_replace(rows);
        }
    });
    assert_eq!(seen.sync(SOON).await.expect("nothing there"), 0);
    for n in 0..100 {
        let revision = elsewhere.put_all(&[put("n", &n.to_string())], None).await.expect("written");
        assert_eq!(seen.sync(SOON).await.expect("seen"), revision);
        assert_eq!(*copies.borrow_and_update(), [format!("n={n}")]);
    }
    reader.abort();
}

#[tokio::test]
async fn a_bucket_that_took_the_place_of_another_is_read_from_its_beginning() {
    let server = Server::start();
    let nats = server.connect().await;
    let before = bucket(&nats).await;
    before.put_all(&[put("a", "1"), put("b", "1")], None).await.expect("written");
    let mut watch = before.watch();
    let mut copy = Copy::of(&mut watch).await;
    let jetstream = async_nats::jetstream::new(nats.client().clone());
    jetstream.delete_stream("KV_test").await.expect("deleted");
    let after = bucket(&nats).await;
    after.put_all(&[put("b", "2")], None).await.expect("written");
    let update = soon(watch.next()).await;
    assert!(update.all);
    copy.apply(update);
    assert_eq!(copy.rows(), [("b", "2")]);
}

#[tokio::test]
async fn a_bucket_is_away_as_long_as_nats_is() {
    let mut server = Server::start();
    server.kill();
    let nats = server.begin_to_connect().await;
    let opened = KvBucket::open(&nats, &settings()).await;
    assert!(matches!(opened, Err(KvError::Away(_))), "{opened:?}");
    server.restart();
    let opened = async {
        loop {
            match KvBucket::open(&nats, &settings()).await {
                Ok(bucket) => return bucket,
                Err(KvError::Away(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    assert_eq!(soon(opened).await.name(), "test");
    let impossible = KvBucketSettings { name: "three".to_owned(), replicas: 3, ..settings() };
    let refused = KvBucket::open(&nats, &impossible).await;
    assert!(matches!(refused, Err(KvError::Refused(_))), "{refused:?}");
}

#[tokio::test]
async fn who_watches_hears_of_a_row_that_has_become_too_old() {
    let server = Server::start();
    let nats = server.connect().await;
    let short = KvBucketSettings { age_max: Some(Duration::from_secs(1)), ..settings() };
    let bucket = soon(KvBucket::open(&nats, &short)).await.expect("opens");
    let mut watch = bucket.watch();
    Copy::of(&mut watch).await;
    bucket.put_all(&[put("a", "1")], None).await.expect("written");
    assert_eq!(keys(&soon(watch.next()).await), [("a", true)]);
    assert_eq!(keys(&soon(watch.next()).await), [("a", false)]);
}
