//! A point: one line, checked as a whole, and the points of a text.

use super::scan::PointScanner;
use super::{PointError, PointFields, PointSeries, TimePrecision};
use crate::message::TimeMicros;

/// One line. Each part is as it is written, with its escapes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PointLine<'a> {
    /// The line, without blanks around it and without its line break.
    pub text: &'a str,
    /// Which line of the text it begins at, the first is 1.
    pub number: u32,
    /// Which series it belongs to.
    pub series: PointSeries<'a>,
    pub(super) fields: &'a str,
    /// The timestamp, in nanoseconds since 1970.
    pub nanos: Option<i64>,
}

impl<'a> PointLine<'a> {
    /// The fields, in the order in which they are written. There is at least one.
    pub fn fields(&self) -> PointFields<'a> {
        PointFields { rest: self.fields }
    }

    /// The timestamp, in microseconds since 1970, rounded down.
    pub fn micros(&self) -> Option<TimeMicros> {
        self.nanos.map(|nanos| nanos.div_euclid(1_000))
    }
}

/// The points of a text, one after the other. It ends with the first line that is none.
#[derive(Debug)]
pub struct PointLines<'a>(PointScanner<'a>);

impl<'a> PointLines<'a> {
    /// The points of `text`, whose timestamps have this precision.
    ///
    /// # Errors
    /// [`PointFault::NotText`](super::PointFault::NotText) if it is not UTF-8.
    pub fn new(text: &'a [u8], precision: TimePrecision) -> Result<Self, PointError> {
        PointScanner::new(text, precision).map(Self)
    }
}

impl<'a> Iterator for PointLines<'a> {
    type Item = Result<PointLine<'a>, PointError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next_point()
    }
}
