//! The event time of a record: when it was measured, as its sender says.
//!
//! A sender says it with the message (the MQTT 5 user property or header `event-time`), or in the payload at a place that
//! the datasource names. What is said with the message counts first. A datasource's setting says where to look, in what
//! form, how far it may be from the time at which the message was received, and what happens otherwise: the message goes
//! into quarantine, or it has no event time and the time of receipt stands for it.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::json_path::value_at;
use crate::limits::{EVENT_TIME_POINTER_BYTES_MAX, EVENT_TIME_POINTER_PARTS_MAX, EVENT_TIME_SKEW_S_MAX};
use crate::log::QuarantineReason;
use crate::message::TimeMicros;
use crate::time::parse_time;
use crate::whole_number;

/// The user property of MQTT 5, and the header of HTTP and NATS, with the time at which a message was measured.
pub const EVENT_TIME_PROPERTY: &str = "event-time";

/// The form of a time in a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventTimeFormat {
    /// RFC 3339 with an offset: `2026-11-23T09:28:39.5+01:00`.
    #[default]
    Rfc3339,
    /// Seconds since the Unix epoch, a number or a text of one, with or without a fraction.
    UnixS,
    /// Milliseconds, likewise.
    UnixMs,
    /// Microseconds, likewise.
    UnixUs,
    /// Nanoseconds, likewise.
    UnixNs,
}

/// What happens to a message whose event time is missing, unreadable or too far off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventTimeFallback {
    /// It goes into quarantine.
    Quarantine,
    /// It is let in without an event time.
    #[default]
    ReceivedAt,
}

/// Where the event time of a datasource's messages is, as a request states it and as the registry keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventTimeSetting {
    /// Where in a JSON payload, as a JSON pointer (RFC 6901). Without one, only what is said with a message counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
    /// Its form there.
    #[serde(default)]
    pub format: EventTimeFormat,
    /// What happens if it is not there.
    #[serde(default)]
    pub on_error: EventTimeFallback,
    /// How far it may be from the time of receipt, before and after it, in seconds. Without one, any time will do.
    #[serde(default, deserialize_with = "whole_number::or_null", skip_serializing_if = "Option::is_none")]
    pub max_skew_s: Option<u64>,
}

/// Why a setting cannot be used. The text is for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct EventTimeSettingError {
    /// The member that is wrong, as a JSON pointer within the setting.
    pub pointer: &'static str,
    /// Why.
    pub words: String,
}

impl EventTimeSetting {
    /// Reads a setting from a request.
    ///
    /// # Errors
    /// [`EventTimeSettingError`]: the first thing that is wrong with it.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, EventTimeSettingError> {
        let refused = |pointer, words: String| EventTimeSettingError { pointer, words };
        let setting = Self::deserialize(value).map_err(|error| refused("", error.to_string()))?;
        if let Some(pointer) = &setting.pointer {
            let has_escapes = pointer.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
            if !pointer.starts_with('/') || !has_escapes {
                return Err(refused("/pointer", "it has to be a JSON pointer such as /timestamp".to_owned()));
            }
            if pointer.len() > EVENT_TIME_POINTER_BYTES_MAX
                || pointer.split('/').count() - 1 > EVENT_TIME_POINTER_PARTS_MAX
            {
                let words = format!(
                    "it has at most {EVENT_TIME_POINTER_PARTS_MAX} parts and {EVENT_TIME_POINTER_BYTES_MAX} bytes"
                );
                return Err(refused("/pointer", words));
            }
        }
        if setting.max_skew_s.is_some_and(|skew| skew > EVENT_TIME_SKEW_S_MAX) {
            return Err(refused("/max_skew_s", format!("it is at most {EVENT_TIME_SKEW_S_MAX}")));
        }
        Ok(setting)
    }

    /// The text that the registry keeps.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers are JSON")
    }
}

/// Why a message has no event time, although it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventTimeError {
    /// The payload has nothing at the place.
    #[error("the message has no time there, and its datasource asks for one")]
    Missing,
    /// There is something that is no time of the form.
    #[error("{0} is no time of the form that is asked for")]
    Unreadable(String),
    /// The time is too far from when the message was received.
    #[error("the time is {off_s} s off the time of receipt, and at most {skew_s} s are let in")]
    TooFarOff {
        /// How far, in seconds.
        off_s: u64,
        /// How far it may be.
        skew_s: u64,
    },
}

/// How the event time of a datasource's messages is found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventTimeRule(Option<EventTimeSetting>);

/// The times that all readers can show, among them SQLite's functions: the years 0 to 9999.
pub(super) const EVENT_TIMES: RangeInclusive<TimeMicros> = -62_167_219_200_000_000..=253_402_300_799_999_999;

/// The keyword in the reason of a message without an event time; JSON Schema has no such keyword.
const EVENT_TIME_KEYWORD: &str = "event_time";

/// How much of an unreadable time is repeated to its sender, in characters.
const UNREADABLE_CHARS_MAX: usize = 64;

impl EventTimeRule {
    /// The rule in the text that the registry has. A text that this version cannot read is no rule.
    pub fn from_text(text: Option<&str>) -> Self {
        Self(text.and_then(|text| {
            let read = serde_json::from_str(text).map_err(|error| error.to_string());
            let read = read.and_then(|value| EventTimeSetting::from_json(&value).map_err(|e| e.to_string()));
            read.inspect_err(|error| tracing::error!(%error, "event_time of a datasource cannot be read"))
                .ok()
        }))
    }

    /// The setting, if there is one.
    #[cfg(test)]
    fn setting(&self) -> Option<&EventTimeSetting> {
        self.0.as_ref()
    }

    /// The event time of a message. `stated`: what was said with it. `shaped`: finds the time that its shape has a place for
    /// (see [`ShapedPayload`](super::ShapedPayload)). What is said counts first, then the place that the setting names, then
    /// the shape's. `None` if nothing says it, or if what says it cannot be used and that is no reason for quarantine.
    ///
    /// # Errors
    /// Why the message goes into quarantine.
    pub fn event_time(
        &self,
        stated: Option<&str>,
        shaped: impl Fn() -> Option<TimeMicros>,
        payload: &[u8],
        received_at: TimeMicros,
    ) -> Result<Option<TimeMicros>, Box<QuarantineReason<'static>>> {
        let shaped = || shaped().filter(|at| EVENT_TIMES.contains(at));
        let Some(setting) = &self.0 else {
            return Ok(stated.and_then(|text| time_in_any_form(text).ok()).or_else(shaped));
        };
        let (found, pointer) = match (stated, &setting.pointer) {
            (Some(text), _) => (time_in_any_form(text), ""),
            (None, Some(pointer)) => {
                let found = match setting.format.time_at(payload, pointer) {
                    Err(EventTimeError::Missing) => shaped().ok_or(EventTimeError::Missing),
                    found => found,
                };
                (found, pointer.as_str())
            }
            (None, None) => match shaped() {
                Some(at) => (Ok(at), ""),
                None => return Ok(None),
            },
        };
        let found = found.and_then(|at| setting.check_skew(at, received_at).map(|()| at));
        match (found, setting.on_error) {
            (Ok(at), _) => Ok(Some(at)),
            (Err(_), EventTimeFallback::ReceivedAt) => Ok(None),
            (Err(error), EventTimeFallback::Quarantine) => Err(Box::new(QuarantineReason {
                keyword: EVENT_TIME_KEYWORD.into(),
                pointer: pointer.to_owned().into(),
                words: error.to_string().into(),
                schema_version: 0,
            })),
        }
    }
}

impl EventTimeSetting {
    fn check_skew(&self, at: TimeMicros, received_at: TimeMicros) -> Result<(), EventTimeError> {
        let off_s = at.abs_diff(received_at).div_ceil(1_000_000);
        match self.max_skew_s {
            Some(skew_s) if off_s > skew_s => Err(EventTimeError::TooFarOff { off_s, skew_s }),
            _ => Ok(()),
        }
    }
}

impl EventTimeFormat {
    /// The time at a place in a payload.
    fn time_at(self, payload: &[u8], pointer: &str) -> Result<TimeMicros, EventTimeError> {
        let value = std::str::from_utf8(payload).ok().and_then(|text| value_at(text, pointer));
        let value = value.ok_or(EventTimeError::Missing)?;
        let escaped;
        let text = match value.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
            Some(text) if !text.contains('\\') => text,
            Some(_) => {
                escaped = serde_json::from_str::<String>(value).map_err(|_| unreadable(value))?;
                &escaped
            }
            None if self == Self::Rfc3339 => return Err(unreadable(value)),
            None => value,
        };
        self.parse(text).ok_or_else(|| unreadable(value))
    }

    /// Reads a time of this form.
    fn parse(self, text: &str) -> Option<TimeMicros> {
        let micros = match self {
            Self::Rfc3339 => parse_time(text),
            Self::UnixS => decimal_micros(text, 6),
            Self::UnixMs => decimal_micros(text, 3),
            Self::UnixUs => decimal_micros(text, 0),
            Self::UnixNs => decimal_micros(text, -3),
        };
        micros.filter(|micros| EVENT_TIMES.contains(micros))
    }
}

/// A time as it is said with a message: RFC 3339, or a number since the Unix epoch, whose digits tell seconds (up to 11),
/// milliseconds (up to 14), microseconds (up to 17) and nanoseconds.
fn time_in_any_form(text: &str) -> Result<TimeMicros, EventTimeError> {
    let text = text.trim_ascii();
    let whole = text.strip_prefix('-').unwrap_or(text).split('.').next().unwrap_or_default();
    let format = match whole.bytes().all(|byte| byte.is_ascii_digit()) {
        false => EventTimeFormat::Rfc3339,
        true => match whole.len() {
            0..=11 => EventTimeFormat::UnixS,
            12..=14 => EventTimeFormat::UnixMs,
            15..=17 => EventTimeFormat::UnixUs,
            _ => EventTimeFormat::UnixNs,
        },
    };
    format.parse(text).ok_or_else(|| unreadable(text))
}

/// `text × 10^exponent`, exactly, rounded down to a whole number. `None` for what is no decimal number of at most 19 digits
/// before its point; exponents (`1.7e9`) go through `f64`.
fn decimal_micros(text: &str, exponent: i32) -> Option<TimeMicros> {
    if text.contains(['e', 'E']) {
        let micros = text.parse::<f64>().ok()? * 10_f64.powi(exponent);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a float that is out of range saturates, and is refused"
        )]
        return micros.is_finite().then_some(micros.floor() as i64);
    }
    let (is_negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let is_number = (1..=19).contains(&whole.len()) && all_digits(whole) && all_digits(fraction);
    if !is_number || (digits.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole: i128 = whole.parse().ok()?;
    // Nine digits behind the point are enough for every form, and more say nothing of a microsecond.
    let nano_digits: i128 = format!("{fraction:0<9.9}").parse().ok()?;
    let nanos_of_unit = whole * 1_000_000_000 + nano_digits;
    let signed = if is_negative { -nanos_of_unit } else { nanos_of_unit };
    let divisor = 10_i128.pow(u32::try_from(9 - exponent).ok()?);
    signed.div_euclid(divisor).try_into().ok()
}

fn unreadable(value: &str) -> EventTimeError {
    let mut shown: String = value.chars().filter(|c| !c.is_control()).take(UNREADABLE_CHARS_MAX).collect();
    if shown.len() < value.len() {
        shown.push('…');
    }
    EventTimeError::Unreadable(shown)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOON: TimeMicros = 1_795_426_119_000_120;

    fn rule(setting: serde_json::Value) -> EventTimeRule {
        let setting = EventTimeSetting::from_json(&setting).expect("a setting");
        let rule = EventTimeRule::from_text(Some(&setting.to_text()));
        assert_eq!(rule.setting(), Some(&setting), "the registry's text reads back");
        rule
    }

    #[test]
    fn a_time_is_read_in_each_of_its_forms() {
        for (format, value, at) in [
            ("rfc3339", json!("2026-11-23T09:28:39.00012Z"), Some(NOON)),
            ("rfc3339", json!("2026-11-23T10:28:39.000120+01:00"), Some(NOON)),
            ("rfc3339", json!("2026-11-23T09:28:39"), None),
            ("rfc3339", json!(1_795_426_119), None),
            ("unix_s", json!(1_795_426_119), Some(1_795_426_119_000_000)),
            ("unix_s", json!("1795426119"), Some(1_795_426_119_000_000)),
            ("unix_s", json!(1_795_426_119.5), Some(1_795_426_119_500_000)),
            ("unix_s", json!(-1), Some(-1_000_000)),
            ("unix_ms", json!(1_795_426_119_000_u64), Some(1_795_426_119_000_000)),
            ("unix_us", json!(NOON), Some(NOON)),
            ("unix_ns", json!(1_795_426_119_000_120_999_u64), Some(NOON)),
            ("unix_ns", json!(-1), Some(-1)),
            ("unix_s", json!(1_795_426_119_000_u64), None),
            ("unix_s", json!("2026-11-23T09:28:39Z"), None),
            ("unix_s", json!(null), None),
            ("unix_s", json!([1]), None),
            ("unix_s", json!(""), None),
            ("unix_s", json!("."), None),
            ("unix_s", json!("1_000"), None),
            ("unix_s", json!("99999999999999999999"), None),
            ("unix_s", json!("1e300"), None),
        ] {
            let rule = rule(json!({"pointer": "/at", "format": format}));
            let payload = json!({"v": 1, "at": value}).to_string();
            assert_eq!(rule.event_time(None, || None, payload.as_bytes(), 0), Ok(at), "{format} {payload}");
        }
        let rule = rule(json!({"pointer": "/at", "format": "unix_s"}));
        assert_eq!(
            rule.event_time(None, || None, br#"{"at": 1.795426119e9}"#, 0),
            Ok(Some(1_795_426_119_000_000))
        );
        assert_eq!(rule.event_time(None, || None, br#"{"at": 1795426119.00012099999}"#, 0), Ok(Some(NOON)));
    }

    #[test]
    fn what_is_said_with_a_message_counts_first_and_needs_no_setting() {
        let none = EventTimeRule::default();
        for text in [
            "2026-11-23T09:28:39.00012Z",
            " 1795426119.00012 ",
            "1795426119000.12",
            "1795426119000120",
            "1795426119000120000",
        ] {
            assert_eq!(none.event_time(Some(text), || None, b"", 0), Ok(Some(NOON)), "{text}");
        }
        for text in ["", "yesterday", "12:00", "-", "99999999999999999999999"] {
            assert_eq!(none.event_time(Some(text), || None, b"", 0), Ok(None), "{text}");
        }
        let rule = rule(json!({"pointer": "/at", "format": "unix_s", "on_error": "quarantine"}));
        assert_eq!(rule.event_time(Some("7"), || None, br#"{"at": 8}"#, 0), Ok(Some(7_000_000)));
        let reason =
            rule.event_time(Some("never"), || None, br#"{"at": 8}"#, 0).expect_err("said and unreadable");
        assert_eq!((&*reason.keyword, &*reason.pointer), ("event_time", ""));
    }

    #[test]
    fn an_event_time_that_cannot_be_used_is_a_reason_only_where_the_setting_says_so() {
        let quarantine = rule(json!({
            "pointer": "/at", "format": "unix_s", "on_error": "quarantine", "max_skew_s": 60
        }));
        let lenient = rule(json!({"pointer": "/at", "format": "unix_s", "max_skew_s": 60}));
        let now = 1_000_000_000_000_000;
        for (at, is_near) in [(0, true), (60, true), (61, false), (-60, true), (-61, false)] {
            let payload = format!(r#"{{"at": {}}}"#, 1_000_000_000 + at);
            let event_at = quarantine.event_time(None, || None, payload.as_bytes(), now);
            assert_eq!(event_at.is_ok(), is_near, "{at}: {event_at:?}");
            let event_at = lenient.event_time(None, || None, payload.as_bytes(), now).expect("let in");
            assert_eq!(event_at.is_some(), is_near, "{at}");
        }
        for payload in [&b"{}"[..], b"", b"\xff", b"{\"at\": ", b"{\"at\": \"x\"}", b"[]"] {
            let reason = quarantine.event_time(None, || None, payload, now).expect_err("no time");
            assert_eq!((&*reason.keyword, &*reason.pointer), ("event_time", "/at"));
            assert_eq!(lenient.event_time(None, || None, payload, now), Ok(None));
        }
    }

    #[test]
    fn a_setting_is_checked_before_it_counts() {
        let at = |setting| EventTimeSetting::from_json(&setting).expect_err("refused").pointer;
        assert_eq!(at(json!({"pointer": "at"})), "/pointer");
        assert_eq!(at(json!({"pointer": ""})), "/pointer");
        assert_eq!(at(json!({"pointer": "/a~2"})), "/pointer");
        assert_eq!(at(json!({"pointer": "/x".repeat(EVENT_TIME_POINTER_PARTS_MAX + 1)})), "/pointer");
        assert_eq!(
            at(json!({"pointer": "/".to_owned() + &"x".repeat(EVENT_TIME_POINTER_BYTES_MAX)})),
            "/pointer"
        );
        assert_eq!(at(json!({"max_skew_s": EVENT_TIME_SKEW_S_MAX + 1})), "/max_skew_s");
        for other in [json!({"format": "unix"}), json!({"on_error": "drop"}), json!({"skew": 1}), json!(1)] {
            assert_eq!(at(other), "");
        }
        let rule = rule(json!({"pointer": "/x".repeat(EVENT_TIME_POINTER_PARTS_MAX), "max_skew_s": 0}));
        assert!(rule.setting().is_some());
        assert_eq!(EventTimeRule::from_text(Some("{\"newer\": 1}")), EventTimeRule::default());
    }

    #[test]
    fn the_time_of_a_shape_counts_where_nothing_else_says_one() {
        let shaped = || Some(NOON);
        let none = EventTimeRule::default();
        assert_eq!(none.event_time(None, shaped, b"", 0), Ok(Some(NOON)));
        assert_eq!(none.event_time(Some("7"), shaped, b"", 0), Ok(Some(7_000_000)));
        assert_eq!(none.event_time(None, || Some(i64::MAX), b"", 0), Ok(None));
        let named = rule(json!({"pointer": "/at", "format": "unix_s", "on_error": "quarantine"}));
        assert_eq!(named.event_time(None, shaped, br#"{"at": 8}"#, 0), Ok(Some(8_000_000)));
        assert_eq!(named.event_time(None, shaped, b"t v=1", 0), Ok(Some(NOON)));
        assert!(named.event_time(None, shaped, br#"{"at": "noon"}"#, 0).is_err());
        let near = rule(json!({"max_skew_s": 10, "on_error": "quarantine"}));
        assert_eq!(near.event_time(None, shaped, b"", NOON), Ok(Some(NOON)));
        assert!(near.event_time(None, shaped, b"", NOON + 11_000_000).is_err());
    }
}
