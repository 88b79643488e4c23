//! Subscribers: consumers of the live stream, each with its own cursor. They are served from the log, so
//! that one that was away, or is slow, misses nothing.
//!
//! The [`router`] matches new records against all filters at once; a [`feed`] is one subscriber's
//! place in the log, live or catching up, over MQTT or as a stream over HTTP; a [`group`] is a place that several share. [`retained`] has
//! the newest retained message of each topic. [`sessions`] keeps on the disk what outlives a connection.
//!
//! **Live and behind** meet without a lock. The router announces a batch before it routes it. A feed that
//! reaches the end of the log goes live, and then compares: if the router has announced more than the feed
//! has read, the feed goes back to reading.
//!
//! Nothing is taken from a feed without room for it at the client. So a slow client costs no memory: its
//! mailbox fills up, and it continues from the log.
//!
//! Cursors of sessions and groups are written every second. After a kill some records are sent again, and
//! none is skipped.

pub mod feed;
pub mod group;
pub mod mailbox;
pub mod retained;
pub mod router;
pub mod sessions;

mod filter_set;
mod matched;
mod output_cover;
mod replay;
mod session_ends;
mod trie;

#[cfg(test)]
mod tests;

pub use feed::{FeedItem, SubscriberFeed};
pub use group::{
    ClusterShareGroups, GroupCount, GroupJoinError, GroupSession, ShareDelivery, ShareGroupKey, ShareGroups,
    ShareMember, batches_weight,
};
pub use mailbox::{Mailbox, SubscriberProgress};
pub use matched::MatchedRecords;
pub use output_cover::OutputCover;
pub use replay::{ReplayError, ReplayStart};
pub use router::Router;
pub use session_ends::SessionEnds;

use std::sync::Arc;

use crate::log::Log;
use crate::shares::TenantShares;
use retained::RetainedStore;
use sessions::SessionStore;

/// What the fronts need to serve subscribers.
pub struct Subscribers {
    /// The log that subscribers read.
    pub log: Arc<dyn Log>,
    /// Routes new records to subscribers.
    pub router: Router,
    /// The groups of shared subscriptions.
    pub groups: ShareGroups,
    /// The sessions that outlive their connection.
    pub store: SessionStore,
    /// What has ended with its datasource.
    pub session_ends: SessionEnds,
    /// The newest retained message of each topic.
    pub retained: RetainedStore,
    /// What the subscribers of each datasource take.
    pub shares: Arc<TenantShares>,
}

impl Subscribers {
    /// Starts the router at the end of `log`. `groups` is given in a cluster only.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        log: Arc<dyn Log>,
        store: SessionStore,
        retained: RetainedStore,
        groups: Option<ClusterShareGroups>,
    ) -> std::io::Result<Self> {
        let router = Router::start(&log)?;
        let shares = Arc::new(TenantShares::default());
        let groups = match groups {
            Some(groups) => {
                groups.count_in(shares.clone());
                ShareGroups::Cluster(Box::new(groups))
            }
            None => ShareGroups::local(router.clone(), log.clone(), shares.clone()),
        };
        Ok(Self { log, router, groups, store, session_ends: SessionEnds::default(), retained, shares })
    }
}
