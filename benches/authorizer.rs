//! The authorizer with a million keys: the cost of a valid key and of a wrong one, and the time and
//! memory that a gateway with so many keys needs to start.
//!
//! The same run compares it with the obvious implementation: `blake3::derive_key` and a standard
//! `HashMap` behind a lock.

#![allow(missing_docs, reason = "criterion's macros make an undocumented function")]

use std::collections::HashMap;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use headgate::testing::message::DatasourceId;
use headgate::testing::{Actor, ApiKey, Authorizer, Digest, GrantDenial, Registry, Scope, Scopes};
use rusqlite::{Connection, params};

/// The gateway's own allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEYS: usize = 1_000_000;
const KEYS_PER_DATASOURCE: usize = 1_000;

type Presented = [u8; 53];

fn presented() -> Presented {
    ApiKey::generate().expose().as_bytes().try_into().expect("a key has 53 characters")
}

fn digest(key: &Presented) -> Digest {
    Digest::from_presented(key).expect("a key")
}

/// Writes the keys into a registry's file in one transaction: the registry itself would sync each
/// key to the disk.
fn fill(dir: &Path, keys: &[Presented]) -> rusqlite::Result<()> {
    drop(Registry::open(dir).expect("a new registry"));
    let mut rows: Vec<_> =
        keys.iter().enumerate().map(|(i, key)| (digest(key), i / KEYS_PER_DATASOURCE)).collect();
    rows.sort_unstable_by_key(|(digest, _)| digest.0);
    let mut connection = Connection::open(dir.join("registry.db"))?;
    let change = connection.transaction()?;
    {
        let mut datasource =
            change.prepare("INSERT INTO datasources (id, name, created_at) VALUES (?1, ?1, 0)")?;
        for i in 0..keys.len().div_ceil(KEYS_PER_DATASOURCE) {
            datasource.execute([format!("site-{i}")])?;
        }
        let mut key = change.prepare(
            "INSERT INTO keys (digest, datasource, scopes, label, created_at) VALUES (?1, ?2, 'ingest', '', 0)",
        )?;
        for (digest, i) in rows {
            key.execute(params![digest.0, format!("site-{i}")])?;
        }
    }
    change.commit()
}

/// This process's resident memory, in MiB.
fn resident_mib() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("resident pages");
    pages * 4 / 1024
}

/// Returns the next of `all` at each call, cyclically, so that no key is still in the processor's cache.
fn in_turn<'a, T>(all: &'a [T]) -> impl FnMut() -> &'a T {
    let mut keys = all.iter().cycle();
    move || keys.next().expect("not empty")
}

/// The pause per change, for some hundred changes a second.
const BETWEEN_CHANGES: Duration = Duration::from_millis(2);

/// Runs `something` while another thread creates and revokes keys, each change on disk before the next.
/// Returns the changes per second.
fn while_keys_change(registry: &Registry, something: impl FnOnce()) -> f64 {
    let done = AtomicBool::new(false);
    let started = Instant::now();
    let changes = thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
            let mut changes = 0.0;
            while !done.load(Ordering::Relaxed) {
                let (key, _) = registry.create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created");
                registry.revoke_key(&Actor::SYSTEM, &all, key.id).expect("revoked");
                changes += 2.0;
                thread::sleep(2 * BETWEEN_CHANGES);
            }
            changes
        });
        something();
        done.store(true, Ordering::Relaxed);
        changing.join().expect("changes do not fail")
    });
    changes / started.elapsed().as_secs_f64()
}

fn authorizer(criterion: &mut Criterion) {
    // `cargo test` runs this too, only to check that it works: few keys are enough then.
    let measured = std::env::args().any(|argument| argument == "--bench");
    let keys: Vec<_> = (0..if measured { KEYS } else { 2_000 }).map(|_| presented()).collect();
    let dir = tempfile::tempdir().expect("temporary directory");
    fill(dir.path(), &keys).expect("filled");

    let (before, start) = (resident_mib(), Instant::now());
    let registry = Registry::open(dir.path()).expect("opens");
    let (seconds, mib) = (start.elapsed().as_secs_f64(), resident_mib() - before);
    assert_eq!(registry.key_count(), keys.len());
    eprintln!("open: {} keys in {seconds:.2} s, {mib} MiB resident", keys.len());
    let authorizer = Authorizer::new(Arc::new(registry));

    let unknown: Vec<_> = keys.iter().map(|_| presented()).collect();
    let mistyped: Vec<_> = keys
        .iter()
        .map(|key| {
            let mut key = *key;
            key[20] = if key[20] == b'x' { b'y' } else { b'x' };
            key
        })
        .collect();

    let mut group = criterion.benchmark_group("authorizer");
    let mut next = in_turn(&keys);
    group.bench_function("digest", |bencher| bencher.iter(|| Digest::from_presented(black_box(next()))));
    let mut next = in_turn(&keys);
    group.bench_function("valid key", |bencher| {
        bencher.iter(|| authorizer.identify(black_box(next())).is_ok_and(|grant| grant.holds()));
    });
    let mut next = in_turn(&keys);
    let changes = while_keys_change(authorizer.registry(), || {
        group.bench_function("valid key, while keys change", |bencher| {
            bencher.iter(|| authorizer.identify(black_box(next())).is_ok_and(|grant| grant.holds()));
        });
    });
    eprintln!("meanwhile {changes:.0} keys were created or revoked a second");
    let grant = authorizer.identify(&keys[0]).expect("valid");
    group.bench_function("grant asked again", |bencher| {
        bencher.iter(|| black_box(&grant).allows(Scope::Ingest, black_box("site-0")));
    });
    for (name, wrong, denied) in
        [("unknown key", &unknown, GrantDenial::Unknown), ("mistyped key", &mistyped, GrantDenial::Malformed)]
    {
        let mut next = in_turn(wrong);
        assert_eq!(authorizer.identify(next()).err(), Some(denied));
        group
            .bench_function(name, |bencher| bencher.iter(|| authorizer.identify(black_box(next())).is_err()));
    }

    let find = |key: &Presented| authorizer.registry().find(&digest(key)).expect("there");
    let plain: HashMap<_, _> = keys.iter().map(|key| (digest(key).0, find(key))).collect();
    let plain = RwLock::new(plain);
    let plain_way = |key: &Presented| {
        let digest = blake3::derive_key("headgate 2026-11 api key digest", key);
        plain.read().is_ok_and(|map| map.get(&digest).is_some_and(|key| key.holds()))
    };
    let mut next = in_turn(&keys);
    assert!(plain_way(next()));
    group.bench_function("valid key, the plain way", |bencher| bencher.iter(|| plain_way(black_box(next()))));
    group.finish();
}

criterion_group!(benches, authorizer);
criterion_main!(benches);
