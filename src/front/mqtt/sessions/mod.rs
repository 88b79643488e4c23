//! The sessions: the connected clients, one connection per client identifier within a datasource,
//! and the sessions of clients that are away.
//!
//! A client that connects again takes over from its earlier connection, and waits until that one has
//! handed back the session. The same identifier in another datasource is another client. Sessions
//! that outlive their connection are also on disk (`consume::subscriber::sessions`). Their cursors are
//! written every second, so a gateway that was killed sends a few messages again and skips none. In a
//! cluster a client is one client on all nodes ([`claims`]).

use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::TryRng;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::away::AwayClient;
use self::claims::{ClaimStamp, ClaimedSession, ClientClaims};
pub(super) use self::client_guard::ClientGuard;
use self::due::DueTimes;
use self::queue::ClientQueue;
use self::refused_wills::RefusedWills;
use self::takeovers::TakeoverTally;
use super::session::{MqttSession, SubscriptionFilter};
use super::wills::MqttWill;
use crate::auth::connections::{CloseReason, ConnectionControl};
use crate::consume::subscriber::sessions::bucket::FoundSession;
use crate::consume::subscriber::sessions::{
    SessionStoreChange, SessionStoreError, StoredGroup, StoredSessions,
};
use crate::consume::subscriber::{Mailbox, ShareGroupKey, Subscribers};
use crate::intake::{Intake, Refusal};
use crate::message::{DatasourceId, Offset, now_micros};
use crate::shares::ShareExceeded;
use crate::time::cluster_micros;

mod away;
pub(super) mod claims;
mod client_guard;
mod due;
mod heirs;
mod queue;
mod refused_wills;
pub(super) mod standing;
mod takeovers;
#[cfg(test)]
mod tests;

/// How often due wills and expiries are handled, and cursors are written.
const SESSIONS_TICK: Duration = Duration::from_secs(1);

/// How often connected subscribers are looked at whether they stand still.
const STILL_LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// A client: the scope of its key, and its identifier.
type ClientKey = (DatasourceId, Arc<str>);

/// All clients and their sessions.
pub(super) struct Sessions {
    clients: Mutex<SessionClients>,
    subscribers: Arc<Subscribers>,
    intake: Intake,
    /// Wills on their way into the log, and clients whose end is being written.
    wills: TaskTracker,
    /// Wills that are published again after a pause.
    refused_wills: Arc<RefusedWills>,
    /// `Some` if the clients are shared with other nodes.
    claims: Option<ClientClaims>,
    /// How long a subscriber may neither take nor acknowledge anything before it is said to stand still.
    still_after: Duration,
}

#[derive(Default)]
struct SessionClients {
    entries: HashMap<ClientKey, ClientEntry>,
    due: Arc<DueTimes>,
    /// No more clients are let in.
    draining: bool,
    /// The connected durable sessions with subscriptions: the mailbox that reports the session's cursor,
    /// and the cursor that was last written.
    watched: HashMap<u64, (Arc<Mailbox>, Offset)>,
    written_groups: HashMap<ShareGroupKey, Offset>,
    takeovers: TakeoverTally,
}

#[derive(Default)]
struct ClientEntry {
    connected: Option<ConnectedClient>,
    away: Option<Box<AwayClient>>,
    /// The connections that wait for the one that is there to leave.
    queue: Option<Box<ClientQueue>>,
}

struct ConnectedClient {
    control: Arc<ConnectionControl>,
    /// Where a subscriber reports how far it is.
    mailbox: Option<Arc<Mailbox>>,
    /// `Some` in a cluster.
    shared: Option<Box<ClusterClientState>>,
}

/// What a cluster node knows about a client that is connected to it.
#[derive(Default)]
struct ClusterClientState {
    /// The claim by which this node got the client, or is about to. The later of two claims counts, even
    /// if the earlier one arrives last.
    claim: Option<ClaimStamp>,
    /// The session's number, once there is a session.
    uid: u64,
    /// Another node has taken the session.
    lost: bool,
}

/// A client that was let in.
pub(super) struct EnteredClient {
    pub(super) present: ClientGuard,
    pub(super) session: MqttSession,
    /// Whether the session existed before.
    pub(super) resumed: bool,
    /// The will of an earlier connection, which was not due yet. It is for nothing now that the client is back.
    pub(super) earlier_will: Option<Box<MqttWill>>,
}

/// Why a client could not be let in.
#[derive(Debug)]
pub(super) enum EnterError {
    /// The client's connection has to close.
    Closed(CloseReason),
    /// It may not be let in now.
    Refused(Box<Refusal>),
    /// A new session would be one too many of its datasource.
    TooMany(ShareExceeded),
    /// The session, or the log that it needs, cannot be read now; with the reason.
    Unavailable(String),
}

impl Sessions {
    /// Restores the stored sessions. With `claims` they are shared with other nodes.
    pub(super) fn new(
        subscribers: Arc<Subscribers>,
        intake: Intake,
        stored: StoredSessions,
        claims: Option<ClientClaims>,
        still_after: Duration,
    ) -> Self {
        let (clients, refused_wills) = (Mutex::default(), Arc::default());
        let wills = TaskTracker::new();
        let sessions = Self { clients, subscribers, intake, wills, refused_wills, claims, still_after };
        let groups: HashMap<ShareGroupKey, Offset> = stored
            .groups
            .into_iter()
            .map(|group| ((group.datasource, group.group.into(), group.filter.into()), group.cursor))
            .collect();
        let (now, now_micros) = (Instant::now(), cluster_micros());
        let mut wills = sessions.take_up_wills(stored.wills);
        let mut clients = sessions.lock_clients();
        let left_out = sessions.subscribers.log.withheld().now();
        let mut ended = Vec::new();
        for stored in stored.sessions {
            if left_out.has_ended(&stored.datasource) {
                // Its datasource was deleted, and the gateway ended before the session did.
                ended.push(SessionStoreChange::RemoveSession(stored.uid));
                continue;
            }
            let key: ClientKey = (stored.datasource.clone(), stored.client_id.as_str().into());
            // A session without an end was connected when the gateway was killed: it counts as away from now.
            let away_s = stored.ended_at.map_or(0, |ended| now_micros.saturating_sub(ended) / 1_000_000);
            let left_s = i64::from(stored.expiry_s) - away_s;
            let expires_at = (stored.expiry_s != u32::MAX)
                .then(|| now + Duration::from_secs(u64::try_from(left_s).unwrap_or(0)));
            let will = wills.remove(&stored.uid).and_then(|will| {
                let left = will.wait_left(u32::try_from(left_s).unwrap_or(stored.expiry_s), now_micros);
                if left.is_zero() {
                    // It was due while the gateway was down, whoever comes back now.
                    sessions.spawn_will(will);
                    return None;
                }
                Some((will, now + left))
            });
            let mut session = MqttSession::from_stored(stored);
            session.charge_present(&sessions.subscribers.shares.share(&key.0));
            for group in
                session.subscriptions.iter().flatten().filter_map(|s| shared_group_key(&key.0, &s.filter))
            {
                let cursor = groups.get(&group).copied();
                sessions.subscribers.groups.rejoin(&group, session.uid, cursor);
            }
            clients.put_away(key, session, will, expires_at);
        }
        drop(clients);
        // Their sessions have ended.
        wills.into_values().for_each(|will| sessions.spawn_will(will));
        // A group without sessions can be left by nobody any more: it ends here.
        let there: HashMap<ShareGroupKey, Offset> =
            sessions.subscribers.groups.cursors(0).into_iter().collect();
        let orphans = groups.keys().filter(|key| !there.contains_key(*key)).map(|key| {
            let (datasource, group, filter) = key.clone();
            SessionStoreChange::RemoveGroup { datasource, group: group.into(), filter: filter.into() }
        });
        ended.extend(orphans);
        drop(sessions.subscribers.store.write(ended));
        sessions
    }

    /// Handles due wills and expiries, and writes cursors, until `drain` is cancelled.
    pub(super) async fn run(self: &Arc<Self>, drain: CancellationToken) {
        let sharing = async {
            if let Some(claims) = &self.claims {
                tokio::join!(self.serve_claims(claims), self.inherit_wills(claims));
            }
        };
        tokio::join!(drain.run_until_cancelled(sharing), self.run_ticks(&drain));
    }

    async fn run_ticks(&self, drain: &CancellationToken) {
        let mut look_at = Instant::now();
        while tokio::time::timeout(SESSIONS_TICK, drain.cancelled()).await.is_err() {
            if look_at <= Instant::now() {
                self.look_for_still();
                look_at = Instant::now() + STILL_LOOK_INTERVAL;
            }
            self.run_due(Instant::now());
            self.end_with_datasources();
            if let Some(written) = self.write_cursors() {
                // The store itself reports that it cannot write.
                let _ = written.await;
            }
        }
    }

    /// Whether other nodes share the clients.
    pub(super) fn is_clustered(&self) -> bool {
        self.claims.is_some()
    }

    /// Lets a client in, whose key has this scope: ends its earlier connection, and finds or makes its session. With `clean` an
    /// existing session ends. A client that `is_new` has an identifier that nobody had before, so no
    /// session is looked for. `may_enter` is asked when an earlier connection has left and no longer counts; if it refuses, the
    /// client stays away as it is. [`EnterError::TooMany`] is found out later: `clean` has ended the earlier session then.
    ///
    /// # Errors
    /// [`EnterError`].
    #[expect(clippy::too_many_arguments, reason = "what a CONNECT says, and who is asked about it")]
    pub(super) async fn enter(
        self: &Arc<Self>,
        scope: &DatasourceId,
        client_id: Arc<str>,
        control: Arc<ConnectionControl>,
        clean: bool,
        is_new: bool,
        expiry_s: u32,
        may_enter: impl Fn() -> Result<(), Refusal>,
    ) -> Result<EnteredClient, EnterError> {
        let key = (scope.clone(), client_id);
        let mut place = None;
        let mut is_asked = false;
        let (away, at) = loop {
            let left = {
                let mut clients = self.lock_clients();
                if clients.draining {
                    control.close(CloseReason::Drain);
                }
                let entry = clients.entries.entry(key.clone()).or_default();
                match &entry.connected {
                    Some(earlier) => {
                        earlier.control.close(CloseReason::TakenOver);
                        Some(self.wait_in_queue(&key, entry, &mut place))
                    }
                    None if !entry.is_turn_of(place.as_ref()) => {
                        Some(self.wait_in_queue(&key, entry, &mut place))
                    }
                    None if !is_asked => {
                        // Who comes meanwhile waits behind it, and does not enter first.
                        drop(self.wait_in_queue(&key, entry, &mut place));
                        None
                    }
                    None => {
                        if entry.leave_queue(place.as_mut()) {
                            // Another one has come after it: this one only says what its client has sent.
                            control.close(CloseReason::TakenOver);
                        }
                        let away = entry.away.take();
                        // A client that was last on this node is on no other: only an unknown one is claimed.
                        let unknown = away.is_none() && !is_new;
                        let shared = self.claims.as_ref().map(|claims| {
                            let claim = unknown.then(|| claims.next_stamp());
                            Box::new(ClusterClientState { claim, ..ClusterClientState::default() })
                        });
                        let at = shared.as_ref().and_then(|held| held.claim.clone());
                        entry.connected =
                            Some(ConnectedClient { control: control.clone(), mailbox: None, shared });
                        break (away, at);
                    }
                }
            };
            is_asked = left.is_none();
            match left {
                Some(left) => left.await,
                // Not under the lock: all connections of a datasource may have to be counted.
                None => may_enter().map_err(|refusal| EnterError::Refused(Box::new(refusal)))?,
            }
        };
        let present = ClientGuard { sessions: self.clone(), key, control };
        self.enter_after_earlier(present, at, away, clean, expiry_s).await
    }

    /// Continues [`Sessions::enter`] once no earlier connection to this node is left.
    async fn enter_after_earlier(
        &self,
        present: ClientGuard,
        at: Option<ClaimStamp>,
        away: Option<Box<AwayClient>>,
        clean: bool,
        expiry_s: u32,
    ) -> Result<EnteredClient, EnterError> {
        let key = &present.key;
        let mut earlier_will = None;
        let (earlier, found) = match (&self.claims, at) {
            (Some(claims), Some(at)) => {
                let claimed = Box::pin(self.claim(claims, &present, at, clean));
                let ClaimedSession { session, found } = claimed.await?;
                (session, Some(found))
            }
            _ => {
                let earlier = away.and_then(|away| {
                    let (session, will) = self.resume(key, *away, clean)?;
                    earlier_will = will;
                    Some(session)
                });
                (earlier, None)
            }
        };
        let resumed = earlier.is_some();
        let session = self.begin_session(key, earlier, found, expiry_s)?;
        if self.claims.is_some()
            && let Some(entry) = self.lock_clients().entries.get_mut(key)
            && let Some(held) = entry.connected.as_mut().and_then(|connected| connected.shared.as_mut())
        {
            held.uid = session.uid;
        }
        Ok(EnteredClient { present, session, resumed, earlier_will })
    }

    /// Begins a connection's session: the earlier one or a new one. `found` is the bucket's cell of the
    /// client, if the cluster's bucket was asked.
    fn begin_session(
        &self,
        key: &ClientKey,
        earlier: Option<MqttSession>,
        found: Option<FoundSession>,
        expiry_s: u32,
    ) -> Result<MqttSession, EnterError> {
        let mut session = earlier.unwrap_or_else(|| MqttSession::new(random_number(), expiry_s));
        let share = self.subscribers.shares.share(&key.0);
        self.intake.limit_share(&key.0, &share);
        session.charge_present(&share);
        session.charge_stay(expiry_s > 0).map_err(EnterError::TooMany)?;
        session.expiry_s = expiry_s;
        session.ever_stayed |= session.is_durable();
        let other = found.as_ref().and_then(|found| found.session.as_ref()).map(|session| session.uid);
        let other = other.filter(|uid| *uid != session.uid);
        let change = match (session.is_durable(), session.stored) {
            (true, true) if found.is_none() => {
                SessionStoreChange::SetEnded { uid: session.uid, ended_at: None, expiry_s }
            }
            (true, stored) => {
                if !stored {
                    session.position = self.subscribers.log.next_offset();
                }
                // This overwrites the other session, if there is one.
                SessionStoreChange::PutSession(session.to_stored(&key.0, &key.1))
            }
            (false, stored) => match other.or(stored.then_some(session.uid)) {
                Some(uid) => SessionStoreChange::RemoveSession(uid),
                None => return Ok(session),
            },
        };
        session.stored = session.is_durable();
        let changes = match found {
            Some(found) => vec![SessionStoreChange::Found(Box::new(found)), change],
            None => vec![change],
        };
        // Not awaited: the store writes in order, so a later write that is awaited covers this one.
        drop(self.subscribers.store.write(changes));
        Ok(session)
    }

    /// Ends a session for good, on the disk and in its groups.
    fn end_session(&self, key: &ClientKey, session: &MqttSession) {
        let mut changes: Vec<SessionStoreChange> =
            session.stored.then_some(SessionStoreChange::RemoveSession(session.uid)).into_iter().collect();
        for group in
            session.subscriptions.iter().flatten().filter_map(|s| shared_group_key(&key.0, &s.filter))
        {
            changes.extend(self.leave_group(&group, session));
        }
        if changes.is_empty() {
            return;
        }
        drop(self.subscribers.store.write(changes));
    }

    /// Takes a session out of a group. Returns the change to write, if the group ends with that.
    pub(super) fn leave_group(
        &self,
        group: &ShareGroupKey,
        session: &MqttSession,
    ) -> Option<SessionStoreChange> {
        let gone = self.subscribers.groups.leave(group, session.uid, session.ever_stayed);
        gone.then(|| {
            self.lock_clients().written_groups.remove(group);
            let (datasource, name, filter) = group.clone();
            SessionStoreChange::RemoveGroup { datasource, group: name.into(), filter: filter.into() }
        })
    }

    /// Publishes a will. One that is refused for a cause that passes is published again later.
    pub(super) fn publish_will(
        &self,
        will: Box<MqttWill>,
    ) -> impl Future<Output = ()> + Send + 'static + use<> {
        let (intake, subscribers) = (self.intake.clone(), self.subscribers.clone());
        let refused_wills = self.refused_wills.clone();
        async move {
            if let Some(refused) = will.publish(&intake).await {
                refused_wills.keep(refused, &subscribers.shares);
            }
        }
    }

    /// Publishes a will on a task of its own.
    fn spawn_will(&self, will: Box<MqttWill>) {
        let usual = self.intake.processor().usual_runtime();
        self.wills.spawn_on(self.publish_will(will), &usual);
    }

    /// Queues the cursors of sessions and groups that have moved since they were last written; `None` if none have. The
    /// future resolves when the store has them. They are queued under the lock of the clients and that of their mailbox:
    /// what a session writes that has gone on, or leaves, comes behind them.
    fn write_cursors(&self) -> Option<impl Future<Output = Result<(), SessionStoreError>> + Send + use<>> {
        let Subscribers { store, router, groups, .. } = &*self.subscribers;
        let routed = router.routed_offset();
        let mut clients = self.lock_clients();
        let SessionClients { watched, written_groups, .. } = &mut *clients;
        let mut has_moved = false;
        for (uid, (mailbox, written)) in watched {
            mailbox.write_cursor(routed, written, |cursor| {
                drop(store.write(vec![SessionStoreChange::MoveCursor { uid: *uid, cursor }]));
                has_moved = true;
            });
        }
        let mut changes = Vec::new();
        for (key, cursor) in groups.cursors(routed) {
            if written_groups.insert(key.clone(), cursor) != Some(cursor) {
                let (datasource, group, filter) = key;
                let group = StoredGroup { datasource, group: group.into(), filter: filter.into(), cursor };
                changes.push(SessionStoreChange::PutGroup(group));
            }
        }
        // Also without a change of a group: it covers the cursors before it.
        (has_moved || !changes.is_empty()).then(|| store.write(changes))
    }

    /// Closes every connection, including those that come later. A will that is refused from now on is left to the next
    /// run.
    pub(super) fn drain(&self) {
        self.refused_wills.close();
        let mut clients = self.lock_clients();
        clients.draining = true;
        let connected = clients.entries.values().filter_map(|entry| entry.connected.as_ref());
        connected.for_each(|connected| connected.control.close(CloseReason::Drain));
    }

    /// Runs after the last connection: leaves the delayed and the refused wills to the next run, publishes those that
    /// would be lost, and writes the groups' cursors.
    pub(super) async fn finish(&self) {
        let waiting: Vec<Box<MqttWill>> = {
            let mut clients = self.lock_clients();
            let away = clients.entries.values_mut().filter_map(|entry| entry.away.as_mut());
            away.filter_map(|away| away.will.take()).map(|(will, _)| will).collect()
        };
        for will in waiting {
            match will.has_copy() {
                true => will.leave_copy(),
                false => self.spawn_will(will),
            }
        }
        self.wills.close();
        self.wills.wait().await;
        if let Some(written) = self.write_cursors() {
            let _ = written.await;
        }
    }

    fn lock_clients(&self) -> MutexGuard<'_, SessionClients> {
        self.clients.lock()
    }
}

/// The group of a filter, if it is a shared subscription of a session with this scope.
pub(super) fn shared_group_key(scope: &DatasourceId, filter: &str) -> Option<ShareGroupKey> {
    let wanted = SubscriptionFilter::parse(filter)?;
    Some((scope.clone(), wanted.group?.into(), wanted.filter.as_str().into()))
}

/// A random number, to tell one session or will from every other.
pub(super) fn random_number() -> u64 {
    let mut random = [0; 8];
    if rand::rngs::SysRng.try_fill_bytes(&mut random).is_err() {
        random = now_micros().to_le_bytes();
    }
    u64::from_le_bytes(random)
}
