//! Credentials: the API key that a request carries, in `Authorization` or `X-API-Key`, or the session of the dashboard that
//! its cookie names, and the [`Caller`] that it identifies. A handler that takes a `Caller` runs only for a key that is valid at
//! this moment, and before any of the body has been read. One that takes a [`DataCaller`] runs for an access token too, which
//! is in the same headers, or for a stream in the URL: a browser's `EventSource` can send no header.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri};

use super::answer::RequestMemory;
use super::server::HttpPeer;
use super::{HttpFrontState, dashboard};
use crate::auth::token::ACCESS_TOKEN_PREFIX;
use crate::auth::{Actor, Grant, GrantDenial, Scope};
use crate::front::credentials;
use crate::front::problem::Problem;
use crate::limits::HTTP_REQUEST_BYTES;
use crate::message::{holds_access_token, now_micros};
use crate::observe::cause::Cause;

/// Names of query parameters that have no other use than to carry a secret.
const KEY_QUERY_PARAMETERS: [&str; 7] =
    ["key", "api_key", "apikey", "token", "access_token", "authorization", "x-api-key"];

/// What every key begins with. Anywhere in a query string it means that a key is there.
const KEY_PREFIX: &str = "hgk_";

/// Where a stream takes an access token in its URL.
const URL_TOKEN_PARAMETER: &str = "access_token";

/// What no access token is for, in the words of its refusal.
const USE_OF_KEYS: &str =
    "be used here: it is for ingest, records, latest, series, stream and schema. Use the key";

/// Who sent a request: the grant of its key, and its connection.
pub(super) struct Caller(pub(super) Grant, pub(super) HttpPeer);

/// Who sent a request that sends or reads data: with a key, or with an access token.
pub(super) struct DataCaller(pub(super) Caller);

impl Caller {
    /// The caller, as the audit records it: for a change that is made while the key holds.
    pub(super) fn actor(&self) -> Actor {
        Actor::of_grant(&self.0, Some(self.1.addr.ip()))
    }

    /// Checks that the caller has `scope` in `datasource`.
    pub(super) fn require_scope(&self, scope: Scope, datasource: &str) -> Result<(), Problem> {
        Ok(self.0.allows(scope, datasource)?)
    }

    /// Checks that the caller may manage what belongs to no single datasource. The request names no
    /// datasource, so the answer cannot reveal whether one exists.
    pub(super) fn require_gateway_admin(&self) -> Result<(), Problem> {
        self.0.allows_scope(Scope::Admin)?;
        match self.0.datasource().is_all() {
            true => Ok(()),
            false => Err(Problem::needs_key_for_all(self.0.key_id())),
        }
    }
}

impl FromRequestParts<Arc<HttpFrontState>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<HttpFrontState>) -> Result<Self, Problem> {
        DataCaller::from_request_parts(parts, shared).await?.require_key()
    }
}

impl FromRequestParts<Arc<HttpFrontState>> for DataCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<HttpFrontState>) -> Result<Self, Problem> {
        let in_url = token_in_url(&parts.uri);
        let key = match (presented_key(&parts.headers), &in_url) {
            (Err(GrantDenial::NoKey), Some(token)) => Ok(token.as_bytes()),
            (Ok(key), Some(token)) if key != token.as_bytes() => Err(GrantDenial::Ambiguous),
            (key, _) => key,
        };
        if matches!(key, Err(GrantDenial::NoKey))
            && let Some((grant, session)) = dashboard::page_grant(parts, shared)
        {
            parts.extensions.insert(session.digest);
            parts.extensions.insert(grant.clone());
            return Caller::admit(parts, shared, grant).await.map(Self);
        }
        let caller = Self::identify(parts, shared, key).await?;
        parts.extensions.insert(caller.0.0.clone());
        Ok(caller)
    }
}

impl DataCaller {
    /// Who sent a request that presents `key`, or an access token in its place.
    pub(super) async fn identify(
        parts: &Parts,
        shared: &HttpFrontState,
        key: Result<&[u8], GrantDenial>,
    ) -> Result<Self, Problem> {
        let Some(peer) = parts.extensions.get::<HttpPeer>() else {
            return Err(Problem::internal(&"a request without the address it came from"));
        };
        let (authorizer, from) = (shared.parts.intake.authorizer(), peer.addr.ip());
        let key = key.map_err(|denied| match denied {
            GrantDenial::Ambiguous => authorizer.reject_ambiguous(from),
            other => other.into(),
        })?;
        let grant = authorizer.identify_from(key, from)?;
        Caller::admit(parts, shared, grant).await.map(Self)
    }

    /// The caller, if it has presented a key.
    fn require_key(self) -> Result<Caller, Problem> {
        self.0.0.require_key(USE_OF_KEYS)?;
        Ok(self.0)
    }
}

impl Caller {
    /// Who sent a request that presents `key`, for what no access token is for.
    pub(super) async fn identify(
        parts: &Parts,
        shared: &HttpFrontState,
        key: Result<&[u8], GrantDenial>,
    ) -> Result<Self, Problem> {
        DataCaller::identify(parts, shared, key).await?.require_key()
    }

    /// Lets a request in whose key has been looked up.
    pub(super) async fn admit(parts: &Parts, shared: &HttpFrontState, grant: Grant) -> Result<Self, Problem> {
        let Some(peer) = parts.extensions.get::<HttpPeer>() else {
            return Err(Problem::internal(&"a request without the address it came from"));
        };
        let intake = &shared.parts.intake;
        let (is_first, account) = peer.keys.enter(grant.key(), || intake.memory_account(&grant));
        if is_first {
            if let Err(refusal) = intake.check_connections(&grant) {
                peer.keys.leave(grant.key_id());
                return Err(refusal.into());
            }
            peer.entry.present(grant.key_id());
            peer.payer.set(intake.processor().of_grant(&grant));
            peer.payer.change_lane().await;
        }
        let charge = account.charge(HTTP_REQUEST_BYTES)?;
        if let Some(memory) = parts.extensions.get::<RequestMemory>() {
            memory.charge_to_key(charge);
        }
        shared.registry().note_use(grant.key(), Some(&peer.client), now_micros(), None);
        Ok(Self(grant, peer.clone()))
    }
}

/// The one key that the headers carry.
pub(super) fn presented_key(headers: &HeaderMap) -> Result<&[u8], GrantDenial> {
    // Both names are in lower case, as the lookup expects.
    let places = [credentials::AUTHORIZATION_HEADER, credentials::X_API_KEY_HEADER].into_iter();
    let values = places.flat_map(|name| headers.get_all(name).iter().map(move |value| (name, value)));
    credentials::one_key(
        values.filter_map(|(name, value)| credentials::key_in_header(name, value.as_bytes())),
    )
}

/// Whether a path is that of a stream.
fn is_stream(path: &str) -> bool {
    let id = path.strip_prefix("/v1/datasources/").and_then(|rest| rest.strip_suffix("/stream"));
    id.is_some_and(|id| !id.is_empty() && !id.contains('/'))
}

/// The access token in the URL of a stream, if one is there and in order, and nothing else that it could be.
pub(super) fn token_in_url(uri: &Uri) -> Option<String> {
    if !is_stream(uri.path()) || !uri.query()?.contains(URL_TOKEN_PARAMETER) {
        return None;
    }
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).ok()?;
    pairs.into_iter().find(|(name, _)| name == URL_TOKEN_PARAMETER).map(|(_, value)| value)
}

/// Refuses a URL that carries what is, or is meant to be, an API key. URLs end up in the logs of every
/// proxy on the way, so such a key has to be considered leaked. An access token ends soon, and is taken in the URL of a
/// stream.
pub(super) fn refuse_key_in_url(uri: &Uri) -> Result<(), Problem> {
    let Ok(Query(pairs)) = Query::<Vec<(String, String)>>::try_from_uri(uri) else {
        return Ok(()); // The query string cannot be parsed: the handler that reads it reports that.
    };
    // There, `key` is that of a value in payloads.
    let is_of_series = uri.path().starts_with("/v1/datasources/") && uri.path().ends_with("/series");
    let is_token = |(name, value): &(String, String)| {
        is_stream(uri.path())
            && name == URL_TOKEN_PARAMETER
            && value.as_bytes().starts_with(ACCESS_TOKEN_PREFIX)
            && !value.contains(KEY_PREFIX)
    };
    let is_key = |(name, value): &(String, String)| {
        KEY_QUERY_PARAMETERS.iter().any(|parameter| name.eq_ignore_ascii_case(parameter))
            && !(is_of_series && name == "key")
            || [name, value].into_iter().any(|text| text.contains(KEY_PREFIX) || holds_access_token(text))
    };
    let is_in_path = uri.path().contains(KEY_PREFIX) || holds_access_token(uri.path());
    let tokens = pairs.iter().filter(|pair| is_token(pair)).count();
    if pairs.iter().any(|pair| is_key(pair) && !is_token(pair)) || is_in_path || tokens > 1 {
        if is_stream(uri.path()) {
            let words = "Send the API key in a header, 'Authorization: Bearer KEY'. If the one in this URL is real, replace it: \
                 URLs are kept in logs on the way. A page takes one access token, 'access_token=hgt_…', which a key makes: \
                 POST /v1/datasources/{datasource}/keys/{key_id}/tokens.";
            return Err(Problem::new(Cause::KeyInUrl, words));
        }
        return Err(Problem::new(
            Cause::KeyInUrl,
            "Send the API key in a header, 'Authorization: Bearer KEY'. If the one in this URL is real, \
             replace it: URLs are kept in logs on the way.",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::cause::ProblemKind;

    #[test]
    fn a_key_stands_in_either_header() {
        let of = |headers: &[(&'static str, &'static str)]| {
            let headers = headers.iter().map(|(name, value)| {
                let name = axum::http::HeaderName::from_static(name);
                (name, axum::http::HeaderValue::from_static(value))
            });
            presented_key(&headers.collect()).map(|key| String::from_utf8_lossy(key).into_owned())
        };
        assert_eq!(of(&[("authorization", "Bearer k"), ("x-api-key", "k")]).as_deref(), Ok("k"));
        assert_eq!(of(&[("x-api-key", "k")]).as_deref(), Ok("k"));
        assert_eq!(of(&[("authorization", "k"), ("x-api-key", "l")]), Err(GrantDenial::Ambiguous));
        assert_eq!(of(&[("x-key", "k")]), Err(GrantDenial::NoKey));
    }

    #[test]
    fn a_key_in_a_url_is_refused_by_name_by_form_and_without_repeating_it() {
        for uri in [
            "/v1/ingest/a?key=x",
            "/v1/ingest/a?API_KEY=x",
            "/v1/ingest/a?b=c&access_token=x",
            "/v1/ingest/a?b=hgk_secret",
            "/v1/ingest/a?b=%68gk_secret",
            "/v1/ingest/a?hgk_secret",
            "/v1/ingest/hgk_secret",
            "/v1/datasources/a/series?key=hgk_secret",
            "/v1/datasources/a/series?API_KEY=x",
            "/v1/datasources/a/records?key=x",
            "/v1/datasources/a/stream?access_token=x",
            "/v1/datasources/a/stream?access_token=hgk_secret",
            "/v1/datasources/a/stream?access_token=hgt_hgk_secret",
            "/v1/datasources/a/stream?access_token=hgt_x&access_token=hgt_secret",
            "/v1/datasources/a/stream?ACCESS_TOKEN=hgt_secret",
            "/v1/datasources/a/stream?token=hgt_secret",
            "/v1/datasources/a/stream?topic=hgt_secret0123456789012345678901",
            "/v1/datasources/a/records?access_token=hgt_secret",
            "/v1/datasources/a/b/stream?access_token=hgt_secret",
            "/v1/datasources//stream?access_token=hgt_secret",
            "/v1/ingest/hgt_secret0123456789012345678901",
        ] {
            let problem = refuse_key_in_url(&Uri::from_static(uri)).expect_err(uri);
            assert_eq!(problem.kind(), ProblemKind::KeyInUrl);
            assert!(!format!("{problem:?}").contains("secret"));
        }
        for uri in [
            "/v1/ingest/a",
            "/v1/datasources/a/records?key_id=0123456789ab&topic=key",
            "/v1/datasources/a/series?topic=t&key=temp",
            "/v1/datasources/a/series?topic=hgt_cm&key=temp",
            "/v1/datasources/a/stream?topic=t&access_token=hgt_x",
            "/v1/datasources/a/stream?access_token=%68gt_x",
        ] {
            assert!(refuse_key_in_url(&Uri::from_static(uri)).is_ok(), "{uri}");
        }
    }

    #[test]
    fn a_stream_takes_a_token_in_its_url_and_nothing_else_does() {
        let of = |uri| token_in_url(&Uri::from_static(uri));
        assert_eq!(of("/v1/datasources/a/stream?topic=t&access_token=hgt_x").as_deref(), Some("hgt_x"));
        assert_eq!(of("/v1/datasources/a/stream?access_token=%68gt_x").as_deref(), Some("hgt_x"));
        for uri in [
            "/v1/datasources/a/stream",
            "/v1/datasources/a/records?access_token=hgt_x",
            "/?access_token=hgt_x",
        ] {
            assert_eq!(of(uri), None, "{uri}");
        }
    }
}
