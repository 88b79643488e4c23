//! A WebSocket that carries MQTT (RFC 6455; section 6 of MQTT 3.1.1 and 5). The payloads of its binary
//! messages, concatenated, are the client's byte stream; message boundaries mean nothing.
//!
//! `frame.rs` decodes the frames; an idle WebSocket holds no buffer.

mod frame;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use self::frame::{OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PONG, STATUS_NORMAL, WebSocketDecoder, put_frame};
use super::MqttFront;
use super::handshake::report_refused_connection;
use crate::front::peer_stream::PeerStream;
use crate::limits::WEBSOCKET_FRAME_BYTES_MAX;
use crate::message::Transport;
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;

/// The server's side of a WebSocket, after its opening handshake, as a byte stream.
///
/// Reading the stream answers pings. A shutdown sends the close frame, with the client's own status or
/// that of the rule it broke.
pub(super) struct WebSocket {
    peer_stream: PeerStream,
    /// Bytes that the client sent right behind its opening handshake.
    early: Bytes,
    frames: WebSocketDecoder,
    /// Outgoing frames, and how many of their bytes were sent.
    out: Vec<u8>,
    sent: usize,
    /// The payload of the newest unanswered ping; older ones need no answer (section 5.5.3).
    ping: Option<Vec<u8>>,
    /// The status to close with. `Some` ends the input: the client has closed or broken a rule.
    ended: Option<u16>,
    /// Our close frame is on its way.
    closing: bool,
    peer: SocketAddr,
    front: Arc<MqttFront>,
}

impl WebSocket {
    /// `early` is what was read from `peer_stream` behind the opening handshake.
    pub(super) fn new(
        peer_stream: PeerStream,
        early: Bytes,
        peer: SocketAddr,
        front: Arc<MqttFront>,
    ) -> Self {
        Self {
            peer_stream,
            early: if early.is_empty() { Bytes::new() } else { early },
            frames: WebSocketDecoder::default(),
            out: Vec::new(),
            sent: 0,
            ping: None,
            ended: None,
            closing: false,
            peer,
            front,
        }
    }

    /// The socket below.
    pub(super) fn tcp(&self) -> &TcpStream {
        self.peer_stream.tcp()
    }

    /// Ready when the kernel has every frame, including the answer to a ping.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while self.sent < self.out.len() {
                let n = ready!(Pin::new(&mut self.peer_stream).poll_write(cx, &self.out[self.sent..]))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.sent += n;
            }
            (self.out, self.sent) = (Vec::new(), 0);
            let Some(ping) = self.ping.take() else { return Pin::new(&mut self.peer_stream).poll_flush(cx) };
            put_frame(&mut self.out, OPCODE_PONG, &ping);
        }
    }

    /// The socket's next bytes, still framed.
    fn poll_raw(&mut self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        if !self.early.is_empty() {
            let n = self.early.len().min(space.len());
            self.early.copy_to_slice(&mut space[..n]);
            if self.early.is_empty() {
                // Frees the buffer of the HTTP connection, which `early` shares.
                self.early = Bytes::new();
            }
            return Poll::Ready(Ok(n));
        }
        let mut raw = ReadBuf::new(space);
        ready!(Pin::new(&mut self.peer_stream).poll_read(cx, &mut raw))?;
        Poll::Ready(Ok(raw.filled().len()))
    }
}

impl AsyncRead for WebSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let space = buf.initialize_unfilled();
        if space.is_empty() {
            return Poll::Ready(Ok(()));
        }
        loop {
            if let Poll::Ready(Err(_)) = this.poll_send(cx) {
                // What the client had sent before it left is read all the same. The next write says that it left.
                (this.out, this.sent, this.ping) = (Vec::new(), 0, None);
            }
            if this.frames.closed {
                return Poll::Ready(Ok(()));
            }
            let n = ready!(this.poll_raw(cx, space))?;
            if n == 0 {
                return Poll::Ready(Ok(()));
            }
            if this.ended.is_some() {
                // Input after a violation is ignored. It is still read, because unread input would
                // make the close a reset, and the close frame might be lost.
                continue;
            }
            let took = match this.frames.decode(&mut space[..n]) {
                Ok(took) => took,
                Err(fault) => {
                    let note = RefusalNote::new(Transport::Mqtt, Cause::Websocket, &fault.text);
                    report_refused_connection(&this.front, this.peer, note);
                    this.ended = Some(fault.status);
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault.text)));
                }
            };
            if took.ping.is_some() && !this.closing {
                this.ping = took.ping;
            }
            this.ended = took.close;
            if took.bytes > 0 {
                buf.advance(took.bytes);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for WebSocket {
    /// Accepted bytes may still be buffered; a flush sends them.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let taken = &bytes[..bytes.len().min(WEBSOCKET_FRAME_BYTES_MAX)];
        if !taken.is_empty() {
            put_frame(&mut this.out, OPCODE_BINARY, taken);
            if let Poll::Ready(Err(error)) = this.poll_send(cx) {
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    /// Sends the close frame after all other frames, and closes our half of the TCP connection.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            // No frame may follow a close.
            this.ping = None;
            put_frame(&mut this.out, OPCODE_CLOSE, &this.ended.unwrap_or(STATUS_NORMAL).to_be_bytes());
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.peer_stream).poll_shutdown(cx)
    }
}
