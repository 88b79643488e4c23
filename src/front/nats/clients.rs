//! NATS clients that were let in with a key, counted among the key's connections (`limits.connections`). A nats-server
//! holds them, so the count follows what the servers say through the system account: an event when one comes or goes,
//! and now and then the list of all, because events are lost while NATS is away. Every gateway counts all of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_nats::system::{
    NatsClientConnection, NatsClientEvent, NatsConnectionList, SystemAccount,
};
use parking_lot::Mutex;
use tracing::debug;

use super::attested::key_of_nats_user;
use super::kick::{NatsConnectionKicker, is_of_dead_key};
use crate::auth::connections::{ConnectionControl, KeyConnectionGuard};
use crate::auth::{Authorizer, Key};
use crate::message::KeyId;

/// How often the count is compared with the servers' lists.
const CLIENT_COUNT_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a client that was let in may take to be in its server's list.
const CLIENT_COUNT_GRACE: Duration = Duration::from_secs(5);

/// The counted clients.
#[derive(Debug, Default)]
pub(super) struct NatsClientTable(Mutex<HashMap<NatsClientConnection, CountedClient>>);

#[derive(Debug)]
struct CountedClient {
    key_id: KeyId,
    since: Instant,
    /// Its place among the connections of its key.
    _entered: KeyConnectionGuard,
}

impl NatsClientTable {
    /// Counts a client, once.
    pub(super) fn enter(&self, key: &Arc<Key>, connection: NatsClientConnection) {
        self.0.lock().entry(connection).or_insert_with(|| CountedClient {
            key_id: key.id,
            since: Instant::now(),
            // Nobody watches the control: the server ends the connection (`kick.rs`).
            _entered: key.connections().enter(Arc::new(ConnectionControl::default())),
        });
    }

    /// Counts a client no more.
    pub(super) fn leave(&self, connection: &NatsClientConnection) {
        let left = self.0.lock().remove(connection);
        drop(left);
    }

    /// Counts the clients of these keys no more.
    pub(super) fn leave_keys(&self, keys: &HashSet<KeyId>) {
        self.0.lock().retain(|_, client| !keys.contains(&client.key_id));
    }

    /// The counted clients of these keys.
    pub(super) fn connections_of(&self, keys: &HashSet<KeyId>) -> Vec<NatsClientConnection> {
        let clients = self.0.lock();
        let of_keys = clients.iter().filter(|(_, client)| keys.contains(&client.key_id));
        of_keys.map(|(connection, _)| connection.clone()).collect()
    }

    /// Brings the count up to the servers' lists. Where one is missing, those of its clients that have left are told by
    /// their events alone.
    fn reconcile(
        &self,
        NatsConnectionList { connections: listed, is_complete }: NatsConnectionList,
        authorizer: &Authorizer,
    ) {
        let live: HashSet<&NatsClientConnection> = listed.iter().map(|(_, connection)| connection).collect();
        self.0.lock().retain(|connection, client| {
            !is_complete || live.contains(connection) || client.since.elapsed() < CLIENT_COUNT_GRACE
        });
        for (user, connection) in &listed {
            self.adopt(user, connection.clone(), authorizer);
        }
    }

    /// Counts a client that another gateway let in, or an earlier run of this one.
    fn adopt(&self, user: &str, connection: NatsClientConnection, authorizer: &Authorizer) {
        let Some((datasource, key_id)) = key_of_nats_user(user) else { return };
        // One of a dead key is ended, and not counted.
        if let Ok(grant) = authorizer.grant_of_key(&datasource, key_id) {
            self.enter(grant.key(), connection);
        }
    }

    /// Follows the clients of `account`; one of a dead key is for `kicker` to end. Never returns.
    pub(super) async fn follow(
        self: Arc<Self>,
        system: SystemAccount,
        account: String,
        authorizer: Authorizer,
        kicker: Arc<NatsConnectionKicker>,
    ) {
        loop {
            let Some(mut events) = system.client_events(&account).await else {
                tokio::time::sleep(CLIENT_COUNT_CHECK_INTERVAL).await;
                continue;
            };
            let mut check = tokio::time::interval(CLIENT_COUNT_CHECK_INTERVAL);
            loop {
                tokio::select! {
                    event = events.next() => match event {
                        Some(NatsClientEvent::Connected { user, connection }) => {
                            if is_of_dead_key(&user, &authorizer) {
                                kicker.check_again();
                            }
                            self.adopt(&user, connection, &authorizer);
                        }
                        Some(NatsClientEvent::Disconnected(connection)) => self.leave(&connection),
                        None => break,
                    },
                    _ = check.tick() => match system.connections(&account).await {
                        Some(listed) => {
                            if listed.connections.iter().any(|(user, _)| is_of_dead_key(user, &authorizer)) {
                                kicker.check_again();
                            }
                            self.reconcile(listed, &authorizer);
                        }
                        None => debug!("NATS is away: its clients are not counted anew"),
                    },
                }
            }
        }
    }
}
