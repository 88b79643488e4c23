//! A client's place among the sessions, for as long as it is connected.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::session::MqttSession;
use super::super::wills::MqttWill;
use super::takeovers::SharedIdentifier;
use super::{ClientKey, Sessions, shared_group_key};
use crate::auth::connections::ConnectionControl;
use crate::consume::subscriber::Mailbox;
use crate::consume::subscriber::sessions::SessionStoreChange;
use crate::message::DatasourceId;
use crate::time::cluster_micros;

/// A connected client's entry in [`Sessions`]; dropping it lets the next connection in.
pub(in super::super) struct ClientGuard {
    pub(super) sessions: Arc<Sessions>,
    pub(super) key: ClientKey,
    pub(super) control: Arc<ConnectionControl>,
}

impl ClientGuard {
    /// The client identifier.
    pub(in super::super) fn client_id(&self) -> &Arc<str> {
        &self.key.1
    }

    /// The signal that closes this connection.
    pub(in super::super) fn control(&self) -> &ConnectionControl {
        &self.control
    }

    /// The scope of the client's key.
    pub(in super::super) fn scope(&self) -> &DatasourceId {
        &self.key.0
    }

    /// Whether another node has taken the session.
    fn is_lost(&self) -> bool {
        self.sessions.claims.is_some()
            && self.sessions.lock_clients().entries.get(&self.key).is_some_and(|entry| {
                let shared = entry.connected.as_ref().and_then(|connected| connected.shared.as_ref());
                shared.is_some_and(|held| held.lost)
            })
    }

    /// Makes known where the session reports how far it is; of a durable one that is written every second.
    pub(in super::super) fn watch(&self, session: &MqttSession, mailbox: &Arc<Mailbox>) {
        let mut clients = self.sessions.lock_clients();
        if session.is_durable() {
            clients.watched.insert(session.uid, (mailbox.clone(), 0));
        }
        if let Some(connected) = clients.entries.get_mut(&self.key).and_then(|entry| entry.connected.as_mut())
        {
            connected.mailbox = Some(mailbox.clone());
        }
    }

    /// Tells the session's groups that it now outlives its connection for longer.
    pub(in super::super) fn extend_stay(&self, session: &MqttSession) {
        for group in
            session.subscriptions.iter().flatten().filter_map(|s| shared_group_key(&self.key.0, &s.filter))
        {
            self.sessions.subscribers.groups.extend_stay(&group, session.group_session());
        }
    }

    /// Notes that another connection of the client has pushed out this one, from `address`, which was in use. Returns
    /// what to tell if that goes on and on.
    pub(in super::super) fn note_takeover(&self, address: IpAddr) -> Option<SharedIdentifier> {
        self.sessions.lock_clients().takeovers.note(&self.key, address, Instant::now())
    }

    /// Leaves when the end of the session is written: a node that claims the client reads the bucket after that.
    fn leave_when_written(self) {
        let (written, sessions) = (self.sessions.subscribers.store.write(Vec::new()), self.sessions.clone());
        let usual = sessions.intake.processor().usual_runtime();
        let leaving = async move {
            // An error needs no handling: a bucket that cannot be written cannot be read by the other node either.
            let _ = written.await;
            drop(self);
        };
        sessions.wills.spawn_on(leaving, &usual);
    }

    /// Hands back the session at the end of the connection. Returns the will if it is to be published
    /// now.
    pub(in super::super) fn leave(
        self,
        session: MqttSession,
        will: Option<Box<MqttWill>>,
    ) -> Option<Box<MqttWill>> {
        let now = Instant::now();
        // Whether it is durable or was until its DISCONNECT. The keeper writes cursors under this lock: none comes behind
        // what is written here.
        self.sessions.lock_clients().watched.remove(&session.uid);
        if !session.is_durable() {
            self.sessions.end_session(&self.key, &session);
            if self.sessions.is_clustered() && session.stored {
                self.leave_when_written();
            }
            return will;
        }
        let (uid, expiry_s) = (session.uid, session.expiry_s);
        let subscribers = &self.sessions.subscribers;
        if subscribers.log.withheld().now().has_ended(&self.key.0) {
            // It ends with its datasource. Its will is refused with its key.
            subscribers.session_ends.note(&self.key.0);
            self.sessions.end_session(&self.key, &session);
            return None;
        }
        if self.is_lost() {
            // The client is connected to that node already: a delayed will is dropped.
            return will.filter(|will| will.delay_s == 0);
        }
        let changes = vec![
            session.moved(),
            SessionStoreChange::SetEnded { uid, ended_at: Some(cluster_micros()), expiry_s },
        ];
        drop(self.sessions.subscribers.store.write(changes));
        let mut clients = self.sessions.lock_clients();
        // Once more under the lock that the sweep of deleted datasources takes: nothing sweeps what is put away behind it.
        if subscribers.log.withheld().now().has_ended(&self.key.0) {
            drop(clients);
            subscribers.session_ends.note(&self.key.0);
            self.sessions.end_session(&self.key, &session);
            return None;
        }
        let wait = |will: &MqttWill| will.delay_s > 0 && (!clients.draining || will.has_copy());
        let (later, now_due) = match will {
            Some(will) if wait(&will) => (Some(will), None),
            will => (None, will),
        };
        let later = later.map(|mut will| {
            will.note_loss(cluster_micros());
            let due = now + Duration::from_secs(u64::from(will.delay_s));
            (will, due)
        });
        let expires_at = (expiry_s != u32::MAX).then(|| now + Duration::from_secs(u64::from(expiry_s)));
        clients.put_away(self.key.clone(), session, later, expires_at);
        drop(clients);
        now_due
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let mut clients = self.sessions.lock_clients();
        let Some(entry) = clients.entries.get_mut(&self.key) else { return };
        entry.connected = None;
        if !entry.note_move() {
            clients.entries.remove(&self.key);
        }
    }
}
