//! Keeping a section once in a cluster. For a message id it is enough that JetStream knows it for its window
//! (`intake.dedup_window_s`).
//!
//! The id of a QoS 2 exchange is known until the exchange is released; then the next message uses the same
//! id. So the id in the stream has a *generation*, which every release replaces.
//!
//! Generations are rows of the bucket `headgate-once`, which each node watches. A release is durable there
//! before it is answered, and [`ExchangeGenerations::sync`] waits until this node knows all of them.
//!
//! A row may expire only when JetStream knows no message of an earlier generation any more. Otherwise an id
//! without a generation would match a message from before the first release. That takes one window after the
//! row was written.
//!
//! While messages use a generation, its row must outlive JetStream's memory of them, because one may be
//! repeated. So a row older than [`GENERATION_FRESH_MAX`] is rewritten when its generation is used. A row
//! stays for a window and [`GENERATION_GRACE`] more.
//!
//! The first message with an id carries a digest of all that share it. When JetStream says that it knows the id, the
//! message that has it is read, and its digest tells a repetition from another message, which is refused. One of an
//! older Headgate has none: there the id and the number decide. A message that is refused for its limit or schema first
//! asks whether its id is known, with a message that JetStream never stores.
//!
//! Unlike in the log of one gateway, a message that has an id and is part of an exchange is known by its id alone, an
//! exchange that stays open has a row ([`exchange_rows`](super::exchange_rows)). JetStream keeps the ids of all datasources
//! for their time, and nobody's are pushed out: who brings new ones faster than they leave is refused
//! (`id_allowance.rs`). Open exchanges are bounded too (`open_exchanges.rs`).
//!
//! Several messages may share one id: all but the first add their number in the section to it. The first is
//! published alone. The others follow only if the first was new, or if an earlier attempt may have ended
//! halfway.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::kv::{KvPut, KvRevision, KvUpdate, KvWatchProgress};
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::log::{AppendError, CommitOutcome, OnceId};
use crate::message::{TimeMicros, now_micros};

/// The name of the bucket.
const ONCE_BUCKET_NAME: &str = "headgate-once";
/// A row older than this is rewritten when its generation is used.
const GENERATION_FRESH_MAX: Duration = Duration::from_secs(60);
/// How long a row stays beyond the window: [`GENERATION_FRESH_MAX`], and the difference between clocks.
const GENERATION_GRACE: Duration = Duration::from_secs(120);
/// How long the release of an exchange is known beyond the window, at least.
pub(super) const RELEASE_MEMORY: Duration = GENERATION_FRESH_MAX;
/// Rows that are written together.
const RELEASE_ROWS_MAX: usize = 500;
/// How long the first reading of the bucket may take.
const ONCE_BUCKET_OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a node may take to catch up with the others.
const ONCE_SYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before another attempt.
const RELEASE_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The caller of a release.
pub(super) type ReleaseReply = oneshot::Sender<Result<CommitOutcome, AppendError>>;

/// The generations of exchanges, as this node knows them.
pub(super) struct ExchangeGenerations {
    known: Arc<RwLock<HashMap<OnceId, Generation>>>,
    seen: KvWatchProgress,
    work: mpsc::UnboundedSender<GenerationWork>,
    tasks: [JoinHandle<()>; 2],
}

/// The generation of an exchange's id.
#[derive(Debug, Clone, Copy)]
pub(super) struct Generation {
    /// A number that no other generation has.
    pub(super) number: u64,
    /// When its row was written.
    at: TimeMicros,
    revision: KvRevision,
}

impl Generation {
    /// Whether its row has to be rewritten when it is used.
    pub(super) fn is_stale(self) -> bool {
        let age = now_micros().saturating_sub(self.at);
        age > i64::try_from(GENERATION_FRESH_MAX.as_micros()).unwrap_or(i64::MAX)
    }

    fn encode(self) -> Bytes {
        let mut bytes = self.number.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.at.to_le_bytes());
        bytes.into()
    }

    fn decode(bytes: &[u8], revision: KvRevision) -> Option<Self> {
        let (number, at) = bytes.split_first_chunk()?;
        let at = TimeMicros::from_le_bytes(at.try_into().ok()?);
        Some(Self { number: u64::from_le_bytes(*number), at, revision })
    }
}

/// What the bucket is to be like.
pub(super) fn once_bucket_settings(replicas: usize, window: Duration) -> KvBucketSettings {
    let (name, writes) = (ONCE_BUCKET_NAME.to_owned(), KvWrites::Batched);
    KvBucketSettings { name, replicas, age_max: Some(window + GENERATION_GRACE), writes }
}

enum GenerationWork {
    Release { ids: Vec<OnceId>, give_up_at: Instant, reply: ReleaseReply },
    Refresh { id: OnceId, generation: Generation, done: oneshot::Sender<Result<(), AppendError>> },
}

impl ExchangeGenerations {
    /// Opens the bucket and reads it. `released` is called with each id and its generation, again and again.
    ///
    /// # Errors
    /// [`KvError`].
    pub(super) async fn open(
        nats: &Nats,
        replicas: usize,
        window: Duration,
        released: impl Fn(OnceId, u64) + Send + Sync + 'static,
    ) -> Result<Self, KvError> {
        let bucket = KvBucket::open(nats, &once_bucket_settings(replicas, window)).await?;
        let known: Arc<RwLock<HashMap<OnceId, Generation>>> = Arc::default();
        let mut watch = bucket.watch();
        let seen = watch.seen();
        let away = |_| KvError::Away(format!("bucket {ONCE_BUCKET_NAME}: it cannot be read"));
        let mut update = timeout(ONCE_BUCKET_OPEN_TIMEOUT, watch.next()).await.map_err(away)?;
        let watcher = known.clone();
        let watching = tokio::spawn(async move {
            loop {
                for row in &update.rows {
                    let number =
                        row.value.as_deref().and_then(|value| Generation::decode(value, row.revision));
                    // This gateway's own releases are known before they come here, and may be followed by others.
                    if let (Some(id), Some(generation)) = (OnceId::from_hex(&row.key), number)
                        && watcher
                            .read()
                            .get(&id)
                            .is_none_or(|known: &Generation| known.revision <= row.revision)
                    {
                        released(id, generation.number);
                    }
                }
                apply_update(&watcher, update);
                update = watch.next().await;
            }
        });
        let (work, waiting) = mpsc::unbounded_channel();
        let writing = tokio::spawn(run_generation_writer(bucket, known.clone(), waiting));
        // The watching task has applied the first rows when this returns.
        seen.sync(ONCE_SYNC_TIMEOUT).await?;
        Ok(Self { known, seen, work, tasks: [watching, writing] })
    }

    /// The generation of an exchange, if it has one.
    pub(super) fn generation(&self, id: OnceId) -> Option<Generation> {
        self.known.read().get(&id).copied()
    }

    /// Ends exchanges: once answered, their ids belong to new messages.
    pub(super) fn release(&self, ids: Vec<OnceId>, give_up_at: std::time::Instant, reply: ReleaseReply) {
        // If the task has ended, the dropped reply says that the log is closed.
        let _ = self.work.send(GenerationWork::Release { ids, give_up_at: give_up_at.into(), reply });
    }

    /// Rewrites a stale row.
    pub(super) fn refresh(
        &self,
        id: OnceId,
        generation: Generation,
    ) -> oneshot::Receiver<Result<(), AppendError>> {
        let (done, refreshed) = oneshot::channel();
        let _ = self.work.send(GenerationWork::Refresh { id, generation, done });
        refreshed
    }

    /// Waits until this node knows every release that was answered before.
    ///
    /// # Errors
    /// [`AppendError::Away`].
    pub(super) async fn sync(&self) -> Result<(), AppendError> {
        self.seen.sync(ONCE_SYNC_TIMEOUT).await.map_err(away)?;
        Ok(())
    }
}

impl Drop for ExchangeGenerations {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Applies an update of the bucket.
fn apply_update(known: &RwLock<HashMap<OnceId, Generation>>, update: KvUpdate) {
    let mut known = known.write();
    if update.all {
        known.clear();
    }
    for row in update.rows {
        apply_row(&mut known, &row.key, row.value.as_deref(), row.revision);
    }
}

/// Applies a row, unless a newer revision is known.
fn apply_row(known: &mut HashMap<OnceId, Generation>, key: &str, value: Option<&[u8]>, revision: KvRevision) {
    let Some(id) = OnceId::from_hex(key) else { return };
    if known.get(&id).is_some_and(|newer| newer.revision >= revision) {
        return;
    }
    match value.and_then(|value| Generation::decode(value, revision)) {
        Some(generation) => _ = known.insert(id, generation),
        None => _ = known.remove(&id),
    }
}

/// Writes rows, with all waiting releases together.
async fn run_generation_writer(
    bucket: KvBucket,
    known: Arc<RwLock<HashMap<OnceId, Generation>>>,
    mut waiting: mpsc::UnboundedReceiver<GenerationWork>,
) {
    let mut taken = Vec::new();
    while waiting.recv_many(&mut taken, RELEASE_ROWS_MAX).await > 0 {
        let mut releases = Vec::new();
        for work in taken.drain(..) {
            match work {
                GenerationWork::Release { ids, give_up_at, reply } => releases.push((ids, give_up_at, reply)),
                GenerationWork::Refresh { id, generation, done } => {
                    let _ = done.send(rewrite_row(&bucket, &known, id, generation).await);
                }
            }
        }
        let mut left = releases.into_iter().peekable();
        while left.peek().is_some() {
            let mut rows = 0;
            let mut group = Vec::new();
            while let Some(release) =
                left.next_if(|(ids, ..)| rows == 0 || rows + ids.len() <= RELEASE_ROWS_MAX)
            {
                rows += release.0.len();
                group.push(release);
            }
            write_releases(&bucket, &known, group).await;
        }
    }
}

/// Writes the rows of a group of releases, and answers them.
async fn write_releases(
    bucket: &KvBucket,
    known: &RwLock<HashMap<OnceId, Generation>>,
    mut group: Vec<(Vec<OnceId>, Instant, ReleaseReply)>,
) {
    while !group.is_empty() {
        let at = now_micros();
        let mut rows: Vec<(OnceId, Generation)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for id in group.iter().flat_map(|(ids, ..)| ids).filter(|id| seen.insert(**id)) {
            rows.push((*id, Generation { number: unique_number(), at, revision: 0 }));
        }
        let mut written = Ok(());
        for rows in rows.chunks(RELEASE_ROWS_MAX) {
            let puts: Vec<KvPut> = rows
                .iter()
                .map(|(id, generation)| KvPut {
                    key: id.to_hex(),
                    value: Some(generation.encode()),
                    expected: None,
                })
                .collect();
            match bucket.put_all(&puts, None).await {
                Ok(last) => {
                    let first = last + 1 - rows.len() as KvRevision;
                    let mut known = known.write();
                    for ((id, generation), revision) in rows.iter().zip(first..) {
                        if known.get(id).is_none_or(|newer| newer.revision < revision) {
                            known.insert(*id, Generation { revision, ..*generation });
                        }
                    }
                }
                Err(error) => written = Err(error),
            }
        }
        let Err(error) = written else {
            for (.., reply) in group {
                let _ = reply.send(Ok(CommitOutcome { outcomes: Vec::new() }));
            }
            return;
        };
        let (error, now) = (away(error), Instant::now());
        for (.., reply) in group.extract_if(.., |(_, give_up_at, _)| *give_up_at <= now) {
            let _ = reply.send(Err(error.clone()));
        }
        if !group.is_empty() {
            sleep(RELEASE_RETRY_PAUSE).await;
        }
    }
}

/// Rewrites a row, unless another node has.
async fn rewrite_row(
    bucket: &KvBucket,
    known: &RwLock<HashMap<OnceId, Generation>>,
    id: OnceId,
    generation: Generation,
) -> Result<(), AppendError> {
    let fresh = Generation { at: now_micros(), ..generation };
    let put = KvPut { key: id.to_hex(), value: Some(fresh.encode()), expected: Some(generation.revision) };
    match bucket.put_all(&[put], None).await {
        Ok(revision) => {
            let mut known = known.write();
            if known.get(&id).is_none_or(|newer| newer.revision < revision) {
                known.insert(id, Generation { revision, ..fresh });
            }
            Ok(())
        }
        // The row is newer already.
        Err(KvError::Conflict) => Ok(()),
        Err(error) => Err(away(error)),
    }
}

fn away(error: KvError) -> AppendError {
    AppendError::Away(error.to_string().into())
}

/// A number that no other release has.
fn unique_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Each `RandomState` has new random keys.
    RandomState::new().hash_one(now_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_a_generation_and_a_newer_one_stays() {
        let id = OnceId::of_exchange(1, 1);
        let row = |number| Generation { number, at: 7, revision: 0 }.encode();
        let mut known = HashMap::new();
        apply_row(&mut known, &id.to_hex(), Some(&row(1)), 5);
        apply_row(&mut known, &id.to_hex(), Some(&row(2)), 4);
        assert_eq!(known.get(&id).map(|found| (found.number, found.at, found.revision)), Some((1, 7, 5)));
        apply_row(&mut known, &id.to_hex(), None, 6);
        assert!(known.is_empty());
        apply_row(&mut known, "no id", Some(&row(1)), 7);
        assert!(known.is_empty());
    }

    #[test]
    fn a_generation_is_fresh_for_a_minute() {
        let aged =
            |seconds: i64| Generation { number: 1, at: now_micros() - seconds * 1_000_000, revision: 1 };
        assert!(!aged(50).is_stale());
        assert!(aged(70).is_stale());
    }
}
