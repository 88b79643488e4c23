//! A record as a message of the stream, and back. The subject holds the datasource and the topic, the
//! payload is the payload, and headers hold the rest, so that any NATS client can use it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use headgate_bridge_nats::stream::{OutgoingMessage, StoredMessage};
use headgate_bridge_nats::{HeaderMap, HeaderName};

use crate::log::{OnceId, Section};
use crate::message::{DatasourceId, KeyId, Lease, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::subject::{SubjectError, SubjectSpace, topic_from_tokens};
use crate::time::{Rfc3339, parse_time};

const JETSTREAM_MSG_ID_HEADER: HeaderName = HeaderName::from_static("Nats-Msg-Id");
const JETSTREAM_CONTENT_TYPE_HEADER: HeaderName = HeaderName::from_static("Content-Type");
const JETSTREAM_KEY_ID_HEADER: HeaderName = HeaderName::from_static("Headgate-Key-Id");
const JETSTREAM_RECEIVED_AT_HEADER: HeaderName = HeaderName::from_static("Headgate-Received-At");
const JETSTREAM_TRANSPORT_HEADER: HeaderName = HeaderName::from_static("Headgate-Transport");
const JETSTREAM_PUBLISHER_HEADER: HeaderName = HeaderName::from_static("Headgate-Publisher");
const JETSTREAM_FLAGS_HEADER: HeaderName = HeaderName::from_static("Headgate-Flags");
const JETSTREAM_PROPERTIES_HEADER: HeaderName = HeaderName::from_static("Headgate-Properties");
const JETSTREAM_NOTE_HEADER: HeaderName = HeaderName::from_static("Headgate-Note");
/// On the first of several messages that share one id: how many they are.
const JETSTREAM_TOGETHER_HEADER: HeaderName = HeaderName::from_static("Headgate-Together");

/// The largest size of all headers except properties and note, in bytes.
pub(super) const JETSTREAM_HEADERS_BYTES_MAX: usize = 1024;

/// The headers of every message of a record.
pub fn headers_of_record(record: &RecordRef<'_>) -> HeaderMap {
    let mut headers = origin(record.key_id, record.received_at, record.transport, record.publisher);
    add_own(record, &mut headers);
    headers
}

/// The headers that all records of a section share. They are made once per section, because formatting a
/// time and inserting headers is the largest cost of a message here.
pub(super) fn headers_of_section(section: &Section) -> HeaderMap {
    origin(section.key_id, section.received_at, section.transport, section.publisher)
}

fn origin(key_id: KeyId, received_at: TimeMicros, transport: Transport, publisher: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(JETSTREAM_KEY_ID_HEADER, key_id.to_string());
    headers.insert(JETSTREAM_RECEIVED_AT_HEADER, Rfc3339(received_at).to_string());
    headers.insert(JETSTREAM_TRANSPORT_HEADER, transport.as_str());
    if publisher != 0 {
        headers.insert(JETSTREAM_PUBLISHER_HEADER, format!("{publisher:016x}"));
    }
    headers
}

/// Adds the headers that belong to a single record.
fn add_own(record: &RecordRef<'_>, headers: &mut HeaderMap) {
    if !record.content_type.is_empty() {
        headers.insert(JETSTREAM_CONTENT_TYPE_HEADER, record.content_type);
    }
    if record.flags.0 != 0 {
        headers.insert(JETSTREAM_FLAGS_HEADER, record.flags.0.to_string());
    }
    for (name, bytes) in
        [(JETSTREAM_PROPERTIES_HEADER, record.properties), (JETSTREAM_NOTE_HEADER, record.note)]
    {
        if !bytes.is_empty() {
            headers.insert(name, STANDARD.encode(bytes));
        }
    }
}

/// Encodes a record as a message. `headers` are its section's ([`headers_of_section`]), `id` is its id in
/// the stream, and `count_together`, on the first message only, says how many share the id.
///
/// # Errors
/// [`SubjectError`] for a topic that is not a subject.
pub(super) fn encode_message(
    record: &RecordRef<'_>,
    headers: &HeaderMap,
    id: Option<String>,
    together: Option<u32>,
) -> Result<OutgoingMessage, SubjectError> {
    let space = match record.flags.contains(RecordFlags::QUARANTINED) {
        true => SubjectSpace::Quarantine,
        false => SubjectSpace::Stream,
    };
    let mut subject = String::with_capacity(16 + record.datasource.len() + record.topic.len());
    space.write_subject(record.datasource, record.topic, &mut subject)?;
    let mut headers = headers.clone();
    add_own(record, &mut headers);
    if let Some(id) = id {
        headers.insert(JETSTREAM_MSG_ID_HEADER, id);
    }
    if let Some(together) = together {
        headers.insert(JETSTREAM_TOGETHER_HEADER, together.to_string());
    }
    Ok(OutgoingMessage { subject, headers, payload: Bytes::copy_from_slice(record.payload) })
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
    text(&message.headers, JETSTREAM_TOGETHER_HEADER).and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// The last parsed time: neighbouring messages usually have the same time, and parsing one is
/// expensive.
#[derive(Debug, Default)]
pub(super) struct ParsedTimeCache {
    text: String,
    time: TimeMicros,
}

impl ParsedTimeCache {
    fn read(&mut self, text: &str) -> Option<TimeMicros> {
        if self.text != text {
            self.time = parse_time(text)?;
            text.clone_into(&mut self.text);
        }
        Some(self.time)
    }
}

/// Decodes a message into a record and adds it to `sections`: to the last one if it has the same origin.
/// `false` if no gateway wrote the message.
pub(super) fn decode_message(
    message: &StoredMessage,
    last_time: &mut ParsedTimeCache,
    sections: &mut Vec<Section>,
) -> bool {
    take(message, last_time, sections).is_some()
}

fn take(message: &StoredMessage, last_time: &mut ParsedTimeCache, sections: &mut Vec<Section>) -> Option<()> {
    let headers = &message.headers;
    let flags = RecordFlags(text(headers, JETSTREAM_FLAGS_HEADER).map_or(Some(0), |text| text.parse().ok())?);
    let space = match flags.contains(RecordFlags::QUARANTINED) {
        true => SubjectSpace::Quarantine,
        false => SubjectSpace::Stream,
    };
    let (datasource, tokens) = space.split(message.subject.as_str()).ok()?;
    let topic = topic_from_tokens(tokens).ok()?;
    let key_id = KeyId::parse(text(headers, JETSTREAM_KEY_ID_HEADER)?).ok()?;
    let received_at = last_time.read(text(headers, JETSTREAM_RECEIVED_AT_HEADER)?)?;
    let transport = Transport::parse(text(headers, JETSTREAM_TRANSPORT_HEADER)?)?;
    let publisher = text(headers, JETSTREAM_PUBLISHER_HEADER)
        .map_or(Some(0), |text| u64::from_str_radix(text, 16).ok())?;
    let bytes = |name| text(headers, name).map_or(Some(Vec::new()), |text| STANDARD.decode(text).ok());
    let (properties, note) = (bytes(JETSTREAM_PROPERTIES_HEADER)?, bytes(JETSTREAM_NOTE_HEADER)?);
    if note.is_empty() == flags.has_note() {
        return None;
    }
    let content_type = text(headers, JETSTREAM_CONTENT_TYPE_HEADER).unwrap_or_default();
    let same = |section: &Section| {
        section.received_at == received_at
            && section.key_id == key_id
            && section.publisher == publisher
            && section.transport == transport
            && section.datasource.as_str() == datasource
    };
    let section = match sections.last_mut().is_some_and(|last| same(last)) {
        true => sections.last_mut()?,
        false => {
            let datasource = DatasourceId::new(datasource).ok()?;
            // A record in the log was accepted: its lease never ends.
            let lease = Lease::new();
            sections.push(Section::new(datasource, key_id, lease, transport, publisher, received_at));
            sections.last_mut()?
        }
    };
    match flags.has_note() {
        true => section.push_noted(&topic, &message.payload, content_type, &properties, flags, &note),
        false => section.push(&topic, &message.payload, content_type, &properties, flags),
    }
    Some(())
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Batch, RecordNote};

    fn record<'a>(flags: RecordFlags, note: &'a [u8]) -> RecordRef<'a> {
        RecordRef {
            offset: 7,
            datasource: "press-4",
            topic: "v1.2/temp",
            payload: &[0xff, 0, 1],
            content_type: "text/plain; charset=\"utf-8\"",
            properties: &[38, 0, 1, b'a', 0, 1, b'b'],
            key_id: KeyId([0xab; 6]),
            transport: Transport::Http,
            publisher: 0x1234,
            received_at: 1_700_000_000_000_001,
            flags,
            note,
        }
    }

    fn encoded(record: &RecordRef<'_>) -> OutgoingMessage {
        let headers = origin(record.key_id, record.received_at, record.transport, record.publisher);
        encode_message(record, &headers, None, None).expect("crosses")
    }

    fn decoded(message: &StoredMessage, sections: &mut Vec<Section>) -> bool {
        decode_message(message, &mut ParsedTimeCache::default(), sections)
    }

    fn stored(outgoing: OutgoingMessage, sequence: u64) -> StoredMessage {
        let OutgoingMessage { subject, headers, payload } = outgoing;
        StoredMessage { sequence, subject: subject.into(), headers, payload }
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let note = RecordNote::Redriven { offset: 3, received_at: 9 }.encode();
        for (flags, note) in [
            (RecordFlags::default(), &[][..]),
            (RecordFlags::RETAIN.with(RecordFlags::AT_MOST_ONCE), &[]),
            (RecordFlags::QUARANTINED, &note),
            (RecordFlags::REDRIVEN, &note),
        ] {
            let record = record(flags, note);
            let message = stored(encoded(&record), 7);
            let quarantined = flags.contains(RecordFlags::QUARANTINED);
            let subject = if quarantined { "quarantine" } else { "stream" };
            assert_eq!(message.subject.as_str(), format!("{subject}.press-4.v1//2.temp"));
            let mut sections = Vec::new();
            assert!(decoded(&message, &mut sections), "{flags:?}");
            let batch = Batch::gather(7, &sections);
            assert_eq!(batch.records().collect::<Vec<_>>(), [record]);
            assert_eq!(batch.has_retained(), flags.contains(RecordFlags::RETAIN));
        }
    }

    #[test]
    fn records_that_came_in_together_share_a_section() {
        let mut sections = Vec::new();
        let one = record(RecordFlags::default(), &[]);
        for record in [one, one, RecordRef { publisher: 0, ..one }] {
            assert!(decoded(&stored(encoded(&record), 1), &mut sections));
        }
        assert_eq!(sections.iter().map(Section::records).collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn what_no_gateway_has_written_is_no_record() {
        let message = || stored(encoded(&record(RecordFlags::default(), &[])), 1);
        let refused = |change: &dyn Fn(&mut StoredMessage)| {
            let mut message = message();
            change(&mut message);
            !decoded(&message, &mut Vec::new())
        };
        assert!(refused(&|message| message.headers = HeaderMap::new()));
        assert!(refused(&|message| message.headers.insert(JETSTREAM_KEY_ID_HEADER, "no key id")));
        assert!(refused(&|message| message.headers.insert(JETSTREAM_RECEIVED_AT_HEADER, "yesterday")));
        assert!(refused(&|message| message.headers.insert(JETSTREAM_FLAGS_HEADER, "8")));
        assert!(refused(&|message| message.subject = "quarantine.press-4.temp".into()));
        assert!(refused(&|message| message.subject = "stream.PRESS.temp".into()));
        assert!(!refused(&|_| ()));
    }

    #[test]
    fn an_id_says_its_generation_and_its_place() {
        let id = OnceId::of_exchange(7, 1);
        assert_eq!(message_id_of(id, None, 0), "8e1b7787ea734b53a348721263441a88");
        assert_eq!(message_id_of(id, Some(255), 0), "8e1b7787ea734b53a348721263441a88.00000000000000ff");
        assert_eq!(message_id_of(id, None, 3), "8e1b7787ea734b53a348721263441a88-3");
    }
}
