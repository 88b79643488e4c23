//! A grant: what a valid key allows at this moment, or why it does not allow an operation.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::registry::key::Key;
use super::scope::Scope;
use crate::message::{DatasourceId, KeyId, Lease};

/// What a valid key allows at this moment. Cheap to clone. It is valid only while [`Grant::holds`]: check
/// that again before each use.
#[derive(Clone)]
pub struct Grant(Arc<Key>);

/// Why a key does not allow an operation. All but the last two look the same on the wire, so that a
/// stranger learns nothing; logs and metrics distinguish them by [`GrantDenial::cause`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantDenial {
    /// No key was presented.
    #[error("no API key was presented")]
    NoKey,
    /// The text does not have a key's form, or its checksum is wrong.
    #[error("the API key is malformed")]
    Malformed,
    /// No such key has ever existed.
    #[error("the API key is not known")]
    Unknown,
    /// The key was revoked, or its datasource deleted.
    #[error("the API key has been revoked")]
    Revoked,
    /// The key has expired, or its grace period has ended.
    #[error("the API key has expired")]
    Expired,
    /// Too many bad keys came from the same address. Returned only for another bad key.
    #[error("too many API keys from this address were not good; wait {} s", retry_after.as_secs() + 1)]
    TooManyFailures {
        /// How long to wait before the next attempt.
        retry_after: Duration,
    },
    /// One request presented two different keys.
    #[error("two different API keys were presented")]
    Ambiguous,
    /// The key is valid, but belongs to another datasource.
    #[error("API key {key_id} does not belong to this datasource")]
    OtherDatasource {
        /// The key that was presented.
        key_id: KeyId,
    },
    /// The key is valid, but lacks the scope.
    #[error("API key {key_id} lacks the scope {scope}")]
    MissingScope {
        /// The key that was presented.
        key_id: KeyId,
        /// The missing scope.
        scope: Scope,
    },
}

impl Grant {
    /// The grant of a key that has been looked up.
    pub(super) fn new(key: Arc<Key>) -> Self {
        Self(key)
    }

    /// The key's public handle.
    pub fn key_id(&self) -> KeyId {
        self.0.id
    }

    /// The key.
    pub fn key(&self) -> &Arc<Key> {
        &self.0
    }

    /// The datasource it belongs to, or `*`.
    pub fn datasource(&self) -> &DatasourceId {
        &self.0.datasource
    }

    /// Whether the grant is still valid: one atomic load, and a clock read for a key that expires.
    pub fn holds(&self) -> bool {
        self.check().is_ok()
    }

    /// The key's lease.
    pub fn lease(&self) -> &Lease {
        self.0.lease()
    }

    /// Checks that the key allows `scope` in `datasource`. `*` means all datasources, which managing them
    /// requires: a key of one datasource is then not enough, whatever its scopes. Does not check that the
    /// datasource exists.
    ///
    /// # Errors
    /// [`GrantDenial::Revoked`] or [`GrantDenial::Expired`] if the grant is no longer valid; then
    /// [`GrantDenial::OtherDatasource`], then [`GrantDenial::MissingScope`].
    pub fn allows(&self, scope: Scope, datasource: &str) -> Result<(), GrantDenial> {
        self.check()?;
        let own = &self.0.datasource;
        if own.as_str() != datasource && !own.is_all() {
            return Err(GrantDenial::OtherDatasource { key_id: self.0.id });
        }
        self.check_scope(scope)
    }

    /// Checks that the key allows `scope` in the datasource that it belongs to.
    ///
    /// # Errors
    /// [`GrantDenial::Revoked`] or [`GrantDenial::Expired`] if the grant is no longer valid; then
    /// [`GrantDenial::MissingScope`].
    pub fn allows_scope(&self, scope: Scope) -> Result<(), GrantDenial> {
        self.check()?;
        self.check_scope(scope)
    }

    fn check(&self) -> Result<(), GrantDenial> {
        match &*self.0 {
            key if !key.holds() => Err(GrantDenial::Revoked),
            key if key.has_expired() => Err(GrantDenial::Expired),
            _ => Ok(()),
        }
    }

    fn check_scope(&self, scope: Scope) -> Result<(), GrantDenial> {
        if self.0.scopes.allow(scope) {
            Ok(())
        } else {
            Err(GrantDenial::MissingScope { key_id: self.0.id, scope })
        }
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grant").field(&self.0).finish()
    }
}
