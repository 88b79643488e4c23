//! A follower: receives every message of a stream from a sequence on, in order and without a gap.
//!
//! JetStream pushes the messages. After a missing message, a missing heartbeat or a reconnect, the follower
//! makes a new consumer where it stands. A caller that knows the next messages already can pause it.

use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::{Message, StatusCode, Subscriber, header};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{JetstreamStream, StoredMessage, StreamError, StreamSequence};
use crate::connection::Nats;
use crate::pushed::{self, PUSH_SILENCE_MAX};

/// The pause before another attempt.
const STREAM_FOLLOW_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// A reader of a stream: call [`StreamFollower::next`] in a loop.
#[derive(Debug)]
pub struct StreamFollower {
    stream: JetstreamStream,
    /// The connection that carries the messages.
    nats: Nats,
    /// The first sequence that was not handed out yet.
    next: StreamSequence,
    feed: Option<StreamPushFeed>,
    /// The last logged reason why it cannot follow.
    trouble: Option<String>,
}

/// One push consumer.
#[derive(Debug)]
struct StreamPushFeed {
    /// The consumer's name.
    name: String,
    messages: Subscriber,
    /// How many messages it has delivered.
    delivered: u64,
    connections: watch::Receiver<u64>,
}

/// What a pushed message turned out to be.
enum PushedMessage {
    /// A message of the stream.
    Stored(StoredMessage),
    /// Nothing to hand out.
    Nothing,
    /// Something is missing: the consumer is of no more use.
    Broken,
}

impl JetstreamStream {
    /// Follows the stream from a sequence on. Messages arrive over `nats`, best a connection of its own: on a
    /// shared one they would delay the answers.
    pub fn follow(&self, from: StreamSequence, nats: &Nats) -> StreamFollower {
        StreamFollower {
            stream: self.clone(),
            nats: nats.clone(),
            next: from.max(1),
            feed: None,
            trouble: None,
        }
    }
}

impl StreamFollower {
    /// Waits for the next message: the first one after the previous one. While NATS is away there is none.
    /// Cancel-safe.
    pub async fn next(&mut self) -> StoredMessage {
        loop {
            let Some(feed) = &mut self.feed else {
                match self.begin().await {
                    Ok(feed) => {
                        self.feed = Some(feed);
                        if self.trouble.take().is_some() {
                            tracing::info!(
                                stream = self.stream.name,
                                from = self.next,
                                "following the stream again"
                            );
                        }
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if self.trouble.as_ref() != Some(&error) {
                            tracing::warn!(
                                stream = self.stream.name,
                                error,
                                "cannot follow the stream; trying again"
                            );
                            self.trouble = Some(error);
                        }
                        sleep(STREAM_FOLLOW_RETRY_PAUSE).await;
                    }
                }
                continue;
            };
            let message = tokio::select! {
                message = timeout(PUSH_SILENCE_MAX, feed.messages.next()) => message.ok().flatten(),
                _ = feed.connections.changed() => None,
            };
            if let Some(stored) = self.take_message(message) {
                return stored;
            }
        }
    }

    /// The next message, if it has arrived already.
    pub fn try_next(&mut self) -> Option<StoredMessage> {
        while let Some(message) = self.feed.as_mut()?.messages.next().now_or_never() {
            if let Some(stored) = self.take_message(message) {
                return Some(stored);
            }
        }
        None
    }

    /// Stops the delivery until [`StreamFollower::next`] is called again.
    pub fn pause(&mut self) {
        if let Some(StreamPushFeed { name, .. }) = self.feed.take() {
            let stream = self.stream.clone();
            // If this fails, JetStream removes the idle consumer by itself.
            tokio::spawn(
                async move { stream.await_answer(stream.handle.delete_consumer(&name)).await.is_ok() },
            );
        }
    }

    /// Continues at `next`.
    pub fn seek(&mut self, next: StreamSequence) {
        if self.next != next {
            self.pause();
            self.next = next;
        }
    }

    /// Handles a message of the feed; `None` is its end.
    fn take_message(&mut self, message: Option<Message>) -> Option<StoredMessage> {
        let taken = match (message, &mut self.feed) {
            (Some(message), Some(feed)) => feed.take_message(message, &self.nats),
            _ => PushedMessage::Broken,
        };
        match taken {
            // A server that lags behind the previous one starts earlier than it was asked to.
            PushedMessage::Stored(stored) if stored.sequence >= self.next => {
                self.next = stored.sequence + 1;
                return Some(stored);
            }
            PushedMessage::Stored(_) | PushedMessage::Nothing => {}
            PushedMessage::Broken => self.feed = None,
        }
        None
    }

    async fn begin(&self) -> Result<StreamPushFeed, StreamError> {
        let stream = &self.stream;
        let mut connections = self.nats.connections();
        connections.mark_unchanged();
        if let Some(trouble) = self.nats.trouble() {
            return Err(StreamError::Away(trouble));
        }
        let client = self.nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| stream.away_error(&error))?;
        let from = DeliverPolicy::ByStartSequence { start_sequence: self.next };
        let config = pushed::push_consumer_config(inbox, from);
        let made = stream.await_answer(stream.handle.create_consumer(config)).await?;
        let name = made.map_err(|error| stream.away_error(&error))?.cached_info().name.clone();
        Ok(StreamPushFeed { name, messages, delivered: 0, connections })
    }
}

impl StreamPushFeed {
    fn take_message(&mut self, message: Message, nats: &Nats) -> PushedMessage {
        if message.status == Some(StatusCode::IDLE_HEARTBEAT) {
            return self.heartbeat(&message, nats).unwrap_or(PushedMessage::Broken);
        }
        if message.status.is_some() {
            return PushedMessage::Broken;
        }
        match message.reply.as_ref().and_then(|reply| ack_reply_sequences(reply)) {
            Some((sequence, delivered)) if delivered == self.delivered + 1 => {
                self.delivered = delivered;
                let Message { subject, payload, headers, .. } = message;
                PushedMessage::Stored(StoredMessage {
                    sequence,
                    subject,
                    headers: headers.unwrap_or_default(),
                    payload,
                })
            }
            _ => PushedMessage::Broken,
        }
    }

    fn heartbeat(&self, message: &Message, nats: &Nats) -> Option<PushedMessage> {
        if let Some(reply) = pushed::flow_reply(message) {
            let client = nats.client().clone();
            // If this cannot be sent, the connection is lost, and the feed with it.
            tokio::spawn(async move { client.publish(reply, Bytes::new()).await });
            return Some(PushedMessage::Nothing);
        }
        let last = message.headers.as_ref()?.get(header::NATS_LAST_CONSUMER)?;
        Some(if last.as_str().parse() == Ok(self.delivered) {
            PushedMessage::Nothing
        } else {
            PushedMessage::Broken
        })
    }
}

/// The sequences of a message in the stream and in its consumer, from its reply subject: `$JS.ACK.` and the
/// tokens `{stream}.{consumer}.{delivered}.{stream sequence}.{consumer sequence}.{time}.{pending}`, possibly
/// with one more at the end (ADR-15).
pub(super) fn ack_reply_sequences(reply: &str) -> Option<(StreamSequence, u64)> {
    let rest = reply.strip_prefix("$JS.ACK.")?;
    // Stream and consumer; a domain and the account's hash may precede them.
    let before = if rest.split('.').count() > 7 { 4 } else { 2 };
    let mut tokens = rest.split('.').skip(before + 1);
    Some((tokens.next()?.parse().ok()?, tokens.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_where_it_is_in_the_stream_and_in_its_consumer() {
        assert_eq!(
            ack_reply_sequences("$JS.ACK.headgate.c1.1.1234.7.1700000000000000000.3"),
            Some((1234, 7))
        );
        let with_domain = "$JS.ACK.hub.ACCOUNT.headgate.c1.1.1234.7.1700000000000000000.3.x9";
        assert_eq!(ack_reply_sequences(with_domain), Some((1234, 7)));
        assert_eq!(ack_reply_sequences("_INBOX.1.2"), None);
    }
}
