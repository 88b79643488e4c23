//! Authorization: API keys, the registry of datasources and keys, and the authorizer that turns a
//! presented key into a grant or a denial.

mod apply;
pub mod audit;
pub mod authorizer;
mod change;
mod changes;
pub mod cluster;
pub mod connections;
mod database;
pub mod deadlines;
pub mod failures;
mod first_admin;
mod index;
mod leak;
pub mod live;
pub mod network;
pub mod registry;
mod replica;
pub mod rotation;
mod rows;
pub mod scope;
pub mod setting;
pub mod shape;
pub mod usage;

pub use audit::{Actor, AuditEvent};
pub use authorizer::{Authorizer, Grant, GrantDenial, RejectedKey};
pub use headgate_format::key::{self, ApiKey, Digest};
pub use live::{Datasource, Key};
pub use registry::{Registry, RegistryError};
pub use rows::LeakRow;
pub use scope::{Scope, Scopes};

#[cfg(test)]
mod tests;
