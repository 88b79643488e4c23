//! A connection's socket while hyper has it: it is lent, and taken back by whoever goes on with the connection without
//! hyper.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::socket::HttpSocket;

/// A socket that is lent. Clones are of the same one; only its connection's task uses them.
#[derive(Clone)]
pub(super) struct LentSocket(Arc<Mutex<Loan>>);

struct Loan {
    socket: Option<HttpSocket>,
    /// Nothing was written since the last flush: hyper flushes a socket when it has nothing more to write to it.
    is_flushed: bool,
}

impl LentSocket {
    pub(super) fn new(socket: HttpSocket) -> Self {
        Self(Arc::new(Mutex::new(Loan { socket: Some(socket), is_flushed: true })))
    }

    /// The socket, unless it was taken before. Whoever has it lent finds it not connected from then on.
    pub(super) fn take(&self) -> Option<HttpSocket> {
        self.0.lock().socket.take()
    }

    /// Whether all has been written to it that was to be, as of the end of a turn of whoever has it.
    pub(super) fn is_flushed(&self) -> bool {
        self.0.lock().is_flushed
    }

    /// Closes it, if it is still here and somebody has not read a request's body to its end.
    pub(super) fn poll_close_unread(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0.lock().socket {
            Some(socket) if socket.has_unread_body() => Pin::new(socket).poll_shutdown(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_lent<T>(
        &self,
        is_write: bool,
        poll: impl FnOnce(Pin<&mut HttpSocket>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let mut loan = self.0.lock();
        loan.is_flushed &= !is_write;
        match &mut loan.socket {
            Some(socket) => poll(Pin::new(socket)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for LentSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_lent(false, |socket| socket.poll_read(cx, buf))
    }
}

impl AsyncWrite for LentSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_lent(true, |socket| socket.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_lent(true, |socket| socket.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.lock().socket.as_ref().is_some_and(HttpSocket::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.poll_lent(false, |socket| socket.poll_flush(cx));
        self.0.lock().is_flushed |= matches!(flushed, Poll::Ready(Ok(())));
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_lent(false, |socket| socket.poll_shutdown(cx))
    }
}
