//! A problem as an HTTP response, and what axum refuses by itself as a problem.

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_TYPE, RETRY_AFTER, SEC_WEBSOCKET_VERSION, UPGRADE, WWW_AUTHENTICATE,
};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::limits::rate_headers;
use crate::front::problem::{Problem, ProblemReply};
use crate::observe::cause::{Cause, ProblemKind};

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (ProblemReply { kind, document, retry_after_seconds, .. }, note) = self.into_parts();
        let mut response = Json(document).into_response();
        *response.status_mut() =
            StatusCode::from_u16(kind.status()).expect("a kind's status is that of an error");
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match kind {
            ProblemKind::Unauthorized | ProblemKind::KeyInUrl => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"headgate\""));
            }
            ProblemKind::ContentEncoding => {
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip, zstd"));
            }
            ProblemKind::UpgradeRequired => {
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            _ => {}
        }
        if let Some(seconds) = retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(limited) = &note.limited
            && limited.limit.is_rate()
        {
            headers.extend(rate_headers(&limited.standing));
        }
        response.extensions_mut().insert(note);
        response
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(Cause::Malformed, format!("The path cannot be read: {}", rejection.body_text()))
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        // "Failed to deserialize query string: unknown field `x`, expected one of …": only the part after
        // the colon helps a person.
        let words = rejection.body_text();
        let words = words.split_once(": ").map_or(words.as_str(), |(_, reason)| reason);
        Self::new(Cause::Malformed, format!("The query string cannot be used: {words}"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::auth::GrantDenial;
    use crate::message::KeyId;

    fn document(problem: Problem) -> (StatusCode, axum::http::HeaderMap, Value) {
        let response = problem.into_response();
        let (parts, body) = response.into_parts();
        let bytes = futures_util::FutureExt::now_or_never(axum::body::to_bytes(body, 1 << 20));
        let bytes = bytes.expect("the body is there").expect("and whole");
        (parts.status, parts.headers, serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[test]
    fn a_transient_refusal_says_when_to_come_again_in_whole_seconds() {
        for (after, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (2500, 3)] {
            let problem =
                Problem::new(Cause::Unavailable, "full").with_retry_after(Duration::from_millis(after));
            let (status, headers, json) = document(problem);
            assert_eq!(status, 503);
            assert_eq!(headers[RETRY_AFTER], seconds.to_string());
            assert_eq!(json["retry_after_seconds"], seconds);
        }
    }

    #[test]
    fn a_stranger_is_told_the_same_whatever_is_wrong_with_the_key() {
        let key_id = KeyId([7; 6]);
        let all = [
            GrantDenial::NoKey,
            GrantDenial::Malformed,
            GrantDenial::Unknown,
            GrantDenial::Expired,
            GrantDenial::Revoked,
            GrantDenial::OtherDatasource { key_id },
        ];
        let mut answers = all.map(|denied| document(denied.into()));
        let (first, others) = answers.split_first_mut().expect("six");
        assert_eq!(first.0, 401);
        assert_eq!(first.1[WWW_AUTHENTICATE], "Bearer realm=\"headgate\"");
        assert!(others.iter().all(|other| other == first), "{others:?}");
    }

    #[test]
    fn a_missing_scope_is_named() {
        let denied =
            GrantDenial::MissingScope { key_id: KeyId([7; 6]), scope: crate::auth::Scope::Subscribe };
        let (status, _, json) = document(denied.into());
        assert_eq!((status.as_u16(), &json["scope"]), (403, &json!("subscribe")));
        assert_eq!(json["type"], "/problems/missing_scope");
    }
}
