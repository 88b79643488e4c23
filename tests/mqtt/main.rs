//! MQTT, by the real binary over its sockets: the front, over TCP, TLS and WebSocket, what subscribers are
//! promised beyond the protocol, and every normative statement of the specifications.

#[path = "../common/mod.rs"]
mod common;

mod bridge;
mod conformance;
mod fairness;
mod front;
mod groups;
mod leaving;
mod memory;
mod metadata;
mod once;
mod proxied;
mod subscribe;
mod tenants;
mod tls;
mod ws;
