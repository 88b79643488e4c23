//! A well-behaved publisher: one message at a time, at QoS 1, for as long as something else goes on,
//! with a note of how long every ack took. What it measures is what other clients notice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::wire::{Version, Wire};

/// A publisher on a thread of its own.
pub struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Duration>>,
}

impl Steady {
    /// Connects, publishes once, and goes on until [`Steady::stop`].
    pub fn start(addr: SocketAddr, key: &str) -> Self {
        let mut wire = Wire::login(addr, Version::V5, key);
        assert_eq!(wire.publish(Version::V5, 1, "steady", b"0"), 0);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut took = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                let started = Instant::now();
                let payload = (took.len() + 1).to_string();
                assert_eq!(wire.publish(Version::V5, 1, "steady", payload.as_bytes()), 0);
                took.push(started.elapsed());
                // A pace, so that what is measured is an ack's latency and not a queue of its own.
                std::thread::sleep(Duration::from_millis(2));
            }
            took
        });
        Self { stop, thread }
    }

    /// Ends it. Every message has been acknowledged: how long that took, shortest first.
    pub fn stop(self) -> Latencies {
        self.stop.store(true, Ordering::Release);
        let mut took = self.thread.join().expect("every message was acknowledged");
        took.sort_unstable();
        assert!(!took.is_empty(), "something was published");
        Latencies(took)
    }
}

/// Ack latencies, shortest first.
pub struct Latencies(Vec<Duration>);

impl Latencies {
    /// How many messages were acknowledged.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The latency that 99 in 100 kept.
    pub fn p99(&self) -> Duration {
        self.0[(self.0.len() - 1) * 99 / 100]
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        *self.0.last().expect("not empty")
    }
}
