//! The bridge on a real nats-server: buckets and presence.

#[path = "../common/mod.rs"]
mod common;

mod kv;
mod presence;
