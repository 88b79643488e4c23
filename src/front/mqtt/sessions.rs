//! The sessions: the connected clients, one connection per client identifier within a datasource,
//! and the sessions of clients that are away.
//!
//! A client that connects again takes over from its earlier connection, and waits until that one has
//! handed back the session. The same identifier in another datasource is another client. Sessions
//! that outlive their connection are also on disk (`consume::subscriber::sessions`). Their cursors are
//! written every second, so a gateway that was killed sends a few messages again and skips none. In a
//! cluster a client is one client on all nodes ([`claims`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::TryRng;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use self::claims::{Claimed, Claims, When};
pub(super) use self::present::Present;
use super::session::{Session, Wanted};
use super::wills::Will;
use crate::auth::connections::{Close, Control};
use crate::consume::subscriber::sessions::bucket::Found;
use crate::consume::subscriber::sessions::{Change, Stored, StoredGroup};
use crate::consume::subscriber::{GroupKey, Mailbox, Subscribers};
use crate::intake::Intake;
use crate::message::{DatasourceId, Offset, now_micros};

pub(super) mod claims;
mod present;

/// How often due wills and expiries are handled, and cursors are written.
const TICK: Duration = Duration::from_secs(1);

type ClientKey = (DatasourceId, Arc<str>);

/// All clients and their sessions.
pub(super) struct Sessions {
    clients: Mutex<Clients>,
    subscribers: Arc<Subscribers>,
    intake: Intake,
    /// Wills on their way into the log.
    wills: TaskTracker,
    /// `Some` if the clients are shared with other nodes.
    claims: Option<Claims>,
}

#[derive(Default)]
struct Clients {
    entries: HashMap<ClientKey, Entry>,
    /// When a will or an expiry of an away client is due.
    due: BTreeMap<(Instant, u64), ClientKey>,
    /// A counter that keeps two due times at the same instant apart.
    dates: u64,
    /// No more clients are let in.
    draining: bool,
    /// The connected durable sessions with subscriptions: the mailbox that reports the session's cursor,
    /// and the cursor that was last written.
    watched: HashMap<u64, (Arc<Mailbox>, Offset)>,
    written_groups: HashMap<GroupKey, Offset>,
}

#[derive(Default)]
struct Entry {
    connected: Option<Connected>,
    away: Option<Box<Away>>,
}

struct Connected {
    control: Arc<Control>,
    /// Notified when the connection has left.
    left: Arc<Notify>,
    /// `Some` in a cluster.
    shared: Option<Box<Held>>,
}

/// What a cluster node knows about a client that is connected to it.
#[derive(Default)]
struct Held {
    /// The claim by which this node got the client, or is about to. The later of two claims counts, even
    /// if the earlier one arrives last.
    claim: Option<When>,
    /// The session's number, once there is a session.
    uid: u64,
    /// Another node has taken the session.
    lost: bool,
}

struct Away {
    session: Session,
    will: Option<(Box<Will>, Instant)>,
    /// `None`: never.
    expires_at: Option<Instant>,
}

/// A client that was let in.
pub(super) struct Taken {
    pub(super) present: Present,
    pub(super) session: Session,
    /// Whether the session existed before.
    pub(super) resumed: bool,
}

/// Why a client could not be let in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotEntered {
    /// The client's connection has to close.
    Closed(Close),
    /// The session, or the log that it needs, cannot be read now; with the reason.
    Unavailable(String),
}

impl Sessions {
    /// Restores the stored sessions. With `claims` they are shared with other nodes.
    pub(super) fn new(
        subscribers: Arc<Subscribers>,
        intake: Intake,
        stored: Stored,
        claims: Option<Claims>,
    ) -> Self {
        let wills = TaskTracker::new();
        let sessions = Self { clients: Mutex::default(), subscribers, intake, wills, claims };
        let groups: HashMap<GroupKey, Offset> = stored
            .groups
            .into_iter()
            .map(|group| ((group.datasource, group.group.into(), group.filter.into()), group.cursor))
            .collect();
        let (now, now_micros) = (Instant::now(), now_micros());
        let mut clients = sessions.locked();
        for stored in stored.sessions {
            let key: ClientKey = (stored.datasource.clone(), stored.client_id.as_str().into());
            // A session without an end was connected when the gateway was killed: it counts as away from now.
            let away_s = stored.ended_at.map_or(0, |ended| now_micros.saturating_sub(ended) / 1_000_000);
            let left_s = i64::from(stored.expiry_s) - away_s;
            let expires_at = (stored.expiry_s != u32::MAX)
                .then(|| now + Duration::from_secs(u64::try_from(left_s).unwrap_or(0)));
            let session = Session::from_stored(stored);
            for group in session.subscriptions.iter().flatten().filter_map(|s| group_of(&key.0, &s.filter)) {
                let cursor = groups.get(&group).copied();
                sessions.subscribers.groups.join_again(&group, session.uid, cursor);
            }
            clients.away(key, Away { session, will: None, expires_at });
        }
        drop(clients);
        // A group without sessions can be left by nobody any more: it ends here.
        let there: HashMap<GroupKey, Offset> = sessions.subscribers.groups.cursors(0).into_iter().collect();
        let orphans = groups.keys().filter(|key| !there.contains_key(*key)).map(|key| {
            let (datasource, group, filter) = key.clone();
            Change::RemoveGroup { datasource, group: group.into(), filter: filter.into() }
        });
        drop(sessions.subscribers.store.write(orphans.collect()));
        sessions
    }

    /// Handles due wills and expiries, and writes cursors, until `drain` is cancelled.
    pub(super) async fn run(self: &Arc<Self>, drain: CancellationToken) {
        let sharing = async {
            if let Some(claims) = &self.claims {
                self.share(claims).await;
            }
        };
        tokio::join!(drain.run_until_cancelled(sharing), self.keep(&drain));
    }

    async fn keep(&self, drain: &CancellationToken) {
        while tokio::time::timeout(TICK, drain.cancelled()).await.is_err() {
            self.do_what_is_due(Instant::now());
            let changes = self.progress();
            if !changes.is_empty() {
                // The store itself reports that it cannot write.
                let _ = self.subscribers.store.write(changes).await;
            }
        }
    }

    /// Whether other nodes share the clients.
    pub(super) fn are_shared(&self) -> bool {
        self.claims.is_some()
    }

    /// Lets a client in: ends its earlier connection, and finds or makes its session. With `clean` an
    /// existing session ends. A client that `is_new` has an identifier that nobody had before, so no
    /// session is looked for.
    ///
    /// # Errors
    /// [`NotEntered`], in a cluster.
    pub(super) async fn enter(
        self: &Arc<Self>,
        datasource: &DatasourceId,
        client_id: Arc<str>,
        control: Arc<Control>,
        clean: bool,
        is_new: bool,
        expiry_s: u32,
    ) -> Result<Taken, NotEntered> {
        let key = (datasource.clone(), client_id);
        let (away, at) = loop {
            let left = {
                let mut clients = self.locked();
                if clients.draining {
                    control.close(Close::Drain);
                }
                let entry = clients.entries.entry(key.clone()).or_default();
                match &entry.connected {
                    Some(earlier) => {
                        earlier.control.close(Close::TakenOver);
                        earlier.left.clone().notified_owned()
                    }
                    None => {
                        let away = entry.away.take();
                        // A client that was last on this node is on no other: only an unknown one is claimed.
                        let unknown = away.is_none() && !is_new;
                        let shared = self.claims.as_ref().map(|claims| {
                            let claim = unknown.then(|| claims.next());
                            Box::new(Held { claim, ..Held::default() })
                        });
                        let at = shared.as_ref().and_then(|held| held.claim.clone());
                        let (control, left) = (control.clone(), Arc::default());
                        entry.connected = Some(Connected { control, left, shared });
                        break (away, at);
                    }
                }
            };
            left.await;
        };
        let present = Present { sessions: self.clone(), key, control };
        self.enter_alone(present, at, away, clean, expiry_s).await
    }

    /// Continues [`Sessions::enter`] once no earlier connection to this node is left.
    async fn enter_alone(
        &self,
        present: Present,
        at: Option<When>,
        away: Option<Box<Away>>,
        clean: bool,
        expiry_s: u32,
    ) -> Result<Taken, NotEntered> {
        let key = &present.key;
        let (earlier, found) = match (&self.claims, at) {
            (Some(claims), Some(at)) => {
                let claimed = Box::pin(self.claim(claims, &present, at, clean));
                let Claimed { session, found } = claimed.await?;
                (session, Some(found))
            }
            _ => (away.and_then(|away| self.resume(key, *away, clean)), None),
        };
        let resumed = earlier.is_some();
        let session = self.begin(key, earlier, found, expiry_s);
        if self.claims.is_some()
            && let Some(entry) = self.locked().entries.get_mut(key)
            && let Some(held) = entry.connected.as_mut().and_then(|connected| connected.shared.as_mut())
        {
            held.uid = session.uid;
        }
        Ok(Taken { present, session, resumed })
    }

    /// The session with which a client that was on this node continues.
    fn resume(&self, key: &ClientKey, away: Away, clean: bool) -> Option<Session> {
        let Away { session, will, .. } = away;
        if !clean {
            // The client is back before its will was due, so the will is dropped.
            return Some(session);
        }
        self.end(key, &session);
        if let Some((will, _)) = will {
            self.publish(will);
        }
        None
    }

    /// Begins a connection's session: the earlier one or a new one. `found` is the bucket's cell of the
    /// client, if the cluster's bucket was asked.
    fn begin(
        &self,
        key: &ClientKey,
        earlier: Option<Session>,
        found: Option<Found>,
        expiry_s: u32,
    ) -> Session {
        let mut session = earlier.unwrap_or_else(|| Session::new(new_uid(), expiry_s));
        session.expiry_s = expiry_s;
        session.ever_stayed |= session.is_durable();
        let other = found.as_ref().and_then(|found| found.session.as_ref()).map(|session| session.uid);
        let other = other.filter(|uid| *uid != session.uid);
        let change = match (session.is_durable(), session.stored) {
            (true, true) if found.is_none() => Change::Ended { uid: session.uid, ended_at: None, expiry_s },
            (true, stored) => {
                if !stored {
                    session.position = self.subscribers.log.next_offset();
                }
                // This overwrites the other session, if there is one.
                Change::PutSession(session.to_stored(&key.0, &key.1))
            }
            (false, stored) => match other.or(stored.then_some(session.uid)) {
                Some(uid) => Change::RemoveSession(uid),
                None => return session,
            },
        };
        session.stored = session.is_durable();
        let changes = match found {
            Some(found) => vec![Change::Found(Box::new(found)), change],
            None => vec![change],
        };
        // Not awaited: the store writes in order, so a later write that is awaited covers this one.
        drop(self.subscribers.store.write(changes));
        session
    }

    /// Ends a session for good, on the disk and in its groups.
    fn end(&self, key: &ClientKey, session: &Session) {
        let mut changes: Vec<Change> =
            session.stored.then_some(Change::RemoveSession(session.uid)).into_iter().collect();
        for group in session.subscriptions.iter().flatten().filter_map(|s| group_of(&key.0, &s.filter)) {
            changes.extend(self.leave_group(&group, session));
        }
        if changes.is_empty() {
            return;
        }
        drop(self.subscribers.store.write(changes));
    }

    /// Takes a session out of a group. Returns the change to write, if the group ends with that.
    pub(super) fn leave_group(&self, group: &GroupKey, session: &Session) -> Option<Change> {
        let gone = self.subscribers.groups.leave(group, session.uid, session.ever_stayed);
        gone.then(|| {
            self.locked().written_groups.remove(group);
            let (datasource, name, filter) = group.clone();
            Change::RemoveGroup { datasource, group: name.into(), filter: filter.into() }
        })
    }

    /// Publishes a will on a task of its own.
    fn publish(&self, will: Box<Will>) {
        let intake = self.intake.clone();
        self.wills.spawn(async move { will.publish(&intake).await });
    }

    fn do_what_is_due(&self, now: Instant) {
        let (mut wills, mut ended) = (Vec::new(), Vec::new());
        let mut clients = self.locked();
        while let Some(first) = clients.due.first_entry().filter(|first| first.key().0 <= now) {
            let key = first.remove();
            let Some(entry) = clients.entries.get_mut(&key) else { continue };
            let Some(away) = &mut entry.away else { continue };
            wills.extend(away.will.take_if(|(_, due)| *due <= now).map(|(will, _)| will));
            if away.expires_at.is_some_and(|at| at <= now)
                && let Some(away) = clients.entries.remove(&key).and_then(|entry| entry.away)
            {
                // A will is due at the latest when its session ends (MQTT 5 section 3.1.3.2.2).
                wills.extend(away.will.map(|(will, _)| will));
                ended.push((key, away.session));
            }
        }
        drop(clients);
        wills.into_iter().for_each(|will| self.publish(will));
        for (key, session) in ended {
            debug!(datasource = %key.0, "a session has expired");
            self.end(&key, &session);
        }
    }

    /// The cursors of sessions and groups that have moved since they were last written.
    fn progress(&self) -> Vec<Change> {
        let routed = self.subscribers.router.routed();
        let mut clients = self.locked();
        let Clients { watched, written_groups, .. } = &mut *clients;
        let moved = watched.iter_mut().filter_map(|(uid, (mailbox, written))| {
            let cursor = mailbox.cursor(routed);
            let before = std::mem::replace(written, cursor);
            (before != cursor).then_some(Change::Cursor { uid: *uid, cursor })
        });
        let mut changes: Vec<Change> = moved.collect();
        for (key, cursor) in self.subscribers.groups.cursors(routed) {
            if written_groups.insert(key.clone(), cursor) != Some(cursor) {
                let (datasource, group, filter) = key;
                let group = StoredGroup { datasource, group: group.into(), filter: filter.into(), cursor };
                changes.push(Change::PutGroup(group));
            }
        }
        changes
    }

    /// Closes every connection, including those that come later.
    pub(super) fn drain(&self) {
        let mut clients = self.locked();
        clients.draining = true;
        let connected = clients.entries.values().filter_map(|entry| entry.connected.as_ref());
        connected.for_each(|connected| connected.control.close(Close::Drain));
    }

    /// Runs after the last connection: publishes the delayed wills, which would otherwise be lost, and
    /// writes the groups' cursors.
    pub(super) async fn finish(&self) {
        let waiting: Vec<Box<Will>> = {
            let mut clients = self.locked();
            let away = clients.entries.values_mut().filter_map(|entry| entry.away.as_mut());
            away.filter_map(|away| away.will.take()).map(|(will, _)| will).collect()
        };
        waiting.into_iter().for_each(|will| self.publish(will));
        self.wills.close();
        self.wills.wait().await;
        let _ = self.subscribers.store.write(self.progress()).await;
    }

    fn locked(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn away(&mut self, key: ClientKey, away: Away) {
        let will = away.will.as_ref().map(|(_, due)| *due);
        for due in [will, away.expires_at].into_iter().flatten() {
            self.dates += 1;
            self.due.insert((due, self.dates), key.clone());
        }
        self.entries.entry(key).or_default().away = Some(Box::new(away));
    }
}

/// The group of a filter, if it is a shared subscription.
pub(super) fn group_of(datasource: &DatasourceId, filter: &str) -> Option<GroupKey> {
    let wanted = Wanted::parse(filter)?;
    Some((datasource.clone(), wanted.group?.into(), wanted.filter.as_str().into()))
}

/// A random number, to tell this session from every other.
fn new_uid() -> u64 {
    let mut random = [0; 8];
    if rand::rngs::SysRng.try_fill_bytes(&mut random).is_err() {
        random = now_micros().to_le_bytes();
    }
    u64::from_le_bytes(random)
}
