//! An assembly: one batch while it is put together from the waiting submissions. It decides, section
//! by section, which offset it gets, whether it was kept before, and whether its key is dead.

use super::SectionOutcome;
use super::frame::{FRAME_HEADER_BYTES, FrameFlags};
use super::once::{KeptRange, OnceId, put_release};
use super::queue::WriterSubmission;
use super::section::{Section, put_body};
use super::window::{CommitIds, DedupWindow};
use crate::limits::{BATCH_BYTES_MAX, CLOCK_SKEW_MICROS_MAX};
use crate::message::{Offset, TimeMicros};

/// A batch while it is put together.
pub(super) struct Assembly<'a> {
    window: &'a DedupWindow,
    /// Ids of this batch. The window expects them once the batch is written, and learns of them when it is
    /// durable.
    ids: CommitIds,
    /// The released ids, each with the number of sections before it.
    releases: Vec<(usize, OnceId)>,
    next_offset: Offset,
    time_max: TimeMicros,
    /// How many sections are in it.
    sections: usize,
}

/// A commit that is ready to be written: a batch in one frame, or in several if it is large.
pub(super) struct AssembledCommit {
    pub(super) frames: Vec<AssembledFrame>,
    pub(super) ids: CommitIds,
    /// The newest `received_at` in it and before it.
    pub(super) time_max: TimeMicros,
}

/// A frame that lacks its once part and its header.
#[derive(Default)]
pub(super) struct AssembledFrame {
    /// Room for a frame's header, then the body.
    pub(super) bytes: Vec<u8>,
    pub(super) records: u32,
    pub(super) flags: FrameFlags,
    /// How many message ids it keeps.
    pub(super) message_ids: u64,
    /// The releases, encoded for [`OncePart`](super::once::OncePart).
    pub(super) releases: Vec<u8>,
}

impl AssembledFrame {
    fn new(sections: &[&Section], releases: &[(usize, OnceId)]) -> Self {
        let weight: usize = sections.iter().map(|section| section.weight()).sum();
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + weight + 64);
        bytes.resize(FRAME_HEADER_BYTES, 0);
        let flags = put_body(sections.iter().copied(), &mut bytes);
        let ids = || sections.iter().flat_map(|section| section.once());
        let mut frame = Self { bytes, flags, ..Self::default() };
        frame.records = sections.iter().map(|section| section.records()).sum();
        frame.message_ids = ids().filter(|id| !id.is_exchange()).count() as u64;
        for (sections, id) in releases {
            let sections = u32::try_from(*sections).expect("in-flight bytes bound the sections");
            put_release(sections, *id, &mut frame.releases);
        }
        frame.flags = flags.with_if(!releases.is_empty() || ids().next().is_some(), FrameFlags::ONCE);
        frame
    }
}

impl AssembledCommit {
    /// The commit of a clean shutdown: no records, only the time for the window.
    pub(super) fn seal(time_max: TimeMicros) -> Self {
        let mut frame = AssembledFrame::new(&[], &[]);
        frame.flags = FrameFlags::ONCE;
        Self { frames: vec![frame], ids: CommitIds::new(), time_max }
    }
}

impl<'a> Assembly<'a> {
    /// An empty batch that begins at `first_offset`.
    pub(super) fn new(window: &'a DedupWindow, first_offset: Offset, time_max: TimeMicros) -> Self {
        Self {
            window,
            ids: CommitIds::new(),
            releases: Vec::new(),
            next_offset: first_offset,
            time_max,
            sections: 0,
        }
    }

    /// Adds a submission, and returns the outcome of each of its sections.
    pub(super) fn take(&mut self, submission: &mut WriterSubmission) -> Vec<SectionOutcome> {
        let outcomes = submission.sections.iter_mut().map(|section| self.place_section(section)).collect();
        for id in &submission.releases {
            if self.kept_under(*id).is_some() {
                self.releases.push((self.sections, *id));
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
        self.sections += 1;
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

    /// Builds the commit from the sections that were given an offset; `None` if there is nothing in it.
    pub(super) fn finish(self, kept: &[&Section]) -> Option<AssembledCommit> {
        if kept.is_empty() && self.releases.is_empty() {
            return None;
        }
        let weight: usize = kept.iter().map(|section| section.weight()).sum();
        let frames = match weight <= BATCH_BYTES_MAX || kept.len() == 1 && kept[0].has_once_ids() {
            true => vec![AssembledFrame::new(kept, &self.releases)],
            false => self.split(kept),
        };
        Some(AssembledCommit { frames, ids: self.ids, time_max: self.time_max })
    }

    /// Several frames of about the size of a batch. A section that is kept once stays whole.
    fn split(&self, kept: &[&Section]) -> Vec<AssembledFrame> {
        let may_split = |section: &Section| !section.has_once_ids() && section.weight() > BATCH_BYTES_MAX;
        let parts: Vec<_> = kept
            .iter()
            .map(|section| if may_split(section) { section.split(BATCH_BYTES_MAX) } else { Vec::new() })
            .collect();
        let mut frames = Vec::new();
        let mut releases = &self.releases[..];
        let (mut waiting, mut weight, mut waiting_releases) = (Vec::new(), 0, Vec::new());
        for (nth, (section, parts)) in kept.iter().zip(&parts).enumerate() {
            // A release belongs to the frame of the section that comes after it.
            while let Some(((sections, id), later)) = releases.split_first()
                && *sections <= nth
            {
                waiting_releases.push((waiting.len(), *id));
                releases = later;
            }
            let whole = parts.is_empty().then_some(*section);
            for part in whole.into_iter().chain(parts) {
                if !waiting.is_empty() && weight + part.weight() > BATCH_BYTES_MAX {
                    frames.push(AssembledFrame::new(&waiting, &waiting_releases));
                    (waiting, weight, waiting_releases) = (Vec::new(), 0, Vec::new());
                }
                weight += part.weight();
                waiting.push(part);
            }
        }
        waiting_releases.extend(releases.iter().map(|(_, id)| (waiting.len(), *id)));
        frames.push(AssembledFrame::new(&waiting, &waiting_releases));
        frames
    }
}
