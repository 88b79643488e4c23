//! `X-Forwarded-For` and `X-Forwarded-Proto`, as proxies of HTTP write them: each appends whom it was connected to by.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;

use super::ProxyTrust;
use crate::limits::FORWARDED_ADDRESSES_MAX;

const X_FORWARDED_FOR: &str = "x-forwarded-for";
const X_FORWARDED_PROTO: &str = "x-forwarded-proto";

/// The client of a request that came from a trusted proxy: the rightmost address that is no trusted proxy's. What
/// stands to the left of it, the client itself may have written. If all are trusted proxies, the leftmost; and `None`
/// if the proxy names nobody. An element that is no address (`unknown`) ends the chain: nobody vouches for what stands
/// to the left of it.
pub fn forwarded_address(headers: &HeaderMap, trust: &ProxyTrust) -> Option<IpAddr> {
    // From the right over all lines: a proxy may add a line instead of an element.
    let lines = headers.get_all(X_FORWARDED_FOR).iter().rev();
    let elements = lines.flat_map(|line| line.as_bytes().rsplit(|&byte| byte == b','));
    let mut nearest = None;
    for element in elements.take(FORWARDED_ADDRESSES_MAX) {
        let Some(address) = element_address(element) else { break };
        nearest = Some(address);
        if !trust.is_trusted(address) {
            break;
        }
    }
    nearest
}

/// Whether the client spoke HTTPS to the proxy that is next to the gateway.
pub fn is_forwarded_https(headers: &HeaderMap) -> bool {
    let nearest = headers.get_all(X_FORWARDED_PROTO).iter().next_back();
    let element = nearest.and_then(|line| line.as_bytes().rsplit(|&byte| byte == b',').next());
    element.is_some_and(|element| element.trim_ascii().eq_ignore_ascii_case(b"https"))
}

/// An address, with or without a port: `10.0.0.1`, `10.0.0.1:4711`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:4711`.
fn element_address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element.trim_ascii()).ok()?.trim_matches('"');
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    let with_port = || text.parse::<SocketAddr>().ok().map(|addr| addr.ip());
    let address: IpAddr = text.parse().ok().or_else(with_port).or_else(bracketed)?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;
    use crate::config::ProxyProtocol;

    fn trust() -> ProxyTrust {
        let networks = ["10.0.0.0/8", "2001:db8:1::/48"].map(|network| network.parse().expect("a network"));
        ProxyTrust { networks: networks.into(), protocol: ProxyProtocol::Optional }
    }

    fn headers(name: &'static str, lines: &[&str]) -> HeaderMap {
        let line = |text: &&str| {
            (HeaderName::from_static(name), HeaderValue::from_bytes(text.as_bytes()).expect("a value"))
        };
        lines.iter().map(line).collect()
    }

    #[test]
    fn the_client_is_the_rightmost_address_that_is_no_trusted_proxy() {
        for (lines, client) in [
            (&["203.0.113.9"][..], Some("203.0.113.9")),
            (&["198.51.100.1, 203.0.113.9"], Some("203.0.113.9")),
            (&["198.51.100.1, 203.0.113.9, 10.0.0.7"], Some("203.0.113.9")),
            (&["198.51.100.1", "203.0.113.9", "10.0.0.7,10.1.1.1"], Some("203.0.113.9")),
            // All are proxies: the outermost one is the client itself, a health check for instance.
            (&["10.0.0.7, 10.1.1.1"], Some("10.0.0.7")),
            // With ports, in brackets, mapped, quoted.
            (&["203.0.113.9:4711"], Some("203.0.113.9")),
            (&["[2001:db8::9]:4711, 2001:db8:1::7"], Some("2001:db8::9")),
            (&["[2001:db8::9]"], Some("2001:db8::9")),
            (&["\"[2001:db8::9]:80\""], Some("2001:db8::9")),
            (&["::ffff:203.0.113.9, ::ffff:10.0.0.7"], Some("203.0.113.9")),
            // What nobody vouches for is not looked at.
            (&["203.0.113.9, unknown, 10.0.0.7"], Some("10.0.0.7")),
            (&["203.0.113.9, unknown"], None),
            (&["203.0.113.9,"], None),
            (&["_hidden"], None),
            (&["127.0.0.1\t"], Some("127.0.0.1")),
            (&["'203.0.113.9'"], None),
            (&["203.0.113.9 198.51.100.1"], None),
            (&["\u{e9}"], None),
            (&[""], None),
            (&[], None),
        ] {
            let client = client.map(|client| client.parse::<IpAddr>().expect("an address"));
            assert_eq!(forwarded_address(&headers(X_FORWARDED_FOR, lines), &trust()), client, "{lines:?}");
        }
    }

    #[test]
    fn a_chain_is_followed_so_far_and_no_further() {
        let chain = |proxies: usize| format!("203.0.113.9{}", ", 10.0.0.7".repeat(proxies));
        let client = |chain: String| {
            forwarded_address(&headers(X_FORWARDED_FOR, &[&chain]), &trust())
                .map(|address| address.to_string())
        };
        assert_eq!(client(chain(FORWARDED_ADDRESSES_MAX - 1)).as_deref(), Some("203.0.113.9"));
        assert_eq!(client(chain(FORWARDED_ADDRESSES_MAX)).as_deref(), Some("10.0.0.7"));
    }

    #[test]
    fn https_is_what_the_nearest_proxy_says() {
        for (lines, is_https) in [
            (&["https"][..], true),
            (&["http, HTTPS"], true),
            (&["https, http"], false),
            (&["https", "http"], false),
            (&["httpsx"], false),
            (&[], false),
        ] {
            assert_eq!(is_forwarded_https(&headers(X_FORWARDED_PROTO, lines)), is_https, "{lines:?}");
        }
    }
}
