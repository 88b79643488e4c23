//! An outlet: a JetStream stream to which one writer sends messages, in order, each once.
//!
//! The stream itself is the writer's cursor. [`Outlet::open`] returns its last message, so that the writer
//! can continue after it. Every message names the sequence that it follows (`Nats-Expected-Last-Sequence`).
//! If a message is lost, JetStream refuses all messages after it; if one is sent again, it refuses the
//! second copy. So there are no holes, duplicates or reorderings, whatever is lost, killed, or elected
//! leader. After any error the outlet is closed. The writer opens it again and learns how far it got.

mod flow;

use std::sync::atomic::Ordering;
use std::time::Duration;

use self::flow::OutletFlow;
use crate::connection::Nats;
use crate::stream::{
    AckInbox, JetstreamSettings, JetstreamStream, OutgoingMessage, StoredMessage, StreamError, StreamSequence,
};

/// How long opening waits for a connection, and how often it checks.
const OUTLET_CONNECT_WAIT_MAX: Duration = Duration::from_millis(500);
const OUTLET_CONNECT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How far a stream is.
#[derive(Debug, Clone)]
pub struct OutletPosition {
    /// The sequence of the newest message ever stored; 0 if there was none.
    pub sequence: StreamSequence,
    /// The newest message that exists. Its sequence may be lower: newer messages may have been deleted.
    pub message: Option<StoredMessage>,
}

/// Why a message was not sent or the stream not opened.
#[derive(Debug, thiserror::Error)]
pub enum OutletError {
    /// NATS is away, or the stream cannot be created or read, or has another configuration.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The message is over the server's size limit. The outlet stays open.
    #[error("a message of {bytes} bytes is larger than the server takes ({bytes_max})")]
    TooLarge {
        /// The size of its payload and headers.
        bytes: usize,
        /// The server's `max_payload`.
        bytes_max: usize,
    },
    /// JetStream did not store a message.
    #[error("the stream {stream} refuses a message to follow sequence {behind}: {detail}")]
    Refused {
        /// Which.
        stream: String,
        /// The sequence that it was to follow.
        behind: StreamSequence,
        /// What JetStream says.
        detail: String,
    },
    /// The connection was lost, or no answer came.
    #[error("no answer from the stream {stream}: {detail}")]
    Silent {
        /// Which.
        stream: String,
        /// What has happened.
        detail: &'static str,
    },
    /// It was not opened, or an earlier error closed it.
    #[error("the stream is not open")]
    Closed,
}

/// A stream to send to.
///
/// Not a [`StreamPublisher`](crate::stream::StreamPublisher): an outlet is the only writer of its stream. Each
/// message names the one that it follows, so one answer confirms all before it and most messages ask for none,
/// and the first refusal ends all. A publisher's messages stand each by itself, among those of others.
pub struct Outlet {
    nats: Nats,
    settings: JetstreamSettings,
    flow: Option<OutletFlow>,
}

impl Outlet {
    /// Makes a closed outlet; the stream need not exist yet.
    pub fn new(nats: Nats, settings: JetstreamSettings) -> Self {
        Self { nats, settings, flow: None }
    }

    /// Creates the stream if there is none, and says how far it is. The next message follows that. Messages
    /// that were under way before may still be stored, once.
    ///
    /// # Errors
    /// [`OutletError::Stream`].
    pub async fn open(&mut self) -> Result<OutletPosition, OutletError> {
        self.flow = None;
        let begun = tokio::time::Instant::now();
        while let Some(trouble) = self.nats.trouble() {
            if begun.elapsed() >= OUTLET_CONNECT_WAIT_MAX {
                return Err(StreamError::Away(trouble).into());
            }
            tokio::time::sleep(OUTLET_CONNECT_POLL_INTERVAL).await;
        }
        let connection = self.nats.client().statistics().connects.load(Ordering::Acquire);
        let acks = AckInbox::open(&self.nats).await?;
        let stream = JetstreamStream::open(&self.nats, &self.settings).await?;
        let state = stream.state().await?;
        let message = if state.messages == 0 { None } else { stream.newest(state.last).await? };
        self.flow = Some(OutletFlow::new(stream, acks, connection, state.last));
        Ok(OutletPosition { sequence: state.last, message })
    }

    /// Sends a message after all those before it, and returns the sequence that it will have. Waits while too
    /// much is under way. The last message may stay here until [`Outlet::settle`].
    ///
    /// # Errors
    /// [`OutletError::TooLarge`], and then the message is left out. All others close the outlet:
    /// [`OutletError::Refused`], [`OutletError::Silent`], [`OutletError::Stream`], [`OutletError::Closed`].
    pub async fn send(&mut self, message: OutgoingMessage) -> Result<StreamSequence, OutletError> {
        let (bytes, bytes_max) = (flow::message_bytes(&message), self.nats.client().max_payload());
        if bytes > bytes_max {
            return Err(OutletError::TooLarge { bytes, bytes_max });
        }
        let sent = self.flow.as_mut().ok_or(OutletError::Closed)?.send(message).await;
        self.close_on_error(sent)
    }

    /// Waits until everything that was given is stored.
    ///
    /// # Errors
    /// As [`Outlet::send`].
    pub async fn settle(&mut self) -> Result<(), OutletError> {
        let settled = self.flow.as_mut().ok_or(OutletError::Closed)?.settle().await;
        self.close_on_error(settled)
    }

    /// Removes what the stream has on the subjects that `filter` matches, up to the first message of any subject of
    /// which `is_behind` is true, as it has to be of all messages after that; all of it without `is_behind`. Waits first
    /// until everything that was given is stored.
    ///
    /// # Errors
    /// As [`Outlet::send`].
    pub async fn forget(
        &mut self,
        filter: &str,
        is_behind: Option<impl Fn(&StoredMessage) -> bool>,
    ) -> Result<(), OutletError> {
        let flow = self.flow.as_mut().ok_or(OutletError::Closed)?;
        let forgotten = match flow.settle().await {
            Ok(()) => forget_in(flow.stream(), filter, is_behind).await.map_err(OutletError::from),
            Err(error) => Err(error),
        };
        self.close_on_error(forgotten)
    }

    /// Checks that NATS is connected. The client would send a message given while NATS is away after the
    /// reconnect, when it may be stale.
    ///
    /// # Errors
    /// [`OutletError::Stream`], which closes the outlet.
    pub fn check(&mut self) -> Result<(), OutletError> {
        let away = self.nats.trouble().map_or(Ok(()), |trouble| Err(StreamError::Away(trouble).into()));
        self.close_on_error(away)
    }

    /// The sequence up to which everything is known to be stored.
    pub fn stored(&self) -> StreamSequence {
        self.flow.as_ref().map_or(0, OutletFlow::stored)
    }

    fn close_on_error<T>(&mut self, result: Result<T, OutletError>) -> Result<T, OutletError> {
        if result.is_err() {
            self.flow = None;
        }
        result
    }
}

/// The purge of [`Outlet::forget`], on a stream to which nothing is under way.
async fn forget_in(
    stream: &JetstreamStream,
    filter: &str,
    is_behind: Option<impl Fn(&StoredMessage) -> bool>,
) -> Result<(), StreamError> {
    let Some(is_behind) = is_behind else { return stream.purge_subjects(filter, None).await };
    let state = stream.state().await?;
    let (mut first, mut behind) = (state.first, state.last + 1);
    while first < behind {
        let middle = first + (behind - first) / 2;
        // Another server may lag behind the leader, and would have nothing there.
        match stream.first_of_leader(">", middle).await? {
            Some(message) if !is_behind(&message) => first = message.sequence + 1,
            _ => behind = middle,
        }
    }
    stream.purge_subjects(filter, (behind <= state.last).then_some(behind)).await
}
