//! SenML in JSON (RFC 8428): an array of records, in which the base name, time and value of one hold for those behind it.
//!
//! The key of a value is its name, `bn` and `n` together. `v` (to which `bv` is added), `vs`, `vb` and `vd` are values; a
//! record without one gives none, and neither does a sum. A time of 2^28 seconds and more is one since 1970, a smaller one is
//! relative to the time of receipt, and 0 or none says nothing (section 4.5.3). Units are not read.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{ShapedPayload, ShapedValue, ShapedValueVisitor};
use crate::message::TimeMicros;
use crate::values::event_time::EVENT_TIMES;
use crate::values::samples::MemberName;

/// Its media type (section 12.2).
pub(super) const MEDIA_TYPE: &str = "application/senml+json";
/// From here on a time is absolute, in seconds.
const ABSOLUTE_TIME_S: f64 = 268_435_456.0;

/// `is_announced`: the media type says that it is SenML. Otherwise it has to have names and values, and nothing else.
pub(super) fn read(
    payload: &ShapedPayload<'_>,
    is_announced: bool,
    visit: &mut ShapedValueVisitor<'_>,
) -> bool {
    let may_be = is_announced || payload.text.contains("\"n\"") || payload.text.contains("\"bn\"");
    if !may_be {
        return false;
    }
    // The whole payload is of the shape before any of it is told.
    let mut count = 0;
    walk(payload, is_announced, &mut |_, _, _| count += 1)
        && (is_announced || count > 0)
        && walk(payload, is_announced, visit)
}

fn walk(payload: &ShapedPayload<'_>, is_announced: bool, visit: &mut ShapedValueVisitor<'_>) -> bool {
    let mut json = serde_json::Deserializer::from_str(payload.text);
    let pack = SenmlPack { received_at: payload.received_at, is_announced, visit };
    json.deserialize_seq(pack).and_then(|()| json.end()).is_ok()
}

/// One record, as it is written.
#[derive(Default)]
struct SenmlRecord<'a> {
    base_name: Option<Cow<'a, str>>,
    base_time: Option<f64>,
    base_value: Option<f64>,
    name: Option<Cow<'a, str>>,
    time: Option<f64>,
    value: Option<SenmlValue<'a>>,
    /// Has members that RFC 8428 does not know.
    is_extended: bool,
}

enum SenmlValue<'a> {
    Number(&'a RawValue),
    Text(Cow<'a, str>),
    Boolean(bool),
}

impl<'a> Deserialize<'a> for SenmlRecord<'a> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(SenmlRecordVisitor)
    }
}

struct SenmlRecordVisitor;

impl<'a> Visitor<'a> for SenmlRecordVisitor {
    type Value = SenmlRecord<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a SenML record")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut members: A) -> Result<SenmlRecord<'a>, A::Error> {
        let mut record = SenmlRecord::default();
        while let Some(MemberName(member)) = members.next_key::<MemberName<'a>>()? {
            let value = match &*member {
                "bn" => {
                    record.base_name = Some(members.next_value::<MemberName<'a>>()?.0);
                    continue;
                }
                "n" => {
                    record.name = Some(members.next_value::<MemberName<'a>>()?.0);
                    continue;
                }
                "bt" => {
                    record.base_time = Some(members.next_value()?);
                    continue;
                }
                "t" => {
                    record.time = Some(members.next_value()?);
                    continue;
                }
                "bv" => {
                    record.base_value = Some(members.next_value()?);
                    continue;
                }
                "v" => {
                    let number: &RawValue = members.next_value()?;
                    number.get().parse::<f64>().map_err(Error::custom)?;
                    SenmlValue::Number(number)
                }
                "vs" | "vd" => SenmlValue::Text(members.next_value::<MemberName<'a>>()?.0),
                "vb" => SenmlValue::Boolean(members.next_value()?),
                known => {
                    // A name with "_" at its end has to be understood (section 4.4).
                    if known.ends_with('_') {
                        return Err(Error::custom("a member that has to be understood"));
                    }
                    record.is_extended |= !matches!(known, "bu" | "bs" | "bver" | "u" | "s" | "ut");
                    members.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            // Only one value is one (section 4.2).
            if record.value.replace(value).is_some() {
                return Err(Error::custom("two values"));
            }
        }
        Ok(record)
    }
}

struct SenmlPack<'r, 'v> {
    received_at: TimeMicros,
    is_announced: bool,
    visit: &'r mut ShapedValueVisitor<'v>,
}

impl<'a> Visitor<'a> for SenmlPack<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a SenML pack")
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut pack: A) -> Result<(), A::Error> {
        let (mut base_name, mut base_time, mut base_value) = (Cow::Borrowed(""), 0.0, 0.0);
        while let Some(record) = pack.next_element::<SenmlRecord<'a>>()? {
            if record.is_extended && !self.is_announced {
                return Err(Error::custom("members of something else"));
            }
            base_name = record.base_name.unwrap_or(base_name);
            base_time = record.base_time.unwrap_or(base_time);
            base_value = record.base_value.unwrap_or(base_value);
            let Some(value) = record.value else { continue };
            let name = record.name.unwrap_or_default();
            let key: Cow<'_, str> = match (&*base_name, &*name) {
                ("", "") => return Err(Error::custom("a value without a name")),
                ("", name) | (name, "") => Cow::Borrowed(name),
                (base, name) => Cow::Owned(format!("{base}{name}")),
            };
            let at = time_of(base_time + record.time.unwrap_or(0.0), self.received_at);
            let value = match &value {
                SenmlValue::Number(number) if base_value == 0.0 => ShapedValue::Json(number.get()),
                SenmlValue::Number(number) => {
                    ShapedValue::Number(base_value + number.get().parse::<f64>().map_err(Error::custom)?)
                }
                SenmlValue::Text(text) => ShapedValue::Text(text),
                SenmlValue::Boolean(is_on) => ShapedValue::Boolean(*is_on),
            };
            (self.visit)(&key, value, at);
        }
        Ok(())
    }
}

/// The time that a number of seconds says (section 4.5.3).
fn time_of(seconds: f64, received_at: TimeMicros) -> Option<TimeMicros> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "what is out of range saturates, and is no time then"
    )]
    let micros = (seconds * 1e6).round() as i64;
    let at = match seconds {
        0.0 => None,
        _ if seconds >= ABSOLUTE_TIME_S => Some(micros),
        _ => received_at.checked_add(micros),
    };
    at.filter(|at| seconds.is_finite() && EVENT_TIMES.contains(at))
}
