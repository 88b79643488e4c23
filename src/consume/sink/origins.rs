//! Origins: what a record has in common with most others of its sender, which are the key, the transport and the media
//! type. Each is noted as used below some offset, so that retention sees when the last record that has it is gone.
//!
//! A new origin is noted up to the end of the transaction: a media type that comes once goes with its record. One that comes
//! again is noted some way ahead, together with the others of the transaction, so that a record of a known origin costs no
//! statement, however many senders take turns.

use super::schema::sql_offset;
use crate::limits::ORIGIN_USE_OFFSETS;
use crate::message::Offset;

/// An origin whose row id is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RememberedOrigin {
    pub(super) id: i64,
    /// All records that the database knows it of are below.
    pub(super) used_below: i64,
}

/// What one transaction uses.
#[derive(Debug, Default)]
pub(super) struct OriginUses {
    /// What a new origin is noted with.
    pub(super) new_below: i64,
    /// What one that was there before is noted with.
    pub(super) known_below: i64,
    /// The row ids of remembered origins that are still to be noted with that.
    unnoted: Vec<i64>,
}

impl OriginUses {
    /// Begins a transaction of records below `next`.
    pub(super) fn begin_transaction(&mut self, next: Offset) {
        self.new_below = sql_offset(next);
        self.known_below = sql_offset(next.next_multiple_of(ORIGIN_USE_OFFSETS));
        self.unnoted.clear();
    }

    /// The row id of a remembered origin, for the record at `offset`.
    #[inline]
    pub(super) fn use_at(&mut self, offset: Offset, origin: &mut RememberedOrigin) -> i64 {
        if sql_offset(offset) >= origin.used_below {
            // The transaction writes it before it ends, or nothing is remembered any more.
            origin.used_below = self.known_below;
            self.unnoted.push(origin.id);
        }
        origin.id
    }

    /// The origins that the transaction has to note as used below `known_below` before it ends.
    pub(super) fn take_unnoted(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.unnoted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remembered_origin_stays_usable_and_is_noted_once_in_many_offsets() {
        let mut uses = OriginUses::default();
        uses.begin_transaction(100);
        let mut origin = RememberedOrigin { id: 7, used_below: uses.new_below };
        assert_eq!((uses.use_at(99, &mut origin), uses.take_unnoted()), (7, vec![]));
        let mut notes = 0;
        for next in (200..=2 * ORIGIN_USE_OFFSETS).step_by(100) {
            uses.begin_transaction(next);
            for offset in [next - 100, next - 1] {
                assert_eq!(uses.use_at(offset, &mut origin), 7);
            }
            notes += uses.take_unnoted().len();
            assert!(origin.used_below >= sql_offset(next), "noted beyond each of its records");
        }
        assert_eq!(notes, 2);
    }
}
