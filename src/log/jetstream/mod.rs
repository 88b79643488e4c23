//! The log in a cluster: a stream in NATS JetStream, on as many servers as it has replicas. Any number
//! of gateways append to it and read it, and none of them stores it. A record is a message
//! (`log/nats_message.rs`), and its offset is the message's sequence.
//!
//! - Appending (`append.rs`): pipelined; an append is answered when JetStream has acknowledged its messages.
//! - Fences (`fences.rs`): where in the stream keys end; behind that nothing of them is a record.
//! - Following (`follow.rs`): brings the records of all gateways into this one's tail, which serves the
//!   router and readers that keep up. A gateway's own records need not travel back (`own.rs`).
//! - Reading (`read.rs`): older records come from the servers.
//! - Ids (`once.rs`): JetStream knows the ids of messages for its window; the ids of QoS 2 exchanges have
//!   generations.
//! - Sharing (`share.rs`): shared places in the log, where each record goes to one reader.
//! - Retention (`retention.rs`): by the gateways, because only they know what is stored.
//! - One history (`history.rs`): whether the stream is the one that this gateway has followed.
//! - Watching (`watch.rs`): settings, servers that are behind, and the time, which is the servers'.
//!
//! # Promises, where they differ from the embedded log's
//!
//! - Offsets go up, and there may be gaps: a section's records need not follow each other, as other
//!   gateways append meanwhile.
//! - An append that has resolved `Ok` is in the stream, on a majority of its replicas. JetStream
//!   syncs its files only every two minutes (`sync_interval`), so a record survives a power failure because
//!   it is on several servers. A stream of one replica may lose what was acknowledged in that time.
//! - A failed append of several messages may have kept some of them, as each is a separate message. If it is
//!   sent again with an id, only the missing ones are added.
//! - `received_at` comes from the clock of the gateway that read the message.
//! - When the connection is lost during an append and its ids are published again, an id that JetStream
//!   knows counts as kept by this append, even if it was there before.

mod append;
mod calls;
mod exchange_rows;
mod fences;
mod follow;
mod history;
mod id_allowance;
mod message;
mod once;
mod open;
mod open_exchanges;
mod own;
mod read;
mod retention;
mod share;
mod watch;

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use headgate_bridge_nats::stream::{JetstreamSettings, StreamPurpose, StreamState};
use headgate_bridge_nats::{JetstreamStream, KvError, ManagedStream, Nats, StreamError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use self::append::{AppenderCommand, JetstreamAppender};
use self::exchange_rows::{
    ExchangeRows, StaleRows, exchanges_bucket_settings, find_open_exchanges, write_exchange_rows,
};
use self::fences::{KeyFences, load_fences, remove_shut_out};
use self::follow::JetstreamLogFollower;
use self::id_allowance::IdAllowance;
use self::once::{ExchangeGenerations, RELEASE_MEMORY, once_bucket_settings};
use self::open_exchanges::OpenExchanges;
use self::own::{OwnAppends, own};
use self::retention::{StreamRetention, cursors_bucket_settings};
use self::watch::{watch_reports, watch_stream_state};
use super::retention::Holds;
use super::tail::Tail;
use super::withheld::WithheldRules;
use super::{AppendError, BatchListener, LogOpenError, LogReadError, log_trouble};
use crate::config::Config;
use crate::message::{Offset, TimeMicros};
use crate::subject::SubjectSpace;
use crate::trouble::TroubleCell;

pub use headgate_bridge_nats::stream::SharedPlace;
pub use history::{HistoryGate, HistorySetBack, LogHistory};
pub use watch::timed_report;

pub use share::{DeliveredRecord, SHARED_KEEP_INTERVAL, ShareError, SharedPlaces, SharedRecords};

/// How long a caller waits for this gateway to follow what others have appended.
const FOLLOW_CATCH_UP_TIMEOUT: Duration = Duration::from_secs(3);

/// The log in a cluster. Dropping it ends its tasks.
pub struct JetstreamLog {
    shared: Arc<JetstreamLogShared>,
    commands: mpsc::UnboundedSender<AppenderCommand>,
    appender: Mutex<Option<JoinHandle<()>>>,
    follower: JoinHandle<()>,
    others: [JoinHandle<()>; 5],
    /// Runs the reads of blocking threads.
    runtime: Handle,
}

/// The state that the tasks and the readers share.
struct JetstreamLogShared {
    stream: JetstreamStream,
    /// The connection for following the stream.
    following: Nats,
    /// For how long JetStream knows ids.
    id_window: Duration,
    /// Whether the stream has several replicas.
    is_replicated: bool,
    once: Arc<ExchangeGenerations>,
    exchanges: Arc<OpenExchanges>,
    ids: IdAllowance,
    rows: ExchangeRows,
    stale_rows: StaleRows,
    tail: Tail,
    own: OwnAppends,
    listener: OnceLock<BatchListener>,
    holds: Holds,
    withheld: Arc<WithheldRules>,
    fences: KeyFences,
    gate: HistoryGate,
    /// For how long the release of an exchange is known, at least.
    exchange_memory: Duration,
    /// The epochs of the log, once they are known.
    history: OnceLock<LogHistory>,
    /// Whether a key may have died without this gateway knowing it yet.
    may_be_behind: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    /// The oldest offset, as far as is known.
    first_offset: AtomicU64,
    bytes: AtomicU64,
    retention_bytes: u64,
    /// How many messages of the stream are not records.
    foreign: AtomicU64,
    /// Notified when an append finds the stream full.
    room_wanted: Notify,
    /// The outcome of a message is unknown: it may still be on its way.
    lost_track: AtomicBool,
    /// The error of the last failed append, until one succeeds.
    append_trouble: TroubleCell,
    /// The error of the last check of the stream.
    stream_trouble: TroubleCell,
    /// What is wrong with this machine's clock.
    clock_trouble: TroubleCell,
    /// What an operator should look at although messages are taken.
    report_warning: TroubleCell,
}

impl JetstreamLogShared {
    /// Why nothing may be published now: the stream may be another one than was followed, or a key may have died without
    /// this gateway knowing it yet.
    fn obstacle(&self) -> Option<AppendError> {
        if self.gate.is_in_doubt() {
            return Some(AppendError::OtherHistory(self.gate.words()));
        }
        let is_behind = self.may_be_behind.get().is_some_and(|may_be_behind| may_be_behind());
        let words = "this gateway has lost NATS and may not know yet which keys are dead";
        is_behind.then(|| AppendError::Away(words.into()))
    }

    /// The epoch of the log, as far as it is known.
    fn epoch(&self) -> u64 {
        self.history.get().map_or(0, |history| history.epoch)
    }

    /// Whether the stream answers; and if it `was_full`, whether it has some room again.
    async fn takes_messages(&self, was_full: bool) -> bool {
        let bytes_max = if was_full { self.retention_bytes / 100 * 99 } else { u64::MAX };
        self.stream.state().await.is_ok_and(|state| state.bytes <= bytes_max)
    }

    fn note_state(&self, state: &StreamState) {
        // An untouched stream begins at 1, and no record is missing below that.
        let first = if state.first <= 1 { 0 } else { state.first };
        if self.first_offset.fetch_max(first, Ordering::AcqRel) < first {
            self.fences.forget_below(first);
        }
        self.bytes.store(state.bytes, Ordering::Relaxed);
    }
}

impl JetstreamLog {
    /// Opens the stream and its buckets, and begins to follow the stream at its end. `node` is this
    /// gateway's name in the cluster, the same after a restart. Following has a separate connection
    /// (`following`), so that it does not delay acknowledgements.
    ///
    /// # Errors
    /// [`LogOpenError::Away`] while NATS cannot be reached or does not answer: try again.
    /// [`LogOpenError::Refused`] if JetStream cannot have such a stream, or has a different one of that name.
    pub async fn open(
        nats: &Nats,
        following: &Nats,
        config: &Config,
        node: &str,
    ) -> Result<Self, LogOpenError> {
        let (settings, replicas) = (stream_settings(config), config.nats.stream.replicas);
        let window = settings.duplicate_window;
        let stream = JetstreamStream::open(nats, &settings).await?;
        let exchanges = Arc::new(OpenExchanges::new(config.intake.exchanges_per_datasource_max, window));
        let (stale_rows, to_remove) = mpsc::unbounded_channel();
        let once = ExchangeGenerations::open(nats, replicas, window, {
            let (exchanges, stale_rows) = (exchanges.clone(), stale_rows.clone());
            move |id, generation| {
                if let Some(revision) = exchanges.close_earlier(id, generation) {
                    let _ = stale_rows.send((id, revision));
                }
            }
        });
        let once = Arc::new(once.await?);
        let removal = (stale_rows.clone(), to_remove);
        let rows = ExchangeRows::open(nats, replicas, exchanges.clone(), once.clone(), removal).await?;
        let state = stream.state().await?;
        let (fences, removed) = KeyFences::new();
        let shared = Arc::new(JetstreamLogShared {
            id_window: window,
            is_replicated: replicas > 1,
            once,
            exchanges,
            ids: IdAllowance::new(
                config.intake.dedup_ids_per_datasource_max,
                config.intake.dedup_ids_max,
                window,
            ),
            rows,
            stale_rows,
            tail: Tail::new(state.last + 1),
            own: OwnAppends::default(),
            listener: OnceLock::new(),
            holds: Holds::new(),
            withheld: Arc::default(),
            fences,
            gate: HistoryGate::default(),
            exchange_memory: window + RELEASE_MEMORY,
            history: OnceLock::new(),
            may_be_behind: OnceLock::new(),
            first_offset: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            retention_bytes: config.log.retention_bytes,
            foreign: AtomicU64::new(0),
            room_wanted: Notify::new(),
            lost_track: AtomicBool::new(false),
            append_trouble: log_trouble(),
            stream_trouble: TroubleCell::new(
                "the log's stream is not there",
                "the log's stream is there again",
            ),
            clock_trouble: TroubleCell::new(
                "the gateway is not ready: its clock is wrong",
                "the gateway's clock is right again",
            ),
            report_warning: TroubleCell::new(
                "the log's stream is not as it should be",
                "the log's stream is as it should be again",
            ),
            following: following.clone(),
            stream,
        });
        shared.note_state(&state);
        load_fences(&shared).await?;
        let (log, stay_s) = (config.log.clone(), config.intake.dedup_window_s);
        let retention = StreamRetention::open(nats, replicas, shared.clone(), node, log, stay_s).await?;
        let (commands, waiting) = mpsc::unbounded_channel();
        let (own, alone) = own(shared.clone());
        let appender = tokio::spawn(JetstreamAppender::new(shared.clone(), waiting, own).await?.run());
        let follower = shared.stream.follow(state.last + 1, following);
        let follower = tokio::spawn(JetstreamLogFollower::new(shared.clone(), follower, alone).run());
        let others = [
            tokio::spawn(retention.run()),
            tokio::spawn(watch_stream_state(shared.clone())),
            tokio::spawn(watch_reports(shared.clone(), managed_streams(config))),
            tokio::spawn(remove_shut_out(shared.clone(), removed, window)),
            tokio::spawn(write_exchange_rows(shared.clone())),
        ];
        let (appender, runtime) = (Mutex::new(Some(appender)), Handle::current());
        Ok(Self { shared, commands, appender, follower, others, runtime })
    }

    /// The shared places of this log.
    pub fn shared_places(&self) -> SharedPlaces {
        SharedPlaces::new(self.shared.clone())
    }

    /// Sets how this gateway finds out that a key may have died without its knowledge: then it publishes nothing, and
    /// acknowledges nothing that it has not read back.
    pub fn set_behind_check(&self, may_be_behind: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.shared.may_be_behind.set(Box::new(may_be_behind));
    }

    /// Watches the first offset that this gateway has not followed.
    pub fn followed(&self) -> tokio::sync::watch::Receiver<Offset> {
        self.shared.tail.subscribe()
    }

    /// The gate that is closed while the stream may be another one than this gateway has followed.
    pub fn gate(&self) -> &HistoryGate {
        &self.shared.gate
    }

    /// Finds the QoS 2 exchanges that a kill of all gateways has left open, in what was stored since this gateway followed
    /// the stream last.
    ///
    /// # Errors
    /// [`LogOpenError::Away`].
    pub async fn find_open_exchanges(&self, followed_at: TimeMicros) -> Result<(), LogOpenError> {
        let known_for = self.shared.exchange_memory;
        Ok(find_open_exchanges(&self.shared, followed_at, known_for).await?)
    }

    /// Sets the epochs of the log. Only the first call counts.
    pub fn set_history(&self, history: LogHistory) {
        let _ = self.shared.history.set(history);
    }

    /// The connection over which it appends.
    pub fn nats(&self) -> &Nats {
        self.shared.stream.nats()
    }

    /// Runs a read on the runtime and blocks until it ends.
    fn block_on_read<T: Send + 'static>(
        &self,
        reading: impl Future<Output = Result<T, LogReadError>> + Send + 'static,
    ) -> Result<T, LogReadError> {
        let (done, read) = oneshot::channel();
        self.runtime.spawn(async move { done.send(reading.await) });
        read.blocking_recv()
            .unwrap_or_else(|_| Err(LogReadError::Away("the gateway is shutting down".into())))
    }
}

/// What the log's stream is to be like.
fn stream_settings(config: &Config) -> JetstreamSettings {
    JetstreamSettings {
        name: config.nats.stream.name.clone(),
        subjects: vec![SubjectSpace::Stream.space_wildcard(), SubjectSpace::Quarantine.space_wildcard()],
        replicas: config.nats.stream.replicas,
        bytes_max: config.log.retention_bytes,
        duplicate_window: Duration::from_secs(config.intake.dedup_window_s),
        purpose: StreamPurpose::Log,
    }
}

/// Opens the log's stream alone, and makes it if it is gone: for commands that decide how the log goes on.
///
/// # Errors
/// [`StreamError`].
pub async fn open_log_stream(nats: &Nats, config: &Config) -> Result<JetstreamStream, StreamError> {
    JetstreamStream::open(nats, &stream_settings(config)).await
}

/// The stream and the buckets of the log, as the configuration has them; the stream is the first.
pub fn managed_streams(config: &Config) -> [ManagedStream; 4] {
    let (settings, replicas) = (stream_settings(config), config.nats.stream.replicas);
    [
        (&settings).into(),
        (&once_bucket_settings(replicas, settings.duplicate_window)).into(),
        (&cursors_bucket_settings(replicas)).into(),
        (&exchanges_bucket_settings(replicas)).into(),
    ]
}

impl Drop for JetstreamLog {
    fn drop(&mut self) {
        self.follower.abort();
        self.others.iter().for_each(JoinHandle::abort);
        if let Some(appender) = self.appender.get_mut().take() {
            appender.abort();
        }
    }
}

impl From<StreamError> for LogOpenError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Away(text) => LogOpenError::Away(text),
            refused => LogOpenError::Refused(refused.to_string()),
        }
    }
}

impl From<KvError> for LogOpenError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Away(text) => LogOpenError::Away(text),
            refused => LogOpenError::Refused(refused.to_string()),
        }
    }
}
