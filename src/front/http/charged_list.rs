//! A list as an answer, rendered in chunks, each charged to its key before it is filled: a list of keys, of datasources
//! or of audit entries may be many megabytes, and forty requests for it would be in memory at once otherwise. What the
//! client has taken is given back chunk by chunk.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use super::page_stream::JsonItems;
use crate::front::problem::Problem;
use crate::limits::HTTP_ANSWER_PIECE_BYTES;
use crate::memory::{MemoryAccount, MemoryCharge};

/// A list that is being rendered.
pub(super) struct ChargedList {
    items: JsonItems,
    memory: MemoryCharge,
    content_type: &'static str,
}

impl ChargedList {
    /// A list that begins with `head`: the JSON up to the items of its array.
    ///
    /// # Errors
    /// The key has no room.
    pub(super) fn json(account: &Arc<MemoryAccount>, head: &str) -> Result<Self, Problem> {
        let memory = account.charge_to_send(HTTP_ANSWER_PIECE_BYTES)?;
        let mut items = JsonItems::default();
        items.put(head.as_bytes());
        Ok(Self { items, memory, content_type: "application/json" })
    }

    /// A list with an item on each line.
    ///
    /// # Errors
    /// The key has no room.
    pub(super) fn lines(account: &Arc<MemoryAccount>, content_type: &'static str) -> Result<Self, Problem> {
        Ok(Self { content_type, items: JsonItems::of_lines(), ..Self::json(account, "")? })
    }

    /// Adds an item, once there is room for it.
    ///
    /// # Errors
    /// The key has no room.
    pub(super) fn push(&mut self, item: &impl Serialize) -> Result<(), Problem> {
        self.items.push(item);
        // An item is far smaller than a chunk: the next one is charged for before it is begun.
        let needed = self.items.chunk_count() * HTTP_ANSWER_PIECE_BYTES;
        match needed.checked_sub(self.memory.bytes()) {
            Some(more @ 1..) => Ok(self.memory.grow_to_send(more)?),
            _ => Ok(()),
        }
    }

    /// The answer, which ends with `tail`.
    pub(super) fn finish(mut self, tail: &str) -> Response {
        self.items.put(tail.as_bytes());
        let Self { items, memory, content_type } = self;
        let mut chunks = items.into_chunks();
        let body = match chunks.len() {
            // What wraps every handler charges for it.
            0 | 1 => Body::from(chunks.pop_front().unwrap_or_default()),
            _ => Body::from_stream(stream::unfold((chunks, memory), next_chunk)),
        };
        ([(CONTENT_TYPE, content_type)], body).into_response()
    }
}

type SendingChunks = (VecDeque<Bytes>, MemoryCharge);

/// The next chunk; its client has taken the one before.
async fn next_chunk(
    (mut chunks, mut memory): SendingChunks,
) -> Option<(Result<Bytes, std::io::Error>, SendingChunks)> {
    memory.set_held(chunks.len() * HTTP_ANSWER_PIECE_BYTES);
    let chunk = chunks.pop_front()?;
    Some((Ok(chunk), (chunks, memory)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryBudget;
    use crate::message::{DatasourceId, KeyId};

    const SHARE_BYTES: usize = 1 << 20;

    fn account(budget: &MemoryBudget) -> Arc<MemoryAccount> {
        budget.account_of_key(KeyId([1; 6]), &DatasourceId::new("press-4").expect("a slug"))
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
    }

    #[test]
    fn a_list_is_charged_for_before_it_is_built_and_until_it_is_taken() {
        let budget = MemoryBudget::new(4 * SHARE_BYTES, SHARE_BYTES);
        let item = "x".repeat(998);
        let build = |count: usize| {
            let mut list = ChargedList::json(&account(&budget), "[")?;
            (0..count).try_for_each(|_| list.push(&item))?;
            Ok::<_, Problem>(list.finish("]"))
        };
        let response = build(300).map_err(|problem| panic!("{problem:?}")).expect("fits");
        assert!(budget.held_bytes() >= 300_000, "{} bytes", budget.held_bytes());
        let bytes = block_on(axum::body::to_bytes(response.into_body(), usize::MAX)).expect("a body");
        let sent: Vec<String> = serde_json::from_slice(&bytes).expect("JSON");
        assert_eq!(sent, vec![item.clone(); 300]);
        assert_eq!(budget.held_bytes(), 0);
        // Half of a share may be prepared to be sent.
        assert!(build(SHARE_BYTES / 2 / 1_000 + 70).is_err());
        assert_eq!(budget.held_bytes(), 0);
    }

    #[test]
    fn a_list_of_lines_has_one_for_each_item() {
        let budget = MemoryBudget::new(4 * SHARE_BYTES, SHARE_BYTES);
        let mut list = ChargedList::lines(&account(&budget), "application/x-ndjson").expect("room");
        (0..3).for_each(|n| list.push(&n).expect("room"));
        let body = list.finish("").into_body();
        let bytes = block_on(axum::body::to_bytes(body, usize::MAX)).expect("a body");
        assert_eq!(bytes, "0\n1\n2\n");
    }
}
