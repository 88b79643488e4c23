//! Fuzzing of the parsers that strangers' bytes meet: the MQTT gate, the form of a key, line protocol, and a
//! batch of the log. `tests/run` runs each target for some seconds; for longer,
//! `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none gate`.

pub mod gate;
pub mod key;
pub mod line;
pub mod log;
