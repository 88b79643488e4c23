//! What the log of a cluster adds to the message of a record ([`nats_message`](crate::log::nats_message)): an
//! id, so that JetStream stores it once, how many messages share that id, and a digest of them.

use headgate_bridge_nats::HeaderMap;
use headgate_bridge_nats::stream::{OutgoingMessage, StoredMessage};

use crate::log::OnceId;
use crate::log::nats_message::{
    NATS_EXPECTED_LAST_MESSAGE_ID_HEADER, NATS_EXPECTED_LAST_SEQUENCE_HEADER, NATS_MESSAGE_ID_HEADER,
    RECORD_DIGEST_HEADER, RECORD_TOGETHER_HEADER, encode_record, header_text,
};
use crate::log::once::ContentDigest;
use crate::message::RecordRef;
use crate::subject::SubjectError;

/// An id that no message of the stream has: they are hex.
const NO_MESSAGE_ID: &str = "?";
/// A sequence that no stream reaches.
const NO_SEQUENCE: &str = "9223372036854775807";

/// What the first of the messages that share an id says of all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SharedIdContent {
    pub(super) records: u32,
    /// `None` in what an older Headgate has written.
    pub(super) digest: Option<ContentDigest>,
}

impl SharedIdContent {
    /// What a stored message says.
    pub(super) fn read(message: &StoredMessage) -> Self {
        let text = |name| header_text(&message.headers, name);
        Self {
            records: text(RECORD_TOGETHER_HEADER).and_then(|text| text.parse().ok()).unwrap_or(1),
            digest: text(RECORD_DIGEST_HEADER).and_then(ContentDigest::from_hex),
        }
    }

    /// Whether the two are the same messages, as far as can be told.
    pub(super) fn is_same(self, other: Self) -> bool {
        let unknown = self.digest.is_none() || other.digest.is_none();
        self.records == other.records && (unknown || self.digest == other.digest)
    }
}

/// Encodes a record as a message. `headers` are its section's, `id` is its id in the stream, and `content`, on
/// the first message with an id only, is what all of them are.
///
/// # Errors
/// [`SubjectError`] for a topic that is not a subject.
pub(super) fn encode_message(
    record: &RecordRef<'_>,
    headers: &HeaderMap,
    id: Option<String>,
    content: Option<SharedIdContent>,
) -> Result<OutgoingMessage, SubjectError> {
    let mut message = encode_record(record, headers.clone())?;
    if let Some(id) = id {
        message.headers.insert(NATS_MESSAGE_ID_HEADER, id);
    }
    if let Some(SharedIdContent { records, digest }) = content {
        if records > 1 {
            message.headers.insert(RECORD_TOGETHER_HEADER, records.to_string());
        }
        if let Some(digest) = digest {
            message.headers.insert(RECORD_DIGEST_HEADER, digest.to_hex());
        }
    }
    Ok(message)
}

/// Encodes the question whether the stream knows an id: a message that JetStream never stores. It answers with the
/// place of the one that has the id, which it looks for first, or refuses it.
///
/// What it looks for first depends on the replicas (nats-server 2.15.1, tried): with one, it checks the last sequence
/// before the id; with several, a second question with an unknown last id is never answered, and nothing after
/// it. A server that checks in another order refuses every question, and then what is refused is refused.
///
/// # Errors
/// [`SubjectError`] for a topic that is not a subject.
pub(super) fn encode_question(
    record: &RecordRef<'_>,
    id: String,
    is_replicated: bool,
) -> Result<OutgoingMessage, SubjectError> {
    let bare = RecordRef { payload: &[], content_type: "", properties: &[], note: &[], ..*record };
    let mut message = encode_record(&bare, HeaderMap::new())?;
    message.headers.insert(NATS_MESSAGE_ID_HEADER, id);
    match is_replicated {
        true => message.headers.insert(NATS_EXPECTED_LAST_SEQUENCE_HEADER, NO_SEQUENCE),
        false => message.headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID_HEADER, NO_MESSAGE_ID),
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
