//! A stored will: what is published for a connected client when its gateway is killed. It is kept for as long as the
//! client is connected, or its will waits, and is published once: under an id of its own, by whichever gateway finds
//! it first.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::row;
use crate::message::{DatasourceId, KeyId, RecordFlags, TimeMicros};

/// A will as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredWill {
    /// A number that no other will has.
    pub id: u64,
    /// The scope of the client's key: its datasource, in one incarnation; `*` for a key for all.
    #[serde(deserialize_with = "row::datasource")]
    pub scope: DatasourceId,
    /// With a key for all: the datasource that the topic names, in the incarnation that there was.
    pub target: Option<String>,
    /// The id of the client's key.
    pub key_id: [u8; 6],
    /// The client.
    pub client_id: String,
    /// Where it connected from.
    pub address: IpAddr,
    /// The number of its session, if that outlives the connection.
    pub session: Option<u64>,
    /// As the client gave it.
    pub topic: String,
    /// The message.
    pub payload: Vec<u8>,
    /// The media type, or empty.
    pub content_type: String,
    /// The other MQTT 5 properties, encoded.
    pub properties: Vec<u8>,
    /// How it is published, as the bits of a record.
    pub flags: u8,
    /// The client's hash, as in the records that it publishes.
    pub publisher: u64,
    /// How long after the loss of the connection it is published, in seconds.
    pub delay_s: u32,
    /// When the connection was lost. `None`: it was there when this was written.
    pub lost_at: Option<TimeMicros>,
}

impl StoredWill {
    /// The client's key.
    pub fn key_id(&self) -> KeyId {
        KeyId(self.key_id)
    }

    /// The datasource of the client's key, or `*`.
    pub fn datasource(&self) -> DatasourceId {
        self.scope.of_scope().0
    }

    /// The flags of its record.
    pub fn record_flags(&self) -> RecordFlags {
        RecordFlags(self.flags)
    }

    /// The id under which it is kept in the log once.
    pub fn message_id(&self) -> String {
        format!("headgate-will-{:016x}", self.id)
    }

    /// When it is due, if its session stays for `expiry_s` seconds: at the latest when that ends (MQTT 5 section
    /// 3.1.3.2.2). `now` counts as the loss of a connection whose end nobody saw.
    pub fn due_at(&self, expiry_s: u32, now: TimeMicros) -> TimeMicros {
        let delay_s = if self.session.is_some() { self.delay_s.min(expiry_s) } else { 0 };
        self.lost_at.unwrap_or(now).saturating_add(i64::from(delay_s) * 1_000_000)
    }
}
