//! Gateways in a cluster: their common registry, log and sessions in JetStream, what is promised while
//! gateways and nats-servers are killed, and the script that runs a cluster on one machine.

#[path = "../common/mod.rs"]
mod common;

mod clock;
mod exchanges;
mod faults;
mod fences;
mod history;
mod ids;
mod lake;
mod log;
mod postgres;
mod registry;
mod run;
mod sessions;
mod settings;
mod sinks;
mod stream;
