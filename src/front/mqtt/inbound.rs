//! What a connected client sends: bytes to packets, PUBLISH packets to a draft and the answers it
//! will be due.

use tracing::debug;

use super::acks::Train;
use super::codec::properties::{
    CONTENT_TYPE, CORRELATION_DATA, MESSAGE_EXPIRY, PAYLOAD_FORMAT, RESPONSE_TOPIC, TOPIC_ALIAS, Value,
};
use super::codec::write::{self, Form};
use super::codec::{Frame, Packet, Publish, Reason, Version, Violation};
use super::credentials;
use crate::auth::{Denied, Grant, Scope};
use crate::intake::{Draft, Incoming, Intake, Refusal};
use crate::limits::MQTT_TOPIC_ALIAS_MAXIMUM;
use crate::message::{RecordFlags, Transport};

/// How a client's connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// It said goodbye, or closed.
    Client,
    /// It broke a rule.
    Violation(Violation),
    /// MQTT 3.1.1 has no other way to say no to a message.
    Refused(Refusal),
}

/// The receiving half of a connection: what it knows between two reads.
pub(super) struct Inbound {
    /// Of the connection's key.
    pub(super) grant: Grant,
    pub(super) form: Form,
    packet_bytes_max: usize,
    receive_maximum: u16,
    /// The beginning of a packet whose rest has not come yet.
    partial: Vec<u8>,
    aliases: Aliases,
}

/// What one read has brought.
pub(super) struct Batch {
    /// Messages that were let in.
    pub(super) draft: Option<Draft>,
    /// The answers that are due when the draft is durable.
    pub(super) train: Train,
    /// Whether a whole packet was among it: a sign of life.
    pub(super) packets: usize,
    /// Nothing more is to be read.
    pub(super) end: Option<End>,
}

impl Inbound {
    pub(super) fn new(grant: Grant, form: Form, packet_bytes_max: usize, receive_maximum: u16) -> Self {
        Self {
            grant,
            form,
            packet_bytes_max,
            receive_maximum,
            partial: Vec::new(),
            aliases: Aliases::default(),
        }
    }

    /// Takes in what was read. Answers that need not wait are written to `out`; `unacknowledged`
    /// messages wait for theirs already.
    pub(super) fn take(
        &mut self,
        mut bytes: &[u8],
        intake: &Intake,
        unacknowledged: usize,
        out: &mut Vec<u8>,
    ) -> Batch {
        let mut read = Read {
            batch: Batch { draft: None, train: Train::default(), packets: 0, end: None },
            intake,
            unacknowledged,
            out,
        };
        // A packet that began in an earlier read is completed on its own; the rest is read in place.
        while !self.partial.is_empty() && !bytes.is_empty() && read.batch.end.is_none() {
            let mut partial = std::mem::take(&mut self.partial);
            let missing = missing_bytes(&partial, self.packet_bytes_max).min(bytes.len());
            let (rest_of_packet, after) = bytes.split_at(missing);
            partial.extend_from_slice(rest_of_packet);
            bytes = after;
            let consumed = self.packets(&partial, &mut read);
            if consumed < partial.len() {
                self.partial = partial;
            }
        }
        if read.batch.end.is_none() && !bytes.is_empty() {
            let consumed = self.packets(bytes, &mut read);
            self.partial = bytes[consumed..].to_vec();
        }
        read.batch
    }

    /// Handles the whole packets at the beginning of `bytes`; returns how many bytes those take.
    fn packets(&mut self, bytes: &[u8], read: &mut Read<'_>) -> usize {
        let mut consumed = 0;
        while read.batch.end.is_none() {
            let rest = &bytes[consumed..];
            let frame = match Frame::split(rest, self.packet_bytes_max, Some(self.form.version)) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(violation) => {
                    read.batch.end = Some(End::Violation(violation));
                    break;
                }
            };
            consumed += frame.bytes;
            read.batch.packets += 1;
            if let Err(end) = frame
                .decode(self.form.version)
                .map_err(End::Violation)
                .and_then(|packet| self.packet(packet, rest.len(), read))
            {
                read.batch.end = Some(end);
            }
        }
        consumed
    }

    fn packet(&mut self, packet: Packet<'_>, bytes_left: usize, read: &mut Read<'_>) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => return self.publish(&publish, bytes_left, read),
            Packet::Pingreq => write::pingresp(read.out),
            Packet::Subscribe(subscribe) => {
                let filters = subscribe.filters.len();
                let (reason, words) = match self.grant.has(Scope::Subscribe) {
                    Err(denied) => (Reason::NotAuthorized, denied.to_string()),
                    Ok(()) => (
                        Reason::ImplementationSpecificError,
                        "subscriptions are not served over MQTT yet; read records over HTTP".to_owned(),
                    ),
                };
                read.intake.metrics().refused(Transport::Mqtt, "subscribe");
                write::suback_refused(read.out, self.form, subscribe.packet_id, filters, reason, &words);
            }
            Packet::Unsubscribe(unsubscribe) => {
                write::unsuback_none(read.out, self.form, unsubscribe.packet_id, unsubscribe.filters.len());
            }
            Packet::Disconnect(disconnect) => {
                if disconnect.session_expiry_s.is_some_and(|s| s > 0) {
                    // The session's expiry was announced as 0 (section 3.14.2.2.2).
                    return Err(End::Violation(Violation::protocol(
                        "a session expiry after none was agreed",
                    )));
                }
                return Err(End::Client);
            }
            Packet::Connect => return Err(End::Violation(Violation::protocol("a second CONNECT"))),
            Packet::Auth => {
                return Err(End::Violation(Violation::protocol("AUTH without an authentication method")));
            }
            Packet::Puback(_) | Packet::Pubrec(_) | Packet::Pubrel(_) | Packet::Pubcomp(_) => {
                return Err(End::Violation(Violation::protocol(
                    "an acknowledgement of nothing that was sent",
                )));
            }
        }
        Ok(())
    }

    fn publish(&mut self, publish: &Publish<'_>, bytes_left: usize, read: &mut Read<'_>) -> Result<(), End> {
        if publish.qos == 2 {
            return Err(End::Violation(Violation {
                reason: Reason::QosNotSupported,
                text: "QoS 2 is not served yet; QoS 1 is",
            }));
        }
        let v5 = self.form.version == Version::V5;
        let unacknowledged = read.unacknowledged + read.batch.train.len();
        if v5 && publish.qos == 1 && unacknowledged >= usize::from(self.receive_maximum) {
            return Err(End::Violation(Violation {
                reason: Reason::ReceiveMaximumExceeded,
                text: "more unacknowledged messages than the receive maximum",
            }));
        }
        let topic = self.aliases.resolve(publish).map_err(End::Violation)?;
        let first = read.batch.draft.is_none();
        let draft = read.batch.draft.get_or_insert_with(|| read.intake.draft(Transport::Mqtt));
        let pushed = push(draft, read.intake, &self.grant, topic, publish);
        match pushed {
            Ok(origin) => {
                if first {
                    draft.reserve(bytes_left);
                }
                if publish.qos == 1 {
                    read.batch.train.admitted(publish.packet_id, origin);
                }
                Ok(())
            }
            Err(refusal) => self.refuse(publish, refusal, read),
        }
    }

    /// A no to one message: by its acknowledgement where the protocol has a place for it, by ending
    /// the connection where it has not. A QoS 0 message is dropped and counted.
    fn refuse(&self, publish: &Publish<'_>, refusal: Refusal, read: &mut Read<'_>) -> Result<(), End> {
        read.intake.metrics().refused(Transport::Mqtt, refusal.cause());
        debug!(key_id = %self.grant.key_id(), cause = refusal.cause(), %refusal, "refused a message");
        if self.form.version != Version::V5 {
            return Err(End::Refused(refusal));
        }
        match (&refusal, reason_of(&refusal)) {
            // The whole connection is at an end, not this message alone.
            (Refusal::Denied(Denied::Revoked), _) if !self.grant.holds() => Err(End::Refused(refusal)),
            (_, Reason::PacketTooLarge) => Err(End::Refused(refusal)),
            (_, reason) if publish.qos == 1 => {
                read.batch.train.refused(publish.packet_id, reason, refusal.to_string());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The topic aliases that a client has set: per alias, from 1 on, its topic.
#[derive(Default)]
struct Aliases(Vec<Option<Box<str>>>);

impl Aliases {
    /// The topic of a PUBLISH: its own, which it may set a topic alias to, or its alias's (section
    /// 3.3.2.3.4).
    fn resolve<'a>(&'a mut self, publish: &Publish<'a>) -> Result<&'a str, Violation> {
        let invalid = |text| Violation { reason: Reason::TopicAliasInvalid, text };
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

/// One read of a socket, under way.
struct Read<'a> {
    batch: Batch,
    intake: &'a Intake,
    unacknowledged: usize,
    out: &'a mut Vec<u8>,
}

/// Checks one message and adds it to the draft, under the key that it brings or else the
/// connection's.
fn push(
    draft: &mut Draft,
    intake: &Intake,
    grant: &Grant,
    topic: &str,
    publish: &Publish<'_>,
) -> Result<usize, Refusal> {
    let flags = if publish.retain { RecordFlags::RETAIN } else { RecordFlags::default() };
    let payload = publish.payload;
    if publish.properties.is_empty() {
        let message = Incoming { topic, payload, content_type: "", properties: &[], flags };
        return draft.push(grant, None, message);
    }
    let own = credentials::of_publish(&publish.properties, intake.authorizer())?;
    let mut content_type = "";
    let mut properties = Vec::new();
    for (id, value, bytes) in publish.properties.iter() {
        match (id, value) {
            (CONTENT_TYPE, Value::Text(text)) => content_type = text,
            (_, Value::Pair(name, _)) if credentials::is_key_property(name) => {}
            (PAYLOAD_FORMAT | MESSAGE_EXPIRY | RESPONSE_TOPIC | CORRELATION_DATA, _)
            | (_, Value::Pair(..)) => {
                properties.extend_from_slice(bytes);
            }
            _ => {}
        }
    }
    let message = Incoming { topic, payload, content_type, properties: &properties, flags };
    draft.push(own.as_ref().unwrap_or(grant), None, message)
}

/// How many bytes the packet that `partial` begins still needs, as far as that is known.
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

/// MQTT 5's reason code for a refusal: the one place where the two meet.
pub(super) fn reason_of(refusal: &Refusal) -> Reason {
    match refusal {
        Refusal::Denied(_) | Refusal::NoDatasource(_) => Reason::NotAuthorized,
        Refusal::Topic(_) | Refusal::DatasourceMissing => Reason::TopicNameInvalid,
        Refusal::TooLarge { .. } => Reason::PacketTooLarge,
        Refusal::ContentType => Reason::PayloadFormatInvalid,
        Refusal::Busy { .. } | Refusal::Log(_) => Reason::ServerBusy,
    }
}
