//! The changes to write next, gathered so that each session and each group is written once, however often
//! it has changed since the last transaction.
//!
//! Changes of one session are folded in the order in which they came. Sessions and groups do not depend on
//! each other, so nothing else has an order. The number of sessions and groups bounds what is gathered,
//! even while the disk is full, and writing it twice does no harm.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::bucket::FoundSession;
use super::{SessionStoreChange, StoredFlights, StoredGroup, StoredSession, StoredSessions};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// The gathered change of one session.
#[derive(Debug, PartialEq)]
pub(super) enum PendingSessionChange {
    /// The row and its subscriptions are replaced.
    Put(StoredSession),
    /// Some fields of the row change, if there is a row.
    Update(SessionUpdate),
    /// The row and its subscriptions are removed.
    Remove,
    /// Another node has it.
    GiveUp,
}

/// The fields of a session's row that change; `None`: it does not.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct SessionUpdate {
    pub(super) cursor: Option<Offset>,
    pub(super) flights: Option<StoredFlights>,
    /// When the connection ended, and for how long the session stays.
    pub(super) ended: Option<(Option<TimeMicros>, u32)>,
}

impl SessionUpdate {
    /// Changes a session so.
    pub(super) fn apply(&self, session: &mut StoredSession) {
        session.cursor = self.cursor.unwrap_or(session.cursor);
        if let Some(flights) = &self.flights {
            session.flights.clone_from(flights);
        }
        if let Some((ended_at, expiry_s)) = self.ended {
            (session.ended_at, session.expiry_s) = (ended_at, expiry_s);
        }
    }
}

/// Datasource, group, filter.
pub(super) type StoredGroupKey = (DatasourceId, String, String);

/// The changes of the next transaction.
#[derive(Debug, Default)]
pub(super) struct PendingSessionChanges {
    /// In a cluster: the cells that changes of these clients' sessions are written over.
    pub(super) found: Vec<FoundSession>,
    pub(super) sessions: BTreeMap<u64, PendingSessionChange>,
    /// The cursors of groups, or `None` for groups to remove.
    pub(super) groups: BTreeMap<StoredGroupKey, Option<Offset>>,
}

impl PendingSessionChanges {
    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty() && self.sessions.is_empty() && self.groups.is_empty()
    }

    /// Adds everything that is stored.
    pub(super) fn include(&mut self, stored: &StoredSessions) {
        stored.sessions.iter().for_each(|session| self.fold(SessionStoreChange::PutSession(session.clone())));
        stored.groups.iter().for_each(|group| self.fold(SessionStoreChange::PutGroup(group.clone())));
    }

    /// Takes over the changes that were made to what these changes would store, so that they store that: what
    /// is removed is not among them, and what is changed is there as it is then.
    pub(super) fn follow(&mut self, changes: &Self) {
        for (uid, change) in &changes.sessions {
            match change {
                PendingSessionChange::Put(session) => {
                    self.sessions.insert(*uid, PendingSessionChange::Put(session.clone()));
                }
                PendingSessionChange::Update(update) if self.sessions.contains_key(uid) => {
                    self.update(*uid, update.clone());
                }
                PendingSessionChange::Update(_) => {}
                PendingSessionChange::Remove | PendingSessionChange::GiveUp => {
                    self.sessions.remove(uid);
                }
            }
        }
        for (key, cursor) in &changes.groups {
            match cursor {
                Some(cursor) => self.groups.insert(key.clone(), Some(*cursor)),
                None => self.groups.remove(key),
            };
        }
    }

    /// Adds a change that came after all those added before.
    pub(super) fn fold(&mut self, change: SessionStoreChange) {
        match change {
            SessionStoreChange::PutSession(session) => {
                self.sessions.insert(session.uid, PendingSessionChange::Put(session));
            }
            SessionStoreChange::RemoveSession(uid) => {
                self.sessions.insert(uid, PendingSessionChange::Remove);
            }
            SessionStoreChange::Found(found) => self.found.push(*found),
            SessionStoreChange::GiveUpSession(uid) => {
                self.sessions.insert(uid, PendingSessionChange::GiveUp);
            }
            SessionStoreChange::MoveCursor { uid, cursor } => {
                self.update(uid, SessionUpdate { cursor: Some(cursor), ..SessionUpdate::default() });
            }
            SessionStoreChange::MoveFlights { uid, cursor, flights } => {
                let (cursor, flights) = (Some(cursor), Some(flights));
                self.update(uid, SessionUpdate { cursor, flights, ended: None });
            }
            SessionStoreChange::SetEnded { uid, ended_at, expiry_s } => {
                let ended = Some((ended_at, expiry_s));
                self.update(uid, SessionUpdate { ended, ..SessionUpdate::default() });
            }
            SessionStoreChange::PutGroup(StoredGroup { datasource, group, filter, cursor }) => {
                self.groups.insert((datasource, group, filter), Some(cursor));
            }
            SessionStoreChange::RemoveGroup { datasource, group, filter } => {
                self.groups.insert((datasource, group, filter), None);
            }
        }
    }

    fn update(&mut self, uid: u64, update: SessionUpdate) {
        let change = match self.sessions.entry(uid) {
            Entry::Vacant(vacant) => {
                vacant.insert(PendingSessionChange::Update(update));
                return;
            }
            Entry::Occupied(occupied) => occupied.into_mut(),
        };
        match change {
            PendingSessionChange::Put(session) => update.apply(session),
            PendingSessionChange::Update(earlier) => {
                earlier.cursor = update.cursor.or(earlier.cursor);
                earlier.flights = update.flights.or(earlier.flights.take());
                earlier.ended = update.ended.or(earlier.ended);
            }
            PendingSessionChange::Remove | PendingSessionChange::GiveUp => {}
        }
    }
}
