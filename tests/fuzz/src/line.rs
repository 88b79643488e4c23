//! Line protocol: a text is points or is refused at a place in it, and what is a point is the same point by itself.

use headgate_format::limits::POINT_TAGS_MAX;
use headgate_format::line::{FieldValue, PointError, PointLine, PointLines, TimePrecision, unescape_name};

/// Tries bytes as line protocol, and as a string, a tag and a name within a line that is otherwise good.
pub fn run(data: &[u8]) {
    let (&first, text) = data.split_first().unwrap_or((&0, data));
    let precision = TimePrecision::ALL[usize::from(first) % TimePrecision::ALL.len()];
    read(text, precision);
    if let Ok(text) = std::str::from_utf8(text) {
        let _ = TimePrecision::from_media_type(text);
        let name = text.replace('\\', "").replace(['\n', '\r'], " ");
        if !name.is_empty() {
            write_and_read(&name, text);
        }
    }
}

fn read(text: &[u8], precision: TimePrecision) {
    let lines = match PointLines::new(text, precision) {
        Ok(lines) => lines,
        Err(error) => return check_place(text, error),
    };
    let mut last = 0;
    for point in lines {
        match point {
            Ok(point) => {
                assert!(point.number > last, "lines go forwards");
                last = point.number;
                check_point(&point, precision);
            }
            Err(error) => check_place(text, error),
        }
    }
}

/// The place of an error is in the text, or right behind it.
fn check_place(text: &[u8], error: PointError) {
    let line = text.split(|&b| b == b'\n').nth(error.line as usize - 1).expect("the line is there");
    assert!((1..=line.len() + 1).contains(&error.column), "{error}");
}

fn check_point(point: &PointLine<'_>, precision: TimePrecision) {
    let mut again = PointLines::new(point.text.as_bytes(), precision).expect("it is text");
    let alone = again.next().expect("there is a line").expect("it is a point");
    assert!(again.next().is_none());
    assert_eq!((alone.series, alone.nanos), (point.series, point.nanos));
    assert!(point.fields().eq(alone.fields()));
    assert!(point.fields().next().is_some());
    for field in point.fields() {
        assert!(!unescape_name(field.key).is_empty());
        match field.value {
            FieldValue::Float(number) => assert!(number.is_finite()),
            FieldValue::Text(text) => assert!(FieldValue::unescape_text(text).len() <= text.len()),
            _ => {}
        }
    }
    let tags = point.series.tags().count();
    assert!(tags <= POINT_TAGS_MAX);
    let mut topic = String::new();
    point.series.write_topic(&mut topic);
    assert!(topic.bytes().all(|b| b > b' ' && !b"+#*>\x7f".contains(&b)) && !topic.starts_with('$'));
    assert_eq!(topic.matches('=').count(), tags, "as many as there are tags, each in a level of its own");
}

/// A name and a text come out as they went in.
fn write_and_read(name: &str, text: &str) {
    let escape = |name: &str| name.replace(',', "\\,").replace('=', "\\=").replace(' ', "\\ ");
    let string = text.replace('\\', "\\\\").replace('"', "\\\"");
    let line = format!("m,{0}={0} {0}=1i,s=\"{string}\" 7", escape(name));
    let mut lines = PointLines::new(line.as_bytes(), TimePrecision::Seconds).expect("it is text");
    let point = lines.next().expect("there is a line").expect("it is a point");
    let (key, value) = point.series.tags().next().expect("there is a tag");
    assert_eq!((&*unescape_name(key), &*unescape_name(value)), (name, name));
    let fields: Vec<_> = point.fields().collect();
    assert_eq!((&*unescape_name(fields[0].key), fields[0].value), (name, FieldValue::Integer(1)));
    let FieldValue::Text(found) = fields[1].value else { panic!("a string") };
    assert_eq!(FieldValue::unescape_text(found), text);
    assert_eq!((fields.len(), point.nanos), (2, Some(7_000_000_000)));
}
