//! Answers that wait for durability: the acknowledgements for the messages of each read, sent once
//! the log has the messages.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::codec::write::{self, AckKind, PacketForm};
use super::codec::{MqttVersion, ReasonCode};
use super::exchanges::ExchangeTable;
use super::goodbye::StopReason;
use super::inbound::InboundEnd;
use super::reason::refusal_reason_code;
use crate::consume::subscriber::sessions::SessionStoreError;
use crate::intake::{AdmittedDraft, DurableDraft, Exchange, Intake, PendingRelease, Refusal};
use crate::log::SectionOutcome;
use crate::memory::MemoryCharge;
use crate::message::Offset;

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
    /// The log has the releases of the exchanges whose messages it has refused: their packet identifiers may be used
    /// for other messages once the refusals are sent.
    ended: Option<PendingRelease>,
    /// What the read holds in memory until it is answered, its messages with it.
    memory: Option<MemoryCharge>,
}

impl Drop for AckWaits {
    /// The log has the messages, or the releases, for longer than the connection waits.
    fn drop(&mut self) {
        if let Some(admitted) = &mut self.admitted {
            admitted.keep_charge(self.memory.take());
        } else if let Some(release) = self.released.as_mut().or(self.ended.as_mut()) {
            release.keep_charge(self.memory.take());
        }
    }
}

impl AckWaits {
    pub(super) fn new(
        admitted: Option<AdmittedDraft>,
        released: Option<PendingRelease>,
        stored: Option<SessionStoreWait>,
        memory: Option<MemoryCharge>,
    ) -> Self {
        Self { admitted, released, stored, accepted: None, ended: None, memory }
    }

    fn poll(
        &mut self,
        acks: &ReadAcks,
        closer: &ExchangeCloser<'_>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Refusal>> {
        if let Some(admitted) = &mut self.admitted {
            let accepted = ready!(Pin::new(admitted).poll(cx))?;
            self.admitted = None;
            let refused = acks.refused_exchanges(&accepted.outcomes, closer);
            self.ended = (!refused.is_empty()).then(|| closer.intake.release(&refused));
            self.accepted = Some(accepted);
        }
        if let Some(ended) = &mut self.ended {
            ready!(Pin::new(ended).poll(cx))?;
            self.ended = None;
        }
        if let Some(released) = &mut self.released {
            ready!(Pin::new(released).poll(cx))?;
            self.released = None;
        }
        if let Some(stored) = &mut self.stored {
            // A session that is not stored is not there after a restart, and its client knows of no exchange then.
            let _ = ready!(stored.as_mut().poll(cx));
            self.stored = None;
        }
        Poll::Ready(Ok(()))
    }
}

/// One answer: to a QoS 1 or QoS 2 message, or to a PUBREL. Eight bytes, because there is one for each message.
struct MessageAck {
    packet_id: u16,
    answer: AckKind,
    form: AckForm,
    /// The origin of the message in the draft, a count, or a place in [`ReadAcks::details`], as `form` says.
    number: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AckForm {
    Admitted,
    Repeated,
    Done,
    Pongs,
    Detailed,
}

/// What is said of a message, or depends on the log.
enum AckVerdict<'a> {
    /// The message goes into the log, as part of this origin of the draft.
    Admitted { origin: u32 },
    /// The message belongs to an open exchange, whose message the log has: the same one, if this origin of the
    /// draft is no conflict.
    Repeated { origin: u32 },
    /// Success, for a message that was sent before or for a PUBREL.
    Done,
    /// The answers to so many PINGREQs in a row. They say that every earlier message, also QoS 0, has been handled.
    Pongs(u32),
    /// A no, in most cases.
    Detailed(&'a AckDetail),
}

enum AckDetail {
    /// The message goes into quarantine, as part of this origin of the draft, for the reason in `words`.
    Quarantined { origin: u32, words: Box<str> },
    /// The message is refused with this reason, unless the log knows it: it asks, as this origin of the draft.
    Asked { origin: u32, refusal: Box<Refusal> },
    /// The message is refused for good.
    Refused(ReasonCode, String),
}

/// The answers to the messages of one read, in the order of the messages.
#[derive(Default)]
pub(super) struct ReadAcks {
    acks: Vec<MessageAck>,
    details: Vec<AckDetail>,
    unacknowledged: usize,
    /// The reasons in words.
    words_bytes: usize,
}

impl ReadAcks {
    /// What they take in memory.
    pub(super) fn memory_bytes(&self) -> usize {
        self.acks.capacity() * size_of::<MessageAck>()
            + self.details.capacity() * size_of::<AckDetail>()
            + self.words_bytes
    }

    /// Adds the answer to a message that is in the draft, as part of its `origin`.
    #[inline]
    pub(super) fn push_admitted(&mut self, answer: AckKind, packet_id: u16, origin: usize) {
        self.unacknowledged += usize::from(answer == AckKind::Puback);
        let number = number_of(origin);
        self.acks.push(MessageAck { packet_id, answer, form: AckForm::Admitted, number });
    }

    /// Adds the answer to a message that is in the draft for quarantine, as part of its `origin`.
    pub(super) fn push_quarantined(&mut self, answer: AckKind, packet_id: u16, origin: usize, words: String) {
        self.words_bytes += words.len();
        let detail = AckDetail::Quarantined { origin: number_of(origin), words: words.into() };
        self.push_detailed(answer, packet_id, detail);
    }

    /// Adds the answer to a message that is refused unless the log knows it, which it asks as part of its `origin`.
    pub(super) fn push_asked(&mut self, answer: AckKind, packet_id: u16, origin: usize, refusal: Refusal) {
        let detail = AckDetail::Asked { origin: number_of(origin), refusal: Box::new(refusal) };
        self.push_detailed(answer, packet_id, detail);
    }

    /// Adds the answer to a message of an open exchange, which asks as part of its `origin` whether it is the same.
    pub(super) fn push_repeated(&mut self, packet_id: u16, origin: usize) {
        let (answer, number) = (AckKind::Pubrec, number_of(origin));
        self.acks.push(MessageAck { packet_id, answer, form: AckForm::Repeated, number });
    }

    /// Adds the answer to a message that was refused for good.
    pub(super) fn push_refused(
        &mut self,
        answer: AckKind,
        packet_id: u16,
        reason: ReasonCode,
        words: String,
    ) {
        self.words_bytes += words.capacity();
        self.push_detailed(answer, packet_id, AckDetail::Refused(reason, words));
    }

    fn push_detailed(&mut self, answer: AckKind, packet_id: u16, detail: AckDetail) {
        self.unacknowledged += usize::from(answer == AckKind::Puback);
        let number = number_of(self.details.len());
        self.details.push(detail);
        self.acks.push(MessageAck { packet_id, answer, form: AckForm::Detailed, number });
    }

    /// Adds a success, which is sent after every earlier answer.
    pub(super) fn push_done(&mut self, answer: AckKind, packet_id: u16) {
        self.acks.push(MessageAck { packet_id, answer, form: AckForm::Done, number: 0 });
    }

    /// Adds the answer to a PINGREQ.
    pub(super) fn push_pong(&mut self) {
        if let Some(ack) = self.acks.last_mut().filter(|ack| ack.form == AckForm::Pongs) {
            return ack.number += 1;
        }
        let (packet_id, answer) = (0, AckKind::Puback);
        self.acks.push(MessageAck { packet_id, answer, form: AckForm::Pongs, number: 1 });
    }

    fn verdict(&self, ack: &MessageAck) -> AckVerdict<'_> {
        match ack.form {
            AckForm::Admitted => AckVerdict::Admitted { origin: ack.number },
            AckForm::Repeated => AckVerdict::Repeated { origin: ack.number },
            AckForm::Done => AckVerdict::Done,
            AckForm::Pongs => AckVerdict::Pongs(ack.number),
            AckForm::Detailed => AckVerdict::Detailed(&self.details[ack.number as usize]),
        }
    }

    /// How many of the answers are to QoS 1 messages.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged
    }

    pub(super) fn is_empty(&self) -> bool {
        self.acks.is_empty()
    }

    /// The exchanges of messages that are refused now that the log has answered: an earlier connection of the
    /// session may have brought them into the log.
    fn refused_exchanges(&self, outcomes: &[SectionOutcome], closer: &ExchangeCloser<'_>) -> Vec<Exchange> {
        if self.unacknowledged == self.acks.len() {
            return Vec::new();
        }
        let refused = self.acks.iter().filter(|ack| ack.answer == AckKind::Pubrec).filter(|ack| {
            let verdict = self.verdict(ack);
            let outcome = verdict.outcome(outcomes);
            let is_conflict = matches!(outcome, Some(SectionOutcome::Conflict { in_exchange: true, .. }));
            outcome.is_some() && (is_conflict || !closer.is_first) && verdict.refused(outcomes).is_some()
        });
        refused.map(|ack| Exchange { session: closer.session, packet_id: ack.packet_id }).collect()
    }

    /// Writes the answers, and settles the exchanges that they are about.
    ///
    /// # Errors
    /// The refusal of a message that cannot be said in an answer: the connection has to end.
    fn write(
        &self,
        outcomes: &[SectionOutcome],
        form: PacketForm,
        exchanges: &mut ExchangeTable,
        to: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        to.reserve(4 * self.acks.len());
        for ack in &self.acks {
            // Most answers are these.
            if (ack.answer, ack.form) == (AckKind::Puback, AckForm::Admitted)
                && let Some(SectionOutcome::Kept(_)) = outcomes.get(ack.number as usize)
            {
                write::message_ack(to, form, ack.answer, ack.packet_id, ReasonCode::Success, None);
                continue;
            }
            let verdict = self.verdict(ack);
            if let AckVerdict::Pongs(pings) = verdict {
                (0..pings).for_each(|_| write::pingresp(to));
                continue;
            }
            let refused = verdict.refused(outcomes);
            match ack.answer {
                AckKind::Pubcomp => exchanges.settle_release(ack.packet_id),
                AckKind::Pubrec if verdict.outcome(outcomes).is_some() => {
                    exchanges.settle_open(ack.packet_id, refused.is_none());
                }
                _ => {}
            }
            let (reason, words) = match &refused {
                None => (ReasonCode::Success, None),
                // The key died between the check and the append: nothing was kept. MQTT 3.1.1 cannot express
                // that, and gets no answer: the key's connections close.
                Some(RefusedAck::Refusal(Refusal::Denied(_))) if form.version != MqttVersion::V5 => continue,
                Some(RefusedAck::Refusal(Refusal::Denied(_))) => (ReasonCode::NotAuthorized, None),
                // A client forgets a message that is refused in an answer: one that may be taken later gets none, and
                // neither does what comes behind it.
                Some(RefusedAck::Refusal(refusal)) if refusal.is_transient() => return Err(refusal.clone()),
                Some(RefusedAck::Refusal(refusal)) => match refusal_reason_code(refusal) {
                    reason if form.version != MqttVersion::V5 || reason == ReasonCode::PacketTooLarge => {
                        return Err(refusal.clone());
                    }
                    reason => (reason, Some(Cow::Owned(refusal.to_string()))),
                },
                Some(RefusedAck::Words(reason, words)) => (*reason, Some(Cow::Borrowed(*words))),
            };
            write::message_ack(to, form, ack.answer, ack.packet_id, reason, words.as_deref());
        }
        Ok(())
    }
}

/// Why the answer to a message is a no.
enum RefusedAck<'a> {
    /// The refusal, which is known now that the log has answered.
    Refusal(Refusal),
    /// What was said before the log was asked.
    Words(ReasonCode, &'a str),
}

impl<'a> AckVerdict<'a> {
    /// The log's outcome, if the answer depends on it.
    fn outcome<'o>(&self, outcomes: &'o [SectionOutcome]) -> Option<&'o SectionOutcome> {
        match self {
            AckVerdict::Admitted { origin }
            | AckVerdict::Repeated { origin }
            | AckVerdict::Detailed(AckDetail::Quarantined { origin, .. } | AckDetail::Asked { origin, .. }) => {
                outcomes.get(*origin as usize)
            }
            AckVerdict::Detailed(AckDetail::Refused(..)) | AckVerdict::Done | AckVerdict::Pongs(_) => None,
        }
    }

    /// Why it is a no; `None` if it is a yes.
    fn refused(&self, outcomes: &[SectionOutcome]) -> Option<RefusedAck<'a>> {
        let outcome = self.outcome(outcomes);
        let by_outcome = || outcome.and_then(Refusal::from_outcome).map(RefusedAck::Refusal);
        let detail = match self {
            AckVerdict::Done | AckVerdict::Pongs(_) => return None,
            AckVerdict::Admitted { .. } => return by_outcome(),
            AckVerdict::Repeated { .. } => {
                return by_outcome().filter(|_| matches!(outcome, Some(SectionOutcome::Conflict { .. })));
            }
            AckVerdict::Detailed(detail) => *detail,
        };
        let refused = match detail {
            AckDetail::Refused(reason, words) => RefusedAck::Words(*reason, words),
            AckDetail::Quarantined { words, .. } => {
                RefusedAck::Words(ReasonCode::PayloadFormatInvalid, words)
            }
            AckDetail::Asked { refusal, .. } => RefusedAck::Refusal((**refusal).clone()),
        };
        match outcome {
            Some(SectionOutcome::Known(_)) => None,
            Some(SectionOutcome::KeyDead) => by_outcome(),
            _ => Some(refused),
        }
    }
}

/// A number of origins, messages or details of one read, of which there are far fewer.
#[inline]
fn number_of(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Ends the exchanges of a session whose messages the log has refused.
pub(super) struct ExchangeCloser<'a> {
    pub(super) intake: &'a Intake,
    /// The session's number.
    pub(super) session: u64,
    /// No earlier connection can have opened one.
    pub(super) is_first: bool,
}

/// The reads whose answers wait, oldest first. Answers leave in the order of the messages
/// (MQTT 5 section 4.6).
#[derive(Default)]
pub(super) struct PendingAcks {
    waiting: VecDeque<(AckWaits, ReadAcks)>,
    unacknowledged: usize,
    /// The end of what the log has of the connection's messages.
    published: Offset,
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

    /// The offset behind the connection's messages that the log has.
    pub(super) fn published_offset(&self) -> Offset {
        self.published
    }

    /// How many QoS 1 messages wait for their answer.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged
    }

    /// Writes the answers that are due to `to`, and settles their exchanges. Ready when no answer waits.
    ///
    /// # Errors
    /// Why the connection has to end: a transient refusal, or one that MQTT 3.1.1 has no answer for. Neither its messages nor any later ones may be answered.
    pub(super) fn poll_write(
        &mut self,
        form: PacketForm,
        closer: &ExchangeCloser<'_>,
        exchanges: &mut ExchangeTable,
        to: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), StopReason>> {
        while let Some((waits, acks)) = self.waiting.front_mut() {
            ready!(waits.poll(acks, closer, cx)).map_err(StopReason::Transient)?;
            let outcomes = waits.accepted.as_ref().map_or(&[][..], |accepted| &accepted.outcomes);
            let kept = outcomes.iter().filter_map(|outcome| match outcome {
                SectionOutcome::Kept(offsets) => Some(offsets.last() + 1),
                _ => None,
            });
            self.published = kept.fold(self.published, Offset::max);
            let written = acks.write(outcomes, form, exchanges, to);
            written.map_err(|refusal| StopReason::End(InboundEnd::Refused(refusal)))?;
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
        acks.write(&outcomes, form, &mut exchanges, &mut answers).expect("MQTT 5 has an answer for each");
        let states = [1, 2, 3].map(|packet_id| exchanges.state(packet_id));
        assert_eq!(states, [Some(ExchangeState::Open), None, Some(ExchangeState::Open)]);
        assert_eq!(exchanges.unreleased(), 2);
    }

    #[test]
    fn what_may_be_taken_later_is_not_answered_and_neither_is_what_comes_behind_it() {
        let full = [SectionOutcome::ExchangesFull, SectionOutcome::IdsFull];
        for (version, outcome) in
            [MqttVersion::V5, MqttVersion::V311].into_iter().flat_map(|v| full.clone().map(|f| (v, f)))
        {
            let form = PacketForm { version, reasons: true, packet_bytes_max: u32::MAX };
            let (mut exchanges, mut acks) = (ExchangeTable::default(), ReadAcks::default());
            for (origin, packet_id) in [1, 2, 3].into_iter().enumerate() {
                exchanges.begin_open(packet_id);
                acks.push_admitted(AckKind::Pubrec, packet_id, origin);
            }
            let kept = |offset| SectionOutcome::Kept(Offsets::consecutive(offset, 1));
            let mut answers = Vec::new();
            let refusal = acks.write(&[kept(0), outcome, kept(1)], form, &mut exchanges, &mut answers);
            assert_eq!(refusal_reason_code(&refusal.expect_err("no answer")), ReasonCode::QuotaExceeded);
            assert_eq!(answers, [0x50, 2, 0, 1]);
        }
    }
}
