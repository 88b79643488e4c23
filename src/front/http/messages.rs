//! Messages of a request: its body split by content type. Each message is exactly the bytes that the
//! client wrote for it.
//!
//! | `Content-Type` | messages |
//! |---|---|
//! | `application/json` | one for each element of an array; any other value is one |
//! | `application/x-ndjson`, `application/ndjson`, `application/jsonl` | one for each line that is not blank |
//! | none, or `application/x-www-form-urlencoded` (what `curl -d` says) | a JSON object or array as `application/json`; anything else is one, as it is |
//! | `text/plain` with a precision, in the query or as its parameter | one for each line that is a point ([`headgate_format::line`]) |
//! | any other | one, as it is |
//!
//! A byte order mark before JSON is taken off (RFC 8259, section 8.1): some editors and libraries write one, and it is no
//! part of the value. A message from a JSON body has the content type `application/json`. A request without any
//! message (`[]`, no line, an empty body where JSON was announced) is malformed, because there would
//! be no offset to answer with. An empty body of any other type is one empty message, as in MQTT.
//!
//! A message from line protocol has the content type `text/plain; precision=…`, with the precision of its request: the line
//! itself does not tell it. Its topic is its series ([`PointSeries::write_topic`]), below the topic that it is posted to, if
//! that is one.

use headgate_format::line::{PointError, PointLines, PointSeries, TimePrecision};
use serde::Deserializer;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::front::problem::Problem;
use crate::limits::HTTP_MESSAGES_MAX;
use crate::observe::cause::Cause;

const JSON_MEDIA_TYPE: &str = "application/json";

/// The messages of one body, borrowed from it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RequestMessages<'a> {
    /// The media type of every message, or empty.
    pub(super) content_type: &'a str,
    /// One payload for each message.
    pub(super) payloads: Vec<&'a [u8]>,
    places: MessagePlaces<'a>,
}

/// How an error names the place of a message in its body.
#[derive(Debug, PartialEq, Eq)]
enum MessagePlaces<'a> {
    Whole,
    Elements,
    Lines(Vec<u32>),
    Points(Vec<(u32, PointSeries<'a>)>),
}

/// The topic of a message, in room that is used again for the next one.
pub(super) struct TopicBuffer<'a> {
    /// The topic that the request names, or the one above those of its points: empty, or with a slash at its end.
    base: &'a str,
    text: String,
    /// The series whose topic is there.
    series: Option<PointSeries<'a>>,
}

impl<'a> TopicBuffer<'a> {
    pub(super) fn new(base: &'a str) -> Self {
        Self { base, text: String::new(), series: None }
    }
}

impl<'a> RequestMessages<'a> {
    /// The bytes of memory that the places of messages in a body may take, while the list of them grows to twice its
    /// size. A body of short lines takes ten times as much.
    pub(super) fn place_bytes_max(body: &[u8], precision: Option<TimePrecision>) -> usize {
        let (bytes_min, place) = match precision {
            // "m v=1\n"
            Some(_) => (6, size_of::<(u32, PointSeries<'_>)>()),
            None => (1, size_of::<u32>()),
        };
        (body.len() / bytes_min + 1).min(HTTP_MESSAGES_MAX) * 2 * (size_of::<&[u8]>() + place)
    }

    /// Splits `body` into messages. `content_type` is as the client sent it, or empty; with a precision the body is line
    /// protocol, whatever it is.
    pub(super) fn split(
        content_type: &'a str,
        precision: Option<TimePrecision>,
        body: &'a [u8],
    ) -> Result<Self, Problem> {
        if let Some(precision) = precision {
            return Self::points(precision, body);
        }
        let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.as_str() {
            JSON_MEDIA_TYPE => Self::json(body),
            "application/x-ndjson" | "application/ndjson" | "application/jsonl" => Self::lines(body),
            "" | "application/x-www-form-urlencoded" => match without_bom(body).trim_ascii_start().first() {
                Some(b'{' | b'[') if is_json(without_bom(body)) => Self::json(body),
                _ => Ok(Self::whole(content_type, body)),
            },
            _ => Ok(Self::whole(content_type, body)),
        }
    }

    /// Adds to `problem` which message it is about, if the body can hold several.
    pub(super) fn locate(&self, index: usize, problem: Problem) -> Problem {
        match &self.places {
            MessagePlaces::Whole => problem,
            MessagePlaces::Elements => problem.with("pointer", format!("/{index}")),
            MessagePlaces::Lines(_) | MessagePlaces::Points(_) => match self.line(index) {
                Some(line) => problem.with("line", line),
                None => problem,
            },
        }
    }

    /// The line of the body that a message begins at, if it is one of lines.
    fn line(&self, index: usize) -> Option<u32> {
        match &self.places {
            MessagePlaces::Whole | MessagePlaces::Elements => None,
            MessagePlaces::Lines(lines) => lines.get(index).copied(),
            MessagePlaces::Points(points) => points.get(index).map(|(line, _)| *line),
        }
    }

    /// The topic of a message.
    pub(super) fn topic<'b>(&self, index: usize, buffer: &'b mut TopicBuffer<'a>) -> &'b str {
        let MessagePlaces::Points(points) = &self.places else { return buffer.base };
        let series = points.get(index).map(|(_, series)| *series);
        if let Some(of_this) = series.filter(|_| series != buffer.series) {
            buffer.text.clear();
            buffer.text.push_str(buffer.base);
            of_this.write_topic(&mut buffer.text);
            buffer.series = series;
        }
        &buffer.text
    }

    /// Translates a JSON pointer within one message into one within the body. In a body of lines the
    /// pointer stays relative to the line, whose number is returned with it.
    pub(super) fn pointer(&self, index: usize, within: &str) -> (String, Option<u32>) {
        match &self.places {
            MessagePlaces::Whole => (within.to_owned(), None),
            MessagePlaces::Elements => (format!("/{index}{within}"), None),
            MessagePlaces::Lines(_) | MessagePlaces::Points(_) => (within.to_owned(), self.line(index)),
        }
    }

    fn whole(content_type: &'a str, body: &'a [u8]) -> Self {
        Self { content_type, payloads: vec![body], places: MessagePlaces::Whole }
    }

    fn json(body: &'a [u8]) -> Result<Self, Problem> {
        let body = without_bom(body);
        if body.trim_ascii_start().first() != Some(&b'[') {
            return match serde_json::from_slice::<&RawValue>(body) {
                Ok(_) => Ok(Self::whole(JSON_MEDIA_TYPE, body)),
                Err(_) if body.trim_ascii().is_empty() => Err(no_message_problem("The body is empty")),
                Err(error) => Err(invalid_json_problem("The body", error.line(), &error)),
            };
        }
        let mut parser = serde_json::Deserializer::from_slice(body);
        let payloads = parser
            .deserialize_seq(ArrayElementsVisitor)
            .and_then(|elements| parser.end().map(|()| elements))
            .map_err(|error| invalid_json_problem("The body", error.line(), &error))?;
        match payloads.len() {
            0 => Err(no_message_problem("The array is empty")),
            n if n > HTTP_MESSAGES_MAX => Err(too_many_messages_problem()),
            _ => Ok(Self { content_type: JSON_MEDIA_TYPE, payloads, places: MessagePlaces::Elements }),
        }
    }

    fn lines(body: &'a [u8]) -> Result<Self, Problem> {
        let mut payloads = Vec::new();
        let mut lines = Vec::new();
        for (number, whole) in (1..).zip(body.split(|&b| b == b'\n')) {
            // Files that each begin with a mark may have been put together.
            let whole = without_bom(whole);
            let line = whole.trim_ascii();
            if line.is_empty() {
                continue;
            }
            if payloads.len() == HTTP_MESSAGES_MAX {
                return Err(too_many_messages_problem());
            }
            serde_json::from_slice::<&RawValue>(whole)
                .map_err(|error| invalid_json_problem(&format!("Line {number}"), number as usize, &error))?;
            payloads.push(line);
            lines.push(number);
        }
        if payloads.is_empty() {
            return Err(no_message_problem("The body has no line with a JSON value"));
        }
        Ok(Self { content_type: JSON_MEDIA_TYPE, payloads, places: MessagePlaces::Lines(lines) })
    }

    fn points(precision: TimePrecision, body: &'a [u8]) -> Result<Self, Problem> {
        let mut payloads = Vec::new();
        let mut points = Vec::new();
        for point in PointLines::new(without_bom(body), precision).map_err(invalid_point_problem)? {
            let point = point.map_err(invalid_point_problem)?;
            if payloads.len() == HTTP_MESSAGES_MAX {
                return Err(too_many_messages_problem());
            }
            payloads.push(point.text.as_bytes());
            points.push((point.number, point.series));
        }
        if payloads.is_empty() {
            return Err(no_message_problem("The body has no line with a point"));
        }
        let content_type = precision.media_type();
        Ok(Self { content_type, payloads, places: MessagePlaces::Points(points) })
    }
}

/// A body without the byte order mark that it may begin with.
pub(super) fn without_bom(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body)
}

fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(body).is_ok()
}

/// Collects an array's elements, each as it is written. After the first one too many it goes on
/// checking elements, but keeps none.
struct ArrayElementsVisitor;

impl<'de> Visitor<'de> for ArrayElementsVisitor {
    type Value = Vec<&'de [u8]>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while elements.len() <= HTTP_MESSAGES_MAX {
            match seq.next_element::<&'de RawValue>()? {
                Some(element) => elements.push(element.get().as_bytes()),
                None => return Ok(elements),
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(elements)
    }
}

fn invalid_json_problem(what: &str, line: usize, error: &serde_json::Error) -> Problem {
    let (words, column) = (error.to_string(), error.column());
    let reason = words.split(" at line ").next().unwrap_or_default();
    Problem::new(
        Cause::Malformed,
        format!("{what} is not valid JSON: {reason} (line {line}, column {column}). Nothing of it was kept."),
    )
    .with("line", line)
    .with("column", column)
}

fn invalid_point_problem(error: PointError) -> Problem {
    let words = format!("The body is not line protocol: {error}. Nothing of it was kept.");
    Problem::new(Cause::Malformed, words).with("line", error.line).with("column", error.column)
}

fn no_message_problem(what: &str) -> Problem {
    Problem::new(Cause::Malformed, format!("{what}: there is no message in this request."))
}

fn too_many_messages_problem() -> Problem {
    let words = format!("One request carries at most {HTTP_MESSAGES_MAX} messages. Nothing of it was kept.");
    Problem::new(Cause::TooLarge, words).with("limit", HTTP_MESSAGES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::cause::ProblemKind;

    fn split(content_type: &'static str, body: &str) -> Result<(String, Vec<String>), ProblemKind> {
        let messages =
            RequestMessages::split(content_type, None, body.as_bytes()).map_err(|problem| problem.kind())?;
        let payloads = messages.payloads.iter().map(|p| String::from_utf8_lossy(p).into_owned());
        Ok((messages.content_type.to_owned(), payloads.collect()))
    }

    fn some(content_type: &str, payloads: &[&str]) -> Result<(String, Vec<String>), ProblemKind> {
        Ok((content_type.to_owned(), payloads.iter().map(|&p| p.to_owned()).collect()))
    }

    #[test]
    fn a_json_object_or_scalar_is_one_message_as_it_was_written() {
        for body in ["{\"value\": 21.50}", " {\"a\":[1,2]}\n", "21.5", "\"on\"", "null"] {
            assert_eq!(split("application/json", body), some(JSON_MEDIA_TYPE, &[body]));
            assert_eq!(split("Application/JSON; charset=utf-8", body), some(JSON_MEDIA_TYPE, &[body]));
        }
    }

    #[test]
    fn a_json_array_is_a_message_an_element_each_as_it_was_written() {
        let body = " [ {\"v\": 1.50, \"v\" : 2},[1, 2] ,\t\"x\\u0041\" , 1e400 ] ";
        let elements = ["{\"v\": 1.50, \"v\" : 2}", "[1, 2]", "\"x\\u0041\"", "1e400"];
        assert_eq!(split("application/json", body), some(JSON_MEDIA_TYPE, &elements));
    }

    #[test]
    fn each_line_of_ndjson_is_a_message() {
        for content_type in ["application/x-ndjson", "application/ndjson", "application/jsonl"] {
            let body = "{\"v\": 1}\r\n\n  [2, 3] \n\"x\"";
            assert_eq!(split(content_type, body), some(JSON_MEDIA_TYPE, &["{\"v\": 1}", "[2, 3]", "\"x\""]));
        }
    }

    #[test]
    fn what_curl_sends_by_default_is_taken_for_what_it_is() {
        for content_type in ["", "application/x-www-form-urlencoded"] {
            assert_eq!(split(content_type, "{\"v\":1}"), some(JSON_MEDIA_TYPE, &["{\"v\":1}"]));
            assert_eq!(split(content_type, "[1,2]"), some(JSON_MEDIA_TYPE, &["1", "2"]));
            for not_json in ["21.5", "v=1&w=2", "{v:1}", "[1,2", ""] {
                assert_eq!(split(content_type, not_json), some(content_type, &[not_json]));
            }
        }
    }

    #[test]
    fn any_other_type_is_one_message_that_nobody_looks_into() {
        for content_type in ["text/plain", "application/octet-stream", "application/senml+json"] {
            for body in ["[1,2]", "{", ""] {
                assert_eq!(split(content_type, body), some(content_type, &[body]));
            }
        }
    }

    /// It was "not valid JSON", or one message of bytes that nobody could read as JSON.
    #[test]
    fn a_byte_order_mark_before_json_is_no_part_of_it() {
        for content_type in ["application/json", "", "application/x-www-form-urlencoded"] {
            assert_eq!(split(content_type, "\u{feff}{\"v\": 1}"), some(JSON_MEDIA_TYPE, &["{\"v\": 1}"]));
            assert_eq!(split(content_type, "\u{feff} [1, 2]"), some(JSON_MEDIA_TYPE, &["1", "2"]));
        }
        assert_eq!(split("application/json", "\u{feff}21.5"), some(JSON_MEDIA_TYPE, &["21.5"]));
        let lines = "\u{feff}{\"v\": 1}\r\n\u{feff}{\"v\": 2}\n\u{feff}\n";
        assert_eq!(
            split("application/x-ndjson", lines),
            some(JSON_MEDIA_TYPE, &["{\"v\": 1}", "{\"v\": 2}"])
        );
        for empty in ["\u{feff}", "\u{feff} ", "\u{feff}[]"] {
            assert_eq!(split("application/json", empty), Err(ProblemKind::Malformed));
        }
        // One is enough, and inside of JSON it is none.
        assert_eq!(split("application/json", "\u{feff}\u{feff}1"), Err(ProblemKind::Malformed));
        assert_eq!(split("application/json", "\"\u{feff}\""), some(JSON_MEDIA_TYPE, &["\"\u{feff}\""]));
        // What is not JSON is kept as it is.
        for (content_type, body) in [("text/plain", "\u{feff}{}"), ("", "\u{feff}text"), ("", "\u{feff}1")] {
            assert_eq!(split(content_type, body), some(content_type, &[body]));
        }
    }

    #[test]
    fn a_request_without_a_message_is_malformed() {
        for (content_type, body) in [
            ("application/json", ""),
            ("application/json", " \n"),
            ("application/json", "[ ]"),
            ("application/x-ndjson", ""),
            ("application/x-ndjson", "\n \r\n"),
            ("", "[]"),
        ] {
            assert_eq!(split(content_type, body), Err(ProblemKind::Malformed), "{content_type} {body:?}");
        }
    }

    #[test]
    fn invalid_json_is_refused_with_its_place() {
        for (content_type, body, line, column) in [
            ("application/json", "{\"a\": 1,\n \"b\": x}", 2, 7),
            ("application/json", "[1, 2", 1, 5),
            ("application/json", "[1] 2", 1, 5),
            ("application/json", "{} {}", 1, 4),
            ("application/json", "{\"a\": \"\t\"}", 1, 7),
            ("application/x-ndjson", "{\"v\": 1}\n\n{\"v\": }", 3, 7),
            ("application/x-ndjson", "{} {}", 1, 4),
            ("application/x-ndjson", "  {} {}\r\n", 1, 6),
        ] {
            let problem = RequestMessages::split(content_type, None, body.as_bytes()).expect_err(body);
            let place = format!("(line {line}, column {column})");
            assert_eq!(problem.kind(), ProblemKind::Malformed);
            assert!(format!("{problem:?}").contains(&place), "{body:?}: {problem:?}");
        }
        // Not UTF-8, so not JSON either.
        let latin1: &[u8] = b"{\"unit\": \"\xB0C\"}";
        assert!(RequestMessages::split(JSON_MEDIA_TYPE, None, latin1).is_err());
        assert!(RequestMessages::split("application/x-ndjson", None, latin1).is_err());
        assert!(RequestMessages::split("text/plain", None, latin1).is_ok());
    }

    #[test]
    fn nesting_as_deep_as_a_body_allows_is_no_danger() {
        let deep = [vec![b'['; 1 << 20], vec![b']'; 1 << 20]].concat();
        let messages = RequestMessages::split(JSON_MEDIA_TYPE, None, &deep).map(|m| m.payloads.len());
        assert_eq!(messages.map_err(|problem| problem.kind()), Ok(1));
    }

    #[test]
    fn the_number_of_messages_is_limited_at_one_below_and_one_above() {
        let array = |n: usize| format!("[{}]", vec!["1"; n].join(","));
        let lines = |n: usize| "1\n".repeat(n);
        let count = |content_type, body: String| {
            let messages =
                RequestMessages::split(content_type, None, body.as_bytes()).map(|m| m.payloads.len());
            messages.map_err(|problem| problem.kind())
        };
        assert_eq!(count(JSON_MEDIA_TYPE, array(HTTP_MESSAGES_MAX)), Ok(HTTP_MESSAGES_MAX));
        assert_eq!(count(JSON_MEDIA_TYPE, array(HTTP_MESSAGES_MAX + 1)), Err(ProblemKind::TooLarge));
        assert_eq!(count(JSON_MEDIA_TYPE, array(HTTP_MESSAGES_MAX + 2)), Err(ProblemKind::TooLarge));
        assert_eq!(count("application/jsonl", lines(HTTP_MESSAGES_MAX)), Ok(HTTP_MESSAGES_MAX));
        assert_eq!(count("application/jsonl", lines(HTTP_MESSAGES_MAX + 1)), Err(ProblemKind::TooLarge));
    }

    #[test]
    fn each_point_of_line_protocol_is_a_message_on_the_topic_of_its_series() {
        let body =
            "\u{feff}cpu,host=b,cpu=0 v=1 5\n\n# x\r\ncpu,host=b,cpu=0 v=2 6\r\n  mem used=\"a\nb\",x=1";
        let messages = RequestMessages::split("", Some(TimePrecision::Seconds), body.as_bytes());
        let messages = messages.expect("points");
        assert_eq!(messages.content_type, "text/plain; precision=s");
        for base in ["", "hall/a/"] {
            let mut buffer = TopicBuffer::new(base);
            let found: Vec<_> = (0..messages.payloads.len())
                .map(|index| {
                    let payload = String::from_utf8_lossy(messages.payloads[index]).into_owned();
                    (messages.topic(index, &mut buffer).to_owned(), payload, messages.pointer(index, "").1)
                })
                .collect();
            let expected = [
                ("cpu/cpu=0/host=b", "cpu,host=b,cpu=0 v=1 5", 1),
                ("cpu/cpu=0/host=b", "cpu,host=b,cpu=0 v=2 6", 4),
                ("mem", "mem used=\"a\nb\",x=1", 5),
            ];
            let expected = expected.map(|(topic, line, n)| (format!("{base}{topic}"), line.into(), Some(n)));
            assert_eq!(found, expected);
        }
        let whole = RequestMessages::split("text/plain", None, b"cpu v=1\n").expect("one message");
        assert_eq!((whole.topic(0, &mut TopicBuffer::new("data")), whole.payloads.len()), ("data", 1));
    }

    #[test]
    fn a_line_that_is_no_point_is_refused_with_its_place() {
        for (body, line, column) in [
            (&b"a v=1\nb v=\n"[..], 2, 5),
            (b"a v=1 9223372037", 1, 7),
            (b"a v=1\n\xff", 2, 1),
            (b"{\"a\": 1}", 1, 9),
        ] {
            let refused =
                RequestMessages::split("", Some(TimePrecision::Seconds), body).expect_err("no points");
            assert_eq!(refused.kind(), ProblemKind::Malformed);
            let (shown, place) = (format!("{refused:?}"), format!("(line {line}, column {column})"));
            assert!(shown.contains(&place), "{shown}");
            assert!(shown.contains(&format!("\"line\": Number({line})")), "{shown}");
        }
        for body in ["", "\n", "# x"] {
            let refused = RequestMessages::split("", Some(TimePrecision::Seconds), body.as_bytes());
            assert_eq!(refused.expect_err("no points").kind(), ProblemKind::Malformed);
        }
        let lines = |n: usize| {
            let body = "m v=1\n".repeat(n);
            let places = RequestMessages::place_bytes_max(body.as_bytes(), Some(TimePrecision::Seconds));
            assert!(places >= n.min(HTTP_MESSAGES_MAX) * 56);
            let split = RequestMessages::split("", Some(TimePrecision::Seconds), body.as_bytes());
            split.map(|messages| messages.payloads.len()).map_err(|problem| problem.kind())
        };
        assert_eq!(lines(HTTP_MESSAGES_MAX), Ok(HTTP_MESSAGES_MAX));
        assert_eq!(lines(HTTP_MESSAGES_MAX + 1), Err(ProblemKind::TooLarge));
    }

    #[test]
    fn a_problem_with_one_of_several_messages_says_which() {
        let locate = |content_type, body: &'static str, index| {
            let messages = RequestMessages::split(content_type, None, body.as_bytes()).map_err(|p| p.kind());
            let problem = Problem::new(Cause::TooLarge, "over");
            format!("{:?}", messages.expect("valid").locate(index, problem))
        };
        assert!(locate(JSON_MEDIA_TYPE, "[1,2]", 1).contains("\"/1\""));
        assert!(locate("application/x-ndjson", "1\n\n2", 1).contains("\"line\": Number(3)"));
        assert!(!locate(JSON_MEDIA_TYPE, "{}", 0).contains("pointer"));
    }
}
