//! What an attack costs in processor time is paid at low priority, as soon as somebody else wants something, and a
//! tenant that is alone has all of the gateway.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::common::steady::Steady;
use crate::common::threads::ThreadTimes;
use crate::common::wire::{Connect, TOPIC_ALIAS, Version, Wire, publish_with, two_bytes};
use crate::common::{Gateway, scratch};
use Version::V5;

/// Floods the gateway with the smallest packets, on some connections, for as long.
fn flood(gateway: &Gateway, key: &str, duration: Duration) {
    let until = Instant::now() + duration;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut stream = std::net::TcpStream::connect(gateway.mqtt).expect("connects");
                stream.set_write_timeout(Some(Duration::from_millis(200))).expect("set");
                stream.write_all(&Connect::with_key(V5, key).packet()).expect("sent");
                let alias = two_bytes(TOPIC_ALIAS, 1);
                stream.write_all(&publish_with(V5, 0, "x".repeat(1024), &alias, b"")).expect("sent");
                let short = publish_with(V5, 0, "", &alias, b"").repeat(4_000);
                // What was cut off goes on in the next write.
                let mut sent = 0;
                while Instant::now() < until {
                    sent = (sent + stream.write(&short[sent..]).unwrap_or(0)) % short.len();
                }
            });
        }
    });
}

#[test]
fn a_flood_is_served_at_low_priority_while_others_want_something() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let attacker = gateway.create("press-4");
    let other = gateway.create("bystander");
    // Who has created the datasources does not count any more.
    std::thread::sleep(Duration::from_millis(500));
    // Alone, it has all there is.
    flood(&gateway, &attacker.key, Duration::from_secs(1));
    let alone = ThreadTimes::of(&gateway);
    assert!(alone.of_workers > Duration::from_millis(50), "{alone:?}");
    assert_eq!(alone.of_slow_lane, Duration::ZERO, "{alone:?}");
    let steady = Steady::start(gateway.mqtt, &other.key);
    // The first moments do not count.
    flood(&gateway, &attacker.key, Duration::from_millis(500));
    let before = ThreadTimes::of(&gateway);
    flood(&gateway, &attacker.key, Duration::from_secs(2));
    let after = ThreadTimes::of(&gateway);
    let acks = steady.stop();
    let (slow, usual) = (after.of_slow_lane - before.of_slow_lane, after.of_workers - before.of_workers);
    eprintln!("{slow:?} in the slow lane, {usual:?} elsewhere; acks p99 {:?}", acks.p99());
    assert!(slow > 2 * usual, "{slow:?} in the slow lane, {usual:?} elsewhere");
    // Whoever has attacked is served as before when nobody else is there.
    let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
    assert_eq!(wire.publish(V5, 1, "t", b"1"), 0);
}
