//! Looking ahead: what a client has sent behind a packet that cannot be taken in yet. A PINGREQ there is answered, so
//! that the client does not take a connection for dead that is only held back. And a client that has said goodbye has
//! done so, whatever its goodbye waits for.

use super::super::codec::write;
use super::super::codec::{DisconnectPacket, MqttFrame, MqttPacket};
use super::Inbound;
use crate::limits::MQTT_AHEAD_BYTES_MAX;

/// Packet types, as the upper half of a packet's first byte.
const TYPE_CONNECT: u8 = 1;
const TYPE_DISCONNECT: u8 = 14;
/// A whole PINGREQ.
const PINGREQ_BYTES: [u8; 2] = [0xC0, 0];

/// How far the packets that wait were looked at.
#[derive(Default)]
pub(super) struct AheadLook {
    /// The first byte of a packet that was not looked at.
    at: usize,
    /// Nothing follows that is worth a look.
    is_over: bool,
}

impl Inbound {
    /// Whether more may be read to look ahead.
    pub(in super::super) fn may_look_ahead(&self) -> bool {
        !self.ahead.is_over && !self.is_packet_charged && self.partial.len() < MQTT_AHEAD_BYTES_MAX
    }

    /// Adds bytes to what waits, and answers the PINGREQs among it. Returns how many there were.
    pub(in super::super) fn look_ahead(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> usize {
        self.partial.extend_from_slice(bytes);
        self.paused = true;
        let mut pings = 0;
        while let Some(rest) = self.partial.get(self.ahead.at..)
            && let Some(length) = MqttFrame::packet_bytes(rest)
            && length <= rest.len()
        {
            if rest[..length] == PINGREQ_BYTES {
                self.partial.drain(self.ahead.at..self.ahead.at + length);
                write::pingresp(out);
                pings += 1;
                continue;
            }
            self.ahead.is_over = matches!(rest[0] >> 4, TYPE_CONNECT | TYPE_DISCONNECT);
            self.ahead.at += length;
        }
        pings
    }

    /// Searches what waits for a DISCONNECT that the client may send. `read` reads more of what has arrived; 0 bytes are
    /// the end of it. Everything else that waits is dropped.
    pub(in super::super) fn find_goodbye(
        &mut self,
        mut read: impl FnMut(&mut Vec<u8>) -> usize,
    ) -> Option<DisconnectPacket> {
        let (mut waiting, mut skipped) = (std::mem::take(&mut self.partial), 0);
        loop {
            let ready = skipped.min(waiting.len());
            waiting.drain(..ready);
            skipped -= ready;
            let packet = MqttFrame::packet_bytes(&waiting).filter(|_| skipped == 0);
            match (packet, waiting.first()) {
                (Some(length), Some(first)) if first >> 4 == TYPE_DISCONNECT => {
                    if length <= waiting.len() {
                        return self.decode_goodbye(&waiting);
                    }
                    if length > MQTT_AHEAD_BYTES_MAX {
                        return None;
                    }
                }
                (Some(_), Some(first)) if matches!(first >> 4, 0 | TYPE_CONNECT) => return None,
                (Some(length), _) => {
                    skipped = length;
                    continue;
                }
                // The length has four bytes at most.
                (None, Some(_)) if skipped == 0 && waiting.len() > 4 => return None,
                (None, _) => {}
            }
            if read(&mut waiting) == 0 {
                return None;
            }
        }
    }

    fn decode_goodbye(&self, waiting: &[u8]) -> Option<DisconnectPacket> {
        let version = self.form.version;
        let frame = MqttFrame::split(waiting, self.packet_bytes_max, Some(version)).ok()??;
        match frame.decode(version).ok()? {
            MqttPacket::Disconnect(goodbye) if self.is_goodbye_valid(&goodbye) => Some(goodbye),
            _ => None,
        }
    }

    /// Whether the client may send it: a session that ends with its connection gets no expiry (section 3.14.2.2.2).
    pub(super) fn is_goodbye_valid(&self, goodbye: &DisconnectPacket) -> bool {
        !(self.ephemeral && goodbye.session_expiry_s.is_some_and(|s| s > 0))
    }
}
