//! Headgate: a gateway between devices and backends. Devices publish with their datasource's API
//! key; an accepted message is on disk before it is acknowledged, and goes on from there to storage
//! and to every subscriber.
//!
//! The modules stand in the order in which a message meets them.
//!
//! **Arrive.** A [`front`] speaks a protocol: MQTT, HTTP or NATS. It turns bytes into messages and
//! answers into that protocol's codes, and decides nothing.
//!
//! **Prove.** Every front hands what it read to one stage, [`intake`]. It asks [`auth`] what the
//! presented key allows and [`quota`] whether it is within its limits, checks topic and size, validates
//! messages against their schema with [`validate`], and turns them into records.
//!
//! **Keep.** The [`log`] gives each record its offset and makes it durable, a batch at a time. Only
//! then does the front acknowledge.
//!
//! **Deliver.** The consumers in [`consume`] read the log, each behind its own cursor, so that a slow
//! one delays nobody.
//!
//! Imports point toward the log; only [`gateway`] sees everything and wires it together.

pub mod front;
pub mod intake;
pub mod validate;

pub mod auth;
pub mod quota;

pub mod log;

pub mod consume;

pub mod observe;

pub mod config;
pub mod filter;
pub mod network;
pub mod subject;
pub mod time;

pub mod gateway;

pub mod cli;

pub use headgate_format::{limits, message};
