//! What the log of a cluster adds to the message of a record ([`nats_message`](crate::log::nats_message)): an
//! id, so that JetStream stores it once, and how many messages share that id.

use headgate_bridge_nats::HeaderMap;
use headgate_bridge_nats::stream::{OutgoingMessage, StoredMessage};

use crate::log::OnceId;
use crate::log::nats_message::{NATS_MESSAGE_ID_HEADER, RECORD_TOGETHER_HEADER, encode_record, header_text};
use crate::message::RecordRef;
use crate::subject::SubjectError;

/// Encodes a record as a message. `headers` are its section's, `id` is its id in the stream, and `together`, on
/// the first message only, says how many share the id.
///
/// # Errors
/// [`SubjectError`] for a topic that is not a subject.
pub(super) fn encode_message(
    record: &RecordRef<'_>,
    headers: &HeaderMap,
    id: Option<String>,
    together: Option<u32>,
) -> Result<OutgoingMessage, SubjectError> {
    let mut message = encode_record(record, headers.clone())?;
    if let Some(id) = id {
        message.headers.insert(NATS_MESSAGE_ID_HEADER, id);
    }
    if let Some(together) = together {
        message.headers.insert(RECORD_TOGETHER_HEADER, together.to_string());
    }
    Ok(message)
}

/// The id of a message in the stream: its section's id and, unless it is the first, its place there.
pub(super) fn message_id_of(once: OnceId, generation: Option<u64>, nth: u32) -> String {
    use std::fmt::Write;
    let mut id = String::with_capacity(64);
    for byte in once.as_bytes() {
        // Writing to a string does not fail.
        let _ = write!(id, "{byte:02x}");
    }
    if let Some(generation) = generation {
        let _ = write!(id, ".{generation:016x}");
    }
    if nth > 0 {
        let _ = write!(id, "-{nth}");
    }
    id
}

/// How many messages share the id of this one.
pub(super) fn count_together(message: &StoredMessage) -> u32 {
    header_text(&message.headers, RECORD_TOGETHER_HEADER).and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_says_its_generation_and_its_place() {
        let id = OnceId::of_exchange(7, 1);
        assert_eq!(message_id_of(id, None, 0), "8e1b7787ea734b53a348721263441a88");
        assert_eq!(message_id_of(id, Some(255), 0), "8e1b7787ea734b53a348721263441a88.00000000000000ff");
        assert_eq!(message_id_of(id, None, 3), "8e1b7787ea734b53a348721263441a88-3");
    }
}
