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
use crate::message::KeyId;

/// The keys of one connection.
#[derive(Debug, Default)]
pub(super) struct PresentedKeys {
    /// Through which a dead key tells the connection to close.
    control: Arc<ConnectionControl>,
    /// The most recently used last.
    keys: Mutex<Vec<(KeyId, KeyConnectionGuard)>>,
}

impl PresentedKeys {
    /// Where the connection learns that it has to close.
    pub(super) fn control(&self) -> &ConnectionControl {
        &self.control
    }

    /// Records that a request has presented this key. If the key is dead by now, the connection is told to
    /// close. Returns whether this is the connection's first request with the key.
    pub(super) fn enter(&self, key: &Key) -> bool {
        let mut keys = self.keys();
        match keys.iter().rposition(|(id, _)| *id == key.id) {
            Some(place) => {
                keys[place..].rotate_left(1);
                false
            }
            None => {
                let oldest = (keys.len() >= HTTP_KEYS_PER_CONNECTION_MAX).then(|| keys.remove(0));
                keys.push((key.id, key.connections().enter(Arc::clone(&self.control))));
                drop(keys);
                drop(oldest);
                true
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
        let left = keys.iter().position(|(known, _)| *known == id).map(|place| keys.remove(place));
        drop(keys);
        drop(left);
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(KeyId, KeyConnectionGuard)>> {
        self.keys.lock()
    }
}
