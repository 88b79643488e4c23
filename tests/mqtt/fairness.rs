//! What an attack costs in processor time is paid at low priority, as soon as somebody else wants something, and a
//! tenant that is alone has all of the gateway.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::steady::Steady;
use crate::common::threads::ThreadTimes;
use crate::common::wire::{Connect, TOPIC_ALIAS, Version, Wire, publish_with, two_bytes};
use crate::common::{Gateway, scratch, wait_for};
use Version::V5;

/// Floods the gateway with the smallest packets, on some connections, until it is told to stop.
fn flood(addr: SocketAddr, key: &str, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(addr).expect("connects");
                stream.set_write_timeout(Some(Duration::from_millis(200))).expect("set");
                stream.write_all(&Connect::with_key(V5, key).packet()).expect("sent");
                let alias = two_bytes(TOPIC_ALIAS, 1);
                stream.write_all(&publish_with(V5, 0, "x".repeat(1024), &alias, b"")).expect("sent");
                let short = publish_with(V5, 0, "", &alias, b"").repeat(4_000);
                // What was cut off goes on in the next write.
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    sent = (sent + stream.write(&short[sent..]).unwrap_or(0)) % short.len();
                }
            });
        }
    });
}

/// Ends a flood also when a check fails.
struct FloodEnd<'a>(&'a AtomicBool);

impl Drop for FloodEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_flood_is_served_at_low_priority_while_others_want_something() {
    const MUCH: Duration = Duration::from_millis(200);
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (attacker, other) = (gateway.create("press-4"), gateway.create("bystander"));
    // Who has created the datasources does not count any more.
    std::thread::sleep(Duration::from_millis(500));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| flood(gateway.mqtt, &attacker.key, &stop));
        let _end = FloodEnd(&stop);
        // Its first moments are those of strangers, whom it is in the way of.
        let mut since = ThreadTimes::of(&gateway);
        let alone = wait_for("the flood, which is alone, to have all there is", || {
            let times = ThreadTimes::of(&gateway);
            if times.of_slow_lane > since.of_slow_lane {
                since = times;
                return None;
            }
            Some(times).filter(|times| times.of_workers > since.of_workers + MUCH)
        });
        let steady = Steady::start(gateway.mqtt, &other.key);
        let after = wait_for("the flood to be served at low priority", || {
            Some(ThreadTimes::of(&gateway)).filter(|times| times.of_slow_lane > alone.of_slow_lane + MUCH)
        });
        let acks = steady.stop();
        let usual = after.of_workers - alone.of_workers;
        eprintln!(
            "{:?} in the slow lane, {usual:?} elsewhere; acks p99 {:?}",
            after.of_slow_lane,
            acks.p99()
        );
    });
    // Whoever has attacked is served as before when nobody else is there.
    let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
    assert_eq!(wire.publish(V5, 1, "t", b"1"), 0);
}
