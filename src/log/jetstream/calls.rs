//! The calls of the log in a cluster: what everybody else asks of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::warn;

use super::append::{AppenderCommand, JetstreamSubmission};
use super::exchange_rows::write_last_rows;
use super::fences::fence_keys;
use super::watch::STREAM_CHECK_INTERVAL;
use super::{FOLLOW_CATCH_UP_TIMEOUT, JetstreamLog, LogHistory, read};
use crate::log::nats_message::RECORD_HEADERS_BYTES_MAX;
use crate::log::retention::Hold;
use crate::log::withheld::WithheldRules;
use crate::log::{
    AppendError, Batch, BatchListener, FencedListener, Log, LogFuture, LogReadError, OnceId, PendingCommit,
    RecordTooLarge, Section,
};
use crate::message::{KeyId, Offset, TimeMicros};
use crate::subject::{SubjectError, check_topic_has_subject};

impl Log for JetstreamLog {
    fn withheld(&self) -> &Arc<WithheldRules> {
        &self.shared.withheld
    }

    fn check_topic(&self, topic: &str) -> Result<(), SubjectError> {
        check_topic_has_subject(topic)
    }

    fn check_size(&self, payload: usize, properties: usize) -> Result<(), RecordTooLarge> {
        let bytes_max = self.shared.stream.nats().client().max_payload();
        // Properties are base64 in a header.
        let bytes = payload + properties.div_ceil(3) * 4 + RECORD_HEADERS_BYTES_MAX;
        match bytes > bytes_max {
            true => Err(RecordTooLarge { bytes, bytes_max, limit: "max_payload of nats-server" }),
            false => Ok(()),
        }
    }

    /// Each record is a separate message: a failed call may have kept some of them.
    fn append(&self, sections: Vec<Section>, give_up_at: Instant) -> PendingCommit {
        let (reply, committed) = oneshot::channel();
        // If the task has ended, the log is closed.
        if let Err(refused) =
            self.commands.send(AppenderCommand::Append(JetstreamSubmission { sections, give_up_at, reply }))
            && let AppenderCommand::Append(submission) = refused.0
        {
            let _ = submission.reply.send(Err(AppendError::Closed));
        }
        committed
    }

    fn release(&self, ids: Vec<OnceId>, give_up_at: Instant) -> PendingCommit {
        let (reply, committed) = oneshot::channel();
        let rows = self.shared.exchanges.close(&ids);
        if rows.is_empty() {
            self.shared.once.release(ids, give_up_at, reply);
            return committed;
        }
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            match shared.rows.remove(&rows, give_up_at).await {
                Ok(()) => shared.once.release(ids, give_up_at, reply),
                Err(error) => _ = reply.send(Err(AppendError::Away(error.to_string().into()))),
            }
        });
        committed
    }

    /// Returns when every earlier append is acknowledged or has failed. It does not return while NATS is
    /// away and messages in flight at the loss may still arrive.
    fn barrier(&self) -> LogFuture<'_, ()> {
        let (reply, passed) = oneshot::channel();
        let sent = self.commands.send(AppenderCommand::Barrier(reply));
        Box::pin(async move {
            if sent.is_ok() {
                drop(passed.await);
            }
            let (lost_track, stream) = (&self.shared.lost_track, &self.shared.stream);
            if lost_track.load(Ordering::Acquire) {
                // A flush comes after all that the connection was given; the stream's answer comes after
                // all that the server received.
                while stream.nats().client().flush().await.is_err() || stream.state().await.is_err() {
                    tokio::time::sleep(STREAM_CHECK_INTERVAL).await;
                }
                lost_track.store(false, Ordering::Release);
            }
        })
    }

    fn fence(&self, keys: Vec<KeyId>) -> LogFuture<'_, ()> {
        // It goes on if the caller does not wait.
        let fenced = tokio::spawn(fence_keys(self.shared.clone(), keys));
        Box::pin(async move { drop(fenced.await) })
    }

    fn shared_id_window(&self) -> Option<Duration> {
        Some(self.shared.id_window)
    }

    fn fenced_records(&self) -> u64 {
        self.shared.fences.shut_out_count()
    }

    fn listen_fenced(&self, listener: FencedListener) {
        let _ = self.shared.fences.listener.set(listener);
    }

    fn sync(&self) -> LogFuture<'_, Result<(), AppendError>> {
        Box::pin(async move {
            let rows = async {
                self.shared.rows.sync().await.map_err(|error| AppendError::Away(error.to_string().into()))
            };
            tokio::try_join!(self.shared.once.sync(), rows).map(drop)
        })
    }

    fn first_offset(&self) -> Offset {
        self.shared.first_offset.load(Ordering::Acquire)
    }

    fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// The end of the stream, from its leader.
    fn end(&self) -> LogFuture<'_, Result<Offset, AppendError>> {
        Box::pin(async move {
            let state = self.shared.stream.state().await;
            state.map(|state| state.last + 1).map_err(|error| AppendError::Away(error.to_string().into()))
        })
    }

    fn catch_up(&self, offset: Offset) -> LogFuture<'_, Result<(), AppendError>> {
        Box::pin(async move {
            if self.next_offset() >= offset {
                return Ok(());
            }
            let end = self.end().await?.min(offset);
            let mut followed = self.shared.tail.subscribe();
            let caught_up = followed.wait_for(|next| *next >= end);
            match tokio::time::timeout(FOLLOW_CATCH_UP_TIMEOUT, caught_up).await {
                // Never fails: the sender is in `shared`.
                Ok(_) => Ok(()),
                Err(_) => {
                    let next = self.next_offset();
                    let words = format!("this gateway has followed the stream only to {next} of {end}");
                    Err(AppendError::Away(words.into()))
                }
            }
        })
    }

    fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, LogReadError> {
        if let Some(doubt) = self.doubt() {
            return Err(LogReadError::Away(doubt.into()));
        }
        match self.read_recent(from, bytes_max) {
            Some(batches) => Ok(batches),
            None => self.block_on_read(read::read_from_servers(self.shared.clone(), from, bytes_max)),
        }
    }

    fn read_recent(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>> {
        // A stream has no message at 0.
        if from == 0 && self.first_offset() == 0 && self.next_offset() == 1 {
            return Some(vec![Batch::nothing_below(1)]);
        }
        if self.shared.gate.is_closed() {
            return None;
        }
        self.shared.tail.read(from, bytes_max)
    }

    /// Runs the listener on the task that follows the stream.
    fn listen(&self, listener: BatchListener) {
        let _ = self.shared.listener.set(listener);
    }

    fn wait_blocking(&self, offset: Offset, timeout: Duration) {
        self.shared.tail.wait(offset, timeout);
    }

    fn offset_at(&self, time: TimeMicros) -> Result<Offset, LogReadError> {
        self.block_on_read(read::offset_at_server_time(self.shared.clone(), time))
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
        let shared = &self.shared;
        let nats = shared.stream.nats().trouble().or_else(|| shared.following.trouble());
        nats.or_else(|| shared.gate.doubt())
            .or_else(|| shared.stream_trouble.current())
            .or_else(|| shared.append_trouble.current())
            .or_else(|| shared.clock_trouble.current())
    }

    fn is_in_doubt(&self) -> bool {
        self.shared.gate.is_in_doubt()
    }

    fn doubt(&self) -> Option<String> {
        self.shared.gate.doubt()
    }

    fn history(&self) -> Option<&LogHistory> {
        self.shared.history.get()
    }

    fn warning(&self) -> Option<String> {
        self.shared.report_warning.current()
    }

    fn close(&self) -> LogFuture<'_, ()> {
        let appender = self.appender.lock().take();
        let _ = self.commands.send(AppenderCommand::Close);
        Box::pin(async move {
            if let Some(appender) = appender
                && appender.await.is_err()
            {
                warn!("the log's appender has failed");
            }
            write_last_rows(&self.shared).await;
            // Stopped so that consumers can end: later records of other gateways wait for the next start.
            self.follower.abort();
        })
    }
}
