//! Appends on their way into the stream: the state of each section and each of its messages.

use std::collections::VecDeque;
use std::time::Instant;

use headgate_bridge_nats::HeaderMap;

use super::JetstreamLogShared;
use super::append::AppendReply;
use super::id_allowance::IdAllowance;
use super::message::SharedIdContent;
use super::open_exchanges::KeptExchange;
use crate::log::{AppendError, CommitOutcome, Offsets, OnceId, Section, SectionOutcome};
use crate::message::Offset;

/// The appends that are not settled, numbered from `first` on.
#[derive(Default)]
pub(super) struct PendingAppends {
    open: VecDeque<Option<PendingAppend>>,
    first: u64,
}

/// Identifies one message of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PendingMessage {
    /// The number of its append.
    pub(super) append: u64,
    pub(super) section: u32,
    pub(super) record: u32,
    /// Whether an earlier attempt may have stored it.
    pub(super) again: bool,
    /// Whether it is no record, but the question whether the section's first asked id is known.
    pub(super) asks: bool,
    /// The offset that was the next one when it was published: the stream cannot put it before that.
    pub(super) after: Offset,
}

/// An append that is not settled.
pub(super) struct PendingAppend {
    pub(super) sections: Vec<SectionProgress>,
    /// Messages and rows whose outcome is not known yet.
    pub(super) left: usize,
    pub(super) error: Option<AppendError>,
    pub(super) give_up_at: Instant,
    pub(super) reply: AppendReply,
}

/// The state of one section.
pub(super) struct SectionProgress {
    pub(super) section: Section,
    /// The headers that all its messages share.
    pub(super) headers: HeaderMap,
    /// The positions of its records in the section.
    pub(super) places: Vec<u32>,
    /// Its id, with the generation if it is an exchange's.
    pub(super) once: Option<(OnceId, Option<u64>)>,
    /// The offset of each record that is stored; 0 before.
    pub(super) offsets: Vec<Offset>,
    pub(super) duplicates: usize,
    /// What its messages are together.
    pub(super) content: SharedIdContent,
    /// The ids that it still has to ask for, before anything of it is published.
    pub(super) asked: VecDeque<(OnceId, Option<u64>)>,
    /// What was found instead of keeping it.
    pub(super) found: Option<SectionOutcome>,
    pub(super) dead: bool,
    /// How many new ids its datasource was charged for.
    pub(super) new_ids: usize,
    /// Its datasource may bring no new id: it is kept only if its own is known.
    pub(super) is_over: bool,
}

impl PendingAppends {
    /// The number of the next append.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.open.len() as u64
    }

    /// All below this number are settled.
    pub(super) fn settled_below(&self) -> u64 {
        self.first
    }

    /// Whether all are settled.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Adds an append under [`PendingAppends::next_number`].
    pub(super) fn push(&mut self, open: PendingAppend) {
        self.open.push_back(Some(open));
    }

    /// The append with this number, while it is not settled.
    pub(super) fn get_mut(&mut self, append: u64) -> Option<&mut PendingAppend> {
        self.slot(append)?.as_mut()
    }

    /// All appends that are not settled.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut PendingAppend> {
        self.open.iter_mut().flatten()
    }

    /// Removes an append, if all its outcomes are known.
    pub(super) fn take_settled(&mut self, append: u64) -> Option<PendingAppend> {
        let settled = self.slot(append)?.take_if(|open| open.left == 0);
        while let Some(None) = self.open.front() {
            self.open.pop_front();
            self.first += 1;
        }
        settled
    }

    fn slot(&mut self, append: u64) -> Option<&mut Option<PendingAppend>> {
        let at = usize::try_from(append.checked_sub(self.first)?).ok()?;
        self.open.get_mut(at)
    }
}

impl PendingAppend {
    /// The last offset of its records; 0 if it has none.
    pub(super) fn last_offset(&self) -> Offset {
        self.sections.iter().flat_map(|progress| &progress.offsets).max().copied().unwrap_or_default()
    }

    /// Answers its caller although the follower does not have its records. Of a key that is dead by now and whose fence is
    /// not known, nobody can say whether it ended before them.
    pub(super) fn answer_unfollowed(mut self, shared: &JetstreamLogShared) {
        let is_in_doubt = |section: &Section| {
            // What was redriven comes in under an admin's key, behind the end of its own.
            !section.key_holds() && !section.is_redriven() && !shared.fences.has(section.key_id)
        };
        if self.error.is_none() && self.sections.iter().any(|progress| is_in_doubt(&progress.section)) {
            let words = "its key has ended since it was published, and this gateway has not followed the stream so far";
            self.error = Some(AppendError::Unknown(words.into()));
        }
        self.answer(shared);
    }

    /// Gives back the ids of what did not come into the stream now.
    pub(super) fn settle_ids(&self, ids: &IdAllowance) {
        for progress in self.sections.iter().filter(|progress| progress.new_ids > 0) {
            let stored = progress.offsets.iter().filter(|offset| **offset > 0).count();
            let is_new = stored.saturating_sub(progress.duplicates);
            ids.give_back(&progress.section.datasource, progress.new_ids.saturating_sub(is_new));
        }
    }

    /// Answers its caller. What is behind the fence of its key is not kept.
    pub(super) fn answer(self, shared: &JetstreamLogShared) {
        let Self { sections, error, reply, .. } = self;
        let _ = reply.send(match error {
            Some(error) => Err(error),
            None => {
                let outcomes = sections.into_iter().map(|progress| progress.outcome(shared)).collect();
                Ok(CommitOutcome { outcomes })
            }
        });
    }
}

impl SectionProgress {
    /// How many records, itself included, depend on the outcome of the one at `place`: the first of several
    /// with one id stands for all of them, and so does a question before them.
    pub(super) fn stands_for(&self, place: PendingMessage) -> usize {
        if place.asks {
            return 1 + if self.section.is_question() { 0 } else { self.offsets.len() };
        }
        if self.once.is_some() && place.record == 0 { self.offsets.len() } else { 1 }
    }

    /// Whether the next id that it asks for is its own.
    pub(super) fn asks_own_id(&self) -> bool {
        self.is_over && self.asked.len() == 1
    }

    /// The outcome of the section.
    fn outcome(self, shared: &JetstreamLogShared) -> SectionOutcome {
        let is_behind = |offset: &Offset| shared.fences.shuts_out(&self.section, *offset);
        let is_dead = self.dead || self.offsets.iter().any(is_behind);
        match self.found {
            Some(SectionOutcome::ExchangesFull) => SectionOutcome::ExchangesFull,
            _ if is_dead => SectionOutcome::KeyDead,
            Some(found) => found,
            None if self.section.is_question() => SectionOutcome::Unknown,
            None => {
                self.note_exchanges(shared);
                let offsets = Offsets::from_each(&self.offsets);
                match self.duplicates == self.offsets.len() {
                    true => SectionOutcome::Duplicate(offsets),
                    false => SectionOutcome::Kept(offsets),
                }
            }
        }
    }

    /// Notes the exchanges that it has opened: they may stay open.
    fn note_exchanges(&self, shared: &JetstreamLogShared) {
        let Some(first) = self.offsets.first().copied() else { return };
        for id in self.section.once().filter(|id| id.is_exchange()) {
            let generation = match self.once {
                Some((once, generation)) if once == id => generation,
                _ => shared.once.generation(id).map(|generation| generation.number),
            };
            let (content, epoch) = (self.content, shared.epoch());
            let kept = KeptExchange { generation, first, content, epoch };
            shared.exchanges.note_own(&self.section.datasource, id, kept);
        }
    }
}
