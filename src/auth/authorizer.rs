//! The authorizer: what does this key allow, now?
//!
//! It turns what a client presented into a [`Grant`] or a [`Denied`]. Fronts ask once for each
//! connection or request and keep the grant; intake asks the grant about each message. The dearest
//! answer is to a valid key, one hash and one lookup; a key whose checksum is wrong costs neither.

use std::fmt;
use std::sync::Arc;

use super::{Digest, Key, Registry, Scope};
use crate::message::{DatasourceId, KeyId, Lease};

/// Turns presented keys into grants. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Authorizer {
    registry: Arc<Registry>,
}

/// What a valid key allows at this moment. Cheap to clone. It is only good while [`Grant::holds`]:
/// whoever keeps one asks again before each use.
#[derive(Clone)]
pub struct Grant(Arc<Key>);

/// Why a key does not allow what was asked. All but the last two get one answer on the wire, so that
/// a stranger learns nothing; logs and metrics tell them apart by [`Denied::cause`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No key was presented.
    #[error("no API key was presented")]
    NoKey,
    /// It does not have a key's form, or its checksum is wrong.
    #[error("the API key is malformed")]
    Malformed,
    /// There has been no such key.
    #[error("the API key is not known")]
    Unknown,
    /// It was revoked, or its datasource deleted.
    #[error("the API key has been revoked")]
    Revoked,
    /// Its time is over.
    #[error("the API key has expired")]
    Expired,
    /// Two different keys in one request.
    #[error("two different API keys were presented")]
    Ambiguous,
    /// The key is good, and belongs to another datasource.
    #[error("API key {key_id} does not belong to this datasource")]
    OtherDatasource {
        /// The key that was presented.
        key_id: KeyId,
    },
    /// The key is good, and lacks the scope.
    #[error("API key {key_id} lacks the scope {scope}")]
    MissingScope {
        /// The key that was presented.
        key_id: KeyId,
        /// What it would need.
        scope: Scope,
    },
}

impl Denied {
    /// One word for metrics and logs; it never changes its meaning.
    pub fn cause(&self) -> &'static str {
        match self {
            Denied::NoKey => "no_key",
            Denied::Malformed => "malformed_key",
            Denied::Unknown => "unknown_key",
            Denied::Revoked => "revoked_key",
            Denied::Expired => "expired_key",
            Denied::Ambiguous => "ambiguous_key",
            Denied::OtherDatasource { .. } => "other_datasource",
            Denied::MissingScope { .. } => "missing_scope",
        }
    }
}

impl Authorizer {
    /// An authorizer over `registry`.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    /// The registry behind it.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Which key is this? Says nothing about what it may do.
    ///
    /// # Errors
    /// [`Denied::NoKey`] for nothing but white space, [`Denied::Malformed`] for what cannot be a key
    /// (decided before any lookup), [`Denied::Unknown`], [`Denied::Revoked`] or [`Denied::Expired`].
    pub fn identify(&self, presented: &[u8]) -> Result<Grant, Denied> {
        let Some(digest) = Digest::of_presented(presented) else {
            let nothing = presented.trim_ascii().is_empty();
            return Err(if nothing { Denied::NoKey } else { Denied::Malformed });
        };
        let Some(key) = self.registry.find(&digest) else {
            let revoked = self.registry.was_revoked(&digest);
            return Err(if revoked { Denied::Revoked } else { Denied::Unknown });
        };
        // The lease was good a moment ago, or the key would not have been found. Every use of the
        // grant looks at it; to look here as well would be one more miss of the cache among many keys.
        if key.has_expired() { Err(Denied::Expired) } else { Ok(Grant(key)) }
    }
}

impl Grant {
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

    /// Whether it is still good: one atomic load, and for a key that expires a look at the clock.
    pub fn holds(&self) -> bool {
        self.check().is_ok()
    }

    /// Its lease.
    pub fn lease(&self) -> &Lease {
        &self.0.lease
    }

    /// May it do `scope` in `datasource`? To ask for `*` is to ask for all of them, as who manages
    /// datasources must: a key of one datasource is not enough, whatever its scopes. Whether there
    /// is such a datasource is not asked here.
    ///
    /// # Errors
    /// [`Denied::Revoked`] or [`Denied::Expired`] if it holds no longer; then
    /// [`Denied::OtherDatasource`], then [`Denied::MissingScope`].
    pub fn allows(&self, scope: Scope, datasource: &str) -> Result<(), Denied> {
        self.check()?;
        let own = &self.0.datasource;
        if own.as_str() != datasource && !own.is_all() {
            return Err(Denied::OtherDatasource { key_id: self.0.id });
        }
        self.check_scope(scope)
    }

    /// May it do `scope` at all, in the datasource that it belongs to?
    ///
    /// # Errors
    /// [`Denied::Revoked`] or [`Denied::Expired`] if it holds no longer; then
    /// [`Denied::MissingScope`].
    pub fn has(&self, scope: Scope) -> Result<(), Denied> {
        self.check()?;
        self.check_scope(scope)
    }

    fn check(&self) -> Result<(), Denied> {
        match &*self.0 {
            key if !key.lease.holds() => Err(Denied::Revoked),
            key if key.has_expired() => Err(Denied::Expired),
            _ => Ok(()),
        }
    }

    fn check_scope(&self, scope: Scope) -> Result<(), Denied> {
        if self.0.scopes.allow(scope) {
            Ok(())
        } else {
            Err(Denied::MissingScope { key_id: self.0.id, scope })
        }
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grant").field(&self.0).finish()
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::auth::{ApiKey, Scopes};
    use crate::message::now_micros;

    const HOUR: i64 = 3_600_000_000;

    fn empty() -> (TempDir, Authorizer) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        (dir, Authorizer::new(Arc::new(registry)))
    }

    fn identify(authorizer: &Authorizer, secret: &ApiKey) -> Result<Grant, Denied> {
        authorizer.identify(secret.expose().as_bytes())
    }

    #[test]
    fn a_key_is_told_from_everything_that_is_none() {
        let (_dir, authorizer) = empty();
        let (_, key, secret) = authorizer
            .registry()
            .create_datasource(None, "a", Scopes::of(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.key_id(), key.id);
        assert_eq!(grant.datasource().as_str(), "a");
        assert!(authorizer.identify(format!("  {}\r\n", secret.expose()).as_bytes()).is_ok());

        let denied = |presented: &[u8]| authorizer.identify(presented).expect_err("no key");
        assert_eq!(denied(b""), Denied::NoKey);
        assert_eq!(denied(b" \t\r\n"), Denied::NoKey);
        assert_eq!(denied(b"hgk_"), Denied::Malformed);
        assert_eq!(denied(&secret.expose().as_bytes()[..52]), Denied::Malformed);
        assert_eq!(denied(&secret.expose().to_lowercase().into_bytes()), Denied::Malformed);
        assert_eq!(denied(ApiKey::generate().expose().as_bytes()), Denied::Unknown);
        // The stored digest and the key id open nothing.
        assert_eq!(denied(&secret.digest().0), Denied::Malformed);
        assert_eq!(denied(key.id.to_string().as_bytes()), Denied::Malformed);
    }

    #[test]
    fn a_revoked_key_is_denied_and_the_grants_it_gave_end() {
        let (_dir, authorizer) = empty();
        let (a, key, secret) = authorizer
            .registry()
            .create_datasource(None, "a", Scopes::of(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        let kept = grant.clone();
        assert!(kept.holds());
        authorizer.registry().revoke_key(&a.id, key.id).expect("revoked").expect("was live");
        assert_eq!(identify(&authorizer, &secret).err(), Some(Denied::Revoked));
        assert!(!grant.holds() && !kept.holds() && !kept.lease().holds());
        assert_eq!(kept.allows(Scope::Ingest, "a"), Err(Denied::Revoked));
        assert_eq!(kept.has(Scope::Ingest), Err(Denied::Revoked));
    }

    #[test]
    fn a_key_works_until_it_expires() {
        let (_dir, authorizer) = empty();
        let all = DatasourceId::all();
        let create = |expires_at| {
            let scopes = Scopes::of(&[Scope::Ingest]);
            authorizer.registry().create_key(&all, "", scopes, Some(expires_at)).expect("created")
        };
        let (_, later) = create(now_micros() + HOUR);
        let grant = identify(&authorizer, &later).expect("not yet");
        assert!(grant.holds() && grant.allows(Scope::Ingest, "a").is_ok());
        let (expired, before) = create(now_micros());
        assert_eq!(identify(&authorizer, &before).err(), Some(Denied::Expired));
        let kept = Grant(expired);
        assert!(!kept.holds());
        assert_eq!(kept.allows(Scope::Ingest, "a"), Err(Denied::Expired));
    }

    #[test]
    fn a_key_opens_its_own_datasource_and_no_other() {
        let (_dir, authorizer) = empty();
        let every = Scopes::of(&Scope::ALL);
        let (_, key, secret) = authorizer.registry().create_datasource(None, "a", every).expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.allows(Scope::Ingest, "a"), Ok(()));
        // Not even with every scope, and not all of them either.
        for other in ["b", "a-2", "aa", "", "*", "A"] {
            for scope in Scope::ALL {
                let denied = Denied::OtherDatasource { key_id: key.id };
                assert_eq!(grant.allows(scope, other), Err(denied), "{scope} in {other:?}");
            }
        }
    }

    #[test]
    fn a_key_for_all_opens_each_with_its_scopes() {
        let (_dir, authorizer) = empty();
        let (key, secret) = authorizer
            .registry()
            .create_key(&DatasourceId::all(), "", Scopes::of(&[Scope::Subscribe]), None)
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        for datasource in ["a", "b", "*"] {
            assert_eq!(grant.allows(Scope::Subscribe, datasource), Ok(()));
            let denied = Denied::MissingScope { key_id: key.id, scope: Scope::Admin };
            assert_eq!(grant.allows(Scope::Admin, datasource), Err(denied));
        }
        assert_eq!(grant.has(Scope::Subscribe), Ok(()));
        assert!(grant.has(Scope::Ingest).is_err());
    }

    #[test]
    fn the_wrong_datasource_is_said_before_the_missing_scope() {
        let (_dir, authorizer) = empty();
        let (_, key, secret) = authorizer
            .registry()
            .create_datasource(None, "a", Scopes::of(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.allows(Scope::Admin, "b"), Err(Denied::OtherDatasource { key_id: key.id }));
        assert_eq!(
            grant.allows(Scope::Subscribe, "a"),
            Err(Denied::MissingScope { key_id: key.id, scope: Scope::Subscribe })
        );
    }

    #[test]
    fn each_denial_has_a_cause_of_its_own_and_tells_no_secret() {
        let (_dir, authorizer) = empty();
        let secret = ApiKey::generate();
        let key_id = secret.digest().key_id();
        let all = [
            Denied::NoKey,
            Denied::Malformed,
            identify(&authorizer, &secret).expect_err("unknown"),
            Denied::Revoked,
            Denied::Expired,
            Denied::Ambiguous,
            Denied::OtherDatasource { key_id },
            Denied::MissingScope { key_id, scope: Scope::Admin },
        ];
        let mut causes: Vec<_> = all.iter().map(Denied::cause).collect();
        for (denied, cause) in all.iter().zip(&causes) {
            assert!(cause.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{cause}");
            let shown = format!("{denied} {denied:?}");
            assert!(!shown.contains(&secret.expose()[4..12]), "{shown}");
        }
        causes.sort_unstable();
        causes.dedup();
        assert_eq!(causes.len(), all.len());
    }
}
