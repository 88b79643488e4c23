//! `GET /mqtt`: the opening handshake of a WebSocket (RFC 6455, section 4) that will carry MQTT. Once
//! it is answered, the connection belongs to the MQTT front, and counts there and not here.
//!
//! The `Origin` is not checked: pages of other sites may connect. The check would protect what a browser
//! sends by itself, above all cookies, and there is no such thing here. The key is in the CONNECT, and
//! only a client that knows it can put it there.

use std::sync::Arc;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version};
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::HttpFrontState;
use super::lent_socket::LentSocket;
use super::server::HttpPeer;
use crate::front::peer_stream::PeerStream;
use crate::front::problem::Problem;
use crate::observe::cause::{Cause, ProblemKind};

/// The subprotocols that are served: MQTT's name, and the name that clients of MQTT 3.1 use. They mean
/// the same here, because the CONNECT states the version.
const MQTT_SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];
/// The GUID that a server appends to the client's key (RFC 6455, 1.3).
const WEBSOCKET_ACCEPT_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Answers the handshake, and hands the connection to the MQTT front.
pub(super) async fn open(
    State(shared): State<Arc<HttpFrontState>>,
    mut request: Request,
) -> Result<Response, Problem> {
    let offer = WebsocketOffer::read(request.version(), request.headers())?;
    if !request.body().is_end_stream() {
        // Where the body ended, the other protocol would begin: who takes the one for the other lets requests in.
        let words = "A request that opens a WebSocket has no body.";
        return Err(Problem::new(Cause::Websocket, words).with_kind(ProblemKind::Malformed));
    }
    let Some(peer) = request.extensions().get::<HttpPeer>().map(|peer| peer.addr) else {
        return Err(Problem::internal(&"a request without the address it came from"));
    };
    let Some(admission) = shared.parts.mqtt.admit(peer).await else {
        let words = "There are as many MQTT connections as mqtt.connections_max allows.";
        return Err(Problem::new(Cause::ConnectionsMax, words).already_counted());
    };
    admission.serve_websocket(upgraded_stream(hyper::upgrade::on(&mut request)));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, offer.accept);
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(offer.subprotocol));
    Ok(response)
}

/// The connection, once the answer is sent, and the bytes that the client sent after its request.
async fn upgraded_stream(upgrade: OnUpgrade) -> Option<(PeerStream, Bytes)> {
    let upgraded = upgrade.await.ok()?;
    let parts = downcast::<TokioIo<LentSocket>>(upgraded).ok()?;
    Some((parts.io.into_inner().take()?.into_stream(), parts.read_buf))
}

/// What a client's handshake offers, checked.
#[derive(Debug, PartialEq)]
struct WebsocketOffer {
    /// The proof that the server has read the `Sec-WebSocket-Key`.
    accept: HeaderValue,
    subprotocol: &'static str,
}

impl WebsocketOffer {
    fn read(version: Version, headers: &HeaderMap) -> Result<Self, Problem> {
        let upgrade = |words| Err(Problem::new(Cause::Websocket, words));
        let malformed =
            |words: String| Problem::new(Cause::Websocket, words).with_kind(ProblemKind::Malformed);
        if version != Version::HTTP_11 {
            return upgrade("MQTT over WebSocket begins with HTTP/1.1.");
        }
        let named =
            |header, word: &str| tokens(headers, header).any(|token| token.eq_ignore_ascii_case(word));
        if !named(CONNECTION, "upgrade") || !named(UPGRADE, "websocket") {
            return upgrade(
                "This is MQTT over WebSocket: open it with a WebSocket client, subprotocol 'mqtt'.",
            );
        }
        if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return upgrade("Only version 13 of WebSocket is served.");
        }
        let key = headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
        if BASE64_STANDARD.decode(key).map_or(0, |key| key.len()) != 16 {
            return Err(malformed("Sec-WebSocket-Key has to be 16 bytes in base64.".to_owned()));
        }
        let offered = |name: &&str| tokens(headers, SEC_WEBSOCKET_PROTOCOL).any(|token| token == *name);
        let Some(subprotocol) = MQTT_SUBPROTOCOLS.into_iter().find(offered) else {
            let words = "Offer the subprotocol 'mqtt' in Sec-WebSocket-Protocol.";
            return Err(malformed(words.to_owned()).with("subprotocols", MQTT_SUBPROTOCOLS.to_vec()));
        };
        let proof = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key, WEBSOCKET_ACCEPT_GUID.as_bytes()].concat());
        let accept = HeaderValue::from_str(&BASE64_STANDARD.encode(proof)).expect("base64 is plain ASCII");
        Ok(Self { accept, subprotocol })
    }
}

/// The elements of a list header, over all lines that it spans.
fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The handshake of RFC 6455's section 1.3, with MQTT's subprotocol.
    fn handshake() -> HeaderMap {
        let lines = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "chat, mqtt"),
        ];
        let lines =
            lines.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        lines.into_iter().collect()
    }

    #[test]
    fn the_handshake_of_the_specification_gets_its_answer() {
        let offer = WebsocketOffer::read(Version::HTTP_11, &handshake()).expect("it is in order");
        assert_eq!(offer.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(offer.subprotocol, "mqtt");
    }

    #[test]
    fn what_was_offered_is_answered_and_mqtt_before_its_old_name() {
        for (offered, answered) in [("mqttv3.1", "mqttv3.1"), ("mqttv3.1, mqtt", "mqtt"), ("mqtt", "mqtt")] {
            let mut headers = handshake();
            headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(offered));
            let offer = WebsocketOffer::read(Version::HTTP_11, &headers).expect("it is in order");
            assert_eq!(offer.subprotocol, answered);
        }
    }

    #[test]
    fn a_handshake_that_lacks_something_is_told_what() {
        let without = |name| {
            let mut headers = handshake();
            headers.remove(name);
            (Version::HTTP_11, headers)
        };
        let with = |name, value| {
            let mut headers = handshake();
            headers.insert(name, HeaderValue::from_static(value));
            (Version::HTTP_11, headers)
        };
        for ((version, headers), kind) in [
            ((Version::HTTP_2, handshake()), ProblemKind::UpgradeRequired),
            ((Version::HTTP_10, handshake()), ProblemKind::UpgradeRequired),
            (without(CONNECTION), ProblemKind::UpgradeRequired),
            (without(UPGRADE), ProblemKind::UpgradeRequired),
            (without(SEC_WEBSOCKET_VERSION), ProblemKind::UpgradeRequired),
            (with(SEC_WEBSOCKET_VERSION, "8"), ProblemKind::UpgradeRequired),
            (with(UPGRADE, "h2c"), ProblemKind::UpgradeRequired),
            (without(SEC_WEBSOCKET_KEY), ProblemKind::Malformed),
            (with(SEC_WEBSOCKET_KEY, "c2hvcnQ="), ProblemKind::Malformed),
            (with(SEC_WEBSOCKET_KEY, "not base64"), ProblemKind::Malformed),
            (without(SEC_WEBSOCKET_PROTOCOL), ProblemKind::Malformed),
            (with(SEC_WEBSOCKET_PROTOCOL, "chat, MQTT"), ProblemKind::Malformed),
        ] {
            let problem = WebsocketOffer::read(version, &headers).expect_err("something is missing");
            assert_eq!(problem.kind(), kind, "{version:?} {headers:?}");
        }
    }
}
