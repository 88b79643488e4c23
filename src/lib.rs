//! Headgate: a gateway between devices and backends. Devices publish with their datasource's API
//! key; an accepted message is on disk before it is acknowledged, and goes on from there to storage
//! and to every subscriber.
//!
//! The modules stand in the order in which a message meets them.
//!
//! **Arrive.** A front speaks a protocol: `front/mqtt/mod.rs`, `front/http/mod.rs` or `front/nats/mod.rs`. It
//! turns bytes into messages and answers into that protocol's codes, and decides nothing.
//!
//! **Prove.** Every front hands what it read to one stage, `intake/mod.rs`. It asks `auth/authorizer.rs` what
//! the presented key allows and `quota/mod.rs` whether it is within its limits, checks topic and size,
//! validates messages against their schema with `validate/mod.rs`, and turns them into records
//! (`intake/draft.rs`).
//!
//! **Keep.** The log, `log/mod.rs`, gives each record its offset and makes it durable, a batch at a time:
//! `log/embedded.rs` in files, `log/jetstream/mod.rs` in a cluster. Only then does the front acknowledge.
//!
//! **Deliver.** The consumers in `consume/mod.rs` read the log, each behind its own cursor, so that a slow
//! one delays nobody: storage, subscribers, the stream on NATS.
//!
//! Imports point toward the log; only `gateway/mod.rs` sees everything and wires it together. Outside of the
//! crate there is the command line, `cli/mod.rs`.

mod front;
mod intake;
mod validate;
mod values;

mod auth;
mod quota;

mod log;

mod consume;

mod backup;

mod observe;

mod config;
mod filter;
mod memory;
mod network;
mod processor;
mod retained_topics;
mod scheduler;
#[cfg(test)]
mod seeded_random;
mod shares;
mod sqlite;
mod subject;
mod time;
mod trouble;
mod whole_number;

mod gateway;

pub mod cli;

use headgate_format::{limits, message};

/// What the integration tests and benchmarks take from inside, item by item: the compiler still tells what
/// nobody uses. Not part of the gateway (feature `testing`).
#[cfg(feature = "testing")]
pub mod testing {
    pub use crate::auth::audit::AuditQuery;
    pub use crate::auth::cluster::{JoinedRegistry, REGISTRY_BUCKET};
    pub use crate::auth::connections::{CloseReason, ConnectionControl};
    pub use crate::auth::deadlines::run as run_deadlines;
    pub use crate::auth::usage::KeyClient;
    pub use crate::auth::{
        Actor, ApiKey, Authorizer, Digest, GrantDenial, Key, LeakRow, RecordRule, Registry, RegistryError,
        Scope, Scopes,
    };
    pub use crate::config::{Config, LogBackend};
    pub use crate::consume::subscriber::sessions::bucket::{self, FoundSession, LostSession, SessionLookup};
    pub use crate::consume::subscriber::sessions::{
        FlightOrigin, SessionStore, SessionStoreChange, SessionStoreError, StoredFlight, StoredFlights,
        StoredSession, StoredSubscription,
    };
    pub use crate::log::{
        AppendError, CommitOutcome, EmbeddedLog, JetstreamLog, Log, LogOpenError, LogReadError, Offsets,
        OnceId, RecordNote, Section, SectionOutcome,
    };
    pub use crate::subject::check_topic_has_subject;
    pub use crate::time::Rfc3339;
    pub use headgate_format::{limits, message};
}
