//! Auth callout: nats-server asks whether a client may connect, and this answers.
//!
//! A server whose configuration has an `auth_callout` sends a request to one account, on
//! `$SYS.REQ.USER.AUTH`, for each client that is not a user of the configuration. The request says who
//! asks and what it presents; the answer, signed with the seed of the configured issuer, is a no with a
//! reason, or a user: the account it is put in, its name, what it may publish and subscribe, and until
//! when. Both are JSON Web Tokens of NATS' own kind ([`jwt`]), and may be encrypted with curve keys.
//!
//! [`Callout`] does all of that and decides nothing: a [`Doorman`] does. **A request holds what the
//! client presents: nothing here logs it, and `Debug` does not show it.**

mod jwt;
mod seeds;
mod service;

use std::fmt;

pub use jwt::RequestError;
pub use seeds::Seeds;
pub use service::{Callout, CalloutError};

/// Decides who may connect.
pub trait Doorman: Send + Sync + 'static {
    /// Whether the visitor may come in. It is answered while the client waits: this does not block.
    fn judge(&self, visitor: &Visitor) -> Verdict;
}

/// A client that wants to connect.
pub struct Visitor {
    /// The user name that it presents, or empty. With a token it is empty.
    pub user: String,
    /// The password, or empty.
    pub password: String,
    /// The token, or empty.
    pub token: String,
    /// The address that it connects from, as the server sees it.
    pub host: String,
    /// What it is: a client that speaks `nats`, `mqtt` or `websocket`; or a `leafnode`, a server. Whoever
    /// decides has to look at it: nats-server 2.15 does not hold the user of an answer against the
    /// connection types that it may have.
    pub kind: String,
    /// What it calls itself: the name of a NATS connection, the client identifier of MQTT; or empty.
    pub name: String,
    /// The server that it connects to, by its public key.
    pub server_id: String,
    /// The connection's number in that server.
    pub client_id: u64,
}

impl fmt::Debug for Visitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the name either: it is whatever the client says, even a secret.
        f.debug_struct("Visitor")
            .field("host", &self.host)
            .field("kind", &self.kind)
            .field("server_id", &self.server_id)
            .field("client_id", &self.client_id)
            .finish_non_exhaustive()
    }
}

/// What becomes of a visitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is let in.
    Allow(Permit),
    /// It is not. The text stands in the server's log; the client is told no reason.
    Deny(String),
}

/// What a client that is let in may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    /// What it is called from now on, instead of what it presented: in the server's log and monitoring, and
    /// in what the server attests of its messages. Never empty.
    pub name: String,
    /// Subjects that it may publish to, `*` and `>` allowed.
    pub publish: Vec<String>,
    /// Subjects that it may subscribe to.
    pub subscribe: Vec<String>,
    /// When the server disconnects it, in seconds since 1970.
    pub expires_at_s: i64,
    /// How many subscriptions it may have.
    pub subscriptions_max: u32,
}
