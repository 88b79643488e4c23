//! Cells: the keys of a KV bucket, each read and written by itself, against the revision that the
//! writer knows. Of two writers of one key, the second is refused. No node watches or holds the whole
//! bucket, so it may be larger than the memory of one process.

use std::time::Duration;

use async_nats::header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_TTL};
use async_nats::jetstream;
use async_nats::jetstream::context::{ContextBuilder, PublishErrorKind, UpdateStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, LastRawMessageErrorKind, StorageType, Stream};
use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;
use futures_util::StreamExt;

use crate::kv::{kv_error_of_create, kv_error_of_jetstream};
use crate::{KvError, Nats};

/// How long one read or write may take before it counts as failed.
const CELL_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// Writes that may wait for their ack at the same time; one more waits for room.
const CELL_WRITES_IN_FLIGHT_MAX: usize = 1024;

/// What a bucket of cells is like.
#[derive(Debug, Clone)]
pub struct CellsSettings {
    /// The bucket's name.
    pub bucket: String,
    /// How many servers hold each cell.
    pub replicas: usize,
    /// How long a cell stays after its last write; `None`: forever.
    pub age_max: Option<Duration>,
}

/// Why a cell was not read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CellError {
    /// The cell does not have the revision that the write expects.
    #[error("somebody else has written it meanwhile")]
    Changed,
    /// NATS failed or did not answer in time: whether a write was stored is not known.
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

/// The state of a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// The revision that the next write has to name; 0 if there is no such cell.
    pub revision: u64,
    /// `None`: there is no such cell.
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
    /// Opens the bucket, and creates it if there is none.
    ///
    /// # Errors
    /// [`CellError::Away`], [`CellError::Refused`].
    pub async fn open(nats: &Nats, settings: &CellsSettings) -> Result<Self, CellError> {
        if let Some(trouble) = nats.trouble() {
            return Err(CellError::Away(trouble));
        }
        let builder =
            ContextBuilder::new().max_ack_inflight(CELL_WRITES_IN_FLIGHT_MAX).timeout(CELL_ANSWER_WAIT_MAX);
        let jetstream = builder.build(nats.client().clone());
        let prefix = format!("$KV.{}.", settings.bucket);
        // The configuration of a KV bucket, so that any client can read it; cells may also have a TTL.
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
        let stream = found.map_err(|error| kv_error_of_create(name, &error))?;
        let is = &stream.cached_info().config;
        if (is.num_replicas, is.max_age) != (config.num_replicas, config.max_age) {
            jetstream.update_stream(config).await.map_err(|error| {
                let text = format!("bucket {name}: {error}");
                match error.kind() {
                    UpdateStreamErrorKind::JetStream(error) => kv_error_of_jetstream(text, &error).into(),
                    UpdateStreamErrorKind::TimedOut => CellError::Away(text),
                    _ => CellError::Refused(text),
                }
            })?;
        }
        Ok(Self { nats: nats.clone(), stream, jetstream, prefix })
    }

    /// The connection to the bucket.
    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    /// Reads a cell from the stream's leader, so that it sees every acknowledged write.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn get(&self, key: &str) -> Result<Cell, CellError> {
        let subject = self.subject(key);
        let read = self.stream.get_last_raw_message_by_subject(&subject);
        match tokio::time::timeout(CELL_ANSWER_WAIT_MAX, read).await.map_err(|_| cell_timeout_error())? {
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

    /// Writes a cell if it has `revision`; `None`: whatever it has. The value must not be empty. With `lasts`
    /// the cell expires after that time. Returns the new revision.
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
        match tokio::time::timeout(CELL_ANSWER_WAIT_MAX, written).await.map_err(|_| cell_timeout_error())? {
            Ok(acknowledged) => Ok(acknowledged.sequence),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => Err(CellError::Changed),
            Err(error) => Err(CellError::Away(error.to_string())),
        }
    }

    /// Removes a cell without a trace, whatever its revision. The later of a write and a removal counts.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn remove(&self, key: &str) -> Result<(), CellError> {
        let purged = self.stream.purge().filter(self.subject(key)).into_future();
        let purged =
            tokio::time::timeout(CELL_ANSWER_WAIT_MAX, purged).await.map_err(|_| cell_timeout_error())?;
        purged.map(|_| ()).map_err(|error| CellError::Away(error.to_string()))
    }

    /// Whether a cell's key begins with this part and a dot.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn has_any_below(&self, part: &str) -> Result<bool, CellError> {
        let cells = async {
            let mut subjects = self.stream.info_with_subjects(self.subject(&format!("{part}.>"))).await?;
            Ok::<_, async_nats::Error>(subjects.next().await.transpose()?.is_some())
        };
        let found =
            tokio::time::timeout(CELL_ANSWER_WAIT_MAX, cells).await.map_err(|_| cell_timeout_error())?;
        found.map_err(|error| CellError::Away(error.to_string()))
    }

    fn subject(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

fn cell_timeout_error() -> CellError {
    CellError::Away(format!("no answer within {} s", CELL_ANSWER_WAIT_MAX.as_secs()))
}
