//! The usage of a key: how many messages were accepted under it, and when, from where and by whom it was
//! last used.
//!
//! Only used keys have one. `usage_notes.rs` says when it is recorded and written.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use headgate_format::key::may_hold_key;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::USERS_PER_KEY_MAX;
use crate::message::{Offset, TimeMicros, Transport};
use crate::time::Rfc3339;

/// Who uses a key: one connection, or one sender of requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyClient {
    /// The client id, where the protocol has one. Never a key, see [`KeyClient::new`].
    pub client_id: Option<Box<str>>,
    /// The source address.
    pub address: Option<IpAddr>,
    /// The transport.
    pub transport: Transport,
}

impl KeyClient {
    /// A client. Drops an id that looks like a key, because some clients present their key as their id.
    pub fn new(transport: Transport, address: Option<IpAddr>, client_id: Option<&str>) -> Self {
        let client_id = client_id.filter(|id| !may_hold_key(id)).map(Box::from);
        Self { client_id, address, transport }
    }
}

/// When one client last used a key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyClientUse {
    /// The client.
    #[serde(flatten, serialize_with = "serialize_client", deserialize_with = "deserialize_client")]
    pub client: Arc<KeyClient>,
    /// When it last used the key, in microseconds since the Unix epoch.
    #[serde(serialize_with = "serialize_rfc3339", deserialize_with = "deserialize_rfc3339")]
    pub at: TimeMicros,
}

/// The usage of a key: all of it, or the part that is to be added to what is stored.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyUsage {
    /// Messages that were accepted under the key.
    pub accepted: u64,
    /// Messages and requests that were refused although the key was valid.
    pub refused: u64,
    /// The offset of the newest record.
    pub offset: Option<Offset>,
    /// The clients that used it last, newest first, [`USERS_PER_KEY_MAX`] at most.
    pub users: Vec<KeyClientUse>,
}

impl KeyUsage {
    /// Moves `client` to the front of the users.
    pub(super) fn note_client(&mut self, client: &Arc<KeyClient>, at: TimeMicros) {
        let same = |user: &KeyClientUse| Arc::ptr_eq(&user.client, client) || user.client == *client;
        match self.users.iter().position(same) {
            Some(place) => self.users[..=place].rotate_right(1),
            None => {
                self.users.truncate(USERS_PER_KEY_MAX - 1);
                self.users.insert(0, KeyClientUse { client: Arc::clone(client), at });
            }
        }
        self.users[0].at = at;
    }

    /// Adds usage that happened later, or on another node.
    pub(super) fn add(&mut self, later: KeyUsage) {
        self.accepted += later.accepted;
        self.refused += later.refused;
        self.offset = later.offset.max(self.offset);
        let mut earlier = std::mem::replace(&mut self.users, later.users);
        self.users.append(&mut earlier);
        self.users.sort_by_key(|user| std::cmp::Reverse(user.at));
        let mut seen: Vec<Arc<KeyClient>> = Vec::new();
        self.users.retain(|user| {
            let is_new = seen.len() < USERS_PER_KEY_MAX && !seen.contains(&user.client);
            if is_new {
                seen.push(Arc::clone(&user.client));
            }
            is_new
        });
    }
}

/// The part of a key's usage that is not yet on the disk.
#[derive(Debug, Default)]
pub(super) struct PendingKeyUsage {
    pub(super) refused: AtomicU64,
    pending: Mutex<KeyUsage>,
    /// Whether the key is in the list of keys to write.
    pub(super) noted: AtomicBool,
}

impl PendingKeyUsage {
    pub(super) fn pending(&self) -> MutexGuard<'_, KeyUsage> {
        self.pending.lock()
    }

    pub(super) fn take(&self) -> KeyUsage {
        let mut used = std::mem::take(&mut *self.pending());
        used.refused += self.refused.swap(0, Ordering::Relaxed);
        used
    }

    /// Puts back usage that could not be written. The caller puts the key back in the list of keys to write,
    /// perhaps twice, which does no harm.
    pub(super) fn put_back(&self, mut earlier: KeyUsage) {
        let mut pending = self.pending();
        earlier.add(std::mem::take(&mut *pending));
        *pending = earlier;
        self.noted.store(true, Ordering::Release);
    }

    pub(super) fn peek(&self) -> KeyUsage {
        let mut used = self.pending().clone();
        used.refused += self.refused.load(Ordering::Relaxed);
        used
    }
}

fn serialize_client<S: Serializer>(client: &Arc<KeyClient>, serializer: S) -> Result<S::Ok, S::Error> {
    KeyClient::serialize(client, serializer)
}

fn deserialize_client<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<KeyClient>, D::Error> {
    KeyClient::deserialize(deserializer).map(Arc::new)
}

fn serialize_rfc3339<S: Serializer>(at: &TimeMicros, serializer: S) -> Result<S::Ok, S::Error> {
    Rfc3339(*at).serialize(serializer)
}

fn deserialize_rfc3339<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TimeMicros, D::Error> {
    let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
    crate::time::parse_time(&text).ok_or_else(|| serde::de::Error::custom("no time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_id_that_holds_a_key_is_not_kept() {
        let client = |name: &str| KeyClient::new(Transport::Mqtt, None, Some(name));
        assert_eq!(client("hgk_abc").client_id, None);
        assert_eq!(client("pump-7").client_id.as_deref(), Some("pump-7"));
    }
}
