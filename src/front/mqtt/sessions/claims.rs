//! Claims: in a cluster a client may connect to any node, whichever node it used before. The node that
//! the client connects to claims it: it asks the other nodes, and the one that has the client, connected
//! or away, releases it and hands over its session. A session that no node has is in the
//! [bucket](SessionLookup), if it exists: its node is gone or could not be reached.
//!
//! If two nodes claim a client at the same moment, the later claim wins. A node that has heard of a claim
//! makes only later ones, whatever its clock says, so a client that connects again after an answer
//! always has the later claim.
//!
//! **What goes over.** The session comes with its messages in flight, so that the next connection is sent the
//! same messages with the same packet identifiers. Before the session continues, this node has followed the
//! log to the session's position, and knows every QoS 2 exchange that other nodes have released
//! ([`Log::sync`](crate::log::Log::sync)); so an exchange ends once, whichever node it ends on.
//!
//! **NATS away.** Nobody can say then whether a client has a session, so the client is told to come again
//! (0x88).

use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use headgate_bridge_nats::presence::{NodeReply, Presence};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{debug, warn};

use super::super::session::{MqttSession, SessionHandover};
use super::{
    AwayClient, ClientGuard, ClientKey, ClusterClientState, ConnectedClient, EnterError, Sessions,
    shared_group_key,
};
use crate::auth::connections::{CloseReason, ConnectionControl};
use crate::consume::subscriber::sessions::SessionStoreChange;
use crate::consume::subscriber::sessions::bucket::{FoundSession, LostSession, SessionLookup};
use crate::limits::MQTT_EXIT_WAIT_MAX;
use crate::message::{DatasourceId, now_micros};
use crate::time::cluster_micros;

/// The subject on which nodes receive claims.
const CLAIM_SUBJECT: &str = "headgate.claim";
/// How long a node may take to release a client, which takes in first what the client has sent. After that the bucket
/// decides.
const CLAIM_ANSWER_WAIT_MAX: Duration = Duration::from_secs(3);
const _: () = assert!(MQTT_EXIT_WAIT_MAX.as_millis() < CLAIM_ANSWER_WAIT_MAX.as_millis());
/// How long an answer is kept at least, in case the claim is sent again.
const CLAIM_ANSWER_KEPT_MIN: Duration = Duration::from_secs(5);

/// A claim's place in the order of all claims.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct ClaimStamp {
    time: i64,
    node: String,
}

/// The question to the other nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct ClientClaim {
    at: ClaimStamp,
    datasource: String,
    client_id: String,
    /// An existing session is to end.
    clean: bool,
}

/// A node's answer to a claim.
#[derive(Debug, Serialize, Deserialize)]
enum ClaimAnswer {
    /// The node does not have the client, or no longer.
    Nothing,
    /// The node has the client, or is about to get it, by a later claim.
    LaterClaim,
    /// The client's session, which the node has given up.
    Session(Box<SessionHandover>),
}

/// What the release of a client has come to.
enum ReleaseStep {
    /// The client is connected; its connection was told to close.
    Wait(OwnedNotified),
    Answer(ClaimAnswer),
    /// The client is not connected. Its place is taken under this control until the session is written.
    Left(Option<Box<AwayClient>>, Arc<ConnectionControl>),
}

/// An answer that may still be in the making.
type ClaimAnswerCell = Arc<OnceCell<Bytes>>;

/// The latest answers: a claim may be sent again after its session was handed over.
struct RecentClaimAnswers {
    /// When `newer` was begun.
    since: Instant,
    newer: HashMap<ClientClaim, ClaimAnswerCell>,
    older: HashMap<ClientClaim, ClaimAnswerCell>,
}

impl RecentClaimAnswers {
    /// The answer to a claim. The caller fills the cell if nobody has begun to.
    fn answer_cell(&mut self, claim: ClientClaim) -> ClaimAnswerCell {
        if self.since.elapsed() >= CLAIM_ANSWER_KEPT_MIN {
            self.older = std::mem::take(&mut self.newer);
            self.since = Instant::now();
        }
        let before = self.older.get(&claim).cloned();
        self.newer.entry(claim).or_insert_with(|| before.unwrap_or_default()).clone()
    }
}

/// What a node needs to share its clients with other nodes.
pub struct ClientClaims {
    presence: Arc<Presence>,
    lookup: SessionLookup,
    lost: Mutex<Option<UnboundedReceiver<LostSession>>>,
    /// The time of the latest claim that this node has made or heard of.
    latest: AtomicI64,
    answered: Mutex<RecentClaimAnswers>,
}

impl ClientClaims {
    /// Shares the clients with the nodes that `presence` knows. `lookup` finds the sessions that no node
    /// has. `lost` brings the sessions that other nodes have taken without asking.
    pub fn new(presence: Arc<Presence>, lookup: SessionLookup, lost: UnboundedReceiver<LostSession>) -> Self {
        let answered =
            RecentClaimAnswers { since: Instant::now(), newer: HashMap::new(), older: HashMap::new() };
        Self {
            presence,
            lookup,
            lost: Mutex::new(Some(lost)),
            latest: AtomicI64::new(0),
            answered: Mutex::new(answered),
        }
    }

    /// Finds what the cluster's bucket has.
    pub(super) fn lookup(&self) -> &SessionLookup {
        &self.lookup
    }

    /// The nodes that are there, this one included.
    pub(super) fn nodes(&self) -> Vec<String> {
        let mut nodes = self.presence.others();
        nodes.push(self.presence.id().to_owned());
        nodes
    }

    /// A stamp that is later than every claim heard of so far.
    pub(super) fn next_stamp(&self) -> ClaimStamp {
        let now = now_micros();
        let later = |latest: i64| now.max(latest + 1);
        let before = self.latest.fetch_update(Ordering::AcqRel, Ordering::Acquire, |l| Some(later(l)));
        let time = later(before.unwrap_or_else(|latest| latest));
        ClaimStamp { time, node: self.presence.id().to_owned() }
    }
}

/// The result of a claim.
pub(super) struct ClaimedSession {
    /// The client's session.
    pub(super) session: Option<MqttSession>,
    /// The client's cell in the bucket, to be overwritten.
    pub(super) found: FoundSession,
}

impl Sessions {
    /// Answers the claims of other nodes, and gives up sessions that they took without asking. Normally
    /// never returns.
    pub(super) async fn serve_claims(self: &Arc<Self>, claims: &ClientClaims) {
        let this = Arc::downgrade(self);
        let served = claims.presence.serve(CLAIM_SUBJECT, move |question| {
            let this = this.upgrade();
            async move {
                match this {
                    Some(sessions) => sessions.answer_claim(&question).await,
                    None => encode_claim(&ClaimAnswer::Nothing),
                }
            }
        });
        if let Err(error) = served.await {
            warn!(%error, "other nodes cannot claim clients of this node");
        }
        let lost = claims.lost.lock().take();
        let Some(mut lost) = lost else { return };
        while let Some(lost) = lost.recv().await {
            self.give_up_lost(lost);
        }
    }

    /// Gets a client's session from another node or from the bucket.
    ///
    /// # Errors
    /// [`EnterError`].
    pub(super) async fn claim(
        &self,
        claims: &ClientClaims,
        present: &ClientGuard,
        at: ClaimStamp,
        clean: bool,
    ) -> Result<ClaimedSession, EnterError> {
        tokio::select! {
            biased;
            // First, and at once: a later claim waits for this client to leave.
            why = poll_fn(|cx| present.control.poll_closed(cx)) => Err(EnterError::Closed(why)),
            claimed = self.claim_uninterrupted(claims, &present.key, at, clean) => claimed,
        }
    }

    async fn claim_uninterrupted(
        &self,
        claims: &ClientClaims,
        key: &ClientKey,
        at: ClaimStamp,
        clean: bool,
    ) -> Result<ClaimedSession, EnterError> {
        let (datasource, client_id) = (key.0.as_str().to_owned(), key.1.as_ref().to_owned());
        let question = encode_claim(&ClientClaim { at, datasource, client_id, clean });
        // Pending writes of an earlier session have to reach the bucket before it is read.
        let written = self.subscribers.store.write(Vec::new());
        let asked = claims.presence.ask_all(CLAIM_SUBJECT, question, CLAIM_ANSWER_WAIT_MAX);
        let (written, answers) = tokio::join!(written, asked);
        written.map_err(enter_unavailable)?;
        let mut handed = Vec::new();
        for (node, reply) in answers {
            match reply {
                NodeReply::Answer(answer) => match decode_claim(&answer) {
                    Some(ClaimAnswer::LaterClaim) => return Err(EnterError::Closed(CloseReason::TakenOver)),
                    Some(ClaimAnswer::Session(session)) => handed.push(*session),
                    Some(ClaimAnswer::Nothing) => {}
                    None => warn!(node, "a node sent an answer to a claim that cannot be decoded"),
                },
                // The bucket has that node's sessions, at most a second old.
                NodeReply::Gone | NodeReply::Silent => debug!(node, "a node has not answered a claim"),
            }
        }
        let found = claims.lookup.find(&key.0, &key.1).await.map_err(enter_unavailable)?;
        let kept = found.session.clone().filter(|session| !clean && !session.has_expired(cluster_micros()));
        if let Some(over) = found.session.as_ref().filter(|_| kept.is_none()) {
            // The session's node is gone; otherwise it would have ended the session itself.
            for group in over.subscriptions.iter().filter_map(|s| shared_group_key(&key.0, &s.filter)) {
                self.subscribers.groups.leave(&group, over.uid, true);
            }
        }
        // A node writes its session before it answers, and its answer holds more than the bucket.
        let session = kept.map(|kept| match handed.into_iter().find(|handed| handed.is_latest_of(&kept)) {
            Some(handed) => MqttSession::from_handover(handed),
            None => MqttSession::from_stored(kept),
        });
        if let Some(session) = &session {
            let log = &self.subscribers.log;
            // The session continues behind what another node has delivered, so this node's log has to reach
            // that far, and has to know the released QoS 2 messages before one is sent again.
            let (released, caught_up) = tokio::join!(log.sync(), log.catch_up(session.end_offset()));
            released.and(caught_up).map_err(enter_unavailable)?;
        }
        Ok(ClaimedSession { session, found })
    }

    async fn answer_claim(self: &Arc<Self>, question: &[u8]) -> Bytes {
        let (Some(claims), Some(claim)) = (&self.claims, decode_claim::<ClientClaim>(question)) else {
            return encode_claim(&ClaimAnswer::Nothing);
        };
        claims.latest.fetch_max(claim.at.time, Ordering::AcqRel);
        let answering = claims.answered.lock().answer_cell(claim.clone());
        answering.get_or_init(|| async { encode_claim(&self.release_client(&claim).await) }).await.clone()
    }

    /// Releases a client to the node that claims it.
    async fn release_client(self: &Arc<Self>, claim: &ClientClaim) -> ClaimAnswer {
        let Ok(datasource) = DatasourceId::parse_scope(&claim.datasource) else {
            return ClaimAnswer::Nothing;
        };
        let key: ClientKey = (datasource, claim.client_id.as_str().into());
        // The place is the client's until its session is written, however this ends.
        let (away, place) = loop {
            match self.try_release(&key, claim) {
                ReleaseStep::Wait(left) => left.await,
                ReleaseStep::Answer(answer) => return answer,
                ReleaseStep::Left(away, control) => {
                    break (away, ClientGuard { sessions: self.clone(), key, control });
                }
            }
        };
        let Some(away) = away else { return ClaimAnswer::Nothing };
        let AwayClient { session, will, .. } = *away;
        let key = &place.key;
        if claim.clean {
            self.end_session(key, &session);
            if let Some((will, _)) = will {
                self.spawn_will(will);
            }
        }
        let store = &self.subscribers.store;
        // If the answer is lost, the claiming node reads the session from the bucket. An error needs no
        // handling: a bucket that cannot be written cannot be read by the other node either.
        let _ = store.write(Vec::new()).await;
        if claim.clean {
            return ClaimAnswer::Nothing;
        }
        let _ = store.write(vec![SessionStoreChange::GiveUpSession(session.uid)]).await;
        ClaimAnswer::Session(Box::new(session.into_handover(&key.0, &key.1)))
    }

    /// Closes a client's connection for a claim, or takes its session if it has none.
    fn try_release(&self, key: &ClientKey, claim: &ClientClaim) -> ReleaseStep {
        let mut clients = self.lock_clients();
        let Some(entry) = clients.entries.get_mut(key) else {
            return ReleaseStep::Answer(ClaimAnswer::Nothing);
        };
        if let Some(connected) = &entry.connected {
            let own = connected.shared.as_ref().and_then(|held| held.claim.as_ref());
            if own.is_some_and(|own| *own > claim.at) {
                return ReleaseStep::Answer(ClaimAnswer::LaterClaim);
            }
            connected.control.close(CloseReason::TakenOver);
            return ReleaseStep::Wait(entry.moved());
        }
        // This entry makes a new connection wait, as for an earlier one, until the session has been written.
        let control = Arc::<ConnectionControl>::default();
        let held = ClusterClientState { claim: Some(claim.at.clone()), ..ClusterClientState::default() };
        let away = entry.away.take();
        let shared = Some(Box::new(held));
        entry.connected = Some(ConnectedClient { control: control.clone(), mailbox: None, shared });
        ReleaseStep::Left(away, control)
    }

    /// Gives up a session that another node has taken.
    fn give_up_lost(&self, lost: LostSession) {
        let key: ClientKey = (lost.datasource, lost.client_id.into());
        let mut clients = self.lock_clients();
        let Some(entry) = clients.entries.get_mut(&key) else { return };
        entry.away.take_if(|away| away.session.uid == lost.uid);
        match &mut entry.connected {
            Some(ConnectedClient { control, shared: Some(held), .. }) if held.uid == lost.uid => {
                held.lost = true;
                control.close(CloseReason::TakenOver);
            }
            Some(_) => {}
            None if entry.away.is_none() && entry.queue.is_none() => {
                clients.entries.remove(&key);
            }
            None => {}
        }
    }
}

fn enter_unavailable(why: impl std::fmt::Display) -> EnterError {
    EnterError::Unavailable(why.to_string())
}

fn encode_claim<T: Serialize>(value: &T) -> Bytes {
    postcard::to_allocvec(value).expect("plain values, into memory").into()
}

fn decode_claim<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}
