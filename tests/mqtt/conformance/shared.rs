//! Shared subscriptions: section 4.8.2 of MQTT 5.

use super::stage::{Client, Stage};
use crate::common::wire::{Message, Next, PINGREQ, PINGRESP, PUBACK, VERSIONS, Version::V5, ack_with};

/// What has come to a client by now; acknowledged.
fn by_now(client: &mut Client) -> Vec<Message> {
    client.wire.send(&PINGREQ);
    let mut messages = Vec::new();
    loop {
        match client.wire.next() {
            Next::Packet(frame) if frame.kind() == PINGRESP => return messages,
            Next::Packet(frame) => {
                let message = Message::read(client.version, &frame);
                client.acknowledge(&message);
                messages.push(message);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Collects what comes to all of these until there are as many messages as `count`.
fn shared_out(clients: &mut [&mut Client], count: usize) -> Vec<Vec<Message>> {
    let mut received = vec![Vec::new(); clients.len()];
    crate::common::wait_for("every message to reach a member", || {
        for (client, received) in clients.iter_mut().zip(&mut received) {
            received.append(&mut by_now(client));
        }
        (received.iter().map(Vec::len).sum::<usize>() >= count).then_some(())
    });
    received
}

fn payload_numbers(messages: &[Vec<Message>]) -> Vec<usize> {
    let number = |message: &Message| String::from_utf8_lossy(&message.payload).parse().expect("a number");
    let mut numbers: Vec<usize> = messages.iter().flatten().map(number).collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn each_message_goes_to_one_member_of_each_group_and_to_everybody_else() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut one = stage.client(version, "one");
        let mut two = stage.client(version, "two");
        let mut alone = stage.client(version, "alone");
        let mut plain = stage.client(version, "plain");
        for member in [&mut one, &mut two] {
            assert_eq!(member.subscribe(&[("$share/group/a/#", 1)]), [1]);
        }
        alone.subscribe(&[("$share/another/a/#", 1)]);
        plain.subscribe(&[("a/#", 1)]);
        for n in 0..40 {
            publisher.publish(1, "a/b", &n.to_string());
        }
        let all: Vec<usize> = (0..40).collect();
        let received = shared_out(&mut [&mut one, &mut two], 40);
        assert_eq!(payload_numbers(&received), all, "each once");
        assert!(received.iter().all(|of_member| !of_member.is_empty()), "both had some of them");
        assert_eq!(payload_numbers(&shared_out(&mut [&mut alone], 40)), all);
        assert_eq!(payload_numbers(&shared_out(&mut [&mut plain], 40)), all);
        for client in [one, two, alone, plain] {
            client.disconnect();
        }
    }
}

#[test]
fn each_member_has_its_own_qos() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut zero = stage.client(version, "zero");
        let mut one = stage.client(version, "one");
        zero.subscribe(&[("$share/group/a", 0)]);
        one.subscribe(&[("$share/group/a", 1)]);
        for n in 0..20 {
            publisher.publish(1, "a", &n.to_string());
        }
        let received = shared_out(&mut [&mut zero, &mut one], 20);
        assert_eq!(payload_numbers(&received), (0..20).collect::<Vec<_>>());
        assert!(received[0].iter().all(|message| message.qos == 0));
        assert!(received[1].iter().all(|message| message.qos == 1));
        zero.disconnect();
        one.disconnect();
    }
}

#[test]
fn a_retained_message_does_not_come_to_a_shared_subscription() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    publisher.retain(1, "a", "retained");
    let mut member = stage.client(V5, "member");
    member.subscribe(&[("$share/group/a", 1), ("end", 1)]);
    assert_eq!(member.all_so_far(&mut publisher), []);
}

#[test]
fn a_message_that_a_member_says_no_to_goes_to_no_other() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let mut first = stage.client(V5, "first");
    first.subscribe(&[("$share/group/a", 1), ("end", 1)]);
    publisher.publish(1, "a", "unwanted");
    let message = first.message();
    let mut second = stage.client(V5, "second");
    second.subscribe(&[("$share/group/a", 1), ("end", 1)]);
    first.wire.send(&ack_with(PUBACK, message.packet_id, 0x80));
    first.ping();
    first.disconnect();
    assert_eq!(second.all_so_far(&mut publisher), []);
}

#[test]
fn a_member_that_leaves_unsubscribes_for_itself_alone() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut one = stage.client(version, "one");
        let mut two = stage.client(version, "two");
        for member in [&mut one, &mut two] {
            member.subscribe(&[("$share/group/a", 1)]);
        }
        // The filter as it was subscribed, not what is in it.
        let codes: &[u8] = if version == V5 { &[0x11] } else { &[] };
        assert_eq!(one.unsubscribe(&["a"]), codes);
        let codes: &[u8] = if version == V5 { &[0] } else { &[] };
        assert_eq!(one.unsubscribe(&["$share/group/a"]), codes);
        for n in 0..10 {
            publisher.publish(1, "a", &n.to_string());
        }
        let received = shared_out(&mut [&mut one, &mut two], 10);
        assert_eq!((received[0].len(), received[1].len()), (0, 10));
        one.disconnect();
        two.disconnect();
    }
}

#[test]
fn what_a_member_did_not_acknowledge_goes_to_another_when_it_is_gone() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let mut first = stage.client(V5, "first");
    first.subscribe(&[("$share/group/a", 1)]);
    publisher.publish(1, "a", "7");
    assert_eq!(first.message().payload, b"7");
    let mut second = stage.client(V5, "second");
    second.subscribe(&[("$share/group/a", 1)]);
    first.vanish();
    assert_eq!(payload_numbers(&shared_out(&mut [&mut second], 1)), [7]);
}
