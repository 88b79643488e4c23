//! Tables of the crate against what others make of them: a model, readers of other people, a server that speaks S3.

mod bucket;
mod common;
mod faults;
mod model;
mod readers;
