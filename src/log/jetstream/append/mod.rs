//! Appending: one task that owns everything on its way into the stream. It pipelines messages, up to
//! [`PUBLISHES_IN_FLIGHT_MAX`] at once, and answers each append when all its messages are acknowledged. The
//! acknowledgements may arrive in any order.
//!
//! The task publishes a message again if JetStream says that it has not stored it (NATS is away, the
//! stream has no leader, it is full): before anything newer, until its append gives up. So messages are
//! in the order of the appends, except when some are refused while later ones are already in flight.
//!
//! If the answer to a message is lost, its outcome is unknown. A message with an id is published again,
//! and the id says whether it was stored. One without an id could be stored twice, so its append fails as
//! [`AppendError::Unknown`], and its client decides.
//!
//! An append is answered when this node's [follower](super::follow) has its records too, so that every
//! acknowledged record can be read here, and every end of its key before it is known. Usually both happen at the
//! same time; [`WaitingAppends`] tells when a follower that stands still is not waited for.

mod outcomes;
mod waiting;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use headgate_bridge_nats::stream::{PublishError, StreamPublisher};
use headgate_bridge_nats::{HeaderMap, StreamError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use self::waiting::{UnfollowedAppends, WaitingAppends};
use super::JetstreamLogShared;
use super::message::{SharedIdContent, encode_message, encode_question, message_id_of};
use super::once::Generation;
use super::open::{PendingAppend, PendingAppends, PendingMessage, SectionProgress};
use super::open_exchanges::KeptExchange;
use super::own::OwnRunCollector;
use crate::log::nats_message::origin_headers;
use crate::log::{AppendError, CommitOutcome, Offsets, OnceId, Section, SectionOutcome};
use crate::message::Offset;

/// Messages in flight at once. A server refuses more than 10,000 messages that a stream has not yet
/// stored, from all gateways together.
const PUBLISHES_IN_FLIGHT_MAX: usize = 4096;
/// How long JetStream may take to acknowledge a message.
const PUBLISH_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before refused messages are published again.
const PUBLISH_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How often a task without work asks the stream whether its trouble is over.
const TROUBLE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A command to the task.
pub(super) enum AppenderCommand {
    /// Append sections.
    Append(JetstreamSubmission),
    /// Reply when every earlier append is settled.
    Barrier(oneshot::Sender<()>),
    /// Settle all appends, and end.
    Close,
}

/// Sections to append, and their caller.
pub(super) struct JetstreamSubmission {
    pub(super) sections: Vec<Section>,
    /// Until then the task waits out a transient failure.
    pub(super) give_up_at: Instant,
    pub(super) reply: AppendReply,
}

/// The caller of an append.
pub(super) type AppendReply = oneshot::Sender<Result<CommitOutcome, AppendError>>;

/// The result of a side request of the task.
enum AppenderEvent {
    /// What was kept before under the id of a section.
    Earlier { place: PendingMessage, first: Offset, found: Result<Option<SharedIdContent>, AppendError> },
    /// A row of `headgate-once` was rewritten, or could not be.
    Refreshed { append: u64, result: Result<(), AppendError> },
    /// Whether the stream would take messages when it was asked.
    Looked { asked_at: Instant, takes: bool },
}

/// The appending task.
pub(super) struct JetstreamAppender {
    shared: Arc<JetstreamLogShared>,
    commands: mpsc::UnboundedReceiver<AppenderCommand>,
    publisher: StreamPublisher<PendingMessage>,
    own: OwnRunCollector,
    /// Appends that are not settled.
    open: PendingAppends,
    /// Messages to publish, in order; the refused ones come before them.
    queue: VecDeque<PendingMessage>,
    refused: BTreeSet<PendingMessage>,
    /// Why nothing is published for now, and until when.
    blocked: Option<(AppendError, Instant)>,
    /// Callers that wait for all appends below a number.
    barriers: VecDeque<(u64, oneshot::Sender<()>)>,
    learning: FuturesUnordered<BoxFuture<'static, AppenderEvent>>,
    /// Appends that wait for the follower.
    waiting: WaitingAppends<PendingAppend>,
    /// When a message was refused last, and whether the stream was full.
    refused_at: Instant,
    was_full: bool,
    /// When to ask the stream whether that is over, if nothing is appended until then.
    trouble_check: Instant,
    closing: bool,
}

impl JetstreamAppender {
    /// A task without appends.
    ///
    /// # Errors
    /// [`StreamError::Away`]: the connection was closed for good.
    pub(super) async fn new(
        shared: Arc<JetstreamLogShared>,
        commands: mpsc::UnboundedReceiver<AppenderCommand>,
        own: OwnRunCollector,
    ) -> Result<Self, StreamError> {
        let publisher = StreamPublisher::new(shared.stream.nats(), PUBLISH_ACK_TIMEOUT).await?;
        Ok(Self {
            shared,
            commands,
            publisher,
            own,
            open: PendingAppends::default(),
            queue: VecDeque::new(),
            refused: BTreeSet::new(),
            blocked: None,
            barriers: VecDeque::new(),
            learning: FuturesUnordered::new(),
            waiting: WaitingAppends::new(),
            refused_at: Instant::now(),
            was_full: false,
            trouble_check: Instant::now(),
            closing: false,
        })
    }

    /// Runs until it is closed and every append is settled.
    pub(super) async fn run(mut self) {
        let mut followed = self.shared.tail.subscribe();
        loop {
            self.publish_queued().await;
            self.waiting.note_followed(*followed.borrow_and_update(), Instant::now());
            self.release_followed();
            if self.closing && self.open.is_empty() && self.waiting.is_empty() {
                return;
            }
            let until = self.next_deadline();
            tokio::select! {
                biased;
                (place, result) = self.publisher.next(), if self.publisher.in_flight() > 0 => {
                    self.settle(place, result);
                    while let Some((place, result)) = self.publisher.try_next() {
                        self.settle(place, result);
                    }
                    self.own.hand_over();
                }
                // Never fails: the sender is in `shared`.
                _ = followed.changed(), if !self.waiting.is_empty() => {}
                Some(learnt) = self.learning.next(), if !self.learning.is_empty() => self.handle_event(learnt),
                command = self.commands.recv(), if !self.closing => {
                    self.handle_command(command.unwrap_or(AppenderCommand::Close));
                    while let Ok(command) = self.commands.try_recv() {
                        self.handle_command(command);
                    }
                }
                () = sleep_until(until.into()) => self.handle_deadline(),
            }
        }
    }

    fn next_deadline(&self) -> Instant {
        let retry = self.blocked.as_ref().map(|(_, until)| *until);
        let far = Instant::now() + Duration::from_secs(60);
        let trouble_check = self.has_idle_trouble().then_some(self.trouble_check);
        retry.into_iter().chain(self.waiting.next_check()).chain(trouble_check).min().unwrap_or(far)
    }

    /// Whether the last message was not stored, and none is there to show that the next one would be: nobody sends to a
    /// gateway that is not ready.
    fn has_idle_trouble(&self) -> bool {
        self.open.is_empty() && self.shared.append_trouble.is_present()
    }

    fn handle_deadline(&mut self) {
        let now = Instant::now();
        if let Some((error, until)) = &self.blocked
            && *until <= now
        {
            let error = error.clone();
            self.blocked = None;
            self.give_up(&error, now);
        }
        self.answer_unfollowed(now);
        if self.has_idle_trouble() && self.trouble_check <= now {
            self.trouble_check = now + TROUBLE_CHECK_INTERVAL;
            let (shared, was_full) = (self.shared.clone(), self.was_full);
            self.learning.push(Box::pin(async move {
                AppenderEvent::Looked { asked_at: now, takes: shared.takes_messages(was_full).await }
            }));
        }
    }

    fn handle_command(&mut self, command: AppenderCommand) {
        match command {
            AppenderCommand::Append(submission) => self.begin_append(submission),
            AppenderCommand::Barrier(reply) => {
                self.barriers.push_back((self.open.next_number(), reply));
                self.pass_barriers();
            }
            AppenderCommand::Close => {
                self.closing = true;
                self.commands.close();
                // From now on transient failures are not waited out.
                let now = Instant::now();
                self.open.iter_mut().for_each(|open| open.give_up_at = now);
            }
        }
    }

    /// Queues the messages of an append.
    fn begin_append(&mut self, JetstreamSubmission { sections, give_up_at, reply }: JetstreamSubmission) {
        let append = self.open.next_number();
        let mut left = 0;
        let mut progress = Vec::with_capacity(sections.len());
        for (nth, mut section) in (0_u32..).zip(sections) {
            let dead = section.records() == 0 || !section.holds();
            let is_full = !dead && !self.may_open_exchanges(&section);
            let dead = dead || is_full;
            let known = if dead { None } else { self.find_kept(&mut section) };
            let is_known = known.is_some();
            let once = self.once_id_of(&section).filter(|_| !dead && !is_known);
            if let Some((id, Some(generation))) = once
                && generation.is_stale()
            {
                let refreshed = self.shared.once.refresh(id, generation);
                left += 1;
                self.learning.push(Box::pin(async move {
                    let result = refreshed.await.unwrap_or(Err(AppendError::Closed));
                    AppenderEvent::Refreshed { append, result }
                }));
            }
            let once = once.map(|(id, generation)| (id, generation.map(|generation| generation.number)));
            let asks = !dead && !is_known && !section.asked().is_empty();
            let records = if dead { 0 } else { section.records() };
            let kept = if section.is_question() || is_known { 0 } else { records };
            let with_ids = if once.is_some() { kept as usize } else { 0 };
            let is_over = with_ids > 0 && !self.shared.ids.try_take(&section.datasource, with_ids);
            let asks = asks || is_over;
            left += kept as usize + usize::from(asks);
            // The first of several records with one id tells whether all are known. Questions come before it.
            let at_once = if once.is_some() { kept.min(1) } else { kept };
            let place =
                |record| PendingMessage { append, section: nth, record, again: false, asks, after: 0 };
            self.queue.extend((0..if asks { 1 } else { at_once }).map(place));
            let content = SharedIdContent { records, digest: section.content_digest() };
            let asked = section.asked().iter().map(|id| (*id, self.generation_of(*id).map(|g| g.number)));
            // Who may bring no new id asks for its own last: a repetition brings none.
            let asked = asked.chain(once.filter(|_| is_over)).collect();
            let places = if dead { Vec::new() } else { section.places() };
            let offsets = vec![0; records as usize];
            let headers = match dead {
                true => HeaderMap::new(),
                false => {
                    origin_headers(section.key_id, section.received_at, section.transport, section.publisher)
                }
            };
            progress.push(SectionProgress {
                section,
                headers,
                places,
                once,
                offsets,
                duplicates: 0,
                content,
                asked,
                found: known.or(is_full.then_some(SectionOutcome::ExchangesFull)),
                dead,
                new_ids: if is_over { 0 } else { with_ids },
                is_over,
            });
        }
        self.open.push(PendingAppend { sections: progress, left, error: None, give_up_at, reply });
        self.answer_if_settled(append);
    }

    /// What was kept before of a section whose exchange has been open for longer than JetStream may know its id.
    fn find_kept(&self, section: &mut Section) -> Option<SectionOutcome> {
        let exchanges = section.once().chain(section.asked().iter().copied()).filter(|id| id.is_exchange());
        let find = |id| self.shared.exchanges.find(id, self.generation_of(id).map(|g| g.number));
        // What lay beyond an earlier state from which the log went on is no longer there.
        let is_there = |kept: &KeptExchange| {
            let end = self.shared.history.get().and_then(|history| history.end_since(kept.epoch));
            end.is_none_or(|end| kept.first < end)
        };
        let kept = exchanges.filter_map(find).find(is_there)?;
        let earlier = Offsets::consecutive(kept.first, kept.content.records);
        let content = SharedIdContent { records: section.records(), digest: section.content_digest() };
        match kept.content.is_same(content) {
            true if section.asked().is_empty() => Some(SectionOutcome::Duplicate(earlier)),
            true => Some(SectionOutcome::Known(earlier)),
            false if section.asked().is_empty() || section.is_question() => {
                Some(SectionOutcome::Conflict { earlier, in_exchange: true })
            }
            false => None,
        }
    }

    /// Whether the datasource of a section may open its exchanges; if so, they count.
    fn may_open_exchanges(&self, section: &Section) -> bool {
        let mut opened = section.once().filter(|id| id.is_exchange());
        section.is_question() || opened.all(|id| self.shared.exchanges.try_open(&section.datasource, id))
    }

    /// The id under which a section is kept once. A message id takes precedence over an exchange's: a
    /// sender that repeats the exchange repeats it too.
    fn once_id_of(&self, section: &Section) -> Option<(OnceId, Option<Generation>)> {
        let id = section.once().find(|id| !id.is_exchange()).or_else(|| section.once().next())?;
        Some((id, self.generation_of(id)))
    }

    fn generation_of(&self, id: OnceId) -> Option<Generation> {
        if id.is_exchange() { self.shared.once.generation(id) } else { None }
    }

    /// Publishes queued messages, as many as may be in flight.
    async fn publish_queued(&mut self) {
        let after = self.shared.tail.next_offset();
        while self.blocked.is_none() && self.publisher.in_flight() < PUBLISHES_IN_FLIGHT_MAX {
            let Some(place) = self.refused.pop_first().or_else(|| self.queue.pop_front()) else { return };
            let place = PendingMessage { after, ..place };
            if let Some(obstacle) = self.shared.obstacle() {
                self.refused.insert(place);
                self.blocked = Some((obstacle, Instant::now() + PUBLISH_RETRY_PAUSE));
                return;
            }
            let Some(open) = self.open.get_mut(place.append) else { continue };
            let progress = &mut open.sections[place.section as usize];
            // Checked right before publishing, so that nothing enters under a lease that has ended.
            progress.dead |= !progress.section.holds();
            if progress.dead || open.error.is_some() {
                let stands_for = progress.stands_for(place);
                self.count_settled(place.append, stands_for);
                continue;
            }
            let record = progress.section.record(progress.places[place.record as usize]);
            let encoded = match progress.asked.front().filter(|_| place.asks) {
                Some((id, generation)) => {
                    let id = message_id_of(*id, *generation, 0);
                    encode_question(&record, id, self.shared.is_replicated)
                }
                None => {
                    let id =
                        progress.once.map(|(id, generation)| message_id_of(id, generation, place.record));
                    let content = (id.is_some() && place.record == 0).then_some(progress.content);
                    encode_message(&record, &progress.headers, id, content)
                }
            };
            let sent = match encoded {
                Ok(message) => self.publisher.send(place, message).await.map_err(|(_, error)| error),
                Err(error) => Err(PublishError::Refused(error.to_string())),
            };
            if let Err(error) = sent {
                self.settle(place, Err(error));
            }
        }
    }

    /// Fails the appends that have waited long enough, with the error that blocks publishing.
    fn give_up(&mut self, error: &AppendError, now: Instant) {
        let open = &mut self.open;
        let mut failed = Vec::new();
        let mut waits = |place: &PendingMessage| {
            let Some(open) = open.get_mut(place.append) else { return false };
            let waits = open.error.is_none() && open.give_up_at > now;
            if !waits {
                open.error.get_or_insert_with(|| error.clone());
                failed.push((place.append, open.sections[place.section as usize].stands_for(*place)));
            }
            waits
        };
        self.refused.retain(&mut waits);
        self.queue.retain(&mut waits);
        failed.into_iter().for_each(|(append, messages)| self.count_settled(append, messages));
    }

    /// Counts `messages` more of an append as settled.
    fn count_settled(&mut self, append: u64, messages: usize) {
        if let Some(open) = self.open.get_mut(append) {
            open.left = open.left.saturating_sub(messages);
            self.answer_if_settled(append);
        }
    }

    /// Answers an append if it is settled.
    fn answer_if_settled(&mut self, append: u64) {
        let Some(open) = self.open.take_settled(append) else { return };
        open.settle_ids(&self.shared.ids);
        let last = open.last_offset();
        if open.error.is_some() || last < self.shared.tail.next_offset() {
            open.answer(&self.shared);
        } else {
            self.waiting.push(append, last, open, Instant::now());
        }
        self.pass_barriers();
    }

    fn pass_barriers(&mut self) {
        while let Some((number, _)) = self.barriers.front()
            && *number <= self.open.settled_below()
            && self.waiting.has_none_below(*number)
        {
            let _ = self.barriers.pop_front().map(|(_, reply)| reply.send(()));
        }
    }

    /// Answers appends without a follower that stands still. Without it, fences before their records may be unknown;
    /// without the registry too, a key's end: then they fail when they have waited long enough.
    fn answer_unfollowed(&mut self, now: Instant) {
        let (shared, closing) = (&self.shared, self.closing);
        let has_obstacle = shared.obstacle().is_some();
        let is_over = |open: &PendingAppend| closing || open.give_up_at <= now;
        let UnfollowedAppends { answered, given_up } =
            self.waiting.take_unfollowed(now, has_obstacle, is_over);
        answered.into_iter().for_each(|open| open.answer_unfollowed(shared));
        for mut open in given_up {
            let words = "this gateway has lost NATS and does not know whether a key had ended before";
            open.error = Some(AppendError::Unknown(words.into()));
            open.answer(shared);
        }
        self.pass_barriers();
    }

    /// Answers the appends that the follower has reached.
    fn release_followed(&mut self) {
        while let Some(open) = self.waiting.pop_followed() {
            open.answer(&self.shared);
        }
        self.pass_barriers();
    }
}
