//! Groups on this gateway, which keeps their places in the log itself.
//!
//! A group has one place in the log. A member that has room takes a few of the next records; members that
//! wait take turns. Records that a member took and did not acknowledge before its connection ended go to
//! another.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use super::super::feed::{FeedItem, SubscriberFeed, fetch_in_turn};
use super::super::matched::MatchedRecords;
use super::super::router::Router;
use super::{GroupJoinError, ShareDelivery, ShareGroupKey};
use crate::limits::{REFETCH_RECORDS, STALLED_BYTES_PER_TENANT_MAX};
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
    current: Option<MatchedRecords>,
    /// Records that are taken and not acknowledged, with the member that took them.
    outstanding: BTreeMap<Offset, u64>,
    /// Records taken by members that have left.
    returned: BTreeSet<Offset>,
    /// Those of them that were read from the log again.
    fetched: VecDeque<(Batch, RecordPlace)>,
    fetching: Option<Pin<Box<dyn Future<Output = RefetchResult> + Send>>>,
    /// What the group holds of the log in memory.
    held: ShareCharge,
    members: usize,
}

/// The offsets that were read again, and the result.
type RefetchResult = (Vec<Offset>, Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError>);

/// The members that wait for records, in the order in which they began to wait.
#[derive(Default)]
struct MemberTurns(Mutex<WaitingMembers>);

#[derive(Default)]
struct WaitingMembers {
    members: VecDeque<(u64, Waker)>,
    /// A member was woken and has not polled yet.
    told: bool,
}

impl MemberTurns {
    fn locked(&self) -> MutexGuard<'_, WaitingMembers> {
        self.0.lock()
    }

    fn wait(&self, member: u64, waker: &Waker) {
        let mut waiting = self.locked();
        match waiting.members.iter_mut().find(|(waiting, _)| *waiting == member) {
            Some((_, present)) => present.clone_from(waker),
            None => waiting.members.push_back((member, waker.clone())),
        }
    }

    fn stop_waiting(&self, member: u64) {
        let mut waiting = self.locked();
        waiting.told = false;
        waiting.members.retain(|(waiting, _)| *waiting != member);
    }

    /// Wakes the next member.
    fn wake_next(&self) {
        let mut waiting = self.locked();
        let next = waiting.members.pop_front();
        waiting.told = next.is_some();
        drop(waiting);
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }

    /// Wakes the next member in place of one that was woken and takes nothing.
    fn pass_turn(&self) {
        if self.locked().told {
            self.wake_next();
        }
    }
}

impl Wake for MemberTurns {
    fn wake(self: Arc<Self>) {
        self.wake_next();
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
        Ok(entry.group.state().cursor(routed))
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
        group.state().members += 1;
        Some(LocalShareMember { group, id: self.member.fetch_add(1, Ordering::Relaxed) })
    }

    /// For each group the first record that is not dealt with. `routed` is the router's offset from before
    /// this call.
    pub fn cursors(&self, routed: Offset) -> Vec<(ShareGroupKey, Offset)> {
        let groups: Vec<_> =
            self.locked().iter().map(|(key, entry)| (key.clone(), entry.group.clone())).collect();
        groups.into_iter().map(|(key, group)| (key, group.state().cursor(routed))).collect()
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
            current: None,
            outstanding: BTreeMap::new(),
            returned: BTreeSet::new(),
            fetched: VecDeque::new(),
            fetching: None,
            members: 0,
        };
        Self { log, state: Mutex::new(state), turns: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, LocalShareGroupState> {
        self.state.lock()
    }
}

impl LocalShareGroupState {
    /// The next record that a departed member had taken, once it is read from the log again.
    fn poll_returned(
        &mut self,
        log: &Arc<dyn Log>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<ShareDelivery>, LogReadError>> {
        if self.fetched.is_empty() && self.fetching.is_none() {
            let offsets: Vec<Offset> = self.returned.iter().copied().take(REFETCH_RECORDS).collect();
            if offsets.is_empty() {
                return Poll::Ready(Ok(None));
            }
            let found = fetch_in_turn(self.feed.mailbox().share(), log, offsets.clone());
            self.fetching = Some(Box::pin(async move { (offsets, found.await) }));
        }
        if let Some(fetching) = &mut self.fetching {
            let (asked, found) = ready!(fetching.as_mut().poll(cx));
            self.fetching = None;
            let mut gone = 0;
            for (offset, found) in asked.into_iter().zip(found?) {
                self.fetched.extend(found.or_else(|| {
                    // Retention has removed it, so that no member can have it.
                    self.returned.remove(&offset);
                    gone += 1;
                    None
                }));
            }
            if gone > 0 {
                return Poll::Ready(Ok(Some(ShareDelivery::Skipped(gone))));
            }
        }
        Poll::Ready(Ok(self.fetched.pop_front().map(|(batch, place)| {
            self.returned.remove(&place.offset);
            ShareDelivery::Records(batch, vec![place])
        })))
    }

    fn poll_take(
        &mut self,
        log: &Arc<dyn Log>,
        max: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ShareDelivery, LogReadError>> {
        if let Some(share) = ready!(self.poll_returned(log, cx))? {
            return Poll::Ready(Ok(share));
        }
        let matched = match &mut self.current {
            Some(matched) => matched,
            none => match ready!(self.feed.poll_next(cx))? {
                FeedItem::Skipped(records) => return Poll::Ready(Ok(ShareDelivery::Skipped(records))),
                FeedItem::Matched(matched) => none.insert(matched),
            },
        };
        let fair = matched.remaining().div_ceil(self.members.max(1));
        let batch = matched.batch().clone();
        let mut places = Vec::with_capacity(fair.min(max));
        while places.len() < fair.min(max).max(1)
            && let Some(place) = matched.peek_place()
        {
            places.push(place);
            matched.advance();
        }
        if matched.remaining() == 0 {
            self.current = None;
        }
        Poll::Ready(Ok(ShareDelivery::Records(batch, places)))
    }

    /// Lets others have the turn of the group's feed: perhaps no member asks for more for a while. What it holds
    /// is counted, and read again later where its tenant's share has no room for it.
    fn pause(&mut self) {
        self.feed.pause();
        let held = self.current.as_ref().map_or(0, MatchedRecords::weight) + self.feed.held_bytes();
        self.held.set(ShareCount::StalledBytes, 0);
        if self.held.try_add(ShareCount::StalledBytes, held as u64, STALLED_BYTES_PER_TENANT_MAX).is_err() {
            if let Some(next) = self.current.take().as_ref().and_then(MatchedRecords::peek_place) {
                self.feed.rewind(next.offset);
            }
            self.feed.release();
        }
    }

    /// The first record that is not dealt with.
    fn cursor(&self, routed: Offset) -> Offset {
        let next = self.current.as_ref().and_then(MatchedRecords::peek_place).map(|place| place.offset);
        let low = [self.outstanding.keys().next().copied(), self.returned.first().copied(), next];
        let mailbox = self.feed.mailbox();
        mailbox.set_progress(self.feed.position(), true);
        low.into_iter().flatten().fold(mailbox.cursor(routed), Offset::min)
    }

    fn has_more(&self) -> bool {
        self.current.is_some() || !self.returned.is_empty()
    }
}

/// A connected member. Leaves when it is dropped.
pub struct LocalShareMember {
    group: Arc<LocalShareGroup>,
    id: u64,
}

impl LocalShareMember {
    /// Takes up to `max` of the next records. Each is this member's until it has
    /// [acknowledged](LocalShareMember::acknowledge) it.
    ///
    /// # Errors
    /// [`LogReadError`], as [`SubscriberFeed::poll_next`].
    pub fn poll_take(&self, max: usize, cx: &mut Context<'_>) -> Poll<Result<ShareDelivery, LogReadError>> {
        let LocalShareGroup { log, turns, .. } = &*self.group;
        let mut state = self.group.state();
        turns.stop_waiting(self.id);
        // Before polling, so that a wake-up in between is not missed.
        turns.wait(self.id, cx.waker());
        let waker = Waker::from(turns.clone());
        let taken = state.poll_take(log, max, &mut Context::from_waker(&waker));
        if taken.is_ready() {
            state.pause();
        }
        let taken = ready!(taken);
        turns.stop_waiting(self.id);
        if let Ok(ShareDelivery::Records(_, places)) = &taken {
            state.outstanding.extend(places.iter().map(|place| (place.offset, self.id)));
        }
        let more = state.has_more();
        drop(state);
        if more {
            turns.wake_next();
        }
        Poll::Ready(taken)
    }

    /// Passes the turn on: this member has no room now.
    pub fn pass_turn(&self) {
        self.group.turns.pass_turn();
        if self.group.turns.locked().members.is_empty() {
            // Nobody would use a turn to read that the feed gets meanwhile.
            self.group.state().feed.pause();
        }
    }

    /// Gives records back that were taken and not sent, for any member to take.
    pub fn give_back(&self, offsets: impl Iterator<Item = Offset>) {
        let mut state = self.group.state();
        for offset in offsets {
            if state.outstanding.get(&offset) == Some(&self.id) {
                state.outstanding.remove(&offset);
                state.returned.insert(offset);
            }
        }
    }

    /// Marks a record that was taken as dealt with.
    pub fn acknowledge(&self, offset: Offset) {
        let mut state = self.group.state();
        if state.outstanding.get(&offset) == Some(&self.id) {
            state.outstanding.remove(&offset);
        }
    }
}

impl Drop for LocalShareMember {
    fn drop(&mut self) {
        let mut state = self.group.state();
        state.members -= 1;
        let LocalShareGroupState { outstanding, returned, .. } = &mut *state;
        returned.extend(outstanding.extract_if(.., |_, member| *member == self.id).map(|(offset, _)| offset));
        drop(state);
        self.group.turns.stop_waiting(self.id);
        self.group.turns.wake_next();
    }
}
