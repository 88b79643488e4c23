//! The formats that Headgate reads from others: a key that somebody presents, the packets of MQTT, the
//! message that comes out of them, line protocol, and the frames of the log that come back from a disk. Parsing only:
//! nothing here does I/O or decides who may do what. The gateway uses this crate, and so do the fuzz
//! targets in `tests/fuzz`, which need nothing else of it.

pub mod codec;
pub mod key;
pub mod limits;
pub mod line;
pub mod log;
pub mod message;
