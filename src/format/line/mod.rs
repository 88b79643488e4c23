//! InfluxDB's line protocol: a text of lines, each a [`PointLine`] with a measurement, tags, fields and perhaps a
//! timestamp.
//!
//! ```text
//! measurement[,tag=value…] field=value[,field=value…] [timestamp]
//! ```
//!
//! Source: <https://docs.influxdata.com/influxdb/v2/reference/syntax/line-protocol/>, and `models/points.go` of InfluxDB
//! 1.8 where that is silent. A backslash escapes a comma and a space in a measurement, also `=` in a tag or a field's name,
//! and `"` and `\` in a string; before any other character it stands for itself. A string may hold a line break. Blank lines
//! and lines that begin with `#` are no points.
//!
//! Nothing is copied: a point borrows from its text, and [`PointSeries::tags`] and [`PointLine::fields`] read it again.

mod fields;
mod point;
mod precision;
mod scan;
mod series;
#[cfg(test)]
mod tests;

pub use fields::{FieldValue, PointField, PointFields, TagPair, TagPairs, unescape_name};
pub use point::{PointLine, PointLines};
pub use precision::TimePrecision;
pub use series::PointSeries;

/// What is wrong with a line, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{fault} (line {line}, column {column})")]
pub struct PointError {
    /// What.
    pub fault: PointFault,
    /// The line in the text, the first is 1.
    pub line: u32,
    /// The byte in that line at which it was found, the first is 1.
    pub column: usize,
}

/// What is wrong with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PointFault {
    /// The text is not UTF-8.
    #[error("it is not UTF-8")]
    NotText,
    /// A line that begins with a comma.
    #[error("there is no measurement")]
    NoMeasurement,
    /// A tag without `=`, or with nothing before it.
    #[error("a tag is key=value: there is no key before a '='")]
    NoTagKey,
    /// A tag with nothing behind its `=`.
    #[error("a tag has no value")]
    NoTagValue,
    /// `=` in the value of a tag.
    #[error("a '=' in the value of a tag is written '\\='")]
    TagEquals,
    /// A line that ends behind its measurement and tags.
    #[error("there are no fields")]
    NoFields,
    /// A field without `=`, or with nothing before it, such as the one that a comma at the end announces.
    #[error("a field is key=value: there is no key before a '='")]
    NoFieldKey,
    /// A field with nothing behind its `=`.
    #[error("a field has no value")]
    NoFieldValue,
    /// A string whose closing quote is missing.
    #[error("a string has no closing '\"'")]
    OpenString,
    /// Something behind a string's closing quote.
    #[error("a ',', a space or the end of the line has to follow a string's closing '\"'")]
    BehindString,
    /// A field's value that is of no type.
    #[error("a field's value is a number, a number with 'i' or 'u', true, false, or a string in '\"'")]
    NoValue,
    /// A number that its type cannot hold.
    #[error("a number is out of range")]
    NumberRange,
    /// What should be a timestamp is no integer.
    #[error("the timestamp is not an integer")]
    NoTimestamp,
    /// A timestamp that is outside of the years 1677 to 2262.
    #[error("the timestamp is out of range")]
    TimestampRange,
    /// Something behind the timestamp.
    #[error("there is something behind the timestamp")]
    BehindTimestamp,
    /// Two tags with one key.
    #[error("a tag comes twice")]
    TagTwice,
    /// More tags than [`POINT_TAGS_MAX`](crate::limits::POINT_TAGS_MAX).
    #[error("there are too many tags")]
    TooManyTags,
}
