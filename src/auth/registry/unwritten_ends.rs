//! The queue of ends of keys that are in force and not yet durable: [`key_ends`](super::key_ends) fills and writes it.

use std::collections::VecDeque;

use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::Notify;

use super::error::RegistryError;
use super::key_ends::KeyEnd;
use crate::limits::KEY_ENDS_PER_CHANGE;
use crate::message::{DatasourceId, TimeMicros};

/// The key ids that a warning names.
pub(super) const WARNED_KEYS_MAX: usize = 8;

/// The ends that are in force in memory and not yet durable, oldest first.
#[derive(Default)]
pub(super) struct UnwrittenEnds {
    pub(super) queue: Mutex<UnwrittenQueue>,
    /// Notified when a write has failed.
    pub(super) failed: Notify,
}

#[derive(Default)]
pub(super) struct UnwrittenQueue {
    pub(super) ends: VecDeque<KeyEnd>,
    /// Why the last attempt failed.
    pub(super) error: Option<String>,
}

impl UnwrittenEnds {
    pub(super) fn extend(&self, ends: Vec<KeyEnd>) {
        self.queue.lock().ends.extend(ends);
    }

    pub(super) fn count(&self) -> usize {
        self.queue.lock().ends.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.lock().ends.is_empty()
    }

    /// The oldest ends, as many as one change may have.
    pub(super) fn oldest(&self) -> Vec<KeyEnd> {
        let queue = self.queue.lock();
        let mut keys = 0;
        let fits = |end: &&KeyEnd| {
            let is_first = keys == 0;
            keys += end.keys.len().max(1);
            is_first || keys <= KEY_ENDS_PER_CHANGE
        };
        queue.ends.iter().take_while(fits).cloned().collect()
    }

    /// Removes the oldest ends, which are durable now.
    pub(super) fn remove_oldest(&self, count: usize) {
        let mut queue = self.queue.lock();
        queue.ends.drain(..count);
        if queue.ends.is_empty() && queue.error.take().is_some() {
            tracing::info!("the ends of all keys are durable now");
        }
    }

    /// Notes why the ends could not be written. Logged once, until all are durable.
    pub(super) fn set_error(&self, error: &RegistryError) {
        let mut queue = self.queue.lock();
        if queue.ends.is_empty() {
            // Another call has written them meanwhile.
            return;
        }
        if queue.error.replace(error.to_string()).is_none() {
            let keys: Vec<_> = queue.ends.iter().flat_map(|end| end.keys.iter().map(|key| key.id)).collect();
            let first = &keys[..keys.len().min(WARNED_KEYS_MAX)];
            tracing::error!(
                %error, keys = keys.len(), ?first,
                "keys have ended in memory only: their end cannot be written, which is tried again"
            );
        }
        // An end that cannot be published because of the details in its audit entry goes without them.
        if matches!(error, RegistryError::TooLarge(_)) {
            queue.ends.iter_mut().for_each(|end| end.what = json!({}));
        }
        self.failed.notify_one();
    }

    /// Whether the deletion of a datasource is not yet durable.
    pub(super) fn has_deletion(&self, id: &DatasourceId, created_at: TimeMicros) -> bool {
        let deleted = |end: &KeyEnd| end.deleted.as_ref().is_some_and(|of| of.created_at == created_at);
        self.queue.lock().ends.iter().any(|end| end.deletes(id) && deleted(end))
    }
}
