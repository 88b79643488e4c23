//! The sessions that have ended with their datasource: how far the rules about incarnations are applied to them, and
//! how many there were. Sessions are served by a front, which tells it here; who deletes a datasource asks here.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::message::DatasourceId;

/// What is known of sessions that have ended with their datasource.
#[derive(Debug, Default)]
pub struct SessionEnds {
    /// The version of the rules that the sessions follow.
    swept: watch::Sender<u64>,
    /// How many have ended since the start, by the scope of their incarnation.
    ended: Mutex<HashMap<DatasourceId, u64>>,
}

impl SessionEnds {
    /// Notes that a session of this scope has ended.
    pub fn note(&self, scope: &DatasourceId) {
        *self.ended.lock().entry(scope.clone()).or_default() += 1;
    }

    /// Notes that all sessions follow this version of the rules.
    pub fn set_swept(&self, version: u64) {
        self.swept.send_if_modified(|swept| std::mem::replace(swept, version.max(*swept)) < version);
    }

    /// The version of the rules that the sessions follow.
    pub fn swept(&self) -> u64 {
        *self.swept.borrow()
    }

    /// Returns once the sessions follow this version of the rules; never, if no front serves sessions.
    pub async fn wait_swept(&self, version: u64) {
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.swept.subscribe().wait_for(|swept| *swept >= version).await;
    }

    /// How many sessions of this scope have ended since the start. Forgets it.
    pub fn take_count(&self, scope: &DatasourceId) -> u64 {
        self.ended.lock().remove(scope).unwrap_or(0)
    }
}
