//! Fuzzing of the parsers that strangers' bytes meet: the MQTT gate, the form of a key, and a batch
//! of the log. `tests/run` runs each target for some seconds; for longer,
//! `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none gate`.
//!
//! The modules are the gateway's own files, without the rest of the gateway.

// A part of each file is used here; what is not is used elsewhere.
#![allow(dead_code, unreachable_pub)]

#[path = "../../../src/auth/key.rs"]
mod auth_key;
#[path = "../../../src/front/mqtt/codec/mod.rs"]
pub mod codec;
#[path = "../../../src/limits.rs"]
pub mod limits;
pub mod log;
#[path = "../../../src/message.rs"]
pub mod message;

pub mod gate;
pub mod key;
