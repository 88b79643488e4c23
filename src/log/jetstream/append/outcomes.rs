//! What becomes of the messages of an append: stored, refused, or kept before under their id.

use std::sync::atomic::Ordering;
use std::time::Instant;

use headgate_bridge_nats::stream::{JetstreamAck, PublishError};

use super::{AppenderEvent, JetstreamAppender, PUBLISH_RETRY_PAUSE, TROUBLE_CHECK_INTERVAL};
use crate::log::jetstream::message::SharedIdContent;
use crate::log::jetstream::open::PendingMessage;
use crate::log::jetstream::read::shared_id_content_at;
use crate::log::{AppendError, Offsets, SectionOutcome};
use crate::message::Offset;

impl JetstreamAppender {
    /// Records the outcome of a message.
    pub(super) fn settle(&mut self, place: PendingMessage, result: Result<JetstreamAck, PublishError>) {
        match result {
            Ok(ack) => self.settle_stored(place, ack),
            Err(error) => self.settle_refused(place, error),
        }
    }

    /// Records that a message is stored.
    fn settle_stored(&mut self, place: PendingMessage, ack: JetstreamAck) {
        if ack.sequence < place.after && !ack.duplicate && !place.asks {
            self.shared.gate.note_lower_ack(ack.sequence, place.after);
            let words = "the log has become another one, or an earlier state of it";
            return self.settle_refused(place, PublishError::Unknown(words.to_owned()));
        }
        let Some(open) = self.open.get_mut(place.append) else { return };
        let progress = &mut open.sections[place.section as usize];
        if place.asks {
            self.shared.append_trouble.set(None);
            return self.ask_earlier(place, ack.sequence);
        }
        progress.offsets[place.record as usize] = ack.sequence;
        progress.dead |= self.shared.fences.shuts_out(&progress.section, ack.sequence);
        let known = ack.duplicate && !place.again;
        if !ack.duplicate && !progress.dead {
            let begins = progress.places[place.record as usize];
            self.own.add_record(ack.sequence, &progress.section, begins);
        }
        progress.duplicates += usize::from(known);
        let is_first = place.record == 0 && progress.once.is_some();
        let of_several = progress.stands_for(place) > 1;
        self.shared.append_trouble.set(None);
        if ack.duplicate && is_first {
            self.ask_earlier(place, ack.sequence);
            return;
        }
        if of_several {
            self.add_rest(place);
        }
        self.count_settled(place.append, 1);
    }

    /// Records why a message is not stored, or may not be. Publishes it again later if that is of use and the
    /// append does not give up yet.
    fn settle_refused(&mut self, place: PendingMessage, error: PublishError) {
        if place.asks && matches!(error, PublishError::Refused(_)) {
            return self.ask_next(place);
        }
        let Some(open) = self.open.get_mut(place.append) else { return };
        let progress = &open.sections[place.section as usize];
        let (has_id, stands_for) = (progress.once.is_some() || place.asks, progress.stands_for(place));
        let (error, again) = match error {
            PublishError::Away(text) => (AppendError::Away(text.into()), Some(place.again)),
            PublishError::Full(_) => {
                self.shared.room_wanted.notify_one();
                let retention_bytes = self.shared.retention_bytes;
                (AppendError::Budget { retention_bytes }, Some(place.again))
            }
            PublishError::Unknown(text) => {
                self.shared.lost_track.store(true, Ordering::Release);
                (AppendError::Unknown(text.into()), has_id.then_some(true))
            }
            PublishError::Refused(text) => (AppendError::Failed(text.into()), None),
        };
        self.shared.append_trouble.set(Some(error.to_string()));
        self.refused_at = Instant::now();
        self.was_full = matches!(error, AppendError::Budget { .. });
        self.trouble_check = self.refused_at + TROUBLE_CHECK_INTERVAL;
        match again {
            Some(again) if open.give_up_at > Instant::now() => {
                self.refused.insert(PendingMessage { again, ..place });
                let until = Instant::now() + PUBLISH_RETRY_PAUSE;
                self.blocked.get_or_insert((error, until));
            }
            _ => {
                open.error.get_or_insert(error);
                self.count_settled(place.append, stands_for);
            }
        }
    }

    /// Queues the rest of a section after the outcome of its first record allows it.
    fn add_rest(&mut self, PendingMessage { append, section, .. }: PendingMessage) {
        let Some(open) = self.open.get_mut(append) else { return };
        let records = open.sections[section as usize].section.records();
        self.refused.extend((1..records).map(|record| PendingMessage {
            append,
            section,
            record,
            again: false,
            asks: false,
            after: 0,
        }));
    }

    /// Goes on when the id that a section has asked for is not known, or not for the same messages: with the next one,
    /// or with the section itself.
    fn ask_next(&mut self, place: PendingMessage) {
        let Some(open) = self.open.get_mut(place.append) else { return };
        let progress = &mut open.sections[place.section as usize];
        progress.asked.pop_front();
        let first = PendingMessage { record: 0, again: false, ..place };
        if !progress.asked.is_empty() {
            self.refused.insert(first);
            return;
        }
        if progress.is_over {
            progress.found = Some(SectionOutcome::IdsFull);
            let stands_for = progress.stands_for(place);
            return self.count_settled(place.append, stands_for);
        }
        if !progress.section.is_question() {
            let records = progress.section.records();
            let at_once = if progress.once.is_some() { 1 } else { records };
            let place = |record| PendingMessage { record, asks: false, ..first };
            self.refused.extend((0..at_once).map(place));
        }
        self.count_settled(place.append, 1);
    }

    /// Looks up what was kept before under the id of a section.
    fn ask_earlier(&mut self, place: PendingMessage, first: Offset) {
        let shared = self.shared.clone();
        self.learning.push(Box::pin(async move {
            let found = shared_id_content_at(&shared, first).await;
            AppenderEvent::Earlier { place, first, found }
        }));
    }

    pub(super) fn handle_event(&mut self, learnt: AppenderEvent) {
        match learnt {
            AppenderEvent::Refreshed { append, result } => {
                let Some(open) = self.open.get_mut(append) else { return };
                if let Err(error) = result {
                    open.error.get_or_insert(error);
                }
                self.count_settled(append, 1);
            }
            AppenderEvent::Earlier { place, first, found } => self.handle_earlier(place, first, found),
            AppenderEvent::Looked { asked_at, takes } => {
                if takes && asked_at > self.refused_at && self.has_idle_trouble() {
                    self.shared.append_trouble.set(None);
                }
            }
        }
    }

    /// Goes on with a section, given what was kept before under its id; `None` if that is removed.
    fn handle_earlier(
        &mut self,
        place: PendingMessage,
        first: Offset,
        found: Result<Option<SharedIdContent>, AppendError>,
    ) {
        let Some(open) = self.open.get_mut(place.append) else { return };
        let progress = &mut open.sections[place.section as usize];
        let stands_for = progress.stands_for(place);
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                open.error.get_or_insert(error);
                return self.count_settled(place.append, stands_for);
            }
        };
        if place.asks && progress.asks_own_id() {
            // It is there, and the section is published as if there was room: what is missing of it comes in.
            progress.is_over = false;
            return self.ask_next(place);
        }
        let is_same = found.is_none_or(|found| found.is_same(progress.content));
        let earlier =
            Offsets::consecutive(first, found.map_or(progress.content.records, |found| found.records));
        let asked = progress.asked.front().filter(|_| place.asks).map(|(id, _)| *id);
        match asked {
            Some(_) if is_same => progress.found = Some(SectionOutcome::Known(earlier)),
            Some(id) if id.is_exchange() && progress.section.is_question() => {
                progress.found = Some(SectionOutcome::Conflict { earlier, in_exchange: true });
            }
            Some(_) => return self.ask_next(place),
            None if is_same => {
                // Usually all of it is stored. If its gateway ended halfway, this publishes the rest.
                if stands_for > 1 {
                    self.add_rest(place);
                }
                return self.count_settled(place.append, 1);
            }
            None => {
                let in_exchange = progress.once.is_some_and(|(id, _)| id.is_exchange());
                progress.found = Some(SectionOutcome::Conflict { earlier, in_exchange });
            }
        }
        self.count_settled(place.append, stands_for);
    }
}
