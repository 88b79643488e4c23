//! Ends the NATS connections of dead keys. The connections belong to a nats-server, which keeps them until
//! their permission expires. So when a key ends, the gateway asks the servers, through the system account,
//! for the connections with the key's user name (`CONNZ`), ends each of them (`KICK`), and asks again until
//! there are none. The name finds them, so nothing has to be counted or remembered.
//!
//! The servers' lists lack one thing: a client that was admitted just now does not have its user name yet.
//! [`RecentNatsConnections`] remembers such connections for a while, so that they are ended by their number
//! in their server as well. While NATS is away no connection can be ended. So after an absence, and at every
//! start, the gateway checks all connections once NATS is back.

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
use crate::auth::{Authorizer, Key};
use crate::limits::{NATS_LET_IN_AGE_MAX, NATS_LET_IN_CLIENTS_MAX};
use crate::message::KeyId;

/// How often to check whether NATS is back.
const KICK_CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Keys, or connections, that are dealt with at the same time.
const KICKS_AT_ONCE_MAX: usize = 16;

/// Connections that were admitted recently.
#[derive(Debug, Default)]
pub(super) struct RecentNatsConnections(Mutex<VecDeque<(Instant, KeyId, NatsClientConnection)>>);

impl RecentNatsConnections {
    /// Remembers a connection. Must be called before its server hears that it is admitted.
    pub(super) fn remember(&self, key: KeyId, connection: NatsClientConnection) {
        let now = Instant::now();
        let mut let_in = self.0.lock();
        while let_in.len() >= NATS_LET_IN_CLIENTS_MAX
            || let_in.front().is_some_and(|(at, ..)| now.duration_since(*at) > NATS_LET_IN_AGE_MAX)
        {
            let_in.pop_front();
        }
        let_in.push_back((now, key, connection));
    }

    fn connections_of(&self, keys: &HashSet<KeyId>) -> Vec<NatsClientConnection> {
        let let_in = self.0.lock();
        let of_keys = let_in.iter().filter(|(_, key, _)| keys.contains(key));
        of_keys.map(|(_, _, connection)| connection.clone()).collect()
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
    /// returns at once, and [`NatsConnectionKicker::watch`] ends them when NATS is back.
    pub(super) async fn close(&self, dead: &[Arc<Key>]) {
        let keys: HashSet<KeyId> = dead.iter().map(|key| key.id).collect();
        self.end_of_keys(dead, &keys).await;
        // Whatever the servers still hold of them is no client of a key any more.
        self.clients.leave_keys(&keys);
    }

    async fn end_of_keys(&self, dead: &[Arc<Key>], keys: &HashSet<KeyId>) {
        if self.system.trouble().is_some() {
            return self.put_off();
        }
        let just_now = self.let_in.connections_of(keys);
        let names: Vec<String> = dead.iter().map(|key| nats_user_of_key(key)).collect();
        let asked = stream::iter(names)
            .map(|name| async move { self.system.end_all(&self.account, &name).await })
            .buffer_unordered(KICKS_AT_ONCE_MAX)
            .collect::<Vec<Option<usize>>>();
        let ((), ended) = tokio::join!(self.end(just_now), asked);
        if ended.iter().any(Option::is_none) {
            self.missed.store(true, Ordering::Release);
            warn!(
                "NATS is away: connections of dead keys end when it is back, and what they send is refused"
            );
        }
        let count: usize = ended.iter().flatten().sum();
        if count > 0 {
            info!(count, "closed NATS connections of dead keys");
        }
    }

    fn put_off(&self) {
        self.missed.store(true, Ordering::Release);
        warn!("NATS is away: connections of dead keys end when it is back, and what they send is refused");
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

    /// Ends all connections with the user name of a dead key. `false` if NATS went away.
    async fn sweep(&self) -> bool {
        let Some(all) = self.system.connections(&self.account).await else { return false };
        let is_dead = |user: &str| {
            key_of_nats_user(user)
                .is_some_and(|(datasource, id)| self.authorizer.grant_of_key(&datasource, id).is_err())
        };
        let dead: Vec<_> = all.into_iter().filter(|(user, _)| is_dead(user)).map(|(_, one)| one).collect();
        if !dead.is_empty() {
            info!(count = dead.len(), "closing NATS connections of keys that have died meanwhile");
        }
        self.end(dead).await;
        true
    }

    async fn end(&self, connections: Vec<NatsClientConnection>) {
        let each = |one: NatsClientConnection| async move { self.system.end(&one).await };
        stream::iter(connections).for_each_concurrent(KICKS_AT_ONCE_MAX, each).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_were_let_in_are_remembered_by_their_key_and_no_more_than_there_is_room_for() {
        let let_in = RecentNatsConnections::default();
        let one = |client_id| NatsClientConnection { server_id: "N1".to_owned(), client_id };
        let key = |n: u8| KeyId([n; 6]);
        for client_id in 0..NATS_LET_IN_CLIENTS_MAX as u64 {
            let_in.remember(key(1), one(client_id));
        }
        let_in.remember(key(2), one(7));
        assert_eq!(let_in.connections_of(&HashSet::from([key(2)])), [one(7)]);
        assert_eq!(let_in.connections_of(&HashSet::from([key(1), key(2)])).len(), NATS_LET_IN_CLIENTS_MAX);
        assert!(let_in.connections_of(&HashSet::from([key(3)])).is_empty());
    }
}
