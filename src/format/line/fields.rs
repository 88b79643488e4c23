//! Tags and fields of a point that was checked, and what a field's value stands for.

use std::borrow::Cow;

use super::PointFault;

/// The characters that a backslash escapes in the key of a tag or field and in the value of a tag.
const ESCAPED_IN_NAMES: &[u8] = b", =";

/// A tag: key and value as they are written.
pub type TagPair<'a> = (&'a str, &'a str);

/// The tags of a point.
#[derive(Debug, Clone)]
pub struct TagPairs<'a> {
    pub(super) rest: &'a str,
}

/// A field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PointField<'a> {
    /// Its key as it is written; [`unescape_name`] says what it stands for.
    pub key: &'a str,
    /// Its value.
    pub value: FieldValue<'a>,
    /// The value as it is written, without quotes.
    pub written: &'a str,
}

/// The value of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FieldValue<'a> {
    /// A number without a suffix. It is finite.
    Float(f64),
    /// A number with `i`.
    Integer(i64),
    /// A number with `u`.
    Unsigned(u64),
    /// `t`, `true`, `f`, `false` and their other spellings.
    Boolean(bool),
    /// What is between the quotes of a string, as it is written.
    Text(&'a str),
}

/// The fields of a point.
#[derive(Debug, Clone)]
pub struct PointFields<'a> {
    pub(super) rest: &'a str,
}

impl<'a> Iterator for TagPairs<'a> {
    type Item = TagPair<'a>;

    fn next(&mut self) -> Option<TagPair<'a>> {
        let (key, rest) = split_unescaped(self.rest, b'=', ESCAPED_IN_NAMES)?;
        let (value, rest) = split_unescaped(rest, b',', ESCAPED_IN_NAMES).unwrap_or((rest, ""));
        self.rest = rest;
        Some((key, value))
    }
}

impl<'a> Iterator for PointFields<'a> {
    type Item = PointField<'a>;

    fn next(&mut self) -> Option<PointField<'a>> {
        let (key, rest) = split_unescaped(self.rest, b'=', ESCAPED_IN_NAMES)?;
        let (written, value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let (text, rest) = split_unescaped(quoted, b'"', b"\"\\")?;
                (text, FieldValue::Text(text), rest.strip_prefix(',').unwrap_or_default())
            }
            None => {
                let (word, rest) = rest.split_once(',').unwrap_or((rest, ""));
                (word, parse_value(word).ok()?, rest)
            }
        };
        self.rest = rest;
        Some(PointField { key, value, written })
    }
}

impl<'a> FieldValue<'a> {
    /// The text of a string, without its escapes.
    pub fn unescape_text(text: &'a str) -> Cow<'a, str> {
        unescape(text, b"\"\\")
    }
}

/// What the key of a tag or field, or the value of a tag, stands for.
pub fn unescape_name(name: &str) -> Cow<'_, str> {
    unescape(name, ESCAPED_IN_NAMES)
}

/// What `written` stands for, where a backslash escapes the characters `escaped` and no others.
pub(super) fn unescape<'a>(written: &'a str, escaped: &[u8]) -> Cow<'a, str> {
    if !written.contains('\\') {
        return Cow::Borrowed(written);
    }
    let mut out = String::with_capacity(written.len());
    let mut chars = written.chars().peekable();
    while let Some(next) = chars.next() {
        match chars.peek() {
            Some(&after) if next == '\\' && u8::try_from(after).is_ok_and(|b| escaped.contains(&b)) => {
                out.push(after);
                chars.next();
            }
            _ => out.push(next),
        }
    }
    Cow::Owned(out)
}

/// Splits at the first `at` that no backslash escapes.
fn split_unescaped<'a>(text: &'a str, at: u8, escaped: &[u8]) -> Option<(&'a str, &'a str)> {
    let bytes = text.as_bytes();
    let mut place = 0;
    while let Some(&byte) = bytes.get(place) {
        if byte == at {
            return Some((&text[..place], &text[place + 1..]));
        }
        let escapes = byte == b'\\' && bytes.get(place + 1).is_some_and(|next| escaped.contains(next));
        place += 1 + usize::from(escapes);
    }
    None
}

/// Checks a value that is not a string.
pub(super) fn check_value(word: &str) -> Result<(), PointFault> {
    parse_value(word).map(|_| ())
}

fn parse_value(word: &str) -> Result<FieldValue<'_>, PointFault> {
    let Some((&last, but_last)) = word.as_bytes().split_last() else { return Err(PointFault::NoFieldValue) };
    match (word, last) {
        ("t" | "T" | "true" | "True" | "TRUE", _) => Ok(FieldValue::Boolean(true)),
        ("f" | "F" | "false" | "False" | "FALSE", _) => Ok(FieldValue::Boolean(false)),
        (_, b'i') if is_integer(but_last) => parse_integer(word).map(FieldValue::Integer),
        (_, b'u') if is_integer(but_last) => parse_integer(word).map(FieldValue::Unsigned),
        _ => parse_float(word).map(FieldValue::Float),
    }
}

/// Digits, perhaps behind a sign.
fn is_integer(word: &[u8]) -> bool {
    let digits = word.strip_prefix(b"-").or(word.strip_prefix(b"+")).unwrap_or(word);
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
}

/// An integer with its suffix.
fn parse_integer<T: std::str::FromStr>(word: &str) -> Result<T, PointFault> {
    word[..word.len() - 1].parse().map_err(|_| PointFault::NumberRange)
}

fn parse_float(word: &str) -> Result<f64, PointFault> {
    // The parser would also take `inf` and `nan`.
    if !word.bytes().all(|b| matches!(b, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E')) {
        return Err(PointFault::NoValue);
    }
    let number: f64 = word.parse().map_err(|_| PointFault::NoValue)?;
    if number.is_finite() { Ok(number) } else { Err(PointFault::NumberRange) }
}
