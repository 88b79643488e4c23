//! The grant of a message: that of the key in one of its headers, or of the key that the server attests.

use headgate_bridge_nats::inlet::Parcel;

use super::attested::{Attestation, Sender};
use crate::auth::{Authorizer, Denied, Grant, Rejected};
use crate::front::credentials::{key_in, one_key};

/// The grant of the key that a message carries. Without a key, and with an `attestation`, the grant of the
/// key that its sender was admitted with. No other header is trusted.
///
/// # Errors
/// [`Denied::NoKey`], [`Denied::Ambiguous`] for two different keys, and the authorizer's denial of a single
/// key. None of them counts toward an address's failure limit, since the address is not known.
pub(super) fn of(
    parcel: &Parcel,
    authorizer: &Authorizer,
    attestation: Option<&Attestation>,
) -> Result<Grant, Rejected> {
    let presented = parcel.headers().filter_map(|(name, value)| key_in(name, value.as_bytes()));
    match one_key(presented) {
        Ok(key) => authorizer.identify_from(key, None),
        Err(Denied::Ambiguous) => Err(authorizer.ambiguous_from(None)),
        Err(Denied::NoKey) => {
            let sender = attestation.and_then(|attestation| attestation.sender(parcel.headers()));
            let Some(Sender { datasource, key_id, .. }) = sender else { return Err(Denied::NoKey.into()) };
            authorizer
                .of_key(&datasource, key_id)
                .map_err(|denied| Rejected { key_id: Some(key_id), ..denied.into() })
        }
        Err(denied) => Err(denied.into()),
    }
}
