//! What follows the log: each consumer has its own cursor, so that a slow one delays nobody and the next
//! start resumes where the last one stopped.
//!
//! [`storage`] consumes every record and writes it to a [`sink`]. [`query`] reads a sink back and
//! [`render`] gives the result its outward form. [`subscriber`] serves MQTT clients that subscribe,
//! [`egress`] clients of NATS. [`quarantine`] has the records that none of them is given. `follower.rs`
//! is the thread that some of them run on.

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
