//! Groups: subscribers that share one subscription (`$share/{group}/{filter}`), so that each record goes
//! to one of them. [The gateway](local) keeps the group's place in the log, or in a cluster
//! [JetStream](cluster) does.

mod cluster;
mod local;
mod member_turns;
mod prefetch_window;

pub use cluster::{ClusterShareGroups, GroupCount};
pub use local::batches_weight;

use std::sync::Arc;
use std::task::{Context, Poll};

use headgate_bridge_nats::KvError;

use super::router::Router;
use crate::log::{Batch, Log, LogReadError, RecordPlace, ShareError};
use crate::message::{DatasourceId, Offset};
use crate::shares::{ShareExceeded, TenantShares};

/// A group's identity: the scope of its members' keys (their datasource, in one incarnation), its name, its filter.
pub type ShareGroupKey = (DatasourceId, Box<str>, Box<str>);

/// What the groups of a session know about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSession {
    /// Unique among all sessions, past ones included.
    pub uid: u64,
    /// How many seconds it outlives its connection. 0: it ends with it; `u32::MAX`: it stays for ever.
    pub expiry_s: u32,
}

impl GroupSession {
    /// Whether the session outlives its connection.
    fn outlives_connection(self) -> bool {
        self.expiry_s > 0
    }
}

/// What a member is given.
pub enum ShareDelivery {
    /// Records, each with the batch that has it. At least one.
    Records(Vec<(Batch, RecordPlace)>),
    /// Retention has removed this many records before the group read them.
    Skipped(u64),
}

/// Why a session could not join a group.
#[derive(Debug, thiserror::Error)]
pub enum GroupJoinError {
    /// It asked for a start in the past, and the group has started already.
    #[error(
        "the group exists already and continues where it is: only its first member can begin in the past"
    )]
    Elsewhere,
    /// It would be one group too many of its datasource.
    #[error("the datasource has as many groups as it may have")]
    TooMany(ShareExceeded),
    /// The group's place in the log is not available now.
    #[error("the group cannot be joined now: {0}")]
    Unavailable(#[from] ShareError),
    /// The session cannot be entered in the group's roll now.
    #[error("the group cannot be joined now: {0}")]
    Unwritten(#[from] KvError),
}

/// All groups.
pub enum ShareGroups {
    /// On this gateway alone.
    Local(local::LocalShareGroups),
    /// On all gateways of a cluster.
    Cluster(Box<cluster::ClusterShareGroups>),
}

impl ShareGroups {
    /// No groups yet, on this gateway alone.
    pub fn local(router: Router, log: Arc<dyn Log>, shares: Arc<TenantShares>) -> Self {
        Self::Local(local::LocalShareGroups::new(router, log, shares))
    }

    /// Adds a session to a group. The first session creates the group, at `from` or at the end of the log.
    /// Returns the group's offset if this gateway has to keep it.
    ///
    /// # Errors
    /// [`GroupJoinError`].
    pub async fn join(
        &self,
        key: &ShareGroupKey,
        of: GroupSession,
        from: Option<Offset>,
    ) -> Result<Option<Offset>, GroupJoinError> {
        match self {
            Self::Local(groups) => groups.join(key, of.uid, from, true).map(Some),
            Self::Cluster(groups) => groups.join(key, of, from).await.map(|()| None),
        }
    }

    /// As [`ShareGroups::join`], for a stored session; `cursor` is the stored offset of its group.
    pub fn rejoin(&self, key: &ShareGroupKey, uid: u64, cursor: Option<Offset>) {
        if let Self::Local(groups) = self {
            // The first session of the group restores its offset; the others join it there.
            let _ = groups.join(key, uid, cursor, false).or_else(|_| groups.join(key, uid, None, false));
        }
    }

    /// Removes the session `uid` from a group. `ever_stayed` says whether the session was ever to outlive its
    /// connection. Returns whether the group has ended and is no longer to be kept.
    pub fn leave(&self, key: &ShareGroupKey, uid: u64, ever_stayed: bool) -> bool {
        match self {
            Self::Local(groups) => groups.leave(key, uid),
            Self::Cluster(groups) => {
                groups.leave(key, uid, ever_stayed);
                false
            }
        }
    }

    /// Extends how long a session that has joined a group outlives its connection.
    pub fn extend_stay(&self, key: &ShareGroupKey, of: GroupSession) {
        if let Self::Cluster(groups) = self {
            groups.extend_stay(key, of);
        }
    }

    /// Connects a member to a group that its session has joined.
    pub fn member(&self, key: &ShareGroupKey, of: GroupSession) -> Option<ShareMember> {
        match self {
            Self::Local(groups) => groups.member(key).map(ShareMember::Local),
            Self::Cluster(groups) => groups.member(key, of).map(ShareMember::Cluster),
        }
    }

    /// Returns once records that departed members held can go to others. Call it after the last one has left.
    pub async fn close(&self) {
        if let Self::Cluster(groups) = self {
            groups.close().await;
        }
    }

    /// For each group that this gateway keeps, the first record that is not dealt with. `routed` is the
    /// router's offset from before this call.
    pub fn cursors(&self, routed: Offset) -> Vec<(ShareGroupKey, Offset)> {
        match self {
            Self::Local(groups) => groups.cursors(routed),
            Self::Cluster(_) => Vec::new(),
        }
    }
}

/// A connected member. Leaves when it is dropped.
pub enum ShareMember {
    /// Of a group of this gateway.
    Local(local::LocalShareMember),
    /// Of a group of a cluster.
    Cluster(cluster::ClusterShareMember),
}

impl ShareMember {
    /// Takes up to `max` of the next records. Each is this member's until it has
    /// [acknowledged](ShareMember::acknowledge) it.
    ///
    /// # Errors
    /// [`LogReadError`], as [`SubscriberFeed::poll_next`](super::SubscriberFeed::poll_next).
    pub fn poll_take(
        &mut self,
        max: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ShareDelivery, LogReadError>> {
        match self {
            Self::Local(member) => member.poll_take(max, cx),
            Self::Cluster(member) => member.poll_take(max, cx).map(Ok),
        }
    }

    /// The group's place in the count of its datasource's groups, which a session that is away has to keep. `None` if the
    /// group itself has it.
    pub fn counted(&self) -> Option<&GroupCount> {
        match self {
            Self::Local(_) => None,
            Self::Cluster(member) => Some(member.counted()),
        }
    }

    /// Passes the turn on: this member has no room now.
    pub fn pass_turn(&self) {
        if let Self::Local(member) = self {
            member.pass_turn();
        }
    }

    /// Whether its group takes back records that it gave, as [`ShareMember::give_back`] does. In a cluster they
    /// are few and the member's.
    pub fn takes_back(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Whether other members wait for records that this one could [give back](ShareMember::give_back).
    pub fn keeps_others_waiting(&self) -> bool {
        matches!(self, Self::Local(member) if member.keeps_others_waiting())
    }

    /// Gives records back that were taken and not sent, for any member to take.
    pub fn give_back(&self, records: impl Iterator<Item = (Batch, RecordPlace)>) {
        if let Self::Local(member) = self {
            member.give_back(records);
        }
    }

    /// Marks a record that was taken as this session's for good: no other member gets it. It counts as one that the
    /// member has until the client has it.
    pub fn keep(&mut self, offset: Offset) {
        match self {
            Self::Local(member) => member.keep(offset),
            Self::Cluster(member) => member.keep(offset),
        }
    }

    /// Marks a record that was [kept](ShareMember::keep) as dealt with, if it is one of this group.
    pub fn acknowledge_kept(&mut self, offset: Offset) {
        match self {
            Self::Local(member) => member.acknowledge_kept(offset),
            Self::Cluster(member) => member.acknowledge_kept(offset),
        }
    }

    /// Marks a record that was taken as dealt with.
    pub fn acknowledge(&mut self, offset: Offset) {
        match self {
            Self::Local(member) => member.acknowledge(offset),
            Self::Cluster(member) => member.acknowledge(offset),
        }
    }
}
