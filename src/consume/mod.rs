//! What follows the log: each consumer behind a cursor of its own, so that a slow one delays
//! nobody, and the next start goes on where the last one stopped.
//!
//! [`storage`] is the consumer that every record goes through; it writes to a [`sink`]. What a sink
//! holds is read back by [`query`], and given its outward form by [`render`]. [`subscriber`] is for
//! MQTT clients that subscribe, [`egress`] for clients of NATS. [`quarantine`] has what none of them is
//! given. `follower.rs` is the thread that some of them are.

pub mod egress;
mod follower;
pub mod latest;
pub mod quarantine;
pub mod query;
pub mod render;
pub mod schema_inference;
pub mod sink;
pub mod storage;
pub mod subscriber;

#[cfg(test)]
mod testing;
