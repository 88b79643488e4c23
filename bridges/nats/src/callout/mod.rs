//! Auth callout: nats-server asks whether a client may connect, and this answers.
//!
//! A server whose configuration has an `auth_callout` sends a request for each client that is not a user of
//! that configuration, on `$SYS.REQ.USER.AUTH` in one account. The request says who the client is and what
//! it presents. The answer is signed with the seed of the configured issuer. It is a denial with a reason, or
//! a user: its account, name, permissions and expiry. Both are NATS' kind of JSON Web Token ([`jwt`]), and
//! may be encrypted with curve keys.
//!
//! [`CalloutService`] does all of that and leaves the decision to a [`CalloutAuthorizer`]. **A request holds
//! the secret that the client presents: nothing here logs it, and `Debug` does not show it.**

mod jwt;
mod seeds;
mod service;

use std::fmt;

pub use jwt::CalloutRequestError;
pub use seeds::CalloutSeeds;
pub use service::{CalloutSeedError, CalloutService};

/// Decides who may connect.
pub trait CalloutAuthorizer: Send + Sync + 'static {
    /// Decides whether the client may connect. The client waits for it, so it must not block.
    fn judge(&self, visitor: &ConnectingClient) -> CalloutVerdict;
}

/// A client that wants to connect.
pub struct ConnectingClient {
    /// The user name that it presents; empty if none, or with a token.
    pub user: String,
    /// The password, or empty.
    pub password: String,
    /// The token, or empty.
    pub token: String,
    /// The address that it connects from, as the server sees it.
    pub host: String,
    /// What it is: a client that speaks `nats`, `mqtt` or `websocket`, or a server (`leafnode`). The
    /// [`CalloutAuthorizer`] has to check it: nats-server 2.15 does not enforce the allowed connection types of the
    /// user in an answer.
    pub kind: String,
    /// Its own name: that of a NATS connection, or the MQTT client identifier; or empty.
    pub name: String,
    /// The server that it connects to, by its public key.
    pub server_id: String,
    /// The connection's number in that server.
    pub client_id: u64,
}

impl fmt::Debug for ConnectingClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the name either: a client may have put its secret there.
        f.debug_struct("ConnectingClient")
            .field("host", &self.host)
            .field("kind", &self.kind)
            .field("server_id", &self.server_id)
            .field("client_id", &self.client_id)
            .finish_non_exhaustive()
    }
}

/// The decision about a connecting client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CalloutVerdict {
    /// It may connect.
    Allow(ClientPermit),
    /// It may not. The text goes to the server's log; the client is told no reason.
    Deny(String),
}

/// What an admitted client may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientPermit {
    /// The name that replaces what it presented, in the server's log and monitoring and in what the server
    /// attests of its messages. Never empty.
    pub name: String,
    /// Subjects that it may publish to, `*` and `>` allowed.
    pub publish: Vec<String>,
    /// Subjects that it may subscribe to.
    pub subscribe: Vec<String>,
    /// Of these, the ones that it may not subscribe to; a subject and a queue group with a space between is such a group.
    pub deny_subscribe: Vec<String>,
    /// When the server disconnects it, in seconds since 1970.
    pub expires_at_s: i64,
    /// How many subscriptions it may have.
    pub subscriptions_max: u32,
}
