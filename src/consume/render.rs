//! The outward form of stored data: payloads as JSON where they are JSON, times as RFC 3339. It is
//! defined once, so that a record looks the same wherever it is shown.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::consume::query::StoredRecord;
use crate::message::{Offset, RecordRef, TimeMicros, Transport};
pub use crate::time::{Rfc3339, parse_time};

/// How deep a payload may nest and still be shown as JSON. `serde_json` reads 128 levels and few parsers
/// read more; a page adds a few levels around the payload.
const PAYLOAD_JSON_DEPTH_MAX: usize = 100;

/// The text of [`Rfc3339`].
pub fn rfc3339_text(at: TimeMicros) -> String {
    Rfc3339(at).to_string()
}

/// `text` without the white space around it, if it is JSON that every parser can read: nested at most
/// 100 levels, numbers within `f64`, strings of valid Unicode. One payload that some parsers reject
/// would make the whole page unreadable for them.
pub fn portable_json(text: &str) -> Option<&str> {
    let mut json = serde_json::Deserializer::from_str(text);
    let plain = PortableJsonCheck { depth: 0 }.deserialize(&mut json).and_then(|()| json.end()).is_ok();
    plain.then(|| text.trim_matches([' ', '\t', '\n', '\r']))
}

/// A payload as it is shown: JSON as JSON, other text as a string, other bytes as Base64.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum PayloadJson<'a> {
    /// Valid JSON, digit for digit as it was sent, in one line.
    Json(Cow<'a, RawValue>),
    /// Text that is not JSON.
    Text(&'a str),
    /// What is not text, in Base64.
    Base64(String),
}

impl<'a> PayloadJson<'a> {
    /// The outward form of these bytes.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return PayloadJson::Base64(BASE64.encode(bytes));
        };
        one_line_json(text).map_or(PayloadJson::Text(text), PayloadJson::Json)
    }

    /// The value of `payload_encoding`: `base64`, or none.
    pub fn encoding(&self) -> Option<&'static str> {
        matches!(self, PayloadJson::Base64(_)).then_some("base64")
    }
}

/// Replaces line breaks by blanks: valid JSON has them only between tokens. Protocols that separate by
/// lines (SSE, NDJSON) can then carry it.
fn one_line_json(text: &str) -> Option<Cow<'_, RawValue>> {
    let json = portable_json(text)?;
    if json.contains(['\n', '\r']) {
        let line = json.replace(['\n', '\r'], " ");
        return RawValue::from_string(line).ok().map(Cow::Owned);
    }
    serde_json::from_str::<&RawValue>(json).ok().map(Cow::Borrowed)
}

/// A record as the API shows it.
#[derive(Debug, Serialize)]
pub struct RecordJson<'a> {
    offset: Offset,
    topic: &'a str,
    payload: PayloadJson<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_encoding: Option<&'static str>,
    content_type: Option<&'a str>,
    key_id: String,
    transport: Transport,
    received_at: Rfc3339,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_at: Option<Rfc3339>,
}

/// `{"offset", "topic", "payload", "content_type", "key_id", "transport", "received_at"}`, with `"event_at"` if its sender
/// has said when it was measured, and with
/// `"payload_encoding": "base64"` beside a payload that is neither JSON nor text.
pub fn record_json(record: &StoredRecord) -> RecordJson<'_> {
    let payload = PayloadJson::from_bytes(&record.payload);
    RecordJson {
        offset: record.offset,
        topic: &record.topic,
        payload_encoding: payload.encoding(),
        payload,
        content_type: content_type_if_given(&record.content_type),
        key_id: record.key_id.to_string(),
        transport: record.transport,
        received_at: Rfc3339(record.received_at),
        event_at: record.event_at.map(Rfc3339),
    }
}

/// The first line of CSV, with its end.
pub const CSV_HEADER: &str =
    "offset,received_at,topic,payload,payload_encoding,content_type,key_id,transport,event_at\n";

/// Writes a record as one line of CSV (RFC 4180, ended by LF alone): the payload as it was sent if it is text, without the
/// quotes and escapes of a JSON string, else in Base64. A cell with a comma, a quote or a line break is quoted.
///
/// # Errors
/// Those of `out`.
pub fn write_csv_line(record: &StoredRecord, out: &mut impl Write) -> io::Result<()> {
    let payload = PayloadJson::from_bytes(&record.payload);
    let encoding = payload.encoding().unwrap_or_default();
    let payload: Cow<'_, str> = match &payload {
        PayloadJson::Json(json) => match serde_json::from_str::<String>(json.get()) {
            Ok(text) => text.into(),
            Err(_) => json.get().into(),
        },
        PayloadJson::Text(text) => (*text).into(),
        PayloadJson::Base64(text) => text.as_str().into(),
    };
    write!(out, "{},{}", record.offset, Rfc3339(record.received_at))?;
    let (key_id, transport) = (record.key_id.to_string(), record.transport.as_str());
    for cell in [&record.topic, &*payload, encoding, &record.content_type, &key_id, transport] {
        if cell.contains([',', '"', '\n', '\r']) {
            write!(out, ",\"{}\"", cell.replace('"', "\"\""))?;
        } else {
            write!(out, ",{cell}")?;
        }
    }
    match record.event_at {
        Some(at) => writeln!(out, ",{}", Rfc3339(at)),
        None => writeln!(out, ","),
    }
}

/// As [`record_json`], of a record in the log.
pub fn log_record_json<'a>(record: &RecordRef<'a>) -> RecordJson<'a> {
    let payload = PayloadJson::from_bytes(record.payload);
    RecordJson {
        offset: record.offset,
        topic: record.topic,
        payload_encoding: payload.encoding(),
        payload,
        content_type: content_type_if_given(record.content_type),
        key_id: record.key_id.to_string(),
        transport: record.transport,
        received_at: Rfc3339(record.received_at),
        event_at: record.event_at.map(Rfc3339),
    }
}

/// A media type, if the client gave one.
pub(super) fn content_type_if_given(content_type: &str) -> Option<&str> {
    (!content_type.is_empty()).then_some(content_type)
}

/// Walks through JSON and fails where some parser might.
struct PortableJsonCheck {
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for PortableJsonCheck {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl PortableJsonCheck {
    fn next_depth<E: serde::de::Error>(&self) -> Result<usize, E> {
        if self.depth < PAYLOAD_JSON_DEPTH_MAX {
            Ok(self.depth + 1)
        } else {
            Err(E::custom("nested too deep"))
        }
    }
}

impl<'de> Visitor<'de> for PortableJsonCheck {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let depth = self.next_depth()?;
        while seq.next_element_seed(PortableJsonCheck { depth })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let depth = self.next_depth()?;
        while map.next_key_seed(PortableJsonCheck { depth })?.is_some() {
            map.next_value_seed(PortableJsonCheck { depth })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::KeyId;

    fn shown(payload: &[u8]) -> String {
        serde_json::to_string(&PayloadJson::from_bytes(payload)).expect("serializable")
    }

    #[test]
    fn a_time_has_six_fraction_digits_and_reads_back() {
        assert_eq!(Rfc3339(0).to_string(), "1970-01-01T00:00:00.000000Z");
        assert_eq!(Rfc3339(1_795_426_119_000_120).to_string(), "2026-11-23T09:28:39.000120Z");
        assert_eq!(parse_time("2026-11-23T09:28:39.000120Z"), Some(1_795_426_119_000_120));
        assert_eq!(parse_time("2026-11-23T10:28:39.00012+01:00"), Some(1_795_426_119_000_120));
        for no_time in ["", "yesterday", "2026-11-23", "2026-11-23T09:28:39", "1795426119"] {
            assert_eq!(parse_time(no_time), None, "{no_time:?}");
        }
        // Beyond the calendar's range: shown as its end, not as an error.
        assert!(Rfc3339(i64::MAX).to_string().starts_with("9999-"));
        assert!(Rfc3339(i64::MIN).to_string().starts_with("-"));
    }

    #[test]
    fn a_payload_is_json_where_it_is_json_else_text_else_base64() {
        assert_eq!(shown(b" {\"t\": 21.50}\n"), r#"{"t": 21.50}"#);
        assert_eq!(shown(b"{\"a\":1,\r\n\"b\":\"x\\ny\"}"), r#"{"a":1,  "b":"x\ny"}"#);
        assert_eq!(shown(b"21.50"), "21.50");
        assert_eq!(shown(b"123456789012345678901234567890"), "123456789012345678901234567890");
        assert_eq!(shown(b"{\"t\": 21.5"), r#""{\"t\": 21.5""#);
        assert_eq!(shown(b"{} {}"), r#""{} {}""#);
        assert_eq!(shown(b""), r#""""#);
        assert_eq!(shown("21 °C".as_bytes()), r#""21 °C""#);
        assert_eq!(shown(b"\xff\x00"), r#""/wA=""#);
        assert_eq!(PayloadJson::from_bytes(b"\xff\x00").encoding(), Some("base64"));
        assert_eq!(PayloadJson::from_bytes(b"text").encoding(), None);
    }

    #[test]
    fn json_that_some_parsers_cannot_read_is_shown_as_text() {
        let nested = |levels| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        assert!(portable_json(&nested(PAYLOAD_JSON_DEPTH_MAX)).is_some());
        assert!(portable_json(&nested(PAYLOAD_JSON_DEPTH_MAX + 1)).is_none());
        assert!(portable_json(&format!("{{\"a\":{}}}", nested(PAYLOAD_JSON_DEPTH_MAX - 1))).is_some());
        assert!(portable_json(&format!("{{\"a\":{}}}", nested(PAYLOAD_JSON_DEPTH_MAX))).is_none());
        assert!(portable_json(&nested(1_000_000)).is_none());
        assert!(portable_json("1e999").is_none());
        assert!(portable_json(r#""\ud800""#).is_none());
        assert!(portable_json("NaN").is_none());
    }

    fn press_record() -> StoredRecord {
        StoredRecord {
            offset: 7,
            topic: "a,b".into(),
            payload: b"{\"value\": 21.50}".to_vec(),
            content_type: "".into(),
            key_id: KeyId([1, 0x23, 0x45, 0x67, 0x89, 0xab]),
            transport: Transport::Mqtt,
            received_at: 1_795_426_119_000_120,
            event_at: Some(1_795_426_118_000_000),
        }
    }

    fn csv(payload: &[u8]) -> String {
        let mut line = Vec::new();
        let record = StoredRecord { payload: payload.to_vec(), ..press_record() };
        write_csv_line(&record, &mut line).expect("a Vec takes all");
        String::from_utf8(line).expect("text")
    }

    #[test]
    fn csv_quotes_what_would_break_a_line_and_keeps_every_digit() {
        let expected = "7,2026-11-23T09:28:39.000120Z,\"a,b\",\"{\"\"value\"\": 21.50}\",,,0123456789ab,mqtt,2026-11-23T09:28:38.000000Z\n";
        assert_eq!(csv(b"{\"value\": 21.50}"), expected);
        assert_eq!(CSV_HEADER.matches(',').count(), 8);
    }

    #[test]
    fn csv_tells_bytes_from_text() {
        assert!(csv(b"\xff\x00").contains(",/wA=,base64,,"), "{}", csv(b"\xff\x00"));
        assert!(csv(b"two\nlines").contains(",\"two\nlines\",,,"), "{}", csv(b"two\nlines"));
        assert!(csv(b"\"two\\nlines\"").contains(",\"two\nlines\",,,"), "{}", csv(b"\"two\\nlines\""));
    }

    #[test]
    fn a_record_has_exactly_the_members_that_the_api_names() {
        let record = StoredRecord {
            offset: 7,
            topic: "spindle/temp".into(),
            payload: b"{\"t\":1}".to_vec(),
            content_type: "".into(),
            key_id: KeyId([1, 0x23, 0x45, 0x67, 0x89, 0xab]),
            transport: Transport::Mqtt,
            received_at: 1_795_426_119_000_120,
            event_at: None,
        };
        let shown = serde_json::to_string(&record_json(&record)).expect("serializable");
        let expected = r#"{"offset":7,"topic":"spindle/temp","payload":{"t":1},"content_type":null,"key_id":"0123456789ab","transport":"mqtt","received_at":"2026-11-23T09:28:39.000120Z"}"#;
        assert_eq!(shown, expected);

        let binary = StoredRecord {
            payload: vec![0xff],
            content_type: "image/x".into(),
            event_at: Some(-1),
            ..record
        };
        let shown = serde_json::to_value(record_json(&binary)).expect("serializable");
        assert_eq!(shown["payload"], "/w==");
        assert_eq!(shown["payload_encoding"], "base64");
        assert_eq!(shown["content_type"], "image/x");
        assert_eq!(shown["event_at"], "1969-12-31T23:59:59.999999Z");
    }
}
