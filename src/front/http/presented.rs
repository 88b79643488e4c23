//! The keys that an HTTP connection has presented: it is counted among the live connections of each, and
//! ends when one of them dies: an idle connection at once, a busy one after its answer.
//!
//! A connection may carry the requests of many clients, if a proxy stands in between; they connect
//! again, as HTTP clients do whenever a server closes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::auth::Key;
use crate::auth::connections::{Control, Entered};
use crate::limits::HTTP_KEYS_PER_CONNECTION_MAX;
use crate::message::KeyId;

/// One connection's.
#[derive(Debug, Default)]
pub(super) struct Presented {
    /// The connection's ear.
    control: Arc<Control>,
    /// The newest last.
    keys: Mutex<Vec<(KeyId, Entered)>>,
}

impl Presented {
    /// Where the connection is told to close.
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// A request has presented this key. If it is dead by now, the connection is told so. Returns whether
    /// it is the connection's first request with it.
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

    /// The connection no longer counts for this key: the request that ends the key waits for the others of
    /// its connections, and one too many is refused.
    pub(super) fn leave(&self, id: KeyId) {
        let mut keys = self.keys();
        let left = keys.iter().position(|(known, _)| *known == id).map(|place| keys.remove(place));
        drop(keys);
        drop(left);
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(KeyId, Entered)>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
