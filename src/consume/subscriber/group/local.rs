//! Groups on this gateway, which keeps their places in the log itself.
//!
//! A group has one place in the log. What it reads from there is shared out by [`MemberTurns`]. Records that a
//! member took and did not acknowledge before its connection ended go to another.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};

use super::super::feed::{FeedItem, SubscriberFeed, fetch_in_turn};
use super::super::matched::MatchedRecords;
use super::super::router::Router;
use super::member_turns::MemberTurns;
use super::{GroupJoinError, ShareDelivery, ShareGroupKey};
use crate::limits::{
    GROUP_READY_BYTES_MAX, GROUP_READY_RECORDS_MAX, REFETCH_RECORDS, STALLED_BYTES_PER_TENANT_MAX,
};
use crate::log::{Batch, Log, LogReadError, RecordPlace};
use crate::message::Offset;
use crate::shares::{ShareCharge, ShareCount, TenantShares};

/// The groups on this gateway.
pub struct LocalShareGroups {
    router: Router,
    log: Arc<dyn Log>,
    shares: Arc<TenantShares>,
    groups: Mutex<HashMap<ShareGroupKey, LocalShareGroupEntry>>,
    /// The next member's number.
    member: AtomicU64,
}

struct LocalShareGroupEntry {
    group: Arc<LocalShareGroup>,
    /// The sessions that have the subscription, connected or not.
    sessions: HashSet<u64>,
    _charge: ShareCharge,
}

/// One group.
struct LocalShareGroup {
    log: Arc<dyn Log>,
    state: Mutex<LocalShareGroupState>,
    turns: Arc<MemberTurns>,
}

struct LocalShareGroupState {
    feed: SubscriberFeed,
    /// What the feed has given and no member has taken, in order.
    ready: ReadyRecords,
    /// Records taken by members that have left or gave them back.
    returned: BTreeSet<Offset>,
    /// Those of them that are in memory: given back, or read from the log again.
    fetched: VecDeque<(Batch, RecordPlace)>,
    fetching: Option<Pin<Box<dyn Future<Output = RefetchResult> + Send>>>,
    /// What the group holds of the log in memory.
    held: ShareCharge,
}

/// The offsets that were read again, and the result.
type RefetchResult = (Vec<Offset>, Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError>);

/// Records of a feed, from one batch or several.
#[derive(Default)]
struct ReadyRecords {
    batches: VecDeque<MatchedRecords>,
    /// How many there were, at most: some may be withheld since.
    records: usize,
    bytes: usize,
}

impl ReadyRecords {
    fn push(&mut self, matched: MatchedRecords) {
        self.records += matched.remaining();
        self.bytes += matched.weight();
        self.batches.push_back(matched);
    }

    fn pop(&mut self) -> Option<(Batch, RecordPlace)> {
        while let Some(first) = self.batches.front_mut() {
            if let Some(place) = first.peek_place() {
                first.advance();
                self.records = self.records.saturating_sub(1);
                return Some((first.batch().clone(), place));
            }
            self.bytes -= first.weight();
            self.batches.pop_front();
        }
        *self = Self::default();
        None
    }

    /// The first record.
    fn first(&self) -> Option<Offset> {
        self.batches.iter().find_map(MatchedRecords::peek_place).map(|place| place.offset)
    }
}

impl LocalShareGroups {
    /// No groups yet.
    pub fn new(router: Router, log: Arc<dyn Log>, shares: Arc<TenantShares>) -> Self {
        Self { router, log, shares, groups: Mutex::default(), member: AtomicU64::new(1) }
    }

    /// Adds `session` to a group. The first session creates the group, at `from` or at the end of the log.
    /// Returns the group's offset. With `is_limited`, its tenant's share has to have room for a new group.
    ///
    /// # Errors
    /// [`GroupJoinError::Elsewhere`] if `from` is given and the group exists already;
    /// [`GroupJoinError::TooMany`].
    pub fn join(
        &self,
        key: &ShareGroupKey,
        session: u64,
        from: Option<Offset>,
        is_limited: bool,
    ) -> Result<Offset, GroupJoinError> {
        let routed = self.router.routed_offset();
        let mut groups = self.locked();
        if from.is_some() && groups.contains_key(key) {
            return Err(GroupJoinError::Elsewhere);
        }
        if !groups.contains_key(key) {
            let (scope, _, filter) = key;
            let (datasource, _) = scope.of_scope();
            let mut charge = self.shares.share(&datasource).charge();
            match is_limited {
                true => charge.try_take(ShareCount::ShareGroups, 1).map_err(GroupJoinError::TooMany)?,
                false => charge.add(ShareCount::ShareGroups, 1),
            }
            let begin = from.unwrap_or_else(|| self.log.next_offset());
            let (router, log) = (self.router.clone(), self.log.clone());
            let mut feed = SubscriberFeed::new(router, log, &self.shares, &datasource, begin);
            feed.set_filter(0, filter, from);
            let group = Arc::new(LocalShareGroup::new(self.log.clone(), feed));
            let sessions = HashSet::new();
            groups.insert(key.clone(), LocalShareGroupEntry { group, sessions, _charge: charge });
        }
        let Some(entry) = groups.get_mut(key) else { return Err(GroupJoinError::Elsewhere) };
        entry.sessions.insert(session);
        Ok(entry.group.cursor(routed))
    }

    /// Removes `session` from a group. Returns whether the group has ended with it.
    pub fn leave(&self, key: &ShareGroupKey, session: u64) -> bool {
        let mut groups = self.locked();
        let Some(entry) = groups.get_mut(key) else { return false };
        entry.sessions.remove(&session);
        entry.sessions.is_empty() && groups.remove(key).is_some()
    }

    /// Connects a member to a group that its session has joined.
    pub fn member(&self, key: &ShareGroupKey) -> Option<LocalShareMember> {
        let group = self.locked().get(key)?.group.clone();
        let id = self.member.fetch_add(1, Ordering::Relaxed);
        group.turns.enter(id);
        Some(LocalShareMember { group, id })
    }

    /// For each group the first record that is not dealt with. `routed` is the router's offset from before
    /// this call.
    pub fn cursors(&self, routed: Offset) -> Vec<(ShareGroupKey, Offset)> {
        let groups: Vec<_> =
            self.locked().iter().map(|(key, entry)| (key.clone(), entry.group.clone())).collect();
        groups.into_iter().map(|(key, group)| (key, group.cursor(routed))).collect()
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<ShareGroupKey, LocalShareGroupEntry>> {
        self.groups.lock()
    }
}

impl LocalShareGroup {
    fn new(log: Arc<dyn Log>, feed: SubscriberFeed) -> Self {
        let state = LocalShareGroupState {
            held: feed.mailbox().share().charge(),
            feed,
            ready: ReadyRecords::default(),
            returned: BTreeSet::new(),
            fetched: VecDeque::new(),
            fetching: None,
        };
        Self { log, state: Mutex::new(state), turns: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, LocalShareGroupState> {
        self.state.lock()
    }

    /// The first record that is not dealt with.
    fn cursor(&self, routed: Offset) -> Offset {
        let state = self.state();
        let low = [self.turns.first_outstanding(), state.returned.first().copied(), state.ready.first()];
        let mailbox = state.feed.mailbox();
        mailbox.set_progress(state.feed.position(), true);
        low.into_iter().flatten().fold(mailbox.cursor(routed), Offset::min)
    }
}

impl LocalShareGroupState {
    /// Has records in memory that departed members had taken: they are read from the log again. Returns how many of
    /// them retention has removed.
    fn poll_returned(&mut self, log: &Arc<dyn Log>, cx: &mut Context<'_>) -> Poll<Result<u64, LogReadError>> {
        if !self.fetched.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.fetching.is_none() {
            let offsets: Vec<Offset> = self.returned.iter().copied().take(REFETCH_RECORDS).collect();
            if offsets.is_empty() {
                return Poll::Ready(Ok(0));
            }
            let found = fetch_in_turn(self.feed.mailbox().share(), log, offsets.clone());
            self.fetching = Some(Box::pin(async move { (offsets, found.await) }));
        }
        let Some(fetching) = &mut self.fetching else { return Poll::Ready(Ok(0)) };
        let (asked, found) = ready!(fetching.as_mut().poll(cx));
        self.fetching = None;
        let mut gone = 0;
        for (offset, found) in asked.into_iter().zip(found?) {
            match found {
                Some(found) => self.fetched.push_back(found),
                // Retention has removed it, so that no member can have it.
                None => gone += u64::from(self.returned.remove(&offset)),
            }
        }
        Poll::Ready(Ok(gone))
    }

    /// Has records in memory, as far as there are any now. Returns how many there are, or that retention has removed
    /// some.
    fn poll_gather(
        &mut self,
        log: &Arc<dyn Log>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<GatheredRecords, LogReadError>> {
        if let Poll::Ready(gone) = self.poll_returned(log, cx)
            && let gone @ 1.. = gone?
        {
            return Poll::Ready(Ok(GatheredRecords::Skipped(gone)));
        }
        while self.fetched.len() + self.ready.records < GROUP_READY_RECORDS_MAX
            && self.ready.bytes < GROUP_READY_BYTES_MAX
            && let Poll::Ready(item) = self.feed.poll_next(cx)
        {
            match item? {
                FeedItem::Skipped(records) => return Poll::Ready(Ok(GatheredRecords::Skipped(records))),
                FeedItem::Matched(matched) => self.ready.push(matched),
            }
        }
        match self.fetched.len() + self.ready.records {
            0 => Poll::Pending,
            records => Poll::Ready(Ok(GatheredRecords::Ready(records))),
        }
    }

    /// The next `records`, or as many as there are.
    fn take(&mut self, log: &Arc<dyn Log>, records: usize) -> Vec<(Batch, RecordPlace)> {
        let mut taken = Vec::with_capacity(records);
        if !self.fetched.is_empty() {
            let left_out = log.withheld().now();
            while taken.len() < records {
                let Some((batch, place)) = self.fetched.pop_front() else { break };
                self.returned.remove(&place.offset);
                if !left_out.withholds(&batch.reader().read(place)) {
                    taken.push((batch, place));
                }
            }
        }
        while taken.len() < records {
            let Some(next) = self.ready.pop() else { break };
            taken.push(next);
        }
        taken
    }

    /// Lets others have the turn of the group's feed: perhaps no member asks for more for a while. What it holds
    /// is counted, and read again later where its tenant's share has no room for it.
    fn pause(&mut self) {
        self.feed.pause();
        let fetched = batches_weight(self.fetched.iter().map(|(batch, _)| batch));
        let held = self.ready.bytes + self.feed.held_bytes() + fetched;
        self.held.set(ShareCount::StalledBytes, 0);
        if self.held.try_add(ShareCount::StalledBytes, held as u64, STALLED_BYTES_PER_TENANT_MAX).is_err() {
            if let Some(first) = std::mem::take(&mut self.ready).first() {
                self.feed.rewind(first);
            }
            self.feed.release();
            self.fetched = VecDeque::new();
        }
    }
}

/// What batches take in memory, where the same one is there several times in a row.
pub fn batches_weight<'a>(batches: impl Iterator<Item = &'a Batch>) -> usize {
    let mut last = None;
    batches.fold(0, |bytes, batch| {
        let is_same = last.replace(batch.first_offset()) == Some(batch.first_offset());
        if is_same { bytes } else { bytes + batch.weight() }
    })
}

/// What a group has for its members.
enum GatheredRecords {
    /// So many records.
    Ready(usize),
    /// Retention has removed so many.
    Skipped(u64),
}

/// A connected member. Leaves when it is dropped.
pub struct LocalShareMember {
    group: Arc<LocalShareGroup>,
    id: u64,
}

impl LocalShareMember {
    /// Takes up to `max` of the next records, those that are for this member. Each is this member's until it has
    /// [acknowledged](LocalShareMember::acknowledge) it.
    ///
    /// # Errors
    /// [`LogReadError`], as [`SubscriberFeed::poll_next`].
    pub fn poll_take(&self, max: usize, cx: &mut Context<'_>) -> Poll<Result<ShareDelivery, LogReadError>> {
        let LocalShareGroup { log, turns, .. } = &*self.group;
        loop {
            let mut state = self.group.state();
            // Before polling, so that a wake-up in between is not missed.
            if !turns.ask(self.id, cx.waker()) {
                return Poll::Pending;
            }
            let waker = Waker::from(turns.clone());
            let Poll::Ready(gathered) = state.poll_gather(log, &mut Context::from_waker(&waker)) else {
                turns.wait(self.id);
                return Poll::Pending;
            };
            let ready = match gathered {
                Ok(GatheredRecords::Ready(records)) => records,
                Ok(GatheredRecords::Skipped(records)) => {
                    state.pause();
                    return Poll::Ready(Ok(ShareDelivery::Skipped(records)));
                }
                Err(error) => {
                    state.pause();
                    return Poll::Ready(Err(error));
                }
            };
            let (share, woken) = turns.share_out(self.id, ready, max);
            let taken = state.take(log, share);
            if !taken.is_empty() {
                turns.take(self.id, taken.iter().map(|(_, place)| place.offset));
            }
            state.pause();
            drop(state);
            woken.into_iter().for_each(Waker::wake);
            if !taken.is_empty() {
                return Poll::Ready(Ok(ShareDelivery::Records(taken)));
            }
            if share == 0 {
                return Poll::Pending;
            }
            // All that was ready is withheld by now.
            turns.wait(self.id);
        }
    }

    /// Passes the turn on: this member has no room now.
    pub fn pass_turn(&self) {
        self.group.turns.pass(self.id);
        if !self.group.turns.has_waiting() {
            // Nobody would use a turn to read that the feed gets meanwhile.
            self.group.state().feed.pause();
        }
    }

    /// Whether others wait for records.
    pub fn keeps_others_waiting(&self) -> bool {
        self.group.turns.has_waiting()
    }

    /// Gives records back that were taken and not sent, for any member to take.
    pub fn give_back(&self, records: impl Iterator<Item = (Batch, RecordPlace)>) {
        let mut state = self.group.state();
        for (batch, place) in records {
            if self.group.turns.give_back(self.id, place.offset) {
                state.returned.insert(place.offset);
                state.fetched.push_back((batch, place));
            }
        }
        state.pause();
        drop(state);
        self.group.turns.wake_next();
    }

    /// Marks a record that was taken as this member's for good.
    pub fn keep(&self, offset: Offset) {
        self.group.turns.keep(self.id, offset);
    }

    /// Marks a record that was kept as dealt with.
    pub fn acknowledge_kept(&self, offset: Offset) {
        self.group.turns.acknowledge_kept(self.id, offset);
    }

    /// Marks a record that was taken as dealt with.
    pub fn acknowledge(&self, offset: Offset) {
        self.group.turns.acknowledge(self.id, offset);
    }
}

impl Drop for LocalShareMember {
    fn drop(&mut self) {
        let mut state = self.group.state();
        state.returned.extend(self.group.turns.leave(self.id));
        drop(state);
        self.group.turns.wake_next();
    }
}
