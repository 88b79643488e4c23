//! The transport of a client's bytes: TCP, TLS or WebSocket. MQTT is the same over each, and a
//! connection does not know which one it has.

use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::websocket::WebSocket;
use crate::config;
use crate::limits::{TCP_PROBE_INTERVAL, TCP_PROBES_MAX};

/// A client's byte stream.
pub(super) enum ClientStream {
    /// MQTT straight on TCP.
    Tcp(TcpStream),
    /// MQTT over TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// MQTT in the binary messages of a WebSocket.
    WebSocket(Box<WebSocket>),
}

// A TCP connection must not pay for the size of the other transports.
const _: () = assert!(size_of::<ClientStream>() <= size_of::<TcpStream>() + size_of::<usize>());

/// Sets what a connection's socket needs: small answers leave at once, and a peer that is gone without a word is
/// found out. What the system refuses is not set.
pub(super) fn prepare_socket(tcp: &TcpStream, config: &config::MqttConfig) {
    // Acknowledgements are small; Nagle's algorithm would delay them.
    let _ = tcp.set_nodelay(true);
    let socket = SockRef::from(tcp);
    if config.tcp_keep_alive_s > 0 {
        let idle = Duration::from_secs(config.tcp_keep_alive_s.into());
        let asked = TcpKeepalive::new().with_time(idle).with_interval(TCP_PROBE_INTERVAL.min(idle));
        let _ = socket.set_tcp_keepalive(&asked.with_retries(TCP_PROBES_MAX));
    }
    if config.tcp_user_timeout_s > 0 {
        let _ = socket.set_tcp_user_timeout(Some(Duration::from_secs(config.tcp_user_timeout_s.into())));
    }
}

impl ClientStream {
    /// The socket below.
    fn tcp(&self) -> &TcpStream {
        match self {
            ClientStream::Tcp(stream) => stream,
            ClientStream::Tls(stream) => stream.get_ref().0,
            ClientStream::WebSocket(stream) => stream.tcp(),
        }
    }

    /// Whether the kernel has something of the client that was not read: bytes, or the end. A read that is pending says
    /// less, because the runtime may not have heard of it yet.
    pub(super) fn has_unread(&self) -> bool {
        SockRef::from(self.tcp()).peek(&mut [MaybeUninit::uninit()]).is_ok()
    }

    /// How many bytes the kernel has for the client that have not arrived there; 0 where the system does not say.
    pub(super) fn queued_bytes(&self) -> usize {
        #[cfg(target_os = "linux")]
        {
            let mut bytes: libc::c_int = 0;
            // SAFETY: the descriptor is that of the socket, and the call writes one integer (SIOCOUTQ of tcp(7)).
            let result = unsafe { libc::ioctl(self.tcp().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
            if result == 0 {
                return usize::try_from(bytes).unwrap_or(0);
            }
        }
        0
    }

    /// Whether the client has closed its side, also if bytes from before that are not read yet. Of a WebSocket
    /// that is seen only when it is read.
    pub(super) fn is_hung_up(&self) -> bool {
        if let ClientStream::WebSocket(_) = self {
            return false;
        }
        let ready = pin!(self.tcp().ready(Interest::READABLE));
        let ready = ready.poll(&mut Context::from_waker(Waker::noop()));
        matches!(ready, Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            ClientStream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            ClientStream::WebSocket(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::WebSocket(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::WebSocket(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::WebSocket(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
