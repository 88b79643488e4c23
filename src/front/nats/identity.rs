//! The grant of a message: that of the key in one of its headers, or of the key that the server attests.

use headgate_bridge_nats::inlet::Parcel;

use super::attested::{Attestation, AttestedSender};
use crate::auth::{Authorizer, Grant, GrantDenial, RejectedKey};
use crate::front::credentials::{key_in_header, one_key};

/// The grant of the key that a message carries. Without a key, and with an `attestation`, the grant of the
/// key that its sender was admitted with. No other header is trusted.
///
/// # Errors
/// [`GrantDenial::NoKey`], [`GrantDenial::Ambiguous`] for two different keys, and the authorizer's denial of a single
/// key. None of them counts toward an address's failure limit, since the address is not known.
pub(super) fn grant_of_parcel(
    parcel: &Parcel,
    authorizer: &Authorizer,
    attestation: Option<&Attestation>,
) -> Result<Grant, RejectedKey> {
    let presented = parcel.headers().filter_map(|(name, value)| key_in_header(name, value.as_bytes()));
    match one_key(presented) {
        Ok(key) => authorizer.identify_from(key, None),
        Err(GrantDenial::Ambiguous) => Err(authorizer.reject_ambiguous(None)),
        Err(GrantDenial::NoKey) => {
            let sender = attestation.and_then(|attestation| attestation.sender(parcel.headers()));
            let Some(AttestedSender { datasource, key_id, .. }) = sender else {
                return Err(GrantDenial::NoKey.into());
            };
            authorizer
                .grant_of_key(&datasource, key_id)
                .map_err(|denied| RejectedKey { key_id: Some(key_id), ..denied.into() })
        }
        Err(denied) => Err(denied.into()),
    }
}
