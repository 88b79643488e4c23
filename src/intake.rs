//! The one door: every front hands it what it has read, and nothing gets into the log any other
//! way.
//!
//! A front gathers the messages of one read in a [`Draft`]; each is checked against the grant of
//! the key that came with it as it is added. [`Intake::admit`] waits until there is room, hands the
//! draft to the log, and gives back an [`Admitted`], which resolves when the log has made it
//! durable: only then may a front say yes. The front may go on reading meanwhile.

use std::future::Future;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{info, warn};

use crate::auth::{Authorizer, Denied, Grant, Key, Scope};
use crate::config;
use crate::limits::{CONTENT_TYPE_BYTES_MAX, REVOCATION_WAIT_MAX, SECTION_SEARCH_MAX};
use crate::log::{AppendError, Committed, Log, Section};
use crate::message::{DatasourceId, NameError, Offset, RecordFlags, Transport, check_topic, now_micros};
use crate::observe::metrics::Metrics;

/// Why a message was not let in. Each front turns it into its protocol's words in one function.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The key does not allow it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The topic cannot be used.
    #[error("{0}")]
    Topic(#[from] NameError),
    /// A `*` key has to name a datasource, and there is no such.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// A `*` key has to name a datasource in front of the topic.
    #[error("a key for all datasources publishes to {{datasource}}/{{topic}}")]
    DatasourceMissing,
    /// A payload over the limit.
    #[error("a payload of {bytes} bytes is over the limit of {bytes_max} (intake.payload_bytes_max)")]
    TooLarge {
        /// What came.
        bytes: usize,
        /// What is taken.
        bytes_max: usize,
    },
    /// A media type that is too long or holds control characters.
    #[error("a content type is at most {CONTENT_TYPE_BYTES_MAX} bytes of printable text")]
    ContentType,
    /// Transient: too much is on its way into the log, for longer than a client is held back.
    #[error(
        "more than {in_flight_bytes_max} bytes (intake.in_flight_bytes_max) are waiting to be written; try again in {} s",
        retry_after.as_secs()
    )]
    Busy {
        /// The limit.
        in_flight_bytes_max: usize,
        /// When to come again.
        retry_after: Duration,
    },
    /// Transient: the log cannot take it.
    #[error("{0}")]
    Log(#[from] AppendError),
}

/// When to come again after a transient refusal.
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Refusal {
    /// Whether the same message may be let in later: then it must not be consumed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Refusal::Busy { .. } | Refusal::Log(_))
    }

    /// When to come again, for a transient one.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::Busy { retry_after, .. } => Some(*retry_after),
            Refusal::Log(_) => Some(RETRY_AFTER),
            _ => None,
        }
    }

    /// One word for metrics and logs.
    pub fn cause(&self) -> &'static str {
        match self {
            Refusal::Denied(denied) => denied.cause(),
            Refusal::Topic(_) | Refusal::DatasourceMissing => "topic",
            Refusal::NoDatasource(_) => "no_datasource",
            Refusal::TooLarge { .. } => "too_large",
            Refusal::ContentType => "content_type",
            Refusal::Busy { .. } => "busy",
            Refusal::Log(AppendError::DiskFull) => "disk_full",
            Refusal::Log(AppendError::Budget { .. }) => "log_budget",
            Refusal::Log(AppendError::Failed(_)) => "log_failed",
            Refusal::Log(AppendError::Closed) => "shutting_down",
        }
    }
}

/// One message, as a front read it.
#[derive(Clone, Copy)]
pub struct Incoming<'a> {
    /// Relative to the key's datasource; for a `*` key with the datasource in front, unless the
    /// front's address names it.
    pub topic: &'a str,
    /// The bytes.
    pub payload: &'a [u8],
    /// The media type, or empty.
    pub content_type: &'a str,
    /// MQTT 5 properties to hand on, in wire form, or empty.
    pub properties: &'a [u8],
    /// How it was published.
    pub flags: RecordFlags,
}

/// The door. Cheap to clone.
#[derive(Clone)]
pub struct Intake(Arc<Door>);

struct Door {
    authorizer: Authorizer,
    log: Log,
    metrics: Arc<Metrics>,
    limits: config::Intake,
    /// A permit per byte that may be on its way into the log.
    room: Arc<Semaphore>,
}

impl Intake {
    /// The door in front of `log`.
    pub fn new(authorizer: Authorizer, log: Log, metrics: Arc<Metrics>, limits: &config::Intake) -> Self {
        let room = Arc::new(Semaphore::new(limits.in_flight_bytes_max));
        Self(Arc::new(Door { authorizer, log, metrics, limits: limits.clone(), room }))
    }

    /// Who may.
    pub fn authorizer(&self) -> &Authorizer {
        &self.0.authorizer
    }

    /// What is counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// What is let in, besides the key.
    pub fn limits(&self) -> &config::Intake {
        &self.0.limits
    }

    /// An empty draft for messages that came in at one moment: one read of a socket, one request.
    pub fn draft(&self, transport: Transport) -> Draft {
        Draft { intake: self.clone(), transport, received_at: now_micros(), sections: Vec::new() }
    }

    /// Hands a draft to the log as soon as there is room for it. MQTT clients are held back while
    /// there is none; the others, which are told when to come again, for a second at most.
    ///
    /// # Errors
    /// [`Refusal::Busy`] if there is no room for `intake.hold_back_ms_max`.
    pub async fn admit(&self, draft: Draft) -> Result<Admitted, Refusal> {
        let draft = match self.try_admit(draft) {
            Ok(admitted) => return Ok(admitted),
            Err(draft) => draft,
        };
        let patience = self.hold_back(draft.transport).max(Duration::from_secs(1));
        let waiting = self.0.room.clone().acquire_many_owned(self.permits(&draft));
        match tokio::time::timeout(patience, waiting).await {
            Ok(Ok(room)) => Ok(self.append(draft, room)),
            Ok(Err(_)) => Err(AppendError::Closed.into()),
            Err(_) => Err(self.busy()),
        }
    }

    /// Hands a draft to the log if there is room for it now, and gives it back if there is not.
    pub fn try_admit(&self, draft: Draft) -> Result<Admitted, Draft> {
        match self.0.room.clone().try_acquire_many_owned(self.permits(&draft)) {
            Ok(room) => Ok(self.append(draft, room)),
            Err(_) => Err(draft),
        }
    }

    fn append(&self, draft: Draft, room: OwnedSemaphorePermit) -> Admitted {
        let started = Instant::now();
        let records = draft.sections.iter().map(|s| (s.records(), s.payload_bytes())).collect();
        let give_up_at = started + self.hold_back(draft.transport);
        let committed = self.0.log.append(draft.sections, give_up_at);
        let metrics = self.0.metrics.clone();
        Admitted { committed, started, records, transport: draft.transport, metrics, _room: room }
    }

    /// A draft larger than all the room there is goes in alone.
    fn permits(&self, draft: &Draft) -> u32 {
        let weight: usize = draft.sections.iter().map(Section::weight).sum();
        u32::try_from(weight.min(self.0.limits.in_flight_bytes_max)).unwrap_or(u32::MAX)
    }

    /// Admits a draft and waits until it is durable. `Ok` has the offsets of its records, which
    /// have to be of one origin; `None` for a draft without messages.
    ///
    /// # Errors
    /// Every transient [`Refusal`], and [`Denied::Revoked`] if the key died on the way.
    pub async fn submit(&self, draft: Draft) -> Result<Option<RangeInclusive<Offset>>, Refusal> {
        let records: u64 = draft.sections.iter().map(|s| u64::from(s.records())).sum();
        if records == 0 {
            return Ok(None);
        }
        let accepted = self.admit(draft).await?.await?;
        match accepted.first_offsets.first() {
            Some(Some(first)) => Ok(Some(*first..=*first + records - 1)),
            _ => Err(Denied::Revoked.into()),
        }
    }

    /// Waits until nothing more can come in under these dead keys and their connections are gone,
    /// the latter for [`REVOCATION_WAIT_MAX`] at most.
    pub async fn settle(&self, dead: &[Arc<Key>]) {
        let started = Instant::now();
        self.0.log.barrier().await;
        let gone = async {
            for key in dead {
                key.connections.gone().await;
            }
        };
        if tokio::time::timeout(REVOCATION_WAIT_MAX, gone).await.is_err() {
            let left: usize = dead.iter().map(|key| key.connections.count()).sum();
            warn!(left, "connections of a dead key are slow to close; nothing they send is let in");
        }
        self.0.metrics.revocation_seconds.record(started.elapsed());
        for key in dead {
            info!(key_id = %key.id, datasource = %key.datasource, "an API key is dead");
        }
    }

    /// How long a client of `transport` waits for what passes by itself.
    fn hold_back(&self, transport: Transport) -> Duration {
        match transport {
            Transport::Mqtt => Duration::from_millis(self.0.limits.hold_back_ms_max),
            Transport::Http | Transport::Nats => Duration::ZERO,
        }
    }

    fn busy(&self) -> Refusal {
        Refusal::Busy { in_flight_bytes_max: self.0.limits.in_flight_bytes_max, retry_after: RETRY_AFTER }
    }
}

/// Messages that were checked and encoded, and are not handed to the log yet.
pub struct Draft {
    intake: Intake,
    transport: Transport,
    received_at: i64,
    sections: Vec<Section>,
}

impl Draft {
    /// Checks one message against `grant` and adds it. `datasource` is the one that the front's
    /// address names; `None` takes the key's own or, for a `*` key, the topic's first level.
    /// Returns which of the draft's origins the message is of: an index into
    /// [`Accepted::first_offsets`].
    ///
    /// # Errors
    /// Every permanent [`Refusal`].
    pub fn push(
        &mut self,
        grant: &Grant,
        datasource: Option<&DatasourceId>,
        message: Incoming<'_>,
    ) -> Result<usize, Refusal> {
        if !grant.holds() {
            return Err(Denied::Revoked.into());
        }
        let mut topic = message.topic;
        let named;
        let datasource = if grant.datasource().is_all() {
            let id = match datasource {
                Some(id) => id.as_str(),
                None => {
                    let (id, rest) = topic.split_once('/').ok_or(Refusal::DatasourceMissing)?;
                    topic = rest;
                    id
                }
            };
            grant.has(Scope::Ingest)?;
            let found = self.intake.0.authorizer.registry().datasource(id);
            named = found.ok_or_else(|| Refusal::NoDatasource(id.chars().take(64).collect()))?;
            &named.id
        } else {
            let own = grant.datasource();
            grant.allows(Scope::Ingest, datasource.unwrap_or(own).as_str())?;
            own
        };
        check_topic(topic)?;
        let bytes_max = self.intake.0.limits.payload_bytes_max;
        if message.payload.len() > bytes_max {
            return Err(Refusal::TooLarge { bytes: message.payload.len(), bytes_max });
        }
        let content_type = message.content_type;
        if content_type.len() > CONTENT_TYPE_BYTES_MAX || content_type.chars().any(char::is_control) {
            return Err(Refusal::ContentType);
        }
        let at = self.section(grant, datasource);
        self.sections[at].push(topic, message.payload, content_type, message.properties, message.flags);
        Ok(at)
    }

    /// The section for records of this origin. Only the newest few are looked at: most connections
    /// have one origin, and a further section costs little.
    fn section(&mut self, grant: &Grant, datasource: &DatasourceId) -> usize {
        let key_id = grant.key_id();
        let same = |s: &Section| s.key_id == key_id && s.datasource == *datasource;
        let recent = self.sections.iter().enumerate().rev().take(SECTION_SEARCH_MAX);
        if let Some((at, _)) = recent.into_iter().find(|(_, section)| same(section)) {
            return at;
        }
        self.sections.push(Section::new(
            datasource.clone(),
            key_id,
            grant.lease().clone(),
            self.transport,
            self.received_at,
        ));
        self.sections.len() - 1
    }

    /// Makes room for about `bytes` of messages of one origin, to be called before the first is
    /// added.
    pub fn reserve(&mut self, bytes: usize) {
        if let Some(section) = self.sections.last_mut() {
            section.reserve(bytes);
        }
    }

    /// Whether it holds no message.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }
}

/// A draft on its way into the log: resolves when it is durable, or is known not to be kept.
pub struct Admitted {
    committed: oneshot::Receiver<Result<Committed, AppendError>>,
    started: Instant,
    /// Per section: messages and bytes of payload.
    records: Vec<(u32, u64)>,
    transport: Transport,
    metrics: Arc<Metrics>,
    _room: OwnedSemaphorePermit,
}

/// A draft that is durable.
pub struct Accepted {
    /// Per origin: the offset of its first record, or `None` if its key died before the log had it.
    pub first_offsets: Vec<Option<Offset>>,
}

impl Future for Admitted {
    type Output = Result<Accepted, Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // A writer that is gone without an answer has ended with the gateway.
        let committed = ready!(Pin::new(&mut self.committed).poll(cx)).unwrap_or(Err(AppendError::Closed))?;
        self.metrics.commit_seconds.record(self.started.elapsed());
        let (mut records, mut bytes) = (0, 0);
        for ((n, payload_bytes), first) in self.records.iter().zip(&committed.first_offsets) {
            if first.is_some() {
                records += u64::from(*n);
                bytes += payload_bytes;
            } else {
                (0..*n).for_each(|_| self.metrics.refused(self.transport, Denied::Revoked.cause()));
            }
        }
        self.metrics.accepted(self.transport, records, bytes);
        Poll::Ready(Ok(Accepted { first_offsets: committed.first_offsets }))
    }
}
