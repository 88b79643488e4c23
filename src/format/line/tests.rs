//! What InfluxDB takes is taken, what it refuses is refused with its place, and no text at all is a danger.

use proptest::prelude::*;

use super::*;
use crate::limits::POINT_TAGS_MAX;
use crate::message::check_topic;

/// A point as the tests write it down: measurement, tags, fields, timestamp.
type Shown = (String, Vec<(String, String)>, Vec<(String, String)>, Option<i64>);

fn points(text: &[u8]) -> Result<Vec<PointLine<'_>>, PointError> {
    PointLines::new(text, TimePrecision::Nanoseconds)?.collect()
}

fn shown(point: &PointLine<'_>) -> Shown {
    let tags =
        point.series.tags().map(|(key, value)| (unescape_name(key).into(), unescape_name(value).into()));
    let fields = point.fields().map(|field| {
        let value = match field.value {
            FieldValue::Text(text) => format!("{:?}", FieldValue::unescape_text(text)),
            other => format!("{other:?}"),
        };
        (unescape_name(field.key).into(), value)
    });
    (point.series.measurement.to_owned(), tags.collect(), fields.collect(), point.nanos)
}

fn one(line: &str) -> Shown {
    let points = points(line.as_bytes()).unwrap_or_else(|error| panic!("{line:?}: {error}"));
    assert_eq!(points.len(), 1, "{line:?}");
    shown(&points[0])
}

fn topic_of(line: &str) -> Result<String, PointFault> {
    let points = points(line.as_bytes()).map_err(|error| error.fault)?;
    let mut topic = String::new();
    points[0].series.write_topic(&mut topic);
    Ok(topic)
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn a_line_has_a_measurement_tags_fields_and_a_timestamp() {
    assert_eq!(
        one("cpu,host=a,cpu=cpu0 idle=98.5,user=1i 1700000000000000000"),
        (
            "cpu".into(),
            pairs(&[("host", "a"), ("cpu", "cpu0")]),
            pairs(&[("idle", "Float(98.5)"), ("user", "Integer(1)")]),
            Some(1_700_000_000_000_000_000)
        )
    );
    assert_eq!(one("t v=1"), ("t".into(), vec![], pairs(&[("v", "Float(1.0)")]), None));
    assert_eq!(one("  t   v=1   -5  \r\n").3, Some(-5));
    assert_eq!(one("t v=1\r\n").2, pairs(&[("v", "Float(1.0)")]));
    assert_eq!(one("t v=1\r").2, pairs(&[("v", "Float(1.0)")]));
}

#[test]
fn a_value_has_the_type_that_it_is_written_in() {
    for (written, value) in [
        ("1", "Float(1.0)"),
        ("-1.5e-3", "Float(-0.0015)"),
        ("+2", "Float(2.0)"),
        ("1.", "Float(1.0)"),
        (".5", "Float(0.5)"),
        ("1E3", "Float(1000.0)"),
        ("-0", "Float(-0.0)"),
        ("9223372036854775807i", "Integer(9223372036854775807)"),
        ("-9223372036854775808i", "Integer(-9223372036854775808)"),
        ("18446744073709551615u", "Unsigned(18446744073709551615)"),
        ("t", "Boolean(true)"),
        ("TRUE", "Boolean(true)"),
        ("True", "Boolean(true)"),
        ("f", "Boolean(false)"),
        ("false", "Boolean(false)"),
        ("\"\"", "\"\""),
        ("\"a b,c=d\"", "\"a b,c=d\""),
        ("\"a\\\"b\\\\c\\d\"", "\"a\\\"b\\\\c\\\\d\""),
        ("\"two\nlines\"", "\"two\\nlines\""),
        ("\"°C 温度\"", "\"°C 温度\""),
    ] {
        assert_eq!(one(&format!("t v={written},w=1i 7")).2[0], ("v".into(), value.into()), "{written}");
        assert_eq!(one(&format!("t v={written}")).2, pairs(&[("v", value)]), "{written}");
    }
}

#[test]
fn a_backslash_escapes_what_would_end_a_name_and_nothing_else() {
    let (_, tags, fields, _) = one(r"m\,x\ y,a\,b\=c\ d=e\,f\=g\ h k\,l\=m\ n=1");
    assert_eq!(tags, pairs(&[("a,b=c d", "e,f=g h")]));
    assert_eq!(fields, pairs(&[("k,l=m n", "Float(1.0)")]));
    assert_eq!(topic_of(r"m\,x\ y v=1").as_deref(), Ok("m,x%20y"));
    let (_, tags, _, _) = one(r"m,path=C:\dir\new,q=\\x v=1");
    assert_eq!(tags, pairs(&[("path", r"C:\dir\new"), ("q", r"\\x")]));
    // Quotes mean nothing outside of a value.
    assert_eq!(one("m,a=\"b v=1").1, pairs(&[("a", "\"b")]));
    assert_eq!(one("m \"v\"=1").2, pairs(&[("\"v\"", "Float(1.0)")]));
    assert_eq!(one("m=n v=1").0, "m=n");
}

#[test]
fn blank_lines_and_comments_are_no_points() {
    let text = b"\n# a comment, with a=b c\n\r\n \t\na v=1\n  # another\nb v=\"x\ny\"\n\nc v=1\n#";
    let points = points(text).expect("points");
    let found: Vec<_> = points.iter().map(|point| (point.number, point.text)).collect();
    assert_eq!(found, [(5, "a v=1"), (7, "b v=\"x\ny\""), (10, "c v=1")]);
    for empty in ["", "\n\n", "#", "# x\n#y", " \r\n"] {
        assert_eq!(super::tests::points(empty.as_bytes()), Ok(vec![]), "{empty:?}");
    }
}

#[test]
fn a_line_that_is_none_is_refused_with_its_place() {
    use PointFault::*;
    for (text, fault, line, column) in [
        (",a=b v=1", NoMeasurement, 1, 1),
        ("m", NoFields, 1, 2),
        ("m ", NoFields, 1, 3),
        ("m \r\n", NoFields, 1, 4),
        ("m\nn v=1", NoFields, 1, 2),
        ("m,a=b", NoFields, 1, 6),
        ("m, v=1", NoTagKey, 1, 3),
        ("m,a=b, v=1", NoTagKey, 1, 7),
        ("m,=b v=1", NoTagKey, 1, 3),
        ("m,a v=1", NoTagKey, 1, 4),
        ("m,a=,b=c v=1", NoTagValue, 1, 5),
        ("m,a= v=1", NoTagValue, 1, 5),
        ("m,a=b=c v=1", TagEquals, 1, 6),
        ("m,a=1,b=2,a=3 v=1", TagTwice, 1, 11),
        ("m,b=1,a=1,a=1,b=1 v=1", TagTwice, 1, 11),
        ("m v", NoFieldKey, 1, 4),
        ("m =1", NoFieldKey, 1, 3),
        ("m v=1,", NoFieldKey, 1, 7),
        ("m v=1, 17", NoFieldKey, 1, 7),
        ("m v=1,,w=2", NoFieldKey, 1, 7),
        ("m v=", NoFieldValue, 1, 5),
        ("m v=,w=1", NoFieldValue, 1, 5),
        ("ok v=1\nm v=\"abc\ndef", OpenString, 2, 5),
        ("m v=\"abc\"d", BehindString, 1, 10),
        ("m v=\"a\" \"b\"", NoTimestamp, 1, 9),
        ("m v=yes", NoValue, 1, 5),
        ("m v=nan", NoValue, 1, 5),
        ("m v=inf", NoValue, 1, 5),
        ("m v=-Infinity", NoValue, 1, 5),
        ("m v=1x", NoValue, 1, 5),
        ("m v=0x1f", NoValue, 1, 5),
        ("m v=1.5i", NoValue, 1, 5),
        ("m v=i", NoValue, 1, 5),
        ("m v=.", NoValue, 1, 5),
        ("m v=-", NoValue, 1, 5),
        ("m v=1e400", NumberRange, 1, 5),
        ("m v=9223372036854775808i", NumberRange, 1, 5),
        ("m v=-1u", NumberRange, 1, 5),
        ("m v=18446744073709551616u", NumberRange, 1, 5),
        ("m v=1 1.5", NoTimestamp, 1, 7),
        ("m v=1 x", NoTimestamp, 1, 7),
        ("m v=1 -", NoTimestamp, 1, 7),
        ("m v=1 +5", NoTimestamp, 1, 7),
        ("m v=1 9223372036854775808", TimestampRange, 1, 7),
        ("m v=1 5 6", BehindTimestamp, 1, 9),
        ("m v=1\rw=2", NoTimestamp, 1, 6),
        ("a v=1\n\n# c\nb v=2 3\n  c v=x\nd v=1", NoValue, 5, 7),
    ] {
        let error = points(text.as_bytes()).expect_err(text);
        assert_eq!((error.fault, error.line, error.column), (fault, line, column), "{text:?}");
    }
    for (bytes, line, column) in [(&b"\xff"[..], 1, 1), (b"a v=1\nb,c=\xc3 v=1", 2, 5)] {
        let error = points(bytes).expect_err("not UTF-8");
        assert_eq!((error.fault, error.line, error.column), (NotText, line, column));
    }
}

#[test]
fn after_a_line_that_is_none_there_are_no_points() {
    let mut lines = PointLines::new(b"a v=1\nb\nc v=1", TimePrecision::Seconds).expect("text");
    assert!(lines.next().is_some_and(|point| point.is_ok()));
    assert!(lines.next().is_some_and(|point| point.is_err()));
    assert_eq!(lines.next(), None);
}

#[test]
fn the_topic_of_a_point_is_its_series() {
    for (line, topic) in [
        ("cpu v=1", "cpu"),
        ("cpu,host=a,cpu=0 v=1", "cpu/cpu=0/host=a"),
        ("cpu,cpu=0,host=a w=2 9", "cpu/cpu=0/host=a"),
        ("hall/press v=1", "hall/press"),
        ("disk,path=/var/log,device=sda1 v=1", "disk/device=sda1/path=%2Fvar%2Flog"),
        ("a=b,c=d v=1", "a%3Db/c=d"),
        (r"m,a\=b=c\=d v=1", "m/a%3Db=c%3Dd"),
        (r"m,t=50%\ +#x v=1", "m/t=50%25%20%2B%23x"),
        ("$SYS,a=$b v=1", "%24SYS/a=$b"),
        ("*,a=> v=1", "%2A/a=%3E"),
        ("m,t=a\tb v=1", "m/t=a%09b"),
        ("temperatur,raum=Küche v=1", "temperatur/raum=Küche"),
    ] {
        assert_eq!(topic_of(line).as_deref(), Ok(topic), "{line}");
        assert_eq!(check_topic(topic), Ok(()), "{line}");
    }
}

#[test]
fn a_point_has_as_many_tags_as_a_topic_has_room_for_and_no_more() {
    let line = |tags: usize| {
        let tags: String = (0..tags).map(|n| format!(",t{n}={n}")).collect();
        format!("m{tags} v=1")
    };
    let topic = topic_of(&line(POINT_TAGS_MAX)).expect("a topic");
    assert_eq!(check_topic(&topic), Ok(()));
    assert_eq!(topic_of(&line(POINT_TAGS_MAX + 1)), Err(PointFault::TooManyTags));
}

#[test]
fn very_long_parts_take_no_longer_than_their_bytes() {
    let long = "x".repeat(1 << 20);
    let escapes = "\\\\\\,".repeat(1 << 18);
    for line in [
        format!("{long} v=1"),
        format!("m,t={long} v=1"),
        format!("m v=\"{long}\""),
        format!("m v=\"{escapes}\""),
        format!("{escapes} v=1"),
        format!("m,t={escapes} v=1"),
        format!("m {}v=1", "v=1,".repeat(1 << 18)),
        "m v=1\n".repeat(1 << 17),
    ] {
        assert!(points(line.as_bytes()).is_ok());
    }
    let (quotes, escapes) = ("\"".repeat(1 << 20), "\\".repeat(1 << 20));
    for broken in [format!("m v={quotes}"), format!("m v=\"{escapes}"), format!("m v={long}"), long] {
        assert!(points(broken.as_bytes()).is_err());
    }
}

#[test]
fn a_precision_is_named_in_every_version_s_way_and_kept_in_the_media_type() {
    let point_at = |timestamp: i64, precision| {
        let line = format!("m v=1 {timestamp}");
        let mut lines = PointLines::new(line.as_bytes(), precision).expect("text");
        lines.next().expect("a line").map(|point| point.micros()).map_err(|error| error.fault)
    };
    for (names, precision, micros) in [
        (&["ns", "n", "nanosecond"][..], TimePrecision::Nanoseconds, 1),
        (&["us", "u", "microsecond"], TimePrecision::Microseconds, 1_500),
        (&["ms", "millisecond"], TimePrecision::Milliseconds, 1_500_000),
        (&["s", "second"], TimePrecision::Seconds, 1_500_000_000),
        (&["m"], TimePrecision::Minutes, 90_000_000_000),
        (&["h"], TimePrecision::Hours, 5_400_000_000_000),
    ] {
        for name in names {
            assert_eq!(TimePrecision::parse(name), Some(precision), "{name}");
        }
        assert_eq!(point_at(1_500, precision), Ok(Some(micros)), "{precision:?}");
        assert_eq!(TimePrecision::from_media_type(precision.media_type()), Ok(Some(precision)));
    }
    for other in ["", "S", "sec", "d", "ns "] {
        assert_eq!(TimePrecision::parse(other), None, "{other:?}");
    }
    let of = TimePrecision::from_media_type;
    assert_eq!(of("Text/Plain;charset=utf-8 ; Precision=\"s\""), Ok(Some(TimePrecision::Seconds)));
    for none in ["", "text/plain", "text/plain; charset=utf-8", "text/html; precision=s", "application/json"]
    {
        assert_eq!(of(none), Ok(None), "{none}");
    }
    assert_eq!(of("text/plain; precision=day"), Err("day"));
    assert_eq!(point_at(-1, TimePrecision::Nanoseconds), Ok(Some(-1)));
    assert_eq!(point_at(9_223_372_036, TimePrecision::Seconds), Ok(Some(9_223_372_036_000_000)));
    assert_eq!(point_at(9_223_372_037, TimePrecision::Seconds), Err(PointFault::TimestampRange));
    assert_eq!(point_at(i64::MIN, TimePrecision::Hours), Err(PointFault::TimestampRange));
}

/// A name, with everything in it that means something.
fn name() -> impl Strategy<Value = String> {
    "[ab,= \\\\\"#/+%$é]{1,6}"
        // A backslash before what is escaped cannot be written, nor one at the end.
        .prop_filter("cannot be written", |name| {
            !name.ends_with('\\') && !["\\,", "\\=", "\\ "].iter().any(|pair| name.contains(pair))
        })
}

fn escape(name: &str, escaped: &[char]) -> String {
    name.chars().fold(String::new(), |mut out, c| {
        if escaped.contains(&c) {
            out.push('\\');
        }
        out.push(c);
        out
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(
        measurement in name().prop_filter("a comment", |name| !name.starts_with('#')),
        tags in prop::collection::btree_map(name(), name(), 0..5),
        fields in prop::collection::vec((name(), "[ab\\\\\", =\n\ré]{0,6}", any::<i64>(), any::<f64>()), 1..4),
        timestamp in prop::option::of(any::<i64>()),
    ) {
        let mut line = escape(&measurement, &[',', ' ']);
        let of_name = |name: &str| escape(name, &[',', '=', ' ']);
        for (key, value) in &tags {
            line += &format!(",{}={}", of_name(key), of_name(value));
        }
        let (mut written, mut expected) = (Vec::new(), Vec::new());
        for (key, text, integer, float) in fields {
            let float = if float.is_finite() { float } else { 0.5 };
            written.push(format!("{}=\"{}\",i={integer}i,f={float:e}", of_name(&key), escape(&text, &['"', '\\'])));
            expected.push((key, format!("{text:?}")));
            expected.push(("i".into(), format!("Integer({integer})")));
            expected.push(("f".into(), format!("Float({float:?})")));
        }
        line += &format!(" {}", written.join(","));
        if let Some(timestamp) = timestamp {
            line += &format!(" {timestamp}");
        }
        let text = format!("{line}\n{line}\r\n");
        let points = points(text.as_bytes()).expect("points");
        prop_assert_eq!(points.len(), 2);
        for point in &points {
            prop_assert_eq!(point.text, &line);
            let (_, found_tags, found_fields, found_timestamp) = shown(point);
            prop_assert_eq!(found_tags, tags.clone().into_iter().collect::<Vec<_>>());
            prop_assert_eq!(&found_fields, &expected);
            prop_assert_eq!(found_timestamp, timestamp);
        }
        // Two series have two topics.
        let mut topic = String::new();
        points[0].series.write_topic(&mut topic);
        prop_assert_eq!(topic.matches('=').count(), tags.len());
    }

    #[test]
    fn no_bytes_are_a_danger(bytes in prop::collection::vec(
        prop_oneof![any::<u8>(), prop::sample::select(b"m,=\\ \"\n\r#1i.-tu\xc3\xa9".to_vec())], 0..200,
    )) {
        let Ok(lines) = PointLines::new(&bytes, TimePrecision::Nanoseconds) else { return Ok(()) };
        let mut last = 0;
        for point in lines.flatten() {
            prop_assert!(point.number > last);
            last = point.number;
            prop_assert!(point.fields().count() > 0);
            let again = points(point.text.as_bytes()).expect("a point by itself");
            prop_assert_eq!(again.len(), 1);
            prop_assert_eq!(shown(&again[0]), shown(&point));
            let mut topic = String::new();
            point.series.write_topic(&mut topic);
            prop_assert!(!topic.contains(['+', '#', '\n', ' ', '\0']));
        }
    }
}
