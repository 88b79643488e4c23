//! An answer on its way to a client, and the memory of its request: charged to the key that the request came with, or
//! to the address of a stranger, until the client has taken the answer.
//!
//! Not every client reads. Over HTTP/1 the socket ends a write that waits too long; an HTTP/2 client can keep a stream's
//! window at 0 and be alive otherwise. So a large answer is handed over in small copies, and what is left of it is
//! dropped when its client takes nothing for too long.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;

use super::request_clock::RequestUnderWay;
use crate::limits::HTTP_ANSWER_PIECE_BYTES;
use crate::memory::{MemoryAccount, MemoryCharge, MemoryExceeded};

/// What a large answer is handed over in.
const COPY_BYTES: usize = 16 << 10;

/// The memory of one request: an extension of it.
#[derive(Clone)]
pub(super) struct RequestMemory(Arc<Mutex<RequestHolder>>);

/// Who holds a request's memory.
pub(super) enum RequestHolder {
    /// Nobody that is known: the request has presented no valid key, or not yet.
    Stranger(StrangerRequest),
    /// A key.
    Key(MemoryCharge),
    /// The answer.
    Answer,
}

/// Counts a request without a key among those of its connection.
pub(super) struct StrangerRequest(Arc<AtomicUsize>);

impl StrangerRequest {
    /// Counts one more; returns how many there are with it.
    pub(super) fn enter(count: &Arc<AtomicUsize>) -> (Self, usize) {
        let others = count.fetch_add(1, Ordering::Relaxed);
        (Self(count.clone()), others + 1)
    }
}

impl Drop for StrangerRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl RequestMemory {
    /// That of a request whose key is not known yet.
    pub(super) fn of_stranger(request: StrangerRequest) -> Self {
        Self(Arc::new(Mutex::new(RequestHolder::Stranger(request))))
    }

    /// Notes that the request has a valid key, which is charged for it.
    pub(super) fn charge_to_key(&self, charge: MemoryCharge) {
        *self.0.lock() = RequestHolder::Key(charge);
    }

    /// The account of the key, if it has a valid one.
    pub(super) fn account(&self) -> Option<Arc<MemoryAccount>> {
        match &*self.0.lock() {
            RequestHolder::Key(charge) => Some(charge.account().clone()),
            RequestHolder::Stranger(_) | RequestHolder::Answer => None,
        }
    }

    /// Hands over who holds it, to the answer.
    pub(super) fn take(&self) -> RequestHolder {
        std::mem::replace(&mut *self.0.lock(), RequestHolder::Answer)
    }
}

/// What an answer holds until it is taken.
#[expect(dead_code, reason = "what matters is when it is dropped")]
pub(super) struct AnswerHold {
    pub(super) memory: MemoryCharge,
    pub(super) stranger: Option<StrangerRequest>,
    /// Its connection is not idle.
    pub(super) under_way: Option<RequestUnderWay>,
}

/// The body of an answer.
struct AnswerBody(Arc<Mutex<AnswerState>>);

struct AnswerState {
    body: Body,
    /// The rest of what the body has given last.
    rest: Bytes,
    /// How often the client has taken something.
    taken: usize,
    hold: Option<AnswerHold>,
}

/// The bytes of a body whose length is known.
pub(super) fn known_bytes(response: &Response) -> usize {
    response.body().size_hint().exact().map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// Charges for an answer whose length is known, beside its request.
///
/// # Errors
/// [`MemoryExceeded`]: it does not fit.
pub(super) fn charge_for(response: &Response, memory: &mut MemoryCharge) -> Result<(), MemoryExceeded> {
    memory.grow_to_send(known_bytes(response))
}

/// Keeps `hold` until the client has taken the answer. If it takes nothing of a large one for `stall_max`, the answer
/// ends there.
pub(super) fn hold_until_taken(response: Response, hold: AnswerHold, stall_max: Duration) -> Response {
    response.map(|body| {
        let is_large = body.size_hint().upper().is_none_or(|bytes| bytes > HTTP_ANSWER_PIECE_BYTES as u64);
        let state = AnswerState { body, rest: Bytes::new(), taken: 0, hold: Some(hold) };
        let state = Arc::new(Mutex::new(state));
        if is_large {
            tokio::spawn(drop_when_stalled(Arc::downgrade(&state), stall_max));
        }
        Body::new(AnswerBody(state))
    })
}

/// Drops what is left of an answer when its client takes nothing of it.
async fn drop_when_stalled(state: Weak<Mutex<AnswerState>>, stall_max: Duration) {
    let mut taken_before = None;
    loop {
        tokio::time::sleep(stall_max).await;
        let Some(state) = state.upgrade() else { return };
        let mut state = state.lock();
        if taken_before == Some(state.taken) || state.taken == 0 {
            (state.body, state.rest, state.hold) = (Body::empty(), Bytes::new(), None);
            return;
        }
        taken_before = Some(state.taken);
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = self.0.lock();
        let state = &mut *state;
        if state.hold.is_none() {
            let stalled = io::Error::new(io::ErrorKind::TimedOut, "the client does not take its answer");
            return Poll::Ready(Some(Err(axum::Error::new(stalled))));
        }
        state.taken += 1;
        if state.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut state.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                ended => return Poll::Ready(ended),
            };
            match frame.into_data() {
                Ok(data) if data.len() > COPY_BYTES => state.rest = data,
                Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(other) => return Poll::Ready(Some(Ok(other))),
            }
        }
        // A copy: a part of the same allocation would keep all of it in memory for as long as it is not sent.
        let part = state.rest.split_to(state.rest.len().min(COPY_BYTES));
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&part)))))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.0.lock();
        state.rest.is_empty() && state.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.0.lock();
        let mut hint = state.body.size_hint();
        let rest = state.rest.len() as u64;
        match hint.exact() {
            Some(bytes) => hint.set_exact(bytes + rest),
            None => hint.set_lower(hint.lower() + rest),
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;
    use crate::memory::MemoryBudget;
    use crate::message::{DatasourceId, KeyId};

    fn held(budget: &MemoryBudget, body: Vec<u8>, stall_max: Duration) -> Response {
        let account = budget.account_of_key(KeyId([1; 6]), &DatasourceId::new("press-4").expect("slug"));
        let mut memory = account.charge(100).expect("fits");
        let response = Response::new(Body::from(body));
        charge_for(&response, &mut memory).expect("fits");
        hold_until_taken(response, AnswerHold { memory, stranger: None, under_way: None }, stall_max)
    }

    #[tokio::test]
    async fn an_answer_is_charged_until_it_is_taken_and_comes_in_small_copies() {
        let budget = MemoryBudget::new(10 << 20, 10 << 20);
        let sent: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let response = held(&budget, sent.clone(), Duration::from_secs(60));
        assert_eq!(response.body().size_hint().exact(), Some(300_000));
        assert_eq!(budget.held_bytes(), 300_100);
        let mut chunks = response.into_body().into_data_stream();
        let mut received = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.expect("data");
            assert!(chunk.len() <= COPY_BYTES);
            received.extend_from_slice(&chunk);
        }
        drop(chunks);
        assert!(received == sent);
        assert_eq!(budget.held_bytes(), 0);
    }

    #[tokio::test]
    async fn a_large_answer_that_is_not_taken_is_dropped() {
        let budget = MemoryBudget::new(10 << 20, 10 << 20);
        for taken in [false, true] {
            let response = held(&budget, vec![7; 300_000], Duration::from_millis(20));
            let mut chunks = response.into_body().into_data_stream();
            if taken {
                assert!(chunks.next().await.is_some_and(|chunk| chunk.is_ok()));
            }
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while budget.held_bytes() > 0 && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(budget.held_bytes(), 0);
            assert!(
                chunks.next().await.is_some_and(|chunk| chunk.is_err()),
                "the client learns that it is cut"
            );
        }
    }
}
