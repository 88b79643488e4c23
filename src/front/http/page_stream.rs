//! A page as an answer: read from storage and rendered a piece at a time, each when its client has taken the one before.
//! A page may be a hundred megabytes of JSON, and no more than a piece of it is ever in memory, charged to the key that
//! has asked. No reader of storage is kept meanwhile: the next piece begins after the last record of this one.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use super::credentials::Caller;
use super::query::stored_records_query;
use super::{HttpFrontState, run_reading};
use crate::auth::Grant;
use crate::consume::query::{PageBudget, QueryError, RecordsReader};
use crate::front::problem::Problem;
use crate::limits::HTTP_ANSWER_PIECE_BYTES;
use crate::memory::MemoryCharge;
use crate::shares::TenantShare;

/// How long a piece waits until its key has room for it.
const PIECE_ROOM_WAIT_MAX: Duration = Duration::from_secs(10);

/// Where the pieces of a page come from.
pub(super) trait PageSource: Send + 'static {
    /// Reads the next piece, of which the items are put to `items`; there may be none. Returns where the page goes on if
    /// there may be more, as JSON.
    fn read(
        &mut self,
        stored: &RecordsReader,
        budget: &mut PageBudget,
        items: &mut JsonItems,
    ) -> Result<Option<String>, QueryError>;
}

/// The items of a JSON array, without its brackets, in chunks: one allocation of many megabytes would grow to twice
/// its size, and be all or nothing when the page is sent.
#[derive(Default)]
pub(super) struct JsonItems {
    full: VecDeque<Bytes>,
    last: Vec<u8>,
    /// Whether an item came before.
    is_begun: bool,
    /// Each item has a line of its own instead.
    are_lines: bool,
}

impl JsonItems {
    /// Items of which each ends its line.
    pub(super) fn of_lines() -> Self {
        Self { are_lines: true, ..Self::default() }
    }

    /// Adds an item.
    pub(super) fn push(&mut self, item: &impl Serialize) {
        if std::mem::replace(&mut self.is_begun, true) && !self.are_lines {
            self.put(b",");
        }
        if let Err(error) = serde_json::to_writer(&mut *self, item) {
            // Into memory, of values that have a JSON form.
            tracing::error!(%error, "an item of a page has no JSON form");
        }
        if self.are_lines {
            self.put(b"\n");
        }
    }

    /// Adds an item that is JSON already.
    pub(super) fn push_json(&mut self, json: &[u8]) {
        if std::mem::replace(&mut self.is_begun, true) {
            self.put(b",");
        }
        self.put(json);
    }

    /// How many chunks it takes.
    pub(super) fn chunk_count(&self) -> usize {
        self.full.len() + 1
    }

    pub(super) fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = HTTP_ANSWER_PIECE_BYTES - self.last.len();
            let (now, rest) = bytes.split_at(bytes.len().min(room));
            self.last.extend_from_slice(now);
            if self.last.len() == HTTP_ANSWER_PIECE_BYTES {
                self.full.push_back(std::mem::take(&mut self.last).into());
                self.last.reserve_exact(HTTP_ANSWER_PIECE_BYTES);
            }
            bytes = rest;
        }
    }

    pub(super) fn into_chunks(self) -> VecDeque<Bytes> {
        let Self { mut full, last, .. } = self;
        if !last.is_empty() {
            full.push_back(last.into());
        }
        full
    }
}

impl io::Write for JsonItems {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What stands around the items of a page.
pub(super) struct PageFrame {
    content_type: &'static str,
    /// What comes before them.
    head: String,
    /// Each item has a line of its own, and nothing follows. Else they are an array in an object, which `next` ends.
    are_lines: bool,
}

impl PageFrame {
    /// A JSON object. `head` is its JSON up to the items of its array, which ends it but for `next`.
    pub(super) fn object(head: String) -> Self {
        Self { content_type: "application/json", head, are_lines: false }
    }

    /// Lines of this media type, of which `head` is the first with its end, or empty.
    pub(super) fn lines(content_type: &'static str, head: &str) -> Self {
        Self { content_type, head: head.to_owned(), are_lines: true }
    }
}

/// A page that is being sent.
struct PageReading<S> {
    shared: Arc<HttpFrontState>,
    /// The tenant of the caller.
    tenant: Arc<TenantShare>,
    source: S,
    budget: PageBudget,
    /// Under which it is read: a page may take hours.
    grant: Grant,
    is_begun: bool,
    are_lines: bool,
}

/// A piece of a page, and whether it is the last.
struct PagePiece {
    chunks: VecDeque<Bytes>,
    is_last: bool,
}

impl PagePiece {
    fn bytes(&self) -> usize {
        self.chunks.len() * HTTP_ANSWER_PIECE_BYTES
    }
}

impl<S: PageSource> PageReading<S> {
    /// Reads a piece, which `head` begins, in a turn of the tenant, which goes on if the caller goes away.
    async fn read(mut self, head: &str) -> Result<(Self, PagePiece), Problem> {
        let stored = stored_records_query(&self.shared)?;
        let (is_begun, are_lines) = (self.is_begun, self.are_lines);
        let mut items = JsonItems { is_begun, are_lines, ..JsonItems::default() };
        items.put(head.as_bytes());
        let turn = self.tenant.clone().read_turn().await;
        run_reading(move || {
            let _turn = turn;
            self.budget.begin_piece();
            let next = self.source.read(&stored, &mut self.budget, &mut items)?;
            let is_last = next.is_none() || self.budget.is_page_spent();
            self.is_begun = items.is_begun;
            if is_last && !are_lines {
                items.put(b"],\"next\":");
                items.put(next.as_deref().unwrap_or("null").as_bytes());
                items.put(b"}");
            }
            Ok((self, PagePiece { chunks: items.into_chunks(), is_last }))
        })
        .await
    }
}

/// Answers with a page, for which `budget` is there.
pub(super) async fn answer_page(
    shared: &Arc<HttpFrontState>,
    caller: &Caller,
    frame: PageFrame,
    budget: PageBudget,
    source: impl PageSource,
) -> Result<Response, Problem> {
    let account = shared.parts.intake.memory_account(&caller.0);
    let tenant = shared.parts.subscribers.shares.share(caller.0.datasource());
    let PageFrame { content_type, head, are_lines } = frame;
    let shared = shared.clone();
    let grant = caller.0.clone();
    let reading = PageReading { shared, tenant, source, budget, grant, is_begun: false, are_lines };
    let (reading, mut first) = reading.read(&head).await?;
    let body = match first.chunks.len() {
        0 | 1 if first.is_last => Body::from(first.chunks.pop_front().unwrap_or_default()),
        _ => {
            let memory = account.charge_to_send(first.bytes())?;
            let reading = (!first.is_last).then_some(reading);
            let sending = PageSending { chunks: first.chunks, memory, reading };
            Body::from_stream(stream::try_unfold(sending, PageSending::next))
        }
    };
    Ok(([(CONTENT_TYPE, content_type)], body).into_response())
}

/// A page of several chunks on its way to the client.
struct PageSending<S> {
    /// The rest of the piece that was read last.
    chunks: VecDeque<Bytes>,
    memory: MemoryCharge,
    /// The rest of the page.
    reading: Option<PageReading<S>>,
}

impl<S: PageSource> PageSending<S> {
    /// The next chunk; its client has taken the one before.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, io::Error> {
        while self.chunks.is_empty()
            && let Some(reading) = self.reading.take()
        {
            let account = self.memory.account().clone();
            self.memory.set_held(0);
            let room = tokio::time::timeout(PIECE_ROOM_WAIT_MAX, account.wait_room_to_send()).await;
            room.map_err(|_| io::Error::other("the key's share of the memory is used up"))?;
            if !reading.grant.holds() {
                return Err(io::Error::other("the key was revoked or has expired"));
            }
            let read = reading.read("").await;
            let (reading, piece) =
                read.map_err(|_| io::Error::other("the rest of the page cannot be read"))?;
            self.memory.set_held(piece.bytes());
            self.reading = (!piece.is_last).then_some(reading);
            self.chunks = piece.chunks;
        }
        Ok(self.chunks.pop_front().map(|chunk| (chunk, self)))
    }
}
