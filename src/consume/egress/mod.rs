//! Egress: the consumer that sends the validated stream on to NATS, on `stream.{datasource}.{topic}` of
//! one JetStream stream.
//!
//! It keeps no cursor of its own. The stream's last message names its record and the log that it came
//! from; egress resumes with the record after it, whatever was killed or restored meanwhile. The outlet
//! ensures that nothing is stored twice, out of order or with a gap (`bridges/nats/src/outlet/`).
//!
//! Egress leaves out records in quarantine, and records that it cannot send: the topic is no valid
//! subject, or the message is larger than NATS takes. It counts the latter and logs an example.
//!
//! While NATS is away the log keeps unsent records for as long as there is room. At `log.retention_bytes`
//! devices take precedence: the log removes the oldest records unsent, egress logs and counts them, and
//! the next message says how many are missing before it (`Headgate-Skipped`).

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use headgate_bridge_nats::stream::{JetstreamSettings, StreamPurpose};
use headgate_bridge_nats::{Nats, Outlet, OutletError, OutletPosition};
use rand::rand_core::TryRng;
use rand::rngs::SysRng;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{error, info, warn};

use self::message::{is_message_of_record, message_of_record, record_offset_of};
use super::follower::{Consumer, FollowerControl, FollowerProfile, NextRound};
use crate::config;
use crate::limits::EGRESS_READ_BYTES;
use crate::log::{Hold, Log, LogReadError};
use crate::message::{Offset, RecordRef};
use crate::subject::SubjectSpace;

mod message;

/// How long JetStream remembers message ids. A message in flight when a connection broke arrives within
/// this time or not at all. A longer window would fill the server's memory while egress catches up.
const EGRESS_DUPLICATE_WINDOW: Duration = Duration::from_secs(10);
/// How often records that cannot be sent are logged, at most.
const EGRESS_REPORT_INTERVAL: Duration = Duration::from_secs(60);
/// The file with the id that distinguishes the log of this data directory from all others.
const LOG_ID_FILE: &str = "log.id";

const EGRESS_PROFILE: FollowerProfile = FollowerProfile {
    name: "egress",
    down: "egress to NATS is failing",
    up: "egress to NATS has recovered",
    late: "egress to NATS did not finish by its deadline; the log has the rest",
    // NATS may be away for longer than any deadline; the next start sends the rest.
    patient: false,
};

/// The running consumer.
pub struct Egress {
    control: Arc<FollowerControl>,
    stop: watch::Sender<Option<Instant>>,
    counts: Arc<EgressCounts>,
}

/// The position of egress and its counts since the start.
#[derive(Default)]
pub struct EgressCounts {
    cursor: AtomicU64,
    sent: AtomicU64,
    skipped: [AtomicU64; 3],
}

/// Why a record is not on the stream, other than that it is in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressSkipReason {
    /// Its topic is no valid subject.
    Topic,
    /// It is larger than NATS takes.
    Size,
    /// The log removed it before NATS could take it.
    Gone,
}

impl EgressSkipReason {
    /// All of them.
    pub const ALL: [EgressSkipReason; 3] =
        [EgressSkipReason::Topic, EgressSkipReason::Size, EgressSkipReason::Gone];

    /// The lower-case name, as in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            EgressSkipReason::Topic => "topic",
            EgressSkipReason::Size => "size",
            EgressSkipReason::Gone => "gone",
        }
    }
}

impl EgressCounts {
    /// The first offset that is not on the stream yet.
    pub fn cursor(&self) -> Offset {
        self.cursor.load(Ordering::Acquire)
    }

    /// Records that were sent and stored.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Records that will not be on the stream, for this reason.
    pub fn skipped(&self, why: EgressSkipReason) -> u64 {
        self.skipped[why as usize].load(Ordering::Relaxed)
    }
}

/// Why egress could not start.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The log's id could not be read or written.
    #[error("the stream on NATS: cannot read or make {}: {error}", path.display())]
    LogId {
        /// Where it is.
        path: PathBuf,
        /// The operating system's.
        error: io::Error,
    },
    /// The thread could not be started.
    #[error("the stream on NATS: {0}")]
    Io(#[from] io::Error),
}

/// Why a round of the thread failed.
#[derive(Debug, thiserror::Error)]
enum EgressRoundError {
    #[error(transparent)]
    Outlet(#[from] OutletError),
    #[error(transparent)]
    Log(#[from] LogReadError),
    #[error("the log has records from {0} on and gives none")]
    NoRecords(Offset),
    #[error(
        "the newest message of {stream} (sequence {sequence}) was not sent by this log: let nobody else \
         publish there and delete it, or use another stream (nats.stream.name)"
    )]
    ForeignMessage { stream: String, sequence: u64 },
    #[error(
        "the stream {stream} has records up to offset {offset}, and the log ends before {log_end}: it lacks \
         what was sent from it. Use another stream (nats.stream.name), or delete this one to have it made \
         again of what the log has"
    )]
    LogBehind { stream: String, offset: Offset, log_end: Offset },
    #[error(
        "the stream {stream} has another record at offset {offset} than the log: one of them was put back \
         to an earlier state. Use another stream (nats.stream.name), or delete this one to have it made \
         again of what the log has"
    )]
    RecordDiffers { stream: String, offset: Offset },
    #[error("egress did not finish by its deadline")]
    Late,
}

impl Egress {
    /// Starts the thread that follows the log into the stream. Must be called in a tokio runtime. NATS need
    /// not be there: the thread waits for it, now and later.
    ///
    /// # Errors
    /// [`EgressError`].
    pub fn start(
        dir: &Path,
        config: &config::Config,
        nats: Nats,
        log: Arc<dyn Log>,
    ) -> Result<Self, EgressError> {
        let stream = &config.nats.stream;
        let settings = JetstreamSettings {
            name: stream.name.clone(),
            subjects: vec![SubjectSpace::Stream.space_wildcard(), SubjectSpace::Quarantine.space_wildcard()],
            replicas: stream.replicas,
            bytes_max: config.log.retention_bytes,
            duplicate_window: EGRESS_DUPLICATE_WINDOW,
            purpose: StreamPurpose::Copy,
        };
        let path = dir.join(LOG_ID_FILE);
        let log_id = read_or_create_log_id(&path).map_err(|error| EgressError::LogId { path, error })?;
        let counts = Arc::new(EgressCounts::default());
        let stop = watch::Sender::new(None);
        let follower = EgressFollower {
            log_id,
            stream: stream.name.clone(),
            hold: log.hold_with_room(),
            log: log.clone(),
            outlet: Outlet::new(nats, settings),
            runtime: Handle::current(),
            stop: stop.subscribe(),
            counts: counts.clone(),
            read: None,
            under_way: VecDeque::new(),
            stored: None,
            gone: 0,
            gone_counted: 0,
            report: EgressSkipReport::default(),
        };
        let control = FollowerControl::new(&EGRESS_PROFILE);
        control.start(follower, log)?;
        Ok(Self { control, stop, counts })
    }

    /// The present error, while egress fails.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble()
    }

    /// The position of egress and its counts.
    pub fn counts(&self) -> &EgressCounts {
        &self.counts
    }

    /// Sends what the log already has, within the deadline and if NATS is there, and ends the thread. The
    /// next start sends the rest.
    pub async fn stop(&self, deadline: Instant) {
        self.stop.send_replace(Some(deadline));
        self.control.stop(deadline).await;
    }
}

impl Drop for Egress {
    /// Ends the thread at once if nobody has stopped it.
    fn drop(&mut self) {
        let now = Instant::now();
        self.stop.send_replace(Some(now));
        self.control.stop_by(now);
    }
}

/// The thread.
struct EgressFollower {
    log_id: String,
    stream: String,
    log: Arc<dyn Log>,
    hold: Hold,
    outlet: Outlet,
    runtime: Handle,
    stop: watch::Receiver<Option<Instant>>,
    counts: Arc<EgressCounts>,
    /// The first offset that was not read from the log. `None` while the outlet is not open.
    read: Option<Offset>,
    /// Sequence and offset of what was sent and is not known to be stored.
    under_way: VecDeque<(u64, Offset)>,
    /// The newest sequence that this process knows to be stored, and the offset after its record.
    stored: Option<(u64, Offset)>,
    /// Records that the log removed unsent; the next message reports them.
    gone: u64,
    /// Removed records below this offset are counted already.
    gone_counted: Offset,
    report: EgressSkipReport,
}

impl Consumer for EgressFollower {
    type RoundError = EgressRoundError;

    fn round(&mut self) -> Result<NextRound, EgressRoundError> {
        let runtime = self.runtime.clone();
        let mut stop = self.stop.clone();
        let round = runtime.block_on(async {
            tokio::select! {
                round = self.forward() => round,
                () = wait_for_deadline(&mut stop) => Err(EgressRoundError::Late),
            }
        });
        if round.is_err() {
            self.read = None;
        }
        self.report.warn_if_due();
        round
    }

    fn cursor(&self) -> Offset {
        // The follower waits for the first record that was not read.
        self.read.unwrap_or_else(|| self.counts.cursor())
    }

    fn end(self) {}
}

/// Returns at the deadline for the end. Pends until one is set.
async fn wait_for_deadline(stop: &mut watch::Receiver<Option<Instant>>) {
    let at = match stop.wait_for(Option::is_some).await {
        Ok(at) => *at,
        Err(_) => None,
    };
    if let Some(at) = at {
        tokio::time::sleep_until(at.into()).await;
    }
}

impl EgressFollower {
    /// Sends the next records of the log, about one read's worth.
    async fn forward(&mut self) -> Result<NextRound, EgressRoundError> {
        let read = match self.read {
            Some(read) => {
                self.outlet.check()?;
                read
            }
            None => self.open().await?,
        };
        let first = self.log.first_offset();
        if read < first {
            self.skip_removed(read, first);
        } else if read < self.log.next_offset() {
            match self.log.read(read, EGRESS_READ_BYTES) {
                // Retention removed it just now; the next round skips it.
                Err(LogReadError::Removed { first, .. }) if first > read => return Ok(NextRound::Again),
                batches => {
                    let batches = batches?;
                    let Some(last) = batches.last() else { return Err(EgressRoundError::NoRecords(read)) };
                    let left_out = self.log.withheld().now();
                    let records = batches.iter().flat_map(|batch| batch.records());
                    for record in records.filter(|record| record.offset >= read) {
                        if !left_out.contains(&record) {
                            self.send(&record).await?;
                        }
                    }
                    self.read = Some(last.next_offset());
                }
            }
        } else if self.under_way.is_empty() {
            return Ok(NextRound::AtTail);
        } else {
            self.outlet.settle().await?;
        }
        self.note_stored();
        Ok(NextRound::Again)
    }

    /// Sends one record, or counts why it cannot be sent.
    async fn send(&mut self, record: &RecordRef<'_>) -> Result<(), EgressRoundError> {
        let skipped = match message_of_record(record, &self.log_id, self.gone) {
            Ok(message) => match self.outlet.send(message).await {
                Ok(sequence) => {
                    self.gone = 0;
                    self.under_way.push_back((sequence, record.offset));
                    return Ok(());
                }
                Err(error @ OutletError::TooLarge { .. }) => (EgressSkipReason::Size, error.to_string()),
                Err(error) => return Err(error.into()),
            },
            Err(error) => (EgressSkipReason::Topic, error.to_string()),
        };
        let (why, detail) = skipped;
        // A record that is read again after an error is counted only once.
        if self.report.seen.is_none_or(|seen| record.offset > seen) {
            self.report.seen = Some(record.offset);
            self.counts.skipped[why as usize].fetch_add(1, Ordering::Relaxed);
            self.report.add(record, detail);
        }
        Ok(())
    }

    /// Opens the outlet and finds the first record that is not on the stream.
    async fn open(&mut self) -> Result<Offset, EgressRoundError> {
        let last = self.outlet.open().await?;
        let next = match self.resume_offset(&last)? {
            Some(next) => next,
            None => {
                let first = self.log.first_offset();
                if last.sequence > 0 {
                    warn!(
                        stream = self.stream,
                        from = first,
                        "the stream is empty and does not say how far it was; it gets all that the log has"
                    );
                }
                first
            }
        };
        // Messages in flight that the stream has were sent, although no answer said so.
        let arrived = self.under_way.iter().take_while(|(_, offset)| *offset < next).count();
        self.counts.sent.fetch_add(arrived as u64, Ordering::Relaxed);
        self.under_way.clear();
        self.gone = 0;
        self.stored = Some((last.sequence, next));
        self.set_cursor(next);
        self.read = Some(next);
        info!(stream = self.stream, sequence = last.sequence, offset = next, "the stream on NATS is open");
        Ok(next)
    }

    /// The offset after the last record on the stream. `None` if the stream does not say.
    fn resume_offset(&self, last: &OutletPosition) -> Result<Option<Offset>, EgressRoundError> {
        let stream = || self.stream.clone();
        // What was stored and then deleted is not sent again, as far as this process knows of it.
        let known = self.stored.filter(|(sequence, _)| (1..=last.sequence).contains(sequence));
        let Some(message) = &last.message else { return Ok(known.map(|(_, next)| next)) };
        let Some(offset) = record_offset_of(message, &self.log_id) else {
            return Err(EgressRoundError::ForeignMessage { stream: stream(), sequence: message.sequence });
        };
        let log_end = self.log.next_offset();
        if offset >= log_end {
            return Err(EgressRoundError::LogBehind { stream: stream(), offset, log_end });
        }
        match self.log.read(offset, 1) {
            Ok(batches) => {
                let mut records = batches.iter().flat_map(|batch| batch.records());
                let record = records.find(|record| record.offset == offset);
                if record.is_some_and(|record| !is_message_of_record(message, &record, &self.log_id)) {
                    return Err(EgressRoundError::RecordDiffers { stream: stream(), offset });
                }
            }
            Err(LogReadError::Removed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Some(known.map_or(offset + 1, |(_, next)| next.max(offset + 1))))
    }

    /// Resumes at `to`, where the log begins.
    fn skip_removed(&mut self, from: Offset, to: Offset) {
        self.gone += to - from;
        // After an error the same records are skipped again, and not counted twice.
        let news = to.saturating_sub(from.max(self.gone_counted));
        if news > 0 {
            let (stream, records) = (&self.stream, news);
            error!(stream, from, to, records, "records have left the log before NATS took them");
            self.counts.skipped[EgressSkipReason::Gone as usize].fetch_add(news, Ordering::Relaxed);
            self.gone_counted = to;
        }
        self.read = Some(to);
    }

    /// Moves what is known to be stored out of `under_way`.
    fn note_stored(&mut self) {
        let stored = self.outlet.stored();
        let count = self.under_way.partition_point(|(sequence, _)| *sequence <= stored);
        let newest = self.under_way.drain(..count).next_back();
        if let Some((sequence, offset)) = newest {
            self.stored = Some((sequence, offset + 1));
            self.counts.sent.fetch_add(count as u64, Ordering::Relaxed);
            self.set_cursor(offset + 1);
        }
        if let (true, Some(read)) = (self.under_way.is_empty(), self.read) {
            self.set_cursor(read);
        }
    }

    fn set_cursor(&self, cursor: Offset) {
        self.counts.cursor.store(cursor, Ordering::Release);
        self.hold.set(cursor);
    }
}

/// Records that could not be sent since the last report.
#[derive(Default)]
struct EgressSkipReport {
    records: u64,
    /// One of them.
    example: String,
    said_at: Option<Instant>,
    /// The newest offset that was counted.
    seen: Option<Offset>,
}

impl EgressSkipReport {
    fn add(&mut self, record: &RecordRef<'_>, why: String) {
        if self.records == 0 {
            self.example.clear();
            let RecordRef { offset, datasource, topic, .. } = record;
            // Writing to a string does not fail.
            let _ = write!(self.example, "{datasource} {topic:?} at offset {offset}: {why}");
        }
        self.records += 1;
    }

    /// Logs what could not be sent, at most once a minute.
    fn warn_if_due(&mut self) {
        if self.records > 0 && self.said_at.is_none_or(|at| at.elapsed() >= EGRESS_REPORT_INTERVAL) {
            let (records, example) = (self.records, &self.example);
            warn!(records, example, "records cannot go to the stream on NATS");
            self.records = 0;
            self.said_at = Some(Instant::now());
        }
    }
}

/// The id that distinguishes this log from all others: made at its first use and never changed.
fn read_or_create_log_id(path: &Path) -> io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut random = [0; 6];
    SysRng.try_fill_bytes(&mut random).map_err(io::Error::other)?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    // Written whole or not at all: with another id the stream would take this for another log.
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    writeln!(file, "{id}")?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(id)
}
