//! The wills of gateways that were killed: a gateway takes up those of its last run. In a cluster every gateway looks for them, and publishes them. Several may
//! do so at once; the log keeps each will once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::super::wills::MqttWill;
use super::Sessions;
use super::claims::ClientClaims;
use crate::consume::subscriber::sessions::{SessionStoreError, StoredWill};
use crate::message::TimeMicros;
use crate::time::cluster_micros;

/// How often the bucket is searched for wills of gateways that are gone.
const ORPHANED_WILLS_INTERVAL: Duration = Duration::from_secs(1);
/// For how long a gateway has to be gone: one that was heard of late has not been killed.
const ORPHANED_WILLS_WAIT_MIN: Duration = Duration::from_secs(3);

/// Since when a gateway is missing.
#[derive(Clone, Copy)]
struct MissingNode {
    since: Instant,
    /// The loss of its clients' connections.
    lost_at: TimeMicros,
}

impl Sessions {
    /// Takes up the wills of clients that were connected when the gateway was killed, or whose wills waited. Returns
    /// those that wait with a session for their delay, by its number, and publishes the others.
    pub(super) fn take_up_wills(&self, stored: Vec<Arc<StoredWill>>) -> HashMap<u64, Box<MqttWill>> {
        let mut waiting = HashMap::new();
        for content in stored {
            match MqttWill::from_stored(content.clone(), Some(&self.subscribers.store), &self.intake) {
                Err(denied) => debug!(datasource = %content.scope, %denied, "a stored will is dropped"),
                // Without a delay it was due when the connection was lost, whoever comes back.
                Ok(will) => match will.session().filter(|_| will.delay_s > 0) {
                    Some(session) => _ = waiting.insert(session, Box::new(will)),
                    None => self.spawn_will(Box::new(will)),
                },
            }
        }
        waiting
    }

    /// Publishes the wills of gateways that are gone, for as long as it is polled.
    pub(super) async fn inherit_wills(&self, claims: &ClientClaims) {
        let mut missing: HashMap<String, MissingNode> = HashMap::new();
        loop {
            tokio::time::sleep(ORPHANED_WILLS_INTERVAL).await;
            let Ok(nodes) = claims.lookup().nodes_with_wills().await else {
                // This gateway may be the one that is cut off.
                missing.clear();
                continue;
            };
            let there = claims.nodes();
            missing.retain(|node, _| nodes.contains(node));
            for node in nodes {
                if there.contains(&node) {
                    missing.remove(&node);
                    continue;
                }
                let now = MissingNode { since: Instant::now(), lost_at: cluster_micros() };
                let gone = *missing.entry(node.clone()).or_insert(now);
                if gone.since.elapsed() < ORPHANED_WILLS_WAIT_MIN {
                    continue;
                }
                if let Err(error) = self.inherit_wills_of(claims, &node, gone.lost_at).await {
                    debug!(node, %error, "the wills of a gateway that is gone cannot be read now");
                }
            }
        }
    }

    /// Publishes those of a gateway's wills that are due.
    async fn inherit_wills_of(
        &self,
        claims: &ClientClaims,
        node: &str,
        lost_at: TimeMicros,
    ) -> Result<(), SessionStoreError> {
        let (lookup, mut waiting, mut settled) = (claims.lookup(), 0_usize, 0_usize);
        for id in lookup.will_ids(node).await? {
            if let Some(will) = lookup.will(node, id).await? {
                let will = StoredWill { lost_at: will.lost_at.or(Some(lost_at)), ..will };
                if !self.settle_orphaned_will(claims, node, will).await? {
                    waiting += 1;
                    continue;
                }
            }
            lookup.remove_will(node, id).await?;
            settled += 1;
        }
        if settled > 0 {
            info!(node, wills = settled, "wills of clients of a gateway that is gone are settled");
        }
        if waiting == 0 {
            lookup.remove_wills_mark(node).await?;
        }
        Ok(())
    }

    /// Publishes a will if it is due, or drops it if its client is back. Returns whether that is done.
    async fn settle_orphaned_will(
        &self,
        claims: &ClientClaims,
        node: &str,
        will: StoredWill,
    ) -> Result<bool, SessionStoreError> {
        if let Some(uid) = will.session
            && will.delay_s > 0
        {
            let found = claims.lookup().find(&will.scope, &will.client_id).await?;
            // Another session of the client is the end of this one, and the will is due then.
            if let Some(session) = found.session.filter(|session| session.uid == uid) {
                if found.owner != node {
                    return Ok(true);
                }
                let now = cluster_micros();
                if will.due_at(session.expiry_s, now) > now {
                    return Ok(false);
                }
            }
        }
        match MqttWill::from_stored(Arc::new(will), None, &self.intake) {
            // Its copy stays in the bucket until it is published.
            Ok(will) => Ok(Box::new(will).publish(&self.intake).await.is_none()),
            Err(denied) => {
                debug!(%denied, "a will of a gateway that is gone is dropped");
                Ok(true)
            }
        }
    }
}
