//! A refusal in the form that InfluxDB gives it: `{"error": …}` in 1.x, `{"code", "message"}` in 2.x, with `line` where one
//! line is meant.
//!
//! The status is that of the problem, but for those that time mends: Telegraf drops what any 4xx answers but 429, in 1.x
//! also that. They are 503, with `Retry-After`, so that nothing is lost.

use axum::Json;
use axum::http::header::WWW_AUTHENTICATE;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::{QUERY_PATH, WRITE_V1_PATH, WRITE_V2_PATH};
use crate::front::problem::Problem;
use crate::observe::cause::ProblemKind;

/// Where clients of InfluxDB 1.x and Telegraf look for words.
const ERROR_HEADER: &str = "x-influxdb-error";
/// Where those of 2.x look for the code.
const CODE_HEADER: &str = "x-platform-error-code";

/// Which InfluxDB a client speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InfluxDialect {
    V1,
    V2,
}

impl InfluxDialect {
    /// The dialect that is spoken at a path, if it is one of InfluxDB's.
    pub(super) fn of_path(path: &str) -> Option<Self> {
        match path {
            WRITE_V1_PATH | QUERY_PATH => Some(Self::V1),
            WRITE_V2_PATH => Some(Self::V2),
            _ => None,
        }
    }

    /// The parameter that names the datasource.
    pub(super) fn datasource_parameter(self) -> &'static str {
        match self {
            Self::V1 => "db",
            Self::V2 => "bucket",
        }
    }

    /// How to present a key.
    fn key_advice(self) -> &'static str {
        match self {
            Self::V1 => {
                "Send a valid API key of the datasource that 'db' names as the password (HTTP Basic, any user name), \
                 and never in the URL ('p=')."
            }
            Self::V2 => {
                "Send a valid API key of the datasource that 'bucket' names as the token: 'Authorization: Token KEY'."
            }
        }
    }

    fn status(self, kind: ProblemKind) -> u16 {
        match (self, kind.status()) {
            (_, 408) | (Self::V1, 429) => 503,
            (_, status) => status,
        }
    }

    /// The answer to a request that is refused.
    pub(super) fn refuse(self, problem: Problem) -> Response {
        let (kind, line) = (problem.kind(), problem.member("line").cloned());
        let words = match kind {
            ProblemKind::Unauthorized => self.key_advice().to_owned(),
            ProblemKind::KeyInUrl => format!("{} {}", problem.detail(), self.key_advice()),
            _ => problem.detail().to_owned(),
        };
        let status = StatusCode::from_u16(self.status(kind)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = code_of(status);
        // Its headers and its note are those of any refusal.
        let (mut head, _) = problem.into_response().into_parts();
        let mut document = Map::new();
        let challenge = match self {
            Self::V1 => {
                document.insert("error".to_owned(), words.clone().into());
                "Basic realm=\"headgate\""
            }
            Self::V2 => {
                document.insert("code".to_owned(), code.into());
                document.insert("message".to_owned(), words.clone().into());
                document.extend(line.map(|line| ("line".to_owned(), line)));
                head.headers.insert(HeaderName::from_static(CODE_HEADER), HeaderValue::from_static(code));
                "Token realm=\"headgate\""
            }
        };
        if head.headers.contains_key(WWW_AUTHENTICATE) {
            head.headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if let Ok(words) = HeaderValue::from_str(&words) {
            head.headers.insert(HeaderName::from_static(ERROR_HEADER), words);
        }
        let mut response = Json(Value::Object(document)).into_response();
        for (name, value) in response.headers() {
            head.headers.insert(name, value.clone());
        }
        head.status = status;
        let body = std::mem::take(response.body_mut());
        Response::from_parts(head, body)
    }
}

/// A refusal as the clients of a path expect it.
pub(in crate::front::http) fn in_dialect_of(path: &str, problem: Problem) -> Response {
    match InfluxDialect::of_path(path) {
        Some(dialect) => dialect.refuse(problem),
        None => problem.into_response(),
    }
}

/// The code of InfluxDB 2 for a status.
fn code_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "unauthorized",
        403 => "forbidden",
        404 => "not found",
        405 => "method not allowed",
        409 => "conflict",
        413 => "request too large",
        422 => "unprocessable entity",
        429 => "too many requests",
        503 => "unavailable",
        500 => "internal error",
        _ => "invalid",
    }
}

#[cfg(test)]
mod tests {
    use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
    use serde_json::json;

    use super::*;
    use crate::auth::GrantDenial;
    use crate::front::problem::RefusedRequest;
    use crate::observe::cause::Cause;

    fn refused(dialect: InfluxDialect, problem: Problem) -> (Response<()>, Value) {
        let (parts, body) = dialect.refuse(problem).into_parts();
        let bytes = futures_util::FutureExt::now_or_never(axum::body::to_bytes(body, 1 << 20));
        let bytes = bytes.expect("the body is there").expect("and whole");
        (Response::from_parts(parts, ()), serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[test]
    fn a_refusal_has_the_form_of_each_version() {
        let problem = || Problem::new(Cause::Malformed, "Line 3 is none.").with("line", 3).with("column", 7);
        let (head, json) = refused(InfluxDialect::V1, problem());
        assert_eq!((head.status().as_u16(), json), (400, json!({"error": "Line 3 is none."})));
        assert_eq!(head.headers()[CONTENT_TYPE], "application/json");
        assert_eq!(head.headers()[ERROR_HEADER], "Line 3 is none.");
        assert!(head.extensions().get::<RefusedRequest>().is_some(), "it is counted and listed");
        let (head, json) = refused(InfluxDialect::V2, problem());
        let expected = json!({"code": "invalid", "message": "Line 3 is none.", "line": 3});
        assert_eq!((head.status().as_u16(), json), (400, expected));
        assert_eq!(head.headers()[CODE_HEADER], "invalid");
    }

    #[test]
    fn a_stranger_is_told_where_the_key_belongs() {
        for (dialect, challenge, word) in
            [(InfluxDialect::V1, "Basic", "password"), (InfluxDialect::V2, "Token", "token")]
        {
            let (head, json) = refused(dialect, GrantDenial::NoKey.into());
            assert_eq!(head.status(), 401);
            assert_eq!(head.headers()[WWW_AUTHENTICATE], format!("{challenge} realm=\"headgate\""));
            assert!(json.to_string().contains(word), "{json}");
        }
    }

    #[test]
    fn what_time_mends_is_never_a_reason_to_drop_what_was_sent() {
        for (dialect, cause, status) in [
            (InfluxDialect::V1, Cause::LimitMessagesPerS, 503),
            (InfluxDialect::V2, Cause::LimitMessagesPerS, 429),
            (InfluxDialect::V1, Cause::Timeout, 503),
            (InfluxDialect::V2, Cause::Timeout, 503),
            (InfluxDialect::V1, Cause::DiskFull, 503),
            (InfluxDialect::V2, Cause::DiskFull, 503),
        ] {
            let problem = Problem::new(cause, "later").with_retry_after(std::time::Duration::from_secs(2));
            let (head, _) = refused(dialect, problem);
            assert_eq!(
                (head.status().as_u16(), &head.headers()[RETRY_AFTER]),
                (status, &HeaderValue::from(2))
            );
        }
    }
}
