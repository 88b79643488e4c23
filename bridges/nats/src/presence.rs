//! Presence: which nodes of a cluster are alive, and requests to all of them.
//!
//! Each node announces itself once a second on a subject of its own, and says goodbye when it leaves. A node
//! that is silent for [`PRESENCE_SILENCE_MAX`] is gone. A node that hears another for the first time
//! announces itself at once, so that a new node knows the others within a round trip.
//!
//! A node that has lost NATS neither hears the others nor is heard. Whatever it must not do without the
//! others has to depend on NATS itself.

use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};

use crate::connection::{Nats, NatsError};

/// How often a node announces itself.
pub(crate) const PRESENCE_BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A node that has been silent for this long is gone.
pub const PRESENCE_SILENCE_MAX: Duration = Duration::from_secs(3);
/// How long to wait for an answer before asking again: a question may be lost with a connection.
const NODE_ASK_TIMEOUT: Duration = Duration::from_millis(500);
/// The pause before asking a node again that does not subscribe yet.
const NODE_ASK_RETRY_PAUSE: Duration = Duration::from_millis(20);

const HERE_PAYLOAD: &[u8] = b"here";
const GOODBYE_PAYLOAD: &[u8] = b"goodbye";

/// The reply of one node to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeReply {
    /// The node answered.
    Answer(Bytes),
    /// No answer: the node has gone meanwhile.
    Gone,
    /// No answer, although the node is alive.
    Silent,
}

/// This node's membership among the others. A drop ends it without a goodbye; [`Presence::leave`] says one.
#[derive(Debug)]
pub struct Presence {
    nats: Nats,
    id: String,
    /// The prefix of the subjects on which nodes announce themselves.
    prefix: String,
    others: Arc<OtherNodes>,
    /// Since when it hears the others.
    started: Instant,
    /// Whether the others are told of it.
    is_announced: Arc<AtomicBool>,
    task: AbortHandle,
    served: Mutex<Vec<AbortHandle>>,
}

/// The other nodes that are alive, and when each was last heard.
#[derive(Debug, Default)]
struct OtherNodes {
    nodes: Mutex<HashMap<String, Instant>>,
    changed: Notify,
}

impl OtherNodes {
    fn nodes(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.nodes.lock()
    }

    /// When the node counts as gone unless it is heard again; `None` if it is gone already.
    fn gone_at(&self, id: &str) -> Option<Instant> {
        let heard = *self.nodes().get(id)?;
        Some(heard + PRESENCE_SILENCE_MAX).filter(|ends| *ends > Instant::now())
    }

    /// Waits until a node is gone.
    async fn wait_until_gone(&self, id: &str) {
        loop {
            let changed = self.changed.notified();
            match self.gone_at(id) {
                None => return,
                Some(ends) => tokio::select! {
                    () = sleep_until(ends) => {}
                    () = changed => {}
                },
            }
        }
    }
}

impl Presence {
    /// Hears the others, and tells them of this node once it is announced ([`Presence::announce`]), on `{prefix}.{id}`. The id has to be unique for each node and each start, and one
    /// token of a subject. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`NatsError::Client`] if the subject is invalid.
    pub async fn start(nats: &Nats, prefix: &str, id: &str) -> Result<Self, NatsError> {
        let failed = |error: async_nats::SubscribeError| NatsError::Client(error.to_string());
        let mut heard = nats.client().subscribe(format!("{prefix}.*")).await.map_err(failed)?;
        let others = Arc::<OtherNodes>::default();
        let own = format!("{prefix}.{id}");
        let (client, others_too, prefix_too) = (nats.client().clone(), others.clone(), prefix.to_owned());
        let mut connections = nats.connections();
        let is_announced = Arc::<AtomicBool>::default();
        let announced = is_announced.clone();
        let task = tokio::spawn(async move {
            let mut beat = interval(PRESENCE_BEAT_INTERVAL);
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let is_new = tokio::select! {
                    _ = beat.tick() => true,
                    // Announcements made while the connection was away are lost: announce again.
                    Ok(()) = connections.changed() => true,
                    message = heard.next() => match message {
                        Some(message) if *message.subject != *own => {
                            note_presence(&others_too, &prefix_too, &message)
                        }
                        Some(_) => false,
                        None => return,
                    },
                };
                let is_told = is_new && announced.load(Ordering::Acquire);
                if is_told && client.connection_state() == async_nats::connection::State::Connected {
                    // A failed announcement is repeated by the next beat.
                    let _ = client.publish(own.clone(), Bytes::from_static(HERE_PAYLOAD)).await;
                }
            }
        });
        Ok(Self {
            nats: nats.clone(),
            id: id.to_owned(),
            prefix: prefix.to_owned(),
            others,
            started: Instant::now(),
            is_announced,
            task: task.abort_handle(),
            served: Mutex::default(),
        })
    }

    /// Has the others know this node from now on: they wait for its answers. Call it when it can give them.
    pub async fn announce(&self) {
        self.is_announced.store(true, Ordering::Release);
        let (client, own) = (self.nats.client(), format!("{}.{}", self.prefix, self.id));
        // A failed announcement is repeated by the next beat.
        if client.publish(own, Bytes::from_static(HERE_PAYLOAD)).await.is_ok() {
            let _ = tokio::time::timeout(PRESENCE_BEAT_INTERVAL, client.flush()).await;
        }
        // Who does not know the others asks nobody. They answer at once, and have been heard once by then if they are late.
        let heard_by = self.started + PRESENCE_BEAT_INTERVAL + NODE_ASK_TIMEOUT;
        sleep_until(heard_by.min(Instant::now() + NODE_ASK_TIMEOUT)).await;
    }

    /// This node's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The other nodes that are alive.
    pub fn others(&self) -> Vec<String> {
        let nodes = self.others.nodes();
        let now = Instant::now();
        nodes
            .iter()
            .filter(|(_, heard)| **heard + PRESENCE_SILENCE_MAX > now)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Asks every other live node on `{subject}.{id}`. Waits for each until it answers, is gone, or `limit`
    /// is over. A question may arrive more than once, so its handling has to be idempotent.
    pub async fn ask_all(&self, subject: &str, body: Bytes, limit: Duration) -> Vec<(String, NodeReply)> {
        let until = Instant::now() + limit;
        let questions = self.others().into_iter().map(|id| {
            let body = body.clone();
            async move {
                let subject = format!("{subject}.{id}");
                let reply = tokio::select! {
                    answer = self.ask(&subject, &body, until) => answer.map_or(NodeReply::Silent, NodeReply::Answer),
                    () = self.others.wait_until_gone(&id) => NodeReply::Gone,
                };
                (id, reply)
            }
        });
        join_all(questions).await
    }

    /// Asks one node until it answers or the time is over.
    async fn ask(&self, subject: &str, body: &Bytes, until: Instant) -> Option<Bytes> {
        let client = self.nats.client();
        while Instant::now() < until {
            let again_at = until.min(Instant::now() + NODE_ASK_TIMEOUT);
            let asked = client.request(subject.to_owned(), body.clone());
            match timeout_at(again_at, asked).await {
                Ok(Ok(answer)) => return Some(answer.payload),
                Ok(Err(_)) => sleep(NODE_ASK_RETRY_PAUSE).await,
                Err(_) => {}
            }
        }
        None
    }

    /// Answers the questions of others on `subject` (see [`Presence::ask_all`]), each in a task of its own,
    /// until this node leaves.
    ///
    /// # Errors
    /// [`NatsError::Client`] if the subject is invalid.
    pub async fn serve<A>(
        &self,
        subject: &str,
        answer: impl Fn(Bytes) -> A + Send + 'static,
    ) -> Result<(), NatsError>
    where
        A: Future<Output = Bytes> + Send + 'static,
    {
        let failed = |error: async_nats::SubscribeError| NatsError::Client(error.to_string());
        let client = self.nats.client().clone();
        let mut questions = client.subscribe(format!("{subject}.{}", self.id)).await.map_err(failed)?;
        let task = tokio::spawn(async move {
            let mut answering = JoinSet::new();
            while let Some(question) = questions.next().await {
                while answering.try_join_next().is_some() {}
                let Some(reply) = question.reply else { continue };
                let (client, answer) = (client.clone(), answer(question.payload));
                answering.spawn(async move {
                    // If the answer is lost, the node asks again.
                    let _ = client.publish(reply, answer.await).await;
                });
            }
        });
        self.served.lock().push(task.abort_handle());
        Ok(())
    }

    /// Tells the others that this node leaves, so that they do not wait for it. If NATS is away, they count
    /// it as alive for up to [`PRESENCE_SILENCE_MAX`] longer.
    pub async fn leave(&self) {
        self.stop();
        let (client, own) = (self.nats.client(), format!("{}.{}", self.prefix, self.id));
        if client.publish(own, Bytes::from_static(GOODBYE_PAYLOAD)).await.is_ok() {
            let _ = tokio::time::timeout(PRESENCE_BEAT_INTERVAL, client.flush()).await;
        }
    }

    fn stop(&self) {
        self.task.abort();
        for served in self.served.lock().drain(..) {
            served.abort();
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Records an announcement or goodbye of another node. Returns whether the node is new.
fn note_presence(others: &OtherNodes, prefix: &str, message: &async_nats::Message) -> bool {
    let id = message.subject.strip_prefix(prefix).and_then(|id| id.strip_prefix('.'));
    let Some(id) = id else { return false };
    let mut nodes = others.nodes();
    let now = Instant::now();
    nodes.retain(|_, heard| *heard + PRESENCE_SILENCE_MAX > now);
    let is_new = if &*message.payload == GOODBYE_PAYLOAD {
        nodes.remove(id);
        false
    } else {
        nodes.insert(id.to_owned(), now).is_none()
    };
    drop(nodes);
    others.changed.notify_waiters();
    is_new
}
