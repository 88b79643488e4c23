//! The output of a connection: the bytes that its client has not taken yet. An idle connection holds no
//! buffer: the connections of a thread use one in turn.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::time::Instant;

use super::stream::ClientStream;
use crate::limits::MQTT_UNSENT_BYTES_MAX;

/// How long a client may read nothing of what it is sent before it counts as gone.
const MQTT_STUCK_MAX: Duration = Duration::from_secs(30);

thread_local! {
    /// The output buffer that the thread's connections use in turn.
    static SPARE_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The output of a connection.
pub(super) struct ClientOutput {
    /// Packets are appended here. Emptied when all of them are sent.
    pub(super) bytes: Vec<u8>,
    /// How many of the bytes were sent.
    sent: usize,
    /// Since when the client has taken none of them.
    stuck_since: Option<Instant>,
}

impl ClientOutput {
    /// An output that begins with `bytes`.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0, stuck_since: None }
    }

    /// How many bytes are not sent.
    #[inline]
    pub(super) fn unsent_bytes(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Takes the thread's buffer, if it has none of its own.
    #[inline]
    pub(super) fn borrow_spare(&mut self) {
        if self.bytes.capacity() == 0 {
            self.bytes = SPARE_BUFFER.take();
        }
    }

    /// Gives the buffer to the thread if it is empty; one that is larger than usual is freed.
    #[inline]
    pub(super) fn return_spare(&mut self) {
        if self.bytes.is_empty() {
            let buffer = std::mem::take(&mut self.bytes);
            if buffer.capacity() <= 2 * MQTT_UNSENT_BYTES_MAX {
                SPARE_BUFFER.set(buffer);
            }
        }
    }

    /// Splits off the bytes that are not sent.
    pub(super) fn split_off_unsent(&mut self) -> Vec<u8> {
        self.bytes.split_off(self.sent.min(self.bytes.len()))
    }

    /// Drops what nobody takes any more.
    pub(super) fn discard(&mut self) {
        self.sent = 0;
        self.bytes.clear();
        self.stuck_since = None;
    }

    /// Ready when everything is written.
    #[inline]
    pub(super) fn poll_flush(
        &mut self,
        stream: &mut ClientStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let n = ready!(Pin::new(&mut *stream).poll_write(cx, &self.bytes[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
            self.stuck_since = None;
        }
        if !self.bytes.is_empty() {
            // The bytes may still wait in a TLS record or a WebSocket frame.
            ready!(Pin::new(&mut *stream).poll_flush(cx))?;
            self.stuck_since = None;
            self.sent = 0;
            self.bytes.clear();
        }
        Poll::Ready(Ok(()))
    }

    /// Notes that the client takes nothing now. Returns whether that is new.
    pub(super) fn begin_wait(&mut self) -> bool {
        let new = self.stuck_since.is_none();
        self.stuck_since.get_or_insert_with(Instant::now);
        new
    }

    /// How long the client may go on to take nothing.
    pub(super) fn wait_left(&self) -> Duration {
        self.stuck_since.map_or(Duration::MAX, |since| MQTT_STUCK_MAX.saturating_sub(since.elapsed()))
    }

    /// Whether the client has taken nothing for too long.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck_since.is_some_and(|since| since.elapsed() >= MQTT_STUCK_MAX)
    }
}
