//! Authorization: API keys, the registry of datasources and keys, and the authorizer that turns a
//! presented key into a grant or a denial.
//!
//! **A revocation** goes one way, like a PUBLISH:
//!
//! | file | what happens |
//! |---|---|
//! | `src/front/http/keys.rs` | takes the `DELETE` and asks the registry |
//! | `registry/keys.rs`, `registry/key_ends.rs` | end the key in memory first, whatever the disk says |
//! | `registry/live.rs` | the key leaves the live view: no lookup finds it any more |
//! | `registry/key.rs` | its lease ends, which stops the messages under it that are past the lookup |
//! | `connections.rs` | its connections are told to close |
//! | `registry/transaction.rs` | the key's row and its audit entry, durable in `registry.db` or, in a cluster, in the bucket (`registry/cluster/bucket.rs`) |
//! | `registry/disk_reserve.rs` | on a full disk: gives up the reserve for that write. If it fails all the same, it is tried again until it is durable, and the answer says so |
//! | `registry/cluster/follower.rs`, `registry/remote_changes.rs` | in a cluster: every other node does the same to its own live view and settles; the change waits for them |
//! | `src/intake/mod.rs` | `Intake::settle` passes a barrier through the log, behind which nothing under the key can be appended, and waits until the last connection has left; then the call is answered |
//!
//! **An access token** (`token.rs`) stands on its key: it is checked against the live view, so that it dies where the key
//! does, and ends by itself besides (`registry/token_ends.rs`).
//!
//! These join where the key ends in memory: a key that expires or whose grace is over (`registry/deadlines.rs`), a
//! leak report (`registry/leaks.rs`), a deleted datasource (`registry/datasources.rs`), and a key that is to be replaced
//! without grace and cannot be (`registry/rotations.rs`). Otherwise a rotation and its undoing are durable first, and
//! then in force, like every change that is not just an end. In a cluster so is the end of a grace
//! (`registry/key_ends.rs`), and the clock denies the key meanwhile.

pub mod authorizer;
pub mod connections;
pub mod failures;
pub mod grant;
pub mod registry;
pub mod scope;
pub mod shape;
pub mod token;

pub use authorizer::{Authorizer, RejectedKey};
pub use grant::{Grant, GrantDenial};
pub use headgate_format::key::{self, ApiKey, Digest};
pub use registry::audit::{Actor, AuditEvent};
pub use registry::datasource::Datasource;
pub use registry::datasources::NewDatasource;
pub use registry::error::RegistryError;
pub use registry::incarnations::{EndedIncarnation, IncarnationEvent, LogEndPatience, RecordRule};
pub use registry::key::Key;
pub use registry::keys::NewKey;
pub use registry::leak_rules::LeakRow;
pub use registry::leaks::LeakedKeyFate;
pub use registry::{Registry, audit, cluster, deadlines, key_ends, setting, usage};
pub use scope::{Scope, Scopes};
