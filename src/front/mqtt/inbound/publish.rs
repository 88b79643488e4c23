//! One PUBLISH from a client: its topic, its key, its place in the draft, and the answer that it is due.

use std::net::IpAddr;

use tracing::debug;

use super::super::bridge_notice::is_bridge_notice;
use super::super::codec::properties::TOPIC_ALIAS;
use super::super::codec::write::AckKind;
use super::super::codec::{MqttVersion, PublishPacket, ReasonCode, Violation};
use super::super::credentials;
use super::super::exchanges::ExchangeState;
use super::super::forwarded::{ForwardedProperties, mount_of};
use super::super::reason::refusal_reason_code;
use super::{Inbound, InboundEnd, InboundRead};
use crate::auth::shape::KeyShape;
use crate::auth::{Grant, GrantDenial, RejectedKey};
use crate::intake::{
    AskedMessage, Draft, Exchange, IncomingMessage, Intake, MESSAGE_ID_PROPERTY, QuarantinedMessage, Refusal,
};
use crate::limits::MQTT_TOPIC_ALIAS_MAXIMUM;
use crate::message::{KeyId, RecordFlags, Transport};
use crate::observe::refusals::RefusalNote;

impl Inbound {
    /// Adds a PUBLISH to the read's draft, or refuses it.
    #[inline]
    pub(super) fn handle_publish(
        &mut self,
        publish: &PublishPacket<'_>,
        bytes_left: usize,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        let state = self.exchanges.state(publish.packet_id).filter(|_| publish.qos == 2);
        if let Some(ExchangeState::Opening | ExchangeState::Releasing) = state {
            // A repetition or another message: the log's answer tells.
            read.batch.waits_for_answers = true;
            return Ok(());
        }
        let is_open = state == Some(ExchangeState::Open);
        let v5 = self.form.version == MqttVersion::V5;
        let unacknowledged =
            read.unacknowledged + read.batch.acks.unacknowledged() + self.exchanges.unreleased();
        if v5 && publish.qos > 0 && !is_open && unacknowledged >= usize::from(self.receive_maximum) {
            return Err(InboundEnd::Violation(Violation {
                reason: ReasonCode::ReceiveMaximumExceeded,
                text: "more unacknowledged messages than the receive maximum",
            }));
        }
        let topic = self.aliases.resolve(publish).map_err(InboundEnd::Violation)?;
        if is_bridge_notice(topic) && self.grant.holds() {
            read.intake.metrics().bridge_notices.increment(1);
            self.answer_dropped(publish, read);
            return Ok(());
        }
        let first = read.batch.draft.is_none();
        let draft = read.batch.draft.get_or_insert_with(|| {
            let mut draft = read.intake.draft(Transport::Mqtt, self.publisher);
            if v5 {
                draft.end_failed_exchanges();
            }
            draft.set_client(&self.who.user);
            draft
        });
        let exchange = Exchange { session: self.session, packet_id: publish.packet_id };
        let exchange = (publish.qos == 2).then_some(MessageExchange { exchange, is_open });
        let from = self.who.address;
        if is_open {
            // The log has a message of this exchange. It tells whether this is the same.
            let pushed = push_message(draft, read.intake, &self.grant, from, topic, publish, exchange);
            match pushed {
                Ok(origin) => read.batch.acks.push_repeated(publish.packet_id, origin),
                Err(_) => read.batch.acks.push_done(AckKind::Pubrec, publish.packet_id),
            }
            return Ok(());
        }
        if std::mem::take(&mut self.paid) {
            draft.mark_paid();
        }
        match push_message(draft, read.intake, &self.grant, from, topic, publish, exchange) {
            Ok(origin) => {
                if first {
                    draft.reserve(bytes_left);
                }
                self.answer_admitted(publish, origin, read);
                Ok(())
            }
            Err(refused) => self.answer_not_admitted(publish, *refused, read),
        }
    }

    #[cold]
    fn answer_not_admitted(
        &mut self,
        publish: &PublishPacket<'_>,
        refused: RefusedMessage,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        match refused {
            RefusedMessage { refusal: Refusal::Quarantined(quarantined), .. } => {
                self.answer_quarantined(publish, *quarantined, read);
                Ok(())
            }
            RefusedMessage { refusal: Refusal::Limited(limited), .. } if limited.is_held_back() => {
                read.batch.held = Some(*limited);
                Ok(())
            }
            refused => self.answer_refused(publish, refused, read),
        }
    }

    /// Answers a message that is taken and not kept.
    fn answer_dropped(&mut self, publish: &PublishPacket<'_>, read: &mut InboundRead<'_>) {
        match publish.qos {
            0 => {}
            1 => read.batch.acks.push_done(AckKind::Puback, publish.packet_id),
            _ => {
                self.exchanges.open_unkept(publish.packet_id);
                read.batch.acks.push_done(AckKind::Pubrec, publish.packet_id);
            }
        }
    }

    /// Answers a message in the draft, once it is durable.
    #[inline]
    fn answer_admitted(&mut self, publish: &PublishPacket<'_>, origin: usize, read: &mut InboundRead<'_>) {
        match publish.qos {
            0 => {}
            1 => read.batch.acks.push_admitted(AckKind::Puback, publish.packet_id, origin),
            _ => {
                self.exchanges.begin_open(publish.packet_id);
                read.batch.has_opened_exchanges = true;
                read.batch.acks.push_admitted(AckKind::Pubrec, publish.packet_id, origin);
            }
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
            self.await_exchange(publish);
            read.batch.acks.push_quarantined(answer, publish.packet_id, origin, words);
            return;
        }
        self.answer_admitted(publish, origin, read);
    }

    /// The log tells whether there is an exchange of a message that is refused otherwise.
    fn await_exchange(&mut self, publish: &PublishPacket<'_>) {
        if publish.qos == 2 {
            self.exchanges.begin_open(publish.packet_id);
        }
    }

    /// Ends the exchange of a message that is refused now, although an earlier connection of the session may
    /// have brought it into the log: after the refusal, the client may use the packet identifier for another
    /// message (MQTT 5 section 4.3.3).
    fn end_refused_exchange(&self, publish: &PublishPacket<'_>, read: &mut InboundRead<'_>) {
        if publish.qos == 2 && !self.is_first {
            read.batch.releases.push(self.exchange(publish.packet_id));
        }
    }

    /// Refuses one message: in its acknowledgement if the protocol version has a reason code, otherwise by
    /// ending the connection. A QoS 0 message is dropped and counted.
    fn answer_refused(
        &mut self,
        publish: &PublishPacket<'_>,
        refused: RefusedMessage,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        let RefusedMessage { refusal, own_key } = refused;
        if let Refusal::Asked(asked) = refusal {
            self.answer_asked(publish, *asked, read);
            return Ok(());
        }
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
                self.end_refused_exchange(publish, read);
                let answer = if publish.qos == 1 { AckKind::Puback } else { AckKind::Pubrec };
                read.batch.acks.push_refused(answer, publish.packet_id, reason, refusal.to_string());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Inbound {
    /// Answers a message that is refused unless the log knows it. Intake reports the refusal.
    fn answer_asked(
        &mut self,
        publish: &PublishPacket<'_>,
        AskedMessage { origin, refusal }: AskedMessage,
        read: &mut InboundRead<'_>,
    ) {
        let answer = match publish.qos {
            0 => return,
            1 => AckKind::Puback,
            _ => AckKind::Pubrec,
        };
        self.await_exchange(publish);
        read.batch.acks.push_asked(answer, publish.packet_id, origin, refusal);
    }
}

/// The topics of the aliases that a client has set, from alias 1 on.
#[derive(Default)]
pub(super) struct ReceivedTopicAliases(Vec<Option<Box<str>>>);

impl ReceivedTopicAliases {
    /// What they take in memory.
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().flatten().map(|topic| topic.len()).sum::<usize>()
            + self.0.capacity() * size_of::<Box<str>>()
    }

    /// The topic of a PUBLISH: its own, for which it may set an alias, or that of its alias (section
    /// 3.3.2.3.4).
    #[inline]
    fn resolve<'a>(&'a mut self, publish: &PublishPacket<'a>) -> Result<&'a str, Violation> {
        if publish.properties.is_empty() {
            return Ok(publish.topic);
        }
        let Some(alias) = publish.properties.u16(TOPIC_ALIAS) else { return Ok(publish.topic) };
        if alias == 0 || alias > MQTT_TOPIC_ALIAS_MAXIMUM {
            let text = "a topic alias of 0 or over the maximum";
            return Err(Violation { reason: ReasonCode::TopicAliasInvalid, text });
        }
        let place = usize::from(alias) - 1;
        if publish.topic.is_empty() {
            let known = self.0.get(place).and_then(Option::as_deref);
            return known.ok_or(Violation::protocol("a topic alias that was not set"));
        }
        if self.0.len() <= place {
            self.0.resize(place + 1, None);
        }
        self.0[place] = Some(publish.topic.into());
        Ok(publish.topic)
    }
}

/// The exchange of a QoS 2 message, and whether the log has a message of it.
#[derive(Clone, Copy)]
struct MessageExchange {
    exchange: Exchange,
    is_open: bool,
}

/// A message that was refused.
struct RefusedMessage {
    refusal: Refusal,
    /// What is known about the message's own key, if it has one.
    own_key: Option<(Option<KeyId>, Option<KeyShape>)>,
}

impl From<Box<Refusal>> for Box<RefusedMessage> {
    fn from(refusal: Box<Refusal>) -> Self {
        Box::new(RefusedMessage { refusal: *refusal, own_key: None })
    }
}

impl From<RejectedKey> for Box<RefusedMessage> {
    fn from(rejected: RejectedKey) -> Self {
        let own_key = Some((rejected.key_id, rejected.shape));
        Box::new(RefusedMessage { refusal: rejected.denied.into(), own_key })
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
    exchange: Option<MessageExchange>,
) -> Result<usize, Box<RefusedMessage>> {
    let is_open = exchange.is_some_and(|exchange| exchange.is_open);
    let exchange = exchange.map(|exchange| exchange.exchange);
    let push = |draft: &mut Draft, grant: &Grant, message| match is_open {
        true => draft.push_repeated(grant, message),
        false => draft.push(grant, None, message),
    };
    let mut flags = if publish.retain { RecordFlags::RETAIN } else { RecordFlags::default() };
    flags = flags.with(RecordFlags::of_mqtt_qos(publish.qos));
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
        return Ok(push(draft, grant, message)?);
    }
    let own = credentials::grant_of_publish(&publish.properties, intake.authorizer(), from)?;
    let mount = mount_of(own.as_ref().unwrap_or(grant), topic);
    let ForwardedProperties { content_type, wire: properties } =
        ForwardedProperties::of(&publish.properties, mount, intake.metrics());
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
    let pushed = push(draft, own.as_ref().unwrap_or(grant), message);
    pushed.map_err(|refusal| {
        let own_key = own.map(|own| (Some(own.key_id()), None));
        Box::new(RefusedMessage { refusal: *refusal, own_key })
    })
}
