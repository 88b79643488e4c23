//! Fences: where in the stream a key ends. Every gateway that ends a key, or hears of it, puts a message into the stream
//! before it says so ([`KeyFences::raise`] remembers where it is). What lies behind it under that key is no record: for
//! no reader, no store and no subscriber of any gateway, and it is not acknowledged.
//!
//! A check before publishing cannot do that alone: a gateway, or a nats-server, that was paused has messages in its
//! queues and sockets, and they come in when it goes on, long after the key was dead everywhere else.
//!
//! A fence is in the stream for as long as the records around it, and is remembered for as long as that, and for an hour
//! at least ([`KeyFences::forget_below`]): the stream's size bounds their number. What is older waits in no socket:
//! nats-server closes connections that do not answer for minutes.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use headgate_bridge_nats::StreamError;
use headgate_bridge_nats::stream::StoredMessage;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::JetstreamLogShared;
use crate::log::nats_message::{RECORD_KEY_ID_HEADER, header_text, is_redriven, message_origin};
use crate::log::{FencedListener, Section};
use crate::message::{KeyId, Offset};
use crate::subject::SubjectSpace;

/// The token that stands where a datasource does in other subjects; no datasource has such an id.
const FENCE_TOKEN: &str = "$fence";
/// The pause before a fence is put into the stream again.
const FENCE_RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long a fence is remembered although retention has removed it from the stream.
const FENCE_KEPT_MIN: Duration = Duration::from_secs(3_600);
/// How much longer than its window JetStream may know an id.
const FORGOTTEN_ID_MARGIN: Duration = Duration::from_secs(5);

/// The fences of the stream, and what they have shut out.
pub(super) struct KeyFences {
    places: RwLock<HashMap<KeyId, KeyFence>>,
    /// How many there are: while there is none, nothing is looked up.
    count: AtomicUsize,
    /// How many messages the follower has found behind a fence.
    shut_out: AtomicU64,
    /// Is told of each of them.
    pub(super) listener: OnceLock<FencedListener>,
    /// Those messages, which are then removed from the stream.
    removals: mpsc::UnboundedSender<(Offset, Instant)>,
}

/// Where a key ends, and since when this gateway knows it.
struct KeyFence {
    at: Offset,
    since: Instant,
}

impl KeyFences {
    /// None yet. The receiver gets the messages that are to be removed.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<(Offset, Instant)>) {
        let (removals, removed) = mpsc::unbounded_channel();
        let (places, count) = (RwLock::default(), AtomicUsize::new(0));
        (Self { places, count, shut_out: AtomicU64::new(0), listener: OnceLock::new(), removals }, removed)
    }

    /// Notes that a key ends at an offset. Of several fences of a key the first counts.
    pub(super) fn raise(&self, key_id: KeyId, at: Offset) {
        let mut places = self.places.write();
        let fence = places.entry(key_id).or_insert_with(|| KeyFence { at, since: Instant::now() });
        fence.at = at.min(fence.at);
        self.count.store(places.len(), Ordering::Release);
    }

    /// Forgets fences that retention has removed from the stream, with all that was received before them, if they are old.
    pub(super) fn forget_below(&self, first: Offset) {
        self.forget_old(first, FENCE_KEPT_MIN);
    }

    fn forget_old(&self, first: Offset, kept_min: Duration) {
        let mut places = self.places.write();
        places.retain(|_, fence| fence.at >= first || fence.since.elapsed() < kept_min);
        self.count.store(places.len(), Ordering::Release);
    }

    /// Whether a key has a fence.
    pub(super) fn has(&self, key_id: KeyId) -> bool {
        self.places.read().contains_key(&key_id)
    }

    /// Whether a message of the key at this offset is behind its fence. One atomic load while there is no fence.
    pub(super) fn is_behind(&self, key_id: KeyId, offset: Offset) -> bool {
        self.count.load(Ordering::Acquire) > 0
            && self.places.read().get(&key_id).is_some_and(|fence| offset > fence.at)
    }

    /// Whether a message of the stream is behind the fence of its key.
    pub(super) fn shut_out(&self, message: &StoredMessage) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let key_id = header_text(&message.headers, RECORD_KEY_ID_HEADER).and_then(|id| KeyId::parse(id).ok());
        // What an admin sent again names the key that it once came under, and did not come in under it.
        key_id.is_some_and(|key_id| self.is_behind(key_id, message.sequence))
            && !is_redriven(&message.headers)
    }

    /// Whether a record of a section that is stored at this offset is behind the fence of its key.
    pub(super) fn shuts_out(&self, section: &Section, offset: Offset) -> bool {
        self.is_behind(section.key_id, offset) && !section.is_redriven()
    }

    /// Counts a message that is behind a fence, says so, and has it removed from the stream, for clients of NATS that
    /// know of no fences.
    pub(super) fn note_shut_out(&self, message: &StoredMessage) {
        let seen = self.shut_out.fetch_add(1, Ordering::Relaxed) + 1;
        if seen.is_power_of_two() {
            let key_id = header_text(&message.headers, RECORD_KEY_ID_HEADER);
            let (subject, sequence) = (message.subject.as_str(), message.sequence);
            warn!(
                key_id,
                subject,
                sequence,
                messages = seen,
                "a message came behind the end of its key: it is no record"
            );
        }
        if let (Some(listener), Some(origin)) = (self.listener.get(), message_origin(message)) {
            listener(origin);
        }
        let _ = self.removals.send((message.sequence, Instant::now()));
    }

    /// How many messages were found behind a fence.
    pub(super) fn shut_out_count(&self) -> u64 {
        self.shut_out.load(Ordering::Relaxed)
    }
}

/// The key whose fence a message is; `None` if it is none.
pub(super) fn fenced_key(message: &StoredMessage) -> Option<KeyId> {
    let rest = message.subject.as_str().strip_prefix(SubjectSpace::Quarantine.as_str())?.strip_prefix('.')?;
    KeyId::parse(rest.strip_prefix(FENCE_TOKEN)?.strip_prefix('.')?).ok()
}

fn fence_subject(last: &dyn std::fmt::Display) -> String {
    format!("{}.{FENCE_TOKEN}.{last}", SubjectSpace::Quarantine.as_str())
}

/// Reads the fences that are in the stream now.
///
/// # Errors
/// [`StreamError::Away`].
pub(super) async fn load_fences(shared: &JetstreamLogShared) -> Result<(), StreamError> {
    for message in shared.stream.all_of(&fence_subject(&'>')).await? {
        if let Some(key_id) = fenced_key(&message) {
            shared.fences.raise(key_id, message.sequence);
        }
    }
    Ok(())
}

/// Puts the fences of keys into the stream, and tries again until they are there. A key that has one keeps it.
pub(super) async fn fence_keys(shared: Arc<JetstreamLogShared>, keys: Vec<KeyId>) {
    for key_id in keys {
        // The id keeps the fence of another gateway from being followed by this one's.
        let (subject, id) = (fence_subject(&key_id), format!("fence-{key_id}"));
        while !shared.fences.has(key_id) {
            // What is there now may be another stream: an offset of it says nothing.
            if shared.gate.is_in_doubt() {
                sleep(FENCE_RETRY_PAUSE).await;
                continue;
            }
            let followed = shared.tail.next_offset();
            match shared.stream.put(&subject, &id).await {
                Ok(ack) if !ack.duplicate && ack.sequence < followed => {
                    shared.gate.note_lower_ack(ack.sequence, followed);
                }
                Ok(ack) => shared.fences.raise(key_id, ack.sequence),
                Err(error) => {
                    warn!(%key_id, %error, "the end of a key is not in the stream yet; trying again");
                    shared.room_wanted.notify_one();
                    sleep(FENCE_RETRY_PAUSE).await;
                }
            }
        }
    }
}

/// Removes messages behind fences from the stream, when it has forgotten their ids: until then a repetition has to find
/// that the one before it is no record.
pub(super) async fn remove_shut_out(
    shared: Arc<JetstreamLogShared>,
    mut removed: mpsc::UnboundedReceiver<(Offset, Instant)>,
    window: Duration,
) {
    while let Some((offset, seen)) = removed.recv().await {
        sleep_until(seen + window + FORGOTTEN_ID_MARGIN).await;
        if shared.gate.is_in_doubt() {
            // What is there now may be another message.
            continue;
        }
        // Another gateway may have done it; readers pass it over also if it stays.
        let _ = shared.stream.delete(offset).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_the_first_fence_of_its_key_is_shut_out() {
        let (fences, _removed) = KeyFences::new();
        let (a, b) = (KeyId([1; 6]), KeyId([2; 6]));
        assert!(!fences.is_behind(a, 9));
        fences.raise(a, 7);
        fences.raise(a, 12);
        assert!(!fences.is_behind(a, 6) && fences.is_behind(a, 8) && fences.is_behind(a, 13));
        assert!(!fences.is_behind(b, 8));
        fences.raise(b, 20);
        fences.forget_below(20);
        assert!(fences.is_behind(a, 21), "it is young");
        fences.forget_old(20, Duration::ZERO);
        assert!(!fences.is_behind(a, 21) && fences.is_behind(b, 21), "the stream still has this one");
    }

    #[test]
    fn a_fence_is_told_from_a_quarantined_record() {
        let message = |subject: &str| StoredMessage {
            sequence: 1,
            subject: subject.into(),
            headers: headgate_bridge_nats::HeaderMap::new(),
            payload: bytes::Bytes::new(),
        };
        let key_id = KeyId([0xab; 6]);
        assert_eq!(fenced_key(&message(&fence_subject(&key_id))), Some(key_id));
        for other in ["quarantine.press-4.abababababab", "stream.$fence.abababababab", "quarantine.$fence.x"]
        {
            assert_eq!(fenced_key(&message(other)), None, "{other}");
        }
    }
}
