//! What an acknowledgement means on one machine: the log, what an `Idempotency-Key` keeps once, and that
//! nothing acknowledged is lost when the process is killed or the machine fails it. A cluster's faults are
//! in `tests/cluster`.

#[path = "../common/mod.rs"]
mod common;

mod backup;
mod crash;
mod dead_ends;
mod dead_keys;
mod faults;
mod lake;
mod log;
mod once;
mod postgres;
mod postgres_reads;
mod sinks;
mod stores;
