//! What a stream consists of, in either form. As server-sent events, a record is an event without a name, and what the
//! gateway says itself has one: `heartbeat`, `skipped`, `end`. As NDJSON, a record is an object with `offset`, and the
//! others are objects with their name as the only member.

use std::io::Write;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::ID_BEFORE_ALL;
use super::reader::StreamEnd;
use crate::consume::render::log_record_json;
use crate::message::{Offset, RecordRef};

/// How long a browser waits before it connects again, in milliseconds.
const STREAM_RETRY_MS: u64 = 1_000;

/// How a stream is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamForm {
    /// Server-sent events.
    Events,
    /// JSON, a line each.
    Lines,
}

impl StreamForm {
    /// Its media type.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            StreamForm::Events => "text/event-stream",
            StreamForm::Lines => "application/x-ndjson",
        }
    }

    /// Writes what a stream begins with.
    pub(super) fn write_head(self, out: &mut Vec<u8>) {
        if self == StreamForm::Events {
            put(out, format_args!("retry: {STREAM_RETRY_MS}\n\n"));
        }
    }

    /// Writes a record.
    pub(super) fn write_record(self, out: &mut Vec<u8>, record: &RecordRef<'_>) {
        if self == StreamForm::Events {
            put(out, format_args!("id: {}\ndata: ", record.offset));
        }
        write_json(out, &log_record_json(record));
        self.end_item(out);
    }

    /// Writes a heartbeat: everything below `next` has been sent that passes the filter, the log ends at `log_end`, and
    /// another one comes after `interval`.
    pub(super) fn write_heartbeat(
        self,
        out: &mut Vec<u8>,
        next: Offset,
        log_end: Offset,
        interval: Duration,
    ) {
        let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        let log_end = log_end.max(next);
        let words = json!({ "next_offset": next, "log_end": log_end, "interval_ms": interval_ms });
        self.write_named(out, "heartbeat", Some(next), &words);
    }

    /// Says that retention has removed records before they were sent, and where the stream goes on.
    pub(super) fn write_skipped(self, out: &mut Vec<u8>, records: u64, next: Offset) {
        self.write_named(out, "skipped", Some(next), &json!({ "records": records, "next_offset": next }));
    }

    /// Says why the stream ends here.
    pub(super) fn write_end(self, out: &mut Vec<u8>, why: StreamEnd, next: Offset) {
        let words = json!({ "reason": why.name(), "detail": why.words(), "next_offset": next });
        self.write_named(out, "end", None, &words);
    }

    fn write_named(self, out: &mut Vec<u8>, name: &str, next: Option<Offset>, words: &impl Serialize) {
        match self {
            StreamForm::Events => {
                put(out, format_args!("event: {name}\n"));
                match next.map(|next| next.checked_sub(1)) {
                    Some(Some(last)) => put(out, format_args!("id: {last}\n")),
                    Some(None) => put(out, format_args!("id: {ID_BEFORE_ALL}\n")),
                    None => {}
                }
                put(out, format_args!("data: "));
                write_json(out, words);
            }
            StreamForm::Lines => {
                put(out, format_args!("{{\"{name}\":"));
                write_json(out, words);
                out.push(b'}');
            }
        }
        self.end_item(out);
    }

    fn end_item(self, out: &mut Vec<u8>) {
        out.extend_from_slice(match self {
            StreamForm::Events => b"\n\n",
            StreamForm::Lines => b"\n",
        });
    }
}

/// What a record takes at most, written in either form.
pub(super) fn record_bytes_max(record: &RecordRef<'_>) -> usize {
    const BESIDE_BYTES: usize = 256;
    const COUNTED_BYTES_MIN: usize = 1_024;
    // An escape takes 6 bytes. In a large payload they are counted; of bytes that are not text, 3 become 4.
    let payload = record.payload.len();
    let escapes = match payload {
        ..COUNTED_BYTES_MIN => payload,
        _ => record.payload.iter().filter(|&&b| b < b' ' || b == b'"' || b == b'\\').count(),
    };
    BESIDE_BYTES
        + 6 * (record.topic.len() + record.content_type.len())
        + payload
        + (5 * escapes).max(payload / 2)
}

fn put(out: &mut Vec<u8>, words: std::fmt::Arguments<'_>) {
    out.write_fmt(words).expect("a Vec takes all");
}

fn write_json(out: &mut Vec<u8>, value: &impl Serialize) {
    if let Err(error) = serde_json::to_writer(out, value) {
        // Into memory, of values that have a JSON form.
        tracing::error!(%error, "a part of a stream has no JSON form");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::message::{KeyId, RecordFlags, Transport};

    fn record<'a>(topic: &'a str, payload: &'a [u8]) -> RecordRef<'a> {
        RecordRef {
            offset: 41,
            datasource: "press-4",
            topic,
            payload,
            content_type: "text/x\u{1}",
            properties: b"",
            key_id: KeyId([1; 6]),
            transport: Transport::Mqtt,
            publisher: 0,
            received_at: 0,
            event_at: None,
            flags: RecordFlags::default(),
            note: b"",
        }
    }

    #[test]
    fn every_record_is_one_event_and_one_line_whatever_its_payload_holds() {
        let long: Vec<u8> = (0..5_000_u32).map(|n| [0, b'\n', b'"', 200][n as usize % 4]).collect();
        let zeros = vec![0; 5_000];
        for payload in [
            &b"{\"a\":1,\r\n\"b\":\n2}"[..],
            b"two\nlines\r\nand\ranother",
            b"id: 7\n\ndata: 8\n\n",
            b"\x00",
            b"\xff\xfe",
            b"",
            "\u{2028}".as_bytes(),
            &long,
            &zeros,
        ] {
            let of = record("a\u{7}/b", payload);
            let (mut event, mut line) = (Vec::new(), Vec::new());
            StreamForm::Events.write_record(&mut event, &of);
            StreamForm::Lines.write_record(&mut line, &of);
            assert!(event.len() <= record_bytes_max(&of), "{} of {payload:?}", event.len());
            let event = String::from_utf8(event).expect("text");
            let data = event.strip_prefix("id: 41\ndata: ").expect(&event);
            let data = data.strip_suffix("\n\n").expect("a blank line ends it");
            assert!(!data.contains(['\n', '\r']), "{data}");
            assert_eq!(line, format!("{data}\n").as_bytes());
            let json: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!((&json["offset"], &json["topic"]), (&41.into(), &"a\u{7}/b".into()));
        }
    }

    #[test]
    fn what_the_gateway_says_itself_has_a_name_and_goes_on_where_records_do() {
        let written = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            write(&mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(
            written(&|out| StreamForm::Events.write_heartbeat(out, 7, 9, Duration::from_secs(1))),
            "event: heartbeat\nid: 6\ndata: {\"interval_ms\":1000,\"log_end\":9,\"next_offset\":7}\n\n"
        );
        assert_eq!(
            written(&|out| StreamForm::Events.write_heartbeat(out, 0, 0, Duration::ZERO)),
            "event: heartbeat\nid: start\ndata: {\"interval_ms\":0,\"log_end\":0,\"next_offset\":0}\n\n"
        );
        assert_eq!(
            written(&|out| StreamForm::Lines.write_skipped(out, 3, 7)),
            "{\"skipped\":{\"next_offset\":7,\"records\":3}}\n"
        );
        let end = written(&|out| StreamForm::Events.write_end(out, StreamEnd::KeyDead, 7));
        assert!(end.starts_with("event: end\ndata: {") && end.contains("\"reason\":\"key_dead\""), "{end}");
    }
}
