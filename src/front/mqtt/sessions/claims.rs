//! Claims: in a cluster a client may come to any node, whatever node it was at before. The node that
//! it comes to claims it: it asks the others, and whoever has the client, connected or away, lets go
//! of it and hands over its session. What nobody has is in the [bucket](Lookup), if anywhere: its
//! node is gone, or could not be reached.
//!
//! Of two nodes that claim a client at the same moment the later one gets it. A node that has heard of a
//! claim makes only later ones, whatever its clock says, so that a client that comes again after an
//! answer is never the earlier one.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use headgate_bridge_nats::presence::{Presence, Reply};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{debug, warn};

use super::super::session::{HandedOver, Session};
use super::{Away, ClientKey, Connected, Held, NotEntered, Present, Sessions, group_of};
use crate::auth::connections::{Close, Control};
use crate::consume::subscriber::sessions::Change;
use crate::consume::subscriber::sessions::bucket::{Found, Lookup, Lost};
use crate::message::{DatasourceId, now_micros};

/// What nodes are asked on.
const SUBJECT: &str = "headgate.claim";
/// How long a node may take to let go of a client. After that the bucket decides.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long an answer is kept at least, for a question that is asked again.
const ANSWERED_FOR: Duration = Duration::from_secs(5);

/// The order of claims.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct When {
    time: i64,
    node: String,
}

/// What the other nodes are asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Claim {
    at: When,
    datasource: String,
    client_id: String,
    /// What there is of the session is to end.
    clean: bool,
}

/// What a node answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It does not have the client, or not any more.
    Nothing,
    /// It has the client, or is about to get it, by a later claim.
    Later,
    /// This is the client's session, which it does not have any more.
    Session(Box<HandedOver>),
}

/// An answer, as soon as it is there.
type Answering = Arc<OnceCell<Bytes>>;

/// What was answered lately: a question may be asked again, and its session is gone by then.
struct Answered {
    /// Since when the newer ones come.
    since: Instant,
    newer: HashMap<Claim, Answering>,
    older: HashMap<Claim, Answering>,
}

impl Answered {
    /// What this question is answered with, if somebody has begun to answer it: otherwise by whoever asks.
    fn answering(&mut self, claim: Claim) -> Answering {
        if self.since.elapsed() >= ANSWERED_FOR {
            self.older = std::mem::take(&mut self.newer);
            self.since = Instant::now();
        }
        let before = self.older.get(&claim).cloned();
        self.newer.entry(claim).or_insert_with(|| before.unwrap_or_default()).clone()
    }
}

/// What a node needs to share its clients with others.
pub struct Claims {
    presence: Arc<Presence>,
    lookup: Lookup,
    lost: Mutex<Option<UnboundedReceiver<Lost>>>,
    /// The time of the latest claim that was made or heard of.
    latest: AtomicI64,
    answered: Mutex<Answered>,
}

impl Claims {
    /// Shares them with those that `presence` knows. `lookup` is where the sessions are that nobody has, and
    /// over `lost` comes what others have taken without asking.
    pub fn new(presence: Arc<Presence>, lookup: Lookup, lost: UnboundedReceiver<Lost>) -> Self {
        let answered = Answered { since: Instant::now(), newer: HashMap::new(), older: HashMap::new() };
        Self {
            presence,
            lookup,
            lost: Mutex::new(Some(lost)),
            latest: AtomicI64::new(0),
            answered: Mutex::new(answered),
        }
    }

    /// A claim that is later than all that were heard of.
    pub(super) fn next(&self) -> When {
        let now = now_micros();
        let later = |latest: i64| now.max(latest + 1);
        let before = self.latest.fetch_update(Ordering::AcqRel, Ordering::Acquire, |l| Some(later(l)));
        let time = later(before.unwrap_or_else(|latest| latest));
        When { time, node: self.presence.id().to_owned() }
    }
}

/// What a claim has brought.
pub(super) struct Claimed {
    /// The client's session.
    pub(super) session: Option<Session>,
    /// What the bucket has of it, to be written over.
    pub(super) found: Found,
}

impl Sessions {
    /// Answers the claims of other nodes from now on, and gives up what they have taken otherwise. Returns
    /// when nothing more can be taken: never, mostly.
    pub(super) async fn share(self: &Arc<Self>, claims: &Claims) {
        let this = Arc::downgrade(self);
        let served = claims.presence.serve(SUBJECT, move |question| {
            let this = this.upgrade();
            async move {
                match this {
                    Some(sessions) => sessions.answer(&question).await,
                    None => encode(&Answer::Nothing),
                }
            }
        });
        if let Err(error) = served.await {
            warn!(%error, "other nodes cannot ask for clients that are connected here");
        }
        let lost = claims.lost.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut lost) = lost else { return };
        while let Some(lost) = lost.recv().await {
            self.lose(lost);
        }
    }

    /// Gets a client that is not here from wherever it is.
    ///
    /// # Errors
    /// [`NotEntered`].
    pub(super) async fn claim(
        &self,
        claims: &Claims,
        present: &Present,
        at: When,
        clean: bool,
    ) -> Result<Claimed, NotEntered> {
        tokio::select! {
            biased;
            // Not to be waited for: who claims it later waits for this one to leave.
            why = poll_fn(|cx| present.control.poll_closed(cx)) => Err(NotEntered::Closed(why)),
            claimed = self.claim_for_long(claims, &present.key, at, clean) => claimed,
        }
    }

    async fn claim_for_long(
        &self,
        claims: &Claims,
        key: &ClientKey,
        at: When,
        clean: bool,
    ) -> Result<Claimed, NotEntered> {
        let (datasource, client_id) = (key.0.as_str().to_owned(), key.1.as_ref().to_owned());
        let question = encode(&Claim { at, datasource, client_id, clean });
        // What was written here of an earlier session has to be in the bucket before that is read.
        let written = self.subscribers.store.write(Vec::new());
        let asked = claims.presence.ask_all(SUBJECT, question, ANSWER_WAIT_MAX);
        let (written, answers) = tokio::join!(written, asked);
        written.map_err(unavailable)?;
        let mut handed = Vec::new();
        for (node, reply) in answers {
            match reply {
                Reply::Answer(answer) => match decode(&answer) {
                    Some(Answer::Later) => return Err(NotEntered::Closed(Close::TakenOver)),
                    Some(Answer::Session(session)) => handed.push(*session),
                    Some(Answer::Nothing) => {}
                    None => warn!(node, "a node has answered in words that are not known here"),
                },
                // What it had, or has, is in the bucket, a second old at most.
                Reply::Gone | Reply::Silent => debug!(node, "a node has not answered for a client"),
            }
        }
        let found = claims.lookup.find(&key.0, &key.1).await.map_err(unavailable)?;
        let kept = found.session.clone().filter(|session| !clean && !session.has_expired(now_micros()));
        if let Some(over) = found.session.as_ref().filter(|_| kept.is_none()) {
            // Its node is gone, else that would have ended it.
            for group in over.subscriptions.iter().filter_map(|s| group_of(&key.0, &s.filter)) {
                self.subscribers.groups.leave(&group, over.uid, true);
            }
        }
        // Who had it last has written it before it answered, and knows more than it has written.
        let session = kept.map(|kept| match handed.into_iter().find(|handed| handed.is(&kept)) {
            Some(handed) => Session::from_handed(handed),
            None => Session::from_stored(kept),
        });
        if let Some(session) = &session {
            let log = &self.subscribers.log;
            // Which of its QoS 2 messages are released is known before the first of them comes again, and what
            // was given out elsewhere is here too: the session goes on behind it.
            let (released, caught_up) = tokio::join!(log.sync(), log.catch_up(session.reaches()));
            released.and(caught_up).map_err(unavailable)?;
        }
        Ok(Claimed { session, found })
    }

    async fn answer(self: &Arc<Self>, question: &[u8]) -> Bytes {
        let (Some(claims), Some(claim)) = (&self.claims, decode::<Claim>(question)) else {
            return encode(&Answer::Nothing);
        };
        claims.latest.fetch_max(claim.at.time, Ordering::AcqRel);
        let answering =
            claims.answered.lock().unwrap_or_else(PoisonError::into_inner).answering(claim.clone());
        answering.get_or_init(|| async { encode(&self.let_go(&claim).await) }).await.clone()
    }

    /// Lets another node have a client.
    async fn let_go(self: &Arc<Self>, claim: &Claim) -> Answer {
        let datasource = match claim.datasource.as_str() {
            "*" => Ok(DatasourceId::all()),
            id => DatasourceId::new(id),
        };
        let Ok(datasource) = datasource else { return Answer::Nothing };
        let key: ClientKey = (datasource, claim.client_id.as_str().into());
        let (away, place) = loop {
            let left = {
                let mut clients = self.locked();
                let Some(entry) = clients.entries.get_mut(&key) else { return Answer::Nothing };
                match &entry.connected {
                    Some(connected) => {
                        if connected
                            .shared
                            .as_ref()
                            .and_then(|held| held.claim.as_ref())
                            .is_some_and(|own| *own > claim.at)
                        {
                            return Answer::Later;
                        }
                        connected.control.close(Close::TakenOver);
                        connected.left.clone().notified_owned()
                    }
                    None => {
                        // Whoever comes now waits as for a connection, until what there is of the session has
                        // been written.
                        let (control, left) = (Arc::<Control>::default(), Arc::default());
                        let held = Held { claim: Some(claim.at.clone()), ..Held::default() };
                        let away = entry.away.take();
                        let shared = Some(Box::new(held));
                        entry.connected = Some(Connected { control: control.clone(), left, shared });
                        break (away, Present { sessions: self.clone(), key, control });
                    }
                }
            };
            left.await;
        };
        let Some(away) = away else { return Answer::Nothing };
        let Away { session, will, .. } = *away;
        let key = &place.key;
        if claim.clean {
            self.end(key, &session);
            if let Some((will, _)) = will {
                self.publish(will);
            }
        }
        let store = &self.subscribers.store;
        // Whatever becomes of the answer, the bucket has the session as it is now. If that cannot be written, the
        // other node cannot read it.
        let _ = store.write(Vec::new()).await;
        if claim.clean {
            return Answer::Nothing;
        }
        let _ = store.write(vec![Change::GivenUp(session.uid)]).await;
        Answer::Session(Box::new(session.into_handed(&key.0, &key.1)))
    }

    /// Another node has a client of this one.
    fn lose(&self, lost: Lost) {
        let key: ClientKey = (lost.datasource, lost.client_id.into());
        let mut clients = self.locked();
        let Some(entry) = clients.entries.get_mut(&key) else { return };
        entry.away.take_if(|away| away.session.uid == lost.uid);
        match &mut entry.connected {
            Some(Connected { control, shared: Some(held), .. }) if held.uid == lost.uid => {
                held.lost = true;
                control.close(Close::TakenOver);
            }
            Some(_) => {}
            None if entry.away.is_none() => {
                clients.entries.remove(&key);
            }
            None => {}
        }
    }
}

fn unavailable(why: impl std::fmt::Display) -> NotEntered {
    NotEntered::Unavailable(why.to_string())
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_allocvec(value).expect("plain values, into memory").into()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}
