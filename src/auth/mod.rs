//! Authorization: API keys, the registry of datasources and keys, and the authorizer that turns a
//! presented key into a grant or a denial.
//!
//! **A revocation** goes one way, like a PUBLISH: `src/front/http/keys.rs` takes the `DELETE` and asks the
//! registry (`registry/keys.rs`), which ends the key in memory first (`registry/key_ends.rs`): it leaves the live
//! view (`registry/live.rs`), where no lookup finds it any more; its lease ends, which stops the messages under it
//! that are past the lookup (`registry/key.rs`); its connections are told to close (`connections.rs`). Then the end
//! is written: a transaction of the key's row and its audit entry (`registry/transaction.rs`), durable in
//! `registry.db` or, in a cluster, in the bucket (`registry/cluster/bucket.rs`). If the disk is full, the registry
//! gives up its reserve there (`registry/disk_reserve.rs`); if the write fails all the same, it is tried again
//! until it is durable, and the answer says so. In a cluster the change now waits for the other nodes: each
//! follows the bucket (`registry/cluster/follower.rs`), does the same to its own live view
//! (`registry/remote_changes.rs`) and settles. Back at the front, `Intake::settle` (`src/intake/mod.rs`) passes a
//! barrier through the log, behind which nothing under the key can be appended, and waits until the last
//! connection has left; then the call is answered. A key that expires (`registry/deadlines.rs`), one that is
//! rotated away (`registry/rotations.rs`), a leak report (`registry/leaks.rs`) and a deleted datasource
//! (`registry/datasources.rs`) join that way where the key ends in memory.

pub mod authorizer;
pub mod connections;
pub mod failures;
pub mod grant;
pub mod registry;
pub mod scope;
pub mod shape;

pub use authorizer::{Authorizer, RejectedKey};
pub use grant::{Grant, GrantDenial};
pub use headgate_format::key::{self, ApiKey, Digest};
pub use registry::audit::{Actor, AuditEvent};
pub use registry::datasource::Datasource;
pub use registry::datasources::NewDatasource;
pub use registry::error::RegistryError;
pub use registry::key::Key;
pub use registry::keys::NewKey;
pub use registry::leak_rules::LeakRow;
pub use registry::leaks::LeakedKeyFate;
pub use registry::{Registry, audit, cluster, deadlines, key_ends, setting, usage};
pub use scope::{Scope, Scopes};
