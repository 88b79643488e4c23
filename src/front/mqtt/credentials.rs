//! Where an MQTT client presents its key: user name, password, or an MQTT 5 user property of a
//! CONNECT (for the connection) or a PUBLISH (for that message).

use std::net::IpAddr;

use super::codec::ConnectPacket;
use super::codec::properties::Properties;
use crate::auth::{Authorizer, Grant, RejectedKey};
use crate::front::credentials::key_in_header;

/// The keys in the user properties.
fn key_properties<'a>(properties: &Properties<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    properties.user().filter_map(|(name, value)| key_in_header(name, value.as_bytes()))
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
    if keys.any(|other| other != key) {
        return Err(authorizer.reject_ambiguous(from));
    }
    authorizer.identify_from(key, from).map(Some)
}
