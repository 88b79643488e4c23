//! Credentials: the API key that a request carries, in `Authorization` or `X-API-Key`, and the
//! [`Caller`] that it makes the request come from. A handler that takes a `Caller` runs only for a
//! key that is good at this moment, and before any of the body has been read.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Query};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri};

use super::Shared;
use super::problem::{Kind, Problem};
use crate::auth::{Denied, Grant, Scope};
use crate::limits::PRESENTED_KEY_BYTES_MAX;

/// The other header that a key may stand in.
const X_API_KEY: &str = "x-api-key";

/// Names of query parameters that are only ever given to carry a secret.
const KEY_PARAMETERS: [&str; 7] =
    ["key", "api_key", "apikey", "token", "access_token", "authorization", "x-api-key"];

/// What every key begins with; anywhere in a query string it gives a key away.
const KEY_PREFIX: &str = "hgk_";

/// Who a request comes from: the grant of the key that it carries.
pub(super) struct Caller(pub(super) Grant);

impl Caller {
    /// Lets the caller do `scope` in `datasource`, or says why not.
    pub(super) fn may(&self, scope: Scope, datasource: &str) -> Result<(), Problem> {
        Ok(self.0.allows(scope, datasource)?)
    }

    /// Lets the caller manage what belongs to no single datasource, or says why not. The caller has
    /// named no datasource here, so there is none whose existence could be kept from it.
    pub(super) fn may_manage_all(&self) -> Result<(), Problem> {
        self.0.has(Scope::Admin)?;
        match self.0.datasource().is_all() {
            true => Ok(()),
            false => Err(Problem::one_datasource(self.0.key_id())),
        }
    }
}

impl FromRequestParts<Arc<Shared>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, Problem> {
        let key = presented(&parts.headers)?;
        Ok(Self(shared.parts.intake.authorizer().identify(key)?))
    }
}

/// The one key that the headers carry. The same key twice is one key.
fn presented(headers: &HeaderMap) -> Result<&[u8], Denied> {
    let authorization = headers.get_all(AUTHORIZATION).iter().map(|value| bearer(value.as_bytes()));
    let x_api_key = headers.get_all(X_API_KEY).iter().map(|value| value.as_bytes().trim_ascii());
    // An empty value is what an unset variable leaves behind: no key.
    let mut keys = authorization.chain(x_api_key).filter(|key| !key.is_empty());
    let key = keys.next().ok_or(Denied::NoKey)?;
    if keys.any(|other| other != key) {
        return Err(Denied::Ambiguous);
    }
    if key.len() > PRESENTED_KEY_BYTES_MAX {
        return Err(Denied::Malformed);
    }
    Ok(key)
}

/// `KEY` and `Bearer KEY` are both the key; a scheme is written in any case (RFC 9110, 11.1).
fn bearer(value: &[u8]) -> &[u8] {
    let value = value.trim_ascii();
    match value.split_at_checked(6) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer") => match key {
            [] => key,
            [b' ' | b'\t', ..] => key.trim_ascii_start(),
            _ => value,
        },
        _ => value,
    }
}

/// Refuses a URL that carries what is, or is meant to be, an API key. URLs end up in the logs of
/// every proxy on the way, so that such a key has to be taken for known.
pub(super) fn refuse_in_url(uri: &Uri) -> Result<(), Problem> {
    let Ok(Query(pairs)) = Query::<Vec<(String, String)>>::try_from_uri(uri) else {
        return Ok(()); // Cannot be taken apart: whoever reads the parameters will say so.
    };
    let is_key = |(name, value): &(String, String)| {
        KEY_PARAMETERS.iter().any(|parameter| name.eq_ignore_ascii_case(parameter))
            || name.contains(KEY_PREFIX)
            || value.contains(KEY_PREFIX)
    };
    if pairs.iter().any(is_key) || uri.path().contains(KEY_PREFIX) {
        return Err(Problem::new(
            Kind::KeyInUrl,
            "Send the API key in a header, 'Authorization: Bearer KEY'. If the one in this URL is real, \
             replace it: URLs are kept in logs on the way.",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&'static str, &'static str)]) -> Result<String, Denied> {
        let headers = headers.iter().map(|(name, value)| {
            let name = axum::http::HeaderName::from_static(name);
            (name, axum::http::HeaderValue::from_static(value))
        });
        presented(&headers.collect()).map(|key| String::from_utf8_lossy(key).into_owned())
    }

    #[test]
    fn a_key_may_stand_in_three_places() {
        for header in [
            ("authorization", "k"),
            ("authorization", "Bearer k"),
            ("authorization", "bEARER   k "),
            ("authorization", "Bearer\tk"),
            ("x-api-key", " k "),
        ] {
            assert_eq!(of(&[header]).as_deref(), Ok("k"), "{header:?}");
        }
        // A key that begins with the letters of a scheme is still a key.
        assert_eq!(of(&[("authorization", "bearerk")]).as_deref(), Ok("bearerk"));
    }

    #[test]
    fn the_same_key_twice_is_one_key_and_two_keys_are_refused() {
        let twice = [("authorization", "Bearer k"), ("x-api-key", "k")];
        assert_eq!(of(&twice).as_deref(), Ok("k"));
        for two in
            [[("authorization", "Bearer k"), ("x-api-key", "l")], [("x-api-key", "k"), ("x-api-key", "l")]]
        {
            assert_eq!(of(&two), Err(Denied::Ambiguous), "{two:?}");
        }
    }

    #[test]
    fn an_empty_header_is_no_key() {
        for header in [("authorization", ""), ("authorization", "Bearer"), ("authorization", "Bearer ")] {
            assert_eq!(of(&[header]), Err(Denied::NoKey), "{header:?}");
        }
        assert_eq!(of(&[]), Err(Denied::NoKey));
        assert_eq!(of(&[("authorization", " "), ("x-api-key", "k")]).as_deref(), Ok("k"));
    }

    #[test]
    fn a_presented_key_is_bounded() {
        let key = |bytes| {
            let value = axum::http::HeaderValue::from_str(&"k".repeat(bytes)).expect("letters");
            let headers = [(AUTHORIZATION, value)].into_iter().collect();
            presented(&headers).map(<[u8]>::len)
        };
        assert_eq!(key(PRESENTED_KEY_BYTES_MAX), Ok(PRESENTED_KEY_BYTES_MAX));
        assert_eq!(key(PRESENTED_KEY_BYTES_MAX + 1), Err(Denied::Malformed));
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
        ] {
            let problem = refuse_in_url(&Uri::from_static(uri)).expect_err(uri);
            assert_eq!(problem.kind(), Kind::KeyInUrl);
            assert!(!format!("{problem:?}").contains("secret"));
        }
        for uri in ["/v1/ingest/a", "/v1/datasources/a/records?key_id=0123456789ab&topic=key"] {
            assert!(refuse_in_url(&Uri::from_static(uri)).is_ok(), "{uri}");
        }
    }
}
