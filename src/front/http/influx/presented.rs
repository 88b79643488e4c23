//! The API key as clients of InfluxDB present it: `Authorization: Token KEY` (2.x), or the password of HTTP Basic, whatever
//! the user name (1.x). The usual forms are taken too. In the URL (`p=KEY`), where 1.x clients may be told to put it, a key
//! is refused as in every other URL: those are kept in logs on the way.

use std::borrow::Cow;

use axum::http::HeaderMap;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::auth::GrantDenial;
use crate::front::credentials::{self, AUTHORIZATION_HEADER, X_API_KEY_HEADER};
use crate::limits::PRESENTED_KEY_BYTES_MAX;

/// The one key that the headers carry.
pub(super) fn influx_key(headers: &HeaderMap) -> Result<Vec<u8>, GrantDenial> {
    let authorization =
        headers.get_all(AUTHORIZATION_HEADER).iter().map(|value| in_authorization(value.as_bytes()));
    let others = headers.get_all(X_API_KEY_HEADER).iter();
    let others = others.filter_map(|value| credentials::key_in_header(X_API_KEY_HEADER, value.as_bytes()));
    let keys: Vec<Cow<'_, [u8]>> = authorization.chain(others.map(Cow::Borrowed)).collect();
    credentials::one_key(keys.iter().map(|key| &**key)).map(<[u8]>::to_vec)
}

fn in_authorization(value: &[u8]) -> Cow<'_, [u8]> {
    let value = value.trim_ascii();
    if let Some(token) = behind_scheme(value, b"token") {
        return Cow::Borrowed(token);
    }
    let usual = || Cow::Borrowed(credentials::key_in_header(AUTHORIZATION_HEADER, value).unwrap_or_default());
    // Longer ones hold no key.
    let of_basic =
        behind_scheme(value, b"basic").filter(|encoded| encoded.len() <= 4 * PRESENTED_KEY_BYTES_MAX);
    let Some(decoded) = of_basic.and_then(|encoded| BASE64_STANDARD.decode(encoded).ok()) else {
        return usual();
    };
    match decoded.iter().position(|&b| b == b':') {
        Some(colon) => Cow::Owned(decoded[colon + 1..].to_vec()),
        None => usual(),
    }
}

/// What stands behind the name of a scheme, in any case (RFC 9110, section 11.1).
fn behind_scheme<'a>(value: &'a [u8], scheme: &[u8]) -> Option<&'a [u8]> {
    let (name, rest) = value.split_at_checked(scheme.len())?;
    let is_it = name.eq_ignore_ascii_case(scheme) && matches!(rest.first(), Some(b' ' | b'\t'));
    is_it.then(|| rest.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[(&'static str, &str)]) -> Result<String, GrantDenial> {
        let values = values.iter().map(|(name, value)| {
            let name = axum::http::HeaderName::from_static(name);
            (name, value.parse().expect("a header value"))
        });
        influx_key(&values.collect()).map(|key| String::from_utf8_lossy(&key).into_owned())
    }

    fn basic(text: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(text))
    }

    #[test]
    fn a_key_is_the_token_the_password_or_what_it_is_elsewhere() {
        for value in ["Token k", "token   k ", "Bearer k", "k"] {
            assert_eq!(of(&[("authorization", value)]).as_deref(), Ok("k"), "{value}");
        }
        assert_eq!(of(&[("x-api-key", "k")]).as_deref(), Ok("k"));
        for (pair, key) in [("user:k", "k"), (":k", "k"), ("user:a:b", "a:b")] {
            assert_eq!(of(&[("authorization", &basic(pair))]).as_deref(), Ok(key), "{pair}");
        }
        assert_eq!(of(&[("authorization", &basic("user:k")), ("x-api-key", "k")]).as_deref(), Ok("k"));
    }

    #[test]
    fn what_is_no_key_is_none() {
        assert_eq!(of(&[]), Err(GrantDenial::NoKey));
        assert_eq!(of(&[("authorization", &basic("user:"))]), Err(GrantDenial::NoKey));
        assert_eq!(of(&[("authorization", "Token k"), ("x-api-key", "l")]), Err(GrantDenial::Ambiguous));
        // Neither is found among those that were given out.
        for value in ["Basic", "Basic ???", &basic("no colon"), "Tokenk"] {
            assert_eq!(of(&[("authorization", value)]).as_deref(), Ok(value));
        }
        let long = basic(&format!("u:{}", "k".repeat(5 * PRESENTED_KEY_BYTES_MAX)));
        assert_eq!(of(&[("authorization", &long)]), Err(GrantDenial::Malformed));
    }
}
