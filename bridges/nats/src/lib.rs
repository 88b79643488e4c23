//! NATS, as Headgate needs it. This crate knows NATS and nothing of keys, datasources or records. It owns a
//! small contract, and the gateway depends on it.

pub mod callout;
pub mod connection;
mod credentials_file;
pub mod ingress;
pub mod inlet;
pub mod kv;
pub mod outlet;
pub mod presence;
mod pushed;
pub mod stream;
pub mod system;

pub use async_nats::{HeaderMap, HeaderName};
pub use connection::{Nats, NatsCredentials, NatsError, NatsSettings};
pub use kv::{KvBucket, KvBucketSettings, KvError, KvWrites};
pub use outlet::{Outlet, OutletError, OutletPosition};
pub use presence::Presence;
pub use stream::{JetstreamStream, ManagedStream, SettingDifference, StreamError};
