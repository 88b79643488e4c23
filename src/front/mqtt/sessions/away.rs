//! Clients that are away: their sessions and wills wait for them, until they are back, or it is time.

use std::time::Instant;

use tracing::debug;

use super::super::session::MqttSession;
use super::super::wills::MqttWill;
use super::due::DueEntry;
use super::{ClientEntry, ClientKey, SessionClients, Sessions};

/// A client that is away, and its session.
pub(super) struct AwayClient {
    pub(super) session: MqttSession,
    /// Its will, and when that is due.
    pub(super) will: Option<(Box<MqttWill>, Instant)>,
    /// `None`: never.
    pub(super) expires_at: Option<Instant>,
    /// Its entries among the due times.
    _due: Vec<DueEntry>,
}

impl SessionClients {
    /// Notes that a client is away.
    pub(super) fn put_away(
        &mut self,
        key: ClientKey,
        session: MqttSession,
        will: Option<(Box<MqttWill>, Instant)>,
        expires_at: Option<Instant>,
    ) {
        let will_due = will.as_ref().map(|(_, due)| *due);
        let due = [will_due, expires_at].into_iter().flatten().map(|due| self.due.enter(due, key.clone()));
        let away = AwayClient { session, will, expires_at, _due: due.collect() };
        self.entries.entry(key).or_default().away = Some(Box::new(away));
    }
}

impl Sessions {
    /// The session with which a client that was on this node continues, and the will that was not due yet.
    pub(super) fn resume(
        &self,
        key: &ClientKey,
        away: AwayClient,
        clean: bool,
    ) -> Option<(MqttSession, Option<Box<MqttWill>>)> {
        let AwayClient { session, will, .. } = away;
        if !clean {
            return Some((session, will.map(|(will, _)| will)));
        }
        self.end_session(key, &session);
        if let Some((will, _)) = will {
            self.spawn_will(will);
        }
        None
    }

    /// Publishes the wills that are due, and ends the sessions that have expired.
    pub(super) fn run_due(&self, now: Instant) {
        let (mut wills, mut ended) = (Vec::from_iter(self.refused_wills.take_due(now)), Vec::new());
        let mut clients = self.lock_clients();
        clients.takeovers.forget_old(now);
        while let Some(key) = clients.due.take_due(now) {
            let Some(entry) = clients.entries.get_mut(&key) else { continue };
            let Some(away) = &mut entry.away else { continue };
            wills.extend(away.will.take_if(|(_, due)| *due <= now).map(|(will, _)| will));
            if away.expires_at.is_some_and(|at| at <= now)
                && let Some(away) = entry.away.take()
            {
                // Who waits to enter has a place in the entry's queue.
                if !entry.note_move() {
                    clients.entries.remove(&key);
                }
                // A will is due at the latest when its session ends (MQTT 5 section 3.1.3.2.2).
                wills.extend(away.will.map(|(will, _)| will));
                ended.push((key, away.session));
            }
        }
        drop(clients);
        wills.into_iter().for_each(|will| self.spawn_will(will));
        for (key, session) in ended {
            debug!(datasource = %key.0, "a session has expired");
            self.end_session(&key, &session);
        }
    }

    /// Ends the sessions of clients that are away and whose datasource was deleted. Those of clients that are still
    /// connected end with their connections.
    pub(super) fn end_with_datasources(&self) {
        let subscribers = &self.subscribers;
        let (version, left_out) = (subscribers.log.withheld().version(), subscribers.log.withheld().now());
        if subscribers.session_ends.swept() >= version {
            return;
        }
        let ended: Vec<_> = {
            let mut clients = self.lock_clients();
            let gone = |(key, entry): (&ClientKey, &mut ClientEntry)| {
                let away = entry.away.take_if(|_| left_out.has_ended(&key.0))?;
                Some((key.clone(), away.session))
            };
            let ended = clients.entries.iter_mut().filter_map(gone).collect();
            clients.entries.retain(|_, entry| {
                // Who waits to take a client over has a place in its queue.
                entry.connected.is_some() || entry.away.is_some() || entry.queue.is_some()
            });
            ended
        };
        for (key, session) in ended {
            debug!(datasource = %key.0, "a session has ended with its datasource");
            subscribers.session_ends.note(&key.0);
            self.end_session(&key, &session);
        }
        subscribers.session_ends.set_swept(version);
    }
}
