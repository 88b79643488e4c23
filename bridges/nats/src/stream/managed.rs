//! The streams and buckets that belong to a whole cluster. Whoever starts finds out how their settings differ from its
//! own, and changes nothing: they are changed on purpose alone ([`ManagedStream::change`]). Each is marked with whose it
//! is ([`StreamMark`]), and a report says how far it is ([`StreamExtent`]).

use std::fmt;
use std::time::Duration;

use async_nats::jetstream::context::{Context, UpdateStreamErrorKind};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, Info, LastRawMessageErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::timeout;

use super::{
    JetstreamSettings, STREAM_ANSWER_WAIT_MAX, StoredMessage, StreamError, StreamSequence,
    stream_error_of_jetstream,
};
use crate::connection::Nats;
use crate::kv::{KvBucketSettings, kv_stream_config};

/// What a stream or bucket is to be like, for all who use it.
#[derive(Debug, Clone)]
pub struct ManagedStream {
    what: String,
    wanted: Config,
    kind: StreamKind,
}

/// Which settings its users have to agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamKind {
    Stream,
    Bucket,
}

/// A setting in words, and what it is in a configuration.
type Setting = (&'static str, fn(&Config) -> String);

const REPLICAS: Setting = ("the number of replicas", |config| config.num_replicas.to_string());
const STREAM_SETTINGS: [Setting; 3] = [
    REPLICAS,
    ("its maximum size", |config| bytes_text(config.max_bytes)),
    ("the time for which it knows an id", |config| age_text(config.duplicate_window)),
];
const BUCKET_SETTINGS: [Setting; 2] =
    [REPLICAS, ("the time for which it keeps a row", |config| age_text(config.max_age))];

/// One setting that is another one than wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingDifference {
    /// The stream or bucket, as it is named to people.
    pub what: String,
    /// The setting, in words.
    pub setting: &'static str,
    /// What it is.
    pub is: String,
    /// What is wanted.
    pub wanted: String,
}

impl fmt::Display for SettingDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, setting, is, wanted } = self;
        write!(f, "{what}: {setting} is {is}, not {wanted}")
    }
}

/// Where in a stream's metadata its mark is.
const MARK_ID: &str = "headgate-log";
const MARK_EPOCH: &str = "headgate-epoch";

/// What a stream's leader says of it.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamReport {
    #[serde(flatten)]
    info: Info,
    /// The clock of the server that answered, RFC 3339; `None` from a server older than 2.10.
    #[serde(default, rename = "ts")]
    pub time: Option<String>,
}

/// Which stream this is, and how far it is. Times are nanoseconds since the Unix epoch, by the servers' clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamExtent {
    /// When the stream was created.
    pub created: i64,
    /// The sequence of its oldest message.
    pub first: StreamSequence,
    /// The sequence of the newest message that it ever had.
    pub last: StreamSequence,
    /// When that message was stored.
    pub last_at: i64,
    /// How many messages it has.
    pub messages: u64,
}

/// Whose stream it is: in its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamMark {
    /// The identity of the log.
    pub id: String,
    /// The epoch of the log in which the stream was marked.
    pub epoch: u64,
}

impl StreamReport {
    /// Which stream it is, and how far.
    pub fn extent(&self) -> StreamExtent {
        let state = &self.info.state;
        StreamExtent {
            created: nanos(self.info.created.unix_timestamp_nanos()),
            first: state.first_sequence,
            last: state.last_sequence,
            last_at: nanos(state.last_timestamp.unix_timestamp_nanos()),
            messages: state.messages,
        }
    }

    /// Whose stream it is; `None` for one that is not marked.
    pub fn mark(&self) -> Option<StreamMark> {
        let metadata = &self.info.config.metadata;
        let (id, epoch) = (metadata.get(MARK_ID)?.clone(), metadata.get(MARK_EPOCH)?.parse().ok()?);
        Some(StreamMark { id, epoch })
    }

    /// The servers that do not have all of it at this moment, in words.
    pub fn peers_behind(&self) -> Vec<String> {
        let peers = self.info.cluster.iter().flat_map(|cluster| &cluster.replicas);
        peers
            .filter_map(|peer| match (peer.offline, peer.current) {
                (true, _) => Some(format!("{} is offline", peer.name)),
                (false, false) => Some(format!("{} is behind", peer.name)),
                (false, true) => None,
            })
            .collect()
    }
}

impl From<&JetstreamSettings> for ManagedStream {
    fn from(settings: &JetstreamSettings) -> Self {
        Self {
            what: format!("stream {}", settings.name),
            wanted: settings.config(),
            kind: StreamKind::Stream,
        }
    }
}

impl From<&KvBucketSettings> for ManagedStream {
    fn from(settings: &KvBucketSettings) -> Self {
        Self {
            what: format!("bucket {}", settings.name),
            wanted: kv_stream_config(settings),
            kind: StreamKind::Bucket,
        }
    }
}

impl ManagedStream {
    /// What its leader says of it; `None` if there is none.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] if this user may not ask.
    pub async fn report(&self, nats: &Nats) -> Result<Option<StreamReport>, StreamError> {
        let subject = format!("STREAM.INFO.{}", self.wanted.name);
        let context = context(nats);
        let asked = timeout(STREAM_ANSWER_WAIT_MAX, context.request(subject, &()));
        let trouble = |detail: &dyn fmt::Display| {
            StreamError::Away(nats.trouble().unwrap_or_else(|| format!("{}: {detail}", self.what)))
        };
        let answer = asked.await.map_err(|_| trouble(&"JetStream does not answer"))?;
        match answer.map_err(|error| trouble(&error))? {
            Response::Ok(report) => Ok(Some(report)),
            Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            Response::Err { error } => {
                Err(stream_error_of_jetstream(format!("{}: {error}", self.what), &error))
            }
        }
    }

    /// In what it differs from what is wanted.
    pub fn differences(&self, report: &StreamReport) -> Vec<SettingDifference> {
        let (is, wanted) = (&report.info.config, &self.wanted);
        let settings: &[Setting] = match self.kind {
            StreamKind::Stream => &STREAM_SETTINGS,
            StreamKind::Bucket => &BUCKET_SETTINGS,
        };
        let differing = settings.iter().map(|(setting, text)| (*setting, text(is), text(wanted)));
        differing
            .filter(|(_, is, wanted)| is != wanted)
            .map(|(setting, is, wanted)| SettingDifference { what: self.what.clone(), setting, is, wanted })
            .collect()
    }

    /// Changes it to what is wanted. The rest of its configuration stays as it is.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] if JetStream cannot: too few servers, too little room.
    pub async fn change(&self, nats: &Nats, report: &StreamReport) -> Result<(), StreamError> {
        let (is, wanted) = (report.info.config.clone(), self.wanted.clone());
        let num_replicas = wanted.num_replicas;
        let changed = match self.kind {
            StreamKind::Stream => {
                let Config { max_bytes, duplicate_window, .. } = wanted;
                Config { num_replicas, max_bytes, duplicate_window, ..is }
            }
            StreamKind::Bucket => {
                let Config { max_age, subject_delete_marker_ttl, .. } = wanted;
                // No longer than rows live, and without effect: rows have no id.
                let window = is.duplicate_window;
                let duplicate_window = if max_age.is_zero() { window } else { window.min(max_age) };
                Config { num_replicas, max_age, subject_delete_marker_ttl, duplicate_window, ..is }
            }
        };
        self.update(nats, changed).await
    }

    /// Marks it as that of a log. The rest of its configuration stays as it is.
    ///
    /// # Errors
    /// Those of [`ManagedStream::change`].
    pub async fn set_mark(
        &self,
        nats: &Nats,
        report: &StreamReport,
        mark: &StreamMark,
    ) -> Result<(), StreamError> {
        let mut changed = report.info.config.clone();
        changed.metadata.insert(MARK_ID.to_owned(), mark.id.clone());
        changed.metadata.insert(MARK_EPOCH.to_owned(), mark.epoch.to_string());
        self.update(nats, changed).await
    }

    /// When the message at a sequence was stored, in nanoseconds since the Unix epoch, from the leader; `None` if there is
    /// none (any more).
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn stored_at(&self, nats: &Nats, sequence: StreamSequence) -> Result<Option<i64>, StreamError> {
        let message = self.raw_message(nats, sequence).await?;
        Ok(message.map(|message| nanos(message.time.unix_timestamp_nanos())))
    }

    /// The message at a sequence, from the leader; `None` if there is none (any more).
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn message_at(
        &self,
        nats: &Nats,
        sequence: StreamSequence,
    ) -> Result<Option<StoredMessage>, StreamError> {
        Ok(self.raw_message(nats, sequence).await?.map(StoredMessage::from_leader))
    }

    async fn raw_message(
        &self,
        nats: &Nats,
        sequence: StreamSequence,
    ) -> Result<Option<StreamMessage>, StreamError> {
        let away = |detail: &dyn fmt::Display| {
            StreamError::Away(nats.trouble().unwrap_or_else(|| format!("{}: {detail}", self.what)))
        };
        let handle =
            context(nats).get_stream_no_info(&self.wanted.name).await.map_err(|error| away(&error))?;
        let asked = timeout(STREAM_ANSWER_WAIT_MAX, handle.get_raw_message(sequence)).await;
        match asked.map_err(|_| away(&"JetStream does not answer"))? {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(away(&error)),
        }
    }

    /// The newest message on a subject, and its sequence, from the leader; `None` if there is none, or no such stream.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn newest_on(
        &self,
        nats: &Nats,
        subject: &str,
    ) -> Result<Option<(Bytes, StreamSequence)>, StreamError> {
        let away = |detail: &dyn fmt::Display| {
            StreamError::Away(nats.trouble().unwrap_or_else(|| format!("{}: {detail}", self.what)))
        };
        let handle =
            context(nats).get_stream_no_info(&self.wanted.name).await.map_err(|error| away(&error))?;
        let asked = timeout(STREAM_ANSWER_WAIT_MAX, handle.get_last_raw_message_by_subject(subject)).await;
        match asked.map_err(|_| away(&"JetStream does not answer"))? {
            Ok(message) => Ok(Some((message.payload, message.sequence))),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                LastRawMessageErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(away(&error)),
            },
        }
    }

    /// What it is called in JetStream.
    pub fn name(&self) -> &str {
        &self.wanted.name
    }

    async fn update(&self, nats: &Nats, changed: Config) -> Result<(), StreamError> {
        context(nats).update_stream(changed).await.map(drop).map_err(|error| {
            let text = format!("{}: {error}", self.what);
            match error.kind() {
                UpdateStreamErrorKind::JetStream(error) => stream_error_of_jetstream(text, &error),
                UpdateStreamErrorKind::TimedOut => StreamError::Away(text),
                _ => StreamError::Refused(text),
            }
        })
    }
}

impl fmt::Display for ManagedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// 0 for a time that is none, as that of the last message of a stream that had none.
fn nanos(nanos: i128) -> i64 {
    i64::try_from(nanos).unwrap_or(0)
}

fn context(nats: &Nats) -> Context {
    let mut context = jetstream::new(nats.client().clone());
    context.set_timeout(STREAM_ANSWER_WAIT_MAX);
    context
}

fn bytes_text(bytes: i64) -> String {
    if bytes <= 0 { "without a limit".to_owned() } else { format!("{bytes} bytes") }
}

fn age_text(age: Duration) -> String {
    if age.is_zero() { "without a limit".to_owned() } else { format!("{} s", age.as_secs()) }
}
