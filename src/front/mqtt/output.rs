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
/// The same while others of its datasource wait for the room that this takes.
const MQTT_DEAF_MAX: Duration = Duration::from_secs(1);

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
    /// The client takes none of them.
    stuck: Option<StuckClient>,
}

/// A client that takes nothing.
struct StuckClient {
    since: Instant,
    /// Since when it has received nothing of what the kernel has for it either.
    deaf_since: Instant,
    /// How many bytes that were when it was last looked at.
    queued: usize,
}

impl ClientOutput {
    /// An output that begins with `bytes`.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0, stuck: None }
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
        self.stuck = None;
    }

    /// Ready when everything is written.
    #[inline]
    pub(super) fn poll_flush(
        &mut self,
        stream: &mut ClientStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let Poll::Ready(n) = Pin::new(&mut *stream).poll_write(cx, &self.bytes[self.sent..])? else {
                self.drop_sent();
                return Poll::Pending;
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
            self.stuck = None;
        }
        if !self.bytes.is_empty() {
            // The bytes may still wait in a TLS record or a WebSocket frame.
            ready!(Pin::new(&mut *stream).poll_flush(cx))?;
            self.stuck = None;
            self.sent = 0;
            self.bytes.clear();
        }
        Poll::Ready(Ok(()))
    }

    /// Drops the packets that are sent, once they are many: a client that takes a little at a time never has all. What
    /// stays begins with a packet.
    fn drop_sent(&mut self) {
        if self.sent < MQTT_UNSENT_BYTES_MAX {
            return;
        }
        let mut whole = 0;
        while let Some(bytes) = packet_bytes(&self.bytes[whole..])
            && whole + bytes <= self.sent
        {
            whole += bytes;
        }
        self.bytes.drain(..whole);
        self.sent -= whole;
    }

    /// Notes that the client takes nothing now. Returns whether that is new.
    pub(super) fn begin_wait(&mut self, stream: &ClientStream) -> bool {
        let new = self.stuck.is_none();
        if new {
            let (now, queued) = (Instant::now(), stream.queued_bytes());
            self.stuck = Some(StuckClient { since: now, deaf_since: now, queued });
        }
        new
    }

    /// How long the client may go on to take nothing before it is looked at.
    pub(super) fn wait_left(&self) -> Duration {
        let left =
            |stuck: &StuckClient| MQTT_STUCK_MAX.saturating_sub(stuck.since.elapsed()).min(MQTT_DEAF_MAX);
        self.stuck.as_ref().map_or(Duration::MAX, left)
    }

    /// Whether the client has taken nothing for too long. `is_wanted` says whether others wait for room.
    pub(super) fn is_stuck(&mut self, stream: &ClientStream, is_wanted: impl FnOnce() -> bool) -> bool {
        let Some(stuck) = &mut self.stuck else { return false };
        if stuck.since.elapsed() < MQTT_DEAF_MAX {
            return false;
        }
        // It is not about to be filled: what it has beyond its bytes is of no use.
        self.bytes.shrink_to_fit();
        let queued = stream.queued_bytes();
        if queued < stuck.queued {
            stuck.deaf_since = Instant::now();
        }
        stuck.queued = queued;
        stuck.since.elapsed() >= MQTT_STUCK_MAX || stuck.deaf_since.elapsed() >= MQTT_DEAF_MAX && is_wanted()
    }
}

/// The length of the packet at the beginning of `bytes` (MQTT 5 section 2.1); `None` if not even that is there.
fn packet_bytes(bytes: &[u8]) -> Option<usize> {
    let mut body = 0;
    for (nth, byte) in bytes.iter().skip(1).take(4).enumerate() {
        body |= usize::from(byte & 0x7f) << (7 * nth);
        if byte & 0x80 == 0 {
            return Some(2 + nth + body);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_dropped_by_whole_packets() {
        let packet = |body: usize| {
            let seven_bits = |shift: u32| u8::try_from(body >> shift & 0x7f).expect("seven bits");
            let length = [0x80 | seven_bits(0), 0x80 | seven_bits(7), seven_bits(14)];
            [&[0x30][..], &length, &vec![b'x'; body]].concat()
        };
        let (first, second) = (packet(MQTT_UNSENT_BYTES_MAX), packet(100_000));
        let mut output = ClientOutput::new([&first[..], &second, &[0xd0, 0]].concat());
        for (sent, dropped) in [
            (MQTT_UNSENT_BYTES_MAX - 1, 0),
            (MQTT_UNSENT_BYTES_MAX, 0),
            (first.len(), first.len()),
            (first.len() + 1, first.len()),
            (first.len() + second.len() + 1, first.len() + second.len()),
        ] {
            let before = output.bytes.clone();
            output.sent = sent;
            output.drop_sent();
            assert_eq!(output.bytes, before[dropped..]);
            assert_eq!(output.sent, sent - dropped);
            (output.bytes, output.sent) = (before, 0);
        }
    }
}
