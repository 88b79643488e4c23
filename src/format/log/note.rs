//! A note: what the gateway adds to a record beside what its sender gave. The log stores it behind
//! the record, so that one write makes both a message and the reason of its quarantine durable.
//!
//! The flags [`RecordFlags::QUARANTINED`] and [`RecordFlags::REDRIVEN`] mark a record with a note.
//! On disk a note is postcard: the number of its kind, then its fields in the order below. Kinds may
//! be added at the end; nothing else may change.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::record::put_postcard;
use crate::message::{Offset, RecordFlags, TimeMicros};

/// What the gateway adds to a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordNote<'a> {
    /// Why it is in quarantine.
    #[serde(borrow)]
    Quarantined(QuarantineReason<'a>),
    /// It was in quarantine, and went through intake again.
    Redriven {
        /// The offset of the original record.
        offset: Offset,
        /// When the original was received.
        received_at: TimeMicros,
    },
    /// No message, but a mark: one in quarantine was found to be let in, itself or a corrected one in its place.
    Superseded {
        /// The offset of the record in quarantine.
        offset: Offset,
        /// The offset of what was let in.
        by: Offset,
    },
}

/// Why a message is in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineReason<'a> {
    /// The schema keyword that the message violates, `json` if it is not JSON, or [`QuarantineReason::LIMIT`].
    #[serde(borrow)]
    pub keyword: Cow<'a, str>,
    /// Where in the message: a JSON pointer (RFC 6901), empty for the whole message.
    #[serde(borrow)]
    pub pointer: Cow<'a, str>,
    /// The violation in words, for the sender.
    #[serde(borrow)]
    pub words: Cow<'a, str>,
    /// The schema version that it was validated against; 0 if there was none.
    pub schema_version: u32,
}

impl QuarantineReason<'_> {
    /// The keyword of a message over a limit; JSON Schema has no such keyword.
    pub const LIMIT: &'static str = "limit";

    /// Whether the message is over a limit, rather than in violation of a schema.
    pub fn is_limit(&self) -> bool {
        self.keyword == Self::LIMIT
    }
}

impl<'a> RecordNote<'a> {
    /// Reads what [`RecordNote::encode`] wrote. `None` for anything else, such as a kind from a newer
    /// Headgate.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }

    /// Encodes the note for the log.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_postcard(self, &mut bytes);
        bytes
    }

    /// The flag of a record with this note.
    pub fn flag(&self) -> RecordFlags {
        match self {
            RecordNote::Quarantined(_) => RecordFlags::QUARANTINED,
            RecordNote::Redriven { .. } => RecordFlags::REDRIVEN,
            // No reader may take it for a message.
            RecordNote::Superseded { .. } => RecordFlags::QUARANTINED.with(RecordFlags::REDRIVEN),
        }
    }
}

impl std::fmt::Display for QuarantineReason<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let QuarantineReason { keyword, pointer, words, schema_version } = self;
        if self.is_limit() {
            return f.write_str(words);
        }
        if *schema_version == 0 {
            return write!(f, "{keyword} at {pointer:?}: {words}");
        }
        write!(f, "schema version {schema_version}, {keyword} at {pointer:?}: {words}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_comes_back_as_it_was_written() {
        let reason = QuarantineReason {
            keyword: "maximum".into(),
            pointer: "/value".into(),
            words: "300 is greater than the maximum of 200".into(),
            schema_version: 7,
        };
        for note in [
            RecordNote::Quarantined(reason),
            RecordNote::Redriven { offset: 41, received_at: -1 },
            RecordNote::Superseded { offset: 41, by: 43 },
        ] {
            let bytes = note.encode();
            assert_eq!(RecordNote::decode(&bytes).as_ref(), Some(&note));
            assert_eq!(RecordNote::decode(&bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(RecordNote::decode(&[9, 9]), None, "a kind that is not known yet");
    }
}
