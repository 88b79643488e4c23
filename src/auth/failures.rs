//! Failed authentications, counted per source address. A client that keeps presenting bad keys is told
//! to wait instead of being told what is wrong, and nothing is logged for it.
//!
//! A valid key is accepted even if others have failed at the same address: a whole factory may share it.
//! So a key is looked up first (a malformed key costs neither hash nor lookup, see
//! [`Digest::from_presented`](super::Digest::from_presented)), and only a failure is counted. A lookup is
//! cheaper than a count and helps nobody to guess: a key has 256 bits.
//!
//! The counters are [`RateBucket`]s in a fixed table, indexed by a keyed hash of the address. However many
//! addresses there are, memory and time stay the same, nothing is locked, and no address can evict
//! another. Two addresses may share a bucket; then one of them is told to wait early, which it only
//! sees when its key is bad anyway.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::config;
use crate::limits::AUTH_FAILURES_COUNTERS;
use crate::network::{Network, source_of};
use crate::quota::bucket::{Moment, Rate, RateBucket};

/// The counters of failed authentications.
pub struct AuthFailures {
    counters: Box<[RateBucket]>,
    /// Replaced when the configuration is read again.
    limits: ArcSwap<FailureLimits>,
    hash: RandomState,
}

/// How many failures an address may have, and whose are not counted.
struct FailureLimits {
    rate: Rate,
    exempt: Vec<Network>,
}

impl FailureLimits {
    fn of_config(config: &config::AuthConfig) -> Arc<Self> {
        let rate = Rate { per_s: config.failures_per_s, burst: config.failures_burst };
        Arc::new(Self { rate, exempt: config.failures_exempt.clone() })
    }
}

impl AuthFailures {
    /// No failures yet.
    pub fn new(config: &config::AuthConfig) -> Self {
        Self {
            counters: (0..AUTH_FAILURES_COUNTERS).map(|_| RateBucket::default()).collect(),
            limits: ArcSwap::new(FailureLimits::of_config(config)),
            hash: RandomState::new(),
        }
    }

    /// Applies other limits from now on.
    pub fn set_limits(&self, config: &config::AuthConfig) {
        self.limits.store(FailureLimits::of_config(config));
    }

    /// Counts one failure from this address.
    ///
    /// # Errors
    /// How long to wait, if the address has exceeded its limit.
    pub fn count(&self, from: IpAddr) -> Result<(), Duration> {
        let limits = self.limits.load();
        if limits.exempt.iter().any(|network| network.contains(from)) {
            return Ok(());
        }
        let hash = self.hash.hash_one(source_of(from));
        let place = usize::try_from(hash % self.counters.len() as u64).expect("less than a length");
        self.counters[place].take(limits.rate, 1, Moment::now(), Duration::ZERO).map(drop)
    }
}

impl fmt::Debug for AuthFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthFailures").field("rate", &self.limits.load().rate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(exempt: &[&str]) -> AuthFailures {
        let exempt = exempt.iter().map(|network| network.parse().expect("a network")).collect();
        AuthFailures::new(&config::AuthConfig {
            failures_burst: 3,
            failures_per_s: 1,
            failures_exempt: exempt,
        })
    }

    fn from(address: &str) -> IpAddr {
        address.parse().expect("an address")
    }

    #[test]
    fn after_the_burst_an_address_waits_and_others_do_not() {
        let failures = failures(&[]);
        for _ in 0..3 {
            failures.count(from("203.0.113.9")).expect("within the burst");
        }
        let wait = failures.count(from("203.0.113.9")).expect_err("one above");
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
        // One of a few others may share its place in the table, not all of them.
        let others = (1..5).filter(|i| failures.count(from(&format!("198.51.100.{i}"))).is_ok());
        assert!(others.count() >= 3);
    }

    #[test]
    fn the_addresses_of_one_64_are_one() {
        let failures = failures(&[]);
        for i in 0..3 {
            failures.count(from(&format!("2001:db8::{i}"))).expect("within the burst");
        }
        assert!(failures.count(from("2001:db8::ffff:1")).is_err());
    }

    #[test]
    fn other_limits_hold_at_once() {
        let failures = failures(&[]);
        while failures.count(from("203.0.113.9")).is_ok() {}
        let exempt = vec!["203.0.113.0/24".parse().expect("a network")];
        failures.set_limits(&config::AuthConfig {
            failures_burst: 3,
            failures_per_s: 1,
            failures_exempt: exempt,
        });
        failures.count(from("203.0.113.9")).expect("exempt by now");
    }

    #[test]
    fn an_exempt_address_never_waits() {
        let failures = failures(&["127.0.0.0/8"]);
        for _ in 0..100 {
            failures.count(from("127.0.0.1")).expect("exempt");
        }
    }
}
