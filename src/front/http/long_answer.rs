//! An answer that may go on for hours and be silent for most of them, over HTTP/1: a stream. hyper keeps a buffer of 8 KiB
//! for what is read and another one for what is written as long as a connection lives, and a thousand readers that wait for
//! a record are an ordinary sight. So such a connection is taken back from hyper, and its answer is written here: chunks as they
//! come (RFC 9112, section 7.1), or bytes up to the end for a client that speaks HTTP/1.0. Nothing follows it: the
//! connection is closed then, which the answer says at its beginning.

use std::collections::VecDeque;
use std::error::Error;
use std::future::Future;
use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, HttpBody};
use axum::http::header::{CONNECTION, DATE, TRANSFER_ENCODING};
use axum::http::{HeaderName, Version};
use axum::response::Response;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWrite;

use super::lent_socket::LentSocket;
use super::socket::HttpSocket;
use crate::message::{TimeMicros, now_micros};

/// What is taken of the body before it is written.
const GATHERED_BYTES_MAX: usize = 64 << 10;
/// Pieces that are written at once.
const WRITTEN_PIECES_MAX: usize = 32;
/// Room for pieces that is kept while nothing is to be written.
const IDLE_PIECES_MAX: usize = 4;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Says of a response that it is a long one: an extension of it.
#[derive(Clone, Copy)]
pub(super) struct IsLong;

/// Where the task of a request leaves a long answer for its connection.
#[derive(Clone, Default)]
pub(super) struct LongAnswerOffer(Arc<Mutex<Option<(Response, Version)>>>);

impl LongAnswerOffer {
    /// Leaves an answer to a request of this version, for the connection to go on with. Never returns.
    pub(super) async fn leave<T>(&self, response: Response, version: Version) -> T {
        *self.0.lock() = Some((response, version));
        std::future::pending().await
    }
}

/// A connection that is served: by hyper, or with a long answer.
pub(super) enum ServedConnection<C> {
    Hyper {
        connection: Pin<Box<C>>,
        socket: LentSocket,
        offer: LongAnswerOffer,
    },
    Long(Box<LongAnswer>),
    /// hyper has left a socket that is not closed as it has to be.
    Closing(LentSocket),
}

impl<C, E> ServedConnection<C>
where
    C: Future<Output = Result<(), E>>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    /// Serves it to its end.
    pub(super) fn poll_served(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Box<dyn Error + Send + Sync>>> {
        if let Self::Hyper { connection, socket, offer } = self {
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                if let Err(error) = ended {
                    return Poll::Ready(Err(error.into()));
                }
                // A request for another protocol, whatever it is answered, ends without a shutdown.
                *self = Self::Closing(socket.clone());
                return self.poll_served(cx);
            }
            // An answer before this one may wait for its client to read.
            if !socket.is_flushed() {
                return Poll::Pending;
            }
            let Some((response, version)) = offer.0.lock().take() else { return Poll::Pending };
            let Some(socket) = socket.take() else { return Poll::Ready(Ok(())) };
            *self = Self::Long(Box::new(LongAnswer::new(socket, response, version)));
        }
        match self {
            Self::Long(answer) => answer.poll_written(cx).map_err(Into::into),
            Self::Closing(socket) => socket.poll_close_unread(cx).map_err(Into::into),
            Self::Hyper { .. } => Poll::Pending,
        }
    }

    /// What hyper serves, unless it is a long answer now.
    pub(super) fn of_hyper(&mut self) -> Option<Pin<&mut C>> {
        match self {
            Self::Hyper { connection, .. } => Some(connection.as_mut()),
            Self::Long(_) | Self::Closing(_) => None,
        }
    }
}

/// A long answer on its way to its client.
pub(super) struct LongAnswer {
    socket: HttpSocket,
    body: Body,
    is_chunked: bool,
    /// The body has ended.
    is_over: bool,
    /// What is to be written, and its length.
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl LongAnswer {
    /// An answer of which nothing is written yet.
    fn new(socket: HttpSocket, response: Response, version: Version) -> Self {
        let is_chunked = version >= Version::HTTP_11;
        let (head, body) = (head_of(&response, is_chunked), response.into_body());
        let mut answer = Self { socket, body, is_chunked, is_over: false, pieces: VecDeque::new(), bytes: 0 };
        answer.push(head.into());
        answer
    }

    fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        self.pieces.push_back(piece);
    }

    /// Writes it to its end, and closes the connection then.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.gather(cx)?;
            if self.bytes == 0 {
                break;
            }
            ready!(self.poll_some(cx))?;
        }
        if self.pieces.capacity() > IDLE_PIECES_MAX {
            self.pieces = VecDeque::new();
        }
        let socket = Pin::new(&mut self.socket);
        if self.is_over {
            return socket.poll_shutdown(cx);
        }
        // It also finds out that the client has shut down its half.
        ready!(socket.poll_flush(cx))?;
        Poll::Pending
    }

    /// Takes of the body what there is, up to a bound.
    fn gather(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while !self.is_over && self.bytes < GATHERED_BYTES_MAX {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else { break };
            let Some(frame) = frame else {
                self.is_over = true;
                if self.is_chunked {
                    self.push(Bytes::from_static(b"0\r\n\r\n"));
                }
                break;
            };
            let Ok(data) = frame.map_err(io::Error::other)?.into_data() else { continue };
            // A chunk without data would be the last one.
            if data.is_empty() {
                continue;
            }
            if self.is_chunked {
                self.push(format!("{:x}\r\n", data.len()).into());
            }
            self.push(data);
            if self.is_chunked {
                self.push(Bytes::from_static(b"\r\n"));
            }
        }
        Ok(())
    }

    /// Writes some of the pieces.
    fn poll_some(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut slices = [IoSlice::new(&[]); WRITTEN_PIECES_MAX];
        let count = self.pieces.len().min(WRITTEN_PIECES_MAX);
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(piece);
        }
        let mut written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.bytes -= written;
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                drop(piece.split_to(written));
                break;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
        Poll::Ready(Ok(()))
    }
}

/// The head of an answer that nothing follows.
fn head_of(response: &Response, is_chunked: bool) -> Vec<u8> {
    let (version, status) = (if is_chunked { "1.1" } else { "1.0" }, response.status());
    let mut head = Vec::with_capacity(512);
    put(
        &mut head,
        format_args!("HTTP/{version} {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or("")),
    );
    for (name, value) in response.headers() {
        if [CONNECTION, KEEP_ALIVE, TRANSFER_ENCODING].contains(name) {
            continue;
        }
        put(&mut head, format_args!("{name}: "));
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    if !response.headers().contains_key(DATE) {
        put(&mut head, format_args!("date: {}\r\n", http_date(now_micros())));
    }
    if is_chunked {
        put(&mut head, format_args!("transfer-encoding: chunked\r\n"));
    }
    put(&mut head, format_args!("connection: close\r\n\r\n"));
    head
}

fn put(head: &mut Vec<u8>, words: std::fmt::Arguments<'_>) {
    head.write_fmt(words).expect("a Vec takes all");
}

/// A time as HTTP writes it (RFC 9110, section 5.6.7).
fn http_date(at: TimeMicros) -> String {
    let at = jiff::Timestamp::from_microsecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use axum::http::header::CONTENT_TYPE;

    use super::*;

    #[test]
    fn the_head_says_what_follows_and_that_nothing_comes_after_it() {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
        headers.insert(KEEP_ALIVE, HeaderValue::from_static("timeout=75"));
        headers.insert(DATE, HeaderValue::from_static("Mon, 23 Nov 2026 09:28:39 GMT"));
        let common = "200 OK\r\ncontent-type: text/event-stream\r\ndate: Mon, 23 Nov 2026 09:28:39 GMT\r\n";
        let head = |is_chunked| String::from_utf8(head_of(&response, is_chunked)).expect("text");
        assert_eq!(
            head(true),
            format!("HTTP/1.1 {common}transfer-encoding: chunked\r\nconnection: close\r\n\r\n")
        );
        assert_eq!(head(false), format!("HTTP/1.0 {common}connection: close\r\n\r\n"));
        assert_eq!(http_date(1_795_426_119_000_000), "Mon, 23 Nov 2026 09:28:39 GMT");
    }
}
