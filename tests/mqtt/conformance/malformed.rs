//! Frames that the specifications forbid: each one ends its connection with the code that it has
//! coming, and nobody else's.
//!
//! MQTT 3.1.1 has no codes but those of a CONNACK: everything else just closes. Where MQTT 5 does not
//! say whether something is malformed (0x81) or a protocol error (0x82), either will do.

use super::stage::{Stage, last_word};
use crate::common::wire::{
    AUTH_DATA, AUTH_METHOD, CONNACK, CONTENT_TYPE, CORRELATION_DATA, Connect, DISCONNECT,
    MAXIMUM_PACKET_SIZE, MAXIMUM_QOS, MESSAGE_EXPIRY, Message, PAYLOAD_FORMAT, PINGREQ, PINGRESP, PUBACK,
    PUBCOMP, PUBREC, PUBREL, REASON_STRING, RECEIVE_MAXIMUM, REQUEST_PROBLEM_INFO, REQUEST_RESPONSE_INFO,
    RESPONSE_INFO, RESPONSE_TOPIC, RETAIN_AVAILABLE, SERVER_KEEP_ALIVE, SERVER_REFERENCE, SESSION_EXPIRY,
    SHARED_AVAILABLE, SUBSCRIPTION_ID, SUBSCRIPTION_IDS_AVAILABLE, TOPIC_ALIAS, TOPIC_ALIAS_MAXIMUM,
    USER_PROPERTY, VERSIONS,
    Version::{self, V5, V311},
    WILDCARDS_AVAILABLE, WILL_DELAY, Wire, ack, ack_with, four_bytes, frame, prefixed, publish, subscribe,
    subscribe_with, text_property, two_bytes, unsubscribe, user_property, varint,
};

/// Malformed, or against the protocol: the specification does not say which.
const EITHER: &[u8] = &[0x81, 0x82];
const MALFORMED: &[u8] = &[0x81];
const PROTOCOL: &[u8] = &[0x82];
/// A response topic that may be told apart from other malformed text.
const RESPONSE: &[u8] = &[0x81, 0x82, 0x90];
/// No answer.
const SILENCE: &[u8] = &[];

/// One frame.
struct Case {
    name: String,
    /// Of the client that sends it.
    version: Version,
    /// In the place of a CONNECT, or after one.
    first: bool,
    bytes: Vec<u8>,
    /// The codes that will do; if there are none, the connection has to end without an answer.
    codes: &'static [u8],
}

/// The frames, as they are put together.
#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn push(&mut self, name: &str, version: Version, first: bool, bytes: Vec<u8>, codes: &'static [u8]) {
        self.0.push(Case { name: format!("{name}, {version:?}"), version, first, bytes, codes });
    }

    /// In the place of a CONNECT; both versions, and 3.1.1 has no answer.
    fn connect(&mut self, name: &str, bytes: impl Fn(Version) -> Vec<u8>, codes: &'static [u8]) {
        self.push(name, V311, true, bytes(V311), SILENCE);
        self.push(name, V5, true, bytes(V5), codes);
    }

    /// After a CONNECT; both versions.
    fn after(&mut self, name: &str, bytes: impl Fn(Version) -> Vec<u8>, codes: &'static [u8]) {
        self.push(name, V311, false, bytes(V311), SILENCE);
        self.after_v5(name, bytes(V5), codes);
    }

    fn after_v5(&mut self, name: &str, bytes: Vec<u8>, codes: &'static [u8]) {
        self.push(name, V5, false, bytes, codes);
    }
}

#[test]
fn every_malformed_frame_closes_the_connection_with_its_code() {
    let stage = Stage::new();
    let mut cases = Cases::default();
    fixed_headers(&mut cases);
    lengths(&mut cases, &stage.key);
    connects(&mut cases, &stage.key);
    packet_ids(&mut cases);
    publishes(&mut cases);
    subscriptions(&mut cases);
    goodbyes(&mut cases);
    texts(&mut cases, &stage.key);
    properties(&mut cases, &stage.key);
    values(&mut cases, &stage.key);
    for version in VERSIONS {
        let of_version = cases.0.iter().filter(|case| case.version == version).count();
        assert!(of_version >= 170, "{of_version} frames of {version:?}");
    }
    let mut bystander = Wire::login(stage.gateway.mqtt, V5, &stage.key);
    let wrong: Vec<String> =
        cases.0.iter().filter_map(|case| wrong_end(&stage, case, &mut bystander)).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.0.len(), wrong.join("\n"));
    assert_eq!(bystander.publish(V5, 1, "a", b"the only message"), 0);
    stage.gateway.settle();
    assert_eq!(stage.gateway.records("press-4").len(), 1, "nothing of all this was kept");
}

/// Sends one frame; says what was wrong with the answer, if it was.
fn wrong_end(stage: &Stage, case: &Case, bystander: &mut Wire) -> Option<String> {
    let mut wire = if case.first {
        Wire::open(stage.gateway.mqtt)
    } else {
        Wire::login(stage.gateway.mqtt, case.version, &stage.key)
    };
    wire.send(&case.bytes);
    // A frame that was taken for the beginning of a longer one is not closed; a ping ends the doubt.
    wire.send(&PINGREQ);
    let started = std::time::Instant::now();
    let kind = if case.first { CONNACK } else { DISCONNECT };
    let verdict = match wire.next() {
        crate::common::wire::Next::Packet(frame) if frame.kind() == PINGRESP => Some("was taken".to_owned()),
        crate::common::wire::Next::Packet(frame) if frame.kind() != kind => Some(format!("got {frame:02x?}")),
        crate::common::wire::Next::Packet(frame) if !case.codes.contains(&frame.reason()) => {
            Some(format!("got {:#04x}, not one of {:02x?}", frame.reason(), case.codes))
        }
        crate::common::wire::Next::Packet(_) => {
            last_word(&mut wire).map(|frame| format!("was followed by {frame:02x?}"))
        }
        crate::common::wire::Next::Closed if case.codes.is_empty() => None,
        crate::common::wire::Next::Closed => Some(format!("got no answer, not one of {:02x?}", case.codes)),
        crate::common::wire::Next::Silent => Some("is still waited for".to_owned()),
    };
    assert!(started.elapsed() < std::time::Duration::from_secs(2), "{}: at once", case.name);
    bystander.send(&PINGREQ);
    bystander.packet(PINGRESP);
    verdict
        .map(|verdict| format!("{}: {:02x?} {verdict}", case.name, &case.bytes[..case.bytes.len().min(48)]))
}

/// Packet types that do not exist or are a server's, and flags that a type does not have.
fn fixed_headers(cases: &mut Cases) {
    type Bytes = fn(Version) -> Vec<u8>;
    let whole: [(&str, Bytes); 12] = [
        ("PUBACK", |_| ack(PUBACK, 1)),
        ("PUBREC", |_| ack(PUBREC, 1)),
        ("PUBREL", |_| ack(PUBREL, 1)),
        ("PUBCOMP", |_| ack(PUBCOMP, 1)),
        ("SUBSCRIBE", |version| subscribe(version, 1, &["a"])),
        ("UNSUBSCRIBE", |version| unsubscribe(version, 1, &["a"])),
        ("PINGREQ", |_| PINGREQ.to_vec()),
        ("DISCONNECT", |_| vec![0xE0, 0]),
        ("AUTH", |_| vec![0xF0, 0]),
        ("CONNACK", |_| vec![0x20, 2, 0, 0]),
        ("SUBACK", |_| vec![0x90, 3, 0, 1, 0]),
        ("PINGRESP", |_| vec![0xD0, 0]),
    ];
    for (name, bytes) in whole {
        for bit in 0..4 {
            let flipped = |version| {
                let mut bytes = bytes(version);
                bytes[0] ^= 1 << bit;
                bytes
            };
            cases.after(&format!("flag {bit} of a {name}"), flipped, MALFORMED);
        }
        let first = |version| bytes(version);
        cases.push(&format!("a {name} before the CONNECT"), V5, true, first(V5), SILENCE);
        cases.push(&format!("a {name} before the CONNECT"), V311, true, first(V311), SILENCE);
    }
    for bit in 0..4 {
        let mut bytes = Connect::new(V5).packet();
        bytes[0] ^= 1 << bit;
        cases.push(&format!("flag {bit} of a CONNECT"), V5, true, bytes, SILENCE);
        let mut bytes = Connect::new(V311).packet();
        bytes[0] ^= 1 << bit;
        cases.push(&format!("flag {bit} of a CONNECT"), V311, true, bytes, SILENCE);
    }
    for version in VERSIONS {
        cases.push("a PUBLISH before the CONNECT", version, true, publish(version, 1, "a", b""), SILENCE);
        cases.push("packet type 0 before the CONNECT", version, true, vec![0, 0], SILENCE);
    }
    cases.after("packet type 0", |_| vec![0x00, 0], MALFORMED);
    cases.after("packet type 0 with content", |_| vec![0x00, 2, 0, 1], MALFORMED);
    cases.after("a second CONNECT", |version| Connect::new(version).packet(), PROTOCOL);
    let other = |version| Connect::new(if version == V5 { V311 } else { V5 }).packet();
    cases.after("a second CONNECT of the other version", other, PROTOCOL);
    cases.after("a CONNACK", |_| vec![0x20, 2, 0, 0], EITHER);
    let suback = |version| if version == V5 { vec![0x90, 4, 0, 1, 0, 0] } else { vec![0x90, 3, 0, 1, 0] };
    cases.after("a SUBACK", suback, EITHER);
    let unsuback = |version| if version == V5 { vec![0xB0, 4, 0, 1, 0, 0] } else { vec![0xB0, 2, 0, 1] };
    cases.after("an UNSUBACK", unsuback, EITHER);
    cases.after("a PINGRESP", |_| vec![0xD0, 0], EITHER);
    cases.after("an AUTH without a method", |_| vec![0xF0, 0], EITHER);
    for reason in [0x00, 0x18, 0x19, 0x01, 0xFF] {
        let bytes = frame(0xF0, &[&[reason, 12][..], &text_property(AUTH_METHOD, "SCRAM-SHA")].concat());
        cases.after(&format!("an AUTH with reason {reason:#04x}"), |_| bytes.clone(), EITHER);
    }
}

/// Remaining lengths, and content that is shorter or longer than they say.
fn lengths(cases: &mut Cases, key: &str) {
    for first in [0x32, 0x40, 0x82, 0xA2, 0xC0, 0xE0] {
        let name = format!("a length of five bytes on {first:#04x}");
        cases.after(&name, |_| vec![first, 0x80, 0x80, 0x80, 0x80, 0x01], MALFORMED);
        let name = format!("a claim of 256 MB on {first:#04x}");
        cases.after(&name, |_| vec![first, 0xFF, 0xFF, 0xFF, 0x7F], &[0x95]);
    }
    for version in VERSIONS {
        let five = vec![0x10, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
        cases.push("a length of five bytes on a CONNECT", version, true, five, SILENCE);
        let huge = vec![0x10, 0xFF, 0xFF, 0xFF, 0x7F];
        cases.push("a claim of 256 MB on a CONNECT", version, true, huge, SILENCE);
    }
    // MQTT 3.1.1 does not ask for the fewest bytes.
    for extra in 1..=3 {
        let overlong = |first: u8, body: &[u8]| {
            let mut bytes = vec![first, u8::try_from(body.len()).expect("short") | 0x80];
            bytes.extend(vec![0x80; extra - 1]);
            bytes.push(0);
            [&bytes, body].concat()
        };
        let name = |of: &str| format!("{extra} bytes more than the length of {of} needs");
        cases.after_v5(&name("a PINGREQ"), overlong(0xC0, &[]), MALFORMED);
        cases.after_v5(&name("a PUBLISH"), overlong(0x30, &[0, 1, b'a', 0]), MALFORMED);
        cases.after_v5(&name("a DISCONNECT"), overlong(0xE0, &[]), MALFORMED);
        let connect = Connect::with_key(V5, key).packet();
        cases.push(&name("a CONNECT"), V5, true, overlong(0x10, &connect[2..]), MALFORMED);
    }
    for byte in [0, 0x80, 0xFF] {
        cases.after("content in a PINGREQ", |_| frame(0xC0, &[byte]), EITHER);
    }
    // Whatever is missing at the end of a packet, it is not whole.
    for version in VERSIONS {
        let subscribe = subscribe(version, 1, &["a/b"]);
        for length in 0..subscribe.len() - 2 {
            let codes = if length == 3 && version == V5 { PROTOCOL } else { EITHER };
            let codes = if version == V5 { codes } else { SILENCE };
            let bytes = frame(0x82, &subscribe[2..2 + length]);
            cases.push(&format!("{length} bytes of a SUBSCRIBE"), version, false, bytes, codes);
        }
        let unsubscribe = unsubscribe(version, 1, &["a/b"]);
        for length in 0..unsubscribe.len() - 2 {
            let codes = if version == V5 { EITHER } else { SILENCE };
            let bytes = frame(0xA2, &unsubscribe[2..2 + length]);
            cases.push(&format!("{length} bytes of an UNSUBSCRIBE"), version, false, bytes, codes);
        }
        let publish = publish(version, 1, "a/b", b"");
        for length in 0..publish.len() - 2 {
            let codes = if version == V5 { MALFORMED } else { SILENCE };
            let bytes = frame(0x32, &publish[2..2 + length]);
            cases.push(&format!("{length} bytes of a PUBLISH"), version, false, bytes, codes);
        }
        let connect = Connect {
            client_id: "c".to_owned(),
            will: Some(("w".to_owned(), b"x".to_vec())),
            password: Some(b"p".to_vec()),
            ..Connect::with_key(version, key)
        };
        let connect = &connect.packet()[2..];
        for length in (0..26).chain([connect.len() - 1]) {
            // Up to the protocol's level nobody knows which form an answer would have.
            let codes = if version == V5 && length > 6 { MALFORMED } else { SILENCE };
            let bytes = frame(0x10, &connect[..length]);
            cases.push(&format!("{length} bytes of a CONNECT"), version, true, bytes, codes);
        }
        let longer = frame(0x10, &[connect, b"x"].concat());
        let codes = if version == V5 { MALFORMED } else { SILENCE };
        cases.push("a byte behind a CONNECT", version, true, longer, codes);
    }
    for kind in [PUBACK, PUBREC, PUBREL, PUBCOMP] {
        let first = ack(kind, 1)[0];
        cases.after(&format!("packet type {kind} without content"), |_| frame(first, &[]), MALFORMED);
        cases.after(&format!("packet type {kind} of one byte"), |_| frame(first, &[0]), MALFORMED);
        let longer = |version| frame(first, if version == V5 { &[0, 1, 0, 0, 9] } else { &[0, 1, 0] });
        cases.after(&format!("a byte behind packet type {kind}"), longer, MALFORMED);
        let bytes = frame(first, &[0, 1, 0, 5]);
        cases.after_v5(&format!("properties that packet type {kind} has not"), bytes, MALFORMED);
    }
    for (name, body) in [("a SUBSCRIBE", &[0, 1, b'a', 0][..]), ("an UNSUBSCRIBE", &[0, 1, b'a'][..])] {
        let first = if name == "a SUBSCRIBE" { 0x82 } else { 0xA2 };
        for behind in [&[0][..], &[0, 5], &[0, 5, b'a']] {
            let longer = |version| {
                let head: &[u8] = if version == V5 { &[0, 1, 0] } else { &[0, 1] };
                frame(first, &[head, body, behind].concat())
            };
            cases.after(&format!("{} bytes behind {name}", behind.len()), longer, EITHER);
        }
    }
}

/// What a CONNECT says first: protocol, level, flags, and the fields that they announce.
fn connects(cases: &mut Cases, key: &str) {
    let v311 = Connect::with_key(V311, key);
    let v5 = Connect::with_key(V5, key);
    for name in ["", "M", "MQT", "MQTTX", "mqtt", "MQTt", "HTTP", "MQISDP"] {
        for connect in [&v311, &v5] {
            let bytes = connect.packet_with(name.as_bytes(), connect.version as u8, connect.flags());
            cases.push(&format!("protocol {name:?}"), connect.version, true, bytes, SILENCE);
        }
    }
    for level in [0, 1, 2, 3, 0x83] {
        let bytes = v311.packet_with(b"MQTT", level, v311.flags());
        cases.push(&format!("level {level} of MQTT"), V311, true, bytes, &[1]);
    }
    for level in [6, 7, 0x7F, 0x86, 0xFF] {
        let bytes = v5.packet_with(b"MQTT", level, v5.flags());
        cases.push(&format!("level {level} of MQTT"), V5, true, bytes, &[0x84]);
    }
    for level in [0, 4, 5, 0x84] {
        let bytes = v311.packet_with(b"MQIsdp", level, v311.flags());
        cases.push(&format!("level {level} of MQIsdp"), V311, true, bytes, &[1]);
    }
    let with_flags = |version, flags: u8| {
        let connect = if version == V5 { &v5 } else { &v311 };
        connect.packet_with(b"MQTT", version as u8, flags)
    };
    for (name, flags) in [
        ("the reserved flag", 0x83),
        ("will QoS 1 without a will", 0x8A),
        ("will QoS 2 without a will", 0x92),
        ("will QoS 3 without a will", 0x9A),
        ("will retain without a will", 0xA2),
        ("a will that is not there", 0x86),
        ("a password that is not there", 0xC2),
        ("a user name that is not announced", 0x02),
    ] {
        cases.connect(name, |version| with_flags(version, flags), MALFORMED);
    }
    let willing =
        |version| Connect { will: Some(("w".to_owned(), b"x".to_vec())), ..Connect::with_key(version, key) };
    cases.connect("will QoS 3", |version| Connect { will_qos: 3, ..willing(version) }.packet(), MALFORMED);
    cases.connect(
        "a will that is not announced",
        |version| {
            let connect = willing(version);
            connect.packet_with(b"MQTT", version as u8, connect.flags() & !4)
        },
        MALFORMED,
    );
    cases.connect(
        "a password that is not announced",
        |version| {
            let connect = Connect { password: Some(b"x".to_vec()), ..Connect::with_key(version, key) };
            connect.packet_with(b"MQTT", version as u8, connect.flags() & !0x40)
        },
        MALFORMED,
    );
    for topic in ["", "#", "a/#", "+", "a/+/b"] {
        let name = format!("the will's topic {topic:?}");
        let will = Some((topic.to_owned(), b"x".to_vec()));
        cases.connect(
            &name,
            |version| Connect { will: will.clone(), ..Connect::with_key(version, key) }.packet(),
            MALFORMED,
        );
    }
    let password_alone = Connect { username: None, password: Some(key.as_bytes().to_vec()), ..v311.clone() };
    cases.push("a password without a user name", V311, true, password_alone.packet(), SILENCE);
    let nameless = Connect { clean: false, ..v311 };
    cases.push("no client identifier for a session that stays", V311, true, nameless.packet(), &[2]);
}

/// Packet identifiers of 0.
fn packet_ids(cases: &mut Cases) {
    for kind in [PUBACK, PUBREC, PUBREL, PUBCOMP] {
        cases.after(&format!("packet id 0 in packet type {kind}"), |_| ack(kind, 0), EITHER);
    }
    for qos in [1, 2] {
        let message = Message::new("a", "x").at(qos, 0);
        cases.after(&format!("packet id 0 at QoS {qos}"), |version| message.packet(version), EITHER);
        let short = frame(0x30 | qos << 1, &[0, 1, b'a']);
        cases.after(&format!("no packet id at QoS {qos}"), |_| short.clone(), MALFORMED);
    }
    cases.after("packet id 0 in a SUBSCRIBE", |version| subscribe(version, 0, &["a"]), EITHER);
    cases.after("packet id 0 in an UNSUBSCRIBE", |version| unsubscribe(version, 0, &["a"]), EITHER);
}

/// PUBLISH: its flags and its topic.
fn publishes(cases: &mut Cases) {
    for flags in [0x6, 0x7, 0xE, 0xF] {
        let bytes = |version| frame(0x30 | flags, &publish(version, 1, "a", b"x")[2..]);
        cases.after(&format!("QoS 3 with flags {flags:#03x}"), bytes, MALFORMED);
    }
    for flags in [0x8, 0x9] {
        let bytes = |version| frame(0x30 | flags, &publish(version, 0, "a", b"x")[2..]);
        cases.after(&format!("DUP at QoS 0 with flags {flags:#03x}"), bytes, EITHER);
    }
    for qos in 0..=2 {
        for topic in ["", "#", "+", "a/#", "a/+/b", "a#", "+a", "/#"] {
            let message = Message::new(topic, "x").at(qos, u16::from(qos));
            let codes = if topic.is_empty() { EITHER } else { MALFORMED };
            cases.after(&format!("topic {topic:?} at QoS {qos}"), |version| message.packet(version), codes);
        }
    }
    let endless = |version| {
        let mut packet = publish(version, 1, "a", b"");
        packet[2] = 0xFF;
        packet
    };
    cases.after("a topic longer than its packet", endless, MALFORMED);
}

/// SUBSCRIBE and UNSUBSCRIBE: filters and options.
fn subscriptions(cases: &mut Cases) {
    cases.after("a SUBSCRIBE without a filter", |version| subscribe(version, 1, &[]), PROTOCOL);
    cases.after("an UNSUBSCRIBE without a filter", |version| unsubscribe(version, 1, &[]), PROTOCOL);
    for filter in ["", "a#", "#/a", "a/#/b", "##", "a+", "+a", "a/b+/c", "a/+b", "++"] {
        let name = format!("filter {filter:?} in a SUBSCRIBE");
        cases.after(&name, |version| subscribe(version, 1, &[filter]), MALFORMED);
        let name = format!("filter {filter:?} behind another in a SUBSCRIBE");
        cases.after(&name, |version| subscribe(version, 1, &["a", filter]), MALFORMED);
        let name = format!("filter {filter:?} in an UNSUBSCRIBE");
        cases.after(&name, |version| unsubscribe(version, 1, &[filter]), MALFORMED);
    }
    for filter in ["$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "$share/#/a", "$share/g/a#"]
    {
        cases.after_v5(&format!("filter {filter:?}"), subscribe(V5, 1, &[filter]), MALFORMED);
    }
    for bit in 2..8 {
        let bytes = subscribe_with(V311, 1, &[("a", 1 << bit)], &[]);
        cases.push(&format!("bit {bit} of a QoS"), V311, false, bytes, SILENCE);
    }
    for bit in [6, 7] {
        let bytes = subscribe_with(V5, 1, &[("a", 1 << bit)], &[]);
        cases.after_v5(&format!("bit {bit} of the options"), bytes, MALFORMED);
        let bytes = subscribe_with(V5, 1, &[("a", 1), ("b", 1 << bit | 1)], &[]);
        cases.after_v5(&format!("bit {bit} of the second filter's options"), bytes, MALFORMED);
    }
    cases.after("QoS 3 in a SUBSCRIBE", |version| subscribe_with(version, 1, &[("a", 3)], &[]), EITHER);
    cases.after_v5("retain handling 3", subscribe_with(V5, 1, &[("a", 0x30)], &[]), PROTOCOL);
    cases.after_v5("no-local when shared", subscribe_with(V5, 1, &[("$share/g/a", 4)], &[]), PROTOCOL);
}

/// DISCONNECT.
fn goodbyes(cases: &mut Cases) {
    for (name, body) in [("a byte", &[0][..]), ("a reason and no properties", &[0, 0]), ("two", &[1, 2])] {
        cases.push(&format!("{name} in a DISCONNECT"), V311, false, frame(0xE0, body), SILENCE);
    }
    for reason in [0x01, 0x02, 0x05, 0x7F, 0x84, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x9C, 0xA0, 0xA3, 0xFF] {
        cases.after_v5(&format!("a DISCONNECT with {reason:#04x}"), frame(0xE0, &[reason]), EITHER);
    }
    cases.after_v5("a byte behind a DISCONNECT", frame(0xE0, &[0, 0, 9]), MALFORMED);
    cases.after_v5("properties that a DISCONNECT has not", frame(0xE0, &[0, 3, 0x1F]), MALFORMED);
    for seconds in [1, 3600, u32::MAX] {
        let properties = four_bytes(SESSION_EXPIRY, seconds);
        let bytes = frame(0xE0, &[&[0, 5][..], &properties].concat());
        cases.after_v5(&format!("{seconds} s of session after none was asked for"), bytes, PROTOCOL);
    }
    for (kind, reasons) in [
        (PUBACK, [0x01, 0x11, 0x92, 0x81, 0xFF]),
        (PUBREC, [0x02, 0x18, 0x92, 0x82, 0xFF]),
        (PUBREL, [0x01, 0x10, 0x80, 0x91, 0xFF]),
        (PUBCOMP, [0x01, 0x10, 0x80, 0x91, 0xFF]),
    ] {
        for reason in reasons {
            let name = format!("reason {reason:#04x} in packet type {kind}");
            cases.after_v5(&name, ack_with(kind, 1, reason), EITHER);
        }
    }
}

/// Bytes that are no text of MQTT.
const BAD_TEXTS: [(&str, &[u8]); 10] = [
    ("a byte that UTF-8 has not", &[b'a', 0xFF]),
    ("a continuation alone", &[b'a', 0x80, b'b']),
    ("a character cut short", &[b'a', 0xE2, 0x82]),
    ("a character cut short in the middle", &[b'a', 0xE2, 0x82, b'b']),
    ("an overlong slash", &[b'a', 0xC0, 0xAF]),
    ("an overlong NUL", &[b'a', 0xC0, 0x80]),
    ("the first surrogate", &[b'a', 0xED, 0xA0, 0x80]),
    ("the last surrogate", &[b'a', 0xED, 0xBF, 0xBF]),
    ("a character behind the last", &[b'a', 0xF4, 0x90, 0x80, 0x80]),
    ("NUL", b"a\0b"),
];

/// Every text field of every packet, with bytes in it that are no text.
fn texts(cases: &mut Cases, key: &str) {
    for (what, text) in BAD_TEXTS {
        // A CONNECT by hand: client identifier, will topic and user name in turn.
        for (field, name) in ["the client id", "the will's topic", "the user name"].into_iter().enumerate() {
            let connect = |version| {
                let good = [&b"c"[..], b"w", key.as_bytes()];
                let text = |at: usize| prefixed(if at == field { text } else { good[at] });
                let mut body = [&prefixed("MQTT")[..], &[version as u8, 0x86, 0, 0]].concat();
                let none: &[u8] = if version == V5 { &[0] } else { &[] };
                body.extend([none, &text(0), none, &text(1), &prefixed("x"), &text(2)].concat());
                frame(0x10, &body)
            };
            cases.connect(&format!("{what} in {name}"), connect, MALFORMED);
        }
        cases.after(&format!("{what} in a topic"), |version| publish(version, 1, text, b"x"), MALFORMED);
        for (name, first, options) in [("a SUBSCRIBE", 0x82, &[1][..]), ("an UNSUBSCRIBE", 0xA2, &[])] {
            let bytes = |version| {
                let head: &[u8] = if version == V5 { &[0, 1, 0] } else { &[0, 1] };
                frame(first, &[head, &prefixed(text), options].concat())
            };
            cases.after(&format!("{what} in the filter of {name}"), bytes, MALFORMED);
        }
        let pairs = [
            ("the name of a user property", [&[USER_PROPERTY][..], &prefixed(text), &prefixed("v")].concat()),
            (
                "the value of a user property",
                [&[USER_PROPERTY][..], &prefixed("n"), &prefixed(text)].concat(),
            ),
        ];
        let one = |id| text_property(id, text);
        for packet in Carrier::ALL {
            for (name, property) in &pairs {
                cases.carried(&format!("{what} in {name}"), packet, property, key, MALFORMED);
            }
            for (name, id) in [
                ("a content type", CONTENT_TYPE),
                ("a response topic", RESPONSE_TOPIC),
                ("a reason string", REASON_STRING),
                ("an authentication method", AUTH_METHOD),
            ] {
                if packet.allowed().contains(&id) && packet != Carrier::Auth {
                    cases.carried(&format!("{what} in {name}"), packet, &one(id), key, MALFORMED);
                }
            }
        }
    }
}

/// A packet of MQTT 5 that has properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carrier {
    Connect,
    Will,
    Publish,
    Puback,
    Pubrec,
    Pubrel,
    Pubcomp,
    Subscribe,
    Unsubscribe,
    Disconnect,
    Auth,
}

impl Carrier {
    const ALL: [Self; 11] = [
        Self::Connect,
        Self::Will,
        Self::Publish,
        Self::Puback,
        Self::Pubrec,
        Self::Pubrel,
        Self::Pubcomp,
        Self::Subscribe,
        Self::Unsubscribe,
        Self::Disconnect,
        Self::Auth,
    ];

    /// The properties that a client may give it (table 2-4).
    fn allowed(self) -> &'static [u8] {
        match self {
            Self::Connect => &[
                SESSION_EXPIRY,
                RECEIVE_MAXIMUM,
                MAXIMUM_PACKET_SIZE,
                TOPIC_ALIAS_MAXIMUM,
                REQUEST_RESPONSE_INFO,
                REQUEST_PROBLEM_INFO,
                USER_PROPERTY,
                AUTH_METHOD,
                AUTH_DATA,
            ],
            Self::Will => &[
                WILL_DELAY,
                PAYLOAD_FORMAT,
                MESSAGE_EXPIRY,
                CONTENT_TYPE,
                RESPONSE_TOPIC,
                CORRELATION_DATA,
                USER_PROPERTY,
            ],
            Self::Publish => &[
                PAYLOAD_FORMAT,
                MESSAGE_EXPIRY,
                TOPIC_ALIAS,
                CONTENT_TYPE,
                RESPONSE_TOPIC,
                CORRELATION_DATA,
                USER_PROPERTY,
            ],
            Self::Puback | Self::Pubrec | Self::Pubrel | Self::Pubcomp => &[REASON_STRING, USER_PROPERTY],
            Self::Subscribe => &[SUBSCRIPTION_ID, USER_PROPERTY],
            Self::Unsubscribe => &[USER_PROPERTY],
            Self::Disconnect => &[SESSION_EXPIRY, REASON_STRING, USER_PROPERTY],
            Self::Auth => &[AUTH_METHOD, AUTH_DATA, REASON_STRING, USER_PROPERTY],
        }
    }

    /// The packet, with these bytes where its properties and their length are.
    fn packet(self, properties: &[u8], key: &str) -> Vec<u8> {
        let connect = |properties: &[u8], flags: u8, will: &[u8]| {
            let head = [&prefixed("MQTT")[..], &[5, flags, 0, 0]].concat();
            frame(0x10, &[&head[..], properties, &prefixed("c"), will, &prefixed(key)].concat())
        };
        match self {
            Self::Connect => connect(properties, 0x82, &[]),
            Self::Will => connect(&[0], 0x86, &[properties, &prefixed("w"), &prefixed("x")].concat()),
            Self::Publish => frame(0x32, &[&[0, 1, b'a', 0, 1][..], properties, b"x"].concat()),
            Self::Puback => frame(0x40, &[&[0, 1, 0][..], properties].concat()),
            Self::Pubrec => frame(0x50, &[&[0, 1, 0][..], properties].concat()),
            Self::Pubrel => frame(0x62, &[&[0, 1, 0][..], properties].concat()),
            Self::Pubcomp => frame(0x70, &[&[0, 1, 0][..], properties].concat()),
            Self::Subscribe => frame(0x82, &[&[0, 1][..], properties, &prefixed("a"), &[1]].concat()),
            Self::Unsubscribe => frame(0xA2, &[&[0, 1][..], properties, &prefixed("a")].concat()),
            Self::Disconnect => frame(0xE0, &[&[0][..], properties].concat()),
            Self::Auth => frame(0xF0, &[&[0x18][..], properties].concat()),
        }
    }

    fn comes_first(self) -> bool {
        matches!(self, Self::Connect | Self::Will)
    }
}

impl Cases {
    /// A packet with these properties.
    fn carried(&mut self, name: &str, packet: Carrier, properties: &[u8], key: &str, codes: &'static [u8]) {
        let with_length = [varint(properties.len()), properties.to_vec()].concat();
        self.carried_as_is(name, packet, &with_length, key, codes);
    }

    /// The same, with the length among the bytes.
    fn carried_as_is(&mut self, name: &str, packet: Carrier, bytes: &[u8], key: &str, codes: &'static [u8]) {
        let bytes = packet.packet(bytes, key);
        self.push(&format!("{name} of {packet:?}"), V5, packet.comes_first(), bytes, codes);
    }
}

/// Every property, with a value that is good where it may be.
fn every_property() -> Vec<Vec<u8>> {
    vec![
        vec![PAYLOAD_FORMAT, 0],
        four_bytes(MESSAGE_EXPIRY, 60),
        text_property(CONTENT_TYPE, "text/plain"),
        text_property(RESPONSE_TOPIC, "r"),
        text_property(CORRELATION_DATA, "c"),
        vec![SUBSCRIPTION_ID, 1],
        four_bytes(SESSION_EXPIRY, 0),
        text_property(crate::common::wire::ASSIGNED_CLIENT_ID, "c"),
        two_bytes(SERVER_KEEP_ALIVE, 60),
        text_property(AUTH_METHOD, "m"),
        text_property(AUTH_DATA, "d"),
        vec![REQUEST_PROBLEM_INFO, 1],
        four_bytes(WILL_DELAY, 0),
        vec![REQUEST_RESPONSE_INFO, 0],
        text_property(RESPONSE_INFO, "i"),
        text_property(SERVER_REFERENCE, "s"),
        text_property(REASON_STRING, "r"),
        two_bytes(RECEIVE_MAXIMUM, 10),
        two_bytes(TOPIC_ALIAS_MAXIMUM, 10),
        two_bytes(TOPIC_ALIAS, 1),
        vec![MAXIMUM_QOS, 1],
        vec![RETAIN_AVAILABLE, 1],
        user_property("n", "v"),
        four_bytes(MAXIMUM_PACKET_SIZE, 1 << 20),
        vec![WILDCARDS_AVAILABLE, 1],
        vec![SUBSCRIPTION_IDS_AVAILABLE, 1],
        vec![SHARED_AVAILABLE, 1],
    ]
}

/// Every property in every packet that cannot have it, twice in every packet that can, cut short, and
/// with lengths that do not fit.
fn properties(cases: &mut Cases, key: &str) {
    assert_eq!(every_property().len(), 27, "as many as table 2-4 has");
    for packet in Carrier::ALL {
        for property in every_property() {
            let id = property[0];
            if !packet.allowed().contains(&id) {
                let codes = match packet {
                    // These are theirs, but a server's to give.
                    Carrier::Publish if id == SUBSCRIPTION_ID => PROTOCOL,
                    Carrier::Disconnect if id == SERVER_REFERENCE => EITHER,
                    Carrier::Auth => EITHER,
                    _ => MALFORMED,
                };
                cases.carried(&format!("property {id:#04x}"), packet, &property, key, codes);
                continue;
            }
            let codes = if packet == Carrier::Auth { EITHER } else { MALFORMED };
            let cut = &property[..property.len() - 1];
            cases.carried(&format!("property {id:#04x} cut short"), packet, cut, key, codes);
            if id != USER_PROPERTY {
                let twice = [&property[..], &property].concat();
                cases.carried(&format!("property {id:#04x} twice"), packet, &twice, key, PROTOCOL);
            }
        }
        let codes = if packet == Carrier::Auth { EITHER } else { MALFORMED };
        for id in [0x00, 0x04, 0x0A, 0x14, 0x2B, 0x7F] {
            cases.carried(&format!("property {id:#04x} that is none"), packet, &[id, 0, 0], key, codes);
        }
        let user = user_property("n", "v");
        for (name, bytes) in [
            ("an identifier of two bytes", vec![0xA6, 0x01, 0, 1, b'n', 0, 1, b'v']),
            ("an overlong identifier", vec![0xA6, 0x00, 0, 1, b'n', 0, 1, b'v']),
        ] {
            cases.carried(name, packet, &bytes, key, codes);
        }
        let length = u8::try_from(user.len()).expect("short");
        for (name, bytes) in [
            ("properties of five length bytes", [&[0x80, 0x80, 0x80, 0x80, 1][..], &user].concat()),
            ("an overlong property length", [&[length | 0x80, 0][..], &user].concat()),
            ("properties longer than the packet", [&[0xFF, 0x7F][..], &user].concat()),
            ("properties shorter than they are", [&[length - 1][..], &user].concat()),
        ] {
            cases.carried_as_is(name, packet, &bytes, key, codes);
        }
    }
}

/// Properties with values that they cannot have.
fn values(cases: &mut Cases, key: &str) {
    use Carrier::{Connect, Publish, Subscribe, Will};
    for (name, packet, property, codes) in [
        ("a receive maximum of 0", Connect, two_bytes(RECEIVE_MAXIMUM, 0), PROTOCOL),
        ("a maximum packet size of 0", Connect, four_bytes(MAXIMUM_PACKET_SIZE, 0), PROTOCOL),
        ("a request for problem information of 2", Connect, vec![REQUEST_PROBLEM_INFO, 2], PROTOCOL),
        ("a request for response information of 2", Connect, vec![REQUEST_RESPONSE_INFO, 2], PROTOCOL),
        ("authentication data without a method", Connect, text_property(AUTH_DATA, "d"), PROTOCOL),
        ("an unknown authentication method", Connect, text_property(AUTH_METHOD, "m"), &[0x8C, 0x87]),
        ("a payload format of 2", Publish, vec![PAYLOAD_FORMAT, 2], EITHER),
        ("a payload format of 255", Publish, vec![PAYLOAD_FORMAT, 255], EITHER),
        ("a payload format of 2", Will, vec![PAYLOAD_FORMAT, 2], EITHER),
        ("a wildcard in the response topic", Publish, text_property(RESPONSE_TOPIC, "a/#"), RESPONSE),
        ("a plus in the response topic", Publish, text_property(RESPONSE_TOPIC, "+/a"), RESPONSE),
        ("an empty response topic", Publish, text_property(RESPONSE_TOPIC, ""), RESPONSE),
        ("a wildcard in the response topic", Will, text_property(RESPONSE_TOPIC, "#"), RESPONSE),
        ("topic alias 0", Publish, two_bytes(TOPIC_ALIAS, 0), &[0x94]),
        ("a topic alias over the maximum", Publish, two_bytes(TOPIC_ALIAS, 33), &[0x94]),
        ("the last topic alias", Publish, two_bytes(TOPIC_ALIAS, 0xFFFF), &[0x94]),
        ("subscription identifier 0", Subscribe, vec![SUBSCRIPTION_ID, 0], PROTOCOL),
        ("an overlong identifier", Subscribe, vec![SUBSCRIPTION_ID, 0x81, 0], MALFORMED),
        ("five bytes", Subscribe, vec![SUBSCRIPTION_ID, 0xFF, 0xFF, 0xFF, 0xFF, 1], MALFORMED),
    ] {
        cases.carried(name, packet, &property, key, codes);
    }
    let unset = Message::new("", "x").at(1, 1).with(&two_bytes(TOPIC_ALIAS, 7));
    cases.after_v5("a topic alias that was never set", unset.packet(V5), PROTOCOL);
    let nameless = Message::new("", "x").at(1, 1).with(&four_bytes(MESSAGE_EXPIRY, 1));
    cases.after_v5("neither a topic nor an alias", nameless.packet(V5), PROTOCOL);
}
