//! Ends the NATS connections of dead keys. The connections belong to a nats-server, which keeps them until
//! their permission expires. So when a key ends, the gateway asks the servers, through the system account,
//! for the connections with the key's user name (`CONNZ`), ends each of them (`KICK`), and asks again until
//! there are none. The name finds them, so nothing has to be counted or remembered.
//!
//! The servers' lists lack one thing: a client that was admitted just now does not have its user name yet.
//! [`RecentNatsConnections`] remembers such connections for a while, so that they are ended by their number
//! in their server as well. While NATS is away no connection can be ended, and none of a server that does not
//! answer. So whatever may have been missed, and at every start, the gateway checks all connections again and
//! again until every server has answered. The lists with which clients are counted are looked through for dead
//! keys too: a server that slept for longer than the others remember it is in one of them when it wakes.

use parking_lot::Mutex;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use headgate_bridge_nats::system::{NatsClientConnection, SystemAccount};
use tracing::{info, warn};

use super::attested::{key_of_nats_user, nats_user_of_key};
use super::clients::NatsClientTable;
use crate::auth::{Authorizer, GrantDenial, Key};
use crate::limits::{NATS_LET_IN_AGE_MAX, NATS_LET_IN_CLIENTS_MAX};
use crate::message::{KeyId, Lease};

/// How often to check whether NATS is back.
const KICK_CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Keys, or connections, that are dealt with at the same time.
const KICKS_AT_ONCE_MAX: usize = 16;

/// Connections that were admitted recently.
#[derive(Debug, Default)]
pub(super) struct RecentNatsConnections(Mutex<VecDeque<RecentNatsConnection>>);

#[derive(Debug)]
struct RecentNatsConnection {
    at: Instant,
    key_id: KeyId,
    /// Its key's.
    lease: Lease,
    connection: NatsClientConnection,
}

impl RecentNatsConnection {
    fn is_old(&self) -> bool {
        self.at.elapsed() > NATS_LET_IN_AGE_MAX
    }
}

impl RecentNatsConnections {
    /// Remembers a connection. Must be called before its server hears that it is admitted.
    pub(super) fn remember(&self, key_id: KeyId, lease: &Lease, connection: NatsClientConnection) {
        let mut let_in = self.0.lock();
        while let_in.len() >= NATS_LET_IN_CLIENTS_MAX
            || let_in.front().is_some_and(RecentNatsConnection::is_old)
        {
            let_in.pop_front();
        }
        let lease = lease.clone();
        let_in.push_back(RecentNatsConnection { at: Instant::now(), key_id, lease, connection });
    }

    fn connections_of(&self, keys: &HashSet<KeyId>) -> Vec<NatsClientConnection> {
        self.connections_that(|recent| keys.contains(&recent.key_id))
    }

    fn connections_of_dead_keys(&self) -> Vec<NatsClientConnection> {
        self.connections_that(|recent| !recent.lease.holds())
    }

    fn connections_that(&self, wanted: impl Fn(&RecentNatsConnection) -> bool) -> Vec<NatsClientConnection> {
        let let_in = self.0.lock();
        let wanted = let_in.iter().filter(|recent| !recent.is_old() && wanted(recent));
        wanted.map(|recent| recent.connection.clone()).collect()
    }
}

/// Ends the connections of dead keys.
#[derive(Debug)]
pub(super) struct NatsConnectionKicker {
    system: SystemAccount,
    account: String,
    let_in: Arc<RecentNatsConnections>,
    clients: Arc<NatsClientTable>,
    authorizer: Authorizer,
    /// Set when a connection may have been missed.
    missed: AtomicBool,
}

/// Notes that connections may have been missed, unless it was told that all have ended: also when whoever waits
/// for that has waited long enough.
struct UnfinishedEnds<'a>(&'a AtomicBool);

impl UnfinishedEnds<'_> {
    fn finish(self) {
        std::mem::forget(self);
    }
}

impl Drop for UnfinishedEnds<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl NatsConnectionKicker {
    pub(super) fn new(
        system: SystemAccount,
        account: &str,
        let_in: Arc<RecentNatsConnections>,
        clients: Arc<NatsClientTable>,
        authorizer: Authorizer,
    ) -> Arc<Self> {
        // True at a start: the gateway may have stopped between the end of a key and that of its connections.
        let missed = AtomicBool::new(true);
        Arc::new(Self { system, account: account.to_owned(), let_in, clients, authorizer, missed })
    }

    /// Ends every connection of the dead keys. Returns when the servers have none left. If NATS is away it
    /// returns at once, and after a second if a server does not answer; [`NatsConnectionKicker::watch`] ends what
    /// is left.
    pub(super) async fn close(&self, dead: &[Arc<Key>]) {
        let keys: HashSet<KeyId> = dead.iter().map(|key| key.id).collect();
        self.end_of_keys(dead, &keys).await;
        // Whatever the servers still hold of them is no client of a key any more.
        self.clients.leave_keys(&keys);
    }

    async fn end_of_keys(&self, dead: &[Arc<Key>], keys: &HashSet<KeyId>) {
        let unfinished = UnfinishedEnds(&self.missed);
        if self.system.trouble().is_some() {
            warn!(
                "NATS is away: connections of dead keys end when it is back, and what they send is refused"
            );
            return;
        }
        // First, and without waiting, those that are known by number: their server may be asleep.
        for connection in self.clients.connections_of(keys) {
            self.system.ask_to_end(&connection).await;
        }
        let just_now = self.let_in.connections_of(keys);
        let names: Vec<String> = dead.iter().map(|key| nats_user_of_key(key)).collect();
        let asked = stream::iter(names)
            .map(|name| async move { self.system.end_all(&self.account, &name).await })
            .buffer_unordered(KICKS_AT_ONCE_MAX)
            .collect::<Vec<Option<usize>>>();
        let (all_answered, ended) = tokio::join!(self.end(just_now), asked);
        if all_answered && ended.iter().all(Option::is_some) {
            unfinished.finish();
        } else {
            warn!(
                "a NATS server does not answer: its connections of dead keys end when it does, and what they send \
                 is refused"
            );
        }
        let count: usize = ended.iter().flatten().sum();
        if count > 0 {
            info!(count, "closed NATS connections of dead keys");
        }
    }

    /// Has all connections checked: one of a dead key was seen.
    pub(super) fn check_again(&self) {
        self.missed.store(true, Ordering::Release);
    }

    /// Checks all connections whenever some may have been missed. Never returns.
    pub(super) async fn watch(self: Arc<Self>) {
        loop {
            let is_away = self.system.trouble().is_some();
            if is_away || self.missed.swap(false, Ordering::AcqRel) && !self.sweep().await {
                self.missed.store(true, Ordering::Release);
            }
            tokio::time::sleep(KICK_CHECK_INTERVAL).await;
        }
    }

    /// Ends all connections with the user name of a dead key, and those that were let in just now under one. `false`
    /// if some may be left: NATS went away, or a server has not answered.
    async fn sweep(&self) -> bool {
        let Some(all) = self.system.connections(&self.account).await else { return false };
        // Another gateway may have let one in under a key that is new here: what was written before the lists were made
        // has to be known.
        let has_dead = all.connections.iter().any(|(user, _)| is_of_dead_key(user, &self.authorizer));
        let is_caught_up = !has_dead || self.authorizer.registry().caught_up().await.is_ok();
        // While that cannot be known, those of expired keys go: no key that is new here is one.
        let is_dead = |user: &str| {
            is_of_dead_key(user, &self.authorizer)
                && (is_caught_up || is_of_expired_key(user, &self.authorizer))
        };
        let listed = all.connections.into_iter().filter(|(user, _)| is_dead(user));
        let mut dead: Vec<_> = listed.map(|(_, one)| one).collect();
        if !dead.is_empty() {
            info!(count = dead.len(), "closing NATS connections of keys that have died meanwhile");
        }
        dead.extend(self.let_in.connections_of_dead_keys());
        self.end(dead).await && all.is_complete && is_caught_up
    }

    /// Ends these. `false` if a server has not answered.
    async fn end(&self, connections: Vec<NatsClientConnection>) -> bool {
        let each = |one: NatsClientConnection| async move { self.system.end(&one).await };
        let answered = stream::iter(connections).map(each).buffer_unordered(KICKS_AT_ONCE_MAX);
        answered.fold(true, |all, answered| std::future::ready(all && answered)).await
    }
}

/// Whether a connection's user name is that of a key that is not alive, as far as this gateway knows.
pub(super) fn is_of_dead_key(user: &str, authorizer: &Authorizer) -> bool {
    key_of_nats_user(user).is_some_and(|(datasource, id)| authorizer.grant_of_key(&datasource, id).is_err())
}

/// Whether a connection's user name is that of a key whose time is over.
fn is_of_expired_key(user: &str, authorizer: &Authorizer) -> bool {
    key_of_nats_user(user).is_some_and(|(datasource, id)| {
        matches!(authorizer.grant_of_key(&datasource, id), Err(GrantDenial::Expired))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_were_let_in_are_remembered_by_their_key_and_no_more_than_there_is_room_for() {
        let let_in = RecentNatsConnections::default();
        let one = |client_id| NatsClientConnection { server_id: "N1".to_owned(), client_id };
        let key = |n: u8| KeyId([n; 6]);
        let (alive, dead) = (Lease::new(), Lease::new());
        for client_id in 0..NATS_LET_IN_CLIENTS_MAX as u64 {
            let_in.remember(key(1), &alive, one(client_id));
        }
        let_in.remember(key(2), &dead, one(7));
        assert_eq!(let_in.connections_of(&HashSet::from([key(2)])), [one(7)]);
        assert_eq!(let_in.connections_of(&HashSet::from([key(1), key(2)])).len(), NATS_LET_IN_CLIENTS_MAX);
        assert!(let_in.connections_of(&HashSet::from([key(3)])).is_empty());
        assert!(let_in.connections_of_dead_keys().is_empty());
        dead.end();
        assert_eq!(let_in.connections_of_dead_keys(), [one(7)]);
    }
}
