//! The precision of a line's timestamps. It is not in the line: it comes with the request, and stays with each record in
//! its media type, `text/plain; precision=ms`, which is also what says that a text is line protocol.

/// The unit of a timestamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimePrecision {
    /// The one of a request that names none.
    #[default]
    Nanoseconds,
    /// 1,000 of those.
    Microseconds,
    /// 1,000 of those.
    Milliseconds,
    /// 1,000 of those.
    Seconds,
    /// 60 of those.
    Minutes,
    /// 60 of those.
    Hours,
}

impl TimePrecision {
    /// Every precision.
    pub const ALL: [TimePrecision; 6] = [
        TimePrecision::Nanoseconds,
        TimePrecision::Microseconds,
        TimePrecision::Milliseconds,
        TimePrecision::Seconds,
        TimePrecision::Minutes,
        TimePrecision::Hours,
    ];

    /// The precision of that name, in InfluxDB 1 (`n`, `u`, `ms`, `s`, `m`, `h`), 2 (`ns`, `us`, `ms`, `s`) or 3
    /// (`nanosecond`, `second`, …), if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "ns" | "n" | "nanosecond" => Some(Self::Nanoseconds),
            "us" | "u" | "µ" | "µs" | "microsecond" => Some(Self::Microseconds),
            "ms" | "millisecond" => Some(Self::Milliseconds),
            "s" | "second" => Some(Self::Seconds),
            "m" => Some(Self::Minutes),
            "h" => Some(Self::Hours),
            _ => None,
        }
    }

    /// The media type of a line with this precision.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Nanoseconds => "text/plain; precision=ns",
            Self::Microseconds => "text/plain; precision=us",
            Self::Milliseconds => "text/plain; precision=ms",
            Self::Seconds => "text/plain; precision=s",
            Self::Minutes => "text/plain; precision=m",
            Self::Hours => "text/plain; precision=h",
        }
    }

    /// The precision that a media type names, if it is `text/plain` with one: what such a text holds is line protocol.
    ///
    /// # Errors
    /// The name, if it is not that of a precision.
    pub fn from_media_type(media_type: &str) -> Result<Option<Self>, &str> {
        let mut parts = media_type.split(';');
        let essence = parts.next().unwrap_or_default().trim_ascii();
        if !essence.eq_ignore_ascii_case("text/plain") {
            return Ok(None);
        }
        let named = parts.find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim_ascii().eq_ignore_ascii_case("precision").then(|| value.trim_ascii())
        });
        let Some(value) = named else { return Ok(None) };
        let value = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
        Self::parse(value).map(Some).ok_or(value)
    }

    /// A timestamp as nanoseconds since 1970. `None` outside of what those can say (1677 to 2262), as in InfluxDB.
    pub fn nanos(self, timestamp: i64) -> Option<i64> {
        let unit = match self {
            Self::Nanoseconds => 1,
            Self::Microseconds => 1_000,
            Self::Milliseconds => 1_000_000,
            Self::Seconds => 1_000_000_000,
            Self::Minutes => 60_000_000_000,
            Self::Hours => 3_600_000_000_000,
        };
        timestamp.checked_mul(unit)
    }
}
