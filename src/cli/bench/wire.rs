//! The few MQTT packets that a load generator needs, with as little work per message as possible: a
//! PUBLISH is copied from a template, an acknowledgement takes two bytes to check. With a client
//! library the benchmark would measure that library.

use anyhow::{Context, bail, ensure};

/// Packet types, in the high half of a packet's first byte.
pub(super) const CONNACK: u8 = 0x20;
pub(super) const PUBACK: u8 = 0x40;
pub(super) const PINGRESP: u8 = 0xd0;
pub(super) const DISCONNECT: u8 = 0xe0;

/// Asks the server for a [`PINGRESP`], which it sends after handling everything sent before.
pub(super) const PINGREQ_PACKET: [u8; 2] = [0xc0, 0];
/// The client's DISCONNECT, valid in both versions.
pub(super) const DISCONNECT_PACKET: [u8; 2] = [0xe0, 0];

/// Seconds of silence after which the server may drop us.
const KEEP_ALIVE_S: u16 = 60;
/// The longest packet that a server may send to a client without subscriptions.
const SERVER_PACKET_BYTES_MAX: usize = 64 << 10;
/// The id of the MQTT 5 property that bounds unacknowledged messages.
const RECEIVE_MAXIMUM_PROPERTY: u8 = 0x21;

/// A CONNECT with a clean session and the key as user name.
pub(super) fn encode_connect(protocol: u8, client_id: &str, key: &str) -> Vec<u8> {
    const USER_NAME: u8 = 0x80;
    const CLEAN: u8 = 0x02;
    let mut body = Vec::new();
    put_text(&mut body, "MQTT");
    body.extend([protocol, USER_NAME | CLEAN]);
    body.extend(KEEP_ALIVE_S.to_be_bytes());
    if protocol == 5 {
        body.push(0); // no properties
    }
    put_text(&mut body, client_id);
    put_text(&mut body, key);
    encode_packet(0x10, &body)
}

/// A PUBLISH that is sent repeatedly, each time with another packet id.
pub(super) struct PublishTemplate {
    bytes: Vec<u8>,
    packet_id_at: usize,
    has_packet_id: bool,
}

impl PublishTemplate {
    pub(super) fn new(protocol: u8, qos: u8, topic: &str, payload: &[u8]) -> Self {
        let mut body = Vec::with_capacity(topic.len() + payload.len() + 8);
        put_text(&mut body, topic);
        let packet_id_in_body = body.len();
        if qos > 0 {
            body.extend([0, 0]);
        }
        if protocol == 5 {
            body.push(0); // no properties
        }
        body.extend_from_slice(payload);
        let bytes = encode_packet(0x30 | qos << 1, &body);
        let packet_id_at = bytes.len() - body.len() + packet_id_in_body;
        Self { bytes, packet_id_at, has_packet_id: qos > 0 }
    }

    /// Appends the packet to `out`.
    pub(super) fn put(&self, out: &mut Vec<u8>, packet_id: u16) {
        let at = out.len() + self.packet_id_at;
        out.extend_from_slice(&self.bytes);
        if self.has_packet_id {
            out[at..at + 2].copy_from_slice(&packet_id.to_be_bytes());
        }
    }
}

/// A packet from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ServerPacket<'a> {
    /// One of the constants above.
    pub(super) kind: u8,
    pub(super) body: &'a [u8],
    /// The whole packet's length in bytes.
    pub(super) length: usize,
}

/// The first packet in `bytes`; `None` until it is complete.
///
/// # Errors
/// A length that is malformed or longer than a server has reason to send.
pub(super) fn first_packet(bytes: &[u8]) -> anyhow::Result<Option<ServerPacket<'_>>> {
    let mut remaining = 0;
    for index in 1..=4 {
        let Some(&digit) = bytes.get(index) else { return Ok(None) };
        remaining |= usize::from(digit & 0x7f) << (7 * (index - 1));
        if digit & 0x80 == 0 {
            ensure!(remaining <= SERVER_PACKET_BYTES_MAX, "the server sends a packet of {remaining} bytes");
            let (start, end) = (index + 1, index + 1 + remaining);
            let packet =
                bytes.get(start..end).map(|body| ServerPacket { kind: bytes[0] & 0xf0, body, length: end });
            return Ok(packet);
        }
    }
    bail!("the server sends a packet whose length is malformed")
}

/// Reads a CONNACK and returns how many messages may be unacknowledged.
///
/// # Errors
/// The packet is no valid CONNACK, or refuses the connection; the text has the code.
pub(super) fn read_connack(protocol: u8, packet: &ServerPacket<'_>) -> anyhow::Result<u16> {
    ensure!(packet.kind == CONNACK, "the server answers CONNECT with a packet of type {}", packet.kind >> 4);
    let code = *packet.body.get(1).context("the server sends a CONNACK that is too short")?;
    ensure!(code == 0, "the connection was refused with code 0x{code:02x}{}", refusal_meaning(code));
    if protocol < 5 {
        return Ok(u16::MAX);
    }
    find_receive_maximum(packet.body.get(2..).unwrap_or_default())
        .context("the server sends a malformed CONNACK")
}

/// Finds the receive maximum in a CONNACK's properties; the default is 65,535.
fn find_receive_maximum(properties: &[u8]) -> Option<u16> {
    // The properties' length takes one byte, or more if the server sends long texts. Skip it.
    let digits = properties.iter().position(|digit| digit & 0x80 == 0)? + 1;
    let mut rest = properties.get(digits..)?;
    while let [id, value @ ..] = rest {
        let text =
            |value: &[u8]| Some(2 + usize::from(u16::from_be_bytes([*value.first()?, *value.get(1)?])));
        let length = match *id {
            RECEIVE_MAXIMUM_PROPERTY => return Some(u16::from_be_bytes([*value.first()?, *value.get(1)?])),
            0x24 | 0x25 | 0x28 | 0x29 | 0x2a => 1,
            0x13 | 0x22 => 2,
            0x11 | 0x27 => 4,
            0x26 => text(value)? + text(value.get(text(value)?..)?)?,
            _ => text(value)?,
        };
        rest = value.get(length..)?;
    }
    Some(u16::MAX)
}

/// The meaning of a refusal's code, for the codes that a load generator meets.
pub(super) fn refusal_meaning(code: u8) -> &'static str {
    match code {
        0x05 | 0x87 => " (not authorized)",
        0x03 | 0x88 => " (server unavailable)",
        0x89 => " (server busy)",
        0x8b => " (server shutting down)",
        0x95 => " (packet too large)",
        0x96 => " (message rate too high)",
        0x97 => " (quota exceeded)",
        0x98 => " (the key is dead)",
        _ => "",
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).expect("topics, client ids and keys are shorter than 64 KiB");
    out.extend(length.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn encode_packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut remaining = body.len();
    loop {
        let digit = u8::try_from(remaining % 128).expect("below 128");
        remaining /= 128;
        bytes.push(if remaining > 0 { digit | 0x80 } else { digit });
        if remaining == 0 {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_differs_only_in_its_packet_id() {
        for (protocol, properties) in [(4, &[][..]), (5, &[0][..])] {
            let mut out = vec![0xaa];
            PublishTemplate::new(protocol, 1, "a/b", b"xyz").put(&mut out, 0x0102);
            let mut expected = vec![0xaa, 0x32, 10 + u8::try_from(properties.len()).expect("small")];
            expected.extend([0, 3, b'a', b'/', b'b', 1, 2]);
            expected.extend(properties);
            expected.extend(b"xyz");
            assert_eq!(out, expected);
        }
        let mut out = Vec::new();
        PublishTemplate::new(4, 0, "t", b"p").put(&mut out, 9);
        assert_eq!(out, [0x30, 4, 0, 1, b't', b'p'], "QoS 0 has no packet id");
    }

    #[test]
    fn a_packet_is_read_once_it_is_whole() {
        let puback = [0x40, 2, 1, 2, 0x40];
        for cut in 0..4 {
            assert_eq!(first_packet(&puback[..cut]).expect("nothing is wrong"), None);
        }
        let packet = first_packet(&puback).expect("nothing is wrong").expect("it is whole");
        assert_eq!(packet, ServerPacket { kind: PUBACK, body: &[1, 2], length: 4 });
        assert!(first_packet(&[0x40, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(first_packet(&[0x40, 0xff, 0xff, 0xff, 0x7f]).is_err());
    }

    #[test]
    fn a_long_packet_has_a_length_of_two_digits() {
        let mut out = Vec::new();
        PublishTemplate::new(4, 1, "t", &[7; 300]).put(&mut out, 1);
        assert_eq!(out[..3], [0x32, 0xb1, 0x02], "305 is 49 + 2 * 128");
        assert_eq!(out.len(), 3 + 305);
    }

    #[test]
    fn the_receive_maximum_is_found_among_other_properties() {
        let connack = |properties: &[u8]| {
            let mut body = vec![0, 0, u8::try_from(properties.len()).expect("few")];
            body.extend(properties);
            read_connack(5, &ServerPacket { kind: CONNACK, body: &body, length: 0 })
        };
        assert_eq!(connack(&[]).expect("accepted"), u16::MAX);
        assert_eq!(connack(&[0x21, 4, 0]).expect("accepted"), 1024);
        let others =
            [0x24, 1, 0x27, 0, 1, 0, 0, 0x26, 0, 1, b'k', 0, 2, b'v', b'w', 0x12, 0, 1, b'c', 0x21, 0, 9];
        assert_eq!(connack(&others).expect("accepted"), 9);
        assert!(connack(&[0x21, 4]).is_err());
    }

    #[test]
    fn a_refused_connection_is_an_error_with_its_code() {
        let error =
            read_connack(4, &ServerPacket { kind: CONNACK, body: &[0, 5], length: 4 }).expect_err("refused");
        assert!(error.to_string().contains("0x05 (not authorized)"), "{error}");
    }
}
