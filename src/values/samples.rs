//! The samples of a record: each number in its payload, under a key.
//!
//! A JSON object gives the numbers of its members; members of objects inside have keys joined by dots, `state.rpm` for
//! `{"state": {"rpm": 900}}`. A payload that is itself a number is the sample of the key `""`, as in `latest`. `true`
//! and `false` are 1 and 0, so that what is on or off can be drawn. Texts, `null`, arrays and what is in them give none.
//! Payloads of other shapes ([`shape`](super::shape)) give what those have. Of a key that comes twice for one time, the first
//! one counts. Numbers are `f64`: integers beyond 2^53 lose their last digits
//! here, and keep them in the payload.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::shape::{ShapedPayload, ShapedValue};
use crate::limits::{SAMPLE_DEPTH_MAX, SAMPLE_KEY_BYTES_MAX, SAMPLES_PER_RECORD_MAX};
use crate::message::TimeMicros;

/// One number of a payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample<'a> {
    /// Up to [`SAMPLE_KEY_BYTES_MAX`] bytes.
    pub key: &'a str,
    /// Finite.
    pub value: f64,
    /// When it was measured, if the payload says so for this number alone. `None`: at the record's time.
    pub at: Option<TimeMicros>,
}

/// Reads the samples of one payload after the other, into memory that it keeps.
#[derive(Default)]
pub struct SampleReader {
    found: Vec<FoundSample>,
    /// The keys, one behind the other.
    keys: String,
    /// The key of the object that is being read.
    path: String,
    /// The time that the payload says for what is being read.
    at: Option<TimeMicros>,
}

/// A sample whose key is in [`SampleReader::keys`].
struct FoundSample {
    key: Range<usize>,
    /// [`key_digest`].
    digest: u64,
    value: f64,
    at: Option<TimeMicros>,
}

impl SampleReader {
    /// The samples of a payload, in its order: at most [`SAMPLES_PER_RECORD_MAX`], the first ones. The times that a
    /// payload states may be relative to `received_at`.
    #[cfg(test)]
    pub fn read(
        &mut self,
        topic: &str,
        content_type: &str,
        payload: &[u8],
        received_at: TimeMicros,
    ) -> impl Iterator<Item = Sample<'_>> {
        self.read_parsed(topic, content_type, std::str::from_utf8(payload).ok(), None, received_at)
    }

    /// As [`SampleReader::read`], of a payload that is `text`, if it is one, and whose `members` are known if it is a JSON
    /// object: then it is not parsed again.
    pub fn read_parsed(
        &mut self,
        topic: &str,
        content_type: &str,
        text: Option<&str>,
        members: Option<&[JsonMember<'_>]>,
        received_at: TimeMicros,
    ) -> impl Iterator<Item = Sample<'_>> {
        self.found.clear();
        self.keys.clear();
        self.path.clear();
        self.at = None;
        if let Some(text) = text {
            let shaped = ShapedPayload { topic, content_type, text, received_at };
            if !shaped.read(&mut |key, value, at| self.read_shaped(key, value, at)) {
                self.read_text(text, members);
            }
        }
        self.found.iter().map(|found| Sample {
            key: &self.keys[found.key.clone()],
            value: found.value,
            at: found.at,
        })
    }

    /// Reads a value of a payload that is of a shape.
    fn read_shaped(&mut self, key: &str, value: ShapedValue<'_>, at: Option<TimeMicros>) {
        if key.len() > SAMPLE_KEY_BYTES_MAX {
            return;
        }
        self.path.clear();
        self.path.push_str(key);
        self.at = at;
        match value {
            ShapedValue::Json(text) if may_have_sample(text) => self.read_json(text, 1),
            ShapedValue::Json(_) | ShapedValue::Text(_) => {}
            ShapedValue::Number(number) => self.add(number),
            #[expect(clippy::cast_precision_loss, reason = "as in JSON: the payload keeps the last digits")]
            ShapedValue::Integer(number) => self.add(number as f64),
            #[expect(clippy::cast_precision_loss, reason = "likewise")]
            ShapedValue::Unsigned(number) => self.add(number as f64),
            ShapedValue::Boolean(is_on) => self.add(f64::from(is_on)),
        }
    }

    /// Reads a payload that is of no other shape.
    fn read_text(&mut self, text: &str, members: Option<&[JsonMember<'_>]>) {
        match members {
            Some(members) => members.iter().for_each(|(name, value)| self.read_member(name, value, 0)),
            None => self.read_json(text.trim_ascii(), 0),
        }
    }

    /// Reads a JSON value whose key is the present path. What is not JSON to its end gives nothing.
    fn read_json(&mut self, text: &str, depth: usize) {
        match text.as_bytes().first() {
            Some(b'-' | b'0'..=b'9') => {
                if let Some(value) = json_number(text, depth > 0) {
                    self.add(value);
                }
            }
            Some(b't') if text == "true" => self.add(1.0),
            Some(b'f') if text == "false" => self.add(0.0),
            Some(b'{') if depth <= SAMPLE_DEPTH_MAX => {
                let (found, keys) = (self.found.len(), self.keys.len());
                let mut json = serde_json::Deserializer::from_str(text);
                let read = (&mut json).deserialize_map(SampleMembers { reader: self, depth });
                if read.and_then(|()| json.end()).is_err() {
                    self.found.truncate(found);
                    self.keys.truncate(keys);
                }
            }
            _ => {}
        }
    }

    /// Reads a member of the object at the present path.
    fn read_member(&mut self, name: &str, value: &str, depth: usize) {
        if !may_have_sample(value) {
            return;
        }
        let before = self.path.len();
        if depth > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        if self.path.len() <= SAMPLE_KEY_BYTES_MAX {
            self.read_json(value, depth + 1);
        }
        self.path.truncate(before);
    }

    /// Adds a sample under the present path.
    fn add(&mut self, value: f64) {
        if self.found.len() >= SAMPLES_PER_RECORD_MAX || !value.is_finite() {
            return;
        }
        let at = self.at;
        let digest = key_digest(&self.path, at);
        let is_there = |found: &FoundSample| {
            found.digest == digest && found.at == at && self.keys[found.key.clone()] == *self.path
        };
        if self.found.iter().any(is_there) {
            return;
        }
        let begin = self.keys.len();
        self.keys.push_str(&self.path);
        self.found.push(FoundSample { key: begin..self.keys.len(), digest, value, at: self.at });
    }
}

/// A member of a JSON object: its name, and its value as it is written.
pub type JsonMember<'a> = (Cow<'a, str>, &'a str);

/// Tells most keys apart, so that few are compared as a whole.
fn key_digest(key: &str, at: Option<TimeMicros>) -> u64 {
    let bytes = key.as_bytes();
    let part = |bytes: &[u8]| bytes.iter().fold(0_u64, |part, byte| part << 8 | u64::from(*byte));
    let (begin, end) = (&bytes[..bytes.len().min(8)], &bytes[bytes.len().saturating_sub(8)..]);
    let of_key = part(begin) ^ part(end).rotate_left(23) ^ (bytes.len() as u64) << 57;
    of_key ^ at.map_or(0, |at| at.cast_unsigned().rotate_left(11) | 1)
}

/// Whether a JSON value may hold a number: by its first byte.
fn may_have_sample(value: &str) -> bool {
    matches!(value.as_bytes().first(), Some(b'-' | b'0'..=b'9' | b't' | b'f' | b'{'))
}

/// A JSON number as `f64`; `None` beyond its range. `is_checked`: a parser has found it to be JSON.
fn json_number(text: &str, is_checked: bool) -> Option<f64> {
    let is_json = is_checked || serde_json::from_str::<&RawValue>(text).is_ok();
    // Rust's own parser reads every number of JSON, and rounds it correctly.
    text.parse().ok().filter(|value: &f64| is_json && value.is_finite())
}

/// Reads the members of the object at the reader's path.
struct SampleMembers<'r> {
    reader: &'r mut SampleReader,
    depth: usize,
}

impl<'a> Visitor<'a> for SampleMembers<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((MemberName(name), value)) = map.next_entry::<MemberName<'a>, &'a RawValue>()? {
            self.reader.read_member(&name, value.get(), self.depth);
        }
        Ok(())
    }
}

/// The name of a member, borrowed unless it is written with escapes.
pub(crate) struct MemberName<'a>(pub(crate) Cow<'a, str>);

impl<'a> serde::Deserialize<'a> for MemberName<'a> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct MemberNameVisitor;
        impl<'a> Visitor<'a> for MemberNameVisitor {
            type Value = MemberName<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, name: &'a str) -> Result<MemberName<'a>, E> {
                Ok(MemberName(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<MemberName<'a>, E> {
                Ok(MemberName(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(MemberNameVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::seeded_random::SeededRandom;

    fn read(payload: &[u8]) -> Vec<(String, f64)> {
        let mut reader = SampleReader::default();
        // What an earlier payload left does not show.
        drop(reader.read("t", "", br#"{"ts": 5, "values": {"old": 1, "t": 99}}"#, 0));
        reader.read("t", "", payload, 0).map(|sample| (sample.key.to_owned(), sample.value)).collect()
    }

    fn samples(of: &[(&str, f64)]) -> Vec<(String, f64)> {
        of.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect()
    }

    #[test]
    fn numbers_of_objects_have_their_keys_joined_by_dots() {
        let payload = br#" {"t": 21.50, "n": -3, "on": true, "off": false, "unit": "C", "no": null, "list": [1, {"x": 2}],
            "state": {"rpm": 9e2, "deep": {"er": 1}}, "big": 1e999, "\u0061": 4} "#;
        let expected = [
            ("t", 21.5),
            ("n", -3.0),
            ("on", 1.0),
            ("off", 0.0),
            ("state.rpm", 900.0),
            ("state.deep.er", 1.0),
            ("a", 4.0),
        ];
        assert_eq!(read(payload), samples(&expected));
    }

    #[test]
    fn a_number_alone_has_the_empty_key_and_what_is_no_json_gives_none() {
        assert_eq!(read(b" 21.5\n"), samples(&[("", 21.5)]));
        assert_eq!(read(b"true"), samples(&[("", 1.0)]));
        let nothing: [&[u8]; 15] = [
            b"",
            b"on",
            b"21.5 C",
            b"007",
            b"1.",
            b"-",
            b"1e999",
            b"inf",
            b"NaN",
            b"[1]",
            b"\"1\"",
            b"null",
            b"{}",
            b"\xff{\"t\":1}",
            b"{\"a\": 1, \"b\": 2",
        ];
        for nothing in nothing {
            assert_eq!(read(nothing), [], "{}", String::from_utf8_lossy(nothing));
        }
        assert_eq!(read(b"{\"a\": 1} x"), []);
    }

    #[test]
    fn of_a_key_that_comes_twice_the_first_counts() {
        assert_eq!(read(br#"{"t": 1, "t": 2, "\u0074": 3}"#), samples(&[("t", 1.0)]));
        assert_eq!(read(br#"{"a.b": 1, "a": {"b": 2}}"#), samples(&[("a.b", 1.0)]));
        assert_eq!(read(br#"{"t": "x", "t": 2}"#), samples(&[("t", 2.0)]), "a text is no sample");
    }

    #[test]
    fn keys_samples_and_depth_are_bounded() {
        let (key, long) = ("k".repeat(SAMPLE_KEY_BYTES_MAX), "k".repeat(SAMPLE_KEY_BYTES_MAX + 1));
        let payload = format!(r#"{{"{long}": 1, "{key}": 2, "x": {{"{key}": 3}}}}"#);
        assert_eq!(read(payload.as_bytes()), samples(&[(&key, 2.0)]));

        let many: Vec<String> = (0..=SAMPLES_PER_RECORD_MAX).map(|n| format!("\"k{n}\": {n}")).collect();
        let read_of_many = read(format!("{{{}}}", many.join(",")).as_bytes());
        assert_eq!(read_of_many.len(), SAMPLES_PER_RECORD_MAX);
        assert_eq!(read_of_many[1], ("k1".to_owned(), 1.0));

        let nested = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
        assert_eq!(read(nested(SAMPLE_DEPTH_MAX + 1).as_bytes()).len(), 1);
        assert_eq!(read(nested(SAMPLE_DEPTH_MAX + 2).as_bytes()).len(), 0);
        assert_eq!(read(nested(100_000).as_bytes()).len(), 0);
    }

    #[test]
    fn each_shape_gives_its_numbers_with_their_times() {
        let line = br#"cpu,host=a idle=98.5,n=3i,big=1u,on=f,note="5" 1700000000000000000"#;
        let thingsboard =
            br#"[{"ts": 1, "values": {"t": 1, "o": {"x": true}, "s": "2"}}, {"ts": 2, "values": {"t": 3}}]"#;
        let senml = br#"[{"bn":"a/","n":"t","v":1.5,"t":-2},{"n":"t","v":2},{"n":"on","vb":true},{"n":"s","vs":"3"}]"#;
        let at = Some(1_700_000_000_000_000);
        let mut reader = SampleReader::default();
        for (topic, content_type, payload, expected) in [
            (
                "cpu/host=a",
                "text/plain; precision=ns",
                &line[..],
                &[("idle", 98.5, at), ("n", 3.0, at), ("big", 1.0, at), ("on", 0.0, at)][..],
            ),
            (
                "x",
                "",
                line,
                &[
                    ("cpu/host=a/idle", 98.5, at),
                    ("cpu/host=a/n", 3.0, at),
                    ("cpu/host=a/big", 1.0, at),
                    ("cpu/host=a/on", 0.0, at),
                ],
            ),
            (
                "x",
                "application/json",
                thingsboard,
                &[("t", 1.0, Some(1_000)), ("o.x", 1.0, Some(1_000)), ("t", 3.0, Some(2_000))],
            ),
            (
                "x",
                "application/senml+json",
                senml,
                &[("a/t", 1.5, Some(8_000_000)), ("a/t", 2.0, None), ("a/on", 1.0, None)],
            ),
        ] {
            let found: Vec<_> = reader
                .read(topic, content_type, payload, 10_000_000)
                .map(|sample| (sample.key.to_owned(), sample.value, sample.at))
                .collect();
            let expected: Vec<_> =
                expected.iter().map(|&(key, value, at)| (key.to_owned(), value, at)).collect();
            assert_eq!(found, expected, "{topic} {content_type}");
        }
        // Two hosts on one topic are two series.
        let lines = b"cpu,host=a idle=1 5\ncpu,host=b idle=2 5\ncpu,host=a idle=3 6";
        let keys: Vec<_> = reader
            .read("x", "text/plain; precision=s", lines, 0)
            .map(|sample| sample.key.to_owned())
            .collect();
        assert_eq!(keys, ["cpu/host=a/idle", "cpu/host=b/idle", "cpu/host=a/idle"]);
    }

    /// The same by way of a `Value`, of which each member is there once.
    fn samples_of_value(path: &str, value: &serde_json::Value, depth: usize, into: &mut Vec<(String, f64)>) {
        match value {
            serde_json::Value::Number(number) => {
                into.extend(number.as_f64().map(|value| (path.to_owned(), value)));
            }
            serde_json::Value::Bool(is_on) => into.push((path.to_owned(), f64::from(u8::from(*is_on)))),
            serde_json::Value::Object(members) if depth <= SAMPLE_DEPTH_MAX => {
                for (name, value) in members {
                    let path = if depth == 0 { name.clone() } else { format!("{path}.{name}") };
                    samples_of_value(&path, value, depth + 1, into);
                }
            }
            _ => {}
        }
    }

    /// A value that the random numbers make, whose members have names that no other has.
    fn some_value(random: &mut SeededRandom, depth: usize, names: &mut u32) -> serde_json::Value {
        match random.below(if depth > 10 { 6 } else { 9 }) {
            0 => json!(random.below(1_000_000)),
            1 => json!(-(random.below(1_000) as f64) / 7.0),
            2 => json!(random.percent(50)),
            3 => json!(null),
            4 => json!("a \"text\" {}:"),
            5 => json!(1e-300 * random.below(9) as f64),
            6 => json!([random.below(9), {"in": 1}]),
            _ => {
                let members = (0..random.below(6)).map(|_| {
                    *names += 1;
                    (format!("n{names}é"), some_value(random, depth + 1, names))
                });
                serde_json::Value::Object(members.collect())
            }
        }
    }

    #[test]
    fn whatever_a_value_is_its_samples_are_those_that_a_parser_finds_and_broken_ones_have_none() {
        for seed in 0..2_000 {
            let mut random = SeededRandom(seed);
            let value = some_value(&mut random, 0, &mut 0);
            let mut expected = Vec::new();
            samples_of_value("", &value, 0, &mut expected);
            let text = if random.percent(50) { value.to_string() } else { format!("{value:#}") };
            let (mut found, mut expected) = (read(text.as_bytes()), expected);
            if expected.len() <= SAMPLES_PER_RECORD_MAX {
                found.sort_by(|a, b| a.0.cmp(&b.0));
                expected.sort_by(|a, b| a.0.cmp(&b.0));
                assert_eq!(found, expected, "seed {seed}: {text}");
            }
            // Cut or with other bytes it is read to no harm, and gives something only where a parser takes it.
            let mut bytes = text.into_bytes();
            match bytes.len() {
                0 | 1 => {}
                length if random.percent(50) => bytes.truncate(1 + random.below(length - 1)),
                length => bytes[random.below(length)] = u8::try_from(random.below(256)).expect("a byte"),
            }
            if serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_err() {
                assert_eq!(read(&bytes), [], "seed {seed}: {}", String::from_utf8_lossy(&bytes));
            }
        }
    }
}
