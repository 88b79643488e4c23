//! The rows of QoS 2 exchanges that stay open: bucket `headgate-exchanges`, which every gateway watches. JetStream forgets
//! an id after its window; a row stays until the exchange is released, or its session is older than any
//! ([`EXCHANGE_AGE_MAX`]). While it is there, a repetition of its message is found whichever gateway it comes to.
//!
//! The gateway of the exchange writes the row, after a moment ([`OpenExchanges::due`]) and when it ends. Whoever follows
//! the stream sees exchanges of other gateways there, and writes the row somewhat later, if that gateway has not; so does
//! a gateway that starts, of the newest messages ([`find_open_exchanges`]).
//!
//! A release removes the row first, and then gives the id a new generation: in between the exchange is open, and its
//! client releases it again. A row that is written late, of a generation that is over, is removed by whoever sees it.
//!
//! ```text
//! {id of the exchange}  {"datasource", "generation", "first", "records", "digest", "epoch"}
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_nats::kv::{KvPut, KvRevision, KvRow, KvUpdate, KvWatchProgress};
use headgate_bridge_nats::stream::StoredMessage;
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats, StreamError};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::JetstreamLogShared;
use super::message::SharedIdContent;
use super::once::ExchangeGenerations;
use super::open_exchanges::{KeptExchange, OpenExchanges};
use crate::limits::{EXCHANGE_AGE_MAX, EXCHANGES_FOUND_AT_START_MAX};
use crate::log::OnceId;
use crate::log::nats_message::{NATS_MESSAGE_ID_HEADER, header_text};
use crate::log::once::ContentDigest;
use crate::message::{DatasourceId, Offset, TimeMicros};
use crate::time::{Rfc3339, cluster_micros};

/// The name of the bucket.
const EXCHANGES_BUCKET_NAME: &str = "headgate-exchanges";
/// Rows that are written together.
const EXCHANGE_ROWS_PER_BATCH: usize = 500;
/// How long the first reading of the bucket may take, and a gateway to catch up with the others.
const EXCHANGES_OPEN_TIMEOUT: Duration = Duration::from_secs(30);
const EXCHANGES_SYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// How long writing rows may delay the end of a gateway.
const EXCHANGES_CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often in the delay of a row exchanges are looked through.
const LOOKS_PER_DELAY: u32 = 4;
/// The pause before another attempt to remove rows.
const REMOVAL_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How much older than what was followed last the messages are that a start looks through.
const FOUND_MARGIN_MICROS: TimeMicros = 10_000_000;

/// The bucket, watched.
pub(super) struct ExchangeRows {
    bucket: KvBucket,
    seen: KvWatchProgress,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Serialize, Deserialize)]
struct ExchangeRow {
    datasource: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    first: Offset,
    records: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// The epoch of the log in which it was kept.
    epoch: u64,
}

impl ExchangeRow {
    fn decode(value: &[u8]) -> Option<(DatasourceId, KeptExchange)> {
        let row: Self = serde_json::from_slice(value).ok()?;
        let digest = row.digest.as_deref().and_then(ContentDigest::from_hex);
        let content = SharedIdContent { records: row.records, digest };
        let ExchangeRow { datasource, generation, first, epoch, .. } = row;
        Some((DatasourceId::new(&datasource).ok()?, KeptExchange { generation, first, content, epoch }))
    }
}

/// What the bucket is to be like.
pub(super) fn exchanges_bucket_settings(replicas: usize) -> KvBucketSettings {
    let (name, writes) = (EXCHANGES_BUCKET_NAME.to_owned(), KvWrites::Batched);
    KvBucketSettings { name, replicas, age_max: Some(EXCHANGE_AGE_MAX), writes }
}

impl ExchangeRows {
    /// Opens the bucket and reads it. `stale` gets the rows that have to go.
    ///
    /// # Errors
    /// [`KvError`].
    pub(super) async fn open(
        nats: &Nats,
        replicas: usize,
        exchanges: Arc<OpenExchanges>,
        once: Arc<ExchangeGenerations>,
        (stale, to_remove): (StaleRows, mpsc::UnboundedReceiver<(OnceId, KvRevision)>),
    ) -> Result<Self, KvError> {
        let bucket = KvBucket::open(nats, &exchanges_bucket_settings(replicas)).await?;
        let mut watch = bucket.watch();
        let seen = watch.seen();
        let away = |_| KvError::Away(format!("bucket {EXCHANGES_BUCKET_NAME}: it cannot be read"));
        let first = timeout(EXCHANGES_OPEN_TIMEOUT, watch.next()).await.map_err(away)?;
        wait_for_releases(&once, &first).await;
        apply_update(&exchanges, &once, &stale, first);
        let watching = tokio::spawn(async move {
            loop {
                let update = watch.next().await;
                wait_for_releases(&once, &update).await;
                apply_update(&exchanges, &once, &stale, update);
            }
        });
        let removing = tokio::spawn(remove_stale(bucket.clone(), to_remove));
        Ok(Self { bucket, seen, tasks: [watching, removing] })
    }

    /// Waits until this gateway knows every row that was written before.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub(super) async fn sync(&self) -> Result<(), KvError> {
        self.seen.sync(EXCHANGES_SYNC_TIMEOUT).await.map(drop)
    }

    /// Removes rows, until `give_up_at`.
    ///
    /// # Errors
    /// [`KvError`].
    pub(super) async fn remove(
        &self,
        rows: &[(OnceId, KvRevision)],
        give_up_at: Instant,
    ) -> Result<(), KvError> {
        let puts: Vec<KvPut> =
            rows.iter().map(|(id, _)| KvPut { key: id.to_hex(), value: None, expected: None }).collect();
        for puts in puts.chunks(EXCHANGE_ROWS_PER_BATCH) {
            loop {
                match self.bucket.put_all(puts, None).await {
                    Ok(_) => break,
                    Err(error) if Instant::now() >= give_up_at => return Err(error),
                    Err(_) => sleep(REMOVAL_RETRY_PAUSE).await,
                }
            }
        }
        Ok(())
    }
}

impl Drop for ExchangeRows {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Takes rows of exchanges that are over. Cheap to clone.
pub(super) type StaleRows = mpsc::UnboundedSender<(OnceId, KvRevision)>;

/// Removes rows of exchanges that are over, unless they are others by now.
async fn remove_stale(bucket: KvBucket, mut stale: mpsc::UnboundedReceiver<(OnceId, KvRevision)>) {
    while let Some((id, revision)) = stale.recv().await {
        let put = KvPut { key: id.to_hex(), value: None, expected: Some(revision) };
        while matches!(bucket.put_all(std::slice::from_ref(&put), None).await, Err(KvError::Away(_))) {
            sleep(REMOVAL_RETRY_PAUSE).await;
        }
    }
}

/// Waits until this gateway knows of each release that came before a row: the row was written after it, and says what
/// is open now.
async fn wait_for_releases(once: &ExchangeGenerations, update: &KvUpdate) {
    let seems_over = |row: &KvRow| {
        let kept = row.value.as_deref().and_then(ExchangeRow::decode);
        let current = OnceId::from_hex(&row.key).and_then(|id| once.generation(id));
        kept.is_some_and(|(_, kept)| current.is_some_and(|current| Some(current.number) != kept.generation))
    };
    while update.rows.iter().any(seems_over) {
        if once.sync().await.is_ok() {
            return;
        }
        sleep(REMOVAL_RETRY_PAUSE).await;
    }
}

fn apply_update(exchanges: &OpenExchanges, once: &ExchangeGenerations, stale: &StaleRows, update: KvUpdate) {
    if update.all {
        exchanges.forget_rows();
    }
    for row in update.rows {
        let Some(id) = OnceId::from_hex(&row.key) else { continue };
        let Some((datasource, kept)) = row.value.as_deref().and_then(ExchangeRow::decode) else {
            exchanges.note_no_row(id, row.revision);
            continue;
        };
        let current = once.generation(id).map(|generation| generation.number);
        let is_over = current.is_some() && current != kept.generation;
        if is_over || !exchanges.note_row(&datasource, id, kept, row.revision, false) {
            let _ = stale.send((id, row.revision));
        }
    }
}

/// Writes the rows of exchanges that stay open, for as long as the log is open.
pub(super) async fn write_exchange_rows(shared: Arc<JetstreamLogShared>) {
    let pause = shared.exchanges.row_delay() / LOOKS_PER_DELAY;
    loop {
        sleep(pause.max(Duration::from_millis(10))).await;
        if shared.gate.is_in_doubt() {
            continue;
        }
        if let Err(error) = write_due_rows(&shared, false).await {
            warn!(%error, "exchanges that stay open cannot be noted; trying again");
        }
    }
}

/// Writes the rows of all exchanges that are open, at the end.
pub(super) async fn write_last_rows(shared: &JetstreamLogShared) {
    if !shared.gate.is_in_doubt()
        && !matches!(timeout(EXCHANGES_CLOSE_TIMEOUT, write_due_rows(shared, true)).await, Ok(Ok(())))
    {
        warn!("exchanges that are open could not be noted; other gateways may");
    }
}

async fn write_due_rows(shared: &JetstreamLogShared, all: bool) -> Result<(), KvError> {
    let due = shared.exchanges.due(all);
    for chunk in due.chunks(EXCHANGE_ROWS_PER_BATCH) {
        let puts: Vec<KvPut> = chunk
            .iter()
            .map(|(id, datasource, kept)| {
                let row = ExchangeRow {
                    datasource: datasource.as_str().to_owned(),
                    generation: kept.generation,
                    first: kept.first,
                    records: kept.content.records,
                    digest: kept.content.digest.map(ContentDigest::to_hex),
                    epoch: kept.epoch,
                };
                let value = serde_json::to_vec(&row).unwrap_or_default();
                KvPut { key: id.to_hex(), value: Some(value.into()), expected: None }
            })
            .collect();
        let last = shared.rows.bucket.put_all(&puts, None).await?;
        let first = last + 1 - chunk.len() as KvRevision;
        for ((id, datasource, kept), revision) in chunk.iter().zip(first..) {
            if !shared.exchanges.note_row(datasource, *id, *kept, revision, true) {
                let _ = shared.stale_rows.send((*id, revision));
            }
        }
    }
    Ok(())
}

/// Notes the exchange that a message of the stream has opened, if it is of one.
pub(super) fn note_exchange(shared: &JetstreamLogShared, message: &StoredMessage) {
    let Some(text) = header_text(&message.headers, NATS_MESSAGE_ID_HEADER) else { return };
    let (id, generation) = match text.split_once('.') {
        Some((id, generation)) => match u64::from_str_radix(generation, 16) {
            Ok(generation) => (id, Some(generation)),
            // One of several, and not the first.
            Err(_) => return,
        },
        None => (text, None),
    };
    let Some(id) = OnceId::from_hex(id).filter(|id| id.is_exchange()) else { return };
    let current = shared.once.generation(id).map(|generation| generation.number);
    if current.is_some() && current != generation {
        return;
    }
    let datasource = message.subject.as_str().split('.').nth(1).map(DatasourceId::new);
    let Some(Ok(datasource)) = datasource else { return };
    let (first, content, epoch) = (message.sequence, SharedIdContent::read(message), shared.epoch());
    shared.exchanges.note_seen(&datasource, id, KeptExchange { generation, first, content, epoch });
}

/// Notes the exchanges that the newest messages of the stream have opened: from somewhat before `followed_at` on, when this
/// gateway had followed the stream last. Releases of what is older than ids are known may be forgotten, so that it is
/// passed over.
///
/// # Errors
/// [`StreamError::Away`].
pub(super) async fn find_open_exchanges(
    shared: &JetstreamLogShared,
    followed_at: TimeMicros,
    known_for: Duration,
) -> Result<(), StreamError> {
    let known_for = TimeMicros::try_from(known_for.as_micros()).unwrap_or(TimeMicros::MAX);
    let from = (followed_at - FOUND_MARGIN_MICROS).max(cluster_micros().saturating_sub(known_for));
    let end = shared.tail.next_offset();
    let Some(mut next) = shared.stream.sequence_at(&Rfc3339(from).to_string()).await? else { return Ok(()) };
    next = next.max(end.saturating_sub(EXCHANGES_FOUND_AT_START_MAX));
    while next < end {
        let mut page = shared.stream.get(next, 1_000, 8 << 20).await?;
        if page.is_empty() {
            // The server that answered may lag behind the leader.
            page.extend(shared.stream.first_of_leader(">", next).await?);
        }
        let Some(last) = page.last() else { return Ok(()) };
        next = last.sequence + 1;
        let records = page.iter().filter(|message| !shared.fences.shut_out(message));
        records.for_each(|message| note_exchange(shared, message));
    }
    Ok(())
}
