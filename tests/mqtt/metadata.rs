//! What Headgate says about a message: only to who asks, under names that nobody else can give; and topics in
//! properties, which are relative to the key as all others are.

use crate::common::wire::{
    Connect, Message, PUBACK, PUBLISH, RESPONSE_TOPIC, SESSION_EXPIRY, SUBACK, Version::V5, Wire, ack,
    four_bytes, prefixed, subscribe_with, text_property, user_property,
};
use crate::common::{Gateway, Setup, scratch};

const OWN: [&str; 4] = ["headgate-offset", "headgate-datasource", "headgate-received-at", "headgate-key-id"];

fn asking() -> Vec<u8> {
    user_property("headgate-metadata", "true")
}

fn subscribed(wire: &mut Wire, filters: &[(&str, u8)], properties: &[u8]) -> Vec<u8> {
    wire.send(&subscribe_with(V5, 1, filters, properties));
    wire.packet(SUBACK).codes(V5)
}

fn received(wire: &mut Wire) -> Message {
    let message = Message::read(V5, &wire.packet(PUBLISH));
    if message.qos == 1 {
        wire.send(&ack(PUBACK, message.packet_id));
    }
    message
}

fn published(wire: &mut Wire, message: Message) {
    wire.send(&message.at(1, 9).packet(V5));
    assert_eq!(wire.packet(PUBACK).reason(), 0);
}

/// How many of the four a message has.
fn told(message: &Message) -> usize {
    OWN.iter().filter(|name| message.user(name).is_some()).count()
}

#[test]
fn each_subscription_asks_for_itself_and_one_that_asks_is_enough() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let mut group = Wire::login(gateway.mqtt, V5, &source.key);
    assert_eq!(subscribed(&mut wire, &[("a/#", 1)], &[]), [1]);
    assert_eq!(subscribed(&mut wire, &[("+/b", 1), ("c", 0)], &asking()), [1, 0]);
    assert_eq!(subscribed(&mut group, &[("$share/g/a/c", 1)], &asking()), [1]);
    for (topic, expected) in [("a/c", 0), ("a/b", 4), ("c", 4)] {
        published(&mut publisher, Message::new(topic, "x"));
        let message = received(&mut wire);
        assert_eq!((&*message.topic, told(&message)), (topic, expected), "{message:?}");
        assert!(expected > 0 || message.properties.is_empty(), "nothing else either: {message:?}");
    }
    assert_eq!(told(&received(&mut group)), 4);
    // A SUBSCRIBE replaces what an earlier one said.
    assert_eq!(subscribed(&mut wire, &[("+/b", 1)], &[]), [1]);
    published(&mut publisher, Message::new("a/b", "x"));
    assert_eq!(told(&received(&mut wire)), 0);
    // A replay tells where it is, unless it is not to.
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    subscribed(&mut wire, &[("c", 1)], &user_property("tail", "1"));
    assert_eq!(told(&received(&mut wire)), 4);
    let quiet = [user_property("tail", "1"), user_property("headgate-metadata", "false")].concat();
    subscribed(&mut wire, &[("a/c", 1)], &quiet);
    assert_eq!(told(&received(&mut wire)), 0);
    assert_eq!(subscribed(&mut wire, &[("d", 1)], &user_property("headgate-metadata", "yes")), [0x83]);
}

#[test]
fn a_session_keeps_what_it_asked_for_and_retained_messages_have_it_too() {
    let dir = scratch();
    let mut gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let hello = Connect {
        client_id: "backend".to_owned(),
        clean: false,
        properties: four_bytes(SESSION_EXPIRY, 3600),
        ..Connect::with_key(V5, &source.key)
    };
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    published(&mut publisher, Message::new("kept", "x").retained());
    let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
    subscribed(&mut wire, &[("asks/#", 1), ("kept", 1)], &asking());
    assert_eq!(told(&received(&mut wire)), 4, "retained");
    subscribed(&mut wire, &[("quiet/#", 1)], &[]);
    drop(wire);
    published(&mut publisher, Message::new("asks/a", "x"));
    published(&mut publisher, Message::new("quiet/a", "x"));
    gateway.stop();
    gateway = Gateway::start(dir.path());
    let (mut wire, connack) = Wire::connect(gateway.mqtt, &hello);
    assert_eq!(connack.body[0], 1, "the session is there");
    let messages = [received(&mut wire), received(&mut wire)];
    let told = messages.map(|message| (message.topic.clone(), told(&message)));
    assert_eq!(told, [("asks/a".to_owned(), 4), ("quiet/a".to_owned(), 0)]);
}

#[test]
fn an_operator_may_have_it_with_every_message() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.metadata", "always").start();
    let source = gateway.create_open("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    subscribed(&mut wire, &[("a", 0)], &[]);
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    published(&mut publisher, Message::new("a", "x"));
    let message = received(&mut wire);
    assert_eq!(message.user("headgate-key-id").as_deref(), Some(&*source.key_id));
    assert_eq!(told(&message), 4);
}

#[test]
fn nobody_else_says_what_headgate_says() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    subscribed(&mut wire, &[("#", 1)], &[]);
    let forged = |message: Message| {
        message
            .with(&user_property("headgate-offset", "7"))
            .with(&user_property("colour", "red"))
            .with(&user_property("Headgate-Key-Id", "000000000000"))
            .with(&user_property("offset", "7"))
    };
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    published(&mut publisher, forged(Message::new("a", "x")));
    let message = received(&mut wire);
    let names: Vec<_> = message.properties.iter().map(|(_, value)| value.clone()).collect();
    assert_eq!(
        names,
        [[prefixed("colour"), prefixed("red")].concat(), [prefixed("offset"), prefixed("7")].concat()]
    );
    let counted = || gateway.metric("headgate_reserved_names_total{transport=\"mqtt\"}");
    assert_eq!(counted(), 2.0);
    // A will is a message too.
    let willing = Connect {
        will: Some(("will".to_owned(), b"gone".to_vec())),
        will_properties: user_property("headgate-offset", "7"),
        ..Connect::with_key(V5, &source.key)
    };
    drop(Wire::connect(gateway.mqtt, &willing));
    assert_eq!(received(&mut wire).properties, []);
    assert_eq!(counted(), 3.0);
    let headers = [("headgate-offset", "7")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/a", &source.key, &headers, b"x");
    assert_eq!(answer.status, 200);
    assert_eq!(received(&mut wire).properties, []);
    assert_eq!(gateway.metric("headgate_reserved_names_total{transport=\"http\"}"), 1.0);
}

/// A backend with a key for all datasources was told a topic that it cannot name, and a device one that is not its
/// own.
#[test]
fn a_response_topic_is_relative_to_the_key_in_both_directions() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (press, _other) = (gateway.create_open("press-4"), gateway.create_open("press-5"));
    let mut device = Wire::login(gateway.mqtt, V5, &press.key);
    let mut backend = Wire::login(gateway.mqtt, V5, &gateway.admin_key());
    subscribed(&mut device, &[("#", 1)], &[]);
    subscribed(&mut backend, &[("+/#", 1)], &[]);
    let mut by_device = Wire::login(gateway.mqtt, V5, &press.key);
    let mut by_backend = Wire::login(gateway.mqtt, V5, &gateway.admin_key());
    let response_topic = |message: &Message| {
        let mut all = message.properties.iter().filter(|(id, _)| *id == RESPONSE_TOPIC);
        let first = all.next().map(|(_, value)| String::from_utf8_lossy(&value[2..]).into_owned());
        assert!(all.next().is_none(), "one at most");
        first
    };
    let asking =
        |topic: &str, response: &str| Message::new(topic, "x").with(&text_property(RESPONSE_TOPIC, response));
    let mut both = || [response_topic(&received(&mut device)), response_topic(&received(&mut backend))];
    let some = |topic: &str| Some(topic.to_owned());
    published(&mut by_device, asking("ask", "answers/1"));
    assert_eq!(both(), [some("answers/1"), some("press-4/answers/1")]);
    published(&mut by_backend, asking("press-4/ask", "press-4/answers/2"));
    assert_eq!(both(), [some("answers/2"), some("press-4/answers/2")]);
    // What a device cannot publish to is not told to it.
    for elsewhere in ["press-5/answers/3", "press-44/x", "press-4/", "press-4", "x"] {
        published(&mut by_backend, asking("press-4/ask", elsewhere));
        assert_eq!(both(), [None, some(elsewhere)], "{elsewhere}");
    }
}

#[test]
fn a_session_has_as_many_subscriptions_as_are_configured() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.subscriptions_per_session_max", 3000).start();
    let source = gateway.create_open("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let names: Vec<String> = (0..3001).map(|n| format!("a/{n}")).collect();
    let filters: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 0)).collect();
    wire.send(&subscribe_with(V5, 1, &filters, &[]));
    let suback = wire.packet(SUBACK);
    let codes = suback.codes(V5);
    assert!(codes[..3000].iter().all(|code| *code == 0) && codes[3000] == 0x97, "{:?}", &codes[2990..]);
    let words = suback.text(crate::common::wire::REASON_STRING).expect("a reason");
    assert!(words.contains("3000") && words.contains("mqtt.subscriptions_per_session_max"), "{words}");
    assert_eq!(subscribed(&mut wire, &[("a/7", 1), ("b", 1)], &[]), [1, 0x97], "one that it has is replaced");
}

#[test]
fn when_a_message_was_measured_is_told_where_its_sender_has_said_so() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let mut quiet = Wire::login(gateway.mqtt, V5, &source.key);
    subscribed(&mut wire, &[("a", 1)], &asking());
    subscribed(&mut quiet, &[("a", 1)], &[]);
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    let at = "2026-11-23T09:28:39.000120Z";
    published(&mut publisher, Message::new("a", "1").with(&user_property("event-time", at)));
    published(&mut publisher, Message::new("a", "2"));
    assert_eq!(received(&mut wire).user("headgate-event-at").as_deref(), Some(at));
    assert_eq!(received(&mut wire).user("headgate-event-at"), None);
    assert_eq!(received(&mut quiet).user("headgate-event-at"), None);
}
