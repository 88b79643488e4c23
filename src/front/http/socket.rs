//! A socket that HTTP is served on: a stream over TCP or TLS that does not wait for ever for a client that does not
//! read, and that closes so that the client can still read the answer.
//!
//! A request is often answered before its body has been read: a wrong key is refused by its header
//! alone. Closing such a socket makes the kernel send a reset, which can overtake the answer; the client
//! then sees a broken connection instead of the reason. So a close first shuts down its own direction,
//! then reads and discards a little of what still arrives, as RFC 9112 (9.6) advises. A close with
//! nothing unread does not wait: that would only delay a drain.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::frame_meter::{FrameFault, FrameMeter};
use super::request_clock::RequestClock;
use crate::front::peer_stream::PeerStream;
use crate::limits::{HTTP_LINGER_BYTES_MAX, NEWCOMER_READ_BYTES};
use crate::processor::TaskPayer;

/// How long a close goes on reading and discarding.
const SOCKET_LINGER_MAX: Duration = Duration::from_secs(2);

/// A connection's socket.
pub(super) struct HttpSocket {
    stream: PeerStream,
    /// How long a write may wait for the client to read anything at all.
    stall_max: Duration,
    /// Created when a write first has to wait or a close goes on reading; reused afterwards.
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether a request was answered before its body was read to the end.
    unread: Arc<AtomicBool>,
    writing: SocketWriteState,
    frames: FrameMeter,
    clock: RequestClock,
    /// Who pays for the connection.
    payer: Arc<TaskPayer>,
    /// A newcomer has had its turn.
    gives_way: bool,
    /// Set when what the client sends is nothing to go on with.
    fault: Arc<OnceLock<FrameFault>>,
}

/// The state of the sending half, which also says what the timer is for.
#[derive(PartialEq, Eq)]
enum SocketWriteState {
    Free,
    /// The client does not read; the timer ends the wait.
    Stalled,
    /// Our half is shut down; up to so many bytes are still read and discarded. The timer ends that.
    Lingering {
        bytes_left: usize,
    },
}

impl HttpSocket {
    /// A socket whose client may keep a write waiting for `stall_max`. Whoever leaves a request's body
    /// unread sets `unread`; `clock` learns when bytes come; `payer` says whether it is a newcomer's;
    /// `fault` is set when reading fails for what the client has sent.
    pub(super) fn new(
        stream: PeerStream,
        stall_max: Duration,
        unread: Arc<AtomicBool>,
        clock: RequestClock,
        payer: Arc<TaskPayer>,
        fault: Arc<OnceLock<FrameFault>>,
    ) -> Self {
        Self {
            stream,
            stall_max,
            timer: None,
            unread,
            writing: SocketWriteState::Free,
            frames: FrameMeter::new(),
            clock,
            payer,
            gives_way: false,
            fault,
        }
    }

    /// Reads as much as comes; of a newcomer a little in each of its turns, so that a hundred requests at once are not
    /// looked at before the first one's key is.
    fn poll_some(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.gives_way) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if buf.remaining() <= NEWCOMER_READ_BYTES || !self.payer.is_newcomer() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let mut some = ReadBuf::new(buf.initialize_unfilled_to(NEWCOMER_READ_BYTES));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut some))?;
        let bytes = some.filled().len();
        buf.advance(bytes);
        self.gives_way = bytes == NEWCOMER_READ_BYTES;
        Poll::Ready(Ok(()))
    }

    /// Whether its close goes on reading, so that the client can read the answer.
    pub(super) fn has_unread_body(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// The stream, for another protocol to take over.
    pub(super) fn into_stream(self) -> PeerStream {
        self.stream
    }

    fn start_timer(&mut self, after: Duration) {
        let deadline = Instant::now() + after;
        match &mut self.timer {
            Some(timer) => timer.as_mut().reset(deadline),
            None => self.timer = Some(Box::pin(tokio::time::sleep_until(deadline))),
        }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.timer {
            Some(timer) => timer.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }

    /// Fails a write that has waited for `stall_max`.
    fn limit_stall(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(done) = &written {
            self.writing = SocketWriteState::Free;
            self.frames.sent(*done.as_ref().unwrap_or(&0));
            return written;
        }
        if self.writing != SocketWriteState::Stalled {
            self.writing = SocketWriteState::Stalled;
            self.start_timer(self.stall_max);
        }
        ready!(self.poll_timer(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl AsyncRead for HttpSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buf.filled().len();
        ready!(self.poll_some(cx, buf))?;
        let bytes = &buf.filled()[filled..];
        self.frames.read(bytes).map_err(|fault| {
            let _ = self.fault.set(fault);
            io::Error::new(io::ErrorKind::InvalidData, fault)
        })?;
        if !bytes.is_empty() && !self.frames.is_http2() {
            self.clock.note_bytes();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HttpSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.limit_stall(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.limit_stall(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // HTTP/1 does not read while a request is under way, and flushes whenever it has nothing else to do.
        if self.clock.is_half_close_awaited() && self.stream.poll_half_closed(cx) {
            self.clock.note_half_closed();
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// If a body is unread, resolves when the client has closed its half too, or when [`SOCKET_LINGER_MAX`] or
    /// [`HTTP_LINGER_BYTES_MAX`] is exceeded.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !matches!(self.writing, SocketWriteState::Lingering { .. }) {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            if !self.has_unread_body() {
                return Poll::Ready(Ok(()));
            }
            self.writing = SocketWriteState::Lingering { bytes_left: HTTP_LINGER_BYTES_MAX };
            self.start_timer(SOCKET_LINGER_MAX);
        }
        let mut scrap = [0; 4096];
        while let SocketWriteState::Lingering { bytes_left } = self.writing
            && bytes_left > 0
        {
            let mut buf = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    let bytes_left = bytes_left.saturating_sub(buf.filled().len());
                    self.writing = SocketWriteState::Lingering { bytes_left };
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    ready!(self.poll_timer(cx));
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
