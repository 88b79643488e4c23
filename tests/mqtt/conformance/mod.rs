//! The normative statements of MQTT 3.1.1 and 5.0, held against the real gateway byte by byte.
//!
//! `mqtt-3.1.1.tsv` and `mqtt-5.0.tsv` list every statement and the test that covers it, or why none
//! does; [`table`] holds the lists and the tests together. The modules follow the chapters.

mod connect;
mod flights;
mod keep_alive;
mod malformed;
mod properties;
mod publish;
mod qos;
mod retain;
mod sessions;
mod shared;
mod stage;
mod subscribe;
mod table;
mod text;
mod websocket;
mod will;
