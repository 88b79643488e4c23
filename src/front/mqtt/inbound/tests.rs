//! What a client sends, read by read.

use tempfile::TempDir;

use super::super::codec::MqttVersion;
use super::*;
use crate::auth::usage::KeyClient;
use crate::auth::{Actor, Authorizer, Registry, Scope, Scopes};
use crate::config::Config;
use crate::log::EmbeddedLog;
use crate::memory::MemoryBudget;
use crate::message::Transport;
use crate::observe::metrics::Metrics;

const PACKET_BYTES: usize = 300_000;
const SHARE_BYTES: usize = 1 << 20;

/// A publisher that may send one message per hour, and its intake.
fn hourly() -> (TempDir, Intake, Inbound) {
    let dir = TempDir::new().expect("temporary directory");
    let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
    let scopes = Scopes::from_slice(&[Scope::Ingest]);
    let (press, _, secret) =
        registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created");
    let limits = r#"{"messages_per_s": {"max": 1, "burst": 1}}"#;
    registry.set_datasource_limits(&Actor::SYSTEM, &press.id, Some(limits.to_owned())).expect("set");
    let mut config = Config::default();
    config.intake.hold_back_ms_max = 60_000;
    let log = EmbeddedLog::open(dir.path(), &config.log, &config.intake).expect("opens");
    let authorizer = Authorizer::new(registry);
    let grant = authorizer.identify(secret.expose().as_bytes()).expect("a valid key");
    let intake = Intake::new(authorizer, Arc::new(log), Arc::new(Metrics::new()), &config.intake);
    let account =
        MemoryBudget::new(4 * SHARE_BYTES, SHARE_BYTES).account_of_key(grant.key_id(), grant.datasource());
    let form = PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: u32::MAX };
    let user = Arc::new(KeyClient::new(Transport::Mqtt, None, Some("c")));
    let (address, client) = ([127, 0, 0, 1].into(), "c".into());
    let who = Arc::new(ClientIdentity { address, client, user, is_bridge: false });
    let session = MqttSession::new(1, 0);
    let inbound = Inbound::new(grant, who, form, 1 << 20, 100, 7, &session, account);
    (dir, intake, inbound)
}

/// A PUBLISH to `t` with QoS 0 of so many bytes.
fn packet(bytes: usize) -> Vec<u8> {
    let length = bytes - 4;
    let mut packet = vec![0x30];
    packet.extend([0, 7].map(|shift| u8::try_from((length >> shift) & 0x7f).expect("seven bits") | 0x80));
    packet.push(u8::try_from(length >> 14).expect("below 2 MiB"));
    packet.extend_from_slice(&[0, 1, b't', 0]);
    packet.resize(bytes, b'x');
    packet
}

#[tokio::test]
async fn a_read_of_very_many_packets_is_taken_in_in_turns_and_in_order() {
    let (_dir, intake, mut inbound) = hourly();
    // Each has another packet identifier.
    let pubacks = |count: u16| (1..=count).flat_map(|id| [&[0x40, 2][..], &id.to_be_bytes()].concat());
    let all = 3 * u16::try_from(MQTT_PACKETS_PER_TURN_MAX).expect("small") + 5;
    let bytes: Vec<u8> = pubacks(all).collect();
    let (read, rest) = bytes.split_at(bytes.len() - 3);
    let mut acknowledged = Vec::new();
    let mut batch = inbound.receive(read, &intake, 0);
    while inbound.is_paused() {
        assert_eq!(batch.packets, MQTT_PACKETS_PER_TURN_MAX, "one turn");
        acknowledged.extend(batch.acknowledged);
        inbound.charge_held();
        batch = inbound.receive(&[], &intake, 0);
    }
    acknowledged.extend(batch.acknowledged);
    acknowledged.extend(inbound.receive(rest, &intake, 0).acknowledged);
    assert!(
        acknowledged == (1..=all).map(|id| (id, FlightAck::Puback)).collect::<Vec<_>>(),
        "{} came",
        acknowledged.len()
    );
    assert!(!inbound.holds_packet());
}

#[tokio::test]
async fn in_the_slow_lane_a_read_of_many_messages_with_ids_is_taken_in_in_small_drafts_and_in_order() {
    let (_dir, intake, mut inbound) = hourly();
    let press = inbound.grant.datasource().clone();
    intake.authorizer().registry().set_datasource_limits(&Actor::SYSTEM, &press, None).expect("no limit");
    let all = 2 * u16::try_from(SLOW_SECTIONS_MAX).expect("small") + 5;
    let publish = |id: u16| [&[0x34, 6, 0, 1, b't'][..], &id.to_be_bytes(), &[0]].concat();
    let bytes: Vec<u8> = (1..=all).flat_map(publish).collect();
    let slowly = std::thread::spawn(move || {
        crate::scheduler::lower_priority(1);
        let mut drafts = Vec::new();
        let mut batch = inbound.receive(&bytes, &intake, 0);
        loop {
            drafts.push(batch.draft.expect("messages").section_count());
            if !inbound.is_paused() {
                return drafts;
            }
            inbound.charge_held();
            batch = inbound.receive(&[], &intake, 0);
        }
    });
    assert_eq!(slowly.join().expect("no panic"), [SLOW_SECTIONS_MAX, SLOW_SECTIONS_MAX, 5]);
}

#[tokio::test]
async fn what_was_charged_for_a_held_packet_is_not_for_the_one_behind_it() {
    let (_dir, intake, mut inbound) = hourly();
    let other = inbound.account.charge(SHARE_BYTES - PACKET_BYTES - 1_000).expect("free");
    let long = packet(PACKET_BYTES);
    let (begun, rest) = long.split_at(2_000);
    // The first uses up the rate, so the second, which was charged for as a whole, is held.
    let short = packet(16_500);
    assert!(inbound.receive(&short, &intake, 0).held.is_none());
    assert!(inbound.receive(begun, &intake, 0).held.is_none());
    assert_eq!(inbound.charge_held(), None);
    assert!(inbound.is_packet_charged(), "all of it");
    let behind = [rest, &long[..2_000]].concat();
    assert!(inbound.receive(&behind, &intake, 0).held.is_some());
    assert_eq!(inbound.charge_held(), None, "it waits for its turn only");
    inbound.resume(true);
    let begun_at = Instant::now();
    let more = inbound.account.charge_held(10_000);
    let batch = inbound.receive(&[], &intake, 0);
    assert!(batch.held.is_none() && batch.end.is_none() && batch.draft.is_some());
    assert_eq!(inbound.charge_held(), Some(PACKET_BYTES), "there is no room for the next one");
    assert!(!inbound.is_packet_charged());
    assert!(inbound.packet_since.is_some_and(|since| since >= begun_at), "it has begun now");
    drop((other, more));
    assert_eq!(inbound.charge_held(), None);
    assert!(inbound.is_packet_charged());
}
