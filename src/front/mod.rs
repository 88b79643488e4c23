//! The fronts: where connections come in.

pub mod http;
pub mod mqtt;
