//! Groups (`$share/{group}/{filter}`) whose members are at several gateways.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use headgate::testing::Config;
use headgate_bridge_nats::stream::{JetstreamSettings, SharedSettings, StreamPurpose};
use headgate_bridge_nats::{JetstreamStream, Nats, StreamError};

use super::{Cluster, SILENCE, connected, next_message, number, published, received, staying, subscribed};
use crate::common::members::{self, FEW, publish_burst, shared_out};
use crate::common::nats::{NatsServer, nats_py};
use crate::common::wire::{
    Connect, DISCONNECT, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBLISH, SESSION_EXPIRY, SUBACK, UNSUBACK,
    Version::{V5, V311},
    Wire, ack, four_bytes, frame, subscribe_with, unsubscribe, user_property,
};
use crate::common::{PATIENCE, wait_for};

const FILTER: &str = "$share/workers/#";
/// Far less than it takes until somebody is given up that is not heard of.
const AT_ONCE: Duration = Duration::from_secs(4);
/// What is not to happen would have happened by then: what is done about sessions and groups that have ended is
/// done within a second.
const NOTHING_HAPPENS: Duration = Duration::from_millis(1200);

fn member(gateway: &super::Gateway, cluster: &Cluster) -> Wire {
    let mut wire = Wire::login(gateway.mqtt, V311, &cluster.key);
    subscribed(&mut wire, V311, FILTER);
    wire
}

/// What comes to a member until nothing does, acknowledged.
fn taken(wire: &mut Wire) -> Vec<usize> {
    let mut taken = Vec::new();
    while let Next::Packet(frame) = wire.next_within(SILENCE) {
        assert_eq!(frame.kind(), PUBLISH);
        let message = Message::read(V311, &frame);
        wire.send(&ack(PUBACK, message.packet_id));
        taken.push(number(&message));
    }
    taken
}

/// Takes until all of `wanted` has come.
fn taken_all(wire: &mut Wire, wanted: impl IntoIterator<Item = usize>, within: Duration) -> Vec<usize> {
    let (mut missing, mut all): (BTreeSet<_>, _) = (wanted.into_iter().collect(), Vec::new());
    let deadline = Instant::now() + within;
    while !missing.is_empty() {
        assert!(Instant::now() < deadline, "{missing:?} did not come");
        let taken = taken(wire);
        taken.iter().for_each(|number| _ = missing.remove(number));
        all.extend(taken);
    }
    all
}

#[test]
fn a_record_goes_to_one_member_wherever_its_members_are() {
    let (cluster, a, b) = Cluster::two();
    let at =
        [&a, &b, &b].map(|gateway| (members::member(gateway, &cluster.key, 1), Duration::from_millis(1)));
    let each = shared_out(at.into(), 300, || publish_burst(&a, &cluster.key, 1, 300));
    assert!(each.iter().all(|each| each.len() > 20), "{:?}", each.iter().map(Vec::len).collect::<Vec<_>>());
    let _stays = member(&b, &cluster);
    let mut all = each.concat();
    all.sort_unstable();
    assert_eq!(all, (0..300).collect::<Vec<_>>(), "each once");

    // Another group, of other topics, has its own place, and where it begins says its first member alone.
    let mut wire = Wire::login(b.mqtt, V5, &cluster.key);
    let from = user_property("from-offset", "0");
    for (filter, code) in [("$share/workers/#", 0x83), ("$share/late/b", 1), ("$share/late/+", 1)] {
        wire.send(&subscribe_with(V5, 1, &[(filter, 1)], &from));
        assert_eq!(wire.packet(SUBACK).codes(V5), [code], "{filter}");
    }
    for n in 0..300 {
        assert_eq!(received(&mut wire, V5), n);
    }
    assert_eq!(wire.next_within(SILENCE), Next::Silent);
}

#[test]
fn a_burst_is_shared_evenly_between_gateways_and_who_hangs_keeps_a_few() {
    let (cluster, a, b) = Cluster::two();
    let workers = |each: u64| {
        let at = [&a, &b, &a, &b].map(|gateway| members::member(gateway, &cluster.key, 1));
        at.into_iter().map(|wire| (wire, Duration::from_millis(each))).collect::<Vec<_>>()
    };
    let taken = shared_out(workers(2), 1_000, || publish_burst(&a, &cluster.key, 1, 1_000));
    let counts: Vec<usize> = taken.iter().map(Vec::len).collect();
    // On an idle machine from 200 to 300.
    assert!(counts.iter().all(|count| (125..=375).contains(count)), "{counts:?}");
    let mut all = taken.concat();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 1_000);
    let hung = members::member(&b, &cluster.key, 1);
    let all = shared_out(workers(0), 1_000 - FEW, || publish_burst(&b, &cluster.key, 1, 1_000)).concat();
    assert!(all.len() >= 1_000 - FEW, "{}", all.len());
    drop(hung);
}

#[test]
fn what_retention_removed_before_anybody_took_it_is_told_to_one_member() {
    let (cluster, a, b) = Cluster::two_that_retain(4 << 20);
    let away = staying(V5, &cluster.key, "away");
    let (mut wire, _) = connected(&a, &away);
    // Kept with the session, which goes to another gateway.
    wire.send(&subscribe_with(V5, 1, &[(FILTER, 1)], &user_property("headgate-metadata", "true")));
    assert_eq!(wire.packet(SUBACK).codes(V5), [1]);
    drop(wire);
    // Nothing comes to this one that could be removed.
    let other = staying(V5, &cluster.key, "other");
    let (mut wire, _) = connected(&a, &other);
    subscribed(&mut wire, V5, "$share/workers/rare");
    drop(wire);
    // What consumers others have is theirs to look after.
    let body = "await js.subscribe('stream.>', durable='push', deliver_policy='all', cb=lambda m: None)\n\
                await js.pull_subscribe('stream.>', durable='pull')";
    let made = nats_py(&cluster.nats.url(), body, &[]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    for _ in 0..100 {
        assert_eq!(publisher.publish(V311, 1, "a", &[b'x'; 100_000]), 0);
    }
    assert_eq!(publisher.publish(V311, 1, "rare", b"1"), 0);
    let mut late = Wire::login(b.mqtt, V5, &cluster.key);
    let from = user_property("from-offset", "1");
    late.send(&subscribe_with(V5, 1, &[("$share/late/a", 1)], &from));
    assert_eq!(late.packet(SUBACK).codes(V5), [1]);
    let (mut wire, _) = connected(&b, &away);
    for wire in [&mut late, &mut wire] {
        let first = next_message(wire, V5);
        let offset: u64 = first.user("headgate-offset").expect("an offset").parse().expect("a number");
        assert!(offset > 1, "retention has removed some");
        assert_eq!(first.user("headgate-skipped"), Some((offset - 1).to_string()));
        wire.send(&ack(PUBACK, first.packet_id));
        for _ in offset + 1..=100 {
            let message = next_message(wire, V5);
            assert_eq!(message.user("headgate-skipped"), None, "told once");
            wire.send(&ack(PUBACK, message.packet_id));
        }
    }
    let (mut wire, _) = connected(&a, &other);
    assert_eq!(next_message(&mut wire, V5).user("headgate-skipped"), None);
    b.says("retention has removed records before a subscriber read them");
}

/// The stream of a log, over a connection of its own.
async fn stream_of_log(server: &NatsServer) -> JetstreamStream {
    let mut config = Config::default();
    config.nats.servers = vec![server.url()];
    let nats = Nats::connect(&config.nats.connection("test").expect("no file is named")).await;
    let nats = nats.expect("settings that can work");
    let settings = JetstreamSettings {
        name: "log".to_owned(),
        subjects: vec!["a".to_owned()],
        replicas: 1,
        bytes_max: 1 << 20,
        duplicate_window: Duration::from_secs(10),
        purpose: StreamPurpose::Log,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match JetstreamStream::open(&nats, &settings).await {
            Ok(stream) => return stream,
            Err(StreamError::Away(_)) if Instant::now() < deadline => tokio::time::sleep(SILENCE / 10).await,
            Err(error) => panic!("the stream does not open: {error}"),
        }
    }
}

/// JetStream changes a consumer without a condition: who had read it before writes the old state of all else.
#[tokio::test]
async fn what_two_gateways_change_of_a_group_at_once_is_both_there_and_told_once() {
    let server = NatsServer::start();
    let (a, b) = (stream_of_log(&server).await, stream_of_log(&server).await);
    for n in 1..=10 {
        a.put("a", &n.to_string()).await.expect("it is stored");
    }
    let place = |kept| SharedSettings {
        name: "place".to_owned(),
        subjects: vec!["a".to_owned()],
        from: 1,
        redelivered_after: Duration::from_secs(30),
        kept,
    };
    assert!(a.share(&place(Some(Duration::from_secs(60)))).await.expect("it is made").is_new);
    let for_ever = place(None);
    let (joined, noted) = tokio::join!(a.share(&for_ever), b.note_skipped(6));
    joined.expect("it is joined");
    noted.expect("it is noted");
    let body = "info = await js.consumer_info('log', 'place')\nprint(info.config.inactive_threshold)";
    let kept = nats_py(&server.url(), body, &[]);
    assert!(["0.0", "0", "None"].contains(&String::from_utf8_lossy(&kept.stdout).trim()), "{kept:?}");
    // The one that joined may have written over what was noted; retention notes it before it removes anything.
    b.note_skipped(6).await.expect("it is noted");
    let begun = Instant::now();
    let (by_a, by_b) = tokio::join!(a.mark_skipped_told("place"), b.mark_skipped_told("place"));
    let told = [by_a.expect("it is told"), by_b.expect("it is told")].iter().sum::<u64>();
    // Both wait for 200 ms behind what they write: in less than twice that each has seen what the other one wrote.
    let is_at_once = begun.elapsed() < Duration::from_millis(400);
    assert!(told == 5 || told == 10 && !is_at_once, "{told}");
    assert_eq!(a.mark_skipped_told("place").await.expect("it is told"), 0);
}

#[test]
fn a_group_is_over_when_its_last_member_has_left_whose_session_does_not_stay() {
    let (cluster, a, b) = Cluster::two();
    let (on_a, mut on_b) = (member(&a, &cluster), member(&b, &cluster));
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    // The other one is there still.
    let connections = || a.metric("headgate_mqtt_connections");
    let before = connections();
    drop(on_a);
    wait_for("the gateway to know that it has left", || (connections() < before).then_some(()));
    std::thread::sleep(NOTHING_HAPPENS);
    published(&mut publisher, 0..5);
    assert_eq!(taken_all(&mut on_b, 0..5, PATIENCE), [0, 1, 2, 3, 4]);
    assert_eq!(groups(&cluster), 1);
    drop(on_b);
    wait_for("the group to be over", || (groups(&cluster) == 0).then_some(()));
    published(&mut publisher, 5..10);
    let mut again = member(&a, &cluster);
    published(&mut publisher, [10]);
    assert_eq!(taken_all(&mut again, [10], PATIENCE), [10], "it begins anew");
}

/// What JetStream answers to a question, at this place of it.
fn api(cluster: &Cluster, question: &str, place: &str) -> serde_json::Value {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let answer = runtime.block_on(async {
        let client = async_nats::connect(cluster.nats.url()).await.expect("connected");
        client.request(format!("$JS.API.{question}"), "".into()).await.expect("an answer")
    });
    let answer: serde_json::Value = serde_json::from_slice(&answer.payload).expect("JSON");
    answer.pointer(place).expect("it is there").clone()
}

/// How many groups JetStream keeps the place of.
fn groups(cluster: &Cluster) -> usize {
    let names = api(cluster, "CONSUMER.NAMES.headgate", "/consumers");
    let names = names.as_array().expect("names").iter().filter_map(|name| name.as_str());
    names.filter(|name| name.starts_with("share-")).count()
}

/// Also of sessions that stay, and also when the gateway is gone that they were at.
#[test]
fn a_group_is_over_when_its_last_session_gives_it_up_or_ends() {
    let (cluster, a, b) = Cluster::two();
    let clients = ["one", "two"].map(|name| staying(V5, &cluster.key, name));
    let joined = |gateway, nth: usize| {
        let (mut wire, _) = connected(gateway, &clients[nth]);
        subscribed(&mut wire, V5, FILTER);
        wire
    };
    let over = || wait_for("the group to be over", || (groups(&cluster) == 0).then_some(()));
    let stays = || {
        std::thread::sleep(NOTHING_HAPPENS);
        assert_eq!(groups(&cluster), 1);
    };
    let (mut one, two) = (joined(&a, 0), joined(&b, 1));
    drop(two);
    one.send(&unsubscribe(V5, 2, &[FILTER]));
    one.packet(UNSUBACK);
    stays();
    let (mut two, present) = connected(&a, &clients[1]);
    assert!(present);
    two.send(&unsubscribe(V5, 2, &[FILTER]));
    two.packet(UNSUBACK);
    over();

    // It ends with its connection after all; and another comes anew.
    let mut one = joined(&a, 0);
    one.send(&frame(DISCONNECT << 4, &[&[0, 5][..], &four_bytes(SESSION_EXPIRY, 0)].concat()));
    over();
    drop(joined(&b, 0));
    stays();
    b.kill();
    let clean = Connect { clean: true, ..clients[0].clone() };
    let (_one, present) = connected(&a, &clean);
    assert!(!present);
    over();
}

/// A client may say as it leaves that its session stays for longer than it said before.
#[test]
fn a_group_stays_as_long_as_the_longest_of_its_sessions() {
    // Beyond the sessions, for members that are there and take nothing.
    const DAY: u64 = 24 * 3600;
    let (cluster, a, _b) = Cluster::two();
    let kept_s = || {
        let names = api(&cluster, "CONSUMER.NAMES.headgate", "/consumers");
        let mut names = names.as_array().expect("names").iter().filter_map(|name| name.as_str());
        let name = names.find(|name| name.starts_with("share-")).expect("a group");
        let info = format!("CONSUMER.INFO.headgate.{name}");
        api(&cluster, &info, "/config/inactive_threshold").as_u64().expect("a time") / 1_000_000_000
    };
    let staying_s = |seconds| Connect {
        properties: four_bytes(SESSION_EXPIRY, seconds),
        ..staying(V5, &cluster.key, &format!("for {seconds} s"))
    };
    for (seconds, expected) in [(60, DAY + 60), (30, DAY + 60), (90, DAY + 90)] {
        let (mut wire, _) = connected(&a, &staying_s(seconds));
        subscribed(&mut wire, V5, FILTER);
        assert_eq!(kept_s(), expected);
    }
    let (mut wire, _) = connected(&a, &staying_s(30));
    wire.send(&frame(DISCONNECT << 4, &[&[0, 5][..], &four_bytes(SESSION_EXPIRY, 7200)].concat()));
    wait_for("the group to stay for longer", || (kept_s() == DAY + 7200).then_some(()));
}

#[test]
fn what_the_members_of_a_gateway_had_that_is_stopped_goes_to_others_at_once() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let mut members: Vec<Wire> = (0..20).map(|_| member(&a, &cluster)).collect();
    published(&mut publisher, 0..60);
    // On a busy machine one may get nothing, and another one more.
    let has_some = |member: &mut Wire| matches!(member.next_within(AT_ONCE), Next::Packet(_));
    assert_eq!(members.iter_mut().filter_map(|member| has_some(member).then_some(())).take(10).count(), 10);
    let mut other = member(&b, &cluster);
    a.terminate();
    taken_all(&mut other, 0..60, AT_ONCE);
    assert!(a.wait().status.success());
}

/// JetStream lets 512 wait if it is not told otherwise, and refuses one more at once.
#[test]
fn a_group_has_hundreds_of_members_and_those_that_wait_ask_for_little() {
    const MEMBERS: usize = 600;
    let (cluster, a, _b) = Cluster::two();
    let mut members: Vec<Wire> = (0..MEMBERS).map(|_| member(&a, &cluster)).collect();
    let requests = || api(&cluster, "INFO", "/api/total").as_u64().expect("a number");
    let before = requests();
    // Nothing is to happen. Members that ask once a second would be over what is allowed.
    std::thread::sleep(Duration::from_secs(2));
    let asked = requests() - before;
    assert!(asked < MEMBERS as u64, "{asked} requests by members for whom there is nothing");
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    published(&mut publisher, 0..MEMBERS);
    let mut all: Vec<usize> = members.iter_mut().map(|member| received(member, V311)).collect();
    all.sort_unstable();
    assert_eq!(all, (0..MEMBERS).collect::<Vec<_>>(), "one each");
}

#[test]
fn what_a_member_has_not_acknowledged_goes_to_another_one_elsewhere() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let mut leaving = member(&a, &cluster);
    published(&mut publisher, 0..20);
    next_message(&mut leaving, V311);
    let mut other = member(&b, &cluster);
    drop(leaving);
    taken_all(&mut other, 0..20, AT_ONCE);

    let mut killed = member(&a, &cluster);
    published(&mut publisher, 20..60);
    next_message(&mut killed, V311);
    let mut all: BTreeSet<_> = taken(&mut other).into_iter().collect();
    assert!(all.len() < 40, "some are the other one's");
    a.kill();
    let missing = (20..60).filter(|n| !all.contains(n)).collect::<Vec<_>>();
    all.extend(taken_all(&mut other, missing, PATIENCE));
    assert_eq!(all, (20..60).collect());
    assert_eq!(other.next_within(SILENCE), Next::Silent);
}

#[test]
fn a_group_whose_members_are_all_away_goes_on_where_it_was_at_another_gateway() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    for version in [V311, V5] {
        let client = staying(version, &cluster.key, &format!("worker {}", version as u8));
        let (mut on_a, _) = connected(&a, &client);
        subscribed(&mut on_a, version, FILTER);
        published(&mut publisher, 0..5);
        assert_eq!((0..5).map(|_| received(&mut on_a, version)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        on_a.send(&PINGREQ);
        on_a.packet(PINGRESP);
        drop(on_a);
        published(&mut publisher, 5..10);
        let (mut on_b, present) = connected(&b, &client);
        assert!(present);
        // One that had been taken when the other connection ended may come last.
        let came: BTreeSet<_> = (0..5).map(|_| received(&mut on_b, version)).collect();
        assert_eq!(came, BTreeSet::from([5, 6, 7, 8, 9]));
        on_b.send(&unsubscribe(version, 1, &[FILTER]));
        on_b.packet(UNSUBACK);
        published(&mut publisher, [10]);
        assert_eq!(on_b.next_within(SILENCE), Next::Silent);
        // The other session finds what this one has left.
        let (mut wire, _) = Wire::connect(a.mqtt, &Connect::with_key(V311, &cluster.key));
        subscribed(&mut wire, V311, FILTER);
        assert_eq!(taken_all(&mut wire, [10], PATIENCE), [10]);
    }
}
