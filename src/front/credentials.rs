//! The API key among the headers of an HTTP request or a NATS message, or among the user properties of an
//! MQTT 5 packet. Every front reads it here, so that each accepts the same forms.

use crate::auth::GrantDenial;
use crate::limits::PRESENTED_KEY_BYTES_MAX;

/// The standard header that carries a key.
pub(super) const AUTHORIZATION_HEADER: &str = "authorization";
/// The alternative header that carries a key.
pub(super) const X_API_KEY_HEADER: &str = "x-api-key";

/// Whether a header or user property carries a key, so that its value is a secret. Case does not matter.
pub(super) fn is_key_header(name: &str) -> bool {
    name.eq_ignore_ascii_case(AUTHORIZATION_HEADER) || name.eq_ignore_ascii_case(X_API_KEY_HEADER)
}

/// The key that a header or user property presents, or `None` if it is none that carries a key.
///
/// | `authorization` or `x-api-key` | key |
/// |---|---|
/// | `KEY`, with white space around it | `KEY` |
/// | `Bearer KEY`, the scheme in any case (RFC 9110, 11.1), white space between | `KEY` |
/// | `bearerKEY` | `bearerKEY`: a key that begins with the letters of the scheme |
/// | nothing, or `Bearer` alone | empty: an unset shell variable leaves that behind |
/// | another scheme, `Basic x` | `Basic x`, which is no key |
pub(super) fn key_in_header<'a>(name: &str, value: &'a [u8]) -> Option<&'a [u8]> {
    is_key_header(name).then(|| {
        let value = value.trim_ascii();
        match value.split_at_checked(6) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer") => match key {
                [] => key,
                [b' ' | b'\t', ..] => key.trim_ascii_start(),
                _ => value,
            },
            _ => value,
        }
    })
}

/// The one key among those that headers present. The same key twice counts as one. An empty value counts
/// as no key: an unset shell variable leaves one behind.
///
/// # Errors
/// [`GrantDenial::NoKey`], [`GrantDenial::Ambiguous`] for two different keys, and [`GrantDenial::Malformed`] for a key
/// over [`PRESENTED_KEY_BYTES_MAX`].
pub(super) fn one_key<'a>(keys: impl Iterator<Item = &'a [u8]>) -> Result<&'a [u8], GrantDenial> {
    let mut keys = keys.filter(|key| !key.is_empty());
    let key = keys.next().ok_or(GrantDenial::NoKey)?;
    if keys.any(|other| other != key) {
        return Err(GrantDenial::Ambiguous);
    }
    if key.len() > PRESENTED_KEY_BYTES_MAX {
        return Err(GrantDenial::Malformed);
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&str, &str)]) -> Result<String, GrantDenial> {
        let keys = headers.iter().filter_map(|(name, value)| key_in_header(name, value.as_bytes()));
        one_key(keys).map(|key| String::from_utf8_lossy(key).into_owned())
    }

    #[test]
    fn each_form_of_a_key_is_accepted_in_both_headers() {
        for (value, key) in [
            ("k", "k"),
            (" k\t", "k"),
            ("Bearer k", "k"),
            ("bEARER   k ", "k"),
            ("Bearer\tk", "k"),
            ("bearerk", "bearerk"),
            ("Bearer", ""),
            ("bearer ", ""),
            ("", ""),
            (" ", ""),
            ("Basic x", "Basic x"),
        ] {
            for name in ["authorization", "Authorization", "AUTHORIZATION", "x-api-key", "X-API-Key"] {
                assert_eq!(key_in_header(name, value.as_bytes()), Some(key.as_bytes()), "{name}: {value:?}");
            }
        }
        for name in ["x-api-keys", "key", "proxy-authorization", ""] {
            assert_eq!(key_in_header(name, b"k"), None, "{name}");
        }
    }

    #[test]
    fn the_same_key_twice_is_one_key_and_two_keys_are_refused() {
        let twice = [("authorization", "Bearer k"), ("x-api-key", "k")];
        assert_eq!(of(&twice).as_deref(), Ok("k"));
        for two in
            [[("authorization", "Bearer k"), ("x-api-key", "l")], [("x-api-key", "k"), ("x-api-key", "l")]]
        {
            assert_eq!(of(&two), Err(GrantDenial::Ambiguous), "{two:?}");
        }
    }

    #[test]
    fn an_empty_header_is_no_key() {
        for header in [("authorization", ""), ("authorization", "Bearer"), ("authorization", "Bearer ")] {
            assert_eq!(of(&[header]), Err(GrantDenial::NoKey), "{header:?}");
        }
        assert_eq!(of(&[]), Err(GrantDenial::NoKey));
        assert_eq!(of(&[("authorization", " "), ("x-api-key", "k")]).as_deref(), Ok("k"));
    }

    #[test]
    fn a_presented_key_is_bounded() {
        let key = |bytes| of(&[("authorization", &"k".repeat(bytes))]).map(|key| key.len());
        assert_eq!(key(PRESENTED_KEY_BYTES_MAX), Ok(PRESENTED_KEY_BYTES_MAX));
        assert_eq!(key(PRESENTED_KEY_BYTES_MAX + 1), Err(GrantDenial::Malformed));
    }
}
