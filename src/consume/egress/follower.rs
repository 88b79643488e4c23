//! The thread that follows the log into the stream on NATS.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use headgate_bridge_nats::stream::StoredMessage;
use headgate_bridge_nats::{Outlet, OutletError, OutletPosition};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::counts::{EgressCounts, EgressSkipReason, EgressSkipReport};
use super::log_id::{LogLineage, MessageOrigin};
use super::message::{is_message_of_record, message_of_record};
use crate::consume::follower::{Consumer, NextRound};
use crate::limits::EGRESS_READ_BYTES;
use crate::log::{Hold, IncarnationStep, Log, LogReadError, WithheldChange};
use crate::message::{Offset, RecordRef};
use crate::subject::SubjectSpace;

/// Why a round of the thread failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum EgressRoundError {
    #[error("cannot read or make {}: {error}. Put that right; it is tried again", path.display())]
    LogId { path: PathBuf, error: io::Error },
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
    #[error(
        "the stream {stream} has records up to offset {offset} of the log that this one was restored from, and this one \
         has its own from offset {end} on. Use another stream (nats.stream.name), or delete this one to have it made again \
         of what the log has"
    )]
    OtherHistory { stream: String, offset: Offset, end: Offset },
    #[error("egress did not finish by its deadline")]
    Late,
}

/// The thread.
pub(super) struct EgressFollower {
    log_id_path: PathBuf,
    /// Empty until it is read.
    lineage: LogLineage,
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
    /// The version of the rules about what is left out that the stream follows, since it was opened.
    followed: u64,
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
    /// A thread, not started yet, for the log whose id is in a file. Must be called in a tokio runtime.
    pub(super) fn new(
        log_id_path: PathBuf,
        stream: &str,
        log: Arc<dyn Log>,
        outlet: Outlet,
        stop: watch::Receiver<Option<Instant>>,
        counts: Arc<EgressCounts>,
    ) -> Self {
        Self {
            log_id_path,
            lineage: LogLineage::default(),
            stream: stream.to_owned(),
            hold: log.hold_with_room(),
            log,
            outlet,
            runtime: Handle::current(),
            stop,
            counts,
            read: None,
            under_way: VecDeque::new(),
            stored: None,
            followed: 0,
            gone: 0,
            gone_counted: 0,
            report: EgressSkipReport::default(),
        }
    }

    /// Sends the next records of the log, about one read's worth.
    async fn forward(&mut self) -> Result<NextRound, EgressRoundError> {
        let read = match self.read {
            Some(read) => {
                self.outlet.check()?;
                read
            }
            None => self.open().await?,
        };
        if self.followed < self.log.withheld().version() {
            self.forget_ended().await?;
        }
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
                    let mut left_out = self.log.withheld().now();
                    let records = batches.iter().flat_map(|batch| batch.records());
                    for record in records.filter(|record| record.offset >= read) {
                        // Sending takes long enough for a datasource to be deleted and created again.
                        if self.followed < self.log.withheld().version() {
                            self.forget_ended().await?;
                            left_out = self.log.withheld().now();
                        }
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

    /// Removes from the stream what it has of datasources that were deleted. Nothing of a datasource that was created
    /// again is sent before that; and what was sent since, by an earlier run, stays.
    async fn forget_ended(&mut self) -> Result<(), EgressRoundError> {
        let (changes, left_out) = self.log.withheld().changes_and_rules(self.followed);
        for change in &changes {
            let WithheldChange::Incarnation(datasource, _, IncarnationStep::Ended { .. }) = change else {
                continue;
            };
            let present = left_out.history(datasource.as_str()).and_then(|history| history.present());
            let lineage = &self.lineage;
            let is_behind = present.map(|(_, begins)| {
                move |message: &StoredMessage| {
                    lineage.offset_of(message).is_some_and(|offset| offset >= begins)
                }
            });
            for subjects in SubjectSpace::Stream.filter_wildcards(Some(datasource), "#") {
                self.outlet.forget(&subjects, is_behind).await?;
            }
        }
        self.followed += changes.len() as u64;
        Ok(())
    }

    /// Sends one record, or counts why it cannot be sent.
    async fn send(&mut self, record: &RecordRef<'_>) -> Result<(), EgressRoundError> {
        let skipped = match message_of_record(record, &self.lineage.id, self.gone) {
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
        if self.lineage.id.is_empty() {
            let path = &self.log_id_path;
            self.lineage = LogLineage::read_or_create(path)
                .map_err(|error| EgressRoundError::LogId { path: path.clone(), error })?;
        }
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
        self.followed = 0;
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
        let (offset, log_id) = match self.lineage.origin_of(message) {
            Some(MessageOrigin::Here { offset, log_id }) => (offset, log_id),
            Some(MessageOrigin::BehindRestore { offset, end }) => {
                return Err(EgressRoundError::OtherHistory { stream: stream(), offset, end });
            }
            None => {
                let sequence = message.sequence;
                return Err(EgressRoundError::ForeignMessage { stream: stream(), sequence });
            }
        };
        let log_end = self.log.next_offset();
        if offset >= log_end {
            return Err(EgressRoundError::LogBehind { stream: stream(), offset, log_end });
        }
        match self.log.read(offset, 1) {
            Ok(batches) => {
                let mut records = batches.iter().flat_map(|batch| batch.records());
                let record = records.find(|record| record.offset == offset);
                if record.is_some_and(|record| !is_message_of_record(message, &record, log_id)) {
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
