//! A publisher: adds messages to streams, many at once. It reports the outcome of each as soon as it is
//! known, in any order.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until, timeout};

use super::ack::{AckInbox, PublishAnswer, PublishError};
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

/// Adds messages to streams. `T` is the caller's tag for a message.
///
/// Not an [`Outlet`](crate::Outlet): here each message is confirmed by itself, in any order, and one that is
/// refused does not hold up the others, so any number of publishers may share a stream. An outlet is the only
/// writer of its stream, and confirms a message together with all messages before it.
#[derive(Debug)]
pub struct StreamPublisher<T> {
    nats: Nats,
    acks: AckInbox,
    ack_max: Duration,
    /// The messages that wait for their ack, oldest first, with the time of sending; `None` for those in
    /// between that have it. The front has the number `first`.
    waiting: VecDeque<Option<(T, Instant)>>,
    first: u64,
    in_flight: usize,
}

impl<T> StreamPublisher<T> {
    /// Makes an empty publisher. A message without an ack after `ack_max` is [`PublishError::Unknown`].
    ///
    /// # Errors
    /// [`StreamError::Away`]: the connection was closed for good.
    pub async fn new(nats: &Nats, ack_max: Duration) -> Result<Self, StreamError> {
        let acks = AckInbox::open(nats).await?;
        Ok(Self { nats: nats.clone(), acks, ack_max, waiting: VecDeque::new(), first: 0, in_flight: 0 })
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
        let reply = self.acks.reply(number);
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
            let message = self.acks.try_next()?;
            if let Some(settled) = self.settle(&message) {
                return Some(settled);
            }
        }
    }

    /// Handles an ack. `None` if no message waits for it.
    fn settle(&mut self, message: &Message) -> Option<(T, Result<JetstreamAck, PublishError>)> {
        let (tag, _) = self.take_waiting(self.acks.number(message)?)?;
        let answer = PublishAnswer::decode(message);
        Some((tag, answer.map(|answer| JetstreamAck { sequence: answer.seq, duplicate: answer.duplicate })))
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
