//! Keeping a section once: the ids under which a section is known, and the part of a frame that
//! records them.
//!
//! A sender may give a message an id, so that a repetition is not kept again; and every QoS 2
//! message has an id until its exchange is over. Both are hashed into an
//! [`OnceId`]. The writer's `Window` says which ids are known now; it can be rebuilt from the frames.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::Offsets;
use super::record::put_postcard;
use crate::message::{DatasourceId, Offset, TimeMicros};

/// Domain separation of what ids are made of. Never change them: the ids are on disk.
const MESSAGE_CONTEXT: &str = "headgate 2026-11 once: datasource and message id";
const PARKED_CONTEXT: &str = "headgate 2026-11 once: messages in quarantine";
const EXCHANGE_CONTEXT: &str = "headgate 2026-11 once: session and packet id";

/// The bit of the first byte that tells an exchange from a message.
const EXCHANGE_BIT: u8 = 0x80;

/// The id of a section: 127 bits of a hash, and one bit for the kind of id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OnceId([u8; Self::BYTES]);

impl OnceId {
    /// Bytes of an id.
    pub const BYTES: usize = 16;

    /// The id of a message, from the id that its sender gave it: known for a window of time.
    pub fn of_message(datasource: &DatasourceId, message_id: &str) -> Self {
        let mut hash = blake3::Hasher::new_derive_key(MESSAGE_CONTEXT);
        // A slug holds no NUL, so that the two cannot run into each other.
        hash.update(datasource.as_str().as_bytes()).update(&[0]).update(message_id.as_bytes());
        let mut id = Self::from_hash(&hash);
        id.0[0] &= !EXCHANGE_BIT;
        id
    }

    /// The id of messages in quarantine, from the id that their sender gave them, and topic and payload of each.
    /// It is not that of the message that is let in, and no sender can choose it. Known as long as a message's.
    pub fn of_parked<'a>(
        datasource: &DatasourceId,
        message_id: &str,
        messages: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Self {
        let mut hash = blake3::Hasher::new_derive_key(PARKED_CONTEXT);
        let mut add = |part: &[u8]| {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part);
        };
        add(datasource.as_str().as_bytes());
        add(message_id.as_bytes());
        for (topic, payload) in messages {
            add(topic.as_bytes());
            add(payload);
        }
        let mut id = Self::from_hash(&hash);
        id.0[0] &= !EXCHANGE_BIT;
        id
    }

    /// The id of a QoS 2 exchange, from its session's number and packet id: known until released.
    pub fn of_exchange(session: u64, packet_id: u16) -> Self {
        let mut hash = blake3::Hasher::new_derive_key(EXCHANGE_CONTEXT);
        hash.update(&session.to_le_bytes()).update(&packet_id.to_le_bytes());
        let mut id = Self::from_hash(&hash);
        id.0[0] |= EXCHANGE_BIT;
        id
    }

    fn from_hash(hash: &blake3::Hasher) -> Self {
        let mut id = [0; Self::BYTES];
        hash.finalize_xof().fill(&mut id);
        Self(id)
    }

    /// Whether it belongs to a QoS 2 exchange.
    pub fn is_exchange(self) -> bool {
        self.0[0] & EXCHANGE_BIT != 0
    }

    /// As lower-case hex.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`OnceId::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut id = [0; Self::BYTES];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        (text.len() == 2 * Self::BYTES).then_some(Self(id))
    }

    /// The id as it is written.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The ids in `bytes`, one after the other.
    pub fn parse_all(bytes: &[u8]) -> impl Iterator<Item = OnceId> {
        bytes.as_chunks().0.iter().map(|id| Self(*id))
    }
}

/// A hash over what is kept under an id: its datasource, and topic and payload of each message in order. It tells
/// a repetition from another message with the same id. What may differ between two attempts at one message is
/// left out: properties, media type, flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentDigest(NonZeroU64);

impl ContentDigest {
    /// The digest of the messages of a datasource, given as topic and payload of each.
    pub fn of<'a>(datasource: &str, messages: impl Iterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut hash = blake3::Hasher::new();
        let mut heads = [0; 16];
        hash.update(datasource.as_bytes()).update(&[0]);
        for (topic, payload) in messages {
            heads[..8].copy_from_slice(&(topic.len() as u64).to_le_bytes());
            heads[8..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
            hash.update(&heads).update(topic.as_bytes()).update(payload);
        }
        let mut digest = [0; 8];
        hash.finalize_xof().fill(&mut digest);
        Self(NonZeroU64::new(u64::from_le_bytes(digest)).unwrap_or(NonZeroU64::MIN))
    }

    /// As lower-case hex.
    pub fn to_hex(self) -> String {
        format!("{:016x}", self.0)
    }

    /// Reads what [`ContentDigest::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Option<Self> {
        u64::from_str_radix(text, 16).ok().and_then(NonZeroU64::new).map(Self)
    }
}

/// The window's counters when a frame was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowStamp {
    /// How many message ids had ever entered the window before it.
    pub entered: u64,
    /// Microseconds since the log was made, by a monotonic clock while a gateway ran and by the wall
    /// clock in between.
    pub clock: u64,
    /// The wall clock at that time.
    pub wall: TimeMicros,
}

impl WindowStamp {
    /// The window's clock in whole seconds: 136 years of them.
    pub fn seconds(self) -> u32 {
        u32::try_from(self.clock / 1_000_000).unwrap_or(u32::MAX)
    }
}

/// The part of a frame behind its records. A frame has one if it keeps or releases ids, if it is the
/// first of a segment, and if a clean shutdown wrote it.
#[derive(Serialize, Deserialize)]
pub struct OncePart<'a> {
    /// The window's counters when the frame was written.
    pub stamp: WindowStamp,
    /// In a segment's first frame: the exchanges that were open before it.
    #[serde(borrow, with = "serde_bytes")]
    open: Option<&'a [u8]>,
    #[serde(borrow, with = "serde_bytes")]
    releases: &'a [u8],
}

/// Bytes of an entry of [`OncePart::open`].
pub const OPEN_EXCHANGE_BYTES: usize = OnceId::BYTES + 16;
/// Bytes of an entry of [`OncePart::releases`].
const RELEASED_ID_BYTES: usize = OnceId::BYTES + 4;

/// An id and the section that was kept under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnceEntry {
    /// The id that the section came with.
    pub id: OnceId,
    /// Where the kept section is.
    pub kept: KeptRange,
    /// When it was kept, in whole seconds of the window's clock.
    pub since_s: u32,
}

/// The records of a section that was kept under an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptRange {
    /// The offset of its first record.
    pub first_offset: Offset,
    /// How many records it has.
    pub records: u32,
}

impl From<KeptRange> for Offsets {
    fn from(earlier: KeptRange) -> Self {
        Offsets::consecutive(earlier.first_offset, earlier.records)
    }
}

impl<'a> OncePart<'a> {
    /// The part at the beginning of `bytes`, and the bytes behind it.
    pub fn take(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (once, rest) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        let whole = once.open.is_none_or(|open| open.len() % OPEN_EXCHANGE_BYTES == 0)
            && once.releases.len() % RELEASED_ID_BYTES == 0;
        whole.then_some((once, rest))
    }

    /// Writes a once part: `open` and `releases` come from [`put_open_exchange`] and [`put_release`].
    pub fn put(stamp: WindowStamp, open: Option<&[u8]>, releases: &[u8], to: &mut Vec<u8>) {
        put_postcard(&OncePart { stamp, open, releases }, to);
    }

    /// The exchanges that were open before the frame, oldest first, if the frame lists them.
    pub fn open(&self) -> Option<impl Iterator<Item = OnceEntry> + use<'a>> {
        let entry = |bytes: &[u8; OPEN_EXCHANGE_BYTES]| {
            const WHOLE: &str = "16 + 8 + 4 + 4 bytes";
            let (id, rest) = bytes.split_first_chunk().expect(WHOLE);
            let (first_offset, rest) = rest.split_first_chunk().expect(WHOLE);
            let (records, rest) = rest.split_first_chunk().expect(WHOLE);
            let kept = KeptRange {
                first_offset: Offset::from_le_bytes(*first_offset),
                records: u32::from_le_bytes(*records),
            };
            let since_s = u32::from_le_bytes(*rest.first_chunk().expect(WHOLE));
            OnceEntry { id: OnceId(*id), kept, since_s }
        };
        self.open.map(|open| open.as_chunks().0.iter().map(entry))
    }

    /// The ids that the frame releases, each with the number of the frame's sections before it.
    pub fn releases(&self) -> impl Iterator<Item = (u32, OnceId)> + use<'a> {
        self.releases.as_chunks::<RELEASED_ID_BYTES>().0.iter().map(|bytes| {
            let (sections, id) = bytes.split_first_chunk().expect("4 of 20 bytes");
            (u32::from_le_bytes(*sections), OnceId(*id.first_chunk().expect("16 bytes")))
        })
    }
}

/// Writes an entry of [`OncePart::open`].
pub fn put_open_exchange(entry: &OnceEntry, to: &mut Vec<u8>) {
    to.extend_from_slice(entry.id.as_bytes());
    to.extend_from_slice(&entry.kept.first_offset.to_le_bytes());
    to.extend_from_slice(&entry.kept.records.to_le_bytes());
    to.extend_from_slice(&entry.since_s.to_le_bytes());
}

/// Writes an entry of [`OncePart::releases`]: `id` is released after `sections` sections of the frame.
pub fn put_release(sections: u32, id: OnceId, to: &mut Vec<u8>) {
    to.extend_from_slice(&sections.to_le_bytes());
    to.extend_from_slice(id.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids are on disk: the same input has to give the same id for ever.
    #[test]
    fn an_id_is_made_the_same_way_for_ever_and_shows_its_kind() {
        let press = DatasourceId::new("press-4").expect("slug");
        let oven = DatasourceId::new("oven").expect("slug");
        let message = OnceId::of_message(&press, "reading-1");
        let exchange = OnceId::of_exchange(7, 1);
        let parked = |messages: &[(&'static str, &'static [u8])]| {
            OnceId::of_parked(&press, "reading-1", messages.iter().copied())
        };
        let one = parked(&[("t", b"ab")]);
        assert!(!message.is_exchange() && exchange.is_exchange() && !one.is_exchange());
        for other in [message, parked(&[("ta", b"b")]), parked(&[("t", b"a"), ("b", b"")]), parked(&[])] {
            assert_ne!(one, other);
        }
        assert_ne!(message, OnceId::of_message(&oven, "reading-1"));
        assert_ne!(exchange, OnceId::of_exchange(7, 2));
        assert_ne!(exchange, OnceId::of_exchange(8, 1));
        assert_eq!(
            format!("{:02x?}", message.0),
            "[56, f5, 9a, ca, 83, 3e, 4a, a8, e1, ca, 61, bc, 92, d7, 10, 76]"
        );
        assert_eq!(
            format!("{:02x?}", exchange.0),
            "[8e, 1b, 77, 87, ea, 73, 4b, 53, a3, 48, 72, 12, 63, 44, 1a, 88]"
        );
        assert_eq!(
            format!("{:02x?}", one.0),
            "[2d, a3, 47, 8b, 39, 97, f5, 72, d0, 6b, d1, 9d, 95, ed, 98, 94]"
        );
    }

    /// The digest is in the messages of a cluster's stream.
    #[test]
    fn a_digest_is_made_the_same_way_for_ever_and_of_everything_that_counts() {
        let of = |datasource: &str, messages: &[(&'static str, &'static [u8])]| {
            ContentDigest::of(datasource, messages.iter().copied())
        };
        let one = of("press-4", &[("t", b"ab")]);
        for other in [
            of("oven", &[("t", b"ab")]),
            of("press-4", &[("ta", b"b")]),
            of("press-4", &[("t", b"ab"), ("", b"")]),
            of("press-4", &[("t", b"a"), ("t", b"b")]),
            of("press-4", &[("t", b"b"), ("t", b"a")]),
            of("press-4", &[]),
        ] {
            assert_ne!(one, other);
        }
        assert_eq!(ContentDigest::from_hex(&one.to_hex()), Some(one));
        assert_eq!(ContentDigest::from_hex("no digest"), None);
        assert_eq!(one.to_hex(), "96e3a5a33bf8c0f3");
    }

    #[test]
    fn a_once_part_gives_back_what_was_put_in_and_a_cut_one_is_refused() {
        let id = OnceId::of_exchange(7, 1);
        let entry =
            OnceEntry { id, kept: KeptRange { first_offset: 1 << 40, records: 1 }, since_s: 3_000_000_000 };
        let (mut open, mut releases, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        put_open_exchange(&entry, &mut open);
        put_release(5, id, &mut releases);
        let stamp = WindowStamp { entered: 1 << 50, clock: u64::MAX, wall: -1 };
        OncePart::put(stamp, Some(&open), &releases, &mut bytes);
        let (once, rest) = OncePart::take(&bytes).expect("whole");
        assert!(rest.is_empty());
        assert_eq!(once.stamp, stamp);
        assert_eq!(once.open().map(Iterator::collect::<Vec<_>>), Some(vec![entry]));
        assert_eq!(once.releases().collect::<Vec<_>>(), [(5, id)]);
        for cut in 0..bytes.len() {
            assert!(OncePart::take(&bytes[..cut]).is_none(), "cut at {cut}");
        }
    }
}
