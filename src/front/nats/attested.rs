//! The sender of a message without a key: the key id that a nats-server attests.
//!
//! A client that was admitted with its key (see `callout.rs`) gets a user name derived from the key; this
//! module makes and parses that name. The client publishes in the clients' account, which imports the ingest
//! subject from the gateways' account with `share: true`.
//!
//! When a message passes that import, the server writes its sender into the header `Nats-Request-Info`, and
//! removes any such header of the client's.
//!
//! So the header can be trusted on the gateways' side of the import, and only there: in any other account a
//! client could write it.
//!
//! The gateways' account is therefore closed to all others. It has to be anyway, because the requests of auth
//! callout arrive there and hold keys.
//!
//! The header's user is the name from the gateway's answer, never the key. The gateway looks up the key by
//! the id in it, so a message under a dead key is refused. A message without a reply subject passes the
//! import just the same. In nats-server the import is `processServiceImport`, which writes the header with
//! `setHeader`.

use std::net::IpAddr;

use serde::Deserialize;

use crate::auth::Key;
use crate::message::{DatasourceId, KeyId};

/// The header in which a server names the sender of a message from a service import (nats-server's
/// `ClientInfoHdr`).
const REQUEST_INFO_HEADER: &str = "Nats-Request-Info";

/// Trust in the senders that servers attest on a connection.
#[derive(Debug, Clone)]
pub struct Attestation {
    /// The account of the clients that were admitted with a key.
    account: Box<str>,
}

/// The attested sender of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AttestedSender {
    /// The datasource of its key, or `*`.
    pub datasource: DatasourceId,
    /// Its key, which may be dead by now.
    pub key_id: KeyId,
    /// The address that it is connected from.
    pub address: Option<IpAddr>,
    /// The name of the server that it is connected to.
    pub server: Box<str>,
    /// The connection's number in that server.
    pub client_id: u64,
}

/// The needed part of the header's JSON.
#[derive(Deserialize)]
struct RequestInfo<'a> {
    #[serde(borrow)]
    acc: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    user: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    host: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    server: std::borrow::Cow<'a, str>,
    #[serde(default)]
    id: u64,
}

impl Attestation {
    /// Trusts the attested clients of `account`. The messages have to come from a connection whose own
    /// account is open to gateways and servers only.
    pub fn of_account(account: &str) -> Self {
        Self { account: account.into() }
    }

    /// The sender of the message with these headers. `None` if no server attests one: the message came from
    /// another account, from a user of the server's configuration, or not through an import.
    pub(super) fn sender<'a>(
        &self,
        headers: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Option<AttestedSender> {
        // A server writes the header once, in this spelling. Another spelling is the client's header, and of
        // two headers one would be.
        let mut said = headers.filter(|(name, _)| *name == REQUEST_INFO_HEADER);
        let (Some((_, said)), None) = (said.next(), said.next()) else { return None };
        let info: RequestInfo<'_> = serde_json::from_str(said).ok()?;
        if *info.acc != *self.account {
            return None;
        }
        let (datasource, key_id) = key_of_nats_user(&info.user)?;
        let (address, server) = (info.host.parse().ok(), info.server.into());
        Some(AttestedSender { datasource, key_id, address, server, client_id: info.id })
    }
}

/// The NATS user name of a client with this key: `press-4/0123456789ab`. No user of the servers'
/// configuration should have such a name.
pub(super) fn nats_user_of_key(key: &Key) -> String {
    format!("{}/{}", key.datasource, key.id)
}

/// The datasource and key id in a NATS user name; the inverse of [`nats_user_of_key`].
pub(super) fn key_of_nats_user(name: &str) -> Option<(DatasourceId, KeyId)> {
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

    fn sender(headers: &[(&str, &str)]) -> Option<AttestedSender> {
        Attestation::of_account("APP").sender(headers.iter().copied())
    }

    #[test]
    fn a_sender_is_whom_the_server_names() {
        let expected = AttestedSender {
            datasource: DatasourceId::new("press-4").expect("a slug"),
            key_id: KeyId::parse("0123456789ab").expect("an id"),
            address: Some([203, 0, 113, 9].into()),
            server: "n1".into(),
            client_id: 10,
        };
        assert_eq!(sender(&[("X", "1"), (REQUEST_INFO_HEADER, INFO)]), Some(expected));
    }

    #[test]
    fn nobody_else_s_word_counts() {
        assert_eq!(sender(&[]), None);
        assert_eq!(sender(&[("nats-request-info", INFO)]), None);
        assert_eq!(sender(&[(REQUEST_INFO_HEADER, INFO), (REQUEST_INFO_HEADER, INFO)]), None);
        assert_eq!(sender(&[(REQUEST_INFO_HEADER, &INFO.replace("APP", "OTHER"))]), None);
        for user in ["", "reader", "press-4/", "press-4/0123456789AB", "Press/0123456789ab", "a/b/c", "hgk_x"]
        {
            let info = INFO.replace("press-4/0123456789ab", user);
            assert_eq!(sender(&[(REQUEST_INFO_HEADER, &info)]), None, "{user}");
        }
        assert_eq!(sender(&[(REQUEST_INFO_HEADER, r#"{"acc":"APP"}"#)]), None);
    }

    #[test]
    fn a_name_is_read_back() {
        let (datasource, key_id) = key_of_nats_user("*/0123456789ab").expect("a key for all datasources");
        assert!(datasource.is_all());
        assert_eq!(key_id.to_string(), "0123456789ab");
    }
}
