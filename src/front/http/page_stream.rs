//! A page as an answer: read from storage and rendered a piece at a time, each when its client has taken the one before.
//! A page may be a hundred megabytes of JSON, and no more than a piece of it is ever in memory, charged to the key that
//! has asked. No reader of storage is kept meanwhile: the next piece begins after the last record of this one.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use super::query::stored_records_query;
use super::{HttpFrontState, run_blocking};
use crate::consume::query::{PageBudget, QueryError, RecordsReader};
use crate::front::problem::Problem;
use crate::memory::{MemoryAccount, MemoryCharge};

/// How long a piece waits until its key has room for it.
const PIECE_ROOM_WAIT_MAX: Duration = Duration::from_secs(10);

/// Where the pieces of a page come from.
pub(super) trait PageSource: Send + 'static {
    /// Reads the next piece, of which the items are put to `items`. Returns where the page goes on if there may be
    /// more, as JSON.
    fn read(
        &mut self,
        stored: &RecordsReader,
        budget: &mut PageBudget,
        items: &mut JsonItems,
    ) -> Result<Option<String>, QueryError>;
}

/// The items of a JSON array, without its brackets.
pub(super) struct JsonItems {
    json: Vec<u8>,
    /// Whether an item came before.
    is_begun: bool,
}

impl JsonItems {
    /// Adds an item.
    pub(super) fn push(&mut self, item: &impl Serialize) {
        let before = self.json.len();
        if std::mem::replace(&mut self.is_begun, true) {
            self.json.push(b',');
        }
        if let Err(error) = serde_json::to_writer(&mut self.json, item) {
            // Into memory, of values that have a JSON form.
            tracing::error!(%error, "an item of a page has no JSON form");
            self.json.truncate(before);
        }
    }
}

/// A page that is being sent.
struct PageReading<S> {
    shared: Arc<HttpFrontState>,
    source: S,
    budget: PageBudget,
    is_begun: bool,
}

/// A piece of a page, and whether it is the last.
struct PagePiece {
    json: Vec<u8>,
    is_last: bool,
}

impl<S: PageSource> PageReading<S> {
    /// Reads a piece as soon as fewer queries than the maximum are running.
    async fn read(mut self) -> Result<(Self, PagePiece), Problem> {
        let stored = stored_records_query(&self.shared)?;
        let shared = self.shared.clone();
        let _turn = shared.queries.acquire().await.expect("the semaphore is never closed");
        run_blocking(move || {
            self.budget.begin_piece();
            let mut items = JsonItems { json: Vec::new(), is_begun: self.is_begun };
            let next = self.source.read(&stored, &mut self.budget, &mut items)?;
            let is_last = next.is_none() || self.budget.is_page_spent();
            self.is_begun = items.is_begun;
            let mut json = items.json;
            if is_last {
                json.extend_from_slice(b"],\"next\":");
                json.extend_from_slice(next.as_deref().unwrap_or("null").as_bytes());
                json.push(b'}');
            }
            Ok((self, PagePiece { json, is_last }))
        })
        .await
    }
}

/// Answers with a page. `head` is its JSON up to the items of its array, which ends it but for `next`.
pub(super) async fn answer_page(
    shared: &Arc<HttpFrontState>,
    account: Arc<MemoryAccount>,
    head: String,
    limit: usize,
    source: impl PageSource,
) -> Result<Response, Problem> {
    let (shared, budget) = (shared.clone(), PageBudget::new(limit));
    let reading = PageReading { shared, source, budget, is_begun: false };
    let (reading, first) = reading.read().await?;
    let json = [head.as_bytes(), &first.json].concat();
    let body = if first.is_last {
        Body::from(json)
    } else {
        let memory = account.charge_to_send(json.len())?;
        let rest = (!first.is_last).then_some((reading, memory));
        let first = stream::iter([Ok(Bytes::from(json))]);
        Body::from_stream(futures_util::StreamExt::chain(first, stream::try_unfold(rest, next_piece)))
    };
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

type PageRest<S> = Option<(PageReading<S>, MemoryCharge)>;

/// The next piece of a page; its client has taken the one before.
async fn next_piece<S: PageSource>(
    rest: PageRest<S>,
) -> Result<Option<(Bytes, PageRest<S>)>, std::io::Error> {
    let Some((reading, memory)) = rest else { return Ok(None) };
    let account = memory.account().clone();
    drop(memory);
    let broken = |words: &'static str| std::io::Error::other(words);
    let read = reading.read().await;
    let (reading, piece) = read.map_err(|_| broken("the rest of the page cannot be read"))?;
    let room = tokio::time::timeout(PIECE_ROOM_WAIT_MAX, account.wait_room_to_send()).await;
    room.map_err(|_| broken("the key's share of the memory is used up"))?;
    let memory = account.charge_held(piece.json.capacity());
    Ok(Some((piece.json.into(), (!piece.is_last).then_some((reading, memory)))))
}
