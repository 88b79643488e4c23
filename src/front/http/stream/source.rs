//! What a stream's chunks are made of: the records that its feed gives, as many as its client takes, and heartbeats.
//!
//! Nothing is taken from the feed without room for it, so a slow client falls behind in the log and costs no memory, as
//! an MQTT subscriber does. Between two chunks a stream holds no turn: its client may take its time.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use tracing::{debug, warn};

use super::super::HttpFrontState;
use super::super::answer::AnswerHold;
use super::super::request_clock::StreamUnderWay;
use super::event::{StreamForm, record_bytes_max};
use super::reader::{ChunkSource, StreamEnd, StreamReader};
use crate::auth::{Grant, GrantDenial, Scope};
use crate::consume::subscriber::{FeedItem, MatchedRecords, OutputCover, SubscriberFeed};
use crate::limits::{
    DELIVERY_STEPS_MAX, HTTP_REQUEST_BYTES, OUTPUT_FREE_BYTES, STREAM_BYTES_PER_TURN, STREAM_CHUNK_BYTES,
};
use crate::log::LogReadError;
use crate::message::{DatasourceId, Offset, Transport};
use crate::shares::ShareCharge;

/// How long a client that may have gone has to say so.
const STREAM_PROBE_PAUSE: Duration = Duration::from_millis(200);

/// What a stream begins with.
pub(super) struct SourceParts {
    pub(super) shared: Arc<HttpFrontState>,
    /// Under which it is read.
    pub(super) grant: Grant,
    /// The incarnation of the datasource.
    pub(super) scope: DatasourceId,
    pub(super) form: StreamForm,
    /// Its place in the log, with its filter.
    pub(super) feed: SubscriberFeed,
    /// What it takes of its tenant's share.
    pub(super) held: ShareCharge,
    /// How often it says that it is there.
    pub(super) heartbeat: Duration,
}

/// Where a stream's chunks come from.
pub(super) struct StreamSource {
    parts: SourceParts,
    datasource: DatasourceId,
    /// The matched records that are being written.
    matched: Option<MatchedRecords>,
    cover: OutputCover,
    beat: Pin<Box<Sleep>>,
    is_begun: bool,
    is_over: bool,
    /// What was handed over since others had their turn, in bytes.
    turn_bytes: usize,
    /// What its request is charged for.
    hold: Option<AnswerHold>,
    /// Its connection is not idle.
    under_way: Option<StreamUnderWay>,
}

/// What the feed did.
#[derive(PartialEq, Eq)]
enum FillOutcome {
    /// The chunk is full, or waits for room.
    Stopped,
    /// There is nothing more for now.
    Drained,
}

impl StreamSource {
    pub(super) fn new(parts: SourceParts) -> Self {
        let cover = OutputCover::new(parts.feed.mailbox().share());
        let beat = Box::pin(tokio::time::sleep(parts.heartbeat));
        let (datasource, _) = parts.scope.of_scope();
        Self {
            datasource,
            matched: None,
            cover,
            beat,
            is_begun: false,
            is_over: false,
            turn_bytes: 0,
            hold: None,
            under_way: None,
            parts,
        }
    }
}

impl ChunkSource for StreamSource {
    fn scope(&self) -> &DatasourceId {
        &self.parts.scope
    }

    fn hold(&mut self, hold: AnswerHold) {
        self.hold = Some(hold);
    }

    fn note_under_way(&mut self, under_way: StreamUnderWay) {
        self.under_way = Some(under_way);
    }

    fn note_end(&self, why: StreamEnd) {
        if self.is_over {
            return;
        }
        let (datasource, key_id) = (&self.datasource, self.parts.grant.key_id());
        self.parts.shared.parts.metrics.count_stream_end(why.name());
        match why {
            StreamEnd::NotRead => {
                warn!(%datasource, %key_id, "a stream over HTTP was closed because its client takes nothing of it");
            }
            why => debug!(%datasource, %key_id, reason = why.name(), "a stream over HTTP has ended"),
        }
    }

    fn poll_chunk(&mut self, reader: &StreamReader, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let unsent = reader.unsent_bytes();
        self.cover.begin(unsent, unsent);
        self.charge(unsent);
        // Read first: what it is behind of, the feed has been given when it has nothing more.
        let routed = self.parts.shared.parts.subscribers.router.routed_offset();
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.is_begun, true) {
            self.parts.form.write_head(&mut out);
            self.write_heartbeat(routed, &mut out);
        }
        if let Some(why) = self.find_end(reader) {
            return Poll::Ready(Some(self.finish(why, routed, out)));
        }
        if self.turn_bytes >= STREAM_BYTES_PER_TURN {
            self.turn_bytes = 0;
            self.pause();
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let is_beat_due = self.is_beat_due(reader, cx);
        let outcome = match self.fill(reader, unsent, &mut out, cx) {
            Ok(outcome) => outcome,
            Err(error) => {
                warn!(datasource = %self.datasource, %error, "a stream over HTTP ends, because the log cannot be read");
                return Poll::Ready(Some(self.finish(StreamEnd::LogUnreadable, routed, out)));
            }
        };
        if is_beat_due {
            self.write_heartbeat(routed, &mut out);
        }
        if outcome == FillOutcome::Drained && out.is_empty() {
            // It has nothing to write: it keeps no place among those that wait for room.
            self.cover.suspend(unsent);
        } else {
            self.pause();
        }
        self.hand_over(reader, unsent, out, cx)
    }
}

impl StreamSource {
    /// Hands a chunk over, or waits if there is none. `unsent` bytes were not sent when it was begun.
    fn hand_over(
        &mut self,
        reader: &StreamReader,
        unsent: usize,
        out: Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Vec<u8>>> {
        if self.cover.is_needed() {
            // What it has of the share goes back when the client has taken what it is for.
            reader.await_room();
        }
        if !out.is_empty() {
            self.turn_bytes += out.len();
            return Poll::Ready(Some(out));
        }
        self.turn_bytes = 0;
        // A piece may have left before anybody asked to be woken by it.
        if reader.unsent_bytes() != unsent {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Why the stream has to end here, if it has to.
    fn find_end(&self, reader: &StreamReader) -> Option<StreamEnd> {
        let SourceParts { shared, grant, scope, .. } = &self.parts;
        let denied = grant.allows(Scope::Subscribe, self.datasource.as_str()).err();
        let told = reader.told();
        if denied.is_none() && told.is_none() {
            return None;
        }
        let present = shared.registry().datasource(self.datasource.as_str());
        if present.is_none_or(|present| present.scope() != *scope) {
            return Some(StreamEnd::DatasourceDeleted);
        }
        match denied {
            Some(GrantDenial::ExpiredToken) => Some(StreamEnd::TokenOver),
            Some(_) => Some(StreamEnd::KeyDead),
            None => told,
        }
    }

    /// The last part of the stream, which says why it ends.
    fn finish(&mut self, why: StreamEnd, routed: Offset, mut out: Vec<u8>) -> Vec<u8> {
        let next = self.position(routed);
        self.parts.form.write_end(&mut out, why, next);
        self.note_end(why);
        self.is_over = true;
        self.pause();
        out
    }

    /// Fills a chunk with what the feed has, as far as there is room for it.
    fn fill(
        &mut self,
        reader: &StreamReader,
        unsent: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Result<FillOutcome, LogReadError> {
        let is_over = self.hold.as_ref().is_some_and(|hold| hold.memory.account().is_over_to_send());
        if is_over && unsent > 0 {
            reader.await_room();
            return Ok(FillOutcome::Stopped);
        }
        // Who has nothing underway goes on in small steps whatever others hold under the key.
        let until = if is_over { OUTPUT_FREE_BYTES } else { STREAM_CHUNK_BYTES };
        loop {
            if let Some(mut matched) = self.matched.take() {
                if self.write_matched(&mut matched, until, unsent, out, cx) {
                    self.matched = Some(matched);
                    if out.is_empty() {
                        reader.await_room();
                    }
                    return Ok(FillOutcome::Stopped);
                }
                continue;
            }
            if out.len() >= until {
                return Ok(FillOutcome::Stopped);
            }
            match self.parts.feed.poll_next(cx) {
                Poll::Pending => return Ok(FillOutcome::Drained),
                Poll::Ready(Ok(FeedItem::Matched(matched))) => self.matched = Some(matched),
                Poll::Ready(Ok(FeedItem::Skipped(records))) => self.write_skipped(records, out),
                Poll::Ready(Err(error)) => return Err(error),
            }
        }
    }

    /// Writes matched records until there is no room. Returns whether some may be left.
    fn write_matched(
        &mut self,
        matched: &mut MatchedRecords,
        until: usize,
        unsent: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> bool {
        let batch = matched.batch().clone();
        let mut reader = batch.reader();
        let (mut steps, mut written) = (DELIVERY_STEPS_MAX, 0);
        let is_left = loop {
            let Some(hit) = matched.peek(&mut steps) else { break false };
            if out.len() >= until {
                break true;
            }
            let record = reader.read(hit.place);
            if self.cover.poll(unsent + out.len(), record_bytes_max(&record), cx).is_pending() {
                break true;
            }
            self.parts.form.write_record(out, &record);
            matched.advance();
            written += 1;
        };
        self.parts.shared.parts.metrics.count_delivered(Transport::Http, written);
        is_left
    }

    /// Says that retention has removed records before they were sent.
    fn write_skipped(&mut self, records: u64, out: &mut Vec<u8>) {
        let position = self.parts.feed.position();
        self.parts.form.write_skipped(out, records, position);
        self.parts.shared.parts.metrics.skipped.increment(records);
        warn!(
            datasource = %self.datasource, records, position,
            "retention has removed records before a stream over HTTP sent them"
        );
    }

    fn write_heartbeat(&mut self, routed: Offset, out: &mut Vec<u8>) {
        let next = self.position(routed);
        let log_end = self.parts.shared.parts.log.next_offset();
        self.parts.form.write_heartbeat(out, next, log_end, self.parts.heartbeat);
    }

    /// Whether it is time to say that it is there.
    fn is_beat_due(&mut self, reader: &StreamReader, cx: &mut Context<'_>) -> bool {
        let is_passed = self.beat.as_mut().poll(cx).is_ready();
        let pause = match reader.takes_probe() {
            true => STREAM_PROBE_PAUSE,
            false if is_passed => self.parts.heartbeat,
            false => return false,
        };
        let next = Instant::now() + pause;
        self.beat.as_mut().reset(next);
        // So that the next one wakes the task.
        let _ = self.beat.as_mut().poll(cx);
        true
    }

    /// The first record that was not sent and may be wanted. `routed` is the router's offset from before the feed was
    /// last asked.
    fn position(&self, routed: Offset) -> Offset {
        match self.matched.as_ref().and_then(MatchedRecords::peek_place) {
            Some(place) => place.offset,
            None => {
                let mailbox = self.parts.feed.mailbox();
                mailbox.set_progress(self.parts.feed.position(), true);
                mailbox.cursor(routed)
            }
        }
    }

    /// Lets others have its turn, since its client may take its time, and lets go of what it has read where its
    /// tenant's share has no room for it.
    fn pause(&mut self) {
        let feed = &mut self.parts.feed;
        feed.pause();
        let matched = self.matched.as_ref().map_or(0, MatchedRecords::weight);
        let held = (matched + feed.held_bytes()) as u64;
        if !self.parts.held.hold_stalled(held) {
            if let Some(place) = self.matched.take().as_ref().and_then(MatchedRecords::peek_place) {
                feed.rewind(place.offset);
            }
            feed.release();
        }
    }

    /// Charges for what its client has not taken.
    fn charge(&mut self, unsent: usize) {
        if let Some(hold) = &mut self.hold {
            hold.memory.set_held(HTTP_REQUEST_BYTES + unsent);
        }
    }
}
