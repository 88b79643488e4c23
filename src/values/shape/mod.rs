//! The shapes that devices send beside plain JSON: line protocol ([`line`]), the telemetry of ThingsBoard
//! ([`thingsboard`]) and SenML ([`senml`]). One payload may hold many values, each with a key and a time of its own.
//!
//! | shape | how it is told |
//! |---|---|
//! | line protocol | `text/plain` with a precision; or no media type, or `text/plain`, and a text of points, in nanoseconds |
//! | SenML | `application/senml+json`; or no other media type than JSON's, and an array of SenML records alone |
//! | ThingsBoard | `{"ts": …, "values": {…}}` and nothing beside, or an array of such |
//!
//! A payload that is not wholly of a shape is of none. What is read is a function of topic, media type and payload, so that
//! every reader finds the same.

mod line;
mod senml;
#[cfg(test)]
mod tests;
mod thingsboard;

use crate::message::TimeMicros;

/// A payload, with what its shape depends on.
#[derive(Debug, Clone, Copy)]
pub struct ShapedPayload<'a> {
    /// Its topic.
    pub topic: &'a str,
    /// Its media type, or empty.
    pub content_type: &'a str,
    /// The payload.
    pub text: &'a str,
    /// When it was received: times in it may be relative to that.
    pub received_at: TimeMicros,
}

/// A value in a payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ShapedValue<'a> {
    /// A value as JSON, as the payload has it.
    Json(&'a str),
    /// A number that is worked out.
    Number(f64),
    /// An integer.
    Integer(i64),
    /// An integer that may be larger.
    Unsigned(u64),
    /// What is on or off.
    Boolean(bool),
    /// A text.
    Text(&'a str),
}

impl ShapedValue<'_> {
    /// It as JSON.
    pub fn to_json(self) -> String {
        match self {
            Self::Json(text) => text.to_owned(),
            Self::Number(number) => serde_json::Value::from(number).to_string(),
            Self::Integer(number) => number.to_string(),
            Self::Unsigned(number) => number.to_string(),
            Self::Boolean(is_on) => is_on.to_string(),
            Self::Text(text) => serde_json::Value::from(text).to_string(),
        }
    }
}

/// What is called with each value of a payload in turn: its key, itself, and its time, if the payload says it.
pub type ShapedValueVisitor<'v> = dyn FnMut(&str, ShapedValue<'_>, Option<TimeMicros>) + 'v;

/// Whether a payload may be of a shape. It looks at the first bytes of a JSON object alone, because most messages are one
/// of no shape.
#[inline]
pub fn may_be_shaped(content_type: &str, payload: &[u8]) -> bool {
    let is_object = payload.trim_ascii_start().first() == Some(&b'{');
    let is_plain = content_type.is_empty() || content_type == "application/json";
    !(is_object && is_plain) || thingsboard::may_be_telemetry(payload)
}

impl ShapedPayload<'_> {
    /// Calls `visit` with each value. Returns whether the payload is of a shape; if not, there was no call.
    pub fn read(&self, visit: &mut ShapedValueVisitor<'_>) -> bool {
        let is_type = |named: &str| self.essence().eq_ignore_ascii_case(named);
        match self.text.trim_ascii_start().as_bytes().first() {
            None => false,
            _ if self.is_line_protocol() => line::read(self, visit),
            _ if is_type(senml::MEDIA_TYPE) => senml::read(self, true, visit),
            Some(b'[') if is_type("") || is_type("application/json") => {
                thingsboard::read(self, visit) || senml::read(self, false, visit)
            }
            Some(b'{') => thingsboard::read(self, visit),
            Some(_) => false,
        }
    }

    /// The media type without parameters.
    fn essence(&self) -> &str {
        if self.content_type.is_empty() {
            return "";
        }
        self.content_type.split(';').next().unwrap_or_default().trim_ascii()
    }

    /// Whether it is line protocol, or nothing that is read.
    fn is_line_protocol(&self) -> bool {
        let essence = self.essence();
        let is_json = || matches!(self.text.trim_ascii_start().as_bytes().first(), None | Some(b'[' | b'{'));
        essence.eq_ignore_ascii_case("text/plain") || (essence.is_empty() && !is_json())
    }

    /// The latest time that the payload says.
    pub fn event_time(&self) -> Option<TimeMicros> {
        if self.is_line_protocol() {
            return line::event_time(self);
        }
        let mut latest = None;
        self.read(&mut |_, _, at| latest = latest.max(at));
        latest
    }
}
