//! Groups: subscribers that share one subscription (`$share/{group}/{filter}`), so that each record
//! goes to one of them. The place in the log that they share is kept [by the gateway](local), or in a
//! cluster [by JetStream](cluster).

mod cluster;
mod local;

pub use cluster::Groups as ClusterGroups;

use std::sync::Arc;
use std::task::{Context, Poll};

use headgate_bridge_nats::CellError;

use super::router::Router;
use crate::log::{Batch, Log, Place, ReadError, ShareError};
use crate::message::{DatasourceId, Offset};

/// Which group: the datasource of its members' keys, its name, its filter.
pub type GroupKey = (DatasourceId, Box<str>, Box<str>);

/// A session, as far as its groups have to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSession {
    /// No other session has or had the same.
    pub uid: u64,
    /// How many seconds it outlives its connection; 0: it ends with it, `u32::MAX`: it stays for ever.
    pub expiry_s: u32,
}

impl GroupSession {
    /// Whether it outlives its connection.
    fn stays(self) -> bool {
        self.expiry_s > 0
    }
}

/// What a member is given.
pub enum Share {
    /// Records of one batch.
    Records(Batch, Vec<Place>),
    /// Retention has removed so many records before the group read them.
    Skipped(u64),
}

/// Why a session is not one of a group's.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// It is to begin somewhere, and the group is elsewhere already.
    #[error(
        "the group is there already, and goes on where it is: only its first member can begin in the past"
    )]
    Elsewhere,
    /// Its place cannot be reached now.
    #[error("the group cannot be joined now: {0}")]
    Unavailable(#[from] ShareError),
    /// That it stays cannot be written now.
    #[error("the group cannot be joined now: {0}")]
    Unwritten(#[from] CellError),
}

/// The groups that there are.
pub enum Groups {
    /// Of this gateway alone.
    Local(local::Groups),
    /// Of all gateways of a cluster.
    Cluster(Box<cluster::Groups>),
}

impl Groups {
    /// None, yet, of this gateway alone.
    pub fn local(router: Router, log: Arc<dyn Log>) -> Self {
        Self::Local(local::Groups::new(router, log))
    }

    /// Says that a session has the group's subscription. The first one makes the group: at `from`, or at the end
    /// of the log. Returns where the group is, if that is to be kept here.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join(
        &self,
        key: &GroupKey,
        of: GroupSession,
        from: Option<Offset>,
    ) -> Result<Option<Offset>, JoinError> {
        match self {
            Self::Local(groups) => groups.join(key, of.uid, from).map(Some).ok_or(JoinError::Elsewhere),
            Self::Cluster(groups) => groups.join(key, of, from).await.map(|()| None),
        }
    }

    /// As [`Groups::join`], of a session that was kept, with where its group was kept to be.
    pub fn join_again(&self, key: &GroupKey, uid: u64, cursor: Option<Offset>) {
        if let Self::Local(groups) = self {
            // The first of its sessions puts the group where it was; the others find it there.
            let _ = groups.join(key, uid, cursor).or_else(|| groups.join(key, uid, None));
        }
    }

    /// Says that the session `uid`, which ever was to outlive its connection or never, no longer has it. Returns
    /// whether the group is gone with it, and is not to be kept any more.
    pub fn leave(&self, key: &GroupKey, uid: u64, ever_stayed: bool) -> bool {
        match self {
            Self::Local(groups) => groups.leave(key, uid),
            Self::Cluster(groups) => {
                groups.leave(key, uid, ever_stayed);
                false
            }
        }
    }

    /// Says that a session which has joined a group outlives its connection by more than it said then.
    pub fn stay(&self, key: &GroupKey, of: GroupSession) {
        if let Self::Cluster(groups) = self {
            groups.stay(key, of);
        }
    }

    /// A connected member of a group that its session has joined.
    pub fn member(&self, key: &GroupKey, of: GroupSession) -> Option<Member> {
        match self {
            Self::Local(groups) => groups.member(key).map(Member::Local),
            Self::Cluster(groups) => groups.member(key, of).map(Member::Cluster),
        }
    }

    /// Returns when what members had that are gone can be given to others: to be called after the last one.
    pub async fn close(&self) {
        if let Self::Cluster(groups) = self {
            groups.close().await;
        }
    }

    /// Per group that is kept here the first record that is not dealt with. `routed` is how far the router was
    /// before.
    pub fn cursors(&self, routed: Offset) -> Vec<(GroupKey, Offset)> {
        match self {
            Self::Local(groups) => groups.cursors(routed),
            Self::Cluster(_) => Vec::new(),
        }
    }
}

/// A connected member. Leaves when it is dropped.
pub enum Member {
    /// Of a group of this gateway.
    Local(local::Member),
    /// Of a group of a cluster.
    Cluster(cluster::Member),
}

impl Member {
    /// Up to `max` of the records that come next. They are this member's until it has
    /// [acknowledged](Member::acknowledge) each.
    ///
    /// # Errors
    /// [`ReadError`], as [`Feed::poll_next`](super::Feed::poll_next).
    pub fn poll_take(&mut self, max: usize, cx: &mut Context<'_>) -> Poll<Result<Share, ReadError>> {
        match self {
            Self::Local(member) => member.poll_take(max, cx),
            Self::Cluster(member) => member.poll_take(max, cx).map(Ok),
        }
    }

    /// This one has no room now: whoever else waits may take its turn.
    pub fn pass(&self) {
        if let Self::Local(member) = self {
            member.pass();
        }
    }

    /// A record that was taken is dealt with.
    pub fn acknowledge(&self, offset: Offset) {
        match self {
            Self::Local(member) => member.acknowledge(offset),
            Self::Cluster(member) => member.acknowledge(offset),
        }
    }
}
