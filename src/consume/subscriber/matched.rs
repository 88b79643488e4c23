//! The records of one batch that match the filters of a feed.

use std::cell::{Ref, RefCell};
use std::sync::Arc;

use crate::log::{Batch, RecordPlace, WithheldRules, WithheldSnapshot};

/// The matching records of one batch, in order.
pub struct MatchedRecords {
    batch: Batch,
    hits: FilterHits,
    next: usize,
    withheld: Arc<WithheldRules>,
    /// The rules as of the last look, with a version that they have at least; nothing, if they leave all of the batch.
    left_out: RefCell<(u64, WithheldSnapshot)>,
}

/// One record of a [`MatchedRecords`]: its place, and the slots of the filters that match it.
pub struct FilterHit<'a> {
    /// Where in [`MatchedRecords::batch`].
    pub place: RecordPlace,
    /// At least one.
    pub slots: &'a [u32],
}

/// The records of a batch that filters match, in order.
pub(super) enum FilterHits {
    /// One filter matches them all. Every subscriber of that filter shares the places.
    One([u32; 1], Arc<[RecordPlace]>),
    /// Each record with the position of its first slot, and the slots of all records.
    Many(Vec<(RecordPlace, u32)>, Vec<u32>),
}

impl MatchedRecords {
    /// The records of `batch` that `hits` has, without those that are withheld.
    pub(super) fn new(batch: Batch, hits: FilterHits, withheld: Arc<WithheldRules>) -> Self {
        Self { batch, hits, next: 0, withheld, left_out: RefCell::default() }
    }

    /// The same without the first `skipped` records.
    pub(super) fn starting_at(self, skipped: usize) -> Self {
        Self { next: skipped, ..self }
    }

    /// The batch of the records.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The next record. It stays the next until [`MatchedRecords::advance`].
    pub fn peek(&self) -> Option<FilterHit<'_>> {
        let at = self.next_given(self.next)?;
        Some(match &self.hits {
            FilterHits::One(slot, places) => FilterHit { place: places[at], slots: slot },
            FilterHits::Many(places, slots) => {
                let (place, from) = places[at];
                let to = places.get(at + 1).map_or(slots.len(), |(_, next)| *next as usize);
                FilterHit { place, slots: &slots[from as usize..to] }
            }
        })
    }

    /// Moves past the next record.
    pub fn advance(&mut self) {
        self.next = self.next_given(self.next).map_or(self.hits.len(), |at| at + 1);
    }

    /// How many records are left.
    pub fn remaining(&self) -> usize {
        let leaves_all = self.left_out().is_nothing();
        if leaves_all {
            return self.hits.len() - self.next;
        }
        std::iter::successors(self.next_given(self.next), |at| self.next_given(at + 1)).count()
    }

    /// Whether any record is left.
    pub(super) fn has_more(&self) -> bool {
        self.next_given(self.next).is_some()
    }

    /// What is withheld now. Looked up again only when that has changed: it is asked for each record.
    fn left_out(&self) -> Ref<'_, WithheldSnapshot> {
        let version = self.withheld.version();
        if self.left_out.borrow().0 != version {
            let now = self.withheld.now();
            let concerned = self.batch.sections().any(|section| now.concerns(section.datasource()));
            self.left_out.replace((version, if concerned { now } else { WithheldSnapshot::default() }));
        }
        Ref::map(self.left_out.borrow(), |(_, left_out)| left_out)
    }

    /// The first record from `at` on that is not withheld. This is checked at the last moment, because matches may wait
    /// for a slow subscriber.
    fn next_given(&self, at: usize) -> Option<usize> {
        let left_out = self.left_out();
        if left_out.is_nothing() {
            return (at < self.hits.len()).then_some(at);
        }
        let mut reader = self.batch.reader();
        (at..self.hits.len()).find(|&at| !left_out.withholds(&reader.read(self.hits.place(at))))
    }
}

impl FilterHits {
    fn len(&self) -> usize {
        match self {
            FilterHits::One(_, places) => places.len(),
            FilterHits::Many(places, _) => places.len(),
        }
    }

    fn place(&self, at: usize) -> RecordPlace {
        match self {
            FilterHits::One(_, places) => places[at],
            FilterHits::Many(places, _) => places[at].0,
        }
    }

    /// Builds hits from ordered pairs of record and slot; a record has one pair per matching filter.
    pub(super) fn from_pairs(all: impl Iterator<Item = (RecordPlace, u32)>) -> Option<Self> {
        let (mut places, mut slots): (Vec<(RecordPlace, u32)>, Vec<u32>) = Default::default();
        for (place, slot) in all {
            if places.last().is_none_or(|(last, _)| last.offset != place.offset) {
                places.push((place, u32::try_from(slots.len()).expect("fewer than 2³² in a batch")));
            }
            slots.push(slot);
        }
        (!places.is_empty()).then_some(FilterHits::Many(places, slots))
    }
}
