//! Takeovers in a row: two devices with one client identifier push each other out for ever, and neither says why. The
//! tally notices it, so that an operator reads who they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::ClientKey;
use crate::limits::{TAKEOVER_TALLIES_MAX, TAKEOVERS_TOLD_MIN};

/// The window in which takeovers count as in a row.
const TAKEOVERS_WINDOW: Duration = Duration::from_secs(60);
/// How many addresses are named.
const TAKEOVER_ADDRESSES_MAX: usize = 4;

/// How often connections were pushed out that were in use, by client.
#[derive(Default)]
pub(super) struct TakeoverTally(HashMap<ClientKey, ClientTakeovers>);

struct ClientTakeovers {
    since: Instant,
    count: u32,
    addresses: Vec<IpAddr>,
}

/// A client identifier that more than one device seems to use.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct SharedIdentifier {
    /// In words, for people.
    pub(in super::super) words: String,
    /// It was not told before in this window.
    pub(in super::super) is_new: bool,
}

impl TakeoverTally {
    /// Counts a connection from `address` that another one of the client has pushed out.
    pub(super) fn note(
        &mut self,
        key: &ClientKey,
        address: IpAddr,
        now: Instant,
    ) -> Option<SharedIdentifier> {
        if !self.0.contains_key(key) && self.0.len() >= TAKEOVER_TALLIES_MAX {
            return None;
        }
        let tally = self.0.entry(key.clone()).or_insert(ClientTakeovers {
            since: now,
            count: 0,
            addresses: Vec::new(),
        });
        if now.saturating_duration_since(tally.since) >= TAKEOVERS_WINDOW {
            *tally = ClientTakeovers { since: now, count: 0, addresses: Vec::new() };
        }
        tally.count += 1;
        if !tally.addresses.contains(&address) && tally.addresses.len() < TAKEOVER_ADDRESSES_MAX {
            tally.addresses.push(address);
        }
        (tally.count >= TAKEOVERS_TOLD_MIN).then(|| {
            let addresses: Vec<String> = tally.addresses.iter().map(IpAddr::to_string).collect();
            let words = format!(
                "connections with this client identifier have pushed each other out {} times within {} s; they came from {}",
                tally.count,
                TAKEOVERS_WINDOW.as_secs(),
                addresses.join(", ")
            );
            SharedIdentifier { words, is_new: tally.count == TAKEOVERS_TOLD_MIN }
        })
    }

    /// Forgets what lies before the window.
    pub(super) fn forget_old(&mut self, now: Instant) {
        self.0.retain(|_, tally| now.saturating_duration_since(tally.since) < TAKEOVERS_WINDOW);
        if self.0.is_empty() && self.0.capacity() > 0 {
            self.0 = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::DatasourceId;

    #[test]
    fn only_many_takeovers_of_one_client_within_the_window_are_told() {
        let mut tally = TakeoverTally::default();
        let key = |id: &str| -> ClientKey { (DatasourceId::all(), id.into()) };
        let address = |last| IpAddr::from([10, 0, 0, last]);
        let now = Instant::now();
        for n in 1..TAKEOVERS_TOLD_MIN {
            assert_eq!(tally.note(&key("a"), address(1), now), None, "{n}");
            assert_eq!(tally.note(&key("b"), address(1), now), None, "{n}");
        }
        let told = tally.note(&key("a"), address(2), now).expect("as many as it takes");
        assert!(told.is_new && told.words.contains("10.0.0.1, 10.0.0.2"), "{}", told.words);
        assert!(tally.note(&key("a"), address(2), now).is_some_and(|again| !again.is_new));
        let later = now + TAKEOVERS_WINDOW;
        assert_eq!(tally.note(&key("b"), address(1), later), None, "those were long ago");
        tally.forget_old(later);
        assert_eq!(tally.0.len(), 1);
        tally.forget_old(later + TAKEOVERS_WINDOW);
        assert_eq!(tally.0.capacity(), 0);
    }
}
