//! The fronts: where messages come in.

pub mod connection_table;
mod credentials;
mod early_key;
pub mod http;
pub mod listen_sockets;
pub mod mqtt;
pub mod nats;
mod peer_stream;
mod problem;
pub mod proxied;
mod reserved_names;
pub mod tls;
