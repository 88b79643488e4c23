//! A stream of bytes from a client: cut anywhere, the gate says the same about it; what it lets
//! through can be looked at in full; and a codec that somebody else wrote reads it alike.

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::Decoder;

use headgate_format::codec::properties::{Properties, PropertyValue};
use headgate_format::codec::{MqttFrame, MqttPacket, MqttVersion, PublishPacket, ReasonCode};

const BYTES_MAX: usize = 1 << 16;

/// What the gate says about a stream: the end and the first byte of each packet, and how it ended.
#[derive(Debug, PartialEq, Default)]
struct Account {
    packets: Vec<(usize, u8)>,
    violation: Option<ReasonCode>,
}

/// Runs the gate over a stream. The first byte chooses the version, the second where it is cut.
pub fn run(data: &[u8]) {
    let [version, cut, stream @ ..] = data else { return };
    let version = [MqttVersion::V31, MqttVersion::V311, MqttVersion::V5][usize::from(*version) % 3];
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
fn read(stream: &[u8], before: usize, version: MqttVersion, account: &mut Account) -> usize {
    let mut consumed = 0;
    loop {
        let rest = &stream[consumed..];
        match MqttFrame::split(rest, BYTES_MAX, Some(version)) {
            Ok(None) => return consumed,
            Ok(Some(frame)) => {
                assert!(frame.bytes >= 2 && frame.bytes <= rest.len());
                let bytes = &rest[..frame.bytes];
                consumed += frame.bytes;
                match frame.decode(version) {
                    Ok(packet) => {
                        look(&packet, bytes, version);
                        account.packets.push((before + consumed, bytes[0]));
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
fn look(packet: &MqttPacket<'_>, bytes: &[u8], version: MqttVersion) {
    match packet {
        MqttPacket::Publish(publish) => {
            assert!(!publish.topic.contains(['+', '#', '\0']));
            assert!(publish.qos <= 2 && (publish.qos == 0) == (publish.packet_id == 0));
            properties(&publish.properties, version);
            same_elsewhere(publish, bytes, version);
        }
        MqttPacket::Subscribe(subscribe) => {
            assert!(subscribe.packet_id != 0 && !subscribe.filters.is_empty());
            assert!(subscribe.filters.iter().all(|filter| filter.qos <= 2 && !filter.filter.is_empty()));
            properties(&subscribe.properties, version);
        }
        MqttPacket::Unsubscribe(unsubscribe) => {
            assert!(unsubscribe.packet_id != 0 && !unsubscribe.filters.is_empty());
        }
        MqttPacket::Puback(ack) | MqttPacket::Pubrec(ack) | MqttPacket::Pubrel(ack) | MqttPacket::Pubcomp(ack) => {
            assert!(ack.packet_id != 0);
        }
        MqttPacket::Connect | MqttPacket::Pingreq | MqttPacket::Disconnect(_) | MqttPacket::Auth => {}
    }
}

/// Properties come one by one and take exactly the bytes that they are in.
fn properties(properties: &Properties<'_>, version: MqttVersion) {
    let mut taken = 0;
    for (id, value, bytes) in properties.iter() {
        assert!(id < 0x2B);
        if let PropertyValue::Text(text) | PropertyValue::Pair(text, _) = value {
            assert!(!text.contains('\0'));
        }
        taken += bytes.len();
    }
    assert_eq!(taken == 0, properties.is_empty());
    assert!(version == MqttVersion::V5 || properties.is_empty());
    let _ = properties.user().count();
}

/// What is let through as a PUBLISH, rmqtt-codec reads alike, or it turns it away for a reason that
/// is known.
fn same_elsewhere(ours: &PublishPacket<'_>, bytes: &[u8], version: MqttVersion) {
    let mut buffer = BytesMut::from(bytes);
    let size = u32::try_from(BYTES_MAX).expect("64 KiB");
    let theirs = if version == MqttVersion::V5 {
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
        let zero = ours.properties.iter().any(|(_, value, _)| value == PropertyValue::Number(0));
        assert!(zero, "only the gate takes {bytes:02x?}");
        return;
    };
    assert_eq!(ours.topic, &*theirs.topic);
    assert_eq!(ours.payload, &theirs.payload[..]);
    assert_eq!(ours.packet_id, theirs.packet_id.map_or(0, std::num::NonZeroU16::get));
    assert_eq!((ours.qos, ours.dup, ours.retain), (theirs.qos as u8, theirs.dup, theirs.retain));
}

/// The same bytes as a first packet.
fn connect(stream: &[u8]) {
    let Ok(Some(frame)) = MqttFrame::split(stream, BYTES_MAX, None) else { return };
    if !frame.is_connect() {
        return;
    }
    let Ok(connect) = frame.connect() else { return };
    properties(&connect.properties, connect.version);
    assert!(!connect.client_id.contains('\0'));
    assert!(connect.version != MqttVersion::V5 || connect.receive_maximum() > 0);
    assert!(connect.packet_bytes_max() > 0);
    if let Some(will) = &connect.will {
        properties(&will.properties, connect.version);
        assert!(will.qos <= 2 && !will.topic.is_empty() && !will.topic.contains(['+', '#']));
    }
    let _ = (connect.session_expiry_s(), connect.wants_reasons(), connect.wants_authentication());
}
