//! A bucket: rows that every node of a cluster has in common, in JetStream, laid out as NATS' key-value
//! stores are (ADR-8), so that `nats kv` shows it.
//!
//! A row has a key, a value, and a revision: the place in the bucket's stream where it was last written.
//! Only the newest value of a row is kept. What belongs together is written together, all or nothing
//! ([`Bucket::put_all`], by JetStream's atomic batches, nats-server 2.12), and on the condition that nobody
//! else was first. Whoever needs to know all rows at all times watches them ([`Bucket::watch`]).

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

pub use put::Put;
pub use watch::{Seen, Update, Watch};

/// The place of a row in its bucket's stream: whatever was written later has a higher one. The first is 1.
pub type Revision = u64;

/// Rows in one atomic batch, at most: nats-server's own limit.
pub const BATCH_ROWS_MAX: usize = 1000;

const OPERATION: &str = "KV-Operation";
const DELETED: &str = "DEL";
/// How long JetStream may take to answer. An answer that was lost with a connection never comes.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The pause before it is asked again.
const PAUSE: Duration = Duration::from_millis(100);
/// For how long a message's id is known at the least; the bucket gives none.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// Which bucket.
#[derive(Debug, Clone)]
pub struct BucketSettings {
    /// Its name: letters, digits, `-` and `_`.
    pub name: String,
    /// On how many servers it is.
    pub replicas: usize,
    /// How long a row stays that nobody writes again; for good, if there is none. Who watches hears of its
    /// end as of any other.
    pub age_max: Option<Duration>,
}

/// Why a bucket did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// What was written is not as it was expected to be: somebody else was first. Nothing has changed.
    #[error("somebody else has changed it first")]
    Conflict,
    /// NATS is away, or JetStream cannot answer for now. What was to be written may have been written all
    /// the same, if it was on its way.
    #[error("{0}")]
    Away(String),
    /// It is more than a NATS message or a batch may hold. Nothing has changed.
    #[error("{0}")]
    TooLarge(String),
    /// JetStream does not do it, now or later.
    #[error("{0}")]
    Refused(String),
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its key: letters, digits, `-`, `_`, `/`, `=`, and `.` between its parts.
    pub key: String,
    /// What it holds; `None`: it was deleted.
    pub value: Option<Bytes>,
    /// Where it was written.
    pub revision: Revision,
}

/// A bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bucket {
    nats: Nats,
    context: Context,
    stream: Stream<()>,
    name: String,
}

impl Bucket {
    /// Opens a bucket, or makes it.
    ///
    /// # Errors
    /// [`KvError::Away`] while NATS is; [`KvError::Refused`] if JetStream cannot have such a bucket: it is
    /// off, has too few servers for the replicas, or is older than 2.12.
    pub async fn open(nats: &Nats, settings: &BucketSettings) -> Result<Self, KvError> {
        if let Some(trouble) = nats.trouble() {
            return Err(KvError::Away(trouble));
        }
        let context = ContextBuilder::new().timeout(ANSWER_MAX).build(nats.client().clone());
        let name = &settings.name;
        let wanted = config(settings);
        let found =
            context.get_or_create_stream(wanted.clone()).await.map_err(|error| at_open(name, &error))?;
        let is = &found.cached_info().config;
        if (is.num_replicas, is.max_age) != (wanted.num_replicas, wanted.max_age) || !is.allow_atomic_publish
        {
            context.update_stream(wanted).await.map_err(|error| {
                let text = format!("bucket {name}: {error}");
                match error.kind() {
                    UpdateStreamErrorKind::JetStream(error) => of_server(text, &error),
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
    pub async fn get(&self, key: &str) -> Result<Option<Row>, KvError> {
        Ok(self.last_of(&self.subject(key)).await?.map(|(row, _)| row))
    }

    /// The newest row of a subject, and its headers. From the stream's leader, so that it is as new as can be.
    async fn last_of(&self, subject: &str) -> Result<Option<(Row, HeaderMap)>, KvError> {
        match self.stream.get_last_raw_message_by_subject(subject).await {
            Ok(message) => {
                let key = self.key(&message.subject).to_owned();
                let value = (!is_deleted(Some(&message.headers))).then_some(message.payload);
                Ok(Some((Row { key, value, revision: message.sequence }, message.headers)))
            }
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                _ => Err(KvError::Away(format!("bucket {}: {error}", self.name))),
            },
        }
    }

    /// How far the bucket is: the revision of the newest row that is there, and that of the newest that ever
    /// was.
    async fn end(&self) -> Result<(Revision, Revision), KvError> {
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

/// Whether a message is the mark of a row that is gone.
fn is_deleted(headers: Option<&HeaderMap>) -> bool {
    headers.is_some_and(|headers| {
        let operation = headers.get(OPERATION).map(|value| value.as_str());
        matches!(operation, Some(DELETED | "PURGE")) || headers.get(header::NATS_MARKER_REASON).is_some()
    })
}

fn config(settings: &BucketSettings) -> Config {
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
        duplicate_window: if age_max.is_zero() { DUPLICATE_WINDOW } else { DUPLICATE_WINDOW.min(age_max) },
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        allow_atomic_publish: true,
        allow_message_ttl: !age_max.is_zero(),
        subject_delete_marker_ttl: settings.age_max,
        ..Config::default()
    }
}

pub(crate) fn at_open(name: &str, error: &CreateStreamError) -> KvError {
    let text = format!("bucket {name}: {error}");
    match error.kind() {
        CreateStreamErrorKind::JetStream(error) => of_server(text, &error),
        CreateStreamErrorKind::JetStreamUnavailable
        | CreateStreamErrorKind::TimedOut
        | CreateStreamErrorKind::Response
        | CreateStreamErrorKind::ResponseParse => KvError::Away(text),
        _ => KvError::Refused(text),
    }
}

/// What an error of JetStream's means: with a 5xx it says what passes by itself, mostly.
pub(crate) fn of_server(text: String, error: &jetstream::Error) -> KvError {
    match error.error_code() {
        ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => KvError::Refused(text),
        // A cluster that has yet to find its servers.
        ErrorCode::CLUSTER_NO_PEERS => KvError::Away(text),
        _ if error.code() >= 500 => KvError::Away(text),
        _ => KvError::Refused(text),
    }
}
