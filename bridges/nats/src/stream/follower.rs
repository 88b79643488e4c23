//! A follower: receives every message of a stream from a sequence on, in order and without a gap.
//!
//! JetStream pushes the messages. After a missing message, a missing heartbeat or a reconnect, the follower
//! makes a new consumer where it stands. A caller that knows the next messages already can pause it.

use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use tokio::time::sleep;

use super::{JetstreamStream, StoredMessage, StreamError, StreamSequence};
use crate::connection::Nats;
use crate::pushed::{PushEvent, PushFeed};

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
    feed: Option<PushFeed>,
    /// How many feeds there have been.
    feeds: u64,
    /// The name of the feed's consumer.
    consumer: String,
    /// The last logged reason why it cannot follow.
    trouble: Option<String>,
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
            feeds: 0,
            consumer: String::new(),
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
                let begun = self.begin().await;
                let failed = begun.is_err();
                self.note_begun(begun.err());
                if failed {
                    sleep(STREAM_FOLLOW_RETRY_PAUSE).await;
                }
                continue;
            };
            let event = feed.next().await;
            if let Some(stored) = self.take_event(event) {
                return stored;
            }
        }
    }

    /// The next message, if it has arrived already.
    pub fn try_next(&mut self) -> Option<StoredMessage> {
        while let Some(event) = self.feed.as_mut()?.try_next() {
            if let Some(stored) = self.take_event(event) {
                return Some(stored);
            }
        }
        None
    }

    /// How many consumers it has made. With each the stream may have become another one, or an earlier state of it.
    pub fn feeds(&self) -> u64 {
        self.feeds
    }

    /// Stops the delivery until [`StreamFollower::next`] is called again.
    pub fn pause(&mut self) {
        if self.feed.take().is_some() {
            let (stream, consumer) = (self.stream.clone(), std::mem::take(&mut self.consumer));
            // If this fails, JetStream removes the idle consumer by itself.
            tokio::spawn(async move {
                stream.await_answer(stream.handle.delete_consumer(&consumer)).await.is_ok()
            });
        }
    }

    /// Continues at `next`.
    pub fn seek(&mut self, next: StreamSequence) {
        if self.next != next {
            self.pause();
            self.next = next;
        }
    }

    fn take_event(&mut self, event: PushEvent) -> Option<StoredMessage> {
        match event {
            // A server that lags behind the previous one starts earlier than it was asked to.
            PushEvent::Message(message, place) if place.sequence >= self.next => {
                self.next = place.sequence + 1;
                return Some(StoredMessage::from_delivery(message, place));
            }
            PushEvent::Message(..) | PushEvent::Heartbeat => {}
            PushEvent::Broken => self.feed = None,
        }
        None
    }

    async fn begin(&mut self) -> Result<(), StreamError> {
        let stream = &self.stream;
        let mut connections = self.nats.connections();
        connections.mark_unchanged();
        if let Some(trouble) = self.nats.trouble() {
            return Err(StreamError::Away(trouble));
        }
        let from = DeliverPolicy::ByStartSequence { start_sequence: self.next };
        let opened = PushFeed::open(&self.nats, &stream.handle, from, connections);
        let (feed, info) = stream.await_answer(opened).await?.map_err(|error| stream.away_error(&error))?;
        (self.feed, self.consumer) = (Some(feed), info.name);
        self.feeds += 1;
        Ok(())
    }

    /// Logs an error that keeps it from following, once, and its end.
    fn note_begun(&mut self, error: Option<StreamError>) {
        let (stream, from) = (&self.stream.name, self.next);
        let error = error.map(|error| error.to_string());
        match &error {
            Some(error) if self.trouble.as_ref() != Some(error) => {
                tracing::warn!(stream, error, "cannot follow the stream; trying again");
            }
            None if self.trouble.is_some() => tracing::info!(stream, from, "following the stream again"),
            _ => {}
        }
        self.trouble = error;
    }
}
