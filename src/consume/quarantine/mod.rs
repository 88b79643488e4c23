//! Quarantine: records that are kept and not passed on. A record is there because it fails its
//! datasource's schema, or because the key that let it in has leaked.
//!
//! A record of the first kind has a flag in the log and a note with the reason. One of the second kind is
//! in the log like any other, and a rule withholds it ([`Withheld`](crate::log::WithheldRules), kept by
//! [`leaks`]). No consumer passes either on. Storage keeps both in a separate table, which [`page`] reads
//! for whoever has to fix a schema or a device.

pub mod leaks;
pub mod page;

pub use leaks::QuarantineLeakRules;
pub use page::QuarantineQuery;
