//! HTTP, by the real binary over its sockets: the API and its description, the connections byte by byte, and
//! the commands, which speak to a gateway over the API.

#[path = "../common/mod.rs"]
mod common;

mod api;
mod cli;
mod commands;
mod contract;
mod cors;
mod dashboard;
mod environment;
mod floods;
mod grafana;
mod influx;
mod memory;
mod metrics;
mod openapi;
mod proxied;
mod records;
mod series;
mod shapes;
mod spans;
mod stream;
mod tail;
mod tls;
mod wire;
