//! Times as arguments of the commands: RFC 3339, or a span from now: `1h` is an hour ago where the past is asked for, and
//! in an hour where the future is.

use std::fmt;
use std::time::Duration;

use crate::message::{TimeMicros, now_micros};
use crate::time::{Rfc3339, parse_time};

/// What the arguments are, for their help.
const SPAN_WORDS: &str = "a number with s, m, h or d, such as 90s, 15m, 1h30m or 7d";

/// A point in time, fixed when the command line was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimeArgument(pub(super) TimeMicros);

impl TimeArgument {
    /// A time, or how long ago it was.
    pub(super) fn parse_past(text: &str) -> Result<Self, String> {
        Self::parse(text, |now, span| now.saturating_sub(span).max(0))
            .ok_or_else(|| format!("give a time such as 2026-11-23T09:00:00Z, or how long ago: {SPAN_WORDS}"))
    }

    /// A time, or in how long it will be.
    pub(super) fn parse_future(text: &str) -> Result<Self, String> {
        let words = || format!("give a time such as 2027-01-31T12:00:00Z, or in how long: {SPAN_WORDS}");
        let time = Self::parse(text, TimeMicros::saturating_add).ok_or_else(words)?;
        match time.0 > now_micros() {
            true => Ok(time),
            false => Err("it has to be in the future".to_owned()),
        }
    }

    fn parse(text: &str, apart: fn(TimeMicros, TimeMicros) -> TimeMicros) -> Option<Self> {
        if text == "now" {
            return Some(Self(now_micros()));
        }
        let from_now = |span: Duration| {
            let span = TimeMicros::try_from(span.as_micros()).unwrap_or(TimeMicros::MAX);
            Self(apart(now_micros(), span))
        };
        parse_time(text).map(Self).or_else(|| parse_span(text).map(from_now))
    }
}

impl fmt::Display for TimeArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Rfc3339(self.0).fmt(f)
    }
}

/// A span of time: `90s`, `1h30m`, `7d`. `None` for anything else, a bare number too.
pub(super) fn parse_span(text: &str) -> Option<Duration> {
    let mut seconds = 0_u64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let count: u64 = rest.get(..digits)?.parse().ok()?;
        let unit = match rest.as_bytes().get(digits)? {
            b's' => 1,
            b'm' => 60,
            b'h' => 3_600,
            b'd' => 86_400,
            _ => return None,
        };
        seconds = seconds.checked_add(count.checked_mul(unit)?)?;
        rest = rest.get(digits + 1..)?;
    }
    (!text.is_empty()).then(|| Duration::from_secs(seconds))
}

/// A span in seconds; a bare number is one too.
pub(super) fn parse_seconds(text: &str) -> Result<u64, String> {
    let bare = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    bare.or_else(|| Some(parse_span(text)?.as_secs()))
        .ok_or_else(|| format!("give a number of seconds, or {SPAN_WORDS}"))
}

/// How far a time is from now, in one unit, for people: `3 min`.
pub(super) fn distance(from: TimeMicros, to: TimeMicros) -> String {
    let seconds = to.saturating_sub(from).max(0) / 1_000_000;
    match seconds {
        ..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// How long ago a time of the gateway's answer was: `3 min ago`. What cannot be read is shown as it is.
pub(super) fn ago(text: &str) -> String {
    let now = now_micros();
    match parse_time(text) {
        // The gateway's clock may be a little ahead of this one.
        Some(time) if time > now => "just now".to_owned(),
        Some(time) => format!("{} ago", distance(time, now)),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_units_and_may_be_added_up() {
        for (text, seconds) in [
            ("0s", 0),
            ("30s", 30),
            ("90m", 5_400),
            ("24h", 86_400),
            ("7d", 604_800),
            ("1h30m", 5_400),
            ("1d1h1m1s", 90_061),
        ] {
            assert_eq!(parse_span(text), Some(Duration::from_secs(seconds)), "{text}");
            assert_eq!(parse_seconds(text), Ok(seconds), "{text}");
        }
        assert_eq!((parse_seconds("0"), parse_seconds("90")), (Ok(0), Ok(90)));
        let bad = ["", "h", "-1h", "1.5h", "1w", "1 h", "noon", "99999999999999999999d", "1é", "é", "1h30"];
        for bad in bad.iter().chain(&["18446744073709551615h"]) {
            assert_eq!(parse_span(bad), None, "{bad}");
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_span("90"), None);
    }

    #[test]
    fn a_time_is_absolute_or_apart_from_now_on_the_side_that_is_asked_for() {
        let hour = 3_600_000_000;
        let near = |time: TimeArgument, wanted: TimeMicros| (time.0 - wanted).abs() < 60_000_000;
        let (past, future) = (TimeArgument::parse_past("1h"), TimeArgument::parse_future("1h"));
        assert!(near(past.expect("a span"), now_micros() - hour));
        assert!(near(future.expect("a span"), now_micros() + hour));
        assert!(near(TimeArgument::parse_past("now").expect("now"), now_micros()));
        let time = TimeArgument::parse_past("1970-01-01T01:00:01+01:00").expect("a time");
        assert_eq!(
            (time, time.to_string().as_str()),
            (TimeArgument(1_000_000), "1970-01-01T00:00:01.000000Z")
        );
        assert_eq!(TimeArgument::parse_past("99999999999d"), Ok(TimeArgument(0)));
        for bad in ["", "yesterday", "2026-11-23", "1h ago", "7"] {
            assert!(TimeArgument::parse_past(bad).is_err(), "{bad}");
        }
        for past in ["1970-01-01T00:00:01Z", "0s", "now"] {
            assert!(TimeArgument::parse_future(past).is_err(), "{past}");
        }
    }

    #[test]
    fn a_distance_has_one_unit() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7_199, "1 h"), (172_800, "2 d"), (-5, "0 s")]
        {
            assert_eq!(distance(0, seconds * 1_000_000), text);
        }
        assert_eq!(ago("soon"), "soon");
        assert!(ago("1970-01-01T00:00:00Z").ends_with(" d ago"));
    }
}
