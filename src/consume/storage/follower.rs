//! The thread that follows the log into a sink.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
use super::{StorageError, StorageProgress, unopened_words};
use crate::consume::follower::{Consumer, NextRound};
use crate::log::{Log, LogReadError};
use crate::message::Offset;
use crate::observe::spans::StoreSpan;
use crate::scheduler::lower_priority;

/// About how much of the log one transaction takes.
const STORAGE_TRANSACTION_BYTES: usize = 8 << 20;
/// The least time between the starts of two small transactions, ...
const SMALL_TRANSACTION_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// ... which is so many times as long as the first one takes: a transaction writes the newest values of each of its topics, so
/// that fewer of them leave the processors to others. But a record is to be read back soon.
const SMALL_TRANSACTION_INTERVAL_TIMES: u32 = 3;
const SMALL_TRANSACTION_INTERVAL_MAX: Duration = Duration::from_millis(100);
/// A transaction of fewer records than this is small.
const SMALL_TRANSACTION_RECORDS: u64 = 4096;
/// How often a transaction is synced, so that the log may remove what it holds.
const STORAGE_SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// How often a gateway that does not write looks how far the one that does is.
const OTHER_WRITER_INTERVAL: Duration = Duration::from_millis(250);

/// Why a round of the thread failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StorageRoundError {
    #[error(transparent)]
    Sink(#[from] SinkFault),
    #[error("{}", unopened_words(.0))]
    Unopened(SinkFault),
    #[error(transparent)]
    Start(StorageError),
    #[error(transparent)]
    Log(#[from] LogReadError),
    #[error("the log has records from {0} on and gives none")]
    NoRecords(Offset),
}

/// The thread.
pub(super) struct StorageFollower {
    place: Box<dyn SinkPlace>,
    log: Arc<dyn Log>,
    /// `None` after an error that leaves its state in doubt, and until the sink was opened at all.
    sink: Option<Box<dyn RecordSink>>,
    /// Where the log ended at the start, until the sink was opened.
    unopened: Option<Offset>,
    shared: Arc<StorageProgress>,
    synced_at: Option<Instant>,
    /// By how much to lower the thread's priority; `None` once that is done.
    nice: Option<u8>,
}

/// What a round has done.
enum StorageRound {
    Stored {
        records: u64,
    },
    /// Nothing is to be stored, and a purge has more to remove.
    Purged,
    AtTail,
    /// Another gateway writes into the sink.
    OtherWriter,
}

impl Consumer for StorageFollower {
    type RoundError = StorageRoundError;

    fn round(&mut self) -> Result<NextRound, StorageRoundError> {
        if let Some(nice) = self.nice.take() {
            lower_priority(nice);
        }
        let done = self.try_round();
        if let Err(error) = &done {
            self.shared.note_error(error.to_string());
        }
        done
    }

    fn cursor(&self) -> Offset {
        self.sink.as_ref().map_or_else(|| *self.shared.cursor.borrow(), |sink| sink.cursor())
    }

    fn may_recover(&self) -> bool {
        self.unopened.is_none()
    }

    fn end(self) {
        let Some(mut sink) = self.sink else { return };
        match sink.finish() {
            Ok(()) => self.shared.hold.set(sink.durable_cursor()),
            Err(error) => {
                warn!(%error, sink = self.place.kind().as_str(), "what is stored could not be tidied up")
            }
        }
    }
}

impl StorageFollower {
    /// A thread, not started yet, that continues at the cursor of `sink` and lowers its priority by `nice`. Without a
    /// sink it opens that, as a start at `log_end` would.
    pub(super) fn new(
        place: Box<dyn SinkPlace>,
        sink: Option<Box<dyn RecordSink>>,
        log: Arc<dyn Log>,
        log_end: Offset,
        shared: Arc<StorageProgress>,
        nice: u8,
    ) -> Self {
        let unopened = sink.is_none().then_some(log_end);
        Self { place, log, sink, unopened, shared, synced_at: None, nice: Some(nice) }
    }

    fn try_round(&mut self) -> Result<NextRound, StorageRoundError> {
        let begun = Instant::now();
        if let Some(log_end) = self.unopened {
            self.open_late(log_end)?;
        }
        let round = self.store().and_then(|round| {
            if let (Some(sink), Some(limits)) = (&mut self.sink, self.shared.limits.get()) {
                sink.keep_within(limits, begun.elapsed())?;
            }
            Ok(round)
        });
        self.shared.warning.set(self.sink.as_ref().and_then(|sink| sink.warning()));
        if let Err(StorageRoundError::Sink(error)) = &round
            && !error.is_clean_rollback()
        {
            self.sink = None;
            // Once only: a disk that damages one file after the other needs an operator.
            if error.is_damage() && self.shared.set_aside.lock().is_none() {
                error!(%error, "storage");
                self.begin_anew()?;
                return Ok(NextRound::Again);
            }
        }
        Ok(match round? {
            StorageRound::AtTail => NextRound::AtTail,
            StorageRound::OtherWriter => NextRound::Elsewhere(OTHER_WRITER_INTERVAL),
            StorageRound::Stored { records } if records < SMALL_TRANSACTION_RECORDS => {
                let took = begun.elapsed();
                let interval = (took * SMALL_TRANSACTION_INTERVAL_TIMES)
                    .clamp(SMALL_TRANSACTION_INTERVAL_MIN, SMALL_TRANSACTION_INTERVAL_MAX);
                NextRound::After(interval.saturating_sub(took))
            }
            StorageRound::Stored { .. } | StorageRound::Purged => NextRound::Again,
        })
    }

    /// Opens the sink that was not opened at the start. The log has gone on since then: what the sink
    /// has behind the end that it had is set aside without asking, because its offsets are given anew already.
    fn open_late(&mut self, log_end: Offset) -> Result<(), StorageRoundError> {
        let OpenedSink { sink, said } =
            self.place.open(&*self.log, log_end, true).map_err(|error| match error {
                StorageError::Sink(error) => StorageRoundError::Unopened(error),
                error => StorageRoundError::Start(error),
            })?;
        self.unopened = None;
        if said.is_some() {
            *self.shared.set_aside.lock() = said;
        }
        self.take_over(sink);
        Ok(())
    }

    /// Goes on with another sink.
    fn take_over(&mut self, sink: Box<dyn RecordSink>) {
        self.shared.withheld.send_replace(sink.withheld_version());
        self.shared.cursor.send_replace(sink.stored_cursor());
        self.sink = Some(sink);
    }

    /// Goes on with another one, which begins where the log begins.
    fn begin_anew(&mut self) -> Result<(), SinkFault> {
        // The log keeps all that it has until the new one has it.
        self.shared.hold.set(0);
        // Whoever waits until something is stored waits for the new one, also if it cannot be made at once.
        self.shared.cursor.send_replace(0);
        self.shared.withheld.send_replace(0);
        let OpenedSink { sink, said } = self.place.begin_anew(&*self.log)?;
        *self.shared.set_aside.lock() = said;
        self.take_over(sink);
        Ok(())
    }

    /// Stores the next records of the log, as many as one transaction takes.
    fn store(&mut self) -> Result<StorageRound, StorageRoundError> {
        let sink = match &mut self.sink {
            Some(sink) => sink,
            None => self.sink.insert(self.place.reopen()?),
        };
        let is_writer = sink.is_writer()?;
        self.shared.is_writer.send_replace(is_writer);
        if !is_writer {
            self.shared.withheld.send_replace(sink.withheld_version());
            self.shared.hold.set(sink.durable_cursor());
            self.shared.cursor.send_replace(sink.stored_cursor());
            return Ok(StorageRound::OtherWriter);
        }
        let (cursor, was_stored) = (sink.cursor(), sink.stored_cursor());
        let sync = self.synced_at.is_none_or(|at| at.elapsed() >= STORAGE_SYNC_INTERVAL);
        let first = self.log.first_offset();
        let has_records = cursor >= first && cursor < self.log.next_offset();
        let batches = match has_records {
            true => self.log.read(cursor, STORAGE_TRANSACTION_BYTES),
            false => Ok(Vec::new()),
        };
        // What was read comes after the rules that say which incarnation it is of: they are followed first.
        let withheld = self.log.withheld();
        // Also a sink that was just opened has to get the rules.
        let mut is_reconciled = true;
        if sink.withheld_version() < withheld.version() || !sink.has_rules() {
            is_reconciled = sink.reconcile_some(withheld)?;
            self.shared.withheld.send_replace(sink.withheld_version());
        }
        if sink.cursor() != cursor {
            // Another writer has come on, and the sink goes on behind that: what was read is not what comes next.
            return Ok(StorageRound::Stored { records: 0 });
        }
        // Rules are followed also while the log cannot be read.
        let batches = batches?;
        if cursor < first {
            sink.store(&mut std::iter::empty(), first, sync)?;
            error!(
                from = cursor,
                to = first,
                records = first - cursor,
                "records that were never stored are no longer in the log: storage goes on without them"
            );
        } else if has_records {
            let Some(last) = batches.last() else { return Err(StorageRoundError::NoRecords(cursor)) };
            let span = StoreSpan::begin();
            sink.store(&mut batches.iter().flat_map(|batch| batch.records()), last.next_offset(), sync)?;
            span.end(self.place.kind().as_str(), cursor, last.next_offset());
        } else if sync && sink.durable_cursor() < cursor {
            sink.store(&mut std::iter::empty(), cursor, sync)?;
        } else {
            sink.end_catching_up()?;
            let (stored, told) = (sink.stored_cursor(), *self.shared.cursor.borrow());
            // Also what a transaction has stored whose answer was lost.
            if stored != told {
                self.shared.hold.set(sink.durable_cursor());
                self.shared.cursor.send_replace(stored);
                self.shared.pace.lock().note(Instant::now(), stored.saturating_sub(told));
            }
            return Ok(if is_reconciled { StorageRound::AtTail } else { StorageRound::Purged });
        }
        if sync {
            self.synced_at = Some(Instant::now());
            self.shared.hold.set(sink.durable_cursor());
        }
        let stored = sink.stored_cursor();
        self.shared.cursor.send_replace(stored);
        self.shared.pace.lock().note(Instant::now(), stored.saturating_sub(was_stored));
        Ok(StorageRound::Stored { records: sink.cursor().saturating_sub(cursor) })
    }
}
