//! `/v1/session`: signing in on the dashboard. An API key is exchanged for a cookie that no script can read, so that the
//! key itself is nowhere in the browser.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::SET_COOKIE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::super::HttpFrontState;
use super::super::credentials::{Caller, presented_key};
use super::browser_sessions::SessionToken;
use super::page_origin::{cookie_name, page_grant, page_session};
use crate::auth::{GrantDenial, Key, Scope, Scopes};
use crate::front::problem::Problem;
use crate::limits::{BROWSER_SESSION_AGE_MAX, BROWSER_SESSION_IDLE_MAX};
use crate::message::{DatasourceId, KeyId, now_micros};
use crate::time::Rfc3339;

/// A session, as its page sees it.
#[derive(Serialize)]
struct SessionResponse<'a> {
    key: SessionKeyView<'a>,
    /// What a page sends in `x-headgate-csrf` with each request that changes something.
    csrf: String,
    /// When the session ends at the latest.
    ends_at: Rfc3339,
    /// After how many seconds it ends that it was not used for.
    idle_seconds: u64,
}

/// The key that a session stands for.
#[derive(Serialize)]
struct SessionKeyView<'a> {
    id: KeyId,
    label: &'a str,
    datasource: &'a DatasourceId,
    scopes: Scopes,
    expires_at: Option<Rfc3339>,
}

impl<'a> SessionResponse<'a> {
    fn new(key: &'a Key, token: &SessionToken, age: Duration) -> Self {
        let left = BROWSER_SESSION_AGE_MAX.saturating_sub(age);
        let ends_at = now_micros() + i64::try_from(left.as_micros()).unwrap_or(0);
        Self {
            key: SessionKeyView {
                id: key.id,
                label: &key.label,
                datasource: &key.datasource,
                scopes: key.scopes,
                expires_at: key.expires_at().map(Rfc3339),
            },
            csrf: token.proof(),
            ends_at: Rfc3339(key.ends_at().map_or(ends_at, |key_ends_at| key_ends_at.min(ends_at))),
            idle_seconds: BROWSER_SESSION_IDLE_MAX.as_secs(),
        }
    }
}

/// `POST /v1/session`: begins a session for the key that the request presents.
pub(in super::super) async fn begin(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    // A cookie is no key: a session cannot be renewed by itself.
    let caller = Caller::identify(&parts, &shared, presented_key(&parts.headers)).await?;
    caller.0.allows_scope(Scope::Subscribe)?;
    if let Some(before) = page_session(&parts, &shared) {
        shared.browser_sessions.end(&before);
    }
    let key = caller.0.key();
    let begun = shared.browser_sessions.begin(key, Instant::now());
    let token = begun.map_err(|error| Problem::internal(&error))?;
    let cookie = cookie_line(token.expose(), BROWSER_SESSION_AGE_MAX, caller.1.is_https)?;
    let body = SessionResponse::new(key, &token, Duration::ZERO);
    Ok((StatusCode::CREATED, [(SET_COOKIE, cookie)], Json(body)).into_response())
}

/// `GET /v1/session`: with 204 if there is none, which is no error: a page asks when it is loaded.
pub(in super::super) async fn show(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let (Some(token), Some((grant, found))) = (page_session(&parts, &shared), page_grant(&parts, &shared))
    else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let caller = Caller::admit(&parts, &shared, grant).await?;
    Ok(Json(SessionResponse::new(caller.0.key(), &token, found.begun.elapsed())).into_response())
}

/// `DELETE /v1/session`: ends it.
pub(in super::super) async fn end(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let token = page_session(&parts, &shared).ok_or(GrantDenial::NoKey)?;
    let (grant, _) = page_grant(&parts, &shared).ok_or(GrantDenial::NoKey)?;
    let caller = Caller::admit(&parts, &shared, grant).await?;
    shared.browser_sessions.end(&token);
    let cookie = cookie_line("", Duration::ZERO, caller.1.is_https)?;
    Ok((StatusCode::NO_CONTENT, [(SET_COOKIE, cookie)]).into_response())
}

/// The line that sets the cookie. Without an age it is removed.
fn cookie_line(token: &str, age: Duration, is_https: bool) -> Result<HeaderValue, Problem> {
    let (name, secure) = (cookie_name(is_https), if is_https { "; Secure" } else { "" });
    let age_s = age.as_secs();
    let line = format!("{name}={token}; Path=/; Max-Age={age_s}; HttpOnly; SameSite=Strict{secure}");
    HeaderValue::try_from(line).map_err(|error| Problem::internal(&error))
}
