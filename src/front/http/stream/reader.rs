//! A reader: one stream that is open, and the body that hands it over to its client. It ends when its key dies, when its
//! datasource is deleted, when its connection is to close, or when its client takes nothing for too long.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum::http::Version;
use futures_util::task::AtomicWaker;
use hyper::body::Frame;
use parking_lot::Mutex;

use super::super::answer::AnswerHold;
use super::super::request_clock::StreamUnderWay;
use super::super::server::HttpPeer;
use super::table::{ConnectionStreams, StreamReaders};
use crate::auth::registry::token_ends::{TokenEndGuard, TokenUse};
use crate::auth::{Grant, Registry};
use crate::message::DatasourceId;

/// The largest piece that is handed over at once.
const STREAM_PIECE_BYTES: usize = 16 << 10;

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(in super::super) enum StreamEnd {
    /// Its key was revoked or has expired.
    KeyDead = 1,
    /// Its datasource was deleted.
    DatasourceDeleted = 2,
    /// The gateway is shutting down.
    ShuttingDown = 3,
    /// Its connection has to close for another reason.
    ConnectionCloses = 4,
    /// The client takes nothing.
    NotRead = 5,
    /// The log cannot be read.
    LogUnreadable = 6,
    /// The client has gone.
    ClientLeft = 7,
    /// The session of the dashboard is over.
    SessionOver = 8,
    /// The access token that it was opened with has expired.
    TokenOver = 9,
}

impl StreamEnd {
    /// All of them.
    const ALL: [Self; 9] = [
        Self::KeyDead,
        Self::DatasourceDeleted,
        Self::ShuttingDown,
        Self::ConnectionCloses,
        Self::NotRead,
        Self::LogUnreadable,
        Self::ClientLeft,
        Self::SessionOver,
        Self::TokenOver,
    ];

    /// Its name, for programs.
    pub(in super::super) fn name(self) -> &'static str {
        match self {
            StreamEnd::KeyDead => "key_dead",
            StreamEnd::DatasourceDeleted => "datasource_deleted",
            StreamEnd::ShuttingDown => "shutting_down",
            StreamEnd::ConnectionCloses => "connection_closes",
            StreamEnd::NotRead => "not_read",
            StreamEnd::LogUnreadable => "log_unreadable",
            StreamEnd::ClientLeft => "client_left",
            StreamEnd::SessionOver => "session_over",
            StreamEnd::TokenOver => "token_over",
        }
    }

    /// What it means for the client.
    pub(in super::super) fn words(self) -> &'static str {
        match self {
            StreamEnd::KeyDead => "The key was revoked or has expired.",
            StreamEnd::DatasourceDeleted => "The datasource was deleted.",
            StreamEnd::ShuttingDown => {
                "The gateway is shutting down: connect again, to it or to another one."
            }
            StreamEnd::ConnectionCloses => "The connection has to close: connect again.",
            StreamEnd::NotRead => "Nothing was taken for too long.",
            StreamEnd::LogUnreadable => "The log cannot be read now: connect again later.",
            StreamEnd::ClientLeft => "The client has gone.",
            StreamEnd::SessionOver => "The session is over: sign in again.",
            StreamEnd::TokenOver => "The access token has expired: ask for a new one.",
        }
    }
}

/// What the chunks of a stream come from.
pub(in super::super) trait ChunkSource: Send {
    /// Whose records it has.
    fn scope(&self) -> &DatasourceId;

    /// Holds these until it ends.
    fn hold(&mut self, hold: AnswerHold);

    /// Holds this until it ends: its connection is not idle.
    fn note_under_way(&mut self, under_way: StreamUnderWay);

    /// Counts its end.
    fn note_end(&self, why: StreamEnd);

    /// The next part of the stream; `None` behind its last one.
    fn poll_chunk(&mut self, reader: &StreamReader, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>>;
}

/// One stream that is open.
pub(in super::super) struct StreamReader {
    table: Arc<StreamReaders>,
    connection: Arc<ConnectionStreams>,
    /// Its place in the table.
    number: u64,
    /// Of what it has the records.
    scope: DatasourceId,
    place: Mutex<StreamPlace>,
    /// A [`StreamEnd`] as a number that it was told from outside, or 0.
    told: AtomicU8,
    /// The task that serves it.
    task: AtomicWaker,
    /// What was handed over and has not left the gateway, in bytes.
    unsent: AtomicUsize,
    /// It waits for something of that to leave.
    awaits_room: AtomicBool,
    /// It is to say that it is there before its time.
    is_probed: AtomicBool,
    /// When its client last asked for more, in milliseconds since the table was made; when it last took something; and
    /// when it was told to end.
    asked_ms: AtomicU64,
    taken_ms: AtomicU64,
    told_ms: AtomicU64,
    /// Its place among what ends with access tokens.
    of_token: OnceLock<TokenEndGuard>,
}

enum StreamPlace {
    /// With what of its last chunk was not handed over.
    Open(Box<dyn ChunkSource>, Bytes),
    /// It has ended with an event that says why.
    Finished,
    /// It has ended without one: its client does not take any.
    GivenUp,
}

/// How long a reader has stood still.
pub(super) struct StreamStanding {
    /// Since it took anything, if there is something for it to take.
    pub(super) still: Duration,
    /// Since it was told to end, if it was.
    pub(super) told: Option<Duration>,
}

impl StreamReader {
    /// A stream that begins now, on a connection.
    pub(in super::super) fn open(
        table: &Arc<StreamReaders>,
        peer: &HttpPeer,
        version: Version,
        mut source: Box<dyn ChunkSource>,
    ) -> Arc<Self> {
        source.note_under_way(peer.clock.begin_stream(version < Version::HTTP_2));
        let now_ms = table.now_ms();
        let reader = Arc::new(Self {
            table: table.clone(),
            connection: peer.clock.streams().clone(),
            number: table.next_number(),
            scope: source.scope().clone(),
            place: Mutex::new(StreamPlace::Open(source, Bytes::new())),
            told: AtomicU8::new(0),
            task: AtomicWaker::new(),
            unsent: AtomicUsize::new(0),
            awaits_room: AtomicBool::new(false),
            is_probed: AtomicBool::new(false),
            asked_ms: AtomicU64::new(now_ms),
            taken_ms: AtomicU64::new(now_ms),
            told_ms: AtomicU64::new(0),
            of_token: OnceLock::new(),
        });
        table.enter(reader.number, &reader);
        reader.connection.enter(reader.number, &reader);
        reader
    }

    /// Ends it when the access token of `grant` does, if it is that of one.
    pub(in super::super) fn end_with_token(self: &Arc<Self>, registry: &Registry, grant: &Grant) {
        let weak: Weak<Self> = Arc::downgrade(self);
        if let Some(guard) = registry.end_with_token(grant, weak) {
            let _ = self.of_token.set(guard);
        }
    }

    /// What the request is charged for is held until the stream ends.
    pub(in super::super) fn hold(&self, hold: AnswerHold) {
        if let StreamPlace::Open(source, _) = &mut *self.place.lock() {
            source.hold(hold);
        }
    }

    /// Whose records it has.
    pub(super) fn scope(&self) -> &DatasourceId {
        &self.scope
    }

    /// Tells it to end. The first reason counts.
    pub(super) fn tell(&self, why: StreamEnd) {
        if self.told.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.told_ms.store(self.table.now_ms().max(1), Ordering::Release);
            self.task.wake();
        }
    }

    /// Why it was told to end, if it was.
    pub(in super::super) fn told(&self) -> Option<StreamEnd> {
        let told = self.told.load(Ordering::Acquire);
        StreamEnd::ALL.into_iter().find(|why| *why as u8 == told)
    }

    /// What was handed over and has not left the gateway, in bytes.
    pub(in super::super) fn unsent_bytes(&self) -> usize {
        self.unsent.load(Ordering::Acquire)
    }

    /// Has the task woken when something of that leaves.
    pub(super) fn await_room(&self) {
        self.awaits_room.store(true, Ordering::SeqCst);
    }

    /// Has it say now that it is there, and soon again: the first write finds out who has gone, the second one fails.
    pub(super) fn probe(&self) {
        self.is_probed.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Whether it is to say that it is there before its time.
    pub(in super::super) fn takes_probe(&self) -> bool {
        self.is_probed.load(Ordering::Relaxed) && self.is_probed.swap(false, Ordering::AcqRel)
    }

    /// How it stands, for one that is sent a heartbeat so often.
    pub(super) fn standing(&self, now_ms: u64, heartbeat: Duration) -> StreamStanding {
        let since = |ms: &AtomicU64| Duration::from_millis(now_ms.saturating_sub(ms.load(Ordering::Acquire)));
        // A client that takes what it is sent asks for more at each heartbeat.
        let unasked = since(&self.asked_ms).saturating_sub(heartbeat);
        let untaken = if self.unsent_bytes() > 0 { since(&self.taken_ms) } else { Duration::ZERO };
        StreamStanding { still: unasked.max(untaken), told: self.told_since(now_ms) }
    }

    /// How long ago it was told to end, if it was.
    fn told_since(&self, now_ms: u64) -> Option<Duration> {
        let told_ms = self.told_ms.load(Ordering::Acquire);
        (told_ms > 0).then(|| Duration::from_millis(now_ms.saturating_sub(told_ms)))
    }

    /// Lets go of everything, because its client does not take it.
    pub(super) fn give_up(&self, why: StreamEnd) {
        let mut place = self.place.lock();
        let StreamPlace::Open(..) = &*place else { return };
        let source = std::mem::replace(&mut *place, StreamPlace::GivenUp);
        drop(place);
        if let StreamPlace::Open(source, _) = &source {
            source.note_end(why);
        }
        self.task.wake();
    }

    fn poll_chunk(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        self.asked_ms.store(self.table.now_ms(), Ordering::Release);
        self.task.register(cx.waker());
        let mut place = self.place.lock();
        let (source, rest) = match &mut *place {
            StreamPlace::Open(source, rest) => (source, rest),
            StreamPlace::Finished => return Poll::Ready(None),
            StreamPlace::GivenUp => {
                let stalled = io::Error::new(io::ErrorKind::TimedOut, "the client does not take its stream");
                return Poll::Ready(Some(Err(stalled)));
            }
        };
        if rest.is_empty() {
            let Some(bytes) = ready!(source.poll_chunk(self, cx)) else {
                *place = StreamPlace::Finished;
                return Poll::Ready(None);
            };
            if self.unsent.fetch_add(bytes.len(), Ordering::AcqRel) == 0 {
                self.taken_ms.store(self.table.now_ms(), Ordering::Release);
            }
            *rest = bytes.into();
        }
        // A small copy: HTTP/2 keeps the piece that its client gives no room for, and what is given up must not stay in
        // memory with it. And each piece that is taken counts as progress.
        let piece = rest.split_to(rest.len().min(STREAM_PIECE_BYTES));
        let chunk = StreamChunk { bytes: piece.to_vec(), reader: self.clone() };
        Poll::Ready(Some(Ok(Bytes::from_owner(chunk))))
    }
}

impl TokenUse for StreamReader {
    fn end_with_token(&self) {
        self.tell(StreamEnd::TokenOver);
    }
}

/// A piece of a stream, until it has left the gateway.
struct StreamChunk {
    bytes: Vec<u8>,
    reader: Arc<StreamReader>,
}

impl AsRef<[u8]> for StreamChunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for StreamChunk {
    fn drop(&mut self) {
        let reader = &self.reader;
        reader.unsent.fetch_sub(self.bytes.len(), Ordering::AcqRel);
        reader.taken_ms.store(reader.table.now_ms(), Ordering::Release);
        if reader.awaits_room.swap(false, Ordering::SeqCst) {
            reader.task.wake();
        }
    }
}

/// The body of a stream's answer.
pub(in super::super) struct StreamBody(Arc<StreamReader>);

impl StreamBody {
    pub(in super::super) fn new(reader: Arc<StreamReader>) -> Self {
        Self(reader)
    }
}

impl HttpBody for StreamBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.0.poll_chunk(cx).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        let reader = &self.0;
        reader.table.leave(reader.number);
        reader.connection.leave(reader.number);
        let left = std::mem::replace(&mut *reader.place.lock(), StreamPlace::Finished);
        if let StreamPlace::Open(source, _) = &left {
            source.note_end(match reader.told() {
                Some(why) => why,
                None if reader.table.is_left_lying(reader) => StreamEnd::NotRead,
                None => StreamEnd::ClientLeft,
            });
        }
    }
}
