//! A draft: the messages of one read of a socket or of one request. Each is checked against key, limits
//! and schema, and encoded; all of them go to the log together.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use headgate_format::codec::properties::Properties;

use crate::auth::usage::KeyClient;
use crate::auth::{Datasource, Grant, GrantDenial, Key, Scope};
use crate::limits::{CONTENT_TYPE_BYTES_MAX, FRAME_PART_BYTES_MAX};
use crate::log::{self, OnceId, QuarantineReason, RecordBody, Section};
use crate::message::{
    DatasourceId, KeyId, Lease, NameError, RecordFlags, RecordRef, Transport, check_topic, holds_key,
};
use crate::observe::spans::{DraftSpans, RequestTrace, TracedMessage};
use crate::quota::{LimitExceeded, Quota, QuotaStanding};
use crate::time::Rfc3339;

use super::payer::DraftPayer;
use super::payload_checks::PayloadChecks;
use super::refusal::quarantine_reason;
use super::{Exchange, IncomingMessage, Intake, Refusal, check_message_id};

/// The user property of MQTT 5 with a message's id: a second message with the same id is not kept again.
pub const MESSAGE_ID_PROPERTY: &str = "message-id";

/// A message that goes into quarantine.
#[derive(Debug, Clone)]
pub struct QuarantinedMessage {
    /// Its origin in the draft, as [`Draft::push`] returns it.
    pub origin: usize,
    /// Why it is in quarantine.
    pub reason: QuarantineReason<'static>,
}

/// The outcome for a quarantined message that is sent again.
#[derive(Debug)]
pub enum RedriveOutcome {
    /// It is in the draft, as the last origin so far.
    Added,
    /// It stays in quarantine: it still fails, for this reason.
    Fails(Box<QuarantineReason<'static>>),
}

/// Messages that are checked and encoded, but not handed to the log yet.
pub struct Draft {
    pub(super) intake: Intake,
    pub(super) transport: Transport,
    pub(super) publisher: u64,
    pub(super) received_at: i64,
    /// The id that all its messages share.
    pub(super) message_id: Option<String>,
    pub(super) ends_failed_exchanges: bool,
    /// Either all its messages are let in, or only those that fail are kept, in quarantine.
    pub(super) all_or_none: bool,
    /// What the newest message was checked against, and the datasource that it is of.
    pub(super) checks: Option<(DatasourceId, PayloadChecks)>,
    pub(super) client: Option<Arc<KeyClient>>,
    pub(super) sections: Vec<Section>,
    /// The key of each section.
    pub(super) keys: Vec<Arc<Key>>,
    /// Why the messages of each section that only asks are refused.
    pub(super) refusals: Vec<(usize, Refusal)>,
    /// Its messages are not to be kept: they ask whether they are known.
    pub(super) only_asks: bool,
    /// How many of the next messages have been charged to their rates already.
    pub(super) paid: u64,
    /// The limit that all messages exceed, for which they go into quarantine.
    pub(super) over: Option<Box<LimitExceeded>>,
    /// The quota that the newest message was checked against, with its key and datasource.
    pub(super) quota: Option<(KeyId, DatasourceId, Option<Box<Quota>>)>,
    /// Whose memory it takes. The last pays for the messages that are added.
    pub(super) payers: Vec<DraftPayer>,
    /// The spans of its messages.
    pub(super) spans: DraftSpans,
}

impl Draft {
    /// Declares that the client is told when a message goes into quarantine, which ends the message's
    /// QoS 2 exchange (MQTT 5 section 4.3.3): its packet id may be used for another message then.
    pub fn end_failed_exchanges(&mut self) {
        self.ends_failed_exchanges = true;
    }

    /// Declares that either all messages are let in, or only those that fail are kept, in quarantine (see
    /// [`Draft::keep_quarantined_only`]). So those two kinds need no common order, and each is one origin.
    pub fn let_in_all_or_none(&mut self) {
        self.all_or_none = true;
    }

    /// Gives all messages of the draft one common id, before the first is added: either all of them are
    /// kept, or all are duplicates.
    ///
    /// # Errors
    /// [`Refusal::MessageId`].
    pub fn keep_once(&mut self, message_id: &str) -> Result<(), Refusal> {
        check_message_id(message_id)?;
        self.message_id = Some(message_id.to_owned());
        Ok(())
    }

    /// Sets the client that sent it, for the usage of its key.
    pub fn set_client(&mut self, client: &Arc<KeyClient>) {
        self.client = Some(client.clone());
    }

    /// Declares that its messages came with this request.
    pub fn follow(&mut self, request: &RequestTrace) {
        self.spans.follow(request);
    }

    /// Marks that the next message has waited for its turn, so that it is not charged to a rate again.
    pub fn mark_paid(&mut self) {
        self.paid = 1;
    }

    /// Charges all messages that the draft will have, of one key and datasource, to their rates at once.
    /// One by one, a message beyond the burst would never be let in. Returns how much of the message rate
    /// is used then, if there is one.
    ///
    /// # Errors
    /// [`Refusal::Limited`]; nothing is charged then.
    pub fn pay(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        messages: u64,
        bytes: u64,
    ) -> Result<Option<QuotaStanding>, Refusal> {
        self.paid = messages;
        let Some(quota) = self.intake.quota(grant, datasource) else { return Ok(None) };
        match quota.take(messages, bytes, self.intake.hold_back(self.transport)) {
            Err(limited) if limited.is_for_quarantine() => self.over = Some(Box::new(limited)),
            taken => taken?,
        }
        Ok(quota.standing())
    }

    /// Checks one message against the limits of its key and datasource. `paid`: it was charged to their
    /// rates already.
    fn check_quota(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        topic: &str,
        bytes: usize,
        paid: bool,
    ) -> Result<(), Refusal> {
        let known = self.quota.as_ref();
        if known.is_none_or(|(key, of, _)| *key != grant.key_id() || of != datasource) {
            let quota = self.intake.quota(grant, datasource);
            self.quota = Some((grant.key_id(), datasource.clone(), quota.map(Box::new)));
        }
        let Some((_, _, Some(quota))) = &self.quota else { return Ok(()) };
        quota.check(datasource, topic, bytes)?;
        if !paid {
            quota.take(1, bytes as u64, self.intake.hold_back(self.transport))?;
        }
        Ok(())
    }

    /// Checks one message against `grant` and adds it. `datasource` is the one that the front's
    /// address names; `None` takes the key's own or, for a `*` key, the topic's first level.
    /// Returns the origin of the message: an index into `DurableDraft::outcomes`. A message with an id or
    /// exchange of its own is an origin of its own.
    ///
    /// # Errors
    /// Every permanent [`Refusal`]; [`Refusal::Memory`] if the memory is charged ([`Draft::charge_to`]); and
    /// [`Refusal::Limited`]: a message that is held back has to be pushed
    /// again after its [`Intake::wait_turn`]. After [`Refusal::Quarantined`], the message is in the draft
    /// nevertheless, on its way into quarantine: it may be answered when the draft is durable.
    pub fn push(
        &mut self,
        grant: &Grant,
        datasource: Option<&DatasourceId>,
        message: IncomingMessage<'_>,
    ) -> Result<usize, Box<Refusal>> {
        let room = self.payers.last_mut().map_or(Ok(()), |payer| payer.make_room(&message));
        let pushed = match room {
            Ok(()) => self.check_and_add(grant, datasource, message),
            Err(exceeded) => Err(exceeded.into()),
        };
        match pushed.as_ref().map_err(Box::as_ref) {
            Err(Refusal::Limited(limited)) if limited.is_held_back() => {}
            // Counted when the log does not know it.
            Err(Refusal::Asked(_)) => {}
            Err(_) => self.intake.0.authorizer.registry().note_refusal(grant.key()),
            Ok(_) => {}
        }
        pushed
    }

    pub(super) fn check_and_add(
        &mut self,
        grant: &Grant,
        datasource: Option<&DatasourceId>,
        message: IncomingMessage<'_>,
    ) -> Result<usize, Box<Refusal>> {
        let paid = self.paid > 0;
        self.paid = self.paid.saturating_sub(1);
        if !grant.holds() {
            return Err(GrantDenial::Revoked.into());
        }
        let mut topic = message.topic;
        let named;
        let datasource = if grant.datasource().is_all() {
            named = self.find_named(grant, datasource, &mut topic)?;
            &named.id
        } else {
            match datasource {
                Some(named) => grant.allows(Scope::Ingest, named.as_str())?,
                None => grant.allows_scope(Scope::Ingest)?,
            }
            grant.datasource()
        };
        grant.allows_topic(datasource.as_str(), topic)?;
        let message = IncomingMessage { topic, ..message };
        match self.check_form(topic, &message) {
            Ok(()) | Err(Refusal::TooLarge { .. }) if self.only_asks => {
                return Ok(self.question_for(grant, datasource, &message)?);
            }
            Err(refusal @ Refusal::TooLarge { .. }) => {
                return Err(self.ask(grant, datasource, message, refusal)?.into());
            }
            checked => checked?,
        }
        // The rates come after those checks, so that what they refuse is not charged.
        // The schema comes last, because it costs most.
        let metered = match &self.over {
            Some(limited) => Err((**limited).clone().into()),
            None => self.check_quota(grant, datasource, topic, message.payload.len(), paid),
        };
        match metered {
            Err(Refusal::Limited(limited)) if limited.is_for_quarantine() => {
                return Err(self.quarantine(grant, datasource, message, quarantine_reason(&limited))?.into());
            }
            // Over a rate, the others than MQTT's clients are told to come again.
            Err(Refusal::Limited(limited))
                if !limited.is_held_back()
                    && (self.transport == Transport::Mqtt || !limited.limit.is_rate()) =>
            {
                return Err(self.ask(grant, datasource, message, Refusal::Limited(limited))?.into());
            }
            metered => metered?,
        }
        let received_at = self.received_at;
        match self.checks(datasource).check(
            topic,
            message.content_type,
            message.payload,
            message.properties,
            received_at,
        ) {
            Ok(event_at) => {
                if message.flags.contains(RecordFlags::RETAIN) {
                    message.message_id.map_or(Ok(()), check_message_id)?;
                    let checked = self.intake.check_retained(datasource, topic, message.payload.len());
                    if let Err(refusal) = checked {
                        return Err(self.ask(grant, datasource, message, refusal)?.into());
                    }
                }
                let at = self.section_for(grant, datasource, &message, false)?;
                let bytes_before = self.memory_bytes_before(at);
                let IncomingMessage { payload, content_type, properties, flags, .. } = message;
                let note = &[];
                let body = RecordBody { flags, topic, content_type, properties, payload, event_at, note };
                self.spans.note_message(&TracedMessage {
                    origin: at,
                    place: self.sections[at].records(),
                    transport: self.transport,
                    datasource,
                    topic,
                    payload_bytes: payload.len(),
                    properties,
                });
                self.sections[at].push_body(&body);
                self.note_memory(at, bytes_before);
                Ok(at)
            }
            Err(reason) => Err(self.quarantine(grant, datasource, message, *reason)?.into()),
        }
    }

    /// The datasource that a message under a `*` key is for: the one that the front's address names, or the
    /// topic's first level, which is taken off.
    fn find_named(
        &self,
        grant: &Grant,
        datasource: Option<&DatasourceId>,
        topic: &mut &str,
    ) -> Result<Arc<Datasource>, Refusal> {
        let id = match datasource {
            Some(id) => id.as_str(),
            None => {
                let (id, rest) = topic.split_once('/').ok_or(Refusal::DatasourceMissing)?;
                *topic = rest;
                id
            }
        };
        // The scope is checked before the datasource is looked up, so that a key without it cannot find
        // out which datasources exist.
        grant.allows_scope(Scope::Ingest)?;
        if holds_key(id) {
            return Err(NameError::TopicKey.into());
        }
        let found = self.intake.0.authorizer.registry().datasource(id);
        found.ok_or_else(|| Refusal::NoDatasource(id.chars().take(64).collect()))
    }

    /// Checks topic, size and media type: what no waiting helps.
    #[inline]
    fn check_form(&self, topic: &str, message: &IncomingMessage<'_>) -> Result<(), Refusal> {
        let intake = &*self.intake.0;
        check_topic(topic)?;
        intake.log.check_topic(topic)?;
        let (bytes, bytes_max) = (message.payload.len(), intake.limits.payload_bytes_max);
        if bytes > bytes_max {
            return Err(Refusal::TooLarge { bytes, bytes_max, limit: "intake.payload_bytes_max" });
        }
        intake.log.check_size(bytes, message.properties.len())?;
        let content_type = message.content_type;
        if content_type.len() > CONTENT_TYPE_BYTES_MAX || content_type.chars().any(char::is_control) {
            return Err(Refusal::ContentType);
        }
        Ok(())
    }

    /// What the payloads of a datasource are checked against. Looked up once per draft while the datasource stays the
    /// same.
    fn checks(&mut self, datasource: &DatasourceId) -> &PayloadChecks {
        if self.checks.as_ref().is_none_or(|(of, _)| of != datasource) {
            let registry = self.intake.0.authorizer.registry();
            let found = registry.with_datasource(datasource.as_str(), PayloadChecks::of);
            self.checks = Some((datasource.clone(), found.unwrap_or_default()));
        }
        let (_, checks) = self.checks.as_ref().expect("it was just looked up");
        checks
    }

    /// Adds a message for quarantine: it failed its schema or a limit, and passed the checks before those. It
    /// does not use up its id, which belongs to the message that is let in: the corrected one, or this one
    /// when it is redriven. So the id goes with it, in a user property, and it is kept once under another one.
    #[cold]
    fn quarantine(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        message: IncomingMessage<'_>,
        reason: QuarantineReason<'static>,
    ) -> Result<Refusal, Refusal> {
        message.message_id.map_or(Ok(()), check_message_id)?;
        // What fails now may have been let in before.
        let known_as =
            message.message_id.map(|id| OnceId::of_message(&scope_of(&self.intake, datasource), id));
        let known_in = message.exchange.map(Exchange::once_id);
        let exchange = message.exchange.filter(|_| !self.ends_failed_exchanges);
        let mut properties = Cow::Borrowed(message.properties);
        // An MQTT message has the property already.
        if let Some(id) = message.message_id.filter(|_| self.transport != Transport::Mqtt) {
            put_user_property(properties.to_mut(), id_property(self.transport), id);
        }
        let message = IncomingMessage { exchange, properties: &properties, ..message };
        let origin = self.section_for(grant, datasource, &message, true)?;
        let note = log::RecordNote::Quarantined(reason);
        let IncomingMessage { topic, payload, content_type, properties, flags, .. } = message;
        let flags = flags.with(note.flag());
        let bytes_before = self.memory_bytes_before(origin);
        let section = &mut self.sections[origin];
        section.push_noted(topic, payload, content_type, properties, flags, &note.encode());
        known_as.into_iter().chain(known_in).for_each(|id| section.ask_for(id));
        self.note_memory(origin, bytes_before);
        let log::RecordNote::Quarantined(reason) = note else { unreachable!("it was made above") };
        Ok(Refusal::Quarantined(Box::new(QuarantinedMessage { origin, reason })))
    }

    /// Adds a message from quarantine of this datasource if it meets its schema now; `grant` belongs to the admin who asks.
    /// It becomes a record of its original key, transport and client, received now. Its note and its
    /// MQTT 5 user properties `redriven-from` and `first-received-at` say where it was and since when. It
    /// is not retained, because a newer message may be. However often it is sent, it is kept once: under the id
    /// that its sender gave it, so that a corrected message with that id is not kept beside it, or under one that
    /// no client can choose. With `before`, it is left out if it does not come into the log before that time.
    ///
    /// # Errors
    /// [`Refusal::Denied`].
    pub fn redrive(
        &mut self,
        grant: &Grant,
        of: &Datasource,
        record: &RecordRef<'_>,
        before: Option<Instant>,
    ) -> Result<RedriveOutcome, Refusal> {
        let (datasource, scope) = (&of.id, of.scope());
        grant.allows(Scope::Admin, datasource.as_str())?;
        let (offset, received_at) = (record.offset, record.received_at);
        let checks = self.checks(datasource);
        let event_at = match checks.check(
            record.topic,
            record.content_type,
            record.payload,
            record.properties,
            received_at,
        ) {
            Ok(event_at) => event_at,
            Err(reason) => return Ok(RedriveOutcome::Fails(reason)),
        };
        let note = log::RecordNote::Redriven { offset, received_at };
        let mut properties = record.properties.to_vec();
        put_user_property(&mut properties, "redriven-from", &offset.to_string());
        put_user_property(&mut properties, "first-received-at", &Rfc3339(received_at).to_string());
        let mut section = Section::new(
            datasource.clone(),
            record.key_id,
            grant.lease().clone(),
            record.transport,
            record.publisher,
            self.received_at,
        );
        section.bind_to(of.lease.clone());
        before.into_iter().for_each(|time| section.keep_before(time));
        let own_id = user_property(record.properties, id_property(record.transport));
        section.keep_once(match own_id.filter(|id| check_message_id(id).is_ok()) {
            Some(id) => OnceId::of_message(&scope, id),
            None => OnceId::of_message(&scope, &format!("\u{1}redrive-{offset}")),
        });
        let flags = record.flags.without(RecordFlags::QUARANTINED).without(RecordFlags::RETAIN);
        let RecordRef { topic, payload, content_type, .. } = *record;
        let flags = flags.with(note.flag());
        let (note, properties) = (&*note.encode(), &*properties);
        section.push_body(&RecordBody { flags, topic, content_type, properties, payload, event_at, note });
        self.sections.push(section);
        self.keys.push(grant.key().clone());
        Ok(RedriveOutcome::Added)
    }

    /// Drops every message that does not go into quarantine, when all messages are added. What is left does not use
    /// up the draft's id, which belongs to the corrected messages, and is kept once nevertheless.
    pub fn keep_quarantined_only(&mut self) {
        // The messages of its spans are among what is dropped.
        self.spans = DraftSpans::begin();
        let is_quarantined = |section: &Section| section.quarantined().0 > 0;
        let mut sections = self.sections.iter();
        self.keys.retain(|_| sections.next().is_some_and(is_quarantined));
        self.sections.retain(is_quarantined);
        let Some(message_id) = &self.message_id else { return };
        // With its notes, a section may be too large to be kept whole, as an id asks for.
        for section in self.sections.iter_mut().filter(|section| section.weight() <= FRAME_PART_BYTES_MAX) {
            let places = section.places();
            let messages = places.iter().map(|place| section.record(*place)).map(|r| (r.topic, r.payload));
            let scope = scope_of(&self.intake, &section.datasource);
            let id = OnceId::of_parked(&scope, message_id, messages);
            section.keep_once(id);
        }
    }

    /// The section that a message belongs to. Quarantined messages have sections of their own.
    fn section_for(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        message: &IncomingMessage<'_>,
        quarantined: bool,
    ) -> Result<usize, Refusal> {
        if message.message_id.is_none() && message.exchange.is_none() {
            Ok(self.section(grant, datasource, quarantined))
        } else {
            self.section_once(grant, datasource, message, quarantined)
        }
    }

    /// The section for records of this origin. Only the newest section takes more, because the order in the
    /// log is that of the sections: the order in which the messages were accepted.
    #[inline]
    fn section(&mut self, grant: &Grant, datasource: &DatasourceId, quarantined: bool) -> usize {
        let key_id = grant.key_id();
        // Quarantined messages do not use up the draft's id: see `Draft::keep_quarantined_only`.
        let once_for_all = self.message_id.as_deref().filter(|_| !quarantined);
        // A section with an id is kept or dropped as a whole, so it takes no other message.
        let takes_more = |s: &Section| {
            (once_for_all.is_some() || !s.has_once_ids()) && (s.quarantined().0 > 0) == quarantined
        };
        let same = |s: &Section| s.key_id == key_id && s.datasource == *datasource && takes_more(s);
        let open = if self.all_or_none { 0 } else { self.sections.len().saturating_sub(1) };
        if let Some(at) = self.sections[open..].iter().rposition(same) {
            return open + at;
        }
        let message_id = once_for_all.map(|id| OnceId::of_message(&scope_of(&self.intake, datasource), id));
        let mut section = self.new_section(grant, datasource);
        message_id.into_iter().for_each(|id| section.keep_once(id));
        self.sections.push(section);
        self.keys.push(grant.key().clone());
        self.sections.len() - 1
    }

    /// A section for one message that has an id or an exchange.
    fn section_once(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        message: &IncomingMessage<'_>,
        quarantined: bool,
    ) -> Result<usize, Refusal> {
        message.message_id.map_or(Ok(()), check_message_id)?;
        let mut section = self.new_section(grant, datasource);
        section.reserve(message.payload.len() + message.properties.len() + 64);
        if let Some(id) = message.message_id {
            let of_one = std::iter::once((message.topic, message.payload));
            let scope = scope_of(&self.intake, datasource);
            section.keep_once(match quarantined {
                true => OnceId::of_parked(&scope, id, of_one),
                false => OnceId::of_message(&scope, id),
            });
        }
        if let Some(exchange) = message.exchange {
            section.keep_once(exchange.once_id());
        }
        self.sections.push(section);
        self.keys.push(grant.key().clone());
        Ok(self.sections.len() - 1)
    }

    pub(super) fn new_section(&self, grant: &Grant, datasource: &DatasourceId) -> Section {
        let (lease, key_id) = (grant.lease().clone(), grant.key_id());
        let (transport, publisher, received_at) = (self.transport, self.publisher, self.received_at);
        let mut section = Section::new(datasource.clone(), key_id, lease, transport, publisher, received_at);
        if grant.datasource().is_all() {
            // The key outlives the datasource: what it sends there must not outlive it too.
            section.bind_to(lease_of(&self.intake, datasource));
        }
        section
    }

    /// Reserves room for about `bytes` of messages of one origin in the newest section.
    pub fn reserve(&mut self, bytes: usize) {
        if let Some(section) = self.sections.last_mut().filter(|section| !section.has_once_ids()) {
            section.reserve(bytes);
        }
    }

    /// In how many parts the log keeps it.
    pub fn section_count(&self) -> usize {
        self.sections.len()
    }

    /// Whether it holds no message.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }
}

/// The scope of the present incarnation of a datasource: ids of messages mean nothing in the next one.
pub(super) fn scope_of(intake: &Intake, datasource: &DatasourceId) -> DatasourceId {
    let registry = intake.0.authorizer.registry();
    registry.with_datasource(datasource.as_str(), Datasource::scope).unwrap_or_else(|| datasource.clone())
}

/// The lease of a datasource; one that has ended, if it was just deleted.
fn lease_of(intake: &Intake, datasource: &DatasourceId) -> Lease {
    let registry = intake.0.authorizer.registry();
    registry.with_datasource(datasource.as_str(), |found| found.lease.clone()).unwrap_or_else(|| {
        let ended = Lease::new();
        ended.end();
        ended
    })
}

/// The user property of a quarantined message that has its id: in MQTT the one that the client sent, otherwise
/// one that no client can send.
fn id_property(transport: Transport) -> &'static str {
    match transport {
        Transport::Mqtt => MESSAGE_ID_PROPERTY,
        Transport::Http | Transport::Nats => "headgate-message-id",
    }
}

/// The first value of a user property in MQTT 5 properties in wire form.
fn user_property<'a>(properties: &'a [u8], name: &str) -> Option<&'a str> {
    Properties::from_wire(properties).user().find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// Adds a user property to MQTT 5 properties in wire form (MQTT 5 sections 2.2.2.2 and 1.5.7).
fn put_user_property(properties: &mut Vec<u8>, name: &str, value: &str) {
    properties.push(0x26);
    for text in [name, value] {
        let length = u16::try_from(text.len()).expect("an offset and a time are short");
        properties.extend_from_slice(&length.to_be_bytes());
        properties.extend_from_slice(text.as_bytes());
    }
}
