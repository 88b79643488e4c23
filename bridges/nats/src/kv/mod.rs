//! A bucket: rows in JetStream that all nodes of a cluster share. It has the layout of NATS' key-value
//! stores (ADR-8), so that `nats kv` can show it.
//!
//! A row has a key, a value, and a revision: the place in the bucket's stream where it was last written.
//! Only the newest value of a row is kept. [`KvBucket::put_all`] writes related rows all or none, with
//! JetStream's atomic batches (nats-server 2.12), and only if no other writer was first. A node that needs
//! all rows at all times watches the bucket ([`KvBucket::watch`]).

mod put;
mod watch;

use std::time::Duration;

use async_nats::jetstream::context::{
    ContextBuilder, CreateStreamError, CreateStreamErrorKind, UpdateStreamErrorKind,
};
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, LastRawMessageErrorKind, RetentionPolicy, StorageType, Stream,
};
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{HeaderMap, header};
use bytes::Bytes;

use crate::connection::Nats;

pub use put::KvPut;
pub use watch::{KvUpdate, KvWatch, KvWatchProgress};

/// The place of a row in its bucket's stream. A later write has a higher revision. The first is 1.
pub type KvRevision = u64;

/// The most rows in one atomic batch: nats-server's own limit.
pub const KV_BATCH_ROWS_MAX: usize = 1000;

const KV_OPERATION_HEADER: &str = "KV-Operation";
const KV_OPERATION_DELETE: &str = "DEL";
/// How long JetStream may take to answer. An answer that is lost with a connection never comes.
const KV_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
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
}

/// Why a bucket did not do what was asked.
#[derive(Debug, thiserror::Error)]
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

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvRow {
    /// Its key: letters, digits, `-`, `_`, `/`, `=`, and `.` between its parts.
    pub key: String,
    /// What it holds; `None`: it was deleted.
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
        if let Some(trouble) = nats.trouble() {
            return Err(KvError::Away(trouble));
        }
        let context = ContextBuilder::new().timeout(KV_ANSWER_WAIT_MAX).build(nats.client().clone());
        let name = &settings.name;
        let wanted = kv_stream_config(settings);
        let found = context
            .get_or_create_stream(wanted.clone())
            .await
            .map_err(|error| kv_error_of_create(name, &error))?;
        let is = &found.cached_info().config;
        if (is.num_replicas, is.max_age) != (wanted.num_replicas, wanted.max_age) || !is.allow_atomic_publish
        {
            context.update_stream(wanted).await.map_err(|error| {
                let text = format!("bucket {name}: {error}");
                match error.kind() {
                    UpdateStreamErrorKind::JetStream(error) => kv_error_of_jetstream(text, &error),
                    UpdateStreamErrorKind::TimedOut => KvError::Away(text),
                    _ => KvError::Refused(text),
                }
            })?;
        }
        let stream = context.get_stream_no_info(format!("KV_{name}")).await;
        let stream = stream.map_err(|error| KvError::Refused(format!("bucket {name}: {error}")))?;
        Ok(Self { nats: nats.clone(), context, stream, name: name.clone() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One row as it is now, deleted or not; `None` if there never was one.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn get(&self, key: &str) -> Result<Option<KvRow>, KvError> {
        Ok(self.last_of(&self.subject(key)).await?.map(|(row, _)| row))
    }

    /// The newest row of a subject, and its headers. The stream's leader is asked: replicas may be behind.
    async fn last_of(&self, subject: &str) -> Result<Option<(KvRow, HeaderMap)>, KvError> {
        match self.stream.get_last_raw_message_by_subject(subject).await {
            Ok(message) => {
                let key = self.key(&message.subject).to_owned();
                let value = (!is_deleted(Some(&message.headers))).then_some(message.payload);
                Ok(Some((KvRow { key, value, revision: message.sequence }, message.headers)))
            }
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                _ => Err(KvError::Away(format!("bucket {}: {error}", self.name))),
            },
        }
    }

    /// How far the bucket is: the revision of the newest row that exists, and the newest revision ever
    /// written.
    async fn end_revisions(&self) -> Result<(KvRevision, KvRevision), KvError> {
        let info = self.stream.get_info().await;
        let info = info.map_err(|error| KvError::Away(format!("bucket {}: {error}", self.name)))?;
        let last = self.last_of(&self.subject(">")).await?.map_or(0, |(row, _)| row.revision);
        Ok((last, info.state.last_sequence.max(last)))
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

fn kv_stream_config(settings: &KvBucketSettings) -> Config {
    let age_max = settings.age_max.unwrap_or_default();
    Config {
        name: format!("KV_{}", settings.name),
        subjects: vec![format!("$KV.{}.>", settings.name)],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        max_messages_per_subject: 1,
        max_age: age_max,
        num_replicas: settings.replicas,
        duplicate_window: if age_max.is_zero() {
            KV_DUPLICATE_WINDOW
        } else {
            KV_DUPLICATE_WINDOW.min(age_max)
        },
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        allow_atomic_publish: true,
        allow_message_ttl: !age_max.is_zero(),
        subject_delete_marker_ttl: settings.age_max,
        ..Config::default()
    }
}

pub(crate) fn kv_error_of_create(name: &str, error: &CreateStreamError) -> KvError {
    let text = format!("bucket {name}: {error}");
    match error.kind() {
        CreateStreamErrorKind::JetStream(error) => kv_error_of_jetstream(text, &error),
        CreateStreamErrorKind::JetStreamUnavailable
        | CreateStreamErrorKind::TimedOut
        | CreateStreamErrorKind::Response
        | CreateStreamErrorKind::ResponseParse => KvError::Away(text),
        _ => KvError::Refused(text),
    }
}

/// Classifies an error of JetStream. A 5xx is transient, with the exceptions below.
pub(crate) fn kv_error_of_jetstream(text: String, error: &jetstream::Error) -> KvError {
    match error.error_code() {
        ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => KvError::Refused(text),
        // The cluster has not found its servers yet.
        ErrorCode::CLUSTER_NO_PEERS => KvError::Away(text),
        _ if error.code() >= 500 => KvError::Away(text),
        _ => KvError::Refused(text),
    }
}
