//! What the parts of a sending half leave to each other: positions, and packets that wait for the store.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::model::{DEADLINE, ModelRun, ToClient, parse, press_4, subscription};
use crate::consume::subscriber::{GroupSession, ShareGroupKey};
use crate::filter::TopicFilter;
use crate::message::Offset;

/// Subscribes to `a`.
fn subscribe(run: &mut ModelRun, slot: usize, qos: u8, from: Option<Offset>) {
    let outbound = run.outbound.as_mut().expect("connected");
    assert!(slot <= outbound.session.free_slot());
    outbound.subscribe(slot, TopicFilter::new("a").expect("a filter"), subscription("a", qos), from, false);
}

/// What the keeper of the sessions would write.
fn cursor(run: &ModelRun) -> Offset {
    let routed = run.gateway.subscribers.router.routed_offset();
    run.outbound.as_ref().expect("connected").mailbox().cursor(routed)
}

/// Sends until everything below `end` is sent.
async fn send_up_to(run: &mut ModelRun, end: Offset) {
    let begun = Instant::now();
    while cursor(run) < end {
        assert!(begun.elapsed() < DEADLINE, "it is at {} of {end}", cursor(run));
        run.send(Duration::from_millis(3)).await;
    }
}

#[tokio::test]
async fn who_writes_the_cursor_does_not_undo_a_start_in_the_past() {
    let mut run = ModelRun::bare(1);
    let first = run.gateway.subscribers.log.next_offset();
    subscribe(&mut run, 0, 0, None);
    for _ in 0..3 {
        run.publish(0).await;
    }
    send_up_to(&mut run, first + 3).await;
    subscribe(&mut run, 0, 0, Some(first + 1));
    assert_eq!(run.outbound.as_ref().expect("connected").session.position, first + 1);
    assert_eq!(cursor(&run), first + 1);
}

#[tokio::test]
async fn a_session_is_written_with_its_present_position_whatever_changes_its_subscriptions() {
    let mut run = ModelRun::bare(1);
    let mut end = run.gateway.subscribers.log.next_offset();
    subscribe(&mut run, 0, 0, None);
    let slot = run.outbound.as_mut().expect("connected").session.free_slot();
    for is_shared in [true, false] {
        run.publish(0).await;
        end += 1;
        send_up_to(&mut run, end).await;
        let outbound = run.outbound.as_mut().expect("connected");
        match is_shared {
            true => outbound.subscribe_shared(slot, subscription("$share/g/b", 0), None),
            false => outbound.unsubscribe(slot),
        }
        assert_eq!(outbound.session.position, end, "{is_shared}");
    }
}

#[tokio::test]
async fn nobody_writes_a_cursor_behind_that_of_a_session_that_has_left() {
    let mut run = ModelRun::bare(1);
    let end = run.gateway.subscribers.log.next_offset() + 1;
    subscribe(&mut run, 0, 0, None);
    run.publish(0).await;
    send_up_to(&mut run, end).await;
    let mailbox = run.outbound.as_ref().expect("connected").mailbox().clone();
    let session = run.disconnect();
    assert_eq!(session.position, end);
    run.publish(0).await;
    let router = run.gateway.subscribers.router.clone();
    let begun = Instant::now();
    while router.routed_offset() <= end {
        assert!(begun.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(mailbox.cursor(router.routed_offset()), end);
}

/// Has a message wait for the store. It is of a group if there is one.
async fn hold_message(run: &mut ModelRun) {
    run.publish(2).await;
    let outbound = run.outbound.as_mut().expect("connected");
    let mut out = Vec::new();
    let held = poll_fn(|cx| {
        outbound.groups.begin();
        assert!(outbound.poll_all(usize::MAX, &mut out, cx).is_pending());
        outbound.hold_packets(&mut out);
        assert!(out.is_empty());
        if outbound.packets.bytes() > 0 { Poll::Ready(()) } else { Poll::Pending }
    });
    timeout(DEADLINE, held).await.expect("it is routed");
}

/// What goes out once the store has it.
async fn held_message(run: &mut ModelRun) -> Vec<ToClient> {
    let outbound = run.outbound.as_mut().expect("connected");
    let mut out = Vec::new();
    let stored = poll_fn(|cx| outbound.poll_held(&mut out, cx));
    timeout(DEADLINE, stored).await.expect("it is stored");
    parse(&out)
}

#[tokio::test]
async fn what_is_held_goes_out_while_nothing_more_may_be_prepared() {
    let mut run = ModelRun::bare(1);
    subscribe(&mut run, 0, 2, None);
    hold_message(&mut run).await;
    let outbound = run.outbound.as_mut().expect("connected");
    outbound.suspend(0);
    assert!(outbound.held_bytes() > 0);
    let packets = held_message(&mut run).await;
    assert!(matches!(packets[..], [ToClient::Publish { qos: 2, .. }]), "{packets:?}");
    assert_eq!(run.outbound.as_ref().expect("connected").held_bytes(), 0);
}

#[tokio::test]
async fn what_is_held_of_a_group_is_given_to_no_other_member_when_its_session_leaves() {
    let mut run = ModelRun::bare(1);
    let subscribers = run.gateway.subscribers.clone();
    let key: ShareGroupKey = (press_4(), "g".into(), "a".into());
    for uid in [7, 8] {
        let of = GroupSession { uid, expiry_s: 3600 };
        subscribers.groups.join(&key, of, None).await.expect("joins");
    }
    let first = subscribers.log.next_offset();
    let outbound = run.outbound.as_mut().expect("connected");
    let member = subscribers.groups.member(&key, outbound.session.group_session());
    assert!(member.is_some());
    let slot = outbound.session.free_slot();
    outbound.subscribe_shared(slot, subscription("$share/g/a", 2), member);
    hold_message(&mut run).await;
    let cursors = || subscribers.groups.cursors(0);
    assert_eq!(cursors(), [(key.clone(), first)]);
    run.outbound.as_mut().expect("connected").unsubscribe(slot);
    assert_eq!(cursors(), [(key.clone(), first + 1)], "it is not returned to the group");
    let packets = held_message(&mut run).await;
    assert!(matches!(packets[..], [ToClient::Publish { qos: 2, .. }]), "{packets:?}");
}
