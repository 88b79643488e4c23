//! A JetStream stream as a log: messages in one order, each with its own sequence.
//!
//! A [`StreamPublisher`] adds messages, many at once. A [`StreamFollower`] receives all messages, in order
//! and without a gap, across losses of the connection. Members of a shared place ([`JetstreamStream::share`])
//! divide the messages among them. [`JetstreamStream::get`] reads older messages, from any server that has
//! them. The stream removes nothing by itself: its user decides what may go
//! ([`JetstreamStream::purge_below`]), and a full one takes no more.

mod ack;
mod follower;
mod managed;
mod open;
mod publisher;
mod shared;

use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream as Handle};
use async_nats::{HeaderMap, Message, StatusCode, Subject, header};
use bytes::Bytes;
use futures_util::StreamExt;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{sleep, timeout};

use crate::connection::Nats;
use crate::pushed::AckPlace;

pub use ack::PublishError;
pub(crate) use ack::{AckInbox, PublishAnswer};
pub use follower::StreamFollower;
pub use managed::{ManagedStream, SettingDifference, StreamExtent, StreamMark, StreamReport};
pub use open::{JetstreamSettings, StreamPurpose};
pub(crate) use open::{open_stream, stream_error_of_jetstream};
pub use publisher::{JetstreamAck, OutgoingMessage, StreamPublisher};
pub use shared::{DeliveryReceipt, SharedDelivery, SharedPlace, SharedPull, SharedSettings};

/// The place of a message in a stream. The first is 1.
pub type StreamSequence = u64;

/// How long JetStream may take to answer.
const STREAM_ANSWER_WAIT_MAX: Duration = Duration::from_secs(5);
/// The pauses after which a server that lags behind the leader is asked again.
const LAGGING_SERVER_PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1_000),
];
/// The most messages that one request asks for.
const STREAM_GET_MESSAGES_MAX: usize = 1000;

/// Why a stream did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// NATS is away, or JetStream cannot answer now.
    #[error("{0}")]
    Away(String),
    /// A stream of this name has an incompatible configuration, which may be intended by its owner: messages
    /// would be lost or misread. It is left as it is.
    #[error(
        "the stream {name} is there already and cannot be used: {detail}; remove it, or use another name"
    )]
    Unfit {
        /// Its name.
        name: String,
        /// What is incompatible.
        detail: String,
    },
    /// JetStream refuses it, and a retry does not help.
    #[error("{0}")]
    Refused(String),
}

/// What a stream holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// The sequence of the oldest message, or, of an empty stream, of the next one.
    pub first: StreamSequence,
    /// The sequence of the newest message ever stored; 0 if there was none.
    pub last: StreamSequence,
    /// The number of messages.
    pub messages: u64,
    /// Their size, in bytes.
    pub bytes: u64,
}

/// A message in a stream.
#[derive(Debug, Clone)]
pub struct StoredMessage {
    /// Its place.
    pub sequence: StreamSequence,
    /// The subject that it was published to.
    pub subject: Subject,
    /// Its headers, which may include some of JetStream's.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
}

impl StoredMessage {
    /// A message as the leader gives it.
    fn from_leader(message: StreamMessage) -> Self {
        let StreamMessage { sequence, subject, headers, payload, .. } = message;
        Self { sequence, subject, headers, payload }
    }

    /// A message as a consumer delivers it.
    fn from_delivery(message: Message, place: AckPlace) -> Self {
        let Message { subject, payload, headers, .. } = message;
        Self { sequence: place.sequence, subject, headers: headers.unwrap_or_default(), payload }
    }
}

/// A stream. Cheap to clone.
#[derive(Debug, Clone)]
pub struct JetstreamStream {
    nats: Nats,
    handle: Handle<()>,
    name: String,
}

impl JetstreamStream {
    /// The connection to the stream.
    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds now, according to its leader.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn state(&self) -> Result<StreamState, StreamError> {
        let info = self.await_answer(self.handle.get_info()).await?;
        let state = &info.map_err(|error| self.away_error(&error))?.state;
        let (first, last) = (state.first_sequence, state.last_sequence);
        let first = if state.messages == 0 { last + 1 } else { first };
        Ok(StreamState { first, last, messages: state.messages, bytes: state.bytes })
    }

    /// The messages from a sequence on, in order: at most `max` (and a thousand), about `bytes_max` bytes, at
    /// least one. Empty if the server that answers has none there: it may lag behind the others.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn get(
        &self,
        from: StreamSequence,
        max: usize,
        bytes_max: usize,
    ) -> Result<Vec<StoredMessage>, StreamError> {
        let max = max.clamp(1, STREAM_GET_MESSAGES_MAX);
        let request = if max == 1 {
            serde_json::json!({ "seq": from.max(1), "batch": 1 })
        } else {
            serde_json::json!({ "seq": from.max(1), "batch": max, "max_bytes": bytes_max.max(1) })
        };
        self.direct_get(request, max).await
    }

    /// The sequence of the first message stored at or after a time (RFC 3339); `None` if there is none. A server that
    /// has none is asked again as long as the leader has one: it lags behind.
    ///
    /// # Errors
    /// [`StreamError::Away`], also if it still lags.
    pub async fn sequence_at(&self, time: &str) -> Result<Option<StreamSequence>, StreamError> {
        let request = serde_json::json!({ "start_time": time, "batch": 1 });
        for pause in std::iter::once(Duration::ZERO).chain(LAGGING_SERVER_PAUSES) {
            sleep(pause).await;
            if let Some(first) = self.direct_get(request.clone(), 1).await?.first() {
                return Ok(Some(first.sequence));
            }
            let state = self.state().await?;
            if state.messages == 0 {
                return Ok(None);
            }
            let newest = self.newest_of_leader(state.last).await?;
            let since = OffsetDateTime::parse(time, &Rfc3339).map_err(|error| self.away_error(&error))?;
            if newest.is_none_or(|newest| newest.time < since) {
                return Ok(None);
            }
        }
        Err(self.away_error(&"no server that has its newest messages answers"))
    }

    /// Asks any server that has the stream for messages (direct get).
    async fn direct_get(
        &self,
        request: serde_json::Value,
        max: usize,
    ) -> Result<Vec<StoredMessage>, StreamError> {
        let client = self.nats.client();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| self.away_error(&error))?;
        let subject = format!("$JS.API.DIRECT.GET.{}", self.name);
        let sent = client.publish_with_reply(subject, inbox, request.to_string().into());
        self.await_answer(sent).await?.map_err(|error| self.away_error(&error))?;
        let mut found = Vec::with_capacity(max.min(64));
        loop {
            let Some(message) = self.await_answer(answers.next()).await? else {
                return Err(self.away_error(&"the connection was closed"));
            };
            match message.status {
                None => found.push(
                    stored_from_direct_get(message)
                        .ok_or_else(|| self.away_error(&"an answer that is none"))?,
                ),
                Some(StatusCode::NO_RESPONDERS) => return Err(self.away_error(&"no server has it")),
                // 204: end of the batch; 404: no message matches.
                Some(status) if matches!(status.as_u16(), 204 | 404) => return Ok(found),
                Some(status) => {
                    let why = message.description.as_deref().unwrap_or_default();
                    return Err(self.away_error(&format_args!("{status} {why}")));
                }
            }
        }
    }

    /// The message at a sequence, from the leader; `None` if there is none (any more).
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn get_from_leader(
        &self,
        sequence: StreamSequence,
    ) -> Result<Option<StoredMessage>, StreamError> {
        match self.await_answer(self.handle.get_raw_message(sequence)).await? {
            Ok(found) => Ok(Some(StoredMessage::from_leader(found))),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.away_error(&error)),
        }
    }

    /// The newest message that exists, from the leader: other servers may be behind. `last` is the newest
    /// sequence ever stored ([`StreamState::last`]).
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn newest(&self, last: StreamSequence) -> Result<Option<StoredMessage>, StreamError> {
        Ok(self.newest_of_leader(last).await?.map(StoredMessage::from_leader))
    }

    async fn newest_of_leader(&self, last: StreamSequence) -> Result<Option<StreamMessage>, StreamError> {
        let mut found = self.await_answer(self.handle.get_raw_message(last)).await?;
        if found.as_ref().is_err_and(|error| error.kind() == LastRawMessageErrorKind::NoMessageFound) {
            found = self.await_answer(self.handle.get_last_raw_message_by_subject(">")).await?;
        }
        match found {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.away_error(&error)),
        }
    }

    /// All messages on the subjects that `filter` matches, in order, up to the stream's end at the time of this call.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn all_of(&self, filter: &str) -> Result<Vec<StoredMessage>, StreamError> {
        let mut found: Vec<StoredMessage> = Vec::new();
        let mut from = 1;
        loop {
            let request =
                serde_json::json!({ "seq": from, "next_by_subj": filter, "batch": STREAM_GET_MESSAGES_MAX });
            let page = self.direct_get(request, STREAM_GET_MESSAGES_MAX).await?;
            let Some(last) = page.last() else { break };
            from = last.sequence + 1;
            found.extend(page);
        }
        // The server that answered may lag behind the leader.
        while let Some(message) = self.first_of_leader(filter, from).await? {
            from = message.sequence + 1;
            found.push(message);
        }
        Ok(found)
    }

    /// The first message on the subjects that `filter` matches, at a sequence or behind it, from the leader; `None` if
    /// there is none.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn first_of_leader(
        &self,
        filter: &str,
        from: StreamSequence,
    ) -> Result<Option<StoredMessage>, StreamError> {
        match self.await_answer(self.handle.get_first_raw_message_by_subject(filter, from.max(1))).await? {
            Ok(message) => Ok(Some(StoredMessage::from_leader(message))),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.away_error(&error)),
        }
    }

    /// Adds a message without a payload, unless the stream has one with this id; then its place is that one's.
    ///
    /// # Errors
    /// [`StreamError::Away`] if it may not be there: NATS is away, the stream is full.
    pub async fn put(&self, subject: &str, id: &str) -> Result<JetstreamAck, StreamError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::NATS_MESSAGE_ID, id);
        let context = async_nats::jetstream::new(self.nats.client().clone());
        let sent = context.publish_with_headers(subject.to_owned(), headers, Bytes::new());
        let sent = self.await_answer(sent).await?.map_err(|error| self.away_error(&error))?;
        let ack = self.await_answer(sent.into_future()).await?.map_err(|error| self.away_error(&error))?;
        Ok(JetstreamAck { sequence: ack.sequence, duplicate: ack.duplicate })
    }

    /// Removes one message.
    ///
    /// # Errors
    /// [`StreamError::Away`]; also if there is no such message (any more).
    pub async fn delete(&self, sequence: StreamSequence) -> Result<(), StreamError> {
        let deleted = self.await_answer(self.handle.delete_message(sequence)).await?;
        deleted.map(drop).map_err(|error| self.away_error(&error))
    }

    /// Removes all messages below a sequence.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn purge_below(&self, sequence: StreamSequence) -> Result<(), StreamError> {
        let purge = self.handle.purge().sequence(sequence);
        self.await_answer(purge.into_future()).await?.map_err(|error| self.away_error(&error))?;
        Ok(())
    }

    /// Removes the messages on the subjects that `filter` matches, below a sequence if one is given.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn purge_subjects(
        &self,
        filter: &str,
        below: Option<StreamSequence>,
    ) -> Result<(), StreamError> {
        let purge = self.handle.purge().filter(filter);
        let purged = match below {
            Some(below) => self.await_answer(purge.sequence(below).into_future()).await?,
            None => self.await_answer(purge.into_future()).await?,
        };
        purged.map(drop).map_err(|error| self.away_error(&error))
    }

    async fn await_answer<T>(&self, answer: impl Future<Output = T>) -> Result<T, StreamError> {
        timeout(STREAM_ANSWER_WAIT_MAX, answer)
            .await
            .map_err(|_| self.away_error(&"JetStream does not answer"))
    }

    fn away_error(&self, detail: &dyn std::fmt::Display) -> StreamError {
        let trouble = self.nats.trouble();
        StreamError::Away(trouble.unwrap_or_else(|| format!("stream {}: {detail}", self.name)))
    }
}

/// Decodes an answer to a direct get: its headers carry the message's sequence and subject.
fn stored_from_direct_get(message: Message) -> Option<StoredMessage> {
    let headers = message.headers?;
    let sequence = headers.get(header::NATS_SEQUENCE)?.as_str().parse().ok()?;
    let subject = headers.get(header::NATS_SUBJECT)?.as_str().into();
    Some(StoredMessage { sequence, subject, headers, payload: message.payload })
}
