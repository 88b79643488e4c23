//! Who may: keys, the registry of them, and the authorizer that turns a presented key into a grant
//! or a denial.

pub mod authorizer;
pub mod connections;
mod database;
pub mod key;
pub mod registry;
pub mod scope;

pub use authorizer::{Authorizer, Denied, Grant};
pub use key::{ApiKey, Digest};
pub use registry::{Datasource, Key, Registry, RegistryError};
pub use scope::{Scope, Scopes};
