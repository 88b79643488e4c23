//! NATS, with a real nats-server: messages that come in over it, the validated stream that goes out, and
//! API keys as its users (auth callout). Gateways whose log is in JetStream are in `tests/cluster`.

#[path = "../common/mod.rs"]
mod common;

mod callout;
mod examples;
mod ingest;
mod stream;
