//! The log in a cluster: a stream in NATS' JetStream, on as many of its servers as it has replicas. Any number
//! of gateways append to it and read it, and none of them keeps it. A record is a message
//! (`message.rs`), its offset is the message's sequence.
//!
//! - Appending (`append.rs`): pipelined; an append is answered when JetStream has acknowledged its messages.
//! - Following (`follow.rs`): what any gateway has appended comes into this one's tail, from which readers
//!   that keep up and the router are served. What it has appended itself it has already (`own.rs`).
//! - Reading (`read.rs`): what is older comes from the servers.
//! - Ids (`once.rs`): those of messages are JetStream's own, for its window; those of QoS 2 exchanges have
//!   generations.
//! - Sharing (`share.rs`): places of which each record goes to one reader.
//! - Retention (`retention.rs`): by the gateways, as only they know what is stored.
//!
//! # Promises, where they differ from the embedded log's
//!
//! - Offsets go up, and there may be gaps: a section's records need not follow each other, as other
//!   gateways append meanwhile.
//! - An append that has resolved `Ok` is in the stream: on a majority of its replicas. JetStream itself
//!   syncs its files every two minutes (`sync_interval`), so that what makes a record outlive a loss of
//!   power is that it is on several servers.
//! - Of an append of several messages that fails some may be kept: each is a message of its own. Sent again
//!   with an id, what is missing comes in and the rest does not come in twice.
//! - `received_at` is the time of the gateway that read the message, and goes as that one's clock.
//! - An id of which JetStream is asked after the append was lost with its connection counts as kept, also
//!   where it was there before.

mod append;
mod follow;
mod message;
mod once;
mod open;
mod own;
mod read;
mod retention;
mod share;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use headgate_bridge_nats::stream::{StreamSettings, StreamState};
use headgate_bridge_nats::{KvError, Nats, Stream, StreamError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use self::append::{Appender, Command, Submission};
use self::follow::Follow;
use self::message::HEADERS_BYTES_MAX;
use self::once::Once;
use self::own::own;
use self::retention::Retention;
use super::retention::{Hold, Holds};
use super::tail::Tail;
use super::withheld::Withheld;
use super::{
    AppendError, Batch, Committing, Listener, Log, OnceId, OpenError, ReadError, RecordTooLarge, Section,
    Task,
};
use crate::config::Config;
use crate::message::{Offset, TimeMicros};
use crate::subject::{Space, SubjectError, check_crosses};

pub use headgate_bridge_nats::stream::SharedPlace;
pub use message::headers_of;
pub use share::{Given, KEEP_EVERY, ShareError, SharedPlaces, SharedRecords};

/// How often it is looked whether the stream is there, and how large it is.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long somebody waits until this gateway has followed what others have appended.
const CATCH_UP_MAX: Duration = Duration::from_secs(3);

/// The log in a cluster. It ends with the last handle.
pub struct JetstreamLog {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    appender: Mutex<Option<JoinHandle<()>>>,
    follower: JoinHandle<()>,
    others: [JoinHandle<()>; 2],
    /// Where reading is done, for threads that wait for it.
    runtime: Handle,
}

/// What the tasks and the readers have in common.
struct Shared {
    stream: Stream,
    /// The connection that the stream is followed over.
    following: Nats,
    once: Once,
    tail: Tail,
    own: Appended,
    listener: OnceLock<Listener>,
    holds: Holds,
    withheld: Arc<Withheld>,
    /// The oldest offset, as far as is known.
    first_offset: AtomicU64,
    bytes: AtomicU64,
    retention_bytes: u64,
    /// Messages that are no records.
    foreign: AtomicU64,
    /// Somebody found the stream full.
    room_wanted: Notify,
    /// Of a message nobody knows what has become of it: it may be on its way still.
    lost_track: AtomicBool,
    trouble: Trouble,
}

/// What this gateway appends itself.
#[derive(Default)]
struct Appended {
    /// How many records it has.
    appended: AtomicU64,
    /// Whether they are taken from here ([`own`]).
    wanted: AtomicBool,
}

/// Why nothing can be appended.
#[derive(Default)]
struct Trouble {
    /// Whether there is any.
    any: AtomicBool,
    /// What an append was told, until one succeeds.
    of_append: Mutex<Option<String>>,
    /// What the stream was found to be like.
    of_stream: Mutex<Option<String>>,
}

impl Shared {
    /// Takes note of why an append failed, or that one did not.
    fn set_append_trouble(&self, trouble: Option<String>) {
        let trouble_of = &self.trouble;
        if trouble.is_none() && !trouble_of.any.load(Ordering::Acquire) {
            return;
        }
        trouble_of.any.store(trouble.is_some(), Ordering::Release);
        let mut current = trouble_of.of_append.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != trouble {
            match &trouble {
                Some(trouble) => warn!(trouble, "the log takes no records; clients are held back"),
                None => info!("the log takes records again"),
            }
            *current = trouble;
        }
    }

    fn note_state(&self, state: &StreamState) {
        // A stream that nothing was removed from begins at 1, and nothing is missing below.
        let first = if state.first <= 1 { 0 } else { state.first };
        self.first_offset.fetch_max(first, Ordering::AcqRel);
        self.bytes.store(state.bytes, Ordering::Relaxed);
    }
}

impl JetstreamLog {
    /// Opens the stream and the buckets beside it, and begins to follow it at its end. `node` is what this
    /// gateway is called in the cluster, now and after a restart. What is followed comes over a connection of
    /// its own, so that it does not stand in the way of acknowledgements.
    ///
    /// # Errors
    /// [`OpenError::Away`] while NATS is or cannot answer, so that it may be tried again;
    /// [`OpenError::Refused`] if JetStream does not have such a stream, or has another one of that name.
    pub async fn open(nats: &Nats, following: &Nats, config: &Config, node: &str) -> Result<Self, OpenError> {
        let (name, replicas) = (config.nats.stream.name.clone(), config.nats.stream.replicas);
        let window = Duration::from_secs(config.intake.dedup_window_s);
        let settings = StreamSettings {
            name,
            subjects: vec![Space::Stream.all(), Space::Quarantine.all()],
            replicas,
            bytes_max: config.log.retention_bytes,
            duplicate_window: window,
        };
        let stream = Stream::open(nats, &settings).await?;
        let once = Once::open(nats, replicas, window).await?;
        let state = stream.state().await?;
        let shared = Arc::new(Shared {
            once,
            tail: Tail::new(state.last + 1),
            own: Appended::default(),
            listener: OnceLock::new(),
            holds: Holds::new(),
            withheld: Arc::default(),
            first_offset: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            retention_bytes: config.log.retention_bytes,
            foreign: AtomicU64::new(0),
            room_wanted: Notify::new(),
            lost_track: AtomicBool::new(false),
            trouble: Trouble::default(),
            following: following.clone(),
            stream,
        });
        shared.note_state(&state);
        let (log, stay_s) = (config.log.clone(), config.intake.dedup_window_s);
        let retention = Retention::open(nats, replicas, shared.clone(), node, log, stay_s).await?;
        let (commands, waiting) = mpsc::unbounded_channel();
        let (own, runs) = own(shared.clone());
        let appender = tokio::spawn(Appender::new(shared.clone(), waiting, own).await?.run());
        let follower = shared.stream.follow(state.last + 1, following);
        let follower = tokio::spawn(Follow::new(shared.clone(), follower, runs).run());
        let others = [tokio::spawn(retention.run()), tokio::spawn(look_after(shared.clone()))];
        let (appender, runtime) = (Mutex::new(Some(appender)), Handle::current());
        Ok(Self { shared, commands, appender, follower, others, runtime })
    }

    /// Places in it that gateways share.
    pub fn shared_places(&self) -> SharedPlaces {
        SharedPlaces::of(self.shared.clone())
    }

    /// Runs a reading task for a thread that waits for it.
    fn wait_for<T: Send + 'static>(
        &self,
        reading: impl Future<Output = Result<T, ReadError>> + Send + 'static,
    ) -> Result<T, ReadError> {
        let (done, read) = oneshot::channel();
        self.runtime.spawn(async move { done.send(reading.await) });
        read.blocking_recv().unwrap_or_else(|_| Err(ReadError::Away("the gateway is shutting down".into())))
    }
}

/// Looks now and then whether the stream is there.
async fn look_after(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let trouble = match shared.stream.state().await {
            Ok(state) => {
                shared.note_state(&state);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        *shared.trouble.of_stream.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

impl Log for JetstreamLog {
    fn withheld(&self) -> &Arc<Withheld> {
        &self.shared.withheld
    }

    fn check_topic(&self, topic: &str) -> Result<(), SubjectError> {
        check_crosses(topic)
    }

    fn check_size(&self, payload: usize, properties: usize) -> Result<(), RecordTooLarge> {
        let bytes_max = self.shared.stream.nats().client().max_payload();
        // Properties are base64 in a header.
        let bytes = payload + properties.div_ceil(3) * 4 + HEADERS_BYTES_MAX;
        match bytes > bytes_max {
            true => Err(RecordTooLarge { bytes, bytes_max, limit: "max_payload of nats-server" }),
            false => Ok(()),
        }
    }

    /// Each record is a message of its own: of a call that fails some may be kept.
    fn append(&self, sections: Vec<Section>, give_up_at: Instant) -> Committing {
        let (reply, committed) = oneshot::channel();
        // Without the task, the receiver says that the log is closed.
        if let Err(refused) = self.commands.send(Command::Append(Submission { sections, give_up_at, reply }))
            && let Command::Append(submission) = refused.0
        {
            let _ = submission.reply.send(Err(AppendError::Closed));
        }
        committed
    }

    fn release(&self, ids: Vec<OnceId>, give_up_at: Instant) -> Committing {
        let (reply, committed) = oneshot::channel();
        self.shared.once.release(ids, give_up_at, reply);
        committed
    }

    /// Returns when everything that was appended before is acknowledged or has failed. While NATS is away, what
    /// was on its way when it went may come in yet, and this does not return.
    fn barrier(&self) -> Task<'_, ()> {
        let (reply, passed) = oneshot::channel();
        let sent = self.commands.send(Command::Barrier(reply));
        Box::pin(async move {
            if sent.is_ok() {
                drop(passed.await);
            }
            let (lost_track, stream) = (&self.shared.lost_track, &self.shared.stream);
            if lost_track.load(Ordering::Acquire) {
                // Behind everything that the connection was given before; the answer, behind what the server
                // was.
                while stream.nats().client().flush().await.is_err() || stream.state().await.is_err() {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                lost_track.store(false, Ordering::Release);
            }
        })
    }

    fn sync(&self) -> Task<'_, Result<(), AppendError>> {
        Box::pin(self.shared.once.sync())
    }

    fn first_offset(&self) -> Offset {
        self.shared.first_offset.load(Ordering::Acquire)
    }

    fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// The stream's, as its leader has it.
    fn end(&self) -> Task<'_, Result<Offset, AppendError>> {
        Box::pin(async move {
            let state = self.shared.stream.state().await;
            state.map(|state| state.last + 1).map_err(|error| AppendError::Away(error.to_string().into()))
        })
    }

    fn catch_up(&self, offset: Offset) -> Task<'_, Result<(), AppendError>> {
        Box::pin(async move {
            if self.next_offset() >= offset {
                return Ok(());
            }
            let end = self.end().await?.min(offset);
            let mut followed = self.shared.tail.subscribe();
            let caught_up = followed.wait_for(|next| *next >= end);
            match tokio::time::timeout(CATCH_UP_MAX, caught_up).await {
                // The sender is in `shared`, so that waiting does not fail.
                Ok(_) => Ok(()),
                Err(_) => {
                    let next = self.next_offset();
                    let words = format!("this gateway has followed the stream to {next} only, of {end}");
                    Err(AppendError::Away(words.into()))
                }
            }
        })
    }

    fn subscribe(&self) -> watch::Receiver<Offset> {
        self.shared.tail.subscribe()
    }

    fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, ReadError> {
        match self.read_recent(from, bytes_max) {
            Some(batches) => Ok(batches),
            None => self.wait_for(read::read(self.shared.clone(), from, bytes_max)),
        }
    }

    fn read_recent(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>> {
        // There is none at 0, in any stream.
        if from == 0 && self.first_offset() == 0 && self.next_offset() == 1 {
            return Some(vec![Batch::nothing_below(1)]);
        }
        self.shared.tail.read(from, bytes_max)
    }

    /// On the task that follows the stream.
    fn listen(&self, listener: Listener) {
        let _ = self.shared.listener.set(listener);
    }

    fn wait_blocking(&self, offset: Offset, timeout: Duration) {
        self.shared.tail.wait(offset, timeout);
    }

    fn offset_at(&self, time: TimeMicros) -> Result<Offset, ReadError> {
        self.wait_for(read::offset_at(self.shared.clone(), time))
    }

    fn hold(&self) -> Hold {
        self.shared.holds.hold()
    }

    fn begin_retention(&self) {
        self.shared.holds.begin();
    }

    fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    fn trouble(&self) -> Option<String> {
        let trouble = &self.shared.trouble;
        let of = |what: &Mutex<Option<String>>| what.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let nats = self.shared.stream.nats().trouble().or_else(|| self.shared.following.trouble());
        nats.or_else(|| of(&trouble.of_stream)).or_else(|| of(&trouble.of_append))
    }

    fn close(&self) -> Task<'_, ()> {
        let appender = self.appender.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = self.commands.send(Command::Close);
        Box::pin(async move {
            if let Some(appender) = appender
                && appender.await.is_err()
            {
                warn!("the log's appender has failed");
            }
            // What others append from here on is for the next start: consumers that are to end do.
            self.follower.abort();
        })
    }
}

impl Drop for JetstreamLog {
    fn drop(&mut self) {
        self.follower.abort();
        self.others.iter().for_each(JoinHandle::abort);
        if let Some(appender) = self.appender.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            appender.abort();
        }
    }
}

impl From<StreamError> for OpenError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Away(text) => OpenError::Away(text),
            refused => OpenError::Refused(refused.to_string()),
        }
    }
}

impl From<KvError> for OpenError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Away(text) => OpenError::Away(text),
            refused => OpenError::Refused(refused.to_string()),
        }
    }
}
