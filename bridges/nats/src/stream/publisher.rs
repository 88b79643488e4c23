//! A publisher: adds messages to streams, many at once. It says of each what has become of it, as soon as
//! that is known and in whatever order.

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

use super::{Sequence, StreamError};
use crate::connection::Nats;

/// How long a message may wait to be handed to the connection.
const SEND_MAX: Duration = Duration::from_secs(1);

/// A message that is to be added.
#[derive(Debug)]
pub struct Outgoing {
    /// One of the stream's.
    pub subject: String,
    /// Its headers; with `Nats-Msg-Id`, it is added only if none with that id was lately.
    pub headers: HeaderMap,
    /// The bytes.
    pub payload: Bytes,
}

/// A message is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// Where.
    pub sequence: Sequence,
    /// It was there before, under the same id.
    pub duplicate: bool,
}

/// Why a message was not added, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// It was not added: NATS is away, or the stream takes nothing for now.
    #[error("{0}")]
    Away(String),
    /// It was not added: the stream is as large as it may be.
    #[error("{0}")]
    Full(String),
    /// It was not added: JetStream does not take it, now or later.
    #[error("{0}")]
    Refused(String),
    /// It may or may not have been added.
    #[error("{0}")]
    Unknown(String),
}

/// Adds messages to streams. `T` is what the caller knows a message by.
#[derive(Debug)]
pub struct Publisher<T> {
    nats: Nats,
    /// What the reply subjects begin with; behind it is the number of the message.
    inbox: String,
    acks: Subscriber,
    ack_max: Duration,
    /// The messages whose ack is missing, oldest first, with when they were sent; those in between that
    /// have theirs are `None`. The first has the number `first`.
    waiting: VecDeque<Option<(T, Instant)>>,
    first: u64,
    in_flight: usize,
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(default)]
    seq: Sequence,
    #[serde(default)]
    duplicate: bool,
    #[serde(borrow)]
    error: Option<Failure<'a>>,
}

#[derive(Deserialize)]
struct Failure<'a> {
    #[serde(default)]
    err_code: u64,
    #[serde(default, borrow)]
    description: std::borrow::Cow<'a, str>,
    #[serde(default)]
    code: u16,
}

impl<T> Publisher<T> {
    /// One without messages. What has not been acknowledged for `ack_max` is [`PublishError::Unknown`].
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

    /// Hands a message to the connection; what becomes of it is told by [`Publisher::next`] under `tag`.
    ///
    /// # Errors
    /// The tag, and why the message was not sent: [`PublishError::Away`], or [`PublishError::Refused`] if
    /// it is larger than NATS takes, or its subject is none.
    pub async fn send(&mut self, tag: T, message: Outgoing) -> Result<(), (T, PublishError)> {
        let client = self.nats.client();
        // The client would keep it, and send it whenever it is connected again.
        if client.connection_state() != State::Connected {
            return Err((tag, self.away()));
        }
        let number = self.first + self.waiting.len() as u64;
        let reply = format!("{}{number}", self.inbox);
        let Outgoing { subject, headers, payload } = message;
        let mut sent = pin!(client.publish_with_reply_and_headers(subject, reply, headers, payload));
        // Almost always there is room at once.
        let sent = match sent.as_mut().now_or_never() {
            Some(sent) => Ok(sent),
            None => timeout(SEND_MAX, sent).await,
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

    /// What has become of a message. Never returns while none is in flight. May be dropped and called
    /// again.
    pub async fn next(&mut self) -> (T, Result<Ack, PublishError>) {
        loop {
            if let Some(settled) = self.try_next() {
                return settled;
            }
            let oldest = self.waiting.front().and_then(Option::as_ref);
            let Some(until) = oldest.map(|(_, sent)| *sent + self.ack_max) else {
                // None is in flight: an ack that is late is thrown away.
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
                    if let Some((tag, _)) = self.take(self.first) {
                        let text = format!("JetStream has not acknowledged a message in {:?}", self.ack_max);
                        return (tag, Err(PublishError::Unknown(text)));
                    }
                }
            }
        }
    }

    /// The same, if it is known already.
    pub fn try_next(&mut self) -> Option<(T, Result<Ack, PublishError>)> {
        loop {
            let message = self.acks.next().now_or_never()??;
            if let Some(settled) = self.settle(&message) {
                return Some(settled);
            }
        }
    }

    /// Takes an ack. `None` if it is of no message that waits for one.
    fn settle(&mut self, message: &Message) -> Option<(T, Result<Ack, PublishError>)> {
        let number = message.subject.as_str().strip_prefix(self.inbox.as_str())?.parse().ok()?;
        let (tag, _) = self.take(number)?;
        Some((tag, outcome(message)))
    }

    fn take(&mut self, number: u64) -> Option<(T, Instant)> {
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

/// What an ack says.
fn outcome(message: &Message) -> Result<Ack, PublishError> {
    if message.status == Some(StatusCode::NO_RESPONDERS) {
        // Nobody takes messages of these subjects: JetStream is off, or the stream has no leader now.
        let text = "the stream has no leader, or JetStream is off";
        return Err(PublishError::Away(text.to_owned()));
    }
    let answer: Answer<'_> = serde_json::from_slice(&message.payload)
        .map_err(|error| PublishError::Unknown(format!("an ack that cannot be read: {error}")))?;
    match answer.error {
        None if answer.seq > 0 => Ok(Ack { sequence: answer.seq, duplicate: answer.duplicate }),
        None => Err(PublishError::Unknown("an ack without a sequence".to_owned())),
        Some(Failure { err_code, description, code }) => {
            let full = ErrorCode(err_code) == ErrorCode::STREAM_STORE_FAILED
                && description.contains("maximum bytes");
            let text = description.into_owned();
            Err(match code {
                _ if full => PublishError::Full(text),
                // What is too much for the moment (429), and what the server lacks for now.
                429 | 500.. => PublishError::Away(text),
                _ => PublishError::Refused(text),
            })
        }
    }
}
