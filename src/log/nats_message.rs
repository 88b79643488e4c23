//! A record as a NATS message, and back: in the stream that is the log of a cluster, and in the stream that
//! egress fills. The subject holds the datasource and the topic ([`crate::subject`]), the payload is the
//! payload, and headers hold the rest, so that any NATS client can use it. Each stream adds headers of its
//! own, which have their names here too.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use headgate_bridge_nats::stream::{OutgoingMessage, StoredMessage};
use headgate_bridge_nats::{HeaderMap, HeaderName};

use super::{FencedMessage, RecordBody, Section};
use crate::message::{DatasourceId, KeyId, Lease, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::subject::{SubjectError, SubjectSpace, topic_from_tokens};
use crate::time::{Rfc3339, parse_time};

/// The id of a message: JetStream stores no second one with the same id.
pub const NATS_MESSAGE_ID_HEADER: HeaderName = HeaderName::from_static("Nats-Msg-Id");
/// The media type of the payload.
pub const NATS_CONTENT_TYPE_HEADER: HeaderName = HeaderName::from_static("Content-Type");
/// The id of the key that let the record in.
pub const RECORD_KEY_ID_HEADER: HeaderName = HeaderName::from_static("Headgate-Key-Id");
/// When it was received (RFC 3339).
pub const RECORD_RECEIVED_AT_HEADER: HeaderName = HeaderName::from_static("Headgate-Received-At");
/// When it was measured, if its sender has said so (RFC 3339).
pub const RECORD_EVENT_AT_HEADER: HeaderName = HeaderName::from_static("Headgate-Event-At");
const RECORD_TRANSPORT_HEADER: HeaderName = HeaderName::from_static("Headgate-Transport");
const RECORD_PUBLISHER_HEADER: HeaderName = HeaderName::from_static("Headgate-Publisher");
const RECORD_FLAGS_HEADER: HeaderName = HeaderName::from_static("Headgate-Flags");
const RECORD_PROPERTIES_HEADER: HeaderName = HeaderName::from_static("Headgate-Properties");
const RECORD_NOTE_HEADER: HeaderName = HeaderName::from_static("Headgate-Note");
/// In the log of a cluster, on the first of several messages that share one id: how many they are.
pub(super) const RECORD_TOGETHER_HEADER: HeaderName = HeaderName::from_static("Headgate-Together");
/// In the log of a cluster, on the first message with an id: the digest of all that share the id.
pub(super) const RECORD_DIGEST_HEADER: HeaderName = HeaderName::from_static("Headgate-Digest");
/// JetStream stores a message with this header only behind the message with that sequence.
pub const NATS_EXPECTED_LAST_SEQUENCE_HEADER: HeaderName =
    HeaderName::from_static("Nats-Expected-Last-Sequence");
/// JetStream stores a message with this header only behind one with that id.
pub(super) const NATS_EXPECTED_LAST_MESSAGE_ID_HEADER: HeaderName =
    HeaderName::from_static("Nats-Expected-Last-Msg-Id");
/// In the log of a cluster, on a record that was published again from a gateway's copy: the epoch that had ended, and the
/// offset that it had there.
pub const RECORD_RESTORED_HEADER: HeaderName = HeaderName::from_static("Headgate-Restored");
/// In the stream of egress: the record's offset in the log. In the log of a cluster it is the sequence.
pub const RECORD_OFFSET_HEADER: HeaderName = HeaderName::from_static("Headgate-Offset");
/// In the stream of egress: how many records right before this one were removed from the log unsent.
pub const RECORD_SKIPPED_HEADER: HeaderName = HeaderName::from_static("Headgate-Skipped");

/// The largest size of all headers except properties and note, in bytes.
pub(super) const RECORD_HEADERS_BYTES_MAX: usize = 1024;

/// The headers that all records of one origin share. The log of a cluster makes them once for each section,
/// because formatting a time and inserting headers is the largest cost of a message there.
pub fn origin_headers(
    key_id: KeyId,
    received_at: TimeMicros,
    transport: Transport,
    publisher: u64,
) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(RECORD_KEY_ID_HEADER, key_id.to_string());
    headers.insert(RECORD_RECEIVED_AT_HEADER, Rfc3339(received_at).to_string());
    headers.insert(RECORD_TRANSPORT_HEADER, transport.as_str());
    if publisher != 0 {
        headers.insert(RECORD_PUBLISHER_HEADER, format!("{publisher:016x}"));
    }
    headers
}

/// Encodes a record. `headers` are those of its origin ([`origin_headers`]).
///
/// # Errors
/// [`SubjectError`] for a topic that is not a subject.
pub fn encode_record(
    record: &RecordRef<'_>,
    mut headers: HeaderMap,
) -> Result<OutgoingMessage, SubjectError> {
    let mut subject = String::with_capacity(16 + record.datasource.len() + record.topic.len());
    record_space(record.flags).write_subject(record.datasource, record.topic, &mut subject)?;
    if !record.content_type.is_empty() {
        headers.insert(NATS_CONTENT_TYPE_HEADER, record.content_type);
    }
    if let Some(event_at) = record.event_at {
        headers.insert(RECORD_EVENT_AT_HEADER, Rfc3339(event_at).to_string());
    }
    if record.flags.0 != 0 {
        headers.insert(RECORD_FLAGS_HEADER, record.flags.0.to_string());
    }
    for (name, bytes) in [(RECORD_PROPERTIES_HEADER, record.properties), (RECORD_NOTE_HEADER, record.note)] {
        if !bytes.is_empty() {
            headers.insert(name, STANDARD.encode(bytes));
        }
    }
    Ok(OutgoingMessage { subject, headers, payload: Bytes::copy_from_slice(record.payload) })
}

fn record_space(flags: RecordFlags) -> SubjectSpace {
    match flags.contains(RecordFlags::QUARANTINED) {
        true => SubjectSpace::Quarantine,
        false => SubjectSpace::Stream,
    }
}

/// The text of a header, if the message has it.
pub fn header_text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.as_str())
}

/// Whether a record was sent again, or marked, by an admin: it did not come in under the key that it names.
pub(super) fn is_redriven(headers: &HeaderMap) -> bool {
    let flags = header_text(headers, RECORD_FLAGS_HEADER).and_then(|text| text.parse().ok());
    flags.is_some_and(|flags| RecordFlags(flags).contains(RecordFlags::REDRIVEN))
}

/// What a message says of where it came from; `None` if no gateway wrote it.
pub(super) fn message_origin(message: &StoredMessage) -> Option<FencedMessage<'_>> {
    let text = |name| header_text(&message.headers, name);
    let (_, rest) = message.subject.as_str().split_once('.')?;
    Some(FencedMessage {
        datasource: rest.split_once('.')?.0,
        key_id: KeyId::parse(text(RECORD_KEY_ID_HEADER)?).ok()?,
        transport: Transport::parse(text(RECORD_TRANSPORT_HEADER)?)?,
        received_at: parse_time(text(RECORD_RECEIVED_AT_HEADER)?)?,
    })
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
pub(super) fn decode_record(
    message: &StoredMessage,
    last_time: &mut ParsedTimeCache,
    sections: &mut Vec<Section>,
) -> bool {
    add_decoded(message, last_time, sections).is_some()
}

fn add_decoded(
    message: &StoredMessage,
    last_time: &mut ParsedTimeCache,
    sections: &mut Vec<Section>,
) -> Option<()> {
    let headers = &message.headers;
    let flags =
        RecordFlags(header_text(headers, RECORD_FLAGS_HEADER).map_or(Some(0), |text| text.parse().ok())?);
    let (datasource, tokens) = record_space(flags).split(message.subject.as_str()).ok()?;
    let topic = topic_from_tokens(tokens).ok()?;
    let key_id = KeyId::parse(header_text(headers, RECORD_KEY_ID_HEADER)?).ok()?;
    let received_at = last_time.read(header_text(headers, RECORD_RECEIVED_AT_HEADER)?)?;
    let transport = Transport::parse(header_text(headers, RECORD_TRANSPORT_HEADER)?)?;
    let publisher = header_text(headers, RECORD_PUBLISHER_HEADER)
        .map_or(Some(0), |text| u64::from_str_radix(text, 16).ok())?;
    let bytes = |name| header_text(headers, name).map_or(Some(Vec::new()), |text| STANDARD.decode(text).ok());
    let (properties, note) = (bytes(RECORD_PROPERTIES_HEADER)?, bytes(RECORD_NOTE_HEADER)?);
    if note.is_empty() == flags.has_note() {
        return None;
    }
    let content_type = header_text(headers, NATS_CONTENT_TYPE_HEADER).unwrap_or_default();
    let event_at = match header_text(headers, RECORD_EVENT_AT_HEADER) {
        Some(text) => Some(parse_time(text)?),
        None => None,
    };
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
    let (payload, properties, note) = (&*message.payload, &*properties, &*note);
    section.push_body(&RecordBody {
        flags,
        topic: &topic,
        content_type,
        properties,
        payload,
        event_at,
        note,
    });
    Some(())
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
            event_at: flags.contains(RecordFlags::RETAIN).then_some(-1),
            flags,
            note,
        }
    }

    fn encoded(record: &RecordRef<'_>) -> OutgoingMessage {
        let headers = origin_headers(record.key_id, record.received_at, record.transport, record.publisher);
        encode_record(record, headers).expect("crosses")
    }

    fn decoded(message: &StoredMessage, sections: &mut Vec<Section>) -> bool {
        decode_record(message, &mut ParsedTimeCache::default(), sections)
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
        assert!(refused(&|message| message.headers.insert(RECORD_KEY_ID_HEADER, "no key id")));
        assert!(refused(&|message| message.headers.insert(RECORD_RECEIVED_AT_HEADER, "yesterday")));
        assert!(refused(&|message| message.headers.insert(RECORD_FLAGS_HEADER, "8")));
        assert!(refused(&|message| message.subject = "quarantine.press-4.temp".into()));
        assert!(refused(&|message| message.subject = "stream.PRESS.temp".into()));
        assert!(!refused(&|_| ()));
    }
}
