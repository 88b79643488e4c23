//! The records of one batch that match the filters of a feed.

use std::cell::{Ref, RefCell};
use std::sync::Arc;

use super::filter_set::{FilterSet, TopicMatches};
use super::mailbox::RoutedPlaces;
use crate::log::{Batch, RecordPlace, WithheldRules, WithheldSnapshot};

/// The matching records of one batch, in order.
pub struct MatchedRecords {
    batch: Batch,
    places: Arc<RoutedPlaces>,
    filters: HitFilters,
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

/// The filters that match the records of a [`MatchedRecords`].
pub(super) enum HitFilters {
    /// One matches them all.
    One([u32; 1]),
    /// Each record is matched by some of these. Which ones is found out when the record is given out: a list
    /// for each would take far more memory than the records.
    Several(Arc<FilterSet>, Box<TopicMatches>),
}

impl MatchedRecords {
    /// The records of `batch` that `places` has, without those that are withheld.
    pub(super) fn new(
        batch: Batch,
        places: Arc<RoutedPlaces>,
        filters: HitFilters,
        withheld: Arc<WithheldRules>,
    ) -> Self {
        Self { batch, places, filters, next: 0, withheld, left_out: RefCell::default() }
    }

    /// The same without the first `skipped` records.
    pub(super) fn starting_at(self, skipped: usize) -> Self {
        Self { next: skipped, ..self }
    }

    /// The batch of the records.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// What it holds in memory, in bytes.
    pub fn weight(&self) -> usize {
        self.batch.weight() + size_of_val(&**self.places)
    }

    /// The place of the next record.
    pub fn peek_place(&self) -> Option<RecordPlace> {
        self.next_given(self.next).map(|at| self.places[at])
    }

    /// The next record. It stays the next until [`MatchedRecords::advance`]. Takes what it costs to find its
    /// filters from `steps`.
    pub fn peek(&mut self, steps: &mut usize) -> Option<FilterHit<'_>> {
        let mut reader = None;
        loop {
            let at = self.next_given(self.next)?;
            let place = self.places[at];
            self.next = at;
            let HitFilters::Several(set, matches) = &mut self.filters else { break };
            let record = reader.get_or_insert_with(|| self.batch.reader()).read(place);
            let topic = (record.datasource, record.topic);
            if !set.slots_for(topic, place.offset, matches, steps).is_empty() {
                break;
            }
            // Its filters are gone.
            self.next += 1;
        }
        let place = self.places[self.next];
        let slots = match &self.filters {
            HitFilters::One(slot) => &slot[..],
            HitFilters::Several(set, matches) => set.found(matches, place.offset),
        };
        Some(FilterHit { place, slots })
    }

    /// Moves past the next record.
    pub fn advance(&mut self) {
        self.next = self.next_given(self.next).map_or(self.places.len(), |at| at + 1);
    }

    /// How many records are left.
    pub fn remaining(&self) -> usize {
        let leaves_all = self.left_out().is_nothing();
        if leaves_all {
            return self.places.len() - self.next;
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
            return (at < self.places.len()).then_some(at);
        }
        let mut reader = self.batch.reader();
        (at..self.places.len()).find(|&at| !left_out.withholds(&reader.read(self.places[at])))
    }
}
