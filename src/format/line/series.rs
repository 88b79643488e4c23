//! The topic of a point: its series. The measurement, then a level `key=value` for each tag, sorted by key as InfluxDB
//! sorts them: `cpu,host=a,cpu=0 usage=1` is on `cpu/cpu=0/host=a`. So points of one series are on one topic however their
//! tags are written, and those of two series never are; and a filter chooses by tags: `cpu/+/host=a`.
//!
//! What a topic cannot hold is written `%XX` (RFC 3986, section 2.1): white space, control characters, `+`, `#`, `%`, `*`,
//! `>`, a `=` that is part of a name, a `/` in a tag, and a `$` that begins the measurement. A `/` in a measurement divides
//! levels.

use super::fields::unescape;
use super::{TagPair, TagPairs, unescape_name};
use crate::limits::POINT_TAGS_MAX;

/// What points of one series have in common: measurement and tags, as they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointSeries<'a> {
    /// The measurement.
    pub measurement: &'a str,
    pub(super) tags: &'a str,
}

impl<'a> PointSeries<'a> {
    /// The tags, in the order in which they are written. No key comes twice.
    pub fn tags(&self) -> TagPairs<'a> {
        TagPairs { rest: self.tags }
    }

    /// Appends the topic of the series to `to`.
    pub fn write_topic(&self, to: &mut String) {
        write_level(&unescape(self.measurement, b", "), true, to);
        let mut tags: [TagPair<'_>; POINT_TAGS_MAX] = [("", ""); POINT_TAGS_MAX];
        let mut count = 0;
        for (tag, place) in self.tags().zip(&mut tags) {
            *place = tag;
            count += 1;
        }
        let tags = &mut tags[..count];
        tags.sort_unstable();
        for (key, value) in tags {
            to.push('/');
            write_level(&unescape_name(key), false, to);
            to.push('=');
            write_level(&unescape_name(value), false, to);
        }
    }
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// Appends a name, without what a topic cannot hold. `divides`: a `/` in it may divide levels.
fn write_level(name: &str, divides: bool, to: &mut String) {
    let is_plain = |b: &u8| match b {
        b'%' | b'+' | b'#' | b'=' | b'*' | b'>' | 0x7f | 0..=b' ' => false,
        b'/' => divides,
        // No topic may begin with it.
        b'$' => !(divides && name.starts_with('$')),
        _ => true,
    };
    if name.as_bytes().iter().all(is_plain) {
        to.push_str(name);
        return;
    }
    for char in name.chars() {
        let mut bytes = [0; 4];
        let bytes = char.encode_utf8(&mut bytes).as_bytes();
        if bytes.len() > 1 || is_plain(&bytes[0]) {
            to.push(char);
        } else {
            let byte = usize::from(bytes[0]);
            to.extend(['%', char::from(HEX[byte >> 4]), char::from(HEX[byte & 15])]);
        }
    }
}
