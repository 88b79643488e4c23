//! What is read of each shape, and what is of none.

use proptest::prelude::*;

use super::*;

const RECEIVED: TimeMicros = 1_795_426_119_000_000;

fn read_on(topic: &str, content_type: &str, text: &str) -> Option<Vec<(String, String, Option<TimeMicros>)>> {
    let mut found = Vec::new();
    let payload = ShapedPayload { topic, content_type, text, received_at: RECEIVED };
    let is_shaped = payload.read(&mut |key, value, at| found.push((key.to_owned(), value.to_json(), at)));
    assert!(is_shaped || found.is_empty(), "{text:?}");
    assert_eq!(payload.event_time(), found.iter().filter_map(|(.., at)| *at).max(), "{text:?}");
    is_shaped.then_some(found)
}

fn read(content_type: &str, text: &str) -> Option<Vec<(String, String, Option<TimeMicros>)>> {
    read_on("data", content_type, text)
}

fn values(of: &[(&str, &str, Option<TimeMicros>)]) -> Option<Vec<(String, String, Option<TimeMicros>)>> {
    Some(of.iter().map(|&(key, value, at)| (key.to_owned(), value.to_owned(), at)).collect())
}

#[test]
fn the_fields_of_a_line_are_values_of_its_time() {
    let line = r#"cpu,host=a idle=98.50,n=-3i,big=18446744073709551615u,on=t,x=+1,y=.5,z=7.,note="a \"b\"",e=1e3 1795426119001"#;
    let at = Some(1_795_426_119_001_000);
    let expected = values(&[
        ("idle", "98.50", at),
        ("n", "-3", at),
        ("big", "18446744073709551615", at),
        ("on", "true", at),
        ("x", "1.0", at),
        ("y", "0.5", at),
        ("z", "7.0", at),
        ("note", r#""a \"b\"""#, at),
        ("e", "1e3", at),
    ]);
    assert_eq!(read_on("cpu/host=a", "text/plain; precision=ms", line), expected);
    assert_eq!(read_on("east/cpu/host=a", "text/plain; precision=ms", line), expected);
    assert_eq!(read_on("t", "text/plain; precision=s", "t v=1"), values(&[("v", "1", None)]));
}

#[test]
fn lines_of_many_series_on_one_topic_stay_apart() {
    let lines = "cpu,host=a v=1 5\ncpu,host=b v=2 6\n";
    let expected = values(&[("cpu/host=a/v", "1", Some(5_000_000)), ("cpu/host=b/v", "2", Some(6_000_000))]);
    assert_eq!(read_on("telegraf", "text/plain; precision=s", lines), expected);
    // What ends like a series is not it.
    let one = values(&[("cpu/host=a/v", "1", Some(5_000_000))]);
    assert_eq!(read_on("xcpu/host=a", "text/plain; precision=s", "cpu,host=a v=1 5"), one);
}

#[test]
fn line_protocol_is_told_by_its_media_type_or_by_itself() {
    let at = Some(1_795_426_119_000_000);
    for content_type in ["", "text/plain", "text/plain; charset=utf-8", "text/plain; precision=ns"] {
        let expected = values(&[("t/v", "1", at)]);
        assert_eq!(read(content_type, "t v=1 1795426119000000000\n"), expected, "{content_type}");
    }
    for (content_type, text) in [
        ("application/octet-stream", "t v=1"),
        ("text/plain; precision=day", "t v=1"),
        ("", "21.5"),
        ("", "hello there"),
        ("", "t v=1\nhello"),
        ("text/plain; precision=s", "t v=1\nhello"),
        ("text/plain; precision=s", ""),
        ("text/plain; precision=s", "# t v=1"),
    ] {
        assert_eq!(read(content_type, text), None, "{content_type} {text:?}");
    }
}

#[test]
fn telemetry_of_thingsboard_has_a_time_for_its_values() {
    let text =
        r#" {"ts": 1795426119001, "values": {"temp": 21.50, "on": true, "\u0061": "b", "o": {"x": [1]}}} "#;
    let at = Some(1_795_426_119_001_000);
    let expected =
        values(&[("temp", "21.50", at), ("on", "true", at), ("a", "\"b\"", at), ("o", "{\"x\": [1]}", at)]);
    for content_type in ["", "application/json", "application/octet-stream"] {
        assert_eq!(read(content_type, text), expected, "{content_type}");
    }
    let list = r#"[{"ts": 1, "values": {"t": 1}}, {"values": {"t": 2, "u": 3}, "ts": -2}]"#;
    let expected = values(&[("t", "1", Some(1_000)), ("t", "2", Some(-2_000)), ("u", "3", Some(-2_000))]);
    assert_eq!(read("application/json", list), expected);
    let spaced =
        "[\n\t{\r\n\"ts\" : 1\t, \"values\" : {\"t\":1}} , { \"values\":{\"t\":2,\"u\":3},\"ts\":-2}\n]";
    assert_eq!(read("", spaced), expected);
    let reversed = " { \"values\" : {\"t\" : 2, \"u\": 3} , \"ts\" : -2 }";
    assert_eq!(read("", reversed).as_deref(), expected.as_ref().map(|all| &all[1..]));
    for other in [
        r#"{"ts": 1, "values": {"t": 1}, "more": 2}"#,
        r#"{"ts": 1, "values": [1]}"#,
        r#"{"ts": 1, "values": 1}"#,
        r#"{"ts": "1", "values": {"t": 1}}"#,
        r#"{"ts": 1.5, "values": {"t": 1}}"#,
        r#"{"ts": 1, "ts": 2, "values": {"t": 1}}"#,
        r#"{"ts": 9223372036854775807, "values": {"t": 1}}"#,
        r#"{"ts": 1}"#,
        r#"{"ts": 1, "values": {"t": 1}} x"#,
        r#"{"ts": 1, "values": {"t": 1}"#,
        r#"[{"ts": 1, "values": {"t": 1}}, {"t": "\"ts\" \"values\""}]"#,
        r#"[{"ts": 1, "values": {"t": 1}}, 2]"#,
        r#"[{"ts": 1, "values": {"t": 1}}, {"ts": 2, "values": 3}]"#,
        r#"[{"ts": 1, "values": {"t": 1}}"#,
        r#"{"t": 1}"#,
    ] {
        assert_eq!(read("", other), None, "{other}");
    }
}

/// The examples of RFC 8428, section 5.1.
#[test]
fn senml_resolves_names_times_and_values() {
    let single = r#"[{"n":"urn:dev:ow:10e2073a01080063","u":"Cel","v":23.1}]"#;
    for content_type in ["application/senml+json", "Application/SenML+JSON; x=y", "", "application/json"] {
        let expected = values(&[("urn:dev:ow:10e2073a01080063", "23.1", None)]);
        assert_eq!(read(content_type, single), expected, "{content_type}");
    }
    let multiple = r#"[
        {"bn":"urn:dev:ow:10e2073a0108006:","bt":1.276020076001e+09,"bu":"A","bver":5,"n":"voltage","u":"V","v":120.1},
        {"n":"current","t":-5,"v":1.2},
        {"n":"current","t":-4.5,"v":1.3},
        {"n":"on","vb":true},
        {"n":"note","vs":"a\"b"},
        {"n":"data","vd":"aGkgCg"},
        {"n":"sum","s":2}
    ]"#;
    let bn = |name: &str| format!("urn:dev:ow:10e2073a0108006:{name}");
    let at = |micros: i64| Some(1_276_020_076_001_000 + micros);
    let expected: Vec<_> = [
        ("voltage", "120.1", at(0)),
        ("current", "1.2", at(-5_000_000)),
        ("current", "1.3", at(-4_500_000)),
        ("on", "true", at(0)),
        ("note", r#""a\"b""#, at(0)),
        ("data", r#""aGkgCg""#, at(0)),
    ]
    .map(|(name, value, at)| (bn(name), value.to_owned(), at))
    .into();
    assert_eq!(read("application/senml+json", multiple), Some(expected));
}

#[test]
fn a_time_of_senml_is_absolute_relative_or_none() {
    for (text, at) in [
        (r#"[{"n":"a","v":1}]"#, None),
        (r#"[{"n":"a","v":1,"t":0}]"#, None),
        (r#"[{"n":"a","v":1,"t":-5}]"#, Some(RECEIVED - 5_000_000)),
        (r#"[{"n":"a","v":1,"t":5.25}]"#, Some(RECEIVED + 5_250_000)),
        (r#"[{"n":"a","v":1,"t":268435455}]"#, Some(RECEIVED + 268_435_455_000_000)),
        (r#"[{"n":"a","v":1,"t":268435456}]"#, Some(268_435_456_000_000)),
        (r#"[{"bt":268435456,"n":"a","v":1,"t":-1}]"#, Some(RECEIVED + 268_435_455_000_000)),
        (r#"[{"bt":1795426119},{"n":"a","v":1,"t":1}]"#, Some(RECEIVED + 1_000_000)),
        (r#"[{"n":"a","v":1,"t":1e300}]"#, None),
        (r#"[{"n":"a","v":1,"t":-1e300}]"#, None),
    ] {
        assert_eq!(read("", text), values(&[("a", "1", at)]), "{text}");
    }
}

#[test]
fn base_fields_of_senml_hold_until_others_come() {
    let text = r#"[{"bn":"a/","bv":20,"n":"t","v":1.5},{"n":"u","v":-1},{"bn":"","bv":0,"n":"b","v":7},{"bn":"c","v":8}]"#;
    let expected =
        values(&[("a/t", "21.5", None), ("a/u", "19.0", None), ("b", "7", None), ("c", "8", None)]);
    assert_eq!(read("application/senml+json", text), expected);
}

#[test]
fn what_is_not_wholly_senml_is_none() {
    for text in [
        r#"[{"v":1}]"#,
        r#"[{"n":"a","v":1},{"n":"","v":1}]"#,
        r#"[{"n":"a","v":1,"vs":"x"}]"#,
        r#"[{"n":"a","v":1,"v":2}]"#,
        r#"[{"n":"a","v":"1"}]"#,
        r#"[{"n":"a","v":null}]"#,
        r#"[{"n":"a","v":1,"must_":1}]"#,
        r#"[{"n":1,"v":1}]"#,
        r#"[{"n":"a","v":1},2]"#,
        r#"[{"n":"a","v":1}"#,
        r#"[{"n":"a","v":1}] x"#,
        r#"{"n":"a","v":1}"#,
        "7",
        "",
    ] {
        for content_type in ["application/senml+json", "application/json", ""] {
            assert_eq!(read(content_type, text), None, "{content_type} {text}");
        }
    }
    // Only who says so has members that others do not know.
    let extended = r#"[{"n":"a","v":1,"more":2}]"#;
    assert_eq!(read("application/senml+json", extended), values(&[("a", "1", None)]));
    assert_eq!(read("application/json", extended), None);
    assert_eq!(read("application/json", r#"[{"n":"a"}]"#), None, "it has no value");
    assert_eq!(read("application/senml+json", r#"[{"n":"a"}]"#), Some(Vec::new()));
}

proptest! {
    #[test]
    fn no_text_is_a_danger(
        content_type in prop::sample::select(vec![
            "", "application/json", "application/senml+json", "text/plain; precision=s", "x/y",
        ]),
        text in r#"([\[\]{},: ]|"(ts|values|n|bn|t|v|vs|vb|bt|bv|x_)"|-?[0-9]{1,3}|1e308|true|"x"|m,a=b v=1\n){0,24}"#,
    ) {
        read(content_type, &text);
    }
}
