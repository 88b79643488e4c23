//! Reading records that are no longer in memory, by direct gets, which any server of the stream answers.

use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_nats::StreamError;
use tokio::time::{sleep, timeout};

use super::JetstreamLogShared;
use super::follow::gather_batches;
use super::message::SharedIdContent;
use crate::log::{AppendError, Batch, LogReadError};
use crate::message::{Offset, TimeMicros};
use crate::time::Rfc3339;

/// The approximate least size of a message: turns a number of bytes into a number of messages to ask for.
const STREAM_MESSAGE_BYTES_MIN: usize = 128;
/// How many attempts a server that lags behind the others gets, and the pause between them.
const LAGGING_SERVER_RETRY: (u32, Duration) = (20, Duration::from_millis(100));
/// How long to wait until this gateway has followed the stream up to a message that is asked for.
const FOLLOWED_WAIT_MAX: Duration = Duration::from_secs(3);
/// How far the clocks of a gateway and the servers may differ when a time is looked up.
const CLOCK_DIFFERENCE_MICROS_MAX: i64 = 10_000_000;

/// Reads from an offset below the end of the tail.
pub(super) async fn read_from_servers(
    shared: Arc<JetstreamLogShared>,
    from: Offset,
    bytes_max: usize,
) -> Result<Vec<Batch>, LogReadError> {
    if shared.gate.is_in_doubt() {
        return Err(LogReadError::Away(shared.gate.words()));
    }
    let end = shared.tail.next_offset();
    let messages_max = (bytes_max / STREAM_MESSAGE_BYTES_MIN).max(1);
    for _ in 0..LAGGING_SERVER_RETRY.0 {
        let mut messages = shared.stream.get(from, messages_max, bytes_max).await.map_err(away)?;
        messages.retain(|message| message.sequence < end);
        match messages.first() {
            Some(first) if first.sequence == from => {
                return Ok(gather_batches(&messages, from, &shared, |_| ()));
            }
            found => {
                let state = shared.stream.state().await.map_err(away)?;
                shared.note_state(&state);
                if state.first > from.max(1) {
                    return Err(LogReadError::Removed { wanted: from, first: state.first });
                }
                if found.is_some() {
                    return Ok(gather_batches(&messages, from, &shared, |_| ()));
                }
                if state.messages == 0 || state.first >= end {
                    return Ok(vec![Batch::nothing_below(end)]);
                }
            }
        }
        sleep(LAGGING_SERVER_RETRY.1).await;
    }
    Err(LogReadError::Away(format!("no server of stream {} has {from} yet", shared.stream.name()).into()))
}

/// An offset before which no record was received at or after a time. JetStream only knows when it stored a
/// message, which is a little later.
pub(super) async fn offset_at_server_time(
    shared: Arc<JetstreamLogShared>,
    time: TimeMicros,
) -> Result<Offset, LogReadError> {
    let time = Rfc3339(time.saturating_sub(CLOCK_DIFFERENCE_MICROS_MAX)).to_string();
    let found = shared.stream.sequence_at(&time).await.map_err(away)?;
    let end = shared.tail.next_offset();
    Ok(found.map_or(end, |sequence| sequence.min(end)))
}

/// What is kept under the id of the message at `first`; `None` if it is removed.
pub(super) async fn shared_id_content_at(
    shared: &JetstreamLogShared,
    first: Offset,
) -> Result<Option<SharedIdContent>, AppendError> {
    let away = |error: StreamError| AppendError::Away(error.to_string().into());
    for _ in 0..LAGGING_SERVER_RETRY.0 {
        let messages = shared.stream.get(first, 1, 0).await.map_err(away)?;
        if let Some(found) = messages.iter().find(|message| message.sequence == first) {
            // A fence before it is known only when this gateway has followed so far.
            let mut followed = shared.tail.subscribe();
            if timeout(FOLLOWED_WAIT_MAX, followed.wait_for(|next| *next > first)).await.is_err() {
                return Err(AppendError::Away("this gateway has not followed the stream so far".into()));
            }
            if shared.fences.shut_out(found) {
                let words = "an earlier message with this id came behind the end of its key and is no record: try again \
                             when the id is forgotten (intake.dedup_window_s)";
                return Err(AppendError::Away(words.into()));
            }
            return Ok(Some(SharedIdContent::read(found)));
        }
        // A server that has a later one has not missed it: it was deleted.
        if !messages.is_empty() || shared.stream.state().await.map_err(away)?.first > first {
            return Ok(None);
        }
        sleep(LAGGING_SERVER_RETRY.1).await;
    }
    Err(AppendError::Away(format!("no server of stream {} has {first} yet", shared.stream.name()).into()))
}

fn away(error: StreamError) -> LogReadError {
    LogReadError::Away(error.to_string().into())
}
