//! An assembly: one batch while it is put together from the waiting submissions. It decides, section
//! by section, which offset it gets, whether it was kept before, and whether its key is dead.

use std::collections::HashMap;

use super::SectionOutcome;
use super::frame::FRAME_HEADER_BYTES;
use super::once::{KeptRange, OnceId, put_release};
use super::section::{Section, put_body};
use super::window::DedupWindow;
use super::writer::WriterSubmission;
use crate::limits::CLOCK_SKEW_MICROS_MAX;
use crate::message::{Offset, TimeMicros};

/// A batch while it is put together.
pub(super) struct Assembly<'a> {
    window: &'a DedupWindow,
    /// Ids of this batch: what it keeps under each, `None` for a released one. The window learns of
    /// them only when the batch is durable.
    ids: HashMap<OnceId, Option<KeptRange>>,
    releases: Vec<u8>,
    first_offset: Offset,
    next_offset: Offset,
    time_max: TimeMicros,
    /// The approximate size of its sections, in bytes.
    weight: usize,
    /// How many sections are in it.
    sections: u32,
    has_retained: bool,
    has_notes: bool,
}

/// A batch that is ready to be written.
pub(super) struct AssembledBatch {
    /// Room for a frame's header, then the body.
    pub(super) frame: Vec<u8>,
    pub(super) records: u32,
    /// The newest `received_at` in it and before it.
    pub(super) time_max: TimeMicros,
    /// Whether one of its records is to be retained.
    pub(super) has_retained: bool,
    /// Whether one of its records has a note.
    pub(super) has_notes: bool,
    /// Whether it keeps or releases an id.
    pub(super) has_ids: bool,
    /// The releases, encoded for [`OncePart`](super::once::OncePart).
    pub(super) releases: Vec<u8>,
}

impl AssembledBatch {
    /// The batch of a clean shutdown: no records, only the time for the window.
    pub(super) fn seal(time_max: TimeMicros) -> Self {
        let mut frame = vec![0; FRAME_HEADER_BYTES];
        put_body(&[], &mut frame);
        let (has_retained, has_notes, has_ids) = (false, false, true);
        Self { frame, records: 0, time_max, has_retained, has_notes, has_ids, releases: Vec::new() }
    }
}

impl<'a> Assembly<'a> {
    /// An empty batch that begins at `first_offset`.
    pub(super) fn new(window: &'a DedupWindow, first_offset: Offset, time_max: TimeMicros) -> Self {
        Self {
            window,
            ids: HashMap::new(),
            releases: Vec::new(),
            first_offset,
            next_offset: first_offset,
            time_max,
            weight: 0,
            sections: 0,
            has_retained: false,
            has_notes: false,
        }
    }

    /// Adds a submission, and returns the outcome of each of its sections.
    pub(super) fn take(&mut self, submission: &mut WriterSubmission) -> Vec<SectionOutcome> {
        let outcomes = submission.sections.iter_mut().map(|section| self.place_section(section)).collect();
        for id in &submission.releases {
            if self.kept_under(*id).is_some() {
                put_release(self.sections, *id, &mut self.releases);
                self.ids.insert(*id, None);
            }
        }
        outcomes
    }

    /// Gives a section its offset, unless its key is dead or it is a duplicate.
    fn place_section(&mut self, section: &mut Section) -> SectionOutcome {
        if section.records() == 0 || !section.lease.holds() {
            return SectionOutcome::KeyDead;
        }
        if let Some(earlier) = section.once().find_map(|id| self.kept_under(id)) {
            return SectionOutcome::Duplicate(earlier.into());
        }
        if (0..=CLOCK_SKEW_MICROS_MAX).contains(&self.time_max.saturating_sub(section.received_at)) {
            section.received_at = self.time_max;
        }
        let kept = KeptRange { first_offset: self.next_offset, records: section.records() };
        self.ids.extend(section.once().map(|id| (id, Some(kept))));
        self.time_max = self.time_max.max(section.received_at);
        self.weight += section.weight();
        self.sections += 1;
        self.has_retained |= section.has_retained();
        self.has_notes |= section.has_notes();
        self.next_offset += u64::from(section.records());
        SectionOutcome::Kept(kept.into())
    }

    /// What was kept under an id, in this batch or before it.
    fn kept_under(&self, id: OnceId) -> Option<KeptRange> {
        match self.ids.get(&id) {
            Some(in_this_batch) => *in_this_batch,
            None => self.window.get(id),
        }
    }

    /// Builds the batch from the sections that were given an offset; `None` if there is nothing in it.
    pub(super) fn finish(self, kept: &[&Section]) -> Option<AssembledBatch> {
        if kept.is_empty() && self.releases.is_empty() {
            return None;
        }
        let records = u32::try_from(self.next_offset - self.first_offset);
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + self.weight + 16);
        frame.resize(FRAME_HEADER_BYTES, 0);
        put_body(kept, &mut frame);
        Some(AssembledBatch {
            frame,
            records: records.expect("in-flight bytes bound the records"),
            time_max: self.time_max,
            has_retained: self.has_retained,
            has_notes: self.has_notes,
            has_ids: !self.ids.is_empty(),
            releases: self.releases,
        })
    }
}
