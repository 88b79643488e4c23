//! Refusals: what was refused lately, to whom and why, so that an operator can find out what is wrong with
//! a device that does not get in. Every stage that refuses calls [`Refusals::note`], which counts the
//! refusal in the metrics and lists it here.
//!
//! The list has sources, not events: a client that fails the same way a million times is one entry with a
//! count, its first and its last time. It is in memory, in a fixed number of shards, each with a lock of
//! its own. An address always has the same shard, so that a flood from one address evicts few of the
//! others. A full shard evicts the source that was silent for longest.
//!
//! Nobody waits here. A thread that finds its shard locked does not list the refusal, and the metric
//! `headgate_refusals_unlisted_total` counts how often. So in a flood the count of an entry is a lower
//! bound; `headgate_refused_total` is always exact.
//!
//! **No secret.** A client's name, or other text from it, may be a key: text that looks like one is not
//! kept ([`key::may_hold_key`]). For an unknown key only its [`KeyShape`] is kept.

use parking_lot::Mutex;
use std::fmt::{self, Write};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::cause::Cause;
use super::metrics::Metrics;
use crate::auth::key;
use crate::auth::shape::KeyShape;
use crate::limits::{REFUSALS_CLIENT_BYTES_MAX, REFUSALS_PER_SHARD_MAX, REFUSALS_SHARDS};
use crate::message::{KeyId, TimeMicros, Transport, now_micros};
use crate::network::source_of;
use crate::quota::LimitExceeded;

/// Replaces a text that looks like a key.
const HIDDEN_KEY_WORDS: &str = "(not shown: it looks like an API key)";
/// The most that is kept of a refusal's words, in bytes.
const REFUSAL_WORDS_BYTES_MAX: usize = 240;

/// One refusal, as it is reported.
#[derive(Clone, Copy)]
pub struct RefusalNote<'a> {
    /// Which way it came.
    pub transport: Transport,
    /// Why.
    pub cause: Cause,
    /// The cause in words, for people; may quote the client.
    pub words: &'a dyn fmt::Display,
    /// Where it came from, if that is known.
    pub address: Option<IpAddr>,
    /// The name that the client gives itself, or empty.
    pub client: &'a str,
    /// The datasource that it was about, or empty.
    pub datasource: &'a str,
    /// The id of the key, if it was ever given out.
    pub key_id: Option<KeyId>,
    /// The shape of the key, if it was never given out.
    pub key_shape: Option<KeyShape>,
    /// The limit that was exceeded, if any.
    pub limited: Option<&'a LimitExceeded>,
}

impl<'a> RefusalNote<'a> {
    /// A refusal without further details.
    pub fn new(transport: Transport, cause: Cause, words: &'a dyn fmt::Display) -> Self {
        Self {
            transport,
            cause,
            words,
            address: None,
            client: "",
            datasource: "",
            key_id: None,
            key_shape: None,
            limited: None,
        }
    }
}

/// The exceeded limit of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverLimit {
    /// Its name.
    pub name: &'static str,
    /// What it is set to.
    pub max: u64,
    /// Whose it is, in words.
    pub owner: String,
    /// How long the wait would have been, the last time.
    pub wait: Duration,
}

/// One source of refusals.
#[derive(Debug, Clone)]
pub struct RefusalEntry {
    /// Which way it came.
    pub transport: Transport,
    /// Why.
    pub cause: Cause,
    /// The cause of the last refusal in words, for people.
    pub words: String,
    /// Where it came from.
    pub address: Option<IpAddr>,
    /// The name that the client gives itself, or empty.
    pub client: String,
    /// The datasource, or empty.
    pub datasource: String,
    /// The id of the key, if it was ever given out.
    pub key_id: Option<KeyId>,
    /// The shape of the key, if it was never given out.
    pub key_shape: Option<KeyShape>,
    /// The limit that was exceeded, if any.
    pub limit: Option<OverLimit>,
    /// How many there were, at least.
    pub count: u64,
    /// When the first was.
    pub first_at: TimeMicros,
    /// When the last was.
    pub last_at: TimeMicros,
}

/// Selects entries; a `None` matches everything.
#[derive(Debug, Clone, Default)]
pub struct RefusalFilter {
    /// Of this client.
    pub client: Option<String>,
    /// From this address.
    pub address: Option<IpAddr>,
    /// For the cause of this name.
    pub cause: Option<String>,
    /// About this datasource.
    pub datasource: Option<String>,
    /// None of them before this time.
    pub since: Option<TimeMicros>,
}

impl RefusalFilter {
    fn matches(&self, entry: &RefusalEntry) -> bool {
        fn same<T: PartialEq + ?Sized>(wanted: Option<&T>, is: &T) -> bool {
            wanted.is_none_or(|wanted| wanted == is)
        }
        same(self.client.as_deref(), entry.client.as_str())
            && self.address.is_none_or(|wanted| entry.address == Some(wanted.to_canonical()))
            && same(self.cause.as_deref(), entry.cause.name())
            && same(self.datasource.as_deref(), entry.datasource.as_str())
            && self.since.is_none_or(|since| entry.first_at >= since)
    }
}

/// Counts a refusal for the datasource that it was about; whether there is such a datasource.
type DatasourceRefusals = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// Counts refusals, and lists the newest.
pub struct Refusals {
    metrics: Arc<Metrics>,
    of_datasources: DatasourceRefusals,
    shards: [Mutex<RefusalShard>; REFUSALS_SHARDS],
    hash: RandomState,
    /// How many were counted and not listed.
    unlisted: AtomicU64,
}

/// Sources, and their hashes at the same positions, so that a search reads only the hashes.
#[derive(Default)]
struct RefusalShard {
    hashes: Vec<u64>,
    entries: Vec<RefusalEntry>,
}

impl Refusals {
    /// An empty list. `of_datasource` counts a refusal for a datasource, and returns whether there is such a one.
    pub fn new(metrics: Arc<Metrics>, of_datasource: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        let (shards, of_datasources) = (std::array::from_fn(|_| Mutex::default()), Box::new(of_datasource));
        Self { metrics, of_datasources, shards, hash: RandomState::new(), unlisted: AtomicU64::new(0) }
    }

    /// Counts a refusal, and lists it unless that would have to wait for a lock.
    pub fn note(&self, note: RefusalNote<'_>) {
        let is_of_datasource = (self.of_datasources)(note.datasource);
        self.metrics.count_refused(note.transport, note.cause, is_of_datasource);
        let address = note.address.map(|address| address.to_canonical());
        let client = RedactedText { text: note.client, bytes_max: REFUSALS_CLIENT_BYTES_MAX };
        let RefusalNote { transport, cause, key_id, key_shape, .. } = note;
        let datasource = RedactedText { text: note.datasource, bytes_max: REFUSALS_CLIENT_BYTES_MAX };
        let source = (address, client.text, transport, cause, datasource.text, key_id);
        let hash = self.hash.hash_one(source);
        let place = self.hash.hash_one(address.map(source_of)) % REFUSALS_SHARDS as u64;
        let place = usize::try_from(place).expect("less than REFUSALS_SHARDS");
        // A refusal must stay cheap in a flood, so nobody waits for the lock.
        let Some(mut shard) = self.shards[place].try_lock() else {
            self.unlisted.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let entry = shard.entry_or_replace(hash, || RefusalEntry {
            transport,
            cause,
            words: String::new(),
            address,
            client: client.to_string(),
            datasource: datasource.to_string(),
            key_id,
            key_shape,
            limit: None,
            count: 0,
            first_at: now_micros(),
            last_at: 0,
        });
        entry.count += 1;
        entry.last_at = now_micros();
        entry.key_shape = key_shape;
        entry.limit = note.limited.map(|limited| OverLimit {
            name: limited.limit.name(),
            max: limited.setting.max,
            owner: limited.owner.to_string(),
            wait: limited.wait,
        });
        entry.words.clear();
        if write!(entry.words, "{}", note.words).is_err() {
            entry.words.clear();
        }
        let words = RedactedText { text: &entry.words, bytes_max: REFUSAL_WORDS_BYTES_MAX };
        if !words.is_plain() {
            entry.words = words.to_string();
        }
    }

    /// The newest entries that match `filter`, at most `count_max`.
    pub fn newest(&self, filter: &RefusalFilter, count_max: usize) -> Vec<RefusalEntry> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            found.extend(shard.entries.iter().filter(|entry| filter.matches(entry)).cloned());
        }
        found.sort_by_key(|entry| std::cmp::Reverse(entry.last_at));
        found.truncate(count_max);
        found
    }

    /// When the newest was, of those about one datasource or of all, and how many are listed: what changes with each.
    pub fn state(&self, datasource: Option<&str>) -> (TimeMicros, u64) {
        self.shards.iter().fold((0, 0), |found, shard| {
            let shard = shard.lock();
            let about = |entry: &&RefusalEntry| datasource.is_none_or(|of| entry.datasource == of);
            shard
                .entries
                .iter()
                .filter(about)
                .fold(found, |(last_at, count), entry| (last_at.max(entry.last_at), count + entry.count))
        })
    }

    /// How many were counted and not listed.
    pub fn unlisted(&self) -> u64 {
        self.unlisted.load(Ordering::Relaxed)
    }
}

impl RefusalShard {
    /// The entry of a source. A new one replaces the source that was silent for longest, if there is no room.
    fn entry_or_replace(&mut self, hash: u64, new: impl FnOnce() -> RefusalEntry) -> &mut RefusalEntry {
        let known = self.hashes.iter().position(|&known| known == hash);
        let at = known.unwrap_or_else(|| {
            if self.entries.len() < REFUSALS_PER_SHARD_MAX {
                self.hashes.push(hash);
                self.entries.push(new());
                return self.entries.len() - 1;
            }
            let silent = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.last_at);
            let at = silent.map_or(0, |(at, _)| at);
            self.hashes[at] = hash;
            self.entries[at] = new();
            at
        });
        &mut self.entries[at]
    }
}

/// Untrusted text in a form that may be shown: cut, without control characters, and replaced if it looks
/// like a key.
struct RedactedText<'a> {
    text: &'a str,
    bytes_max: usize,
}

impl RedactedText<'_> {
    /// Whether it can be shown unchanged.
    fn is_plain(&self) -> bool {
        self.text.len() <= self.bytes_max
            && !self.text.chars().any(char::is_control)
            && !key::may_hold_key(self.text)
    }
}

impl fmt::Display for RedactedText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if key::may_hold_key(self.text) {
            return f.write_str(HIDDEN_KEY_WORDS);
        }
        let cut = self.text.floor_char_boundary(self.bytes_max);
        for c in self.text[..cut].chars() {
            f.write_char(if c.is_control() { '\u{fffd}' } else { c })?;
        }
        if cut < self.text.len() { f.write_str("…") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ApiKey;

    fn refusals() -> Refusals {
        Refusals::new(Arc::new(Metrics::new()), |_| false)
    }

    fn note<'a>(address: [u8; 4], client: &'a str) -> RefusalNote<'a> {
        RefusalNote {
            address: Some(address.into()),
            client,
            ..RefusalNote::new(Transport::Mqtt, Cause::Topic, &"a bad topic")
        }
    }

    #[test]
    fn a_source_is_one_entry_that_counts() {
        let refusals = refusals();
        for _ in 0..3 {
            refusals.note(note([10, 0, 0, 1], "press"));
        }
        refusals.note(note([10, 0, 0, 1], "saw"));
        refusals.note(note([10, 0, 0, 2], "press"));
        let all = refusals.newest(&RefusalFilter::default(), 10);
        assert_eq!(all.len(), 3);
        assert!(all.is_sorted_by_key(|entry| std::cmp::Reverse(entry.last_at)));
        let filter = RefusalFilter {
            client: Some("press".to_owned()),
            address: Some([10, 0, 0, 1].into()),
            ..RefusalFilter::default()
        };
        let found = refusals.newest(&filter, 10);
        assert_eq!(found.iter().map(|entry| entry.count).collect::<Vec<_>>(), [3]);
        assert!(found[0].first_at <= found[0].last_at && found[0].words == "a bad topic");
        assert_eq!(refusals.newest(&RefusalFilter::default(), 2).len(), 2);
        let other = RefusalFilter { cause: Some("no_key".to_owned()), ..RefusalFilter::default() };
        assert!(refusals.newest(&other, 10).is_empty());
        assert!(
            refusals
                .metrics
                .render()
                .contains("headgate_refused_total{transport=\"mqtt\",cause=\"topic\"} 5")
        );
    }

    #[test]
    fn a_flood_from_one_address_takes_no_more_than_its_part() {
        let refusals = refusals();
        refusals.note(note([10, 0, 0, 1], "quiet"));
        for i in 0..10_000 {
            refusals.note(note([10, 0, 0, 2], &format!("client-{i}")));
        }
        let all = refusals.newest(&RefusalFilter::default(), usize::MAX);
        assert!(all.len() <= REFUSALS_PER_SHARD_MAX + 1, "{}", all.len());
        let newest = RefusalFilter { client: Some("client-9999".to_owned()), ..RefusalFilter::default() };
        assert_eq!(refusals.newest(&newest, 1).len(), 1);
    }

    #[test]
    fn all_addresses_together_are_bounded() {
        let refusals = refusals();
        for i in 0..20_000_u16 {
            let [a, b] = i.to_be_bytes();
            refusals.note(note([10, 0, a, b], ""));
        }
        let all = refusals.newest(&RefusalFilter::default(), usize::MAX);
        assert_eq!(all.len(), REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX);
    }

    #[test]
    fn threads_never_wait_and_every_refusal_is_counted_or_listed() {
        let refusals = refusals();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1_000).for_each(|_| refusals.note(note([10, 0, 0, 1], "press"))));
            }
        });
        let listed = refusals.newest(&RefusalFilter::default(), 1)[0].count;
        assert_eq!(listed + refusals.unlisted(), 4_000);
        assert!(refusals.metrics.render().contains("cause=\"topic\"} 4000"));
    }

    #[test]
    fn what_looks_like_a_key_is_not_kept() {
        let refusals = refusals();
        let generated = ApiKey::generate();
        let secret = generated.expose();
        for client in [secret, &format!("x{secret}y"), &secret.to_uppercase(), &secret[4..], &secret[..12]] {
            let words = format!("there is no datasource {client:?}");
            let note = RefusalNote { words: &words, datasource: client, ..note([10, 0, 0, 1], client) };
            refusals.note(note);
        }
        let all = refusals.newest(&RefusalFilter::default(), 10);
        assert_eq!(all.len(), 5);
        for entry in all {
            assert_eq!(
                (entry.client.as_str(), entry.datasource.as_str()),
                (HIDDEN_KEY_WORDS, HIDDEN_KEY_WORDS)
            );
            assert!(
                !format!("{entry:?}").to_lowercase().contains(&secret[4..12].to_lowercase()),
                "{entry:?}"
            );
        }
        for plain in ["press-4", "sensor_0123456789", &"0123456789abcdef".repeat(4), ""] {
            assert!(!key::may_hold_key(plain), "{plain}");
        }
    }

    #[test]
    fn what_a_client_calls_itself_is_cut_and_cannot_move_the_cursor() {
        let refusals = refusals();
        let long = "ä".repeat(REFUSALS_CLIENT_BYTES_MAX);
        refusals.note(note([10, 0, 0, 1], &long));
        refusals.note(note([10, 0, 0, 2], "a\u{1b}[2Jb"));
        let clients: Vec<_> =
            refusals.newest(&RefusalFilter::default(), 2).into_iter().map(|entry| entry.client).collect();
        assert!(clients.iter().all(|client| client.len() <= REFUSALS_CLIENT_BYTES_MAX + 3));
        assert!(clients.iter().all(|client| !client.contains('\u{1b}')), "{clients:?}");
    }
}
