//! MQTT, by the real binary over its sockets: the front, over TCP, TLS and WebSocket, what subscribers are
//! promised beyond the protocol, and every normative statement of the specifications.

#[path = "../common/mod.rs"]
mod common;

mod conformance;
mod fairness;
mod front;
mod memory;
mod once;
mod proxied;
mod subscribe;
mod tenants;
mod tls;
mod ws;
