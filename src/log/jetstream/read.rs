//! Reading records that are no longer in memory, by direct gets, which any server of the stream answers.

use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_nats::StreamError;
use tokio::time::sleep;

use super::Shared;
use super::follow::gather;
use crate::log::{Batch, ReadError};
use crate::message::{Offset, TimeMicros};
use crate::time::Rfc3339;

/// The approximate least size of a message: turns a number of bytes into a number of messages to ask for.
const MESSAGE_BYTES_MIN: usize = 128;
/// How many attempts a server that lags behind the others gets, and the pause between them.
const BEHIND: (u32, Duration) = (20, Duration::from_millis(100));
/// How far the clocks of a gateway and the servers may differ when a time is looked up.
const CLOCKS_DIFFER_MICROS: i64 = 10_000_000;

/// Reads from an offset below the end of the tail.
pub(super) async fn read(
    shared: Arc<Shared>,
    from: Offset,
    bytes_max: usize,
) -> Result<Vec<Batch>, ReadError> {
    let end = shared.tail.next_offset();
    let messages_max = (bytes_max / MESSAGE_BYTES_MIN).max(1);
    for _ in 0..BEHIND.0 {
        let mut messages = shared.stream.get(from, messages_max, bytes_max).await.map_err(away)?;
        messages.retain(|message| message.sequence < end);
        match messages.first() {
            Some(first) if first.sequence == from => return Ok(gather(&messages, from, &shared)),
            found => {
                let state = shared.stream.state().await.map_err(away)?;
                shared.note_state(&state);
                if state.first > from.max(1) {
                    return Err(ReadError::Removed { wanted: from, first: state.first });
                }
                if found.is_some() {
                    return Ok(gather(&messages, from, &shared));
                }
                if state.messages == 0 || state.first >= end {
                    return Ok(vec![Batch::nothing_below(end)]);
                }
            }
        }
        sleep(BEHIND.1).await;
    }
    Err(ReadError::Away(format!("no server of stream {} has {from} yet", shared.stream.name()).into()))
}

/// An offset before which no record was received at or after a time. JetStream only knows when it stored a
/// message, which is a little later.
pub(super) async fn offset_at(shared: Arc<Shared>, time: TimeMicros) -> Result<Offset, ReadError> {
    let time = Rfc3339(time.saturating_sub(CLOCKS_DIFFER_MICROS)).to_string();
    let found = shared.stream.sequence_at(&time).await.map_err(away)?;
    let end = shared.tail.next_offset();
    Ok(found.map_or(end, |sequence| sequence.min(end)))
}

fn away(error: StreamError) -> ReadError {
    ReadError::Away(error.to_string().into())
}
