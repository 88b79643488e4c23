//! Where an MQTT client presents its key: user name, password, or an MQTT 5 user property of a
//! CONNECT (for the connection) or a PUBLISH (for that message).

use super::codec::Connect;
use super::codec::properties::Properties;
use crate::auth::{Authorizer, Denied, Grant};

/// What an API key begins with: a user name without it is a name.
const KEY_PREFIX: &[u8] = b"hgk_";

/// Whether a user property carries a key. Its value is a secret then.
pub(super) fn is_key_property(name: &str) -> bool {
    name.eq_ignore_ascii_case("authorization") || name.eq_ignore_ascii_case("x-api-key")
}

/// The keys among user properties.
pub(super) fn key_properties<'a>(properties: &Properties<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    properties.user().filter(|(name, _)| is_key_property(name)).map(|(_, value)| bare(value).as_bytes())
}

/// The grant of the key that a CONNECT presents.
///
/// # Errors
/// [`Denied::Ambiguous`] for two different keys, [`Denied::NoKey`] for none, and whatever the
/// authorizer says of the one there is.
pub(super) fn of_connect(connect: &Connect<'_>, authorizer: &Authorizer) -> Result<Grant, Denied> {
    let username = connect.username.map(str::as_bytes);
    let named = username.into_iter().chain(connect.password).filter(|text| !text.trim_ascii().is_empty());
    let presented: Vec<&[u8]> = named.chain(key_properties(&connect.properties)).collect();
    // Next to a key, what does not look like one is a name or a password for somebody else.
    let keys = || presented.iter().copied().filter(|text| text.trim_ascii_start().starts_with(KEY_PREFIX));
    match keys().next().or(presented.first().copied()) {
        None => Err(Denied::NoKey),
        Some(key) if keys().any(|other| other.trim_ascii() != key.trim_ascii()) => Err(Denied::Ambiguous),
        Some(key) => authorizer.identify(key),
    }
}

/// The grant of the key that a PUBLISH presents for itself, if it presents one.
///
/// # Errors
/// As [`of_connect`].
pub(super) fn of_publish(
    properties: &Properties<'_>,
    authorizer: &Authorizer,
) -> Result<Option<Grant>, Denied> {
    let mut keys = key_properties(properties);
    let Some(key) = keys.next() else { return Ok(None) };
    if keys.any(|other| other.trim_ascii() != key.trim_ascii()) {
        return Err(Denied::Ambiguous);
    }
    authorizer.identify(key).map(Some)
}

/// The key in the value of an `authorization` property: with or without a scheme in front.
fn bare(value: &str) -> &str {
    let value = value.trim();
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key,
        _ => value,
    }
}
