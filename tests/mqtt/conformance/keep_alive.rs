//! Keep-alive and PINGREQ: sections 3.1.2.10 and 3.12.

use std::time::{Duration, Instant};

use super::stage::Stage;
use crate::common::wire::{Connect, PUBACK, SERVER_KEEP_ALIVE, VERSIONS, Version::V5, publish};

#[test]
fn a_ping_is_answered() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        for _ in 0..3 {
            client.ping();
        }
    }
}

#[test]
fn a_client_is_closed_one_and_a_half_keep_alives_after_its_last_packet() {
    let stage = &Stage::new();
    std::thread::scope(|scope| {
        for version in VERSIONS {
            scope.spawn(move || {
                let hello = Connect { keep_alive: 1, ..stage.hello(version, &format!("silent {version:?}")) };
                let mut client = stage.connect(&hello);
                // Half a keep-alive is not silence, and any packet ends it.
                let mut silent_since = Instant::now();
                for round in 0..4 {
                    std::thread::sleep(Duration::from_millis(500));
                    silent_since = Instant::now();
                    if round % 2 == 0 { client.ping() } else { client.publish(1, "a", "x") }
                }
                client.ended(0x8D);
                let silence = silent_since.elapsed();
                assert!(silence >= Duration::from_millis(1400), "{version:?}: closed after {silence:?}");
                assert!(silence < Duration::from_millis(3500), "{version:?}: closed after {silence:?}");
            });
        }
        scope.spawn(move || {
            let hello = Connect { keep_alive: 0, ..stage.hello(VERSIONS[0], "patient") };
            let mut client = stage.connect(&hello);
            // Longer than the shortest keep-alive would let it be silent.
            std::thread::sleep(Duration::from_secs(2));
            client.ping();
        });
    });
}

#[test]
fn a_keep_alive_that_the_server_sets_counts_instead_of_the_clients() {
    let stage = Stage::with(|setup| setup.set("mqtt.keep_alive_s_max", 1));
    for asked in [0, 3600] {
        let silent_since = Instant::now();
        let mut client = stage.connect(&Connect { keep_alive: asked, ..stage.hello(V5, "c") });
        assert_eq!(client.connack.number(SERVER_KEEP_ALIVE), Some(1));
        client.ended(0x8D);
        let silence = silent_since.elapsed();
        assert!(
            silence >= Duration::from_millis(1400) && silence < Duration::from_millis(3500),
            "{silence:?}"
        );
    }
}

#[test]
fn a_packet_may_take_longer_than_that_as_long_as_some_of_it_comes() {
    let stage = &Stage::new();
    std::thread::scope(|scope| {
        for version in VERSIONS {
            scope.spawn(move || {
                let hello = Connect { keep_alive: 1, ..stage.hello(version, &format!("slow {version:?}")) };
                let mut client = stage.connect(&hello);
                let packet = publish(version, 7, "a", &[b'x'; 1000]);
                for part in packet.chunks(packet.len().div_ceil(6)) {
                    std::thread::sleep(Duration::from_millis(500));
                    client.wire.send(part);
                }
                assert_eq!(client.wire.packet(PUBACK).packet_id(), 7);
                // Half of one, and nothing more, is silence.
                let silent_since = Instant::now();
                client.wire.send(&packet[..500]);
                client.ended(0x8D);
                let silence = silent_since.elapsed();
                assert!(silence >= Duration::from_millis(1400), "{version:?}: closed after {silence:?}");
                assert!(silence < Duration::from_millis(3500), "{version:?}: closed after {silence:?}");
            });
        }
    });
}
