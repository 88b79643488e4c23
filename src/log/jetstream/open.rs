//! Appends on their way into the stream: the state of each section and each of its messages.

use std::collections::VecDeque;
use std::time::Instant;

use headgate_bridge_nats::HeaderMap;

use super::append::Reply;
use crate::log::{AppendError, Committed, Offsets, OnceId, Outcome, Section};
use crate::message::Offset;

/// The appends that are not settled, numbered from `first` on.
#[derive(Default)]
pub(super) struct Appends {
    open: VecDeque<Option<Open>>,
    first: u64,
}

/// Identifies one message of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The number of its append.
    pub(super) append: u64,
    pub(super) section: u32,
    pub(super) record: u32,
    /// Whether an earlier attempt may have stored it.
    pub(super) again: bool,
}

/// An append that is not settled.
pub(super) struct Open {
    pub(super) sections: Vec<Progress>,
    /// Messages and rows whose outcome is not known yet.
    pub(super) left: usize,
    pub(super) error: Option<AppendError>,
    pub(super) give_up_at: Instant,
    pub(super) reply: Reply,
}

/// The state of one section.
pub(super) struct Progress {
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
    /// The records kept before under its id, if their number differs.
    pub(super) earlier: Option<Offsets>,
    pub(super) dead: bool,
}

impl Appends {
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

    /// Adds an append under [`Appends::next_number`].
    pub(super) fn push(&mut self, open: Open) {
        self.open.push_back(Some(open));
    }

    /// The append with this number, while it is not settled.
    pub(super) fn get_mut(&mut self, append: u64) -> Option<&mut Open> {
        self.slot(append)?.as_mut()
    }

    /// All appends that are not settled.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Open> {
        self.open.iter_mut().flatten()
    }

    /// Removes an append, if all its outcomes are known.
    pub(super) fn take_settled(&mut self, append: u64) -> Option<Open> {
        let settled = self.slot(append)?.take_if(|open| open.left == 0);
        while let Some(None) = self.open.front() {
            self.open.pop_front();
            self.first += 1;
        }
        settled
    }

    fn slot(&mut self, append: u64) -> Option<&mut Option<Open>> {
        let at = usize::try_from(append.checked_sub(self.first)?).ok()?;
        self.open.get_mut(at)
    }
}

impl Open {
    /// The caller and the answer; for a kept append also its last offset.
    pub(super) fn settle(self) -> (Reply, Result<(Committed, Offset), AppendError>) {
        let Self { sections, error, reply, .. } = self;
        if let Some(error) = error {
            return (reply, Err(error));
        }
        let last = sections.iter().flat_map(|progress| &progress.offsets).max().copied().unwrap_or_default();
        let outcomes = sections.into_iter().map(Progress::outcome).collect();
        (reply, Ok((Committed { outcomes }, last)))
    }
}

impl Progress {
    /// How many records, itself included, depend on the outcome of the one at `place`: the first of several
    /// with one id stands for all of them.
    pub(super) fn stands_for(&self, place: Place) -> usize {
        if self.once.is_some() && place.record == 0 { self.offsets.len() } else { 1 }
    }

    /// The outcome of the section.
    fn outcome(self) -> Outcome {
        match self.earlier {
            _ if self.dead => Outcome::KeyDead,
            Some(earlier) => Outcome::Duplicate(earlier),
            None if self.duplicates == self.offsets.len() => Outcome::Duplicate(Offsets::of(&self.offsets)),
            None => Outcome::Kept(Offsets::of(&self.offsets)),
        }
    }
}
