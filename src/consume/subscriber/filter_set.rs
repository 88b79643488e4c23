//! The filters of one feed, as they were at one moment: which of them match a record.

use std::ops::ControlFlow;

use super::trie::{DatasourceFilters, Trie};
use crate::log::{Batch, RecordPlace};
use crate::message::Offset;

/// One of a feed's filters.
pub(super) struct FilterSlot {
    /// With the datasource as its first level.
    pub(super) filter: Box<str>,
    /// The first record wanted.
    pub(super) from: Offset,
}

/// Filters by slot, for matching.
#[derive(Default)]
pub(super) struct FilterSet {
    trie: Trie<u32>,
    /// By slot; `Offset::MAX` where there is no filter.
    from: Vec<Offset>,
    /// From here on all of them are wanted.
    from_max: Offset,
}

/// Which filters match a topic, remembered for the records that follow: they often have the same one.
#[derive(Default)]
pub(super) struct TopicMatches {
    datasource: String,
    topic: String,
    known: bool,
    /// The slots of the filters that match the topic.
    slots: Vec<u32>,
    /// Those of them that want the record.
    wanted: Vec<u32>,
}

impl FilterSet {
    pub(super) fn new(slots: &[Option<FilterSlot>]) -> Self {
        let mut set = Self::default();
        for (at, slot) in slots.iter().enumerate() {
            set.from.push(slot.as_ref().map_or(Offset::MAX, |slot| slot.from));
            if let (Some(slot), Ok(at)) = (slot, u32::try_from(at)) {
                set.trie.values(&slot.filter).push(at);
                set.from_max = set.from_max.max(slot.from);
            }
        }
        set
    }

    fn wants(&self, slot: u32, offset: Offset) -> bool {
        self.from.get(slot as usize).is_some_and(|from| offset >= *from)
    }

    /// What [`FilterSet::slots_for`] has found for the record at `offset`.
    pub(super) fn found<'m>(&self, matches: &'m TopicMatches, offset: Offset) -> &'m [u32] {
        if offset >= self.from_max { &matches.slots } else { &matches.wanted }
    }

    /// The slots of the filters that match a record and want it. Takes what it costs from `steps`.
    pub(super) fn slots_for<'m>(
        &self,
        (datasource, topic): (&str, &str),
        offset: Offset,
        matches: &'m mut TopicMatches,
        steps: &mut usize,
    ) -> &'m [u32] {
        if !(matches.known && matches.topic == topic && matches.datasource == datasource) {
            matches.slots.clear();
            let mut all = usize::MAX;
            self.trie.for_datasource(datasource).visit(topic, &mut all, |&slot| {
                matches.slots.push(slot);
                ControlFlow::Continue(())
            });
            *steps = steps.saturating_sub(usize::MAX - all);
            datasource.clone_into(&mut matches.datasource);
            topic.clone_into(&mut matches.topic);
            matches.known = true;
        }
        *steps = steps.saturating_sub(1 + matches.slots.len());
        if offset < self.from_max {
            let TopicMatches { slots, wanted, .. } = matches;
            wanted.clear();
            wanted.extend(slots.iter().filter(|slot| self.wants(**slot, offset)));
        }
        self.found(matches, offset)
    }

    /// The places of the records of a batch, from `begin` on, that a filter matches and wants, as far as
    /// `steps` go; and the first offset that was not looked at.
    pub(super) fn match_batch(
        &self,
        batch: &Batch,
        begin: Offset,
        steps: &mut usize,
    ) -> (Vec<RecordPlace>, Offset) {
        let mut places = Vec::new();
        for section in batch.sections() {
            *steps = steps.saturating_sub(1).max(1);
            let starts = self.trie.for_datasource(section.datasource());
            if section.next_offset() <= begin || starts.is_empty() {
                continue;
            }
            // The last topic, once all filters are wanted, and whether one matches it.
            let mut last: Option<(&str, bool)> = None;
            for (topic, place) in section.topics().filter(|(_, place)| place.offset >= begin) {
                if *steps == 0 {
                    return (places, place.offset);
                }
                let is_wanted = match last {
                    Some((before, is_wanted)) if before == topic => is_wanted,
                    _ => self.wants_any(&starts, topic, place.offset, steps),
                };
                last = (place.offset >= self.from_max).then_some((topic, is_wanted));
                if is_wanted {
                    places.push(place);
                }
                *steps = steps.saturating_sub(1);
            }
        }
        (places, batch.next_offset())
    }

    fn wants_any(
        &self,
        starts: &DatasourceFilters<'_, u32>,
        topic: &str,
        offset: Offset,
        steps: &mut usize,
    ) -> bool {
        let (mut all, mut wanted) = (usize::MAX, false);
        starts.visit(topic, &mut all, |&slot| {
            wanted = self.wants(slot, offset);
            if wanted { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        *steps = steps.saturating_sub(usize::MAX - all);
        wanted
    }
}
