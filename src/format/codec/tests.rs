//! The gate against frames that the specification forbids, against noise, and against a codec that
//! somebody else wrote (rmqtt-codec).

use bytes::BytesMut;
use proptest::prelude::*;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::Decoder;

use super::properties::TOPIC_ALIAS;
use super::*;

fn frame(bytes: &[u8], version: MqttVersion) -> Result<Option<MqttPacket<'_>>, Violation> {
    match MqttFrame::split(bytes, 1 << 20, Some(version))? {
        Some(frame) => frame.decode(version).map(Some),
        None => Ok(None),
    }
}

fn refused(bytes: &[u8], version: MqttVersion) -> ReasonCode {
    match frame(bytes, version) {
        Err(violation) => violation.reason,
        other => panic!("{bytes:02x?} was taken as {other:?}"),
    }
}

/// A PUBLISH of QoS 1 with these properties and this topic.
fn publish(v5: bool, topic: &[u8], properties: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&u16::try_from(topic.len()).expect("short").to_be_bytes());
    body.extend_from_slice(topic);
    body.extend_from_slice(&[0, 7]);
    if v5 {
        body.push(u8::try_from(properties.len()).expect("short"));
        body.extend_from_slice(properties);
    }
    body.extend_from_slice(payload);
    let mut packet = vec![0x32];
    write::varint(&mut packet, body.len());
    packet.extend_from_slice(&body);
    packet
}

fn connect(name: &[u8], level: u8, flags: u8, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![0, u8::try_from(name.len()).expect("short")];
    body.extend_from_slice(name);
    body.extend_from_slice(&[level, flags, 0, 60]);
    body.extend_from_slice(rest);
    let mut packet = vec![0x10, u8::try_from(body.len()).expect("short")];
    packet.extend_from_slice(&body);
    packet
}

fn connect_refused(bytes: &[u8]) -> (Option<MqttVersion>, ReasonCode) {
    let frame = MqttFrame::split(bytes, 1 << 20, None).expect("a header").expect("whole");
    let (version, violation) = frame.connect().expect_err("a CONNECT that is not allowed");
    (version, violation.reason)
}

#[test]
fn a_publish_is_read_in_place() {
    for (version, bytes) in [
        (MqttVersion::V311, publish(false, b"a/b", b"", b"21.5")),
        (MqttVersion::V5, publish(true, b"a/b", &[TOPIC_ALIAS, 0, 3], b"21.5")),
    ] {
        let Ok(Some(MqttPacket::Publish(read))) = frame(&bytes, version) else { panic!("not a PUBLISH") };
        assert_eq!((read.topic, read.packet_id, read.qos, read.payload), ("a/b", 7, 1, &b"21.5"[..]));
    }
}

#[test]
fn a_packet_that_is_not_all_there_is_waited_for() {
    let whole = publish(true, b"topic", b"", &[1; 300]);
    for cut in 0..whole.len() {
        assert_eq!(MqttFrame::split(&whole[..cut], 1 << 20, Some(MqttVersion::V5)), Ok(None), "{cut}");
    }
}

#[test]
fn a_length_over_the_maximum_is_refused_before_the_rest_comes() {
    let claim = [0x30, 0xff, 0xff, 0xff, 0x7f];
    assert_eq!(refused(&claim, MqttVersion::V311), ReasonCode::PacketTooLarge);
    let at = publish(false, b"a", b"", b"");
    assert!(MqttFrame::split(&at, at.len(), Some(MqttVersion::V311)).is_ok_and(|frame| frame.is_some()));
    assert!(MqttFrame::split(&at, at.len() - 1, Some(MqttVersion::V311)).is_err());
}

#[test]
fn what_the_fixed_header_forbids_is_malformed() {
    for first in [0x11_u8, 0x36, 0x37, 0x38, 0x41, 0x60, 0x63, 0x80, 0xa0, 0xc1, 0xe1, 0x01] {
        assert_eq!(refused(&[first, 0], MqttVersion::V5), ReasonCode::MalformedPacket, "{first:02x}");
    }
    assert_eq!(refused(&[0x30, 0x80, 0x80, 0x80, 0x80, 1], MqttVersion::V311), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0xc0, 0x80, 0x00], MqttVersion::V5), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0xc0, 1, 0], MqttVersion::V311), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0x00, 0], MqttVersion::V5), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0xf0, 0], MqttVersion::V311), ReasonCode::MalformedPacket);
}

#[test]
fn packets_that_only_a_server_sends_are_protocol_errors() {
    for first in [0x20, 0x90, 0xb0, 0xd0] {
        assert_eq!(refused(&[first, 0], MqttVersion::V5), ReasonCode::ProtocolError, "{first:02x}");
    }
}

#[test]
fn a_publish_that_breaks_a_rule_is_refused_with_its_reason() {
    let v5 =
        |topic: &[u8], properties: &[u8]| refused(&publish(true, topic, properties, b""), MqttVersion::V5);
    assert_eq!(v5(b"a\0b", b""), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"\xff", b""), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"\xed\xa0\x80", b""), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"a/#", b""), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"", b""), ReasonCode::ProtocolError);
    // Twice, unknown, of another packet, neither 0 nor 1, cut short, from a server alone.
    assert_eq!(v5(b"a", &[1, 1, 1, 1]), ReasonCode::ProtocolError);
    assert_eq!(v5(b"a", &[0x7f, 0]), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"a", &[0x11, 0, 0, 0, 1]), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"a", &[1, 2]), ReasonCode::ProtocolError);
    assert_eq!(v5(b"a", &[2, 0]), ReasonCode::MalformedPacket);
    assert_eq!(v5(b"a", &[0x0b, 1]), ReasonCode::ProtocolError);
    assert_eq!(v5(b"a", &[8, 0, 1, b'#']), ReasonCode::ProtocolError);
    assert_eq!(refused(&publish(false, b"", b"", b""), MqttVersion::V311), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0x32, 5, 0, 1, b'a', 0, 0], MqttVersion::V311), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0x32, 3, 0, 1, b'a'], MqttVersion::V311), ReasonCode::MalformedPacket);
}

#[test]
fn a_subscribe_that_breaks_a_rule_is_refused_with_its_reason() {
    let v5 = |rest: &[u8]| {
        let mut packet = vec![0x82, u8::try_from(rest.len() + 2).expect("short"), 0, 1];
        packet.extend_from_slice(rest);
        refused(&packet, MqttVersion::V5)
    };
    assert_eq!(v5(&[0]), ReasonCode::ProtocolError);
    assert_eq!(v5(&[0, 0, 1, b'a', 3]), ReasonCode::ProtocolError);
    assert_eq!(v5(&[0, 0, 1, b'a', 0x30]), ReasonCode::ProtocolError);
    assert_eq!(v5(&[0, 0, 1, b'a', 0x40]), ReasonCode::MalformedPacket);
    assert_eq!(v5(&[2, 0x0b, 0, 0, 1, b'a', 0]), ReasonCode::ProtocolError);
    let no_local_shared = [&[0, 0, 10][..], b"$share/g/a", &[4]].concat();
    assert_eq!(v5(&no_local_shared), ReasonCode::ProtocolError);
    assert_eq!(refused(&[0x82, 6, 0, 1, 0, 1, b'a', 4], MqttVersion::V311), ReasonCode::MalformedPacket);
    assert_eq!(refused(&[0xa2, 2, 0, 1], MqttVersion::V311), ReasonCode::ProtocolError);
}

#[test]
fn a_connect_that_breaks_a_rule_is_refused_in_its_versions_form() {
    use ReasonCode::{MalformedPacket, ProtocolError, UnsupportedProtocolVersion};
    let id = [0, 1, b'c'];
    let v311 = Some(MqttVersion::V311);
    assert_eq!(connect_refused(&connect(b"MQTT", 3, 2, &id)), (v311, UnsupportedProtocolVersion));
    // In that form which the rest has.
    let with_properties = [&[0][..], &id].concat();
    for (rest, version) in [(&id[..], MqttVersion::V311), (&with_properties, MqttVersion::V5)] {
        let refused = connect_refused(&connect(b"MQTT", 6, 2, rest));
        assert_eq!(refused, (Some(version), UnsupportedProtocolVersion));
    }
    assert_eq!(connect_refused(&connect(b"HTTP", 4, 2, &id)), (None, UnsupportedProtocolVersion));
    // The reserved flag, will flags without a will, a password alone, bytes behind the end.
    for flags in [3, 0x0a, 0x22, 0x42] {
        assert_eq!(connect_refused(&connect(b"MQTT", 4, flags, &id)).1, MalformedPacket, "{flags:02x}");
    }
    assert_eq!(connect_refused(&connect(b"MQTT", 4, 0x1e, &id)).1, MalformedPacket);
    assert_eq!(connect_refused(&connect(b"MQTT", 4, 2, &[0, 1, b'c', 0])).1, MalformedPacket);
    assert_eq!(connect_refused(&connect(b"MQTT", 4, 2, &[0, 2, b'c'])).1, MalformedPacket);
    // Twice, 0 where it cannot be, data without a method.
    let v5 = |properties: &[u8]| {
        let rest = [&[u8::try_from(properties.len()).expect("short")], properties, &id].concat();
        connect_refused(&connect(b"MQTT", 5, 2, &rest)).1
    };
    assert_eq!(v5(&[0x21, 0, 1, 0x21, 0, 1]), ProtocolError);
    assert_eq!(v5(&[0x21, 0, 0]), ProtocolError);
    assert_eq!(v5(&[0x27, 0, 0, 0, 0]), ProtocolError);
    assert_eq!(v5(&[0x16, 0, 1, 1]), ProtocolError);
    assert_eq!(v5(&[0x23, 0, 1]), MalformedPacket);
}

#[test]
fn a_topic_filter_has_its_wildcards_in_whole_levels_and_the_last_one_last() {
    let subscribe = |filter: &str, version| {
        let mut body = vec![0, 1];
        body.extend(if version == MqttVersion::V5 { &[0][..] } else { &[] });
        body.extend_from_slice(&[0, u8::try_from(filter.len()).expect("short")]);
        body.extend_from_slice(filter.as_bytes());
        body.push(1);
        [vec![0x82, u8::try_from(body.len()).expect("short")], body].concat()
    };
    for version in [MqttVersion::V31, MqttVersion::V311, MqttVersion::V5] {
        for good in
            ["a", "/", "#", "+", "a/#", "+/+", "/+", "+/#", "a//b", "$share/g/#", "$share/g//", "$SYS/#"]
        {
            assert!(frame(&subscribe(good, version), version).is_ok(), "{good}");
        }
        for bad in
            ["", "a#", "#/a", "a/#/b", "##", "a+", "+a/b", "a/b+/c", "$share/", "$share/g", "$share/g/"]
        {
            assert_eq!(refused(&subscribe(bad, version), version), ReasonCode::MalformedPacket, "{bad}");
        }
        for bad in ["$share//a", "$share/+/a", "$share/g#/a", "$share/g/a#"] {
            assert_eq!(refused(&subscribe(bad, version), version), ReasonCode::MalformedPacket, "{bad}");
        }
    }
}

#[test]
fn an_acknowledgement_carries_a_reason_code_of_its_own() {
    for (first, good, bad) in [(0x40, 0x10, 0x92), (0x50, 0x97, 0x02), (0x62, 0x92, 0x10), (0x70, 0x92, 0x80)]
    {
        assert!(frame(&[first, 3, 0, 1, good], MqttVersion::V5).is_ok(), "{first:02x}");
        assert_eq!(
            refused(&[first, 3, 0, 1, bad], MqttVersion::V5),
            ReasonCode::ProtocolError,
            "{first:02x}"
        );
        assert_eq!(
            refused(&[first, 3, 0, 1, 0], MqttVersion::V311),
            ReasonCode::MalformedPacket,
            "{first:02x}"
        );
    }
}

#[test]
fn what_mqtt_3_1_allows_and_its_successors_do_not_is_taken_from_3_1_alone() {
    // Marked as sent again; and DUP at QoS 0.
    for bytes in [
        &[0x6a, 2, 0, 1][..],
        &[0x8a, 6, 0, 1, 0, 1, b'a', 1],
        &[0xaa, 5, 0, 1, 0, 1, b'a'],
        &[0x38, 3, 0, 1, b'a'],
    ] {
        assert!(frame(bytes, MqttVersion::V31).is_ok(), "{bytes:02x?}");
        assert_eq!(refused(bytes, MqttVersion::V311), ReasonCode::MalformedPacket, "{bytes:02x?}");
    }
    // A CONNECT that says DUP, QoS and RETAIN, which 3.1 does not use.
    for flags in 1..16 {
        let flagged = |name, level| {
            let mut bytes = connect(name, level, 2, &[0, 1, b'c']);
            bytes[0] |= flags;
            let split = MqttFrame::split(&bytes, 1 << 20, None).expect("a header").expect("whole");
            split.connect().map(|connect| connect.version).map_err(|(_, violation)| violation.reason)
        };
        assert_eq!(flagged(b"MQIsdp", 3), Ok(MqttVersion::V31), "{flags}");
        assert_eq!(flagged(b"MQTT", 4), Err(ReasonCode::MalformedPacket), "{flags}");
    }
    // A user name that is announced and left out.
    let left_out = connect(b"MQIsdp", 3, 0x82, &[0, 1, b'c']);
    let split = MqttFrame::split(&left_out, 1 << 20, None).expect("a header").expect("whole");
    assert_eq!(split.connect().expect("a CONNECT of 3.1").username, None);
    assert_eq!(connect_refused(&connect(b"MQTT", 4, 0x82, &[0, 1, b'c'])).1, ReasonCode::MalformedPacket);
}

#[test]
fn a_connect_says_its_length_in_no_more_bytes_than_it_needs_since_mqtt_5() {
    for (level, properties, is_refused) in [(4, &[][..], false), (5, &[0], true)] {
        let mut bytes = connect(b"MQTT", level, 2, &[properties, &[0, 1, b'c']].concat());
        bytes[1] |= 0x80;
        bytes.insert(2, 0);
        let split = MqttFrame::split(&bytes, 1 << 20, None).expect("a header").expect("whole");
        assert_eq!(split.connect().is_err(), is_refused, "level {level}");
    }
}

#[test]
fn a_will_names_a_topic() {
    for topic in ["", "a/#", "+"] {
        let will = [&[0, u8::try_from(topic.len()).expect("short")], topic.as_bytes(), &[0, 0]].concat();
        let v311 = [&[0, 1, b'c'][..], &will].concat();
        assert_eq!(connect_refused(&connect(b"MQTT", 4, 6, &v311)).1, ReasonCode::MalformedPacket, "{topic}");
        let v5 = [&[0, 0, 1, b'c', 0][..], &will].concat();
        assert_eq!(connect_refused(&connect(b"MQTT", 5, 6, &v5)).1, ReasonCode::MalformedPacket, "{topic}");
    }
}

/// A frame that somebody may really send, and then up to two bytes of it changed.
fn nearly_valid() -> impl Strategy<Value = (bool, Vec<u8>)> {
    let properties = prop_oneof![
        Just(vec![]),
        Just(vec![TOPIC_ALIAS, 0, 3]),
        Just(vec![3, 0, 1, b'j', 1, 1]),
        Just(vec![0x26, 0, 1, b'k', 0, 1, b'v', 9, 0, 2, 1, 2]),
    ];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (any::<bool>(), "[a-z/é]{1,12}", properties, prop::collection::vec(any::<u8>(), 0..200), changes)
        .prop_map(|(v5, topic, properties, payload, changes)| {
            let mut bytes = publish(v5, topic.as_bytes(), &properties, &payload);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            (v5, bytes)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn noise_is_refused_or_waited_for_and_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        for version in [MqttVersion::V31, MqttVersion::V311, MqttVersion::V5] {
            let _ = frame(&bytes, version);
        }
        if let Ok(Some(first)) = MqttFrame::split(&bytes, 1 << 20, None) {
            prop_assert!(first.bytes <= bytes.len());
            let _ = first.connect();
        }
    }

    #[test]
    fn what_the_gate_lets_through_another_codec_reads_alike((is_v5, bytes) in nearly_valid()) {
        let version = if is_v5 { MqttVersion::V5 } else { MqttVersion::V311 };
        let Ok(Some(MqttPacket::Publish(ours))) = frame(&bytes, version) else { return Ok(()) };
        let mut buffer = BytesMut::from(&bytes[..]);
        let theirs = if is_v5 {
            match v5::Codec::new(1 << 20, 1 << 20).decode(&mut buffer) {
                Ok(Some((v5::Packet::Publish(publish), _))) => Some(publish),
                _ => None,
            }
        } else {
            match v3::Codec::new(1 << 20).decode(&mut buffer) {
                Ok(Some((v3::Packet::Publish(publish), _))) => Some(publish),
                _ => None,
            }
        };
        // It refuses a topic alias or an expiry of 0 here; the gate's caller does after.
        let Some(theirs) = theirs else {
            prop_assert!(ours.properties.iter().any(|(_, value, _)| value == properties::PropertyValue::Number(0)));
            return Ok(());
        };
        prop_assert_eq!(ours.topic, &*theirs.topic);
        prop_assert_eq!(ours.payload, &theirs.payload[..]);
        prop_assert_eq!(ours.packet_id, theirs.packet_id.map_or(0, std::num::NonZeroU16::get));
        prop_assert_eq!((ours.qos, ours.dup, ours.retain), (theirs.qos as u8, theirs.dup, theirs.retain));
    }
}
