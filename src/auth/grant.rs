//! A grant: what a valid key, or an access token made from it, allows at this moment, or why it does not allow an
//! operation. All fronts and intake ask it, so that what a token narrows is narrowed everywhere.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::registry::key::Key;
use super::scope::{Scope, Scopes};
use super::token::TokenClaims;
use crate::filter::TopicFilter;
use crate::message::{DatasourceId, KeyId, Lease, TimeMicros};
use crate::time::cluster_micros;

/// What a valid key allows at this moment. Cheap to clone. It is valid only while [`Grant::holds`]: check
/// that again before each use.
#[derive(Clone)]
pub struct Grant {
    key: Arc<Key>,
    /// What is left of that, if a token of the key was presented.
    token: Option<Arc<TokenBounds>>,
}

/// What an access token leaves of its key.
#[derive(Debug)]
struct TokenBounds {
    scopes: Scopes,
    ends_at: TimeMicros,
    /// Empty for all.
    topics: Vec<TopicFilter>,
}

/// Why a key does not allow an operation. Those for which no valid key or token was presented look the same on the
/// wire, so that a stranger learns nothing; logs and metrics distinguish them by [`GrantDenial::cause`].
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
    /// The access token is cut, mistyped or of an unknown form.
    #[error("the access token is damaged")]
    DamagedToken,
    /// The access token was not made by this gateway, or by its cluster.
    #[error("the access token was not made here")]
    UnknownToken,
    /// The access token was good for a time, which is over.
    #[error("the access token has expired")]
    ExpiredToken,
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
    /// The access token is valid, and not for this topic or filter.
    #[error("the access token is for other topics")]
    TokenTopics {
        /// The key that it was made from.
        key_id: KeyId,
    },
    /// The access token is valid, and this takes a key.
    #[error("an access token cannot {what}")]
    TokenUse {
        /// The key that it was made from.
        key_id: KeyId,
        /// What was asked for.
        what: &'static str,
    },
}

impl Grant {
    /// The grant of a key that has been looked up.
    pub(super) fn new(key: Arc<Key>) -> Self {
        Self { key, token: None }
    }

    /// The grant of a token of a key that has been looked up.
    pub(super) fn of_token(key: Arc<Key>, claims: TokenClaims) -> Self {
        let TokenClaims { scopes, ends_at, topics, .. } = claims;
        Self { key, token: Some(Arc::new(TokenBounds { scopes, ends_at, topics })) }
    }

    /// The key's public handle.
    pub fn key_id(&self) -> KeyId {
        self.key.id
    }

    /// The key.
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// The datasource it belongs to, or `*`.
    pub fn datasource(&self) -> &DatasourceId {
        &self.key.datasource
    }

    /// Whether the grant is still valid: one atomic load, and a clock read for a key that expires.
    pub fn holds(&self) -> bool {
        self.check().is_ok()
    }

    /// The key's lease.
    pub fn lease(&self) -> &Lease {
        self.key.lease()
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
        let own = &self.key.datasource;
        if own.as_str() != datasource && !own.is_all() {
            return Err(GrantDenial::OtherDatasource { key_id: self.key.id });
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

    /// Checks that it allows this topic of a datasource, as that knows it. Does not check the scope.
    ///
    /// # Errors
    /// [`GrantDenial::TokenTopics`].
    #[inline]
    pub fn allows_topic(&self, datasource: &str, topic: &str) -> Result<(), GrantDenial> {
        let Some(topics) = self.topics() else { return Ok(()) };
        let is_selected = |filter: &TopicFilter| match self.key.datasource.is_all() {
            true => filter.matches_levels(std::iter::once(datasource).chain(topic.split('/'))),
            false => filter.matches(topic),
        };
        if topics.iter().any(is_selected) { Ok(()) } else { Err(self.outside_topics()) }
    }

    /// Checks that it allows all topics that a filter selects. The filter is what a subscriber with the key gives: that
    /// of a key for all datasources begins with the datasource. Does not check the scope.
    ///
    /// # Errors
    /// [`GrantDenial::TokenTopics`].
    pub fn allows_filter(&self, filter: &TopicFilter) -> Result<(), GrantDenial> {
        let Some(topics) = self.topics() else { return Ok(()) };
        match topics.iter().any(|topic| topic.covers(filter)) {
            true => Ok(()),
            false => Err(self.outside_topics()),
        }
    }

    /// The topics of a datasource that it is for, as that knows them; `None` for all, and an empty list for none.
    pub fn topics_within(&self, datasource: &str) -> Option<Vec<TopicFilter>> {
        let topics = self.topics()?;
        if !self.key.datasource.is_all() {
            return Some(topics.to_vec());
        }
        let within = |filter: &TopicFilter| match filter.as_str().split_once('/') {
            Some((named, rest)) if named == "+" || named == datasource => TopicFilter::new(rest).ok(),
            None if filter.as_str() == "#" => Some(filter.clone()),
            _ => None,
        };
        Some(topics.iter().filter_map(within).collect())
    }

    /// The topics that it is for, as its key knows them; `None` for all.
    pub fn topics(&self) -> Option<&[TopicFilter]> {
        self.token.as_ref().map(|token| &*token.topics).filter(|topics| !topics.is_empty())
    }

    /// Whether it is that of an access token.
    pub fn is_of_token(&self) -> bool {
        self.token.is_some()
    }

    /// Checks that it is that of a key, for what no token is for.
    ///
    /// # Errors
    /// [`GrantDenial::TokenUse`].
    pub fn require_key(&self, what: &'static str) -> Result<(), GrantDenial> {
        match self.token {
            None => Ok(()),
            Some(_) => Err(GrantDenial::TokenUse { key_id: self.key.id, what }),
        }
    }

    /// When it ends by itself, if it does.
    pub fn ends_at(&self) -> Option<TimeMicros> {
        self.token_ends_at().into_iter().chain(self.key.ends_at()).min()
    }

    /// When the access token ends, if it is that of one.
    pub fn token_ends_at(&self) -> Option<TimeMicros> {
        self.token.as_ref().map(|token| token.ends_at)
    }

    /// The denial of topics that its token is not for.
    pub fn outside_topics(&self) -> GrantDenial {
        GrantDenial::TokenTopics { key_id: self.key.id }
    }

    /// Checks that it is still valid.
    ///
    /// # Errors
    /// [`GrantDenial::Revoked`], [`GrantDenial::Expired`] or [`GrantDenial::ExpiredToken`].
    pub fn check(&self) -> Result<(), GrantDenial> {
        let key = &*self.key;
        if !key.holds() {
            return Err(GrantDenial::Revoked);
        }
        if key.has_expired() {
            return Err(GrantDenial::Expired);
        }
        match &self.token {
            Some(token) if token.ends_at <= cluster_micros() => Err(GrantDenial::ExpiredToken),
            _ => Ok(()),
        }
    }

    fn check_scope(&self, scope: Scope) -> Result<(), GrantDenial> {
        let is_left = self.token.as_ref().is_none_or(|token| token.scopes.allow(scope));
        if is_left && self.key.scopes.allow(scope) {
            Ok(())
        } else {
            Err(GrantDenial::MissingScope { key_id: self.key.id, scope })
        }
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant").field("key", &self.key).field("token", &self.token).finish()
    }
}
