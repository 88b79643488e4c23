//! What every request has to have, whatever it asks for: the one `Host` of RFC 9112 (3.2) and RFC 9113 (8.3.1). Two names
//! for the host, or none, are read differently by different programs on the way, which is how requests get past a proxy
//! that should have stopped them.

use axum::extract::Request;
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Uri, Version};

use crate::front::problem::Problem;
use crate::observe::cause::Cause;

/// Notes the host that an HTTP/2 request names as `:authority` where one of HTTP/1.1 has it (RFC 9113, 8.3.1).
pub(super) fn note_authority(request: &mut Request) {
    if request.version() == Version::HTTP_2
        && !request.headers().contains_key(HOST)
        && let Some(authority) = request.uri().authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        request.headers_mut().insert(HOST, host);
    }
}

/// Checks the host that a request names.
pub(super) fn check_host(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let malformed = |words: &str| Err(Problem::new(Cause::Malformed, words));
    let mut named = headers.get_all(HOST).iter();
    let host = match (named.next(), named.next()) {
        (Some(_), Some(_)) => return malformed("The request has more than one Host."),
        (None, _) if version == Version::HTTP_11 => {
            return malformed("An HTTP/1.1 request needs the header Host.");
        }
        (None, _) => return Ok(()),
        (Some(host), None) => host.as_bytes(),
    };
    if host.is_empty() {
        return Ok(());
    }
    let Some(host) = Authority::try_from(host).ok().filter(|host| !host.as_str().contains('@')) else {
        return malformed("The header Host is no host, with or without a port.");
    };
    // HTTP/1.1 ignores it where the request line names a host; HTTP/2 has one place for it.
    let is_other = |authority: &Authority| !authority.as_str().eq_ignore_ascii_case(host.as_str());
    if version == Version::HTTP_2 && uri.authority().is_some_and(is_other) {
        return malformed("The header Host is another one than :authority.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_one_host() {
        for (version, uri, hosts, is_right) in [
            (Version::HTTP_11, "/livez", &["gateway"][..], true),
            (Version::HTTP_11, "/livez", &["gateway:8080"], true),
            (Version::HTTP_11, "/livez", &["[::1]:8080"], true),
            (Version::HTTP_11, "/livez", &[""], true),
            (Version::HTTP_11, "http://other/livez", &["gateway"], true),
            (Version::HTTP_11, "/livez", &[], false),
            (Version::HTTP_11, "http://gateway/livez", &[], false),
            (Version::HTTP_11, "/livez", &["gateway", "gateway"], false),
            (Version::HTTP_11, "/livez", &["gateway", "other"], false),
            (Version::HTTP_11, "/livez", &["gateway, other"], false),
            (Version::HTTP_11, "/livez", &["gateway/path"], false),
            (Version::HTTP_11, "/livez", &["user@gateway"], false),
            (Version::HTTP_11, "/livez", &["gate way"], false),
            (Version::HTTP_10, "/livez", &[], true),
            (Version::HTTP_10, "/livez", &["gateway", "gateway"], false),
            (Version::HTTP_2, "https://gateway/livez", &[], true),
            (Version::HTTP_2, "https://gateway/livez", &["Gateway"], true),
            (Version::HTTP_2, "https://gateway/livez", &["other"], false),
            (Version::HTTP_2, "https://gateway/livez", &["gateway", "gateway"], false),
        ] {
            let headers = hosts.iter().map(|host| (HOST, HeaderValue::from_static(host))).collect();
            let checked = check_host(version, &Uri::from_static(uri), &headers);
            assert_eq!(checked.is_ok(), is_right, "{version:?} {uri} {hosts:?}");
        }
    }
}
