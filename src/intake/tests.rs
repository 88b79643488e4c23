//! Intake: what becomes of the messages of a draft, and in which order.

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::auth::{Actor, Registry, Scope, Scopes};
use crate::config::Config;
use crate::limits::MESSAGE_ID_BYTES_MAX;
use crate::log::power_loss_disk::PowerLossDisk;
use crate::log::{EmbeddedLog, Offsets};
use crate::message::{Offset, RecordFlags};

/// An intake with a log of its own, and a grant for datasource `press-4`.
pub(super) fn intake() -> (TempDir, Intake, Grant) {
    intake_on(|dir, config| EmbeddedLog::open(dir, &config.log, &config.intake).expect("opens"))
}

/// As [`intake`], with a log that `open` opens.
fn intake_on(open: impl FnOnce(&Path, &Config) -> EmbeddedLog) -> (TempDir, Intake, Grant) {
    let dir = TempDir::new().expect("temporary directory");
    let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
    let scopes = Scopes::from_slice(&[Scope::Ingest]);
    let (_, _, secret) =
        registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created");
    let config = Config::default();
    let log = Arc::new(open(dir.path(), &config));
    let authorizer = Authorizer::new(registry);
    let grant = authorizer.identify(secret.expose().as_bytes()).expect("a valid key");
    (dir, Intake::new(authorizer, log, Arc::new(Metrics::new()), &config.intake), grant)
}

pub(super) fn message<'a>(message_id: Option<&'a str>, exchange: Option<Exchange>) -> IncomingMessage<'a> {
    let (flags, payload) = (RecordFlags::default(), b"1");
    IncomingMessage { topic: "t", payload, content_type: "", properties: &[], flags, message_id, exchange }
}

/// One message was kept.
fn one_at(offset: Offset) -> SectionOutcome {
    SectionOutcome::Kept(Offsets::consecutive(offset, 1))
}

/// Pushes messages into one draft and returns, per message, what has become of it.
pub(super) async fn publish(
    intake: &Intake,
    grant: &Grant,
    messages: &[IncomingMessage<'_>],
) -> Vec<SectionOutcome> {
    let mut draft = intake.draft(Transport::Mqtt, 7);
    let push = |message: &IncomingMessage<'_>| draft.push(grant, None, *message).expect("let in");
    let origins: Vec<usize> = messages.iter().map(push).collect();
    let accepted = intake.admit(draft).await.expect("room").await.expect("kept");
    origins.into_iter().map(|origin| accepted.outcomes[origin].clone()).collect()
}

/// A client that reset its requests as soon as they were admitted had the log's queue grow without a bound, and nothing of
/// what it brought was counted.
#[tokio::test]
async fn a_draft_that_nobody_waits_for_keeps_its_room_until_the_log_has_answered_and_is_counted() {
    let disk = Arc::new(PowerLossDisk::default());
    let (_dir, intake, grant) =
        intake_on(|dir, config| disk.open_log(dir, &config.log, &config.intake).expect("opens"));
    let room = || intake.0.room.available_permits();
    let accepted = || {
        let metrics = intake.metrics().render();
        let of_mqtt = metrics.lines().find_map(|line| {
            line.strip_prefix("headgate_accepted_total{transport=\"mqtt\"} ").map(str::to_owned)
        });
        of_mqtt.map_or(0, |count| count.parse::<u64>().expect("a number"))
    };
    let all_room = room();
    let account = intake.memory_account(&grant);
    // The log waits for the disk. MQTT charges for a read, and the others for each message.
    let leave = async |is_charged_by_front: bool| {
        disk.set_full(true);
        let mut draft = intake.draft(Transport::Mqtt, 7);
        if !is_charged_by_front {
            draft.charge_to(&account, grant.key_id());
        }
        draft.push(&grant, None, message(None, None)).expect("let in");
        let mut admitted = intake.admit(draft).await.expect("room");
        if is_charged_by_front {
            admitted.keep_charge(Some(account.charge_held(100)));
        }
        drop(admitted);
        tokio::task::yield_now().await;
        assert!(room() < all_room && intake.memory().held_bytes() > 0, "its bytes are in the log's queue");
    };
    leave(false).await;
    disk.set_full(false);
    let settled = async {
        while room() < all_room || intake.memory().held_bytes() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled).await.expect("the log answers");
    assert_eq!((intake.0.log.next_offset(), accepted()), (1, 1));
    let used = intake.authorizer().registry().usage(std::slice::from_ref(grant.key())).expect("readable");
    assert_eq!(used[0].accepted, 1, "its key was used");
    leave(true).await;
    disk.set_full(false);
    let drained = async {
        intake.0.log.close().await;
        intake.settle_unattended().await;
    };
    tokio::time::timeout(Duration::from_secs(20), drained).await.expect("a drain does not hang");
    assert_eq!((intake.0.log.next_offset(), accepted(), room()), (2, 2, all_room));
    assert_eq!(intake.memory().held_bytes(), 0);
}

#[tokio::test]
async fn a_release_that_nobody_waits_for_keeps_its_charge_until_the_log_has_answered() {
    let disk = Arc::new(PowerLossDisk::default());
    let (_dir, intake, grant) =
        intake_on(|dir, config| disk.open_log(dir, &config.log, &config.intake).expect("opens"));
    let exchange = Exchange { session: 1, packet_id: 5 };
    assert_eq!(publish(&intake, &grant, &[message(None, Some(exchange))]).await, [one_at(0)]);
    let account = intake.memory_account(&grant);
    disk.set_full(true);
    let mut released = intake.release(&[exchange]);
    released.keep_charge(Some(account.charge_held(100)));
    drop(released);
    tokio::task::yield_now().await;
    assert_eq!(intake.memory().held_bytes(), 100, "its exchanges are in the log's queue");
    disk.set_full(false);
    let settled = async {
        while intake.memory().held_bytes() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled).await.expect("the log answers");
}

#[tokio::test]
async fn what_a_tenant_in_the_slow_lane_has_on_its_way_into_the_log_is_bounded() {
    let (_dir, intake, grant) = intake();
    let scopes = Scopes::from_slice(&[Scope::Ingest]);
    let registry = intake.authorizer().registry();
    let (_, _, other) = registry.create_datasource(&Actor::SYSTEM, None, "press-5", scopes).expect("created");
    let other = intake.authorizer().identify(other.expose().as_bytes()).expect("a valid key");
    let payload = vec![b'x'; SLOW_IN_FLIGHT_BYTES_MAX / 2];
    let draft_over = |transport: Transport, grant: &Grant| {
        let mut draft = intake.draft(transport, 7);
        let message = IncomingMessage { payload: &payload, ..message(None, None) };
        draft.push(grant, None, message).expect("let in");
        draft
    };
    let draft = |grant: &Grant| draft_over(Transport::Mqtt, grant);
    let under_way = |grant: &Grant, count: usize| {
        let rooms = (0..count).map(|_| intake.try_room(&draft(grant)));
        rooms.flatten().collect::<Vec<_>>()
    };
    assert_eq!(under_way(&grant, 10).len(), 10, "as long as nobody minds");
    let tenant = intake.processor().of_grant(&grant);
    intake.processor().slow_down(&tenant);
    let held = under_way(&grant, 10);
    assert_eq!(held.len(), 1, "two take more than the bound with what the log adds");
    assert_eq!(under_way(&other, 10).len(), 10);
    assert!(intake.try_admit(draft(&grant)).is_err());
    // Over NATS the messages of others may be in the same draft.
    assert!(intake.try_room(&draft_over(Transport::Nats, &grant)).is_some());
    drop(held);
    intake.submit(draft(&grant)).await.expect("kept, now that there is room");
}

/// A thousand messages with ids were one turn of the log, in which it computed for five milliseconds.
#[tokio::test]
async fn in_the_slow_lane_what_has_an_id_of_its_own_counts_for_what_the_log_computes_for_it() {
    let (_dir, intake, grant) = intake();
    let draft = |sections: usize, with_ids: bool| {
        let mut draft = intake.draft(Transport::Mqtt, 7);
        for n in 0..sections {
            let id = format!("{n}");
            let pushed = draft.push(&grant, None, message(with_ids.then_some(&*id), None));
            pushed.expect("let in");
        }
        draft
    };
    let tenant = intake.processor().of_grant(&grant);
    intake.processor().slow_down(&tenant);
    let half = crate::limits::SLOW_SECTIONS_MAX / 2;
    let held = [draft(half - 4, true), draft(half - 4, true)].map(|draft| intake.try_room(&draft));
    assert!(held.iter().all(Option::is_some));
    assert!(intake.try_room(&draft(half, true)).is_none());
    assert!(intake.try_room(&draft(half, false)).is_some(), "all of them are one");
    drop(held);
    // What is more than that goes alone.
    intake.submit(draft(4 * half, true)).await.expect("kept");
}

#[tokio::test]
async fn a_message_with_an_id_is_an_origin_of_its_own_and_is_judged_alone() {
    let (_dir, intake, grant) = intake();
    let plain = message(None, None);
    let outcomes = publish(
        &intake,
        &grant,
        &[plain, message(Some("a"), None), plain, message(Some("b"), None), message(Some("a"), None)],
    )
    .await;
    let again = SectionOutcome::Duplicate(Offsets::consecutive(1, 1));
    assert_eq!(outcomes, [one_at(0), one_at(1), one_at(2), one_at(3), again]);
    assert_eq!(intake.0.log.next_offset(), 4);
    let metrics = intake.metrics().render();
    assert!(metrics.contains("headgate_accepted_total{transport=\"mqtt\"} 4"), "{metrics}");
    assert!(metrics.contains("headgate_duplicates_total{transport=\"mqtt\"} 1"), "{metrics}");
}

/// The payloads in the log, in order.
fn in_log(intake: &Intake) -> String {
    let batches = intake.0.log.read(0, 1 << 20).expect("readable");
    let records = batches.iter().flat_map(|batch| batch.records());
    records.map(|record| std::str::from_utf8(record.payload).expect("text")).collect()
}

#[tokio::test]
async fn the_order_in_which_messages_are_accepted_is_the_order_in_the_log() {
    let (_dir, intake, grant) = intake();
    let registry = intake.authorizer().registry();
    let scopes = Scopes::from_slice(&[Scope::Ingest]);
    let (_, _, other) = registry.create_datasource(&Actor::SYSTEM, None, "press-5", scopes).expect("created");
    let other = intake.authorizer().identify(other.expose().as_bytes()).expect("a valid key");
    let second = grant.datasource().clone();
    let (_, second) = registry.create_key(&Actor::SYSTEM, &second, "", scopes, None).expect("created");
    let second = intake.authorizer().identify(second.expose().as_bytes()).expect("a valid key");
    let schema = r#"{"last_version":1,"rules":[{"filter":"bad","version":1,"schema":false}]}"#;
    registry
        .set_datasource_schemas(&Actor::SYSTEM, grant.datasource(), Some(schema.to_owned()))
        .expect("set");
    let with = |payload, id, topic| IncomingMessage { payload, topic, ..message(id, None) };
    let exchange = |payload, packet_id| IncomingMessage {
        payload,
        ..message(None, Some(Exchange { session: 1, packet_id }))
    };
    let mut draft = intake.draft(Transport::Mqtt, 7);
    for (grant, message) in [
        (&grant, with(b"a", None, "t")),
        (&grant, with(b"b", Some("id-1"), "t")),
        (&grant, with(b"c", None, "t")),
        (&second, with(b"d", None, "t")),
        (&grant, with(b"e", None, "t")),
        (&grant, with(b"f", None, "bad")),
        (&grant, with(b"g", None, "t")),
        (&other, with(b"h", None, "t")),
        (&second, with(b"i", Some("id-2"), "t")),
        (&grant, exchange(b"j", 1)),
        (&grant, with(b"k", None, "t")),
        (&grant, with(b"l", None, "t")),
    ] {
        let quarantined = matches!(
            draft.push(grant, None, message).map_err(|refusal| *refusal),
            Err(Refusal::Quarantined(_))
        );
        assert_eq!(quarantined, message.topic == "bad");
    }
    assert_eq!(draft.sections.len(), 11, "the last two share a section");
    intake.admit(draft).await.expect("room").await.expect("kept");
    assert_eq!(in_log(&intake), "abcdefghijkl");
}

#[tokio::test]
async fn messages_of_one_key_without_ids_are_one_section() {
    let (_dir, intake, grant) = intake();
    let mut draft = intake.draft(Transport::Mqtt, 7);
    for _ in 0..100 {
        draft.push(&grant, None, message(None, None)).expect("let in");
    }
    assert_eq!(draft.sections.len(), 1);
}

#[tokio::test]
async fn a_message_id_is_the_same_over_every_transport() {
    let (_dir, intake, grant) = intake();
    let kept = publish(&intake, &grant, &[message(Some("a"), None)]).await;
    assert_eq!(kept, [one_at(0)]);
    let mut request = intake.draft(Transport::Http, 0);
    request.keep_once("a").expect("a good id");
    request.push(&grant, None, message(None, None)).expect("let in");
    let kept = intake.submit(request).await.expect("answered").expect("there were messages");
    assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(0, 1), true));
    let mut longer = intake.draft(Transport::Http, 0);
    longer.keep_once("a").expect("a good id");
    (0..2).for_each(|_| _ = longer.push(&grant, None, message(None, None)).expect("let in"));
    let refused = intake.submit(longer).await;
    assert!(matches!(refused, Err(Refusal::Conflict(IdConflict::MessageId(0)))), "two are not one");
}

#[tokio::test]
async fn an_exchange_is_kept_once_until_it_is_released() {
    let (_dir, intake, grant) = intake();
    let exchange = Exchange { session: 1, packet_id: 5 };
    let others = [Exchange { session: 2, ..exchange }, Exchange { packet_id: 6, ..exchange }];
    let opened = message(None, Some(exchange));
    assert_eq!(publish(&intake, &grant, &[opened]).await, [one_at(0)]);
    let again = publish(&intake, &grant, &[opened]).await;
    assert!(matches!(again[..], [SectionOutcome::Duplicate(_)]), "{again:?}");
    for (n, other) in others.into_iter().enumerate() {
        let kept = publish(&intake, &grant, &[message(None, Some(other))]).await;
        assert_eq!(kept, [one_at(1 + n as u64)]);
    }
    let other = publish(&intake, &grant, &[IncomingMessage { payload: b"2", ..opened }]).await;
    assert!(matches!(other[..], [SectionOutcome::Conflict { in_exchange: true, .. }]), "{other:?}");
    intake.release(&[exchange, exchange]).await.expect("released");
    assert_eq!(publish(&intake, &grant, &[opened]).await, [one_at(3)]);
}

#[tokio::test]
async fn what_a_key_for_all_datasources_has_sent_to_one_does_not_outlive_it() {
    let (_dir, intake, grant) = intake();
    let registry = intake.authorizer().registry();
    let scopes = Scopes::from_slice(&[Scope::Ingest]);
    let (_, all) =
        registry.create_key(&Actor::SYSTEM, &DatasourceId::all(), "", scopes, None).expect("created");
    let all = intake.authorizer().identify(all.expose().as_bytes()).expect("a valid key");
    let press = grant.datasource().clone();
    let draft = |grant: &Grant| {
        let mut draft = intake.draft(Transport::Mqtt, 7);
        draft.push(grant, Some(&press), message(Some("a"), None)).expect("let in");
        draft
    };
    let kept = intake.submit(draft(&all)).await.expect("kept").expect("a message");
    assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(0, 1), false));
    let late = draft(&all);
    registry.delete_datasource(&Actor::SYSTEM, &press).expect("there");
    registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created again");
    assert!(matches!(intake.submit(late).await, Err(Refusal::Denied(GrantDenial::Revoked))));
    // The id was used up in the last one only.
    let kept = intake.submit(draft(&all)).await.expect("kept").expect("a message");
    assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(1, 1), false));
}

#[tokio::test]
async fn a_message_id_has_1_to_128_printable_bytes() {
    let (_dir, intake, grant) = intake();
    let (longest, too_long) = ("a".repeat(MESSAGE_ID_BYTES_MAX), "a".repeat(MESSAGE_ID_BYTES_MAX + 1));
    let mut draft = intake.draft(Transport::Mqtt, 0);
    for good in ["a", " ", "°C", &longest] {
        assert!(draft.push(&grant, None, message(Some(good), None)).is_ok(), "{good:?}");
    }
    for bad in ["", "a\0", "a\nb", "\u{85}", &too_long] {
        let refused = draft.push(&grant, None, message(Some(bad), None));
        assert!(matches!(refused.map_err(|refusal| *refusal), Err(Refusal::MessageId)), "{bad:?}");
    }
}

#[test]
fn a_draft_is_charged_for_as_it_grows_and_gives_all_of_it_back() {
    let (_dir, intake, grant) = intake();
    let account = MemoryBudget::new(4 << 20, 1 << 20).account_of_key(grant.key_id(), grant.datasource());
    let topic = "x".repeat(1024);
    for (id, messages_max) in [(false, 30_000), (true, 2_000)] {
        let mut draft = intake.draft(Transport::Http, 0);
        draft.charge_to(&account, grant.key_id());
        let ids: Vec<String> = (0..messages_max).map(|n| n.to_string()).collect();
        let refused = ids.iter().position(|n| {
            let message = IncomingMessage { topic: &topic, ..message(id.then_some(n.as_str()), None) };
            match draft.push(&grant, None, message).map_err(|refusal| *refusal) {
                Ok(_) => false,
                Err(Refusal::Memory(_)) => true,
                Err(other) => panic!("{other}"),
            }
        });
        let pushed = refused.expect("the share is used up before");
        // A topic that all messages share is kept once; with an id, each message has a section of its own.
        let messages_min = if id { 300 } else { 5_000 };
        assert!(pushed > messages_min, "{pushed} messages of one byte in a share of 1 MiB");
        assert!(draft.memory_bytes() <= 1 << 20, "{} bytes", draft.memory_bytes());
        drop(draft);
        assert!(account.charge(1 << 20).is_ok(), "all of it is free again");
    }
}
