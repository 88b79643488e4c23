//! The receiving half of a connection: decodes bytes to packets, and puts PUBLISH packets into a draft
//! with the answers that they are due.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use tracing::debug;

use super::acks::ReadAcks;
use super::codec::properties::{TOPIC_ALIAS, forward_properties};
use super::codec::write::{self, AckKind, PacketForm};
use super::codec::{
    DisconnectPacket, MqttFrame, MqttPacket, MqttVersion, PublishPacket, ReasonCode, Violation,
};
use super::credentials;
use super::session::MqttSession;
use super::subscribe::{SubscribeRequest, SubscriptionRequest};
use crate::auth::shape::KeyShape;
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, GrantDenial, RejectedKey};
use crate::front::credentials::is_key_header;
use crate::intake::{Draft, Exchange, IncomingMessage, Intake, QuarantinedMessage, Refusal};
use crate::limits::MQTT_TOPIC_ALIAS_MAXIMUM;
use crate::message::{KeyId, RecordFlags, Transport};
use crate::observe::refusals::RefusalNote;
use crate::quota::{Limit, LimitExceeded};

/// The user property with a message's id: a second message with the same id is not kept again.
const MESSAGE_ID_PROPERTY: &str = "message-id";

/// How a client's connection ends.
#[derive(Debug)]
pub(super) enum InboundEnd {
    /// The client closed the connection without a DISCONNECT.
    Lost,
    /// The client sent a DISCONNECT.
    Goodbye(DisconnectPacket),
    /// The client broke a rule of the protocol.
    Violation(Violation),
    /// A message was refused, and the protocol has no other way to say so (MQTT 3.1.1).
    Refused(Refusal),
}

/// The connected client, as a refusal reports it.
#[derive(Debug)]
pub(super) struct ClientIdentity {
    pub(super) address: IpAddr,
    /// The client identifier.
    pub(super) client: Arc<str>,
    /// The same, as the record of a key's use has it.
    pub(super) user: Arc<KeyClient>,
}

impl ClientIdentity {
    /// Adds the client's identity to the note of a refusal.
    pub(super) fn note<'a>(&'a self, grant: &'a Grant, note: RefusalNote<'a>) -> RefusalNote<'a> {
        RefusalNote {
            address: Some(self.address),
            client: &self.client,
            datasource: grant.datasource().as_str(),
            key_id: Some(grant.key_id()),
            ..note
        }
    }
}

/// The receiving half of a connection: its state between two reads.
pub(super) struct Inbound {
    /// The grant of the connection's key.
    pub(super) grant: Grant,
    pub(super) who: Arc<ClientIdentity>,
    pub(super) form: PacketForm,
    packet_bytes_max: usize,
    receive_maximum: u16,
    /// The client's hash, as in the records that it publishes.
    pub(super) publisher: u64,
    /// The session's number.
    session: u64,
    /// The session ends with the connection.
    ephemeral: bool,
    /// QoS 2: the packet identifiers of messages that this connection accepted and that are not released
    /// yet. The log knows those of earlier connections.
    exchanges: BTreeSet<u16>,
    /// The beginning of a packet whose rest has not arrived yet.
    partial: Vec<u8>,
    /// `partial` may hold whole packets, because a request before them had to be served first or the first
    /// of them is held back.
    paused: bool,
    /// The next message was held back, and is already counted against its rates.
    paid: bool,
    aliases: ReceivedTopicAliases,
}

/// What one read of the socket held.
#[derive(Default)]
pub(super) struct InboundBatch {
    /// The accepted messages.
    pub(super) draft: Option<Draft>,
    /// The answers to send when the draft is durable.
    pub(super) train: ReadAcks,
    /// How many whole packets were in it; any is a sign of life.
    pub(super) packets: usize,
    /// The packet identifiers of the client's PUBACKs.
    pub(super) acknowledged: Vec<u16>,
    /// A request to be served before anything more is taken in.
    pub(super) request: Option<SubscriptionRequest>,
    /// The next message is over this limit: nothing more is taken in until its turn comes.
    pub(super) held: Option<LimitExceeded>,
    /// The QoS 2 exchanges that the client has released.
    pub(super) releases: Vec<Exchange>,
    /// The packet identifiers of QoS 2 exchanges that the messages open.
    opened: Vec<u16>,
    /// Set if nothing more is to be read.
    pub(super) end: Option<InboundEnd>,
}

impl InboundBatch {
    /// Whether the draft has QoS 2 messages.
    pub(super) fn has_opened_exchanges(&self) -> bool {
        !self.opened.is_empty()
    }
}

impl Inbound {
    pub(super) fn new(
        grant: Grant,
        who: Arc<ClientIdentity>,
        form: PacketForm,
        packet_bytes_max: usize,
        receive_maximum: u16,
        publisher: u64,
        session: &MqttSession,
    ) -> Self {
        Self {
            grant,
            who,
            form,
            packet_bytes_max,
            receive_maximum,
            publisher,
            session: session.uid,
            ephemeral: !session.is_durable(),
            exchanges: BTreeSet::new(),
            partial: Vec::new(),
            paused: false,
            paid: false,
            aliases: ReceivedTopicAliases::default(),
        }
    }

    /// The exchanges that nobody can release any more, if the session ends with the connection.
    pub(super) fn abandoned_exchanges(&self) -> Vec<Exchange> {
        let packet_ids = self.exchanges.iter().filter(|_| self.ephemeral);
        packet_ids.map(|packet_id| self.exchange(*packet_id)).collect()
    }

    fn exchange(&self, packet_id: u16) -> Exchange {
        Exchange { session: self.session, packet_id }
    }

    /// Whether the session ends with the connection.
    pub(super) fn is_ephemeral(&self) -> bool {
        self.ephemeral
    }

    /// Whether packets that were read wait to be taken in.
    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Lets the held message go on. With `paid` it is already counted against its rates.
    pub(super) fn resume(&mut self, paid: bool) {
        self.paid = paid;
    }

    /// Adds the client's identity to the note of a refusal.
    pub(super) fn note<'a>(&'a self, note: RefusalNote<'a>) -> RefusalNote<'a> {
        self.who.note(&self.grant, note)
    }

    /// Decodes what was read. Answers that need not wait are written to `out`; `unacknowledged` earlier
    /// messages still wait for theirs.
    pub(super) fn receive(
        &mut self,
        read_bytes: &[u8],
        intake: &Intake,
        unacknowledged: usize,
        out: &mut Vec<u8>,
    ) -> InboundBatch {
        let mut read = InboundRead { batch: InboundBatch::default(), intake, unacknowledged, out };
        let mut bytes = read_bytes;
        let mut buffered;
        if std::mem::take(&mut self.paused) {
            buffered = std::mem::take(&mut self.partial);
            buffered.extend_from_slice(bytes);
            bytes = &buffered;
        }
        // A packet that began in an earlier read is completed on its own; the rest is read in place.
        while !self.partial.is_empty() && !bytes.is_empty() && read.may_go_on() {
            let mut partial = std::mem::take(&mut self.partial);
            let missing = missing_bytes(&partial, self.packet_bytes_max).min(bytes.len());
            let (rest_of_packet, after) = bytes.split_at(missing);
            partial.extend_from_slice(rest_of_packet);
            bytes = after;
            let consumed = self.handle_packets(&partial, &mut read);
            if consumed < partial.len() {
                self.partial = partial;
            }
        }
        if read.may_go_on() && !bytes.is_empty() {
            let consumed = self.handle_packets(bytes, &mut read);
            bytes = &bytes[consumed..];
        }
        self.paused = read.batch.request.is_some() || read.batch.held.is_some();
        if read.batch.end.is_none() && !bytes.is_empty() {
            self.partial.extend_from_slice(bytes);
        }
        read.batch
    }

    /// Handles the whole packets at the beginning of `bytes`; returns how many bytes those take.
    fn handle_packets(&mut self, bytes: &[u8], read: &mut InboundRead<'_>) -> usize {
        let mut consumed = 0;
        while read.may_go_on() {
            let rest = &bytes[consumed..];
            let frame = match MqttFrame::split(rest, self.packet_bytes_max, Some(self.form.version)) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(violation) => {
                    read.batch.end = Some(InboundEnd::Violation(violation));
                    break;
                }
            };
            consumed += frame.bytes;
            read.batch.packets += 1;
            if let Err(end) = frame
                .decode(self.form.version)
                .map_err(InboundEnd::Violation)
                .and_then(|packet| self.handle_packet(packet, rest.len(), read))
            {
                read.batch.end = Some(end);
            }
            if read.batch.held.is_some() {
                // The packet stays in the buffer, and is decoded again when its turn comes.
                consumed -= frame.bytes;
                read.batch.packets -= 1;
            }
        }
        consumed
    }

    fn handle_packet(
        &mut self,
        packet: MqttPacket<'_>,
        bytes_left: usize,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        match packet {
            MqttPacket::Publish(publish) => return self.handle_publish(&publish, bytes_left, read),
            MqttPacket::Pingreq => read.batch.train.push_pong(),
            MqttPacket::Subscribe(subscribe) => {
                read.batch.request = Some(SubscriptionRequest::Subscribe(SubscribeRequest::from(&subscribe)));
            }
            MqttPacket::Unsubscribe(unsubscribe) => {
                read.batch.request = Some(SubscriptionRequest::from(&unsubscribe))
            }
            MqttPacket::Disconnect(disconnect) => {
                if self.ephemeral && disconnect.session_expiry_s.is_some_and(|s| s > 0) {
                    // Section 3.14.2.2.2.
                    return Err(InboundEnd::Violation(Violation::protocol(
                        "a session expiry for a session that ends with its connection",
                    )));
                }
                return Err(InboundEnd::Goodbye(disconnect));
            }
            MqttPacket::Connect => {
                return Err(InboundEnd::Violation(Violation::protocol("a second CONNECT")));
            }
            MqttPacket::Auth => {
                return Err(InboundEnd::Violation(Violation::protocol(
                    "AUTH without an authentication method",
                )));
            }
            MqttPacket::Puback(ack) => read.batch.acknowledged.push(ack.packet_id),
            // The gateway sends nothing with QoS 2: this ends an exchange that the client began with
            // another server (section 4.3.3).
            MqttPacket::Pubrec(ack) => {
                let reason = ReasonCode::PacketIdentifierNotFound;
                write::message_ack(read.out, self.form, AckKind::Pubrel, ack.packet_id, reason, None);
            }
            MqttPacket::Pubcomp(_) => {}
            MqttPacket::Pubrel(ack) => self.handle_pubrel(ack.packet_id, read),
        }
        Ok(())
    }

    fn handle_publish(
        &mut self,
        publish: &PublishPacket<'_>,
        bytes_left: usize,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        if publish.qos == 2 && self.exchanges.contains(&publish.packet_id) {
            // A repetition. Its answer comes after that of the first, so it cannot precede durability.
            read.batch.train.push_done(AckKind::Pubrec, publish.packet_id);
            return Ok(());
        }
        let v5 = self.form.version == MqttVersion::V5;
        let unacknowledged = read.unacknowledged + read.batch.train.unacknowledged() + self.exchanges.len();
        if v5 && publish.qos > 0 && unacknowledged >= usize::from(self.receive_maximum) {
            return Err(InboundEnd::Violation(Violation {
                reason: ReasonCode::ReceiveMaximumExceeded,
                text: "more unacknowledged messages than the receive maximum",
            }));
        }
        let topic = self.aliases.resolve(publish).map_err(InboundEnd::Violation)?;
        let first = read.batch.draft.is_none();
        let draft = read.batch.draft.get_or_insert_with(|| {
            let mut draft = read.intake.draft(Transport::Mqtt, self.publisher);
            if v5 {
                draft.end_failed_exchanges();
            }
            draft.set_client(&self.who.user);
            draft
        });
        let exchange =
            (publish.qos == 2).then_some(Exchange { session: self.session, packet_id: publish.packet_id });
        if std::mem::take(&mut self.paid) {
            draft.mark_paid();
        }
        let from = self.who.address;
        let pushed = push_message(draft, read.intake, &self.grant, from, topic, publish, exchange);
        match pushed {
            Ok(origin) => {
                if first {
                    draft.reserve(bytes_left);
                }
                match publish.qos {
                    0 => {}
                    1 => read.batch.train.push_admitted(AckKind::Puback, publish.packet_id, origin),
                    _ => {
                        self.exchanges.insert(publish.packet_id);
                        read.batch.opened.push(publish.packet_id);
                        read.batch.train.push_admitted(AckKind::Pubrec, publish.packet_id, origin);
                    }
                }
                Ok(())
            }
            Err(RefusedMessage { refusal: Refusal::Quarantined(quarantined), .. }) => {
                self.answer_quarantined(publish, *quarantined, read);
                Ok(())
            }
            Err(RefusedMessage { refusal: Refusal::Limited(limited), .. }) if limited.is_held_back() => {
                read.batch.held = Some(*limited);
                Ok(())
            }
            Err(refused) => self.answer_refused(publish, refused, read),
        }
    }

    /// Answers a quarantined message once it is durable there: in MQTT 5 with the reason, in MQTT 3.1.1,
    /// which has no way to refuse a message, with a success.
    fn answer_quarantined(
        &mut self,
        publish: &PublishPacket<'_>,
        quarantined: QuarantinedMessage,
        read: &mut InboundRead<'_>,
    ) {
        let QuarantinedMessage { origin, reason } = quarantined;
        debug!(key_id = %self.grant.key_id(), %reason, "a message goes into quarantine");
        let answer = match publish.qos {
            0 => return,
            1 => AckKind::Puback,
            _ => AckKind::Pubrec,
        };
        if self.form.version == MqttVersion::V5 {
            let words = format!("{reason}; it is kept in quarantine");
            read.batch.train.push_quarantined(answer, publish.packet_id, origin, words);
            return;
        }
        if publish.qos == 2 {
            self.exchanges.insert(publish.packet_id);
            read.batch.opened.push(publish.packet_id);
        }
        read.batch.train.push_admitted(answer, publish.packet_id, origin);
    }

    /// Handles a PUBREL: the client has the PUBREC, and will not send the message again (section 4.3.3).
    fn handle_pubrel(&mut self, packet_id: u16, read: &mut InboundRead<'_>) {
        let known = self.exchanges.remove(&packet_id);
        // The PUBREC is not sent yet if the PUBREL came in the same read as its message.
        if read.batch.opened.contains(&packet_id) || (!known && self.ephemeral) {
            let reason = ReasonCode::PacketIdentifierNotFound;
            let words = "no message with this packet identifier waits for its release";
            read.batch.train.push_refused(AckKind::Pubcomp, packet_id, reason, words.to_owned());
            return;
        }
        read.batch.releases.push(self.exchange(packet_id));
        read.batch.train.push_done(AckKind::Pubcomp, packet_id);
    }

    /// Refuses one message: in its acknowledgement if the protocol version has a reason code, otherwise by
    /// ending the connection. A QoS 0 message is dropped and counted.
    fn answer_refused(
        &self,
        publish: &PublishPacket<'_>,
        refused: RefusedMessage,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        let RefusedMessage { refusal, own_key } = refused;
        let note = self.note(refusal.note(Transport::Mqtt));
        read.intake.refusals().note(match own_key {
            None => note,
            Some((key_id, key_shape)) => RefusalNote { key_id, key_shape, ..note },
        });
        debug!(key_id = %self.grant.key_id(), cause = refusal.cause().name(), %refusal, "refused a message");
        if self.form.version != MqttVersion::V5 {
            return Err(InboundEnd::Refused(refusal));
        }
        match (&refusal, refusal_reason_code(&refusal)) {
            // The connection's own key is dead, so the connection ends and not only this message.
            (Refusal::Denied(GrantDenial::Revoked), _) if !self.grant.holds() => {
                Err(InboundEnd::Refused(refusal))
            }
            (_, ReasonCode::PacketTooLarge) => Err(InboundEnd::Refused(refusal)),
            (_, reason) if publish.qos > 0 => {
                let answer = if publish.qos == 1 { AckKind::Puback } else { AckKind::Pubrec };
                read.batch.train.push_refused(answer, publish.packet_id, reason, refusal.to_string());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The topics of the aliases that a client has set, from alias 1 on.
#[derive(Default)]
struct ReceivedTopicAliases(Vec<Option<Box<str>>>);

impl ReceivedTopicAliases {
    /// The topic of a PUBLISH: its own, for which it may set an alias, or that of its alias (section
    /// 3.3.2.3.4).
    fn resolve<'a>(&'a mut self, publish: &PublishPacket<'a>) -> Result<&'a str, Violation> {
        let invalid = |text| Violation { reason: ReasonCode::TopicAliasInvalid, text };
        if publish.properties.is_empty() {
            return Ok(publish.topic);
        }
        let Some(alias) = publish.properties.u16(TOPIC_ALIAS) else { return Ok(publish.topic) };
        if alias == 0 || alias > MQTT_TOPIC_ALIAS_MAXIMUM {
            return Err(invalid("a topic alias of 0 or over the maximum"));
        }
        let place = usize::from(alias) - 1;
        if publish.topic.is_empty() {
            let known = self.0.get(place).and_then(Option::as_deref);
            return known.ok_or(invalid("a topic alias that was not set"));
        }
        if self.0.len() <= place {
            self.0.resize(place + 1, None);
        }
        self.0[place] = Some(publish.topic.into());
        Ok(publish.topic)
    }
}

/// One read of the socket that is being handled.
struct InboundRead<'a> {
    batch: InboundBatch,
    intake: &'a Intake,
    unacknowledged: usize,
    out: &'a mut Vec<u8>,
}

impl InboundRead<'_> {
    /// Whether the next packet may be taken in.
    fn may_go_on(&self) -> bool {
        self.batch.end.is_none() && self.batch.request.is_none() && self.batch.held.is_none()
    }
}

/// A message that was refused.
struct RefusedMessage {
    refusal: Refusal,
    /// What is known about the message's own key, if it has one.
    own_key: Option<(Option<KeyId>, Option<KeyShape>)>,
}

impl From<Refusal> for RefusedMessage {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, own_key: None }
    }
}

impl From<RejectedKey> for RefusedMessage {
    fn from(rejected: RejectedKey) -> Self {
        Self { refusal: rejected.denied.into(), own_key: Some((rejected.key_id, rejected.shape)) }
    }
}

/// Checks one message and adds it to the draft, under its own key if it has one, otherwise under the
/// connection's.
fn push_message(
    draft: &mut Draft,
    intake: &Intake,
    grant: &Grant,
    from: IpAddr,
    topic: &str,
    publish: &PublishPacket<'_>,
    exchange: Option<Exchange>,
) -> Result<usize, RefusedMessage> {
    let mut flags = if publish.retain { RecordFlags::RETAIN } else { RecordFlags::default() };
    if publish.qos == 0 {
        flags = flags.with(RecordFlags::AT_MOST_ONCE);
    }
    let payload = publish.payload;
    if publish.properties.is_empty() {
        let message = IncomingMessage {
            topic,
            payload,
            content_type: "",
            properties: &[],
            flags,
            message_id: None,
            exchange,
        };
        return Ok(draft.push(grant, None, message)?);
    }
    let own = credentials::grant_of_publish(&publish.properties, intake.authorizer(), from)?;
    let mut properties = Vec::new();
    let content_type = forward_properties(&publish.properties, &mut properties, is_key_header);
    let message = IncomingMessage {
        topic,
        payload,
        content_type,
        properties: &properties,
        flags,
        message_id: publish
            .properties
            .user()
            .find(|(name, _)| *name == MESSAGE_ID_PROPERTY)
            .map(|(_, id)| id),
        exchange,
    };
    let pushed = draft.push(own.as_ref().unwrap_or(grant), None, message);
    pushed.map_err(|refusal| RefusedMessage { refusal, own_key: own.map(|own| (Some(own.key_id()), None)) })
}

/// How many more bytes the packet in `partial` needs; 1 while its length is not known.
fn missing_bytes(partial: &[u8], packet_bytes_max: usize) -> usize {
    let mut length = 0_usize;
    for (i, &byte) in partial.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return (2 + i + length).min(packet_bytes_max).saturating_sub(partial.len()).max(1);
        }
    }
    1
}

/// The MQTT 5 reason code of a refusal; no other place maps the two.
pub(super) fn refusal_reason_code(refusal: &Refusal) -> ReasonCode {
    match refusal {
        Refusal::Denied(GrantDenial::TooManyFailures { .. }) => ReasonCode::QuotaExceeded,
        Refusal::Denied(_) | Refusal::NoDatasource(_) => ReasonCode::NotAuthorized,
        Refusal::Topic(_) | Refusal::DatasourceMissing | Refusal::Subject(_) => ReasonCode::TopicNameInvalid,
        Refusal::TooLarge { .. } => ReasonCode::PacketTooLarge,
        Refusal::ContentType | Refusal::Quarantined(_) => ReasonCode::PayloadFormatInvalid,
        Refusal::MessageId | Refusal::ReplySubject | Refusal::Header(_) => {
            ReasonCode::ImplementationSpecificError
        }
        Refusal::Limited(limited) => match limited.limit {
            Limit::PayloadBytes => ReasonCode::PacketTooLarge,
            _ if limited.is_held_back() => ReasonCode::MessageRateTooHigh,
            _ => ReasonCode::QuotaExceeded,
        },
        Refusal::Busy { .. } | Refusal::Log(_) => ReasonCode::ServerBusy,
    }
}
