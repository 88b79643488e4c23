//! `Keep-Alive`: an HTTP/1 client is told how long its connection may be idle, so that it sends no request on one that is
//! about to be closed.

use axum::http::header::CONNECTION;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Whether the client of an HTTP/1 request wants to go on with its connection.
pub(super) fn wants_to_persist(version: Version, headers: &HeaderMap) -> bool {
    let has = |option: &[u8]| {
        let lines = headers.get_all(CONNECTION).iter();
        let mut options = lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b','));
        options.any(|named| named.trim_ascii().eq_ignore_ascii_case(option))
    };
    match version {
        Version::HTTP_11 => !has(b"close"),
        Version::HTTP_10 => has(b"keep-alive") && !has(b"close"),
        _ => false,
    }
}

/// What says how long a connection may be idle.
pub(super) fn keep_alive_value(seconds: u64) -> HeaderValue {
    HeaderValue::from_str(&format!("timeout={seconds}")).expect("digits")
}

/// Says in an answer how long the connection may be idle, unless the answer is the last one on it.
pub(super) fn announce_keep_alive(answer: &mut HeaderMap, value: &HeaderValue) {
    // Some say here that the connection closes, or that another protocol follows.
    if answer.contains_key(CONNECTION) {
        return;
    }
    answer.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
    answer.insert(KEEP_ALIVE, value.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_says_whether_it_goes_on() {
        for (version, lines, persists) in [
            (Version::HTTP_11, &[][..], true),
            (Version::HTTP_11, &["keep-alive"], true),
            (Version::HTTP_11, &["TE, Close"], false),
            (Version::HTTP_11, &["keep-alive", "close"], false),
            (Version::HTTP_10, &[], false),
            (Version::HTTP_10, &["Keep-Alive"], true),
            (Version::HTTP_2, &[], false),
        ] {
            let headers = lines.iter().map(|line| (CONNECTION, HeaderValue::from_static(line))).collect();
            assert_eq!(wants_to_persist(version, &headers), persists, "{version:?} {lines:?}");
        }
    }

    #[test]
    fn the_last_answer_of_a_connection_promises_nothing() {
        let mut last = HeaderMap::from_iter([(CONNECTION, HeaderValue::from_static("close"))]);
        announce_keep_alive(&mut last, &keep_alive_value(75));
        assert_eq!(last.get(KEEP_ALIVE), None);
        let mut answer = HeaderMap::new();
        announce_keep_alive(&mut answer, &keep_alive_value(75));
        assert_eq!(answer[KEEP_ALIVE], "timeout=75");
    }
}
