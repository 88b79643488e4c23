//! The authorizer: what does this key allow, now?
//!
//! It turns what a client presented into a [`Grant`] or a [`GrantDenial`]. Fronts ask once for each
//! connection or request and keep the grant; intake checks the grant for each message. A valid key costs
//! most, one hash and one lookup; a key with a wrong checksum costs neither.
//!
//! The time that a denial takes does not reveal how close a guess was. The checksum is not secret. All
//! further checks use the digest, which changes completely with any character of the key, and an unknown
//! key takes the same one lookup as a revoked one.

use std::net::IpAddr;
use std::sync::Arc;

use headgate_format::key::{API_KEY_PREFIX, Digest};

use super::failures::AuthFailures;
use super::grant::{Grant, GrantDenial};
use super::registry::Registry;
use super::registry::index::KeyLookup;
use super::shape::KeyShape;
use super::token::{TokenClaims, TokenFault, is_access_token};
use crate::config;
use crate::message::{DatasourceId, KeyId};
use crate::time::cluster_micros;

/// Turns presented keys into grants. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Authorizer {
    registry: Arc<Registry>,
    failures: Arc<AuthFailures>,
}

/// A presented key that gives no grant, with what an operator may know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RejectedKey {
    /// The reason.
    pub denied: GrantDenial,
    /// The key's id, if the key was once valid.
    pub key_id: Option<KeyId>,
    /// The shape of the presented text, if it was never a valid key.
    pub shape: Option<KeyShape>,
}

impl From<GrantDenial> for RejectedKey {
    fn from(denied: GrantDenial) -> Self {
        Self { denied, key_id: None, shape: None }
    }
}

impl Authorizer {
    /// An authorizer over `registry` with the default limits for failures.
    #[cfg(any(test, feature = "testing"))]
    pub fn new(registry: Arc<Registry>) -> Self {
        Self::with_config(registry, &config::Config::default().auth)
    }

    /// Applies other limits for failures from now on.
    pub fn set_failure_limits(&self, config: &config::AuthConfig) {
        self.failures.set_limits(config);
    }

    /// An authorizer over `registry` with these limits for failures.
    pub fn with_config(registry: Arc<Registry>, config: &config::AuthConfig) -> Self {
        Self { registry, failures: Arc::new(AuthFailures::new(config)) }
    }

    /// As [`Authorizer::identify`], and counts a bad key against the address. Without an address, as for
    /// NATS clients, nothing is counted: one bad client would otherwise hide the reason from all others.
    ///
    /// # Errors
    /// Those of [`Authorizer::identify`], or [`GrantDenial::TooManyFailures`] in their place.
    pub fn identify_from(
        &self,
        presented: &[u8],
        from: impl Into<Option<IpAddr>>,
    ) -> Result<Grant, RejectedKey> {
        self.identify(presented).map_err(|denied| self.reject(denied, presented, from.into()))
    }

    /// As [`Authorizer::identify_from`], for the one key among several texts. If one of them looks like a
    /// key, the others may be a user name or an unrelated password, and are ignored; so are empty texts.
    ///
    /// # Errors
    /// [`GrantDenial::Ambiguous`] for two different keys, [`GrantDenial::NoKey`] if all texts are empty, and those of
    /// [`Authorizer::identify_from`] for the key that was found.
    pub fn identify_among(&self, presented: &[&[u8]], from: IpAddr) -> Result<Grant, RejectedKey> {
        let presented = || presented.iter().map(|text| text.trim_ascii()).filter(|text| !text.is_empty());
        let keys = || presented().filter(|text| text.starts_with(API_KEY_PREFIX) || is_access_token(text));
        match keys().next().or_else(|| presented().next()) {
            None => Err(GrantDenial::NoKey.into()),
            Some(key) if keys().any(|other| other != key) => Err(self.reject_ambiguous(from)),
            Some(key) => self.identify_from(key, from),
        }
    }

    /// The grant of a key that was checked elsewhere when it was presented, and is now named by its id. It is
    /// looked up because it may have died meanwhile.
    ///
    /// # Errors
    /// [`GrantDenial::Revoked`] if the key no longer exists, [`GrantDenial::Expired`].
    pub fn grant_of_key(&self, datasource: &DatasourceId, id: KeyId) -> Result<Grant, GrantDenial> {
        match self.registry.key(datasource, id) {
            None => Err(GrantDenial::Revoked),
            Some(key) if key.has_expired() => Err(GrantDenial::Expired),
            Some(key) => Ok(Grant::new(key)),
        }
    }

    /// Counts two different keys in one request as one bad key.
    pub fn reject_ambiguous(&self, from: impl Into<Option<IpAddr>>) -> RejectedKey {
        self.reject(GrantDenial::Ambiguous, &[], from.into())
    }

    fn reject(&self, denied: GrantDenial, presented: &[u8], from: Option<IpAddr>) -> RejectedKey {
        let (key_id, shape) = match denied {
            GrantDenial::Revoked | GrantDenial::Expired => {
                let id = Digest::from_presented(presented).map(|digest| digest.key_id());
                (id.or_else(|| self.key_of_token(presented)), None)
            }
            GrantDenial::ExpiredToken => (self.key_of_token(presented), None),
            GrantDenial::Malformed | GrantDenial::Unknown => {
                (None, Some(KeyShape::from_presented(presented)))
            }
            _ => (None, None),
        };
        // A client that presents no key is not guessing, so that is not counted.
        let denied = match (denied, from) {
            (GrantDenial::NoKey, _) => GrantDenial::NoKey,
            (denied, None) => denied,
            (denied, Some(from)) => match self.failures.count(from) {
                Ok(()) => denied,
                Err(retry_after) => GrantDenial::TooManyFailures { retry_after },
            },
        };
        RejectedKey { denied, key_id, shape }
    }

    /// The registry that keys are looked up in.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Identifies a presented key or access token. Does not check what it may do.
    ///
    /// # Errors
    /// [`GrantDenial::NoKey`] for an empty or blank text, [`GrantDenial::Malformed`] for a text that cannot be a key
    /// (decided before any lookup), [`GrantDenial::Unknown`], [`GrantDenial::Revoked`] or [`GrantDenial::Expired`]; for a
    /// token [`GrantDenial::DamagedToken`] and [`GrantDenial::UnknownToken`], both before any lookup,
    /// [`GrantDenial::ExpiredToken`], and the last two if its key has ended.
    pub fn identify(&self, presented: &[u8]) -> Result<Grant, GrantDenial> {
        let Some(digest) = Digest::from_presented(presented) else {
            if is_access_token(presented.trim_ascii_start()) {
                return self.identify_token(presented);
            }
            let nothing = presented.trim_ascii().is_empty();
            return Err(if nothing { GrantDenial::NoKey } else { GrantDenial::Malformed });
        };
        let key = match self.registry.look_up(&digest) {
            Some(KeyLookup::Key(key)) => key,
            Some(KeyLookup::Revoked) => return Err(GrantDenial::Revoked),
            None => return Err(GrantDenial::Unknown),
        };
        // The lease was valid a moment ago, or the lookup would have failed. Every use of the grant
        // checks it; checking it here too would cost one more cache miss.
        if key.has_expired() { Err(GrantDenial::Expired) } else { Ok(Grant::new(key)) }
    }

    /// Identifies an access token, which stands on its key.
    fn identify_token(&self, presented: &[u8]) -> Result<Grant, GrantDenial> {
        let claims = self.read_token(presented).map_err(|fault| match fault {
            TokenFault::Damaged => GrantDenial::DamagedToken,
            TokenFault::Unsigned => GrantDenial::UnknownToken,
        })?;
        if claims.ends_at <= cluster_micros() {
            return Err(GrantDenial::ExpiredToken);
        }
        // No two keys begin so, dead ones included: what is made again under a datasource's name has others.
        match self.registry.look_up_beginning(claims.key) {
            Some(KeyLookup::Key(key)) if key.has_expired() => Err(GrantDenial::Expired),
            Some(KeyLookup::Key(key)) => Ok(Grant::of_token(key, claims)),
            Some(KeyLookup::Revoked) | None => Err(GrantDenial::Revoked),
        }
    }

    fn read_token(&self, presented: &[u8]) -> Result<TokenClaims, TokenFault> {
        TokenClaims::read(presented, self.registry.token_secret().as_deref())
    }

    /// The key that a presented token was made from, if it was made here.
    fn key_of_token(&self, presented: &[u8]) -> Option<KeyId> {
        self.read_token(presented).ok().map(|claims| claims.key_id())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::auth::registry::token_secret::NewToken;
    use crate::auth::{Actor, ApiKey, Key, Scope, Scopes};
    use crate::filter::TopicFilter;
    use crate::message::now_micros;

    const HOUR: i64 = 3_600_000_000;

    fn empty() -> (TempDir, Authorizer) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        (dir, Authorizer::new(Arc::new(registry)))
    }

    fn identify(authorizer: &Authorizer, secret: &ApiKey) -> Result<Grant, GrantDenial> {
        authorizer.identify(secret.expose().as_bytes())
    }

    #[test]
    fn a_key_is_told_from_everything_that_is_none() {
        let (_dir, authorizer) = empty();
        let (_, key, secret) = authorizer
            .registry()
            .create_datasource(&Actor::SYSTEM, None, "a", Scopes::from_slice(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.key_id(), key.id);
        assert_eq!(grant.datasource().as_str(), "a");
        assert!(authorizer.identify(format!("  {}\r\n", secret.expose()).as_bytes()).is_ok());

        let denied = |presented: &[u8]| authorizer.identify(presented).expect_err("no key");
        assert_eq!(denied(b""), GrantDenial::NoKey);
        assert_eq!(denied(b" \t\r\n"), GrantDenial::NoKey);
        assert_eq!(denied(b"hgk_"), GrantDenial::Malformed);
        assert_eq!(denied(&secret.expose().as_bytes()[..52]), GrantDenial::Malformed);
        assert_eq!(denied(&secret.expose().to_lowercase().into_bytes()), GrantDenial::Malformed);
        assert_eq!(denied(ApiKey::generate().expose().as_bytes()), GrantDenial::Unknown);
        // The stored digest and the key id open nothing.
        assert_eq!(denied(&secret.digest().0), GrantDenial::Malformed);
        assert_eq!(denied(key.id.to_string().as_bytes()), GrantDenial::Malformed);
    }

    #[test]
    fn a_revoked_key_is_denied_and_the_grants_it_gave_end() {
        let (_dir, authorizer) = empty();
        let (a, key, secret) = authorizer
            .registry()
            .create_datasource(&Actor::SYSTEM, None, "a", Scopes::from_slice(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        let kept = grant.clone();
        assert!(kept.holds());
        authorizer.registry().revoke_key(&Actor::SYSTEM, &a.id, key.id).expect("revoked").expect("was live");
        assert_eq!(identify(&authorizer, &secret).err(), Some(GrantDenial::Revoked));
        assert!(!grant.holds() && !kept.holds() && !kept.lease().holds());
        assert_eq!(kept.allows(Scope::Ingest, "a"), Err(GrantDenial::Revoked));
        assert_eq!(kept.allows_scope(Scope::Ingest), Err(GrantDenial::Revoked));
    }

    #[test]
    fn a_key_works_until_it_expires() {
        let (_dir, authorizer) = empty();
        let all = DatasourceId::all();
        let create = |expires_at| {
            let scopes = Scopes::from_slice(&[Scope::Ingest]);
            authorizer
                .registry()
                .create_key(&Actor::SYSTEM, &all, "", scopes, Some(expires_at))
                .expect("created")
        };
        let (_, later) = create(now_micros() + HOUR);
        let grant = identify(&authorizer, &later).expect("not yet");
        assert!(grant.holds() && grant.allows(Scope::Ingest, "a").is_ok());
        let (expired, before) = create(now_micros());
        assert_eq!(identify(&authorizer, &before).err(), Some(GrantDenial::Expired));
        let kept = Grant::new(expired);
        assert!(!kept.holds());
        assert_eq!(kept.allows(Scope::Ingest, "a"), Err(GrantDenial::Expired));
    }

    #[test]
    fn a_key_opens_its_own_datasource_and_no_other() {
        let (_dir, authorizer) = empty();
        let every = Scopes::from_slice(&Scope::ALL);
        let (_, key, secret) =
            authorizer.registry().create_datasource(&Actor::SYSTEM, None, "a", every).expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.allows(Scope::Ingest, "a"), Ok(()));
        // Not even with every scope, and not all of them either.
        for other in ["b", "a-2", "aa", "", "*", "A"] {
            for scope in Scope::ALL {
                let denied = GrantDenial::OtherDatasource { key_id: key.id };
                assert_eq!(grant.allows(scope, other), Err(denied), "{scope} in {other:?}");
            }
        }
    }

    #[test]
    fn a_key_for_all_opens_each_with_its_scopes() {
        let (_dir, authorizer) = empty();
        let (key, secret) = authorizer
            .registry()
            .create_key(
                &Actor::SYSTEM,
                &DatasourceId::all(),
                "",
                Scopes::from_slice(&[Scope::Subscribe]),
                None,
            )
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        for datasource in ["a", "b", "*"] {
            assert_eq!(grant.allows(Scope::Subscribe, datasource), Ok(()));
            let denied = GrantDenial::MissingScope { key_id: key.id, scope: Scope::Admin };
            assert_eq!(grant.allows(Scope::Admin, datasource), Err(denied));
        }
        assert_eq!(grant.allows_scope(Scope::Subscribe), Ok(()));
        assert!(grant.allows_scope(Scope::Ingest).is_err());
    }

    #[test]
    fn the_wrong_datasource_is_said_before_the_missing_scope() {
        let (_dir, authorizer) = empty();
        let (_, key, secret) = authorizer
            .registry()
            .create_datasource(&Actor::SYSTEM, None, "a", Scopes::from_slice(&[Scope::Ingest]))
            .expect("created");
        let grant = identify(&authorizer, &secret).expect("valid");
        assert_eq!(grant.allows(Scope::Admin, "b"), Err(GrantDenial::OtherDatasource { key_id: key.id }));
        assert_eq!(
            grant.allows(Scope::Subscribe, "a"),
            Err(GrantDenial::MissingScope { key_id: key.id, scope: Scope::Subscribe })
        );
    }

    #[test]
    fn a_good_key_is_let_in_where_too_many_others_came_from() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
        let auth = config::AuthConfig { failures_burst: 2, failures_per_s: 1, failures_exempt: Vec::new() };
        let authorizer = Authorizer::with_config(registry.clone(), &auth);
        let all = DatasourceId::all();
        let (key, secret) = registry
            .create_key(&Actor::SYSTEM, &all, "", Scopes::from_slice(&[Scope::Ingest]), None)
            .expect("created");
        let from: IpAddr = [203, 0, 113, 9].into();
        let guess = || authorizer.identify_from(ApiKey::generate().expose().as_bytes(), from);
        for _ in 0..2 {
            let rejected = guess().err().map(|rejected| (rejected.denied, rejected.shape.is_some()));
            assert_eq!(rejected, Some((GrantDenial::Unknown, true)));
        }
        let too_many = |rejected: RejectedKey| matches!(rejected.denied, GrantDenial::TooManyFailures { .. });
        assert!(guess().is_err_and(too_many));
        assert!(authorizer.identify_from(b"hgk_", from).is_err_and(too_many), "malformed");
        assert!(authorizer.reject_ambiguous(from).denied != GrantDenial::Ambiguous);
        // Nothing was presented, so nothing was guessed.
        assert_eq!(authorizer.identify_from(b"", from).err(), Some(GrantDenial::NoKey.into()));
        let grant = authorizer.identify_from(secret.expose().as_bytes(), from).expect("a good key");
        assert_eq!(grant.key_id(), key.id);
    }

    #[test]
    fn a_key_is_found_among_names_and_passwords_and_two_keys_are_ambiguous() {
        let (_dir, authorizer) = empty();
        let from: IpAddr = [203, 0, 113, 9].into();
        let create = || {
            let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
            authorizer.registry().create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created")
        };
        let ((key, secret), (_, other)) = (create(), create());
        let (secret, other) = (secret.expose().as_bytes(), other.expose().as_bytes());
        let id = |presented: &[&[u8]]| match authorizer.identify_among(presented, from) {
            Ok(grant) => Ok(grant.key_id()),
            Err(rejected) => Err(rejected.denied),
        };
        for presented in [&[secret, b"", b""], &[b"device", secret, b""], &[b" ", b"", secret]] {
            assert_eq!(id(presented), Ok(key.id));
        }
        assert_eq!(id(&[secret, secret]), Ok(key.id));
        assert_eq!(id(&[secret, other]), Err(GrantDenial::Ambiguous));
        assert_eq!(id(&[b"device", b"hunter2"]), Err(GrantDenial::Malformed));
        assert_eq!(id(&[b"", b" ", b""]), Err(GrantDenial::NoKey));
        assert_eq!(id(&[]), Err(GrantDenial::NoKey));
    }

    #[test]
    fn a_key_that_is_named_by_its_id_is_good_for_as_long_as_it_lives() {
        let (_dir, authorizer) = empty();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (a, key, _) =
            authorizer.registry().create_datasource(&Actor::SYSTEM, None, "a", scopes).expect("created");
        assert_eq!(authorizer.grant_of_key(&a.id, key.id).expect("live").key_id(), key.id);
        assert_eq!(authorizer.grant_of_key(&DatasourceId::all(), key.id).err(), Some(GrantDenial::Revoked));
        authorizer.registry().revoke_key(&Actor::SYSTEM, &a.id, key.id).expect("revoked");
        assert_eq!(authorizer.grant_of_key(&a.id, key.id).err(), Some(GrantDenial::Revoked));
        let expires_at = Some(now_micros());
        let (key, _) =
            authorizer.registry().create_key(&Actor::SYSTEM, &a.id, "", scopes, expires_at).expect("created");
        assert_eq!(authorizer.grant_of_key(&a.id, key.id).err(), Some(GrantDenial::Expired));
    }

    fn filters(topics: &[&str]) -> Vec<TopicFilter> {
        topics.iter().map(|topic| TopicFilter::new(topic).expect("a filter")).collect()
    }

    #[test]
    fn a_token_allows_no_more_than_its_key_and_for_as_long_as_it_was_made_for() {
        let (_dir, authorizer) = empty();
        let registry = authorizer.registry();
        let both = Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]);
        let (a, key, _) = registry.create_datasource(&Actor::SYSTEM, None, "a", both).expect("created");
        assert!(registry.token_secret().is_none(), "nothing is written before there is a token");
        let make = |key: &Key, ends_at, topics: &[&str]| {
            registry.make_token(key, both, ends_at, filters(topics)).expect("made")
        };
        let made = make(&key, now_micros() + HOUR, &["spindle/#"]);
        let grant = authorizer.identify(made.token.expose().as_bytes()).expect("valid");
        assert_eq!((grant.key_id(), grant.is_of_token(), grant.holds()), (key.id, true, true));
        assert!(grant.allows(Scope::Subscribe, "a").is_ok() && grant.allows_topic("a", "spindle/x").is_ok());
        assert_eq!(grant.allows_topic("a", "bed"), Err(GrantDenial::TokenTopics { key_id: key.id }));
        let filter = |text: &str| grant.allows_filter(&filters(&[text])[0]);
        assert!(filter("spindle/+").is_ok() && filter("spindle").is_ok());
        assert!(filter("#").is_err() && filter("+/x").is_err() && filter("spindles").is_err());
        for scope in Scope::ALL {
            let other = GrantDenial::OtherDatasource { key_id: key.id };
            assert_eq!(grant.allows(scope, "b"), Err(other));
        }
        let missing = GrantDenial::MissingScope { key_id: key.id, scope: Scope::Admin };
        assert_eq!(grant.allows(Scope::Admin, "a"), Err(missing));
        assert!(grant.require_key("do that").is_err());

        let over = make(&key, now_micros(), &[]);
        let over = over.token.expose().as_bytes();
        assert_eq!(authorizer.identify(over).err(), Some(GrantDenial::ExpiredToken));
        let from: IpAddr = [203, 0, 113, 9].into();
        let rejected = authorizer.identify_from(over, from).expect_err("expired");
        assert_eq!(rejected.key_id, Some(key.id));

        registry.revoke_key(&Actor::SYSTEM, &a.id, key.id).expect("revoked");
        assert!(!grant.holds());
        let rejected = authorizer.identify_from(made.token.expose().as_bytes(), from).expect_err("dead");
        assert_eq!((rejected.denied, rejected.key_id), (GrantDenial::Revoked, Some(key.id)));
    }

    #[test]
    fn no_token_manages_anything_and_none_ends_after_its_key() {
        let (_dir, authorizer) = empty();
        let registry = authorizer.registry();
        let (all, ends_at) = (DatasourceId::all(), now_micros() + HOUR);
        let admin = Scopes::from_slice(&[Scope::Admin]);
        let (key, _) = registry.create_key(&Actor::SYSTEM, &all, "", admin, Some(ends_at)).expect("created");
        let every = Scopes::from_slice(&Scope::ALL);
        let made = registry.make_token(&key, every, ends_at + HOUR, filters(&["a/#", "+/b"])).expect("made");
        assert_eq!(made.claims.ends_at, ends_at);
        let grant = authorizer.identify(made.token.expose().as_bytes()).expect("valid");
        assert!(grant.allows(Scope::Ingest, "a").is_ok() && grant.allows(Scope::Subscribe, "a").is_ok());
        assert!(grant.allows(Scope::Admin, "a").is_err() && grant.allows_scope(Scope::Admin).is_err());
        // Its topics begin with the datasource, as those of its key do.
        assert!(grant.allows_topic("a", "x/y").is_ok() && grant.allows_topic("z", "b").is_ok());
        assert!(grant.allows_topic("z", "x").is_err() && grant.allows_topic("z", "a/x").is_err());
        assert_eq!(grant.topics_within("a"), Some(filters(&["#", "b"])));
        assert_eq!(grant.topics_within("z"), Some(filters(&["b"])));
        let ingest = Scopes::from_slice(&[Scope::Ingest]);
        let (reader, _) = registry
            .create_key(&Actor::SYSTEM, &all, "", Scopes::from_slice(&[Scope::Subscribe]), None)
            .expect("created");
        assert!(registry.make_token(&reader, ingest, ends_at, Vec::new()).is_err(), "nothing would be left");
    }

    #[test]
    fn a_token_of_another_registry_is_good_for_nothing_here_and_one_of_this_is_after_a_restart() {
        let ((dir, authorizer), (_other_dir, other)) = (empty(), empty());
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (_, key, _) =
            authorizer.registry().create_datasource(&Actor::SYSTEM, None, "a", scopes).expect("created");
        let make = |registry: &Registry| {
            registry.make_token(&key, scopes, now_micros() + HOUR, Vec::new()).expect("made")
        };
        let (own, foreign) = (make(authorizer.registry()), make(other.registry()));
        let identify = |authorizer: &Authorizer, made: &NewToken| {
            authorizer.identify(made.token.expose().as_bytes()).map(|grant| grant.key_id())
        };
        assert_eq!(identify(&authorizer, &own), Ok(key.id));
        assert_eq!(identify(&authorizer, &foreign), Err(GrantDenial::UnknownToken));
        let cut = &own.token.expose().as_bytes()[..40];
        assert_eq!(authorizer.identify(cut).err(), Some(GrantDenial::DamagedToken));
        drop(authorizer);
        let again = Authorizer::new(Arc::new(Registry::open(dir.path()).expect("opens")));
        assert_eq!(identify(&again, &own), Ok(key.id));
        // Its signature is right, and its key is not here.
        assert_eq!(identify(&other, &foreign), Err(GrantDenial::Revoked));
    }

    #[test]
    fn of_a_revoked_key_the_id_is_told_and_of_an_unknown_one_the_shape() {
        let (_dir, authorizer) = empty();
        let all = DatasourceId::all();
        let registry = authorizer.registry();
        let (key, secret) = registry
            .create_key(&Actor::SYSTEM, &all, "", Scopes::from_slice(&[Scope::Ingest]), None)
            .expect("created");
        registry.revoke_key(&Actor::SYSTEM, &all, key.id).expect("revoked");
        let from: IpAddr = [203, 0, 113, 9].into();
        let rejected = authorizer.identify_from(secret.expose().as_bytes(), from).expect_err("revoked");
        assert_eq!(rejected, RejectedKey { denied: GrantDenial::Revoked, key_id: Some(key.id), shape: None });
        let unknown = ApiKey::generate();
        let rejected = authorizer.identify_from(unknown.expose().as_bytes(), from).expect_err("unknown");
        assert_eq!((rejected.denied, rejected.key_id), (GrantDenial::Unknown, None));
        assert_eq!(rejected.shape, Some(KeyShape::from_presented(unknown.expose().as_bytes())));
    }

    #[test]
    fn each_denial_has_a_cause_of_its_own_and_tells_no_secret() {
        let (_dir, authorizer) = empty();
        let secret = ApiKey::generate();
        let key_id = secret.digest().key_id();
        let all = [
            GrantDenial::NoKey,
            GrantDenial::Malformed,
            identify(&authorizer, &secret).expect_err("unknown"),
            GrantDenial::Revoked,
            GrantDenial::Expired,
            GrantDenial::DamagedToken,
            GrantDenial::UnknownToken,
            GrantDenial::ExpiredToken,
            GrantDenial::TokenTopics { key_id },
            GrantDenial::TokenUse { key_id, what: "do that" },
            GrantDenial::TooManyFailures { retry_after: Duration::ZERO },
            GrantDenial::Ambiguous,
            GrantDenial::OtherDatasource { key_id },
            GrantDenial::MissingScope { key_id, scope: Scope::Admin },
        ];
        let mut causes: Vec<_> = all.iter().map(|denied| denied.cause().name()).collect();
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
