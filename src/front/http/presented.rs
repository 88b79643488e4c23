//! The keys that an HTTP connection has presented. The connection counts among the live connections of
//! each of them. It ends when one of them dies: an idle connection at once, a busy one after its answer
//! (HTTP/2: with GOAWAY).
//!
//! Behind a proxy, one connection may carry the requests of many clients. Those connect again, as HTTP
//! clients do whenever a server closes.

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;

use crate::auth::Key;
use crate::auth::connections::{ConnectionControl, KeyConnectionGuard};
use crate::limits::HTTP_KEYS_PER_CONNECTION_MAX;
use crate::memory::MemoryAccount;
use crate::message::KeyId;

/// The keys of one connection.
#[derive(Default)]
pub(super) struct PresentedKeys {
    /// Through which a dead key tells the connection to close.
    control: Arc<ConnectionControl>,
    /// The most recently used last.
    keys: Mutex<Vec<PresentedKey>>,
}

struct PresentedKey {
    id: KeyId,
    _entered: KeyConnectionGuard,
    /// Who is charged for requests with it.
    account: Arc<MemoryAccount>,
}

impl PresentedKeys {
    /// Where the connection learns that it has to close.
    pub(super) fn control(&self) -> &ConnectionControl {
        &self.control
    }

    /// Records that a request has presented this key. If the key is dead by now, the connection is told to
    /// close. Returns whether this is the connection's first request with the key, and who is charged for it.
    pub(super) fn enter(
        &self,
        key: &Key,
        account: impl FnOnce() -> Arc<MemoryAccount>,
    ) -> (bool, Arc<MemoryAccount>) {
        let mut keys = self.keys();
        match keys.iter().rposition(|known| known.id == key.id) {
            Some(place) => {
                keys[place..].rotate_left(1);
                (false, keys[keys.len() - 1].account.clone())
            }
            None => {
                let oldest = (keys.len() >= HTTP_KEYS_PER_CONNECTION_MAX).then(|| keys.remove(0));
                let (account, entered) = (account(), key.connections().enter(Arc::clone(&self.control)));
                keys.push(PresentedKey { id: key.id, _entered: entered, account: account.clone() });
                drop(keys);
                drop(oldest);
                (true, account)
            }
        }
    }

    /// Whether the connection has presented no valid key.
    pub(super) fn are_none(&self) -> bool {
        self.keys().is_empty()
    }

    /// Stops counting the connection for this key: the request that ends a key must not wait for its own
    /// connection, and a connection that was refused as one too many must not count.
    pub(super) fn leave(&self, id: KeyId) {
        let mut keys = self.keys();
        let left = keys.iter().position(|known| known.id == id).map(|place| keys.remove(place));
        drop(keys);
        drop(left);
    }

    fn keys(&self) -> MutexGuard<'_, Vec<PresentedKey>> {
        self.keys.lock()
    }
}
