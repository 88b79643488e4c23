//! What egress adds to the message of a record ([`nats_message`](crate::log::nats_message)): where in which
//! log the record is, so that egress finds its place in the stream again, and how many records are missing
//! before it.

use std::fmt::Write;

use headgate_bridge_nats::HeaderName;
use headgate_bridge_nats::stream::{OutgoingMessage, StoredMessage};

use crate::log::nats_message::{
    NATS_MESSAGE_ID_HEADER, RECORD_KEY_ID_HEADER, RECORD_OFFSET_HEADER, RECORD_RECEIVED_AT_HEADER,
    RECORD_SKIPPED_HEADER, encode_record, header_text, origin_headers,
};
use crate::message::{Offset, RecordRef};
use crate::subject::SubjectError;

/// The message for a record. `log` is the id of the log; `skipped` is how many records right before this
/// one were removed from the log unsent.
///
/// # Errors
/// [`SubjectError`] for a record whose topic is no valid subject.
pub(super) fn message_of_record(
    record: &RecordRef<'_>,
    log: &str,
    skipped: u64,
) -> Result<OutgoingMessage, SubjectError> {
    let headers = origin_headers(record.key_id, record.received_at, record.transport, record.publisher);
    let mut message = encode_record(record, headers)?;
    message.headers.insert(NATS_MESSAGE_ID_HEADER, message_id(log, record.offset));
    message.headers.insert(RECORD_OFFSET_HEADER, record.offset.to_string());
    if skipped > 0 {
        message.headers.insert(RECORD_SKIPPED_HEADER, skipped.to_string());
    }
    Ok(message)
}

fn message_id(log: &str, offset: Offset) -> String {
    let mut id = String::with_capacity(log.len() + 21);
    // Writing to a string does not fail.
    let _ = write!(id, "{log}-{offset}");
    id
}

/// The offset of the record in a message, if the message came from this log.
pub(super) fn record_offset_of(message: &StoredMessage, log: &str) -> Option<Offset> {
    let offset = header_text(&message.headers, RECORD_OFFSET_HEADER)?.parse().ok()?;
    let id = header_text(&message.headers, NATS_MESSAGE_ID_HEADER)?;
    (id == message_id(log, offset)).then_some(offset)
}

/// Whether `message` is the message for this record, whatever it says was skipped.
pub(super) fn is_message_of_record(message: &StoredMessage, record: &RecordRef<'_>, log: &str) -> bool {
    message_of_record(record, log, 0).is_ok_and(|expected| {
        let same = |name: HeaderName| message.headers.get(name.clone()) == expected.headers.get(name);
        message.subject.as_str() == expected.subject
            && message.payload == expected.payload
            && [NATS_MESSAGE_ID_HEADER, RECORD_KEY_ID_HEADER, RECORD_RECEIVED_AT_HEADER].into_iter().all(same)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{KeyId, RecordFlags, Transport};

    fn record<'a>(topic: &'a str, properties: &'a [u8]) -> RecordRef<'a> {
        RecordRef {
            offset: 41,
            datasource: "press-4",
            topic,
            payload: b"21.5",
            content_type: "text/plain",
            properties,
            key_id: KeyId([0xab; 6]),
            transport: Transport::Http,
            publisher: 7,
            received_at: 1_700_000_000_000_001,
            event_at: None,
            flags: RecordFlags::RETAIN,
            note: &[],
        }
    }

    #[test]
    fn a_record_says_where_it_was_and_who_let_it_in() {
        let message = message_of_record(&record("v1.2/temp", &[38, 0]), "log", 3).expect("crosses");
        assert_eq!(message.subject, "stream.press-4.v1//2.temp");
        for (name, value) in [
            ("Nats-Msg-Id", "log-41"),
            ("Content-Type", "text/plain"),
            ("Headgate-Offset", "41"),
            ("Headgate-Key-Id", "abababababab"),
            ("Headgate-Received-At", "2023-11-14T22:13:20.000001Z"),
            ("Headgate-Transport", "http"),
            ("Headgate-Publisher", "0000000000000007"),
            ("Headgate-Flags", "1"),
            ("Headgate-Properties", "JgA="),
            ("Headgate-Skipped", "3"),
        ] {
            assert_eq!(message.headers.get(name).map(|value| value.as_str()), Some(value), "{name}");
        }
        assert_eq!(message.headers.len(), 10);
    }

    #[test]
    fn a_message_is_known_again_as_its_record_and_no_other() {
        let one = record("t", &[]);
        let OutgoingMessage { subject, headers, payload } =
            message_of_record(&one, "log", 3).expect("crosses");
        let message = StoredMessage { sequence: 1, subject: subject.into(), headers, payload };
        assert_eq!(record_offset_of(&message, "log"), Some(41));
        assert_eq!(record_offset_of(&message, "other"), None, "another log's");
        assert!(is_message_of_record(&message, &one, "log"));
        assert!(!is_message_of_record(&message, &RecordRef { payload: b"21.6", ..one }, "log"));
        assert!(!is_message_of_record(&message, &RecordRef { received_at: 1, ..one }, "log"));
    }

    #[test]
    fn a_topic_that_is_no_subject_has_no_message() {
        assert!(message_of_record(&record("a b", &[]), "log", 0).is_err());
    }
}
