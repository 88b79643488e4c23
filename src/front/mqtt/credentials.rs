//! Where an MQTT client presents its key: user name, password, or an MQTT 5 user property of a
//! CONNECT (for the connection) or a PUBLISH (for that message).

use std::net::IpAddr;

use super::codec::ConnectPacket;
use super::codec::properties::Properties;
use crate::auth::{Authorizer, Grant, RejectedKey};

/// Whether a user property carries a key, so that its value is a secret.
pub(super) fn is_key_property(name: &str) -> bool {
    name.eq_ignore_ascii_case("authorization") || name.eq_ignore_ascii_case("x-api-key")
}

/// The keys in the user properties.
pub(super) fn key_properties<'a>(properties: &Properties<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    properties
        .user()
        .filter(|(name, _)| is_key_property(name))
        .map(|(_, value)| without_scheme(value).as_bytes())
}

/// The grant of the key that a CONNECT from the address `from` presents.
///
/// # Errors
/// Those of [`Authorizer::identify_among`].
pub(super) fn grant_of_connect(
    connect: &ConnectPacket<'_>,
    authorizer: &Authorizer,
    from: IpAddr,
) -> Result<Grant, RejectedKey> {
    let username = connect.username.map(str::as_bytes);
    let named = username.into_iter().chain(connect.password);
    let presented: Vec<&[u8]> = named.chain(key_properties(&connect.properties)).collect();
    authorizer.identify_among(&presented, from)
}

/// The grant of the key that a PUBLISH presents for itself, if it presents one.
///
/// # Errors
/// As [`grant_of_connect`].
pub(super) fn grant_of_publish(
    properties: &Properties<'_>,
    authorizer: &Authorizer,
    from: IpAddr,
) -> Result<Option<Grant>, RejectedKey> {
    let mut keys = key_properties(properties);
    let Some(key) = keys.next() else { return Ok(None) };
    if keys.any(|other| other.trim_ascii() != key.trim_ascii()) {
        return Err(authorizer.reject_ambiguous(from));
    }
    authorizer.identify_from(key, from).map(Some)
}

/// The key in an `authorization` property's value, which may begin with a scheme.
fn without_scheme(value: &str) -> &str {
    let value = value.trim();
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key,
        _ => value,
    }
}
