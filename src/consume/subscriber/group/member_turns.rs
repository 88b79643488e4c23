//! The turns of a group's members: who has which records, who waits for more, and who gets the next ones.
//!
//! Each record is for a member that has none, if there is one that has room, and otherwise for any that has room. Of
//! these it is for the one that had fewest lately, and then for the one that was served longest ago: so those that
//! others were ahead of in a burst catch up with them. Members that something is for are woken, and it is reserved for them until they
//! have come and have no room for more: so one whose task happens to run does not take what is for others.
//!
//! How many a member takes is up to its [window](PrefetchWindow). What is reserved may be more than that: some
//! messages are acknowledged as soon as they are sent, and then there is room again at once.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::prefetch_window::PrefetchWindow;
use crate::message::Offset;

/// How long the records of a full window last at least: their client and its connection work through them together.
const MEMBER_AHEAD: Duration = Duration::from_millis(2);
/// How long what is reserved for a member that was woken waits for it: far longer than a task waits for its turn on
/// a machine that is not overloaded.
const RESERVATION_WAIT_MAX: Duration = Duration::from_millis(100);
/// After so long, what a member had counts half.
const LATELY: Duration = Duration::from_millis(100);

/// The members of one group. Locked after the group's state, and never while a task is woken.
pub(super) struct MemberTurns {
    table: Mutex<MemberTable>,
    reservation_wait_max: Duration,
}

impl Default for MemberTurns {
    fn default() -> Self {
        Self { table: Mutex::default(), reservation_wait_max: RESERVATION_WAIT_MAX }
    }
}

#[derive(Default)]
struct MemberTable {
    members: BTreeMap<u64, MemberEntry>,
    /// Records that are taken and not acknowledged, with the member that took them, and when.
    outstanding: BTreeMap<Offset, (u64, Instant)>,
    /// The number of the latest service.
    services: u64,
}

struct MemberEntry {
    window: PrefetchWindow,
    /// Records that no other member may have, which the client does not have yet, and when they were taken.
    kept: BTreeMap<Offset, Instant>,
    /// The number of its latest service: 0 if there was none.
    served: u64,
    lately: RecentTakes,
    /// `Some` if it wants records and was not woken.
    waker: Option<Waker>,
    /// So many of the next records are for it.
    reserved: usize,
    /// Since when some are.
    reserved_at: Instant,
}

/// How many records a member took lately: half of them are forgotten with each [`LATELY`].
#[derive(Clone, Copy)]
struct RecentTakes {
    records: usize,
    at: Instant,
}

impl RecentTakes {
    fn as_of(self, now: Instant) -> Self {
        let halvings = now.saturating_duration_since(self.at).as_millis() / LATELY.as_millis();
        let halvings = u32::try_from(halvings).unwrap_or(u32::MAX);
        match self.records.checked_shr(halvings) {
            Some(records @ 1..) => Self { records, at: self.at + halvings * LATELY },
            _ => Self { records: 0, at: now },
        }
    }
}

/// A member that may get records now.
struct ShareCandidate {
    member: u64,
    /// How many records it has, with those that are reserved for it.
    has: usize,
    /// How many more may be for it.
    room: usize,
    lately: usize,
    served: u64,
    share: usize,
}

/// Who the next record is for: the least of these.
type CandidateRank = (bool, usize, u64, usize);

impl ShareCandidate {
    fn rank(&self, at: usize) -> CandidateRank {
        (self.has + self.share > 0, self.lately + self.share, self.served, at)
    }
}

impl MemberTurns {
    fn locked(&self) -> MutexGuard<'_, MemberTable> {
        self.table.lock()
    }

    /// Adds a member, which has nothing and wants nothing.
    pub(super) fn enter(&self, member: u64) {
        let window = PrefetchWindow::new(MEMBER_AHEAD, Instant::now());
        let now = Instant::now();
        let lately = RecentTakes { records: 0, at: now };
        let entry = MemberEntry {
            window,
            kept: BTreeMap::new(),
            served: 0,
            lately,
            waker: None,
            reserved: 0,
            reserved_at: now,
        };
        self.locked().members.insert(member, entry);
    }

    /// Removes a member. Returns the records that it had.
    pub(super) fn leave(&self, member: u64) -> Vec<Offset> {
        let mut table = self.locked();
        table.members.remove(&member);
        let had = table.outstanding.extract_if(.., |_, (of, _)| *of == member);
        had.map(|(offset, _)| offset).collect()
    }

    /// A member wants records, and waits until there are some for it. `false` if it has no room: then it does not
    /// wait, and asks again when it has acknowledged some.
    pub(super) fn ask(&self, member: u64, waker: &Waker) -> bool {
        let mut table = self.locked();
        let Some(entry) = table.members.get_mut(&member) else { return false };
        if entry.window.room(Instant::now()) > 0 {
            entry.waker = Some(waker.clone());
            return true;
        }
        drop(table);
        self.pass(member);
        false
    }

    /// There are no records for the member, which has asked.
    pub(super) fn wait(&self, member: u64) {
        if let Some(entry) = self.locked().members.get_mut(&member) {
            entry.reserved = 0;
        }
    }

    /// How many of the next `records` are for the member, which has asked, and that it has room for, `records_max`
    /// at most. The others that some are for are to be woken.
    pub(super) fn share_out(&self, member: u64, records: usize, records_max: usize) -> (usize, Vec<Waker>) {
        let now = Instant::now();
        let mut table = self.locked();
        let mut others_expected = 0;
        for (id, entry) in &mut table.members {
            entry.expire_reservation(now, self.reservation_wait_max);
            others_expected += usize::from(*id != member && entry.is_expected());
        }
        let reserved: usize = table.members.values().map(|entry| entry.reserved).sum();
        let mut candidates = Vec::new();
        for (id, entry) in &mut table.members {
            let room = match entry.window.room(now) {
                // Alone, it is given what it takes now, so that nothing is kept from those that come soon.
                room if *id == member && others_expected == 0 => room.saturating_sub(entry.reserved),
                1.. if *id == member || entry.is_expected() => usize::MAX,
                _ => 0,
            };
            if room > 0 {
                candidates.push(ShareCandidate { room, ..entry.candidate(*id, now) });
            }
        }
        share_fairly(&mut candidates, records.saturating_sub(reserved));
        let mut woken = Vec::new();
        for ShareCandidate { member: of, share, .. } in candidates.into_iter().filter(|of| of.share > 0) {
            if let Some(entry) = table.members.get_mut(&of) {
                entry.reserve(share, now);
                woken.extend(entry.waker.take_if(|_| of != member));
            }
        }
        let Some(entry) = table.members.get_mut(&member) else { return (0, woken) };
        let own = entry.reserved.min(records).min(records_max).min(entry.window.room(now));
        if own == 0 && entry.reserved > 0 {
            // Its window has just become smaller. It asks again when it has acknowledged some.
            (entry.reserved, entry.waker) = (0, None);
            woken.extend(table.wake_next());
        }
        (own, woken)
    }

    /// The member has taken records.
    pub(super) fn take(&self, member: u64, offsets: impl Iterator<Item = Offset>) {
        let now = Instant::now();
        let mut table = self.locked();
        let before = table.outstanding.len();
        table.outstanding.extend(offsets.map(|offset| (offset, (member, now))));
        let taken = table.outstanding.len() - before;
        table.services += 1;
        let served = table.services;
        if let Some(entry) = table.members.get_mut(&member) {
            entry.window.take(taken, now);
            entry.lately = entry.lately.as_of(now);
            entry.lately.records += taken;
            (entry.served, entry.waker) = (served, None);
            (entry.reserved, entry.reserved_at) = (entry.reserved.saturating_sub(taken), now);
        }
    }

    /// The member wants nothing now. What was reserved for it is for others.
    pub(super) fn pass(&self, member: u64) {
        let mut table = self.locked();
        let Some(entry) = table.members.get_mut(&member) else { return };
        entry.waker = None;
        let had_reserved = std::mem::take(&mut entry.reserved) > 0;
        let next = if had_reserved { table.wake_next() } else { None };
        drop(table);
        next.into_iter().for_each(Waker::wake);
    }

    /// Wakes the member that the next record is for.
    pub(super) fn wake_next(&self) {
        let next = self.locked().wake_next();
        next.into_iter().for_each(Waker::wake);
    }

    /// Whether any member waits for records.
    pub(super) fn has_waiting(&self) -> bool {
        self.locked().members.values().any(MemberEntry::waits)
    }

    /// The member has dealt with a record.
    pub(super) fn acknowledge(&self, member: u64, offset: Offset) {
        self.end(member, offset, |window, taken_at| window.acknowledge(taken_at, Instant::now()));
    }

    /// A record that the member took is the member's for good. It counts as one that the member has.
    pub(super) fn keep(&self, member: u64, offset: Offset) {
        let mut table = self.locked();
        let Some((_, taken_at)) = table.outstanding.get(&offset).copied().filter(|(of, _)| *of == member)
        else {
            return;
        };
        table.outstanding.remove(&offset);
        if let Some(entry) = table.members.get_mut(&member) {
            entry.kept.insert(offset, taken_at);
        }
    }

    /// The member has dealt with a record that was kept.
    pub(super) fn acknowledge_kept(&self, member: u64, offset: Offset) {
        if let Some(entry) = self.locked().members.get_mut(&member)
            && let Some(taken_at) = entry.kept.remove(&offset)
        {
            entry.window.acknowledge(taken_at, Instant::now());
        }
    }

    /// The member gives a record back. Returns whether it was the member's.
    pub(super) fn give_back(&self, member: u64, offset: Offset) -> bool {
        self.end(member, offset, |window, _| window.give_back())
    }

    fn end(&self, member: u64, offset: Offset, end: impl FnOnce(&mut PrefetchWindow, Instant)) -> bool {
        let mut table = self.locked();
        let Some((_, taken_at)) = table.outstanding.get(&offset).copied().filter(|(of, _)| *of == member)
        else {
            return false;
        };
        table.outstanding.remove(&offset);
        if let Some(entry) = table.members.get_mut(&member) {
            end(&mut entry.window, taken_at);
        }
        true
    }

    /// The first record that a member has.
    pub(super) fn first_outstanding(&self) -> Option<Offset> {
        self.locked().outstanding.keys().next().copied()
    }
}

impl Wake for MemberTurns {
    fn wake(self: Arc<Self>) {
        self.wake_next();
    }
}

impl MemberTable {
    /// Reserves a record for the member that the next one is for, and returns its waker.
    fn wake_next(&mut self) -> Option<Waker> {
        // One that is asking at this moment may have a reservation, and has to look again.
        let now = Instant::now();
        let waiting = self.members.values_mut().filter(|entry| entry.waker.is_some());
        let next = waiting.min_by_key(|entry| (entry.reserved > 0, entry.candidate(0, now).rank(0)))?;
        if next.reserved == 0 {
            next.reserve(1, now);
        }
        next.waker.take()
    }
}

impl MemberEntry {
    fn reserve(&mut self, records: usize, now: Instant) {
        if self.reserved == 0 {
            self.reserved_at = now;
        }
        self.reserved += records;
    }

    /// Takes what is reserved for it away if it was woken for it so long ago.
    fn expire_reservation(&mut self, now: Instant, wait_max: Duration) {
        if self.waker.is_none() && now.saturating_duration_since(self.reserved_at) > wait_max {
            self.reserved = 0;
        }
    }

    /// Whether it waits, or something is reserved for it and it will come.
    fn is_expected(&self) -> bool {
        self.waker.is_some() || self.reserved > 0
    }

    /// Whether it wants records, and none are reserved for it.
    fn waits(&self) -> bool {
        self.waker.is_some() && self.reserved == 0
    }

    fn candidate(&self, member: u64, now: Instant) -> ShareCandidate {
        let has = self.window.outstanding() + self.reserved;
        let lately = self.lately.as_of(now).records + self.reserved;
        ShareCandidate { member, has, room: 0, lately, served: self.served, share: 0 }
    }
}

/// Shares records out, one at a time.
fn share_fairly(candidates: &mut [ShareCandidate], records: usize) {
    if let [alone] = candidates {
        alone.share = records.min(alone.room);
        return;
    }
    let mut next: BinaryHeap<_> =
        candidates.iter().enumerate().map(|(at, candidate)| Reverse(candidate.rank(at))).collect();
    for _ in 0..records {
        let Some(Reverse((.., at))) = next.pop() else { return };
        let candidate = &mut candidates[at];
        candidate.share += 1;
        if candidate.share < candidate.room {
            next.push(Reverse(candidate.rank(at)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MEMBER_WINDOW_RECORDS_START;

    /// Turns whose members may take their time.
    fn turns() -> MemberTurns {
        MemberTurns { reservation_wait_max: Duration::MAX, ..MemberTurns::default() }
    }

    fn candidate(has: usize, room: usize, served: u64) -> ShareCandidate {
        ShareCandidate { member: served, has, room, lately: 0, served, share: 0 }
    }

    fn shares(mut candidates: Vec<ShareCandidate>, records: usize) -> Vec<usize> {
        share_fairly(&mut candidates, records);
        candidates.iter().map(|candidate| candidate.share).collect()
    }

    #[test]
    fn each_record_is_for_who_has_none_and_round_robin_among_equals() {
        let equals = || (0..4).map(|served| candidate(0, 100, served)).collect::<Vec<_>>();
        assert_eq!(shares(equals(), 8), [2, 2, 2, 2]);
        assert_eq!(shares(equals(), 6), [2, 2, 1, 1], "whoever was served longest ago is first");
        assert_eq!(shares(vec![candidate(7, 3, 1), candidate(0, 10, 2)], 1), [0, 1], "none idles");
        let ahead = ShareCandidate { lately: 3, ..candidate(1, 100, 1) };
        assert_eq!(shares(vec![ahead, candidate(1, 100, 2)], 4), [1, 3], "who is behind catches up");
        assert_eq!(shares(vec![candidate(0, 2, 1), candidate(0, 10, 2)], 9), [2, 7], "no more than has room");
        assert_eq!(shares(vec![candidate(0, 2, 1), candidate(0, 3, 2)], 9), [2, 3]);
        assert_eq!(shares(vec![candidate(0, 5, 1)], 9), [5]);
        assert!(shares(Vec::new(), 9).is_empty());
    }

    /// A member asks, and takes what is for it of so many records. Returns how many that is.
    fn take(turns: &MemberTurns, member: u64, records: &mut std::ops::Range<Offset>) -> usize {
        let left = usize::try_from(records.end - records.start).expect("few");
        if !turns.ask(member, Waker::noop()) {
            return 0;
        }
        let (own, _) = turns.share_out(member, left, usize::MAX);
        if own > 0 {
            turns.take(member, records.take(own));
        }
        own
    }

    #[test]
    fn what_is_for_others_stays_theirs_until_they_come_or_pass() {
        let turns = turns();
        [1, 2, 3].into_iter().for_each(|member| turns.enter(member));
        [1, 2, 3].into_iter().for_each(|member| assert!(turns.ask(member, Waker::noop())));
        let mut records = 0..6;
        assert_eq!(take(&turns, 1, &mut records), 2);
        assert_eq!(take(&turns, 1, &mut records), 0, "what is left is for the others");
        assert_eq!(take(&turns, 2, &mut records), 2);
        turns.pass(3);
        assert_eq!(take(&turns, 1, &mut records), 2, "the third does not take them");
    }

    /// A member that was woken, and asked again, was not told of what came meanwhile: it waited for ever.
    #[test]
    fn a_member_that_is_asking_is_told_what_comes_meanwhile() {
        struct CountedWakes(std::sync::atomic::AtomicUsize);
        impl Wake for CountedWakes {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let wakes = Arc::new(CountedWakes(0.into()));
        let waker = Waker::from(wakes.clone());
        let turns = turns();
        turns.enter(1);
        for expected in 1..4 {
            assert!(turns.ask(1, &waker));
            turns.wake_next();
            turns.wait(1);
            assert_eq!(wakes.0.load(std::sync::atomic::Ordering::Relaxed), expected);
            assert!(turns.ask(1, &waker));
            turns.wake_next();
            assert!(turns.ask(1, &waker), "with what is reserved for it");
            turns.wake_next();
            turns.wait(1);
            assert_eq!(wakes.0.swap(expected, std::sync::atomic::Ordering::Relaxed), expected + 2);
        }
    }

    /// A member whose messages were acknowledged as soon as they were sent had the whole burst before the tasks of
    /// the others ran.
    #[test]
    fn who_acknowledges_at_once_waits_for_the_others_and_who_is_full_does_not_hold_anything_up() {
        let turns = turns();
        [1, 2, 3, 4].into_iter().for_each(|member| turns.enter(member));
        [1, 2, 3, 4].into_iter().for_each(|member| assert!(turns.ask(member, Waker::noop())));
        let mut records = 0..1000;
        let mut drain = |member| {
            let mut all = 0;
            loop {
                let from = records.start;
                let taken = take(&turns, member, &mut records);
                (from..records.start).for_each(|offset| turns.acknowledge(member, offset));
                all += taken;
                if taken == 0 {
                    return all;
                }
            }
        };
        assert_eq!((drain(1), drain(2), drain(3)), (250, 250, 250));
        // The fourth hangs: what was reserved for it and is more than its window goes to others.
        let hung = take(&turns, 4, &mut records);
        assert_eq!((hung, take(&turns, 4, &mut records)), (MEMBER_WINDOW_RECORDS_START, 0));
        assert!(take(&turns, 1, &mut records) > 0);
    }

    #[test]
    fn what_a_member_took_is_forgotten_with_time() {
        let now = Instant::now();
        let mut taken = RecentTakes { records: 100, at: now };
        for step in 1..=10 {
            taken = taken.as_of(now + step * LATELY / 2);
        }
        assert_eq!(taken.records, 100 >> 5, "however often it is looked at");
        assert_eq!(taken.as_of(now + 100 * LATELY).records, 0);
    }

    #[test]
    fn a_record_is_acknowledged_by_who_has_it_and_goes_back_with_it() {
        let turns = turns();
        [1, 2].into_iter().for_each(|member| turns.enter(member));
        turns.take(1, [5, 6, 7].into_iter());
        turns.acknowledge(2, 5);
        assert_eq!(turns.first_outstanding(), Some(5));
        turns.acknowledge(1, 5);
        assert!(turns.give_back(1, 6) && !turns.give_back(1, 6) && !turns.give_back(2, 7));
        turns.take(1, [8].into_iter());
        turns.keep(1, 8);
        turns.acknowledge(1, 8);
        assert_eq!(turns.locked().members[&1].window.outstanding(), 2, "it counts until the client has it");
        turns.acknowledge_kept(1, 8);
        assert_eq!(turns.locked().members[&1].window.outstanding(), 1);
        assert_eq!(turns.leave(1), [7], "and is no other's");
        assert_eq!(turns.first_outstanding(), None);
    }
}
