//! Whether a request is one of this gateway's own page: the cookie of its session alone does not say that, because a
//! browser may send it with what another page asks for. `SameSite=Strict` keeps it from most of them; here the rest is
//! turned away: pages of another port of the same host, and browsers that know neither.

use std::time::Instant;

use axum::http::header::{COOKIE, HOST, ORIGIN};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};

use super::super::HttpFrontState;
use super::super::server::HttpPeer;
use super::browser_sessions::{FoundBrowserSession, SessionToken};
use crate::auth::Grant;

/// The header in which a page proves that it has the session.
pub(super) const PROOF_HEADER: &str = "x-headgate-csrf";
/// The cookie over HTTP.
const COOKIE_NAME: &str = "headgate-session";
/// The cookie over HTTPS: no other host and no page without TLS can set it (RFC 6265bis, section 4.1.3.2).
const SECURE_COOKIE_NAME: &str = "__Host-headgate-session";
/// Where a page's session counts for nothing: devices have keys.
const DEVICE_PATHS: [&str; 5] = ["/v1/ingest/", "/v1/import", "/api/", "/write", "/mqtt"];

/// The cookie's name, for a client that speaks HTTPS or not.
pub(super) fn cookie_name(is_https: bool) -> &'static str {
    if is_https { SECURE_COOKIE_NAME } else { COOKIE_NAME }
}

/// The session that a request's cookie names, if the request is one of this gateway's page.
pub(super) fn page_session(parts: &Parts, shared: &HttpFrontState) -> Option<SessionToken> {
    let peer = parts.extensions.get::<HttpPeer>()?;
    let path = parts.uri.path();
    // A stream lasts as long as its key, which is longer than a session: a page has the live view.
    let is_stream = path.starts_with("/v1/datasources/") && path.ends_with("/stream");
    if is_stream || DEVICE_PATHS.iter().any(|of_devices| path.starts_with(of_devices)) {
        return None;
    }
    let token = cookie(&parts.headers, cookie_name(peer.is_https)).and_then(SessionToken::parse)?;
    let public_url = shared.parts.public_url.get();
    if !is_same_origin(&parts.method, &parts.headers, public_url) {
        return None;
    }
    let is_read = parts.method == Method::GET || parts.method == Method::HEAD;
    let proof = parts.headers.get(PROOF_HEADER).map(|proof| proof.as_bytes());
    (is_read || proof.is_some_and(|proof| is_equal(proof, token.proof().as_bytes()))).then_some(token)
}

/// What the key of the session allows that a request's cookie names, and the session: nothing, if the key is dead.
pub(in super::super) fn page_grant(
    parts: &Parts,
    shared: &HttpFrontState,
) -> Option<(Grant, FoundBrowserSession)> {
    let token = page_session(parts, shared)?;
    let found = shared.browser_sessions.find(&token, Instant::now())?;
    let grant = shared.parts.intake.authorizer().grant_of_key(&found.datasource, found.key_id);
    let grant = grant.inspect_err(|_| shared.browser_sessions.end_of_key(found.key_id)).ok()?;
    Some((grant, found))
}

/// The value of the one cookie of this name. Two are ambiguous: another page of the host may have set one of them.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let mut found = pairs.filter(|(of, _)| *of == name).map(|(_, value)| value);
    found.next().filter(|_| found.next().is_none())
}

/// Whether a page of this gateway's own origin has sent this, as far as the browser says.
fn is_same_origin(method: &Method, headers: &HeaderMap, public_url: Option<&str>) -> bool {
    // A browser that knows a trustworthy origin says it in every request; `none` is what a person has typed.
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    let is_site_right = match site {
        Some(b"same-origin") => true,
        Some(b"none") => method == Method::GET,
        Some(_) => false,
        None => true,
    };
    let is_own = |origin: &str| {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let named = origin.split_once("://").map(|(_, host)| host);
        named.is_some_and(|named| !host.is_empty() && named.eq_ignore_ascii_case(host))
            || public_url.is_some_and(|url| url.trim_end_matches('/').eq_ignore_ascii_case(origin))
            // Behind a proxy that names the gateway otherwise, the browser's own word counts.
            || site == Some(b"same-origin")
    };
    let origins = headers.get_all(ORIGIN).iter();
    is_site_right && origins.map(|origin| origin.to_str()).all(|origin| origin.is_ok_and(is_own))
}

/// Whether two texts are equal, in a time that does not say where they differ.
fn is_equal(given: &[u8], wanted: &[u8]) -> bool {
    given.len() == wanted.len() && given.iter().zip(wanted).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn a_cookie_is_found_among_others_and_twice_is_none() {
        let value =
            |lines: &[(&'static str, &'static str)]| cookie(&headers(lines), COOKIE_NAME).map(str::to_owned);
        assert_eq!(value(&[("cookie", "headgate-session=a")]).as_deref(), Some("a"));
        assert_eq!(value(&[("cookie", "x=1; headgate-session=a; y=2")]).as_deref(), Some("a"));
        assert_eq!(value(&[("cookie", "x=1"), ("cookie", "headgate-session=a")]).as_deref(), Some("a"));
        assert_eq!(value(&[("cookie", "headgate-session=a; headgate-session=b")]), None);
        assert_eq!(value(&[("cookie", "xheadgate-session=a; __Host-headgate-session=b")]), None);
        assert_eq!(value(&[]), None);
    }

    #[test]
    fn only_the_gateways_own_page_is_believed() {
        let own = [("host", "gw:8080")];
        let is_own = |method: &Method, more: &[(&'static str, &'static str)], url| {
            is_same_origin(method, &headers(&[&own[..], more].concat()), url)
        };
        for method in [Method::GET, Method::POST] {
            for good in [
                &[][..],
                &[("origin", "http://gw:8080")],
                &[("origin", "http://GW:8080"), ("sec-fetch-site", "same-origin")],
                &[("origin", "https://outside"), ("sec-fetch-site", "same-origin")],
            ] {
                assert!(is_own(&method, good, None), "{good:?}");
            }
            for bad in [
                &[("origin", "http://gw:8081")][..],
                &[("origin", "http://gw")],
                &[("origin", "http://evil")],
                &[("origin", "null")],
                &[("sec-fetch-site", "same-site")],
                &[("sec-fetch-site", "cross-site")],
                &[("origin", "http://gw:8080"), ("sec-fetch-site", "cross-site")],
                &[("origin", "http://gw:8080"), ("origin", "http://evil")],
            ] {
                assert!(!is_own(&method, bad, None), "{bad:?}");
            }
        }
        assert!(is_own(&Method::POST, &[("origin", "https://outside")], Some("https://outside")));
        assert!(is_own(&Method::GET, &[("sec-fetch-site", "none")], None));
        assert!(!is_own(&Method::POST, &[("sec-fetch-site", "none")], None));
    }

    #[test]
    fn a_proof_is_right_as_a_whole() {
        assert!(is_equal(b"ab", b"ab"));
        for other in [&b"aa"[..], b"a", b"abc", b""] {
            assert!(!is_equal(other, b"ab"));
        }
    }
}
