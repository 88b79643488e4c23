//! ThingsBoard's telemetry: `{"ts": 1795426119000, "values": {"temp": 21.5}}`, the time in milliseconds since 1970, or an
//! array of those. Each member of `values` is a value.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{ShapedPayload, ShapedValue, ShapedValueVisitor};
use crate::message::TimeMicros;
use crate::values::event_time::EVENT_TIMES;
use crate::values::samples::MemberName;

pub(super) fn read(payload: &ShapedPayload<'_>, visit: &mut ShapedValueVisitor<'_>) -> bool {
    if !may_be_telemetry(payload.text.as_bytes()) {
        return false;
    }
    // The whole payload is of the shape before any of it is told.
    walk(payload.text, &mut |_, _, _| {}) && walk(payload.text, visit)
}

/// Whether a payload begins as telemetry does: most JSON does not, and is told from it by its first members alone.
pub(super) fn may_be_telemetry(payload: &[u8]) -> bool {
    let payload = payload.trim_ascii_start();
    let payload = payload.strip_prefix(b"[").unwrap_or(payload).trim_ascii_start();
    let Some(members) = payload.strip_prefix(b"{") else { return false };
    let members = members.trim_ascii_start();
    if !matches!(members, [b'"', b't' | b'v', ..]) {
        return false;
    }
    let Some(time) = members.strip_prefix(b"\"ts\"") else { return members.starts_with(b"\"values\"") };
    let Some(time) = time.trim_ascii_start().strip_prefix(b":") else { return false };
    let time = time.trim_ascii_start();
    let digits = time.iter().take_while(|byte| matches!(byte, b'-' | b'0'..=b'9')).count();
    let Some(behind) = time[digits..].trim_ascii_start().strip_prefix(b",") else { return false };
    behind.trim_ascii_start().starts_with(b"\"values\"")
}

fn walk(text: &str, visit: &mut ShapedValueVisitor<'_>) -> bool {
    let mut json = serde_json::Deserializer::from_str(text);
    let read = match text.trim_ascii_start().starts_with('[') {
        true => json.deserialize_seq(TelemetryList { visit }),
        false => TelemetryRecord::deserialize(&mut json).and_then(|record| record.visit(visit)),
    };
    read.and_then(|()| json.end()).is_ok()
}

/// One time, and what was measured then.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TelemetryRecord<'a> {
    ts: i64,
    #[serde(borrow)]
    values: &'a RawValue,
}

impl TelemetryRecord<'_> {
    fn visit(&self, visit: &mut ShapedValueVisitor<'_>) -> Result<(), serde_json::Error> {
        let at = self.ts.checked_mul(1_000).filter(|at| EVENT_TIMES.contains(at));
        let at = at.ok_or_else(|| Error::custom("no time"))?;
        serde_json::Deserializer::from_str(self.values.get()).deserialize_map(TelemetryValues { at, visit })
    }
}

struct TelemetryList<'r, 'v> {
    visit: &'r mut ShapedValueVisitor<'v>,
}

impl<'a> Visitor<'a> for TelemetryList<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of telemetry")
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(one) = list.next_element::<TelemetryRecord<'a>>()? {
            one.visit(self.visit).map_err(Error::custom)?;
        }
        Ok(())
    }
}

struct TelemetryValues<'r, 'v> {
    at: TimeMicros,
    visit: &'r mut ShapedValueVisitor<'v>,
}

impl<'a> Visitor<'a> for TelemetryValues<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut values: A) -> Result<(), A::Error> {
        while let Some((MemberName(key), value)) = values.next_entry::<MemberName<'a>, &'a RawValue>()? {
            (self.visit)(&key, ShapedValue::Json(value.get()), Some(self.at));
        }
        Ok(())
    }
}
