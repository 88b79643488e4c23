//! Opening a stream: it is found or created, checked against what its user relies on, and changed where the
//! user may change it. Logs, copies of logs and buckets all go through [`open_stream`].

use std::time::Duration;

use async_nats::jetstream::context::{Context, CreateStreamErrorKind, UpdateStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{self, ErrorCode};

use super::{JetstreamStream, STREAM_ANSWER_WAIT_MAX, StreamError};
use crate::connection::Nats;

/// What a stream is to be like.
#[derive(Debug, Clone)]
pub struct JetstreamSettings {
    /// Its name.
    pub name: String,
    /// The subjects that it stores.
    pub subjects: Vec<String>,
    /// How many servers hold each message.
    pub replicas: usize,
    /// Its maximum size on each server, in bytes.
    pub bytes_max: u64,
    /// How long the stream remembers the id of a message (`Nats-Msg-Id`).
    pub duplicate_window: Duration,
    /// What its messages are to their user.
    pub purpose: StreamPurpose,
}

/// What the messages of a stream are to their user: decides what happens when it is full, and which settings
/// of an existing stream are its owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamPurpose {
    /// The messages are nowhere else. A full stream refuses new ones and nothing removes old ones by itself.
    /// The size, replicas and duplicate window of an existing stream stay as they are
    /// ([`ManagedStream`](super::ManagedStream) compares and changes them).
    Log,
    /// The messages are copies. A full stream removes its oldest ones. An existing stream keeps the limits
    /// that its owner gave it, but needs at least the wanted replicas.
    Copy,
}

impl JetstreamStream {
    /// Opens a stream, and creates it if there is none.
    ///
    /// # Errors
    /// [`StreamError::Away`] while NATS is away; [`StreamError::Unfit`] for an existing stream with
    /// incompatible settings, which is left as it is; [`StreamError::Refused`] if JetStream cannot have such
    /// a stream: it is off, has too little room, or too few servers.
    pub async fn open(nats: &Nats, settings: &JetstreamSettings) -> Result<Self, StreamError> {
        let mut context = jetstream::new(nats.client().clone());
        context.set_timeout(STREAM_ANSWER_WAIT_MAX);
        let name = settings.name.clone();
        let what = format!("stream {name}");
        let handle = open_stream(nats, &context, &what, settings.config(), |is| {
            let detail = settings.mismatches(is).join(", ");
            match detail.is_empty() {
                true => Ok(None),
                false => Err(StreamError::Unfit { name: name.clone(), detail }),
            }
        });
        Ok(Self { handle: handle.await?, nats: nats.clone(), name })
    }
}

impl JetstreamSettings {
    pub(super) fn config(&self) -> Config {
        Config {
            name: self.name.clone(),
            subjects: self.subjects.clone(),
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: match self.purpose {
                StreamPurpose::Log => DiscardPolicy::New,
                StreamPurpose::Copy => DiscardPolicy::Old,
            },
            num_replicas: self.replicas,
            max_bytes: i64::try_from(self.bytes_max).unwrap_or(i64::MAX),
            duplicate_window: self.duplicate_window,
            allow_direct: true,
            ..Config::default()
        }
    }

    /// Which settings of an existing stream are incompatible with the wanted ones.
    fn mismatches(&self, is: &Config) -> Vec<String> {
        let mut mismatches = Vec::new();
        let (mut has, mut needs) = (is.subjects.clone(), self.subjects.clone());
        has.sort();
        needs.sort();
        if has != needs {
            mismatches.push(format!("its subjects are {has:?} and have to be {needs:?}"));
        }
        let log = self.purpose == StreamPurpose::Log;
        if !log && is.num_replicas < self.replicas {
            mismatches.push(format!("it has {} replicas and not {}", is.num_replicas, self.replicas));
        }
        let rules = [
            (is.retention == RetentionPolicy::Limits, "its retention is not by limits"),
            (is.storage == StorageType::File, "it is not in files"),
            (!is.no_ack, "it does not acknowledge messages"),
            (!is.sealed, "it is sealed"),
            (is.mirror.is_none() && is.sources.is_none(), "it mirrors or sources another stream"),
            (is.subject_transform.is_none(), "it transforms subjects"),
            (
                !log || is.discard == DiscardPolicy::New,
                "it discards old messages when it is full, not new ones",
            ),
            (!log || is.max_age.is_zero(), "it removes messages for their age"),
            (!log || is.max_messages <= 0, "it has a greatest number of messages"),
            (!log || is.max_messages_per_subject <= 0, "it has a greatest number of messages per subject"),
            (!log || is.allow_direct, "it does not allow direct gets"),
            (!log || !is.deny_purge, "it does not allow purging"),
        ];
        mismatches.extend(rules.into_iter().filter(|(holds, _)| !holds).map(|(_, rule)| rule.to_owned()));
        mismatches
    }
}

/// Finds a stream, or creates it as `wanted`. `change` says what an existing one has to be changed to, if
/// anything, or that it cannot be used. `what` names it in errors.
///
/// # Errors
/// That of `change`, [`StreamError::Away`], and [`StreamError::Refused`].
pub(crate) async fn open_stream(
    nats: &Nats,
    context: &Context,
    what: &str,
    wanted: Config,
    change: impl FnOnce(&Config) -> Result<Option<Config>, StreamError>,
) -> Result<Stream<()>, StreamError> {
    if let Some(trouble) = nats.trouble() {
        return Err(StreamError::Away(trouble));
    }
    let room = wanted.max_bytes;
    let found = context.get_or_create_stream(wanted).await.map_err(|error| {
        let text = format!("{what}: {error}");
        match error.kind() {
            CreateStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
            {
                StreamError::Away(format!(
                    "{text}: its maximum size is {room} bytes, and JetStream has less left (max_file_store of the \
                     servers, by itself three quarters of the disk that was free when they started)"
                ))
            }
            CreateStreamErrorKind::JetStream(error) => stream_error_of_jetstream(text, &error),
            CreateStreamErrorKind::JetStreamUnavailable
            | CreateStreamErrorKind::TimedOut
            | CreateStreamErrorKind::Response
            | CreateStreamErrorKind::ResponseParse => StreamError::Away(text),
            _ => StreamError::Refused(text),
        }
    })?;
    let is = &found.cached_info().config;
    if let Some(changed) = change(is)? {
        context.update_stream(changed).await.map_err(|error| {
            let text = format!("{what}: {error}");
            match error.kind() {
                UpdateStreamErrorKind::JetStream(error) => stream_error_of_jetstream(text, &error),
                UpdateStreamErrorKind::TimedOut => StreamError::Away(text),
                _ => StreamError::Refused(text),
            }
        })?;
        tracing::info!("{what}: its features were changed to those that this version needs");
    }
    // The name is valid, or there would be no such stream.
    let handle = context.get_stream_no_info(&is.name).await;
    handle.map_err(|error| StreamError::Refused(format!("{what}: {error}")))
}

/// Classifies an error of JetStream. A 5xx is transient, with the exceptions below.
pub(crate) fn stream_error_of_jetstream(text: String, error: &jetstream::Error) -> StreamError {
    match error.error_code() {
        ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => StreamError::Refused(text),
        // The cluster has not found its servers yet.
        ErrorCode::CLUSTER_NO_PEERS => StreamError::Away(text),
        _ if error.code() >= 500 => StreamError::Away(text),
        _ => StreamError::Refused(text),
    }
}
