//! Where the storage consumers write: SQLite, PostgreSQL, a Delta lake.
//!
//! A sink keeps its own cursor and moves it in the transaction that writes the records. So each record
//! is stored exactly once: after a kill at any moment the cursor says which records are there, and the log
//! has the rest.

mod ahead;
mod chunk_numbers;
mod ids;
pub(in crate::consume) mod incarnations;
mod insert;
#[cfg(feature = "delta")]
pub(in crate::consume) mod lake;
pub(in crate::consume) mod latest_board;
mod newest;
mod origins;
mod payloads;
pub(in crate::consume) mod postgres;
pub mod quarantined;
pub mod record_copy;
pub mod retention;
pub(in crate::consume) mod sample_chunk;
mod samples;
pub mod schema;
pub mod sqlite;
