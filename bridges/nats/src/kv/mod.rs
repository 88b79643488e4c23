//! A bucket: rows in JetStream that all nodes of a cluster share. It has the layout of NATS' key-value
//! stores (ADR-8), so that `nats kv` can show it.
//!
//! A row has a key, a value, and a revision: the place in the bucket's stream where it was last written. Only
//! the newest value of a row is kept. A bucket is made for one of two uses ([`KvWrites`]). Related rows are
//! written all or none, with JetStream's atomic batches (nats-server 2.12), and only if no other writer was
//! first ([`KvBucket::put_all`]); a node that needs all rows at all times watches the bucket
//! ([`KvBucket::watch`]). Or each row is written by itself, against the revision that its writer knows
//! ([`KvBucket::put`]), and no node needs to hold all of them.

mod cell;
mod put;
mod watch;

use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, LastRawMessageErrorKind, RetentionPolicy, StorageType, Stream,
};
use async_nats::{HeaderMap, header};
use bytes::Bytes;
use tokio::time::timeout;

use crate::connection::Nats;
use crate::stream::{StreamError, open_stream};

pub use put::KvPut;
pub use watch::{KV_WATCH_SILENCE_MAX, KvUpdate, KvWatch, KvWatchProgress};

/// The place of a row in its bucket's stream. A later write has a higher revision. The first is 1.
pub type KvRevision = u64;

/// The most rows in one atomic batch: nats-server's own limit.
pub const KV_BATCH_ROWS_MAX: usize = 1000;

const KV_OPERATION_HEADER: &str = "KV-Operation";
const KV_OPERATION_DELETE: &str = "DEL";
/// How long JetStream may take to answer. An answer that is lost with a connection never comes.
const KV_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// Single rows that may wait for their ack at the same time; one more waits for room.
const KV_PUTS_IN_FLIGHT_MAX: usize = 1024;
/// The pause before JetStream is asked again.
const KV_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The stream's duplicate window, unless rows live shorter. It has no effect: rows carry no message id.
const KV_DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// What a bucket is to be like.
#[derive(Debug, Clone)]
pub struct KvBucketSettings {
    /// Its name: letters, digits, `-` and `_`.
    pub name: String,
    /// How many servers hold it.
    pub replicas: usize,
    /// How long a row stays after its last write; `None`: forever. Watchers see its end as a deletion.
    pub age_max: Option<Duration>,
    /// How its rows are written.
    pub writes: KvWrites,
}

/// How the rows of a bucket are written: decides which features its stream has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvWrites {
    /// In batches, all or none ([`KvBucket::put_all`]). When a row has become too old, watchers are told.
    Batched,
    /// One by one ([`KvBucket::put`]). A row may have a lifetime of its own, and ends without a trace.
    Single,
}

/// Why a bucket did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// Another writer was first: the bucket or a row is not at the expected revision. Nothing has changed.
    #[error("somebody else has changed it first")]
    Conflict,
    /// NATS is away, or JetStream cannot answer now. A write that was already on its way may have been
    /// stored.
    #[error("{0}")]
    Away(String),
    /// The write is larger than a NATS message or a batch may be. Nothing has changed.
    #[error("{0}")]
    TooLarge(String),
    /// JetStream refuses it, and a retry does not help.
    #[error("{0}")]
    Refused(String),
}

impl From<StreamError> for KvError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Away(text) => KvError::Away(text),
            refused => KvError::Refused(refused.to_string()),
        }
    }
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvRow {
    /// Its key: letters, digits, `-`, `_`, `/`, `=`, and `.` between its parts.
    pub key: String,
    /// What it holds; `None`: it was deleted, or never written.
    pub value: Option<Bytes>,
    /// Where it was written.
    pub revision: KvRevision,
}

/// A bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvBucket {
    nats: Nats,
    context: Context,
    stream: Stream<()>,
    name: String,
}

impl KvBucket {
    /// Opens a bucket, and creates it if there is none.
    ///
    /// # Errors
    /// [`KvError::Away`] while NATS is; [`KvError::Refused`] if JetStream cannot have such a bucket: it is
    /// off, has too few servers for the replicas, or is older than 2.12.
    pub async fn open(nats: &Nats, settings: &KvBucketSettings) -> Result<Self, KvError> {
        let builder = ContextBuilder::new().max_ack_inflight(KV_PUTS_IN_FLIGHT_MAX);
        let context = builder.timeout(KV_ANSWER_WAIT_MAX).build(nats.client().clone());
        let name = &settings.name;
        let wanted = kv_stream_config(settings);
        let what = format!("bucket {name}");
        let stream = open_stream(nats, &context, &what, wanted.clone(), |is| {
            // How many servers have it and for how long is the cluster's (`ManagedStream`).
            let lacks = wanted.allow_atomic_publish && !is.allow_atomic_publish;
            let Config { num_replicas, max_age, subject_delete_marker_ttl, duplicate_window, .. } =
                is.clone();
            Ok(lacks.then(|| Config {
                num_replicas,
                max_age,
                subject_delete_marker_ttl,
                duplicate_window,
                ..wanted.clone()
            }))
        });
        Ok(Self { stream: stream.await?, nats: nats.clone(), context, name: name.clone() })
    }

    /// The connection to the bucket.
    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One row as it is now, deleted or not. One that there never was has the revision 0.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn get(&self, key: &str) -> Result<KvRow, KvError> {
        let found = self.last_of(&self.subject(key)).await?;
        Ok(found.map_or_else(|| KvRow { key: key.to_owned(), value: None, revision: 0 }, |(row, _)| row))
    }

    /// The newest row of a subject, and its headers. The stream's leader is asked: replicas may be behind.
    async fn last_of(&self, subject: &str) -> Result<Option<(KvRow, HeaderMap)>, KvError> {
        match self.await_answer(self.stream.get_last_raw_message_by_subject(subject)).await? {
            Ok(message) => {
                let key = self.key(&message.subject).to_owned();
                let value = (!is_deleted(Some(&message.headers))).then_some(message.payload);
                Ok(Some((KvRow { key, value, revision: message.sequence }, message.headers)))
            }
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                _ => Err(self.away_error(&error)),
            },
        }
    }

    /// How far the bucket is: the revision of the newest row that exists, and the newest revision ever
    /// written.
    async fn end_revisions(&self) -> Result<(KvRevision, KvRevision), KvError> {
        let info = self.stream.get_info().await;
        let info = info.map_err(|error| self.away_error(&error))?;
        let last = self.last_of(&self.subject(">")).await?.map_or(0, |(row, _)| row.revision);
        Ok((last, info.state.last_sequence.max(last)))
    }

    async fn await_answer<T>(&self, answer: impl Future<Output = T>) -> Result<T, KvError> {
        timeout(KV_ANSWER_WAIT_MAX, answer).await.map_err(|_| self.silent_error())
    }

    fn silent_error(&self) -> KvError {
        self.away_error(&"JetStream does not answer")
    }

    fn away_error(&self, detail: &dyn std::fmt::Display) -> KvError {
        let trouble = self.nats.trouble();
        KvError::Away(trouble.unwrap_or_else(|| format!("bucket {}: {detail}", self.name)))
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.name)
    }

    fn key<'a>(&self, subject: &'a str) -> &'a str {
        let key = subject.strip_prefix("$KV.").and_then(|rest| rest.strip_prefix(self.name.as_str()));
        key.and_then(|rest| rest.strip_prefix('.')).unwrap_or(subject)
    }
}

/// Whether a message marks its row as deleted.
fn is_deleted(headers: Option<&HeaderMap>) -> bool {
    headers.is_some_and(|headers| {
        let operation = headers.get(KV_OPERATION_HEADER).map(|value| value.as_str());
        matches!(operation, Some(KV_OPERATION_DELETE | "PURGE"))
            || headers.get(header::NATS_MARKER_REASON).is_some()
    })
}

pub(crate) fn kv_stream_config(settings: &KvBucketSettings) -> Config {
    let age_max = settings.age_max.unwrap_or_default();
    let base = Config {
        name: format!("KV_{}", settings.name),
        subjects: vec![format!("$KV.{}.>", settings.name)],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        max_messages_per_subject: 1,
        max_age: age_max,
        num_replicas: settings.replicas,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..Config::default()
    };
    match settings.writes {
        KvWrites::Batched => Config {
            duplicate_window: match age_max.is_zero() {
                true => KV_DUPLICATE_WINDOW,
                false => KV_DUPLICATE_WINDOW.min(age_max),
            },
            allow_atomic_publish: true,
            allow_message_ttl: !age_max.is_zero(),
            subject_delete_marker_ttl: settings.age_max,
            ..base
        },
        KvWrites::Single => Config { allow_message_ttl: true, ..base },
    }
}
