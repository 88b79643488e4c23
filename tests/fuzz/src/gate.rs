//! A stream of bytes from a client: cut anywhere, the gate says the same about it; what it lets
//! through can be looked at in full; and a codec that somebody else wrote reads it alike.

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::Decoder;

use headgate_format::codec::properties::{Properties, Value};
use headgate_format::codec::{Frame, Packet, Publish, Reason, Version};

const BYTES_MAX: usize = 1 << 16;

/// What the gate says about a stream: the end and the first byte of each packet, and how it ended.
#[derive(Debug, PartialEq, Default)]
struct Account {
    packets: Vec<(usize, u8)>,
    violation: Option<Reason>,
}

/// Runs the gate over a stream. The first byte chooses the version, the second where it is cut.
pub fn run(data: &[u8]) {
    let [version, cut, stream @ ..] = data else { return };
    let version = [Version::V31, Version::V311, Version::V5][usize::from(*version) % 3];
    let mut whole = Account::default();
    let consumed = read(stream, 0, version, &mut whole);
    assert!(consumed <= stream.len());

    let mut cut_account = Account::default();
    let cut = usize::from(*cut).min(stream.len());
    let consumed = read(&stream[..cut], 0, version, &mut cut_account);
    if cut_account.violation.is_none() {
        read(&stream[consumed..], consumed, version, &mut cut_account);
    }
    assert_eq!(whole, cut_account, "cut at {cut}");
    connect(stream);
}

/// Decodes all whole packets; returns how many bytes they take.
fn read(stream: &[u8], before: usize, version: Version, account: &mut Account) -> usize {
    let mut consumed = 0;
    loop {
        let rest = &stream[consumed..];
        match Frame::split(rest, BYTES_MAX, Some(version)) {
            Ok(None) => return consumed,
            Ok(Some(frame)) => {
                assert!(frame.bytes >= 2 && frame.bytes <= rest.len());
                let bytes = &rest[..frame.bytes];
                consumed += frame.bytes;
                match frame.decode(version) {
                    Ok(packet) => {
                        look(&packet, bytes, version);
                        account.handle_packets.push((before + consumed, bytes[0]));
                    }
                    Err(violation) => {
                        account.violation = Some(violation.reason);
                        return consumed;
                    }
                }
            }
            Err(violation) => {
                account.violation = Some(violation.reason);
                return consumed;
            }
        }
    }
}

/// Looks at everything that a packet holds.
fn look(packet: &Packet<'_>, bytes: &[u8], version: Version) {
    match packet {
        Packet::Publish(publish) => {
            assert!(!publish.wanted_topic.contains(['+', '#', '\0']));
            assert!(publish.qos <= 2 && (publish.qos == 0) == (publish.packet_id == 0));
            properties(&publish.properties, version);
            same_elsewhere(publish, bytes, version);
        }
        Packet::Subscribe(subscribe) => {
            assert!(subscribe.packet_id != 0 && !subscribe.filters.is_empty());
            assert!(subscribe.filters.iter().all(|filter| filter.qos <= 2 && !filter.filter.is_empty()));
            properties(&subscribe.properties, version);
        }
        Packet::Unsubscribe(unsubscribe) => {
            assert!(unsubscribe.packet_id != 0 && !unsubscribe.filters.is_empty());
        }
        Packet::Puback(ack) | Packet::Pubrec(ack) | Packet::Pubrel(ack) | Packet::Pubcomp(ack) => {
            assert!(ack.packet_id != 0);
        }
        Packet::Connect | Packet::Pingreq | Packet::Disconnect(_) | Packet::Auth => {}
    }
}

/// Properties come one by one and take exactly the bytes that they are in.
fn properties(properties: &Properties<'_>, version: Version) {
    let mut taken = 0;
    for (id, value, bytes) in properties.iter() {
        assert!(id < 0x2B);
        if let Value::Text(text) | Value::Pair(text, _) = value {
            assert!(!text.contains('\0'));
        }
        taken += bytes.len();
    }
    assert_eq!(taken == 0, properties.is_empty());
    assert!(version == Version::V5 || properties.is_empty());
    let _ = properties.user().count();
}

/// What is let through as a PUBLISH, rmqtt-codec reads alike, or it turns it away for a reason that
/// is known.
fn same_elsewhere(ours: &Publish<'_>, bytes: &[u8], version: Version) {
    let mut buffer = BytesMut::from(bytes);
    let size = u32::try_from(BYTES_MAX).expect("64 KiB");
    let theirs = if version == Version::V5 {
        match v5::Codec::new(size, size).decode(&mut buffer) {
            Ok(Some((v5::Packet::Publish(publish), _))) => Some(publish),
            _ => None,
        }
    } else {
        match v3::Codec::new(size).decode(&mut buffer) {
            Ok(Some((v3::Packet::Publish(publish), _))) => Some(publish),
            _ => None,
        }
    };
    let Some(theirs) = theirs else {
        // It refuses a topic alias or an expiry of 0; behind the gate those are looked at later.
        let zero = ours.properties.iter().any(|(_, value, _)| value == Value::Number(0));
        assert!(zero, "only the gate takes {bytes:02x?}");
        return;
    };
    assert_eq!(ours.wanted_topic, &*theirs.wanted_topic);
    assert_eq!(ours.payload, &theirs.payload[..]);
    assert_eq!(ours.packet_id, theirs.packet_id.map_or(0, std::num::NonZeroU16::get));
    assert_eq!((ours.qos, ours.dup, ours.retain), (theirs.qos as u8, theirs.dup, theirs.retain));
}

/// The same bytes as a first packet.
fn connect(stream: &[u8]) {
    let Ok(Some(frame)) = Frame::split(stream, BYTES_MAX, None) else { return };
    if !frame.is_connect() {
        return;
    }
    let Ok(connect) = frame.connect() else { return };
    properties(&connect.properties, connect.version);
    assert!(!connect.client_id.contains('\0'));
    assert!(connect.version != Version::V5 || connect.receive_maximum() > 0);
    assert!(connect.packet_bytes_max() > 0);
    if let Some(will) = &connect.will {
        properties(&will.properties, connect.version);
        assert!(will.qos <= 2 && !will.wanted_topic.is_empty() && !will.wanted_topic.contains(['+', '#']));
    }
    let _ = (connect.session_expiry_s(), connect.wants_reasons(), connect.wants_authentication());
}
