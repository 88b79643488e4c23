//! Quarantine: what is kept and not let through. Two things bring a record there: it does not meet its
//! datasource's schema, or the key that let it in has leaked.
//!
//! A record of the first kind is in the log with a flag and a note that says why; one of the second is
//! there like any other, and a rule says that it is withheld ([`Withheld`](crate::log::Withheld), kept
//! by [`leaks`]). No consumer hands either on. Storage keeps both in a table of their own, which
//! [`page`] reads: where somebody who is to mend a schema or a device looks.

pub mod leaks;
pub mod page;

pub use leaks::Leaks;
pub use page::{Cause, QuarantinePage, QuarantineQuery, QuarantinedRecord};
