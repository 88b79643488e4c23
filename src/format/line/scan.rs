//! The scanner: finds where each part of a line ends, and checks it. It looks at each byte once and allocates nothing.

use super::fields::check_value;
use super::{PointError, PointFault, PointLine, PointSeries, TimePrecision};
use crate::limits::POINT_TAGS_MAX;

/// What has not been scanned of a text.
#[derive(Debug)]
pub(super) struct PointScanner<'a> {
    text: &'a str,
    /// That of its timestamps.
    precision: TimePrecision,
    /// The next byte.
    at: usize,
    /// The line that it is in, the first is 1.
    line: u32,
    /// Where that line begins.
    line_at: usize,
}

impl<'a> PointScanner<'a> {
    pub(super) fn new(bytes: &'a [u8], precision: TimePrecision) -> Result<Self, PointError> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Self { text, precision, at: 0, line: 1, line_at: 0 }),
            Err(error) => {
                let good = &bytes[..error.valid_up_to()];
                let line_at = good.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
                let breaks = good.iter().filter(|&&b| b == b'\n').count();
                let line = u32::try_from(breaks).unwrap_or(u32::MAX).saturating_add(1);
                Err(PointError { fault: PointFault::NotText, line, column: good.len() - line_at + 1 })
            }
        }
    }

    /// The next point. After an error there is none.
    pub(super) fn next_point(&mut self) -> Option<Result<PointLine<'a>, PointError>> {
        if !self.find_line() {
            return None;
        }
        let point = self.scan_point().map_err(|fault| {
            let column = self.at - self.line_at + 1;
            PointError { fault, line: self.line, column }
        });
        if point.is_err() {
            self.at = self.text.len();
        }
        Some(point)
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Goes on behind a line break.
    fn begin_line(&mut self) {
        self.at += 1;
        self.line = self.line.saturating_add(1);
        self.line_at = self.at;
    }

    /// Goes to the beginning of the next line that is not blank and no comment. `false`: there is none.
    fn find_line(&mut self) -> bool {
        while let Some(byte) = self.peek() {
            match byte {
                b'\n' => self.begin_line(),
                b' ' | b'\t' | b'\r' | 0 => self.at += 1,
                b'#' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                _ => return true,
            }
        }
        false
    }

    /// A point, up to and with its line break. An error is at `self.at`.
    fn scan_point(&mut self) -> Result<PointLine<'a>, PointFault> {
        let (begin, number) = (self.at, self.line);
        self.skip_measurement();
        let measurement = &self.text[begin..self.at];
        if measurement.is_empty() {
            return Err(PointFault::NoMeasurement);
        }
        let tags = self.scan_tags()?;
        self.skip_blanks();
        if matches!(self.peek(), None | Some(b'\n' | b'\r')) {
            return Err(PointFault::NoFields);
        }
        let fields_at = self.at;
        loop {
            self.scan_field()?;
            match self.peek() {
                Some(b',') => self.at += 1,
                _ => break,
            }
        }
        let fields = &self.text[fields_at..self.at];
        let mut end = self.at;
        self.skip_blanks();
        let nanos = self.scan_timestamp()?;
        if nanos.is_some() {
            end = self.at;
            self.skip_blanks();
        }
        match self.peek() {
            None => {}
            Some(b'\n') => self.begin_line(),
            Some(_) => return Err(PointFault::BehindTimestamp),
        }
        let text = &self.text[begin..end];
        Ok(PointLine { text, number, series: PointSeries { measurement, tags }, fields, nanos })
    }

    /// Blanks, and a carriage return before the end of the line.
    fn skip_blanks(&mut self) {
        while self.peek() == Some(b' ') {
            self.at += 1;
        }
        if self.text.as_bytes()[self.at..].starts_with(b"\r\n") || &self.text[self.at..] == "\r" {
            self.at += 1;
        }
    }

    fn skip_measurement(&mut self) {
        while let Some(byte) = self.peek() {
            match byte {
                b'\\' => self.skip_escape(b", "),
                b',' | b' ' | b'\n' => return,
                _ => self.at += 1,
            }
        }
    }

    /// A backslash, with what it escapes if that is one of those.
    #[inline]
    fn skip_escape(&mut self, escaped: &[u8]) {
        self.at += 1;
        if self.peek().is_some_and(|byte| escaped.contains(&byte)) {
            self.at += 1;
        }
    }

    /// A name, up to the `=` behind it.
    #[inline]
    fn scan_name(&mut self, missing: PointFault) -> Result<(), PointFault> {
        let begin = self.at;
        loop {
            match self.peek() {
                Some(b'=') if self.at > begin => return Ok(()),
                Some(b'\\') => self.skip_escape(b", ="),
                Some(b',' | b' ' | b'\n' | b'=') | None => return Err(missing),
                Some(_) => self.at += 1,
            }
        }
    }

    /// The tags: what is behind the first comma.
    fn scan_tags(&mut self) -> Result<&'a str, PointFault> {
        let begin = self.at + 1;
        let mut keys = [(0, 0); POINT_TAGS_MAX];
        let (mut count, mut is_sorted, mut last) = (0, true, "");
        while self.peek() == Some(b',') {
            self.at += 1;
            let key_at = self.at;
            *keys.get_mut(count).ok_or(PointFault::TooManyTags)? = (key_at, self.scan_tag()?);
            let key = &self.text[key_at..keys[count].1];
            (count, is_sorted, last) = (count + 1, is_sorted && last < key, key);
        }
        // Most clients sort them.
        if !is_sorted {
            self.check_keys(&mut keys[..count])?;
        }
        Ok(self.text.get(begin..self.at).unwrap_or_default())
    }

    /// Finds a key that comes twice, at its second place.
    fn check_keys(&mut self, keys: &mut [(usize, usize)]) -> Result<(), PointFault> {
        let key = |&(from, to): &(usize, usize)| &self.text[from..to];
        keys.sort_unstable_by(|one, other| key(one).cmp(key(other)).then(one.cmp(other)));
        let twice = keys.windows(2).filter(|two| key(&two[0]) == key(&two[1])).map(|two| two[1].0).min();
        match twice {
            Some(at) => {
                self.at = at;
                Err(PointFault::TagTwice)
            }
            None => Ok(()),
        }
    }

    /// A tag; returns where its key ends.
    fn scan_tag(&mut self) -> Result<usize, PointFault> {
        self.scan_name(PointFault::NoTagKey)?;
        let key_end = self.at;
        self.at += 1;
        let begin = self.at;
        loop {
            match self.peek() {
                Some(b'\\') => self.skip_escape(b", ="),
                Some(b'=') => return Err(PointFault::TagEquals),
                Some(b',' | b' ' | b'\n') | None if self.at == begin => return Err(PointFault::NoTagValue),
                Some(b',' | b' ' | b'\n') | None => return Ok(key_end),
                Some(_) => self.at += 1,
            }
        }
    }

    fn scan_field(&mut self) -> Result<(), PointFault> {
        self.scan_name(PointFault::NoFieldKey)?;
        self.at += 1;
        if self.peek() == Some(b'"') {
            return self.scan_string();
        }
        let rest = &self.text.as_bytes()[self.at..];
        let is_end = |&b: &u8| matches!(b, b',' | b' ' | b'\n' | b'\r');
        let length = rest.iter().position(is_end).unwrap_or(rest.len());
        check_value(&self.text[self.at..self.at + length])?;
        self.at += length;
        Ok(())
    }

    /// A string, with both of its quotes. A string that does not end is found at its beginning.
    fn scan_string(&mut self) -> Result<(), PointFault> {
        let (begin, line, line_at) = (self.at, self.line, self.line_at);
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => self.skip_escape(b"\"\\"),
                Some(b'\n') => self.begin_line(),
                Some(_) => self.at += 1,
                None => {
                    (self.at, self.line, self.line_at) = (begin, line, line_at);
                    return Err(PointFault::OpenString);
                }
            }
        }
        self.at += 1;
        match self.peek() {
            None | Some(b',' | b' ' | b'\n' | b'\r') => Ok(()),
            Some(_) => Err(PointFault::BehindString),
        }
    }

    /// A timestamp in nanoseconds, if there is one.
    fn scan_timestamp(&mut self) -> Result<Option<i64>, PointFault> {
        if matches!(self.peek(), None | Some(b'\n')) {
            return Ok(None);
        }
        let rest = &self.text.as_bytes()[self.at..];
        let sign = usize::from(rest.first() == Some(&b'-'));
        let digits = rest[sign..].iter().take_while(|b| b.is_ascii_digit()).count();
        let length = sign + digits;
        if digits == 0 || rest.get(length).is_some_and(|b| !matches!(b, b' ' | b'\n' | b'\r')) {
            return Err(PointFault::NoTimestamp);
        }
        let timestamp = self.text[self.at..self.at + length].parse().ok();
        let nanos = timestamp.and_then(|timestamp| self.precision.nanos(timestamp));
        let nanos = nanos.ok_or(PointFault::TimestampRange)?;
        self.at += length;
        Ok(Some(nanos))
    }
}
