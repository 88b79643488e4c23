//! Quarantine: records that are kept and not passed on. A record is there because it fails its
//! datasource's schema, or because the key that let it in has leaked.
//!
//! A record of the first kind has a flag in the log and a note with the reason. One of the second kind is
//! in the log like any other, and a rule withholds it ([`WithheldRules`](crate::log::WithheldRules), kept by
//! [`leaks`]). No consumer passes either on. Storage keeps both in a separate table, which [`page`] reads
//! for whoever has to fix a schema or a device.
//!
//! | reader | how it leaves both out |
//! |---|---|
//! | subscribers, egress | check each record right before it is delivered |
//! | retained messages | correct their copy: for a new rule they read the log again from its beginning |
//! | storage | moves the records into the table `quarantined`, and back |
//!
//! Each copy notes in the transaction that corrects it which version of the rules it follows.
//!
//! **Redriving** sends a message through intake again (`front/http/quarantine.rs`). It becomes a record of
//! the key that it came with, and its note names the original's offset. Storage marks the original by that
//! note, so that it comes in once, whenever it is redriven.

pub mod leaks;
pub mod page;

pub use leaks::QuarantineLeakRules;
pub use page::QuarantineQuery;
