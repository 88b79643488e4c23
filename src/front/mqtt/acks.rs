//! Answers that wait for durability: the acknowledgements for the messages of each read, sent once
//! the log has the messages.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::codec::write::{self, AckKind, PacketForm};
use super::codec::{MqttVersion, ReasonCode};
use super::exchanges::ExchangeTable;
use crate::consume::subscriber::sessions::SessionStoreError;
use crate::intake::{AdmittedDraft, DurableDraft, PendingRelease, Refusal};
use crate::log::{AppendError, SectionOutcome};
use crate::memory::MemoryCharge;

/// Resolves when the session of an exchange is on disk.
pub(super) type SessionStoreWait = Pin<Box<dyn Future<Output = Result<(), SessionStoreError>> + Send>>;

/// What the answers to one read wait for before they are sent.
#[derive(Default)]
pub(super) struct AckWaits {
    /// The log has the messages.
    pub(super) admitted: Option<AdmittedDraft>,
    /// The log has the releases of the PUBRELs.
    pub(super) released: Option<PendingRelease>,
    /// The session is on disk.
    pub(super) stored: Option<SessionStoreWait>,
    accepted: Option<DurableDraft>,
    /// What the read holds in memory until it is answered.
    _memory: Option<MemoryCharge>,
}

impl AckWaits {
    pub(super) fn new(
        admitted: Option<AdmittedDraft>,
        released: Option<PendingRelease>,
        stored: Option<SessionStoreWait>,
        memory: Option<MemoryCharge>,
    ) -> Self {
        Self { admitted, released, stored, accepted: None, _memory: memory }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Refusal>> {
        if let Some(admitted) = &mut self.admitted {
            self.accepted = Some(ready!(Pin::new(admitted).poll(cx))?);
            self.admitted = None;
        }
        if let Some(released) = &mut self.released {
            ready!(Pin::new(released).poll(cx))?;
            self.released = None;
        }
        if let Some(stored) = &mut self.stored {
            let error = |error: SessionStoreError| AppendError::Failed(error.to_string().into());
            ready!(stored.as_mut().poll(cx)).map_err(error)?;
            self.stored = None;
        }
        Poll::Ready(Ok(()))
    }
}

/// One answer: to a QoS 1 or QoS 2 message, or to a PUBREL.
struct MessageAck {
    packet_id: u16,
    answer: AckKind,
    verdict: AckVerdict,
}

enum AckVerdict {
    /// The message goes into the log, as part of this origin of the draft.
    Admitted { origin: u32 },
    /// The message goes into quarantine, as part of this origin of the draft, for the reason in `words`.
    Quarantined { origin: u32, words: Box<str> },
    /// The message is refused for good.
    Refused(Box<(ReasonCode, String)>),
    /// Success, for a message that was sent before or for a PUBREL.
    Done,
    /// The answers to so many PINGREQs in a row. They say that every earlier message, also QoS 0, has been handled.
    Pongs(u32),
}

/// The answers to the messages of one read, in the order of the messages.
#[derive(Default)]
pub(super) struct ReadAcks {
    acks: Vec<MessageAck>,
    unacknowledged: usize,
    /// The reasons in words.
    words_bytes: usize,
}

impl ReadAcks {
    /// What they take in memory.
    pub(super) fn memory_bytes(&self) -> usize {
        self.acks.capacity() * size_of::<MessageAck>() + self.words_bytes
    }

    /// Adds the answer to a message that is in the draft, as part of its `origin`.
    pub(super) fn push_admitted(&mut self, answer: AckKind, packet_id: u16, origin: usize) {
        let origin = u32::try_from(origin).unwrap_or(u32::MAX);
        self.unacknowledged += usize::from(answer == AckKind::Puback);
        self.acks.push(MessageAck { packet_id, answer, verdict: AckVerdict::Admitted { origin } });
    }

    /// Adds the answer to a message that is in the draft for quarantine, as part of its `origin`.
    pub(super) fn push_quarantined(&mut self, answer: AckKind, packet_id: u16, origin: usize, words: String) {
        let origin = u32::try_from(origin).unwrap_or(u32::MAX);
        self.unacknowledged += usize::from(answer == AckKind::Puback);
        self.words_bytes += words.len();
        let verdict = AckVerdict::Quarantined { origin, words: words.into() };
        self.acks.push(MessageAck { packet_id, answer, verdict });
    }

    /// Adds the answer to a message that was refused for good.
    pub(super) fn push_refused(
        &mut self,
        answer: AckKind,
        packet_id: u16,
        reason: ReasonCode,
        words: String,
    ) {
        self.unacknowledged += usize::from(answer == AckKind::Puback);
        self.words_bytes += words.capacity() + size_of::<(ReasonCode, String)>();
        self.acks.push(MessageAck {
            packet_id,
            answer,
            verdict: AckVerdict::Refused(Box::new((reason, words))),
        });
    }

    /// Adds a success, which is sent after every earlier answer.
    pub(super) fn push_done(&mut self, answer: AckKind, packet_id: u16) {
        self.acks.push(MessageAck { packet_id, answer, verdict: AckVerdict::Done });
    }

    /// Adds the answer to a PINGREQ.
    pub(super) fn push_pong(&mut self) {
        if let Some(MessageAck { verdict: AckVerdict::Pongs(n), .. }) = self.acks.last_mut() {
            return *n += 1;
        }
        self.acks.push(MessageAck { packet_id: 0, answer: AckKind::Puback, verdict: AckVerdict::Pongs(1) });
    }

    /// How many of the answers are to QoS 1 messages.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged
    }

    pub(super) fn is_empty(&self) -> bool {
        self.acks.is_empty()
    }

    /// Writes the answers, and settles the exchanges that they are about.
    fn write(
        &self,
        accepted: Option<&DurableDraft>,
        form: PacketForm,
        exchanges: &mut ExchangeTable,
        to: &mut Vec<u8>,
    ) {
        to.reserve(4 * self.acks.len());
        for ack in &self.acks {
            if ack.answer == AckKind::Pubcomp {
                exchanges.settle_release(ack.packet_id);
            }
            match &ack.verdict {
                AckVerdict::Admitted { origin } => {
                    let outcome = accepted.and_then(|a| a.outcomes.get(*origin as usize));
                    if ack.answer == AckKind::Pubrec {
                        let kept =
                            matches!(outcome, Some(SectionOutcome::Kept(_) | SectionOutcome::Duplicate(_)));
                        exchanges.settle_open(ack.packet_id, kept);
                    }
                    match outcome {
                        Some(SectionOutcome::Kept(_) | SectionOutcome::Duplicate(_)) => {
                            write::message_ack(to, form, ack.answer, ack.packet_id, ReasonCode::Success, None)
                        }
                        // The key died between the check and the append: nothing was kept. MQTT 3.1.1
                        // cannot express that, and gets no answer: the key's connections close.
                        _ if form.version != MqttVersion::V5 => {}
                        _ => write::message_ack(
                            to,
                            form,
                            ack.answer,
                            ack.packet_id,
                            ReasonCode::NotAuthorized,
                            None,
                        ),
                    }
                }
                AckVerdict::Quarantined { origin, words } => {
                    let outcome = accepted.and_then(|a| a.outcomes.get(*origin as usize));
                    let (reason, words) = match outcome {
                        Some(SectionOutcome::Kept(_) | SectionOutcome::Duplicate(_)) => {
                            (ReasonCode::PayloadFormatInvalid, Some(&**words))
                        }
                        _ => (ReasonCode::NotAuthorized, None),
                    };
                    write::message_ack(to, form, ack.answer, ack.packet_id, reason, words);
                }
                AckVerdict::Pongs(n) => (0..*n).for_each(|_| write::pingresp(to)),
                AckVerdict::Done => {
                    write::message_ack(to, form, ack.answer, ack.packet_id, ReasonCode::Success, None);
                }
                AckVerdict::Refused(refused) => {
                    write::message_ack(to, form, ack.answer, ack.packet_id, refused.0, Some(&refused.1));
                }
            }
        }
    }
}

/// The reads whose answers wait, oldest first. Answers leave in the order of the messages
/// (MQTT 5 section 4.6).
#[derive(Default)]
pub(super) struct PendingAcks {
    waiting: VecDeque<(AckWaits, ReadAcks)>,
    unacknowledged: usize,
}

impl PendingAcks {
    /// Adds the answers to one read, and what they wait for.
    pub(super) fn push(&mut self, waits: AckWaits, acks: ReadAcks) {
        self.unacknowledged += acks.unacknowledged();
        self.waiting.push_back((waits, acks));
    }

    /// How many reads wait for their answers.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many QoS 1 messages wait for their answer.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged
    }

    /// Writes the answers that are due to `to`, and settles their exchanges. Ready when no answer waits.
    ///
    /// # Errors
    /// The transient refusal of a draft. Neither its messages nor any later ones may be answered.
    pub(super) fn poll_write(
        &mut self,
        form: PacketForm,
        exchanges: &mut ExchangeTable,
        to: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Refusal>> {
        while let Some((waits, acks)) = self.waiting.front_mut() {
            ready!(waits.poll(cx))?;
            acks.write(waits.accepted.as_ref(), form, exchanges, to);
            self.unacknowledged -= acks.unacknowledged();
            self.waiting.pop_front();
        }
        if self.waiting.capacity() > 0 {
            // An idle connection holds no queue.
            self.waiting = VecDeque::new();
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::exchanges::ExchangeState;
    use super::*;
    use crate::log::Offsets;

    #[test]
    fn the_exchanges_are_what_the_log_has_answered() {
        let form = PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: u32::MAX };
        let mut exchanges = ExchangeTable::default();
        let mut acks = ReadAcks::default();
        for (origin, packet_id) in [1, 2, 3].into_iter().enumerate() {
            exchanges.begin_open(packet_id);
            acks.push_admitted(AckKind::Pubrec, packet_id, origin);
        }
        let once = Offsets::consecutive(0, 1);
        let outcomes = vec![
            SectionOutcome::Kept(once.clone()),
            SectionOutcome::KeyDead,
            SectionOutcome::Duplicate(once),
        ];
        let mut answers = Vec::new();
        acks.write(Some(&DurableDraft { outcomes }), form, &mut exchanges, &mut answers);
        let states = [1, 2, 3].map(|packet_id| exchanges.state(packet_id));
        assert_eq!(states, [Some(ExchangeState::Open), None, Some(ExchangeState::Open)]);
        assert_eq!((exchanges.take_refused(), exchanges.unreleased()), (vec![2], 2));
    }
}
