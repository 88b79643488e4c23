//! The registry of a cluster: the KV bucket [`REGISTRY_BUCKET`], which every node watches and copies into
//! memory. `rows.rs` describes its rows. A node joins (`join.rs`), publishes its changes (`bucket.rs`), and
//! follows those of the others (`follower.rs`). The usage of keys has a bucket of its own (`usage.rs`).
//!
//! **Changes have one order.** A node publishes a change as one atomic batch, on the condition that the
//! bucket has nothing newer than what that node has applied. So each change was checked against all earlier
//! ones, from whichever node.
//!
//! The second of two concurrent changes is rejected; its node catches up and checks it again. That is why
//! audit ids and versions of leak rules are the same on all nodes, and why no key can be created for a
//! datasource that is being deleted elsewhere.
//!
//! **A change takes effect everywhere before its call returns.** The node that made it asks every other
//! present node ([`Presence`](headgate_bridge_nats::Presence)) on `headgate.settle.{node}`. Each answers
//! when it has applied the change and nothing more can be accepted under the keys that died.
//!
//! The wait for a node ends when it answers or is gone, after five seconds at most. A node without NATS hears
//! of no change, but cannot append anything either, because the log is on NATS. When it is back, it accepts
//! nothing until it has caught up ([`Registry::may_be_behind`](super::Registry::may_be_behind)).
//!
//! **Without NATS** nothing can be changed (503), and what is known stays in force:
//!
//! | what | on a node that has lost NATS |
//! |---|---|
//! | messages | refused as transient, from the moment when the others no longer wait for this node until it has caught up |
//! | keys that expire | end by the servers' clock, as it was known last |
//! | stored records of this node | can still be read, also with a key that was revoked meanwhile elsewhere |
//! | usage of keys | kept in memory until it can be added |

mod bucket;
mod follower;
mod history;
mod join;
mod usage;

pub use bucket::REGISTRY_BUCKET;
pub use follower::RegistryFollower;
pub(crate) use history::replace_file;
pub use history::{HISTORY_ROW_NAME, RegistryCopy, RegistryMending};
pub use join::{JoinedRegistry, managed_streams, registry_bucket_settings};
