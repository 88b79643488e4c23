//! Cells: the keys of a KV bucket, each read and written by itself, against the revision that the
//! writer knows. Of two that write the same key one is told that the other was there before. Nobody
//! watches the whole bucket, and nobody holds it: it may be larger than one process' memory.

use std::time::Duration;

use async_nats::header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_TTL};
use async_nats::jetstream;
use async_nats::jetstream::context::{ContextBuilder, PublishErrorKind, UpdateStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, LastRawMessageErrorKind, StorageType, Stream};
use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;
use futures_util::StreamExt;

use crate::kv::{at_open, of_server};
use crate::{KvError, Nats};

/// How long one read or write may take before it counts as failed.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// Writes that wait for their acknowledgement at once; one more waits until there are fewer.
const WRITES_MAX: usize = 1024;

/// What a bucket of cells is like.
#[derive(Debug, Clone)]
pub struct CellsSettings {
    /// The bucket's name.
    pub bucket: String,
    /// On how many servers each cell is.
    pub replicas: usize,
    /// How long a cell stays that nobody writes again; `None`: for ever.
    pub age_max: Option<Duration>,
}

/// Why a cell was not read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CellError {
    /// It has another revision than the one that was to be written over.
    #[error("somebody else has written it meanwhile")]
    Changed,
    /// NATS has not done it, or has not said so in time: whether a write is there is not known.
    #[error("NATS: {0}")]
    Away(String),
    /// JetStream cannot have such a bucket.
    #[error("NATS: {0}")]
    Refused(String),
}

impl From<KvError> for CellError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Away(text) => CellError::Away(text),
            other => CellError::Refused(other.to_string()),
        }
    }
}

/// A cell as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// What a write over it has to name; 0 if it is not there.
    pub revision: u64,
    /// `None`: it is not there.
    pub value: Option<Bytes>,
}

/// A bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cells {
    nats: Nats,
    stream: Stream,
    jetstream: jetstream::Context,
    prefix: String,
}

impl Cells {
    /// Opens the bucket, or makes it.
    ///
    /// # Errors
    /// [`CellError::Away`], [`CellError::Refused`].
    pub async fn open(nats: &Nats, settings: &CellsSettings) -> Result<Self, CellError> {
        if let Some(trouble) = nats.trouble() {
            return Err(CellError::Away(trouble));
        }
        let builder = ContextBuilder::new().max_ack_inflight(WRITES_MAX).timeout(ANSWER_WAIT_MAX);
        let jetstream = builder.build(nats.client().clone());
        let prefix = format!("$KV.{}.", settings.bucket);
        // As any client makes a bucket, so that any client reads it; and cells may have an end.
        let config = Config {
            name: format!("KV_{}", settings.bucket),
            subjects: vec![format!("{prefix}>")],
            max_messages_per_subject: 1,
            max_age: settings.age_max.unwrap_or_default(),
            storage: StorageType::File,
            num_replicas: settings.replicas,
            discard: DiscardPolicy::New,
            allow_rollup: true,
            deny_delete: true,
            allow_direct: true,
            allow_message_ttl: true,
            ..Config::default()
        };
        let name = &settings.bucket;
        let found = jetstream.get_or_create_stream(config.clone()).await;
        let stream = found.map_err(|error| at_open(name, &error))?;
        let is = &stream.cached_info().config;
        if (is.num_replicas, is.max_age) != (config.num_replicas, config.max_age) {
            jetstream.update_stream(config).await.map_err(|error| {
                let text = format!("bucket {name}: {error}");
                match error.kind() {
                    UpdateStreamErrorKind::JetStream(error) => of_server(text, &error).into(),
                    UpdateStreamErrorKind::TimedOut => CellError::Away(text),
                    _ => CellError::Refused(text),
                }
            })?;
        }
        Ok(Self { nats: nats.clone(), stream, jetstream, prefix })
    }

    /// The connection that it is reached by.
    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    /// Reads a cell from the server that decides on its writes: what was acknowledged is seen.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn get(&self, key: &str) -> Result<Cell, CellError> {
        let subject = self.subject(key);
        let read = self.stream.get_last_raw_message_by_subject(&subject);
        match tokio::time::timeout(ANSWER_WAIT_MAX, read).await.map_err(|_| late())? {
            Ok(message) => {
                let value = (!message.payload.is_empty()).then_some(message.payload);
                Ok(Cell { revision: message.sequence, value })
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                Ok(Cell { revision: 0, value: None })
            }
            Err(error) => Err(CellError::Away(error.to_string())),
        }
    }

    /// Writes a cell that has `revision`, whatever it has if that is `None`. The value is not empty. With
    /// `lasts` it is gone after that time. Returns the new revision.
    ///
    /// # Errors
    /// [`CellError`].
    pub async fn put(
        &self,
        key: &str,
        value: Bytes,
        revision: Option<u64>,
        lasts: Option<Duration>,
    ) -> Result<u64, CellError> {
        let mut headers = HeaderMap::new();
        if let Some(revision) = revision {
            headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, HeaderValue::from(revision));
        }
        if let Some(lasts) = lasts {
            headers.insert(NATS_MESSAGE_TTL, HeaderValue::from(lasts.as_secs().max(1)));
        }
        let written = async {
            let sent = self.jetstream.publish_with_headers(self.subject(key), headers, value).await?;
            sent.await
        };
        match tokio::time::timeout(ANSWER_WAIT_MAX, written).await.map_err(|_| late())? {
            Ok(acknowledged) => Ok(acknowledged.sequence),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => Err(CellError::Changed),
            Err(error) => Err(CellError::Away(error.to_string())),
        }
    }

    /// Removes a cell, of which nothing stays: of two who write and remove it the later one counts.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn remove(&self, key: &str) -> Result<(), CellError> {
        let purged = self.stream.purge().filter(self.subject(key)).into_future();
        let purged = tokio::time::timeout(ANSWER_WAIT_MAX, purged).await.map_err(|_| late())?;
        purged.map(|_| ()).map_err(|error| CellError::Away(error.to_string()))
    }

    /// Whether there is a cell below this part of a key.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn any_below(&self, part: &str) -> Result<bool, CellError> {
        let cells = async {
            let mut subjects = self.stream.info_with_subjects(self.subject(&format!("{part}.>"))).await?;
            Ok::<_, async_nats::Error>(subjects.next().await.transpose()?.is_some())
        };
        let found = tokio::time::timeout(ANSWER_WAIT_MAX, cells).await.map_err(|_| late())?;
        found.map_err(|error| CellError::Away(error.to_string()))
    }

    fn subject(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

fn late() -> CellError {
    CellError::Away(format!("no answer within {} s", ANSWER_WAIT_MAX.as_secs()))
}
