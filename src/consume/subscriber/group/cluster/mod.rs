//! Groups of a cluster, whose members may be on any gateway: JetStream keeps the group's place in the log
//! and gives each record to one member.
//!
//! A member asks for as many records as it has room for. When its connection ends, it hands back the
//! records that it has not dealt with. Records of a killed gateway go to others after some seconds.
//!
//! A group ends when its last session unsubscribes or ends. Sessions that outlive their connections are on
//! a roll in the bucket of sessions; each gateway knows its other sessions. JetStream also knows how long
//! the sessions stay, to end groups of sessions that never return.
//!
//! Each gateway counts the groups that sessions on it are in, connected or away, for their datasource: a further one is
//! refused there, whichever gateways have the others.
//!
//! The place is a durable pull consumer (`log/jetstream/share.rs`). When retention removes records that no
//! member took, it notes their number with the consumer, and one member tells its client.

mod counted;
mod member;

pub use counted::GroupCount;
pub(super) use member::ClusterShareMember;

use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::presence::NodeReply;
use headgate_bridge_nats::{KvError, NatsError, Presence};
use tokio::time::sleep;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use self::counted::CountedGroups;
use super::super::sessions::bucket::GroupRolls;
use super::{GroupJoinError, GroupSession, ShareGroupKey};
use crate::filter::TopicFilter;
use crate::log::{ShareError, SharedPlace, SharedPlaces};
use crate::message::{Offset, RecordRef};
use crate::shares::TenantShares;
use crate::subject::SubjectSpace;

/// How much longer than its sessions a group stays while nobody takes from it. Connected members that take
/// nothing for this long count as gone.
const GROUP_IDLE_EXTRA: Duration = Duration::from_secs(24 * 3_600);
/// How long after a member has left the gateway checks whether the group is over.
const GROUP_OVER_CHECK_DELAY: Duration = Duration::from_millis(600);
/// How often a connected session's entry in the roll is renewed.
const ROLL_REFRESH_INTERVAL: Duration = Duration::from_secs(12 * 3_600);
/// The question to other gateways, sent with a group's name: has the group members there?
const GROUP_MEMBERS_QUESTION: &str = "headgate.groups";
const ANSWER_NO_MEMBERS: &[u8] = b"none";
const ANSWER_HAS_MEMBERS: &[u8] = b"some";
/// How long other gateways may take to answer.
const GROUP_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);

/// The groups of the cluster, as this gateway sees them.
pub struct ClusterShareGroups {
    places: SharedPlaces,
    rolls: GroupRolls,
    presence: Arc<Presence>,
    here: Arc<LocalMemberCounts>,
    counted: CountedGroups,
    tasks: TaskTracker,
}

/// How many members each group has on this gateway.
#[derive(Default)]
struct LocalMemberCounts(Mutex<HashMap<String, usize>>);

impl LocalMemberCounts {
    fn locked(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock()
    }

    fn has_members(&self, group: &str) -> bool {
        self.locked().contains_key(group)
    }

    fn leave(&self, group: &str) {
        let mut here = self.locked();
        if let Some(members) = here.get_mut(group) {
            *members -= 1;
            if *members == 0 {
                here.remove(group);
            }
        }
    }
}

/// A group and its place in the log.
#[derive(Clone)]
struct ClusterShareGroup {
    places: SharedPlaces,
    name: String,
    subjects: Vec<String>,
    /// Begins with the datasource as its first level if `of_all`.
    filter: TopicFilter,
    of_all: bool,
}

impl ClusterShareGroups {
    /// No groups yet. From now on other gateways can ask about groups on this one.
    ///
    /// # Errors
    /// [`NatsError`]: the connection was closed for good.
    pub async fn start(
        places: SharedPlaces,
        rolls: GroupRolls,
        presence: Arc<Presence>,
    ) -> Result<Self, NatsError> {
        let here = Arc::<LocalMemberCounts>::default();
        let here_too = here.clone();
        let answer = move |group: Bytes| {
            let has = std::str::from_utf8(&group).is_ok_and(|group| here_too.has_members(group));
            std::future::ready(Bytes::from_static(if has { ANSWER_HAS_MEMBERS } else { ANSWER_NO_MEMBERS }))
        };
        presence.serve(GROUP_MEMBERS_QUESTION, answer).await?;
        let (counted, tasks) = (CountedGroups::default(), TaskTracker::new());
        Ok(Self { places, rolls, presence, here, counted, tasks })
    }

    /// Counts the groups from now on in these shares.
    pub fn count_in(&self, shares: Arc<TenantShares>) {
        self.counted.count_in(shares);
    }

    /// Returns once the records that departed members held are on their way to others.
    pub(super) async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.places.flush().await;
    }

    pub(super) async fn join(
        &self,
        key: &ShareGroupKey,
        of: GroupSession,
        from: Option<Offset>,
    ) -> Result<(), GroupJoinError> {
        let Some(group) = self.group(key) else { return Ok(()) };
        // Until it is a member, which counts it from then on.
        let _counted = self.counted.try_count(&key.0, &group.name).map_err(GroupJoinError::TooMany)?;
        let begin = from.unwrap_or_else(|| self.places.next_offset());
        let place = group.open(begin, group_lifetime(of)).await?;
        if from.is_some() && !place.is_new {
            return Err(GroupJoinError::Elsewhere);
        }
        if of.outlives_connection() {
            self.rolls.enter(&group.name, of.uid).await?;
        }
        Ok(())
    }

    pub(super) fn extend_stay(&self, key: &ShareGroupKey, of: GroupSession) {
        let Some(group) = self.group(key) else { return };
        self.tasks.spawn(async move {
            if let Err(error) = group.open(group.places.next_offset(), group_lifetime(of)).await {
                warn!(%error, "a group of subscribers may be over before its last session is");
            }
        });
    }

    pub(super) fn leave(&self, key: &ShareGroupKey, uid: u64, ever_stayed: bool) {
        let Some(ClusterShareGroup { places, name, .. }) = self.group(key) else { return };
        let (presence, here, rolls) = (self.presence.clone(), self.here.clone(), self.rolls.clone());
        let struck = ever_stayed.then(|| rolls.strike(&name, uid));
        tokio::spawn(async move {
            let over = async {
                if let Some(struck) = struck {
                    struck.await?;
                }
                sleep(GROUP_OVER_CHECK_DELAY).await;
                if here.has_members(&name) {
                    return Ok::<_, KvError>(false);
                }
                let answers = presence
                    .ask_all(GROUP_MEMBERS_QUESTION, Bytes::from(name.clone()), GROUP_ANSWER_WAIT_MAX)
                    .await;
                let is_none = |reply: &NodeReply| match reply {
                    NodeReply::Answer(answer) => answer == ANSWER_NO_MEMBERS,
                    NodeReply::Gone => true,
                    NodeReply::Silent => false,
                };
                Ok(answers.iter().all(|(_, reply)| is_none(reply)) && rolls.is_empty(&name).await?)
            };
            match over.await {
                Ok(false) => {}
                // If this fails, JetStream ends the group by itself later.
                Ok(true) => _ = places.give_up(&name).await,
                Err(error) => debug!(%error, "whether a group of subscribers is over cannot be known now"),
            }
        });
    }

    pub(super) fn member(&self, key: &ShareGroupKey, of: GroupSession) -> Option<ClusterShareMember> {
        let group = self.group(key)?;
        *self.here.locked().entry(group.name.clone()).or_default() += 1;
        let (here, name) = (self.here.clone(), group.name.clone());
        // Entered now, so that it is queued before anything said when the member leaves.
        let entered = of.outlives_connection().then(|| self.rolls.enter(&name, of.uid));
        let rolls = self.rolls.clone();
        let counted = self.counted.count(&key.0, &name);
        let (member, taker) = ClusterShareMember::new_with_task(group, group_lifetime(of), counted);
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = taker => {}
                () = stay_on_roll(rolls, &name, of, entered) => {}
            }
            here.leave(&name);
        });
        Some(member)
    }

    /// `None` for a filter that no record of a cluster can match.
    fn group(&self, key: &ShareGroupKey) -> Option<ClusterShareGroup> {
        let (scope, group, filter) = key;
        let (datasource, _) = &scope.of_scope();
        let of_all = datasource.is_all();
        let subjects = SubjectSpace::Stream.filter_wildcards((!of_all).then_some(datasource), filter);
        if subjects.is_empty() {
            return None;
        }
        let filter = TopicFilter::new(filter).ok()?;
        let mut name = String::from("share-");
        let mut hash = blake3::Hasher::new_derive_key("headgate 2026-11 name of a shared subscription");
        for part in [scope.as_str(), group, filter.as_str()] {
            hash.update(part.as_bytes()).update(&[0]);
        }
        name.push_str(&hash.finalize().to_hex()[..32]);
        Some(ClusterShareGroup { places: self.places.clone(), name, subjects, filter, of_all })
    }
}

/// How long a group is kept for a session. `None`: for ever.
fn group_lifetime(of: GroupSession) -> Option<Duration> {
    (of.expiry_s != u32::MAX).then(|| Duration::from_secs(of.expiry_s.into()) + GROUP_IDLE_EXTRA)
}

/// Renews a session's entry in the group's roll for as long as the session is connected. Never returns.
async fn stay_on_roll(
    rolls: GroupRolls,
    group: &str,
    of: GroupSession,
    entered: Option<impl Future<Output = Result<(), KvError>>>,
) {
    let Some(entered) = entered else { return std::future::pending().await };
    let mut result = entered.await;
    loop {
        sleep(if result.is_ok() { ROLL_REFRESH_INTERVAL } else { GROUP_OVER_CHECK_DELAY }).await;
        result = rolls.enter(group, of.uid).await;
    }
}

impl ClusterShareGroup {
    async fn open(&self, from: Offset, kept: Option<Duration>) -> Result<SharedPlace, ShareError> {
        self.places.open(&self.name, self.subjects.clone(), from, kept).await
    }

    /// Whether a record is one of the group's. Its subjects may match more records than its filter.
    fn matches(&self, record: &RecordRef<'_>) -> bool {
        match self.of_all {
            true => self.filter.matches(&format!("{}/{}", record.datasource, record.topic)),
            false => self.filter.matches(record.topic),
        }
    }
}
