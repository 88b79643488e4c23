//! Following: brings every message of the stream, from any gateway, into this node's tail, which serves
//! the readers and the router. JetStream pushes the messages, except while this gateway takes its own records
//! as they are acknowledged ([`own`](super::own)).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use headgate_bridge_nats::stream::{StoredMessage, StreamFollower};
use tracing::warn;

use super::JetstreamLogShared;
use super::exchange_rows::note_exchange;
use super::fences::fenced_key;
use super::own::AloneMode;
use crate::log::nats_message::{ParsedTimeCache, decode_record};
use crate::log::{Batch, Section};
use crate::message::Offset;

/// Messages that make up one batch, and their bytes.
const FOLLOW_BATCH_MESSAGES_MAX: usize = 1024;
const FOLLOW_BATCH_BYTES_MAX: usize = 1 << 20;

/// The following task: runs for as long as the log is open.
pub(super) struct JetstreamLogFollower {
    shared: Arc<JetstreamLogShared>,
    follower: StreamFollower,
    own: AloneMode,
    stored: Vec<StoredMessage>,
    /// The follower's consumer whose stream was found to be the one that was followed.
    confirmed_feed: u64,
}

impl JetstreamLogFollower {
    /// A task that begins where the tail ends.
    pub(super) fn new(shared: Arc<JetstreamLogShared>, follower: StreamFollower, own: AloneMode) -> Self {
        Self { shared, follower, own, stored: Vec::new(), confirmed_feed: 0 }
    }

    /// Runs until it is aborted.
    pub(super) async fn run(mut self) {
        loop {
            tokio::select! {
                message = self.follower.next(), if !self.own.is_alone() => {
                    match self.confirm_feed().await {
                        true => self.take_messages(message),
                        // It may be of the stream that was in the place of the right one.
                        false => self.follower.seek(self.next_offset()),
                    }
                }
                () = self.own.wake() => {}
            }
            while let Some(run) = self.own.next_run(self.next_offset()) {
                // Everything before it is in the tail, so every fence before it is known.
                if run.has_fenced(&self.shared.fences) {
                    self.own.end(self.next_offset());
                    self.follower.seek(self.next_offset());
                    break;
                }
                self.follower.pause();
                self.push(Batch::gather(run.first, &run.sections));
            }
            let next = self.next_offset();
            if self.own.has_to_resume(next) {
                self.follower.seek(next);
            }
        }
    }

    fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// Before anything of another consumer is taken: waits until the stream is known to be the one that was followed.
    /// `false` if it was another one meanwhile.
    async fn confirm_feed(&mut self) -> bool {
        let feed = self.follower.feeds();
        if self.confirmed_feed != feed {
            if !self.shared.gate.confirm().await {
                return false;
            }
            self.confirmed_feed = feed;
        }
        true
    }

    /// Takes a message and all that have come with it, up to where the gateway's own records continue.
    fn take_messages(&mut self, message: StoredMessage) {
        let end = self.own.continues_at();
        let (mut bytes, mut message) = (0, Some(message));
        // A consumer that ends meanwhile has no successor before the next turn.
        while let Some(stored) = message.take_if(|stored| stored.sequence < end) {
            bytes += stored.payload.len();
            self.stored.push(stored);
            if self.stored.len() < FOLLOW_BATCH_MESSAGES_MAX && bytes < FOLLOW_BATCH_BYTES_MAX {
                message = self.follower.try_next();
            }
        }
        let at_end = message.is_some();
        let mut stored = std::mem::take(&mut self.stored);
        let shut_out = |message: &StoredMessage| self.shared.fences.note_shut_out(message);
        let batches = gather_batches(&stored, self.next_offset(), &self.shared, shut_out);
        // Now all fences among them are known: what is behind one has opened nothing.
        let records = stored.iter().filter(|message| !self.shared.fences.shut_out(message));
        records.for_each(|message| note_exchange(&self.shared, message));
        batches.into_iter().for_each(|batch| self.push(batch));
        stored.clear();
        self.stored = stored;
        // The stream has no records between here and `end`.
        if at_end && self.next_offset() < end {
            self.push(Batch::nothing_below(end));
        }
    }

    /// Puts a batch into the tail, and calls the listener.
    fn push(&self, batch: Batch) {
        self.shared.tail.push(batch.clone());
        if let Some(listener) = self.shared.listener.get() {
            listener(&batch);
        }
    }
}

/// Gathers messages into batches, in order; `next` is the first possible offset. A batch without records
/// covers missing messages and messages that are not records. `shut_out` is called for each that is behind the fence of
/// its key.
pub(super) fn gather_batches(
    messages: &[StoredMessage],
    mut next: Offset,
    shared: &JetstreamLogShared,
    shut_out: impl Fn(&StoredMessage),
) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut sections: Vec<Section> = Vec::new();
    let mut last_time = ParsedTimeCache::default();
    let mut first = next;
    // The offset behind all that the batches cover.
    let mut said = next;
    for message in messages {
        if message.sequence > next {
            flush_sections(&mut sections, first, &mut said, &mut batches);
        }
        next = message.sequence + 1;
        if let Some(key_id) = fenced_key(message) {
            shared.fences.raise(key_id, message.sequence);
            flush_sections(&mut sections, first, &mut said, &mut batches);
            continue;
        }
        if shared.fences.shut_out(message) {
            shut_out(message);
            flush_sections(&mut sections, first, &mut said, &mut batches);
            continue;
        }
        let begins = sections.is_empty();
        if decode_record(message, &mut last_time, &mut sections) {
            if begins {
                first = message.sequence;
                if first > said {
                    batches.push(Batch::nothing_below(first));
                }
            }
            continue;
        }
        let seen = shared.foreign.fetch_add(1, Ordering::Relaxed);
        if seen.is_power_of_two() || seen == 0 {
            let (stream, sequence) = (shared.stream.name(), message.sequence);
            warn!(
                stream,
                sequence,
                messages = seen + 1,
                "a message of the stream is not a record of Headgate; it is skipped"
            );
        }
        flush_sections(&mut sections, first, &mut said, &mut batches);
    }
    flush_sections(&mut sections, first, &mut said, &mut batches);
    if next > said {
        batches.push(Batch::nothing_below(next));
    }
    batches
}

/// Makes a batch of the gathered sections.
fn flush_sections(sections: &mut Vec<Section>, first: Offset, said: &mut Offset, batches: &mut Vec<Batch>) {
    if !sections.is_empty() {
        let batch = Batch::gather(first, sections);
        *said = batch.next_offset();
        batches.push(batch);
        sections.clear();
    }
}
