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

use super::{Sequence, Stored, Stream, StreamError};
use crate::connection::Nats;
use crate::pushed::{self, SILENCE_MAX};

/// The pause before another attempt.
const PAUSE: Duration = Duration::from_millis(250);

/// A reader of a stream: call [`Follower::next`] in a loop.
#[derive(Debug)]
pub struct Follower {
    stream: Stream,
    /// The connection that carries the messages.
    nats: Nats,
    /// The first sequence that was not handed out yet.
    next: Sequence,
    feed: Option<Feed>,
    /// The last logged reason why it cannot follow.
    trouble: Option<String>,
}

/// One push consumer.
#[derive(Debug)]
struct Feed {
    /// The consumer's name.
    name: String,
    messages: Subscriber,
    /// How many messages it has delivered.
    delivered: u64,
    connections: watch::Receiver<u64>,
}

/// What a pushed message turned out to be.
enum Taken {
    /// A message of the stream.
    Stored(Stored),
    /// Nothing to hand out.
    Nothing,
    /// Something is missing: the consumer is of no more use.
    Broken,
}

impl Stream {
    /// Follows the stream from a sequence on. Messages arrive over `nats`, best a connection of its own: on a
    /// shared one they would delay the answers.
    pub fn follow(&self, from: Sequence, nats: &Nats) -> Follower {
        Follower { stream: self.clone(), nats: nats.clone(), next: from.max(1), feed: None, trouble: None }
    }
}

impl Follower {
    /// Waits for the next message: the first one after the previous one. While NATS is away there is none.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Stored {
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
                        sleep(PAUSE).await;
                    }
                }
                continue;
            };
            let message = tokio::select! {
                message = timeout(SILENCE_MAX, feed.messages.next()) => message.ok().flatten(),
                _ = feed.connections.changed() => None,
            };
            if let Some(stored) = self.take(message) {
                return stored;
            }
        }
    }

    /// The next message, if it has arrived already.
    pub fn try_next(&mut self) -> Option<Stored> {
        while let Some(message) = self.feed.as_mut()?.messages.next().now_or_never() {
            if let Some(stored) = self.take(message) {
                return Some(stored);
            }
        }
        None
    }

    /// Stops the delivery until [`Follower::next`] is called again.
    pub fn pause(&mut self) {
        if let Some(Feed { name, .. }) = self.feed.take() {
            let stream = self.stream.clone();
            // If this fails, JetStream removes the idle consumer by itself.
            tokio::spawn(async move { stream.answered(stream.handle.delete_consumer(&name)).await.is_ok() });
        }
    }

    /// Continues at `next`.
    pub fn seek(&mut self, next: Sequence) {
        if self.next != next {
            self.pause();
            self.next = next;
        }
    }

    /// Handles a message of the feed; `None` is its end.
    fn take(&mut self, message: Option<Message>) -> Option<Stored> {
        let taken = match (message, &mut self.feed) {
            (Some(message), Some(feed)) => feed.take(message, &self.nats),
            _ => Taken::Broken,
        };
        match taken {
            // A server that lags behind the previous one starts earlier than it was asked to.
            Taken::Stored(stored) if stored.sequence >= self.next => {
                self.next = stored.sequence + 1;
                return Some(stored);
            }
            Taken::Stored(_) | Taken::Nothing => {}
            Taken::Broken => self.feed = None,
        }
        None
    }

    async fn begin(&self) -> Result<Feed, StreamError> {
        let stream = &self.stream;
        let mut connections = self.nats.connections();
        connections.mark_unchanged();
        if let Some(trouble) = self.nats.trouble() {
            return Err(StreamError::Away(trouble));
        }
        let client = self.nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| stream.away(&error))?;
        let from = DeliverPolicy::ByStartSequence { start_sequence: self.next };
        let config = pushed::consumer(inbox, from);
        let made = stream.answered(stream.handle.create_consumer(config)).await?;
        let name = made.map_err(|error| stream.away(&error))?.cached_info().name.clone();
        Ok(Feed { name, messages, delivered: 0, connections })
    }
}

impl Feed {
    fn take(&mut self, message: Message, nats: &Nats) -> Taken {
        if message.status == Some(StatusCode::IDLE_HEARTBEAT) {
            return self.heartbeat(&message, nats).unwrap_or(Taken::Broken);
        }
        if message.status.is_some() {
            return Taken::Broken;
        }
        match message.reply.as_ref().and_then(|reply| places(reply)) {
            Some((sequence, delivered)) if delivered == self.delivered + 1 => {
                self.delivered = delivered;
                let Message { subject, payload, headers, .. } = message;
                Taken::Stored(Stored { sequence, subject, headers: headers.unwrap_or_default(), payload })
            }
            _ => Taken::Broken,
        }
    }

    fn heartbeat(&self, message: &Message, nats: &Nats) -> Option<Taken> {
        if let Some(reply) = pushed::flow_reply(message) {
            let client = nats.client().clone();
            // If this cannot be sent, the connection is lost, and the feed with it.
            tokio::spawn(async move { client.publish(reply, Bytes::new()).await });
            return Some(Taken::Nothing);
        }
        let last = message.headers.as_ref()?.get(header::NATS_LAST_CONSUMER)?;
        Some(if last.as_str().parse() == Ok(self.delivered) { Taken::Nothing } else { Taken::Broken })
    }
}

/// The sequences of a message in the stream and in its consumer, from its reply subject: `$JS.ACK.` and the
/// tokens `{stream}.{consumer}.{delivered}.{stream sequence}.{consumer sequence}.{time}.{pending}`, possibly
/// with one more at the end (ADR-15).
pub(super) fn places(reply: &str) -> Option<(Sequence, u64)> {
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
        assert_eq!(places("$JS.ACK.headgate.c1.1.1234.7.1700000000000000000.3"), Some((1234, 7)));
        let with_domain = "$JS.ACK.hub.ACCOUNT.headgate.c1.1.1234.7.1700000000000000000.3.x9";
        assert_eq!(places(with_domain), Some((1234, 7)));
        assert_eq!(places("_INBOX.1.2"), None);
    }
}
