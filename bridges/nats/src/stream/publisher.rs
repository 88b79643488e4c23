//! A publisher: adds messages to streams, many at once. It reports the outcome of each as soon as it is
//! known, in any order.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::ErrorCode;
use async_nats::{HeaderMap, Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until, timeout};

use super::{StreamError, StreamSequence};
use crate::connection::Nats;

/// How long a message may wait for room in the connection's buffer.
const PUBLISH_SEND_WAIT_MAX: Duration = Duration::from_secs(1);

/// A message to publish.
#[derive(Debug)]
pub struct OutgoingMessage {
    /// A subject of the stream.
    pub subject: String,
    /// Its headers. With `Nats-Msg-Id` it is added only if the duplicate window has no message of that id.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
}

/// JetStream's confirmation that a message is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JetstreamAck {
    /// Its sequence.
    pub sequence: StreamSequence,
    /// It was stored earlier, under the same id.
    pub duplicate: bool,
}

/// Why a message was not added, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// It was not added: NATS is away, or the stream takes no messages now.
    #[error("{0}")]
    Away(String),
    /// It was not added: the stream has reached its maximum size.
    #[error("{0}")]
    Full(String),
    /// It was not added: JetStream refuses it, and a retry does not help.
    #[error("{0}")]
    Refused(String),
    /// It may or may not have been added.
    #[error("{0}")]
    Unknown(String),
}

/// Adds messages to streams. `T` is the caller's tag for a message.
#[derive(Debug)]
pub struct StreamPublisher<T> {
    nats: Nats,
    /// The prefix of the reply subjects; the message's number follows it.
    inbox: String,
    acks: Subscriber,
    ack_max: Duration,
    /// The messages that wait for their ack, oldest first, with the time of sending; `None` for those in
    /// between that have it. The front has the number `first`.
    waiting: VecDeque<Option<(T, Instant)>>,
    first: u64,
    in_flight: usize,
}

#[derive(Deserialize)]
struct PublishAnswer<'a> {
    #[serde(default)]
    seq: StreamSequence,
    #[serde(default)]
    duplicate: bool,
    #[serde(borrow)]
    error: Option<PublishAnswerError<'a>>,
}

#[derive(Deserialize)]
struct PublishAnswerError<'a> {
    #[serde(default)]
    err_code: u64,
    #[serde(default, borrow)]
    description: std::borrow::Cow<'a, str>,
    #[serde(default)]
    code: u16,
}

impl<T> StreamPublisher<T> {
    /// Makes an empty publisher. A message without an ack after `ack_max` is [`PublishError::Unknown`].
    ///
    /// # Errors
    /// [`StreamError::Away`]: the connection was closed for good.
    pub async fn new(nats: &Nats, ack_max: Duration) -> Result<Self, StreamError> {
        let inbox = nats.client().new_inbox();
        let acks = nats.client().subscribe(format!("{inbox}.*")).await;
        let acks = acks.map_err(|error| StreamError::Away(error.to_string()))?;
        let (nats, waiting) = (nats.clone(), VecDeque::new());
        Ok(Self { nats, inbox: inbox + ".", acks, ack_max, waiting, first: 0, in_flight: 0 })
    }

    /// How many messages wait for their ack.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands a message to the connection. [`StreamPublisher::next`] reports its outcome under `tag`.
    ///
    /// # Errors
    /// The tag, and why the message was not sent: [`PublishError::Away`], or [`PublishError::Refused`] if
    /// it is larger than NATS takes, or its subject is invalid.
    pub async fn send(&mut self, tag: T, message: OutgoingMessage) -> Result<(), (T, PublishError)> {
        let client = self.nats.client();
        // The client would buffer the message and send it after a reconnect, when the caller has given up.
        if client.connection_state() != State::Connected {
            return Err((tag, self.away()));
        }
        let number = self.first + self.waiting.len() as u64;
        let reply = format!("{}{number}", self.inbox);
        let OutgoingMessage { subject, headers, payload } = message;
        let mut sent = pin!(client.publish_with_reply_and_headers(subject, reply, headers, payload));
        // There is almost always room at once: then no timer is needed.
        let sent = match sent.as_mut().now_or_never() {
            Some(sent) => Ok(sent),
            None => timeout(PUBLISH_SEND_WAIT_MAX, sent).await,
        };
        match sent {
            Ok(Ok(())) => {
                self.waiting.push_back(Some((tag, Instant::now())));
                self.in_flight += 1;
                Ok(())
            }
            Ok(Err(error)) => Err((
                tag,
                match error.kind() {
                    async_nats::PublishErrorKind::Send => self.away(),
                    _ => PublishError::Refused(error.to_string()),
                },
            )),
            Err(_) => Err((tag, self.away())),
        }
    }

    /// Waits for the outcome of a message. Never returns while none is in flight. Cancel-safe.
    pub async fn next(&mut self) -> (T, Result<JetstreamAck, PublishError>) {
        loop {
            if let Some(settled) = self.try_next() {
                return settled;
            }
            let oldest = self.waiting.front().and_then(Option::as_ref);
            let Some(until) = oldest.map(|(_, sent)| *sent + self.ack_max) else {
                // None is in flight: drop late acks.
                self.acks.next().await;
                continue;
            };
            tokio::select! {
                biased;
                message = self.acks.next() => {
                    if let Some(settled) = message.and_then(|message| self.settle(&message)) {
                        return settled;
                    }
                }
                () = sleep_until(until) => {
                    if let Some((tag, _)) = self.take_waiting(self.first) {
                        let text = format!("JetStream has not acknowledged a message in {:?}", self.ack_max);
                        return (tag, Err(PublishError::Unknown(text)));
                    }
                }
            }
        }
    }

    /// The outcome of a message, if one is known already.
    pub fn try_next(&mut self) -> Option<(T, Result<JetstreamAck, PublishError>)> {
        loop {
            let message = self.acks.next().now_or_never()??;
            if let Some(settled) = self.settle(&message) {
                return Some(settled);
            }
        }
    }

    /// Handles an ack. `None` if no message waits for it.
    fn settle(&mut self, message: &Message) -> Option<(T, Result<JetstreamAck, PublishError>)> {
        let number = message.subject.as_str().strip_prefix(self.inbox.as_str())?.parse().ok()?;
        let (tag, _) = self.take_waiting(number)?;
        Some((tag, ack_outcome(message)))
    }

    fn take_waiting(&mut self, number: u64) -> Option<(T, Instant)> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let taken = self.waiting.get_mut(at)?.take();
        self.in_flight -= usize::from(taken.is_some());
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
        taken
    }

    fn away(&self) -> PublishError {
        PublishError::Away(self.nats.trouble().unwrap_or_else(|| "NATS is away".to_owned()))
    }
}

/// Decodes an ack.
fn ack_outcome(message: &Message) -> Result<JetstreamAck, PublishError> {
    if message.status == Some(StatusCode::NO_RESPONDERS) {
        // No responders: JetStream is off, or the stream has no leader now.
        let text = "the stream has no leader, or JetStream is off";
        return Err(PublishError::Away(text.to_owned()));
    }
    let answer: PublishAnswer<'_> = serde_json::from_slice(&message.payload)
        .map_err(|error| PublishError::Unknown(format!("an ack that cannot be read: {error}")))?;
    match answer.error {
        None if answer.seq > 0 => Ok(JetstreamAck { sequence: answer.seq, duplicate: answer.duplicate }),
        None => Err(PublishError::Unknown("an ack without a sequence".to_owned())),
        Some(PublishAnswerError { err_code, description, code }) => {
            let full = ErrorCode(err_code) == ErrorCode::STREAM_STORE_FAILED
                && description.contains("maximum bytes");
            let text = description.into_owned();
            Err(match code {
                _ if full => PublishError::Full(text),
                // Transient: too many requests (429), or a failure of the server.
                429 | 500.. => PublishError::Away(text),
                _ => PublishError::Refused(text),
            })
        }
    }
}
