//! A checkpoint: the whole table in one Parquet file, so that nobody reads its log from the beginning.
//!
//! Each row is one action, in the column of its kind; the other columns are null. What others write is read by the names
//! of columns; what is unknown here, or missing there, does no harm.

mod decode;
mod encode;

pub(crate) use decode::decode;
pub(crate) use encode::encode;
