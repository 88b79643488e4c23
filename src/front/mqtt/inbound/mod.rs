//! The receiving half of a connection: decodes bytes to packets, and puts PUBLISH packets into a draft
//! with the answers that they are due.

mod ahead;
mod publish;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::ahead::AheadLook;
use self::publish::ReceivedTopicAliases;
use super::acks::{ExchangeCloser, ReadAcks};
use super::client_identity::ClientIdentity;
use super::codec::write::{AckKind, PacketForm};
use super::codec::{DisconnectPacket, MqttFrame, MqttPacket, ReasonCode, Violation};
use super::exchanges::{ExchangeState, ExchangeTable};
use super::flights::FlightAck;
use super::session::MqttSession;
use super::subscribe::{SubscribeRequest, SubscriptionRequest};
use crate::auth::Grant;
use crate::intake::{Draft, Exchange, Intake, Refusal};
use crate::limits::{
    MQTT_PACKET_BYTES_PER_S_MIN, MQTT_PACKET_GRACE, MQTT_PACKETS_PER_TURN_MAX, MQTT_READ_BYTES,
    SLOW_SECTIONS_MAX,
};
use crate::memory::{MemoryAccount, MemoryCharge};
use crate::observe::refusals::RefusalNote;
use crate::quota::LimitExceeded;
use crate::scheduler::is_lowered;

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
    /// No earlier connection of the session can have opened an exchange.
    is_first: bool,
    /// The QoS 2 exchanges of this connection, as far as the log has answered.
    pub(super) exchanges: ExchangeTable,
    /// The beginning of a packet whose rest has not arrived yet.
    partial: Vec<u8>,
    /// `partial` may hold whole packets, because a request before them had to be served first, the first
    /// of them is held back or waits, or there were very many in one read.
    paused: bool,
    /// What was seen of those packets.
    ahead: AheadLook,
    /// The next packet is about an exchange that the log has not answered yet.
    waits_for_answers: bool,
    /// The next message was held back, and is already counted against its rates.
    paid: bool,
    aliases: ReceivedTopicAliases,
    /// Whose memory it takes.
    pub(super) account: Arc<MemoryAccount>,
    /// What is charged for `partial` and the topics of the aliases.
    held: Option<MemoryCharge>,
    /// `held` is enough for all of the packet that `partial` begins with.
    is_packet_charged: bool,
    /// Since when `partial` holds the beginning of a packet.
    packet_since: Option<Instant>,
}

/// What a connection may hold of a packet that is charged for.
const UNCHARGED_BYTES_MAX: usize = 1 << 10;

/// What one read of the socket held.
#[derive(Default)]
pub(super) struct InboundBatch {
    /// The accepted messages.
    pub(super) draft: Option<Draft>,
    /// The answers to send when the draft is durable.
    pub(super) acks: ReadAcks,
    /// How many whole packets were in it; any is a sign of life.
    pub(super) packets: usize,
    /// What the client says of messages that it was sent, by packet identifier.
    pub(super) acknowledged: Vec<(u16, FlightAck)>,
    /// A request to be served before anything more is taken in.
    pub(super) request: Option<SubscriptionRequest>,
    /// The next message is over this limit: nothing more is taken in until its turn comes.
    pub(super) held: Option<LimitExceeded>,
    /// The next packet is about an exchange that the log has not answered yet: nothing more is taken in
    /// until it has.
    waits_for_answers: bool,
    /// The QoS 2 exchanges to end: the client has released them, or was told that their message is refused.
    pub(super) releases: Vec<Exchange>,
    /// A message opens a QoS 2 exchange.
    pub(super) has_opened_exchanges: bool,
    /// Set if nothing more is to be read.
    pub(super) end: Option<InboundEnd>,
}

impl InboundBatch {
    /// Whether the packet that was decoded last has to be decoded again later.
    fn is_held(&self) -> bool {
        self.held.is_some() || self.waits_for_answers
    }
}

impl Inbound {
    #[expect(clippy::too_many_arguments, reason = "what a handshake has found out")]
    pub(super) fn new(
        grant: Grant,
        who: Arc<ClientIdentity>,
        form: PacketForm,
        packet_bytes_max: usize,
        receive_maximum: u16,
        publisher: u64,
        session: &MqttSession,
        account: Arc<MemoryAccount>,
    ) -> Self {
        Self {
            account,
            held: None,
            is_packet_charged: false,
            packet_since: None,
            grant,
            who,
            form,
            packet_bytes_max,
            receive_maximum,
            publisher,
            session: session.uid,
            ephemeral: !session.is_durable(),
            is_first: !session.ever_stayed,
            exchanges: ExchangeTable::default(),
            partial: Vec::new(),
            paused: false,
            ahead: AheadLook::default(),
            waits_for_answers: false,
            paid: false,
            aliases: ReceivedTopicAliases::default(),
        }
    }

    /// The exchanges that nobody can release any more, if the session ends with the connection.
    pub(super) fn abandoned_exchanges(&self) -> Vec<Exchange> {
        let packet_ids = self.exchanges.packet_ids().filter(|_| self.ephemeral);
        packet_ids.map(|packet_id| self.exchange(packet_id)).collect()
    }

    /// What ends the exchanges that the client takes for ended because the log has refused their message.
    pub(super) fn exchange_closer<'a>(&self, intake: &'a Intake) -> ExchangeCloser<'a> {
        ExchangeCloser { intake, session: self.session, is_first: self.is_first }
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

    /// Whether the next packet can be taken in only after every earlier answer.
    pub(super) fn waits_for_answers(&self) -> bool {
        self.waits_for_answers
    }

    /// Charges for what stays in memory until the next read. A packet that does not fit into one read is charged for as a
    /// whole before its rest is read: two connections that have half of one would wait for each other's room. Returns
    /// what has to be charged for that first.
    pub(super) fn charge_held(&mut self) -> Option<usize> {
        if self.partial.is_empty() {
            (self.packet_since, self.is_packet_charged) = (None, false);
        } else {
            self.packet_since.get_or_insert_with(Instant::now);
        }
        let bytes = self.partial.capacity() + self.aliases.bytes();
        if bytes <= UNCHARGED_BYTES_MAX {
            self.held = None;
            return None;
        }
        if self.is_packet_charged {
            return None;
        }
        let held = self.held.get_or_insert_with(|| self.account.charge_held(0));
        held.set_held(bytes);
        let packet = self.partial.len() + missing_bytes(&self.partial, self.packet_bytes_max);
        if self.partial.is_empty() || self.paused || packet <= MQTT_READ_BYTES {
            return None;
        }
        let whole = packet + self.aliases.bytes();
        match held.resize(whole) {
            Ok(()) => {
                self.is_packet_charged = true;
                self.reserve_packet();
                None
            }
            Err(_) => Some(whole),
        }
    }

    /// Makes room for all of the packet in `partial`, so that it does not grow to twice its size.
    fn reserve_packet(&mut self) {
        let missing = missing_bytes(&self.partial, self.packet_bytes_max);
        self.partial.reserve_exact(missing);
    }

    /// Notes that the packet in `partial` is charged for.
    pub(super) fn set_packet_charge(&mut self, charge: MemoryCharge) {
        (self.held, self.is_packet_charged) = (Some(charge), true);
        self.reserve_packet();
    }

    /// Whether the rest of a packet may be read although the key's share is used up: it is charged for.
    #[inline]
    pub(super) fn is_packet_charged(&self) -> bool {
        self.is_packet_charged
    }

    /// Whether it holds the beginning of a packet.
    pub(super) fn holds_packet(&self) -> bool {
        self.packet_since.is_some()
    }

    /// Whether it holds memory that others may wait for: the beginning of a packet, or topic aliases.
    pub(super) fn holds_memory(&self) -> bool {
        self.held.is_some() || self.packet_since.is_some()
    }

    /// When the packet that has begun has to be there.
    pub(super) fn packet_due(&self) -> Option<Instant> {
        let packet = self.partial.len() + missing_bytes(&self.partial, self.packet_bytes_max);
        let allowed = MQTT_PACKET_GRACE + Duration::from_secs(packet as u64 / MQTT_PACKET_BYTES_PER_S_MIN);
        self.packet_since.map(|since| since + allowed)
    }

    /// Lets the held message go on. With `paid` it is already counted against its rates.
    pub(super) fn resume(&mut self, paid: bool) {
        self.paid = paid;
    }

    /// Adds the client's identity to the note of a refusal.
    pub(super) fn note<'a>(&'a self, note: RefusalNote<'a>) -> RefusalNote<'a> {
        self.who.note(&self.grant, note)
    }

    /// Decodes what was read. `unacknowledged` earlier messages still wait for their answers.
    pub(super) fn receive(
        &mut self,
        read_bytes: &[u8],
        intake: &Intake,
        unacknowledged: usize,
    ) -> InboundBatch {
        let mut read = InboundRead { batch: InboundBatch::default(), intake, unacknowledged };
        self.waits_for_answers = false;
        self.ahead = AheadLook::default();
        let mut bytes = read_bytes;
        let mut buffered;
        if std::mem::take(&mut self.paused) {
            // What is left afterwards is another packet, or is charged for as it is.
            (self.packet_since, self.is_packet_charged) = (None, false);
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
            } else {
                (self.packet_since, self.is_packet_charged) = (None, false);
            }
        }
        if read.may_go_on() && !bytes.is_empty() {
            let consumed = self.handle_packets(bytes, &mut read);
            bytes = &bytes[consumed..];
        }
        let is_cut = read.is_full() && !bytes.is_empty();
        self.paused = read.batch.request.is_some() || read.batch.is_held() || is_cut;
        self.waits_for_answers = read.batch.waits_for_answers;
        if read.batch.end.is_none() && !bytes.is_empty() {
            self.partial.extend_from_slice(bytes);
        }
        if self.partial.is_empty() {
            self.packet_since = None;
        }
        read.batch
    }

    /// Handles the whole packets at the beginning of `bytes`; returns how many bytes those take.
    fn handle_packets(&mut self, bytes: &[u8], read: &mut InboundRead<'_>) -> usize {
        let mut consumed = 0;
        while read.may_go_on() {
            let rest = &bytes[consumed..];
            // What is decoded is looked at where it is: moving it takes as long as decoding it.
            let split = MqttFrame::split(rest, self.packet_bytes_max, Some(self.form.version));
            let frame = match &split {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(violation) => {
                    read.batch.end = Some(InboundEnd::Violation(*violation));
                    break;
                }
            };
            consumed += frame.bytes;
            read.batch.packets += 1;
            if let Err(end) = self.handle_frame(frame, rest.len(), read) {
                read.batch.end = Some(end);
            }
            if read.batch.is_held() {
                // The packet stays in the buffer, and is decoded again when its turn comes.
                consumed -= frame.bytes;
                read.batch.packets -= 1;
            }
        }
        consumed
    }

    #[inline]
    fn handle_frame(
        &mut self,
        frame: &MqttFrame<'_>,
        bytes_left: usize,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        let version = self.form.version;
        // Nearly all traffic.
        if frame.is_publish() {
            return match &frame.decode_publish(version) {
                Ok(publish) => self.handle_publish(publish, bytes_left, read),
                Err(violation) => Err(InboundEnd::Violation(*violation)),
            };
        }
        let packet = frame.decode(version).map_err(InboundEnd::Violation)?;
        self.handle_packet(packet, bytes_left, read)
    }

    fn handle_packet(
        &mut self,
        packet: MqttPacket<'_>,
        bytes_left: usize,
        read: &mut InboundRead<'_>,
    ) -> Result<(), InboundEnd> {
        match packet {
            MqttPacket::Publish(publish) => return self.handle_publish(&publish, bytes_left, read),
            MqttPacket::Pingreq => read.batch.acks.push_pong(),
            MqttPacket::Subscribe(subscribe) => {
                read.batch.request = Some(SubscriptionRequest::Subscribe(SubscribeRequest::new(
                    &subscribe,
                    self.who.is_bridge,
                )));
            }
            MqttPacket::Unsubscribe(unsubscribe) => {
                read.batch.request = Some(SubscriptionRequest::from(&unsubscribe))
            }
            MqttPacket::Disconnect(disconnect) => {
                if !self.is_goodbye_valid(&disconnect) {
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
            MqttPacket::Puback(ack) => read.batch.acknowledged.push((ack.packet_id, FlightAck::Puback)),
            MqttPacket::Pubrec(ack) => {
                let is_refusal = ack.reason >= 0x80;
                read.batch.acknowledged.push((ack.packet_id, FlightAck::Pubrec { is_refusal }));
            }
            MqttPacket::Pubcomp(ack) => read.batch.acknowledged.push((ack.packet_id, FlightAck::Pubcomp)),
            MqttPacket::Pubrel(ack) => self.handle_pubrel(ack.packet_id, read),
        }
        Ok(())
    }

    /// Handles a PUBREL: the client has the PUBREC, and will not send the message again (section 4.3.3).
    fn handle_pubrel(&mut self, packet_id: u16, read: &mut InboundRead<'_>) {
        match self.exchanges.state(packet_id) {
            // Sent before the PUBREC or a second time. What it releases is known when the log has answered.
            Some(ExchangeState::Opening | ExchangeState::Releasing) => {
                read.batch.waits_for_answers = true;
                return;
            }
            Some(ExchangeState::Open) => {}
            None if self.is_first => {
                let reason = ReasonCode::PacketIdentifierNotFound;
                let words = "no message with this packet identifier waits for its release";
                read.batch.acks.push_refused(AckKind::Pubcomp, packet_id, reason, words.to_owned());
                return;
            }
            // An earlier connection of the session may have opened it.
            None => {}
        }
        self.exchanges.begin_release(packet_id);
        read.batch.releases.push(self.exchange(packet_id));
        read.batch.acks.push_done(AckKind::Pubcomp, packet_id);
    }
}

/// One read of the socket that is being handled.
struct InboundRead<'a> {
    batch: InboundBatch,
    intake: &'a Intake,
    unacknowledged: usize,
}

impl InboundRead<'_> {
    /// Whether the next packet may be taken in.
    fn may_go_on(&self) -> bool {
        self.batch.end.is_none() && self.batch.request.is_none() && !self.batch.is_held() && !self.is_full()
    }

    /// Whether other connections have their turn before more is taken in.
    fn is_full(&self) -> bool {
        let has_sections = |draft: &Draft| draft.section_count() >= SLOW_SECTIONS_MAX;
        self.batch.packets >= MQTT_PACKETS_PER_TURN_MAX
            || is_lowered() && self.batch.draft.as_ref().is_some_and(has_sections)
    }
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
