//! Line protocol: each field of each line is a value, of the line's time.
//!
//! The key is that of the field where the topic is the line's series, as it is for lines that came over HTTP, or ends with
//! it. Elsewhere one topic may have lines of many series: there the key begins with the series, `cpu/host=a/idle`.

use headgate_format::line::{FieldValue, PointLine, PointLines, TimePrecision, unescape_name};
use serde_json::value::RawValue;

use super::{ShapedPayload, ShapedValue, ShapedValueVisitor};
use crate::message::TimeMicros;

pub(super) fn read(payload: &ShapedPayload<'_>, visit: &mut ShapedValueVisitor<'_>) -> bool {
    let Ok(precision) = TimePrecision::from_media_type(payload.content_type) else { return false };
    let lines = || PointLines::new(payload.text.as_bytes(), precision.unwrap_or_default());
    let (Ok(mut first), Ok(all)) = (lines(), lines()) else { return false };
    let Some(Ok(only)) = first.next() else { return false };
    let mut reader = SeriesReader { topic: payload.topic, series: String::new(), key: String::new(), visit };
    match first.next() {
        // Most are one line.
        None => reader.read_point(&only),
        Some(Ok(_)) if first.all(|point| point.is_ok()) => all.flatten().for_each(|p| reader.read_point(&p)),
        Some(_) => return false,
    }
    true
}

/// The latest time of the lines, if all of them are points.
pub(super) fn event_time(payload: &ShapedPayload<'_>) -> Option<TimeMicros> {
    let precision = TimePrecision::from_media_type(payload.content_type).ok()?;
    let lines = PointLines::new(payload.text.as_bytes(), precision.unwrap_or_default()).ok()?;
    let mut latest = None;
    for point in lines {
        latest = latest.max(point.ok()?.micros());
    }
    latest
}

/// Calls `visit` with the fields of points.
struct SeriesReader<'r, 'v> {
    topic: &'r str,
    /// The topic of the present series.
    series: String,
    key: String,
    visit: &'r mut ShapedValueVisitor<'v>,
}

impl SeriesReader<'_, '_> {
    fn read_point(&mut self, point: &PointLine<'_>) {
        self.series.clear();
        point.series.write_topic(&mut self.series);
        let above = self.topic.strip_suffix(&self.series);
        let is_on_its_topic = above.is_some_and(|above| above.is_empty() || above.ends_with('/'));
        for field in point.fields() {
            let name = unescape_name(field.key);
            self.key.clear();
            if !is_on_its_topic {
                self.key.push_str(&self.series);
                self.key.push('/');
            }
            self.key.push_str(&name);
            let text;
            let value = match field.value {
                // As it is written, if JSON writes it so too.
                FieldValue::Float(_) if serde_json::from_str::<&RawValue>(field.written).is_ok() => {
                    ShapedValue::Json(field.written)
                }
                FieldValue::Float(number) => ShapedValue::Number(number),
                FieldValue::Integer(number) => ShapedValue::Integer(number),
                FieldValue::Unsigned(number) => ShapedValue::Unsigned(number),
                FieldValue::Boolean(is_on) => ShapedValue::Boolean(is_on),
                FieldValue::Text(written) => {
                    text = FieldValue::unescape_text(written);
                    ShapedValue::Text(&text)
                }
            };
            (self.visit)(&self.key, value, point.micros());
        }
    }
}
