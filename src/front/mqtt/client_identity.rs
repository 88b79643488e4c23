//! The identity of a connected client: what a refusal and the record of a key's use say about it.

use std::net::IpAddr;
use std::sync::Arc;

use crate::auth::Grant;
use crate::auth::usage::KeyClient;
use crate::observe::refusals::RefusalNote;

/// The connected client, as a refusal reports it.
#[derive(Debug)]
pub(super) struct ClientIdentity {
    pub(super) address: IpAddr,
    /// The client identifier.
    pub(super) client: Arc<str>,
    /// The same, as the record of a key's use has it.
    pub(super) user: Arc<KeyClient>,
    /// It says that it is the bridge of another broker.
    pub(super) is_bridge: bool,
}

impl ClientIdentity {
    /// Adds the client's identity to the note of a refusal.
    pub(super) fn note<'a>(&'a self, grant: &'a Grant, note: RefusalNote<'a>) -> RefusalNote<'a> {
        RefusalNote {
            address: Some(self.address),
            client: &self.client,
            datasource: grant.datasource().as_str(),
            key_id: Some(grant.key_id()),
            ..note
        }
    }
}
