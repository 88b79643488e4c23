//! A note: what the gateway wrote down about a record beside what its sender gave. It stands behind
//! the record in the log, so that a message and the reason why it is in quarantine are durable in the
//! same write.
//!
//! Which records have one is said by their flags, [`RecordFlags::QUARANTINED`] and
//! [`RecordFlags::REDRIVEN`]. On disk a note is postcard: the number of its kind, then its fields in
//! their order here. Kinds may be added at the end and nothing else may change.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::record::put;
use crate::message::{Offset, RecordFlags, TimeMicros};

/// What the gateway wrote down about a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Note<'a> {
    /// Why it is in quarantine.
    #[serde(borrow)]
    Quarantined(Reason<'a>),
    /// It was in quarantine, and was sent through intake again.
    Redriven {
        /// Where in the log it is as it was first sent.
        offset: Offset,
        /// When it was first received.
        received_at: TimeMicros,
    },
}

/// Why a message is in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason<'a> {
    /// The schema's keyword that the message does not meet, `json` if it is no JSON at all, or
    /// [`Reason::LIMIT`].
    #[serde(borrow)]
    pub keyword: Cow<'a, str>,
    /// Where in the message: a JSON pointer (RFC 6901), empty for the whole of it.
    #[serde(borrow)]
    pub pointer: Cow<'a, str>,
    /// The same in words, for its sender.
    #[serde(borrow)]
    pub words: Cow<'a, str>,
    /// The version of the datasource's schema that it was held against; 0 if there was none.
    pub schema_version: u32,
}

impl Reason<'_> {
    /// The keyword of a message that is over a limit; no schema has one of that name.
    pub const LIMIT: &'static str = "limit";

    /// Whether it is a limit that the message is over, and no schema that it does not meet.
    pub fn is_limit(&self) -> bool {
        self.keyword == Self::LIMIT
    }
}

impl<'a> Note<'a> {
    /// Reads what [`Note::encode`] wrote. `None` for anything else, such as a kind that a later
    /// Headgate has added.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }

    /// As it stands in the log.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(self, &mut bytes);
        bytes
    }

    /// The flag that a record with this note has.
    pub fn flag(&self) -> RecordFlags {
        match self {
            Note::Quarantined(_) => RecordFlags::QUARANTINED,
            Note::Redriven { .. } => RecordFlags::REDRIVEN,
        }
    }
}

impl std::fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Reason { keyword, pointer, words, schema_version } = self;
        if self.is_limit() {
            return f.write_str(words);
        }
        write!(f, "schema version {schema_version}, {keyword} at {pointer:?}: {words}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_comes_back_as_it_was_written() {
        let reason = Reason {
            keyword: "maximum".into(),
            pointer: "/value".into(),
            words: "300 is greater than the maximum of 200".into(),
            schema_version: 7,
        };
        for note in [Note::Quarantined(reason), Note::Redriven { offset: 41, received_at: -1 }] {
            let bytes = note.encode();
            assert_eq!(Note::decode(&bytes).as_ref(), Some(&note));
            assert_eq!(Note::decode(&bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(Note::decode(&[9, 9]), None, "a kind that is not known yet");
    }
}
