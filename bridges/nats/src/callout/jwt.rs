//! The tokens of auth callout: reads requests and checks their signatures, writes and signs
//! answers. A token is `header.claims.signature`, each in base64url without padding; the signature is
//! ed25519 over the first two, by the key that the claims name as `iss` (nkeys; see nats-io/jwt, v2).
//!
//! A request is checked for its form, its expiry, and the signature of the server that it names. This module
//! does not know which servers are genuine. So anyone who can publish in the account of the requests can ask
//! whether a key is good. They learn nothing else: the answer is valid only for the named server and the
//! one-time key of the request.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::{KeyPair, KeyPairType};
use serde::Deserialize;
use serde_json::json;

use super::{ClientPermit, ConnectingClient};

/// The header of every token that this module writes.
const JWT_HEADER: &str = r#"{"typ":"JWT","alg":"ed25519-nkey"}"#;
/// The audience of a request.
const REQUEST_AUDIENCE: &str = "nats-authorization-request";
/// The connection types that an admitted client may use.
const CONNECTION_TYPES: [&str; 3] = ["STANDARD", "WEBSOCKET", "MQTT"];

/// Why a request cannot be answered. The text repeats nothing of the request, which holds secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CalloutRequestError {
    /// It is no well-formed token, or lacks a field of a request.
    #[error("it is no authorization request")]
    Form,
    /// The server that it names did not sign it.
    #[error("its signature is not that of the server which it names")]
    Signature,
    /// It has expired: the client no longer waits.
    #[error("it has expired: do the clocks of NATS and the gateway agree?")]
    Expired,
    /// It is encrypted, and no curve seed is configured.
    #[error("it is encrypted, and no curve seed is configured")]
    Encrypted,
    /// It is encrypted to another curve key than the configured one.
    #[error("it is encrypted to another curve key than the configured one")]
    Sealed,
}

/// A request with a valid signature of its server.
pub(super) struct CalloutRequest {
    pub(super) visitor: ConnectingClient,
    /// The one-time public key of the user: the subject of the answer.
    user_nkey: String,
}

#[derive(Deserialize)]
struct JwtClaims {
    iss: String,
    aud: String,
    #[serde(default)]
    exp: i64,
    nats: CalloutRequestClaims,
}

#[derive(Deserialize)]
struct CalloutRequestClaims {
    r#type: String,
    user_nkey: String,
    server_id: CalloutServerId,
    client_info: CalloutClientInfo,
    connect_opts: CalloutConnectOptions,
}

#[derive(Deserialize)]
struct CalloutServerId {
    id: String,
}

#[derive(Deserialize)]
struct CalloutClientInfo {
    #[serde(default)]
    host: String,
    #[serde(default)]
    id: u64,
    /// `Client` or `Leafnode`.
    #[serde(default)]
    kind: String,
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    mqtt_id: String,
}

/// No `Debug`: it holds what the client presents.
#[derive(Deserialize)]
struct CalloutConnectOptions {
    #[serde(default)]
    user: String,
    #[serde(default)]
    pass: String,
    #[serde(default)]
    auth_token: String,
}

#[derive(Deserialize)]
struct JwtHeader {
    alg: String,
}

impl CalloutRequest {
    /// Reads a request and checks its signature and expiry, at `now_s` seconds since 1970.
    ///
    /// # Errors
    /// [`CalloutRequestError`]; not `Encrypted` or `Sealed`, which come earlier.
    pub(super) fn read(token: &[u8], now_s: i64) -> Result<Self, CalloutRequestError> {
        let token = std::str::from_utf8(token).map_err(|_| CalloutRequestError::Form)?;
        let (signed, signature) = token.rsplit_once('.').ok_or(CalloutRequestError::Form)?;
        let (header, claims) = signed.split_once('.').ok_or(CalloutRequestError::Form)?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| CalloutRequestError::Form);
        let header: JwtHeader =
            serde_json::from_slice(&decode(header)?).map_err(|_| CalloutRequestError::Form)?;
        let claims: JwtClaims =
            serde_json::from_slice(&decode(claims)?).map_err(|_| CalloutRequestError::Form)?;
        let nats = claims.nats;
        let is_request = header.alg == "ed25519-nkey"
            && claims.aud == REQUEST_AUDIENCE
            && nats.r#type == "authorization_request"
            && nats.user_nkey.starts_with('U');
        if !is_request {
            return Err(CalloutRequestError::Form);
        }
        let issuer = KeyPair::from_public_key(&claims.iss).map_err(|_| CalloutRequestError::Signature)?;
        let by_server = issuer.key_pair_type() == KeyPairType::Server && claims.iss == nats.server_id.id;
        if !by_server || issuer.verify(signed.as_bytes(), &decode(signature)?).is_err() {
            return Err(CalloutRequestError::Signature);
        }
        if claims.exp != 0 && claims.exp < now_s {
            return Err(CalloutRequestError::Expired);
        }
        let (client, options) = (nats.client_info, nats.connect_opts);
        let visitor = ConnectingClient {
            user: options.user,
            password: options.pass,
            token: options.auth_token,
            host: client.host,
            kind: if client.kind == "Client" { client.r#type } else { client.kind.to_ascii_lowercase() },
            name: if client.mqtt_id.is_empty() { client.name } else { client.mqtt_id },
            server_id: nats.server_id.id,
            client_id: client.id,
        };
        Ok(Self { visitor, user_nkey: nats.user_nkey })
    }

    /// The answer that lets the client into `account`.
    pub(super) fn allow(
        &self,
        issuer: &KeyPair,
        account: &str,
        permit: &ClientPermit,
        now_s: i64,
    ) -> Result<String, nkeys::error::Error> {
        let user = json!({
            "iss": issuer.public_key(),
            "sub": self.user_nkey,
            "aud": account,
            "jti": self.user_nkey,
            "name": permit.name,
            "iat": now_s,
            "exp": permit.expires_at_s,
            "nats": {
                "type": "user",
                "version": 2,
                "pub": permissions_for(&permit.publish, &[]),
                "sub": permissions_for(&permit.subscribe, &permit.deny_subscribe),
                "subs": permit.subscriptions_max,
                "data": -1,
                "payload": -1,
                "allowed_connection_types": CONNECTION_TYPES,
            },
        });
        let user = sign_jwt(issuer, &user)?;
        self.answer(issuer, "jwt", &user, now_s)
    }

    /// The answer that refuses the client.
    pub(super) fn deny(
        &self,
        issuer: &KeyPair,
        why: &str,
        now_s: i64,
    ) -> Result<String, nkeys::error::Error> {
        self.answer(issuer, "error", why, now_s)
    }

    fn answer(
        &self,
        issuer: &KeyPair,
        what: &str,
        value: &str,
        now_s: i64,
    ) -> Result<String, nkeys::error::Error> {
        let claims = json!({
            "iss": issuer.public_key(),
            "sub": self.user_nkey,
            "aud": self.visitor.server_id,
            "jti": self.user_nkey,
            "iat": now_s,
            "nats": { "type": "authorization_response", "version": 2, what: value },
        });
        sign_jwt(issuer, &claims)
    }
}

/// Permissions for these subjects and no others, without those denied. An empty list would mean everything to NATS.
fn permissions_for(subjects: &[String], denied: &[String]) -> serde_json::Value {
    match (subjects, denied) {
        ([], _) => json!({ "deny": [">"] }),
        (_, []) => json!({ "allow": subjects }),
        _ => json!({ "allow": subjects, "deny": denied }),
    }
}

fn sign_jwt(issuer: &KeyPair, claims: &serde_json::Value) -> Result<String, nkeys::error::Error> {
    let encode = |part: &str| URL_SAFE_NO_PAD.encode(part);
    let signed = format!("{}.{}", encode(JWT_HEADER), encode(&claims.to_string()));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes())?);
    Ok(format!("{signed}.{signature}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_S: i64 = 1_800_000_000;

    /// A request as a server signs it, with one thing changed.
    fn request(server: &KeyPair, change: impl Fn(&mut serde_json::Value)) -> String {
        let mut claims = json!({
            "iss": server.public_key(),
            "aud": REQUEST_AUDIENCE,
            "exp": NOW_S + 2,
            "nats": {
                "type": "authorization_request",
                "version": 2,
                "user_nkey": KeyPair::new_user().public_key(),
                "server_id": { "name": "n1", "host": "0.0.0.0", "id": server.public_key() },
                "client_info": {
                    "host": "203.0.113.9", "id": 7, "kind": "Client", "type": "mqtt", "mqtt_id": "press",
                },
                "connect_opts": { "user": "a secret", "protocol": 1 },
            },
        });
        change(&mut claims);
        sign_jwt(server, &claims).expect("signed")
    }

    #[test]
    fn a_request_is_read_as_its_server_has_signed_it() {
        let server = KeyPair::new_server();
        let read = CalloutRequest::read(request(&server, |_| {}).as_bytes(), NOW_S).expect("a request");
        let visitor = &read.visitor;
        assert_eq!((visitor.user.as_str(), visitor.password.as_str()), ("a secret", ""));
        assert_eq!((visitor.host.as_str(), visitor.client_id), ("203.0.113.9", 7));
        assert_eq!((visitor.kind.as_str(), visitor.name.as_str()), ("mqtt", "press"));
        assert!(!format!("{visitor:?}").contains("secret"));
        let leaf = |claims: &mut serde_json::Value| claims["nats"]["client_info"]["kind"] = json!("Leafnode");
        let read = CalloutRequest::read(request(&server, leaf).as_bytes(), NOW_S).expect("a request");
        assert_eq!(read.visitor.kind, "leafnode");
    }

    #[test]
    fn a_request_that_its_server_has_not_signed_is_not_answered() {
        let server = KeyPair::new_server();
        let read = |token: &str| CalloutRequest::read(token.as_bytes(), NOW_S).map(drop);
        let other = KeyPair::new_server().public_key();
        let as_other = request(&server, |claims| claims["iss"] = json!(other));
        assert_eq!(read(&as_other), Err(CalloutRequestError::Signature));
        let for_other = request(&server, |claims| claims["nats"]["server_id"]["id"] = json!(other));
        assert_eq!(read(&for_other), Err(CalloutRequestError::Signature));
        let good = request(&server, |_| {});
        let (_, signature) = good.rsplit_once('.').expect("three parts");
        let another = request(&server, |claims| claims["nats"]["connect_opts"]["user"] = json!("b"));
        let (signed, _) = another.rsplit_once('.').expect("three parts");
        assert_eq!(read(&format!("{signed}.{signature}")), Err(CalloutRequestError::Signature));
        // An account's key is not a server's, also where it is its own.
        let account = request(&KeyPair::new_account(), |_| {});
        assert_eq!(read(&account), Err(CalloutRequestError::Signature));
    }

    #[test]
    fn what_is_no_request_or_too_late_is_not_answered() {
        let server = KeyPair::new_server();
        let good = request(&server, |_| {});
        assert_eq!(
            CalloutRequest::read(good.as_bytes(), NOW_S + 3).err(),
            Some(CalloutRequestError::Expired)
        );
        let user = request(&server, |claims| claims["nats"]["type"] = json!("user"));
        for bad in ["", ".", "..", "a.b.c", &good[1..], &user] {
            assert_eq!(
                CalloutRequest::read(bad.as_bytes(), NOW_S).err(),
                Some(CalloutRequestError::Form),
                "{bad:?}"
            );
        }
        assert_eq!(CalloutRequest::read(&[0xff, 0xfe], NOW_S).err(), Some(CalloutRequestError::Form));
    }

    #[test]
    fn an_answer_is_for_the_asked_server_and_user_and_allows_no_more_than_it_says() {
        let (server, issuer) = (KeyPair::new_server(), KeyPair::new_account());
        let asked = CalloutRequest::read(request(&server, |_| {}).as_bytes(), NOW_S).expect("a request");
        let permit = ClientPermit {
            name: "press-4/0123456789ab".to_owned(),
            publish: vec!["ingest.press-4.>".to_owned()],
            subscribe: Vec::new(),
            deny_subscribe: Vec::new(),
            expires_at_s: NOW_S + 60,
            subscriptions_max: 8,
        };
        let claims = |token: &str| -> serde_json::Value {
            let (signed, signature) = token.rsplit_once('.').expect("three parts");
            let signature = URL_SAFE_NO_PAD.decode(signature).expect("base64");
            issuer.verify(signed.as_bytes(), &signature).expect("signed by the issuer");
            let claims = signed.split_once('.').expect("two parts").1;
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("JSON")
        };
        let answer = claims(&asked.allow(&issuer, "APP", &permit, NOW_S).expect("signed"));
        assert_eq!((&answer["aud"], &answer["sub"]), (&json!(server.public_key()), &json!(asked.user_nkey)));
        let user = claims(answer["nats"]["jwt"].as_str().expect("a user"));
        assert_eq!((&user["aud"], &user["sub"]), (&json!("APP"), &answer["sub"]));
        assert_eq!((&user["name"], &user["exp"]), (&json!(permit.name), &json!(NOW_S + 60)));
        assert_eq!(user["nats"]["pub"], json!({ "allow": ["ingest.press-4.>"] }));
        assert_eq!(user["nats"]["sub"], json!({ "deny": [">"] }), "nothing, and not everything");
        let no = claims(&asked.deny(&issuer, "no", NOW_S).expect("signed"));
        assert_eq!((&no["nats"]["error"], &no["nats"]["jwt"]), (&json!("no"), &json!(null)));
    }
}
