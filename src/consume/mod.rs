//! What follows the log: each consumer behind a cursor of its own, so that a slow one delays
//! nobody, and the next start goes on where the last one stopped.
//!
//! [`storage`] is the consumer that every record goes through; it writes to a [`sink`]. What a sink
//! holds is read back by [`query`], and given its outward form by [`render`].

pub mod filter;
pub mod latest;
pub mod query;
pub mod render;
pub mod sink;
pub mod storage;

#[cfg(test)]
mod testing;
