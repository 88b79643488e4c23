//! Who a message is from that carries no key: the key id that a nats-server attests.
//!
//! A client that was let in with its key (see `callout.rs`) is called after the key from then on, by a
//! name that this module makes and reads back. It publishes in an account of its own, which imports the
//! subject of ingest from the gateways' account with `share: true`. As a message passes that import, the
//! server puts who has sent it into the header `Nats-Request-Info`, and removes whatever the client may
//! have put there itself. So on the gateways' side of the import, and there alone, the header is the
//! server's word: in any other account a client could write it.
//!
//! The gateways' account is therefore closed to everybody else. It has to be anyway: the requests of auth
//! callout, which come to it, hold keys.

use std::net::IpAddr;

use serde::Deserialize;

use crate::auth::Key;
use crate::message::{DatasourceId, KeyId};

/// Where a server says who has sent what came through a service import (nats-server's `ClientInfoHdr`).
const REQUEST_INFO: &str = "Nats-Request-Info";

/// What servers attest on a connection on which they do.
#[derive(Debug, Clone)]
pub struct Attestation {
    /// The account of those who were let in with a key.
    account: Box<str>,
}

/// Who has sent a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sender {
    /// The datasource of its key, or `*`.
    pub datasource: DatasourceId,
    /// Its key. It may be dead by now.
    pub key_id: KeyId,
    /// Where it is connected from.
    pub address: Option<IpAddr>,
}

/// Of the header's JSON, what is needed.
#[derive(Deserialize)]
struct RequestInfo<'a> {
    #[serde(borrow)]
    acc: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    user: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    host: std::borrow::Cow<'a, str>,
}

impl Attestation {
    /// Of clients in this account, for messages that have come in over a connection whose account nobody
    /// but gateways and servers can publish in.
    pub fn of_account(account: &str) -> Self {
        Self { account: account.into() }
    }

    /// Who has sent the message with these headers. `None` if no server says so: it came from another
    /// account, from a user of the server's configuration, or not through an import at all.
    pub(super) fn sender<'a>(&self, headers: impl Iterator<Item = (&'a str, &'a str)>) -> Option<Sender> {
        // Servers write it in this spelling, once. Another spelling is another header, and the client's; two
        // would be one of them not from the server.
        let mut said = headers.filter(|(name, _)| *name == REQUEST_INFO);
        let (Some((_, said)), None) = (said.next(), said.next()) else { return None };
        let info: RequestInfo<'_> = serde_json::from_str(said).ok()?;
        if *info.acc != *self.account {
            return None;
        }
        let (datasource, key_id) = key_of(&info.user)?;
        Some(Sender { datasource, key_id, address: info.host.parse().ok() })
    }
}

/// What a client with this key is called in NATS: `press-4/0123456789ab`. No user of the servers'
/// configuration should have such a name.
pub(super) fn name_of(key: &Key) -> String {
    format!("{}/{}", key.datasource, key.id)
}

/// The key that a client is called after, and its datasource.
pub(super) fn key_of(name: &str) -> Option<(DatasourceId, KeyId)> {
    let (datasource, key_id) = name.split_once('/')?;
    let all = DatasourceId::all();
    let datasource = if datasource == all.as_str() { all } else { DatasourceId::new(datasource).ok()? };
    Some((datasource, KeyId::parse(key_id).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = r#"{"start":"2026-11-26T01:11:05.773213057Z","host":"203.0.113.9","id":10,"acc":"APP",
        "user":"press-4/0123456789ab","lang":"python3","rtt":282330,"server":"n1","kind":"Client"}"#;

    fn sender(headers: &[(&str, &str)]) -> Option<Sender> {
        Attestation::of_account("APP").sender(headers.iter().copied())
    }

    #[test]
    fn a_sender_is_whom_the_server_names() {
        let expected = Sender {
            datasource: DatasourceId::new("press-4").expect("a slug"),
            key_id: KeyId::parse("0123456789ab").expect("an id"),
            address: Some([203, 0, 113, 9].into()),
        };
        assert_eq!(sender(&[("X", "1"), (REQUEST_INFO, INFO)]), Some(expected));
    }

    #[test]
    fn nobody_else_s_word_counts() {
        assert_eq!(sender(&[]), None);
        assert_eq!(sender(&[("nats-request-info", INFO)]), None);
        assert_eq!(sender(&[(REQUEST_INFO, INFO), (REQUEST_INFO, INFO)]), None);
        assert_eq!(sender(&[(REQUEST_INFO, &INFO.replace("APP", "OTHER"))]), None);
        for user in ["", "reader", "press-4/", "press-4/0123456789AB", "Press/0123456789ab", "a/b/c", "hgk_x"]
        {
            let info = INFO.replace("press-4/0123456789ab", user);
            assert_eq!(sender(&[(REQUEST_INFO, &info)]), None, "{user}");
        }
        assert_eq!(sender(&[(REQUEST_INFO, r#"{"acc":"APP"}"#)]), None);
    }

    #[test]
    fn a_name_is_read_back() {
        let (datasource, key_id) = key_of("*/0123456789ab").expect("a key for all datasources");
        assert!(datasource.is_all());
        assert_eq!(key_id.to_string(), "0123456789ab");
    }
}
