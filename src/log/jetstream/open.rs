//! Appends that are on their way into the stream: what is known of each section and each of its messages.

use std::collections::VecDeque;
use std::time::Instant;

use headgate_bridge_nats::HeaderMap;

use super::append::Reply;
use crate::log::{AppendError, Committed, Offsets, OnceId, Outcome, Section};
use crate::message::Offset;

/// The appends that are not settled, by their numbers, of which the first is `first`.
#[derive(Default)]
pub(super) struct Appends {
    open: VecDeque<Option<Open>>,
    first: u64,
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The number of its append.
    pub(super) append: u64,
    pub(super) section: u32,
    pub(super) record: u32,
    /// It may have been stored by an earlier attempt.
    pub(super) again: bool,
}

/// An append that is not settled.
pub(super) struct Open {
    pub(super) sections: Vec<Progress>,
    /// Messages and rows whose fate is not known.
    pub(super) left: usize,
    pub(super) error: Option<AppendError>,
    pub(super) give_up_at: Instant,
    pub(super) reply: Reply,
}

/// How far a section is.
pub(super) struct Progress {
    pub(super) section: Section,
    /// What all its messages have in common.
    pub(super) headers: HeaderMap,
    /// Where its records are in it.
    pub(super) places: Vec<u32>,
    /// Its id, with the generation that an exchange's has.
    pub(super) once: Option<(OnceId, Option<u64>)>,
    /// Per record: where it is, once it is.
    pub(super) offsets: Vec<Offset>,
    pub(super) duplicates: usize,
    /// What was kept before under its id, where that is not as many records.
    pub(super) earlier: Option<Offsets>,
    pub(super) dead: bool,
}

impl Appends {
    /// The number that the next one gets.
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

    /// Takes one in. It has the number that was the next one's.
    pub(super) fn push(&mut self, open: Open) {
        self.open.push_back(Some(open));
    }

    /// The one with a number, while it is not settled.
    pub(super) fn get_mut(&mut self, append: u64) -> Option<&mut Open> {
        self.slot(append)?.as_mut()
    }

    /// All of them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Open> {
        self.open.iter_mut().flatten()
    }

    /// Lets go of one, if nothing of it is left to be known.
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
    /// Who waits for it, and what he is to be told. If it was kept, also the last offset of it.
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
    /// How many records wait for what becomes of the one at `place`, with it: of several with one id, all
    /// for the first.
    pub(super) fn stands_for(&self, place: Place) -> usize {
        if self.once.is_some() && place.record == 0 { self.offsets.len() } else { 1 }
    }

    /// What has become of it.
    fn outcome(self) -> Outcome {
        match self.earlier {
            _ if self.dead => Outcome::KeyDead,
            Some(earlier) => Outcome::Duplicate(earlier),
            None if self.duplicates == self.offsets.len() => Outcome::Duplicate(Offsets::of(&self.offsets)),
            None => Outcome::Kept(Offsets::of(&self.offsets)),
        }
    }
}
