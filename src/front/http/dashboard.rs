//! The dashboard: one page that shows, to a person with an admin key, each datasource's newest values
//! and how far log and storage are. It is an ordinary client of the API: it is served to everyone, holds
//! no data, and sends its key in a header.

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::response::IntoResponse;
use rand::TryRng;
use rand::rngs::SysRng;

use crate::front::problem::Problem;

/// The page; each answer replaces `{{nonce}}` by its own nonce.
const DASHBOARD_HTML: &str = include_str!("dashboard.html");

/// `GET /`
///
/// The policy lets the page run its own script and style only, marked by a nonce that nobody can know
/// beforehand, and lets it connect to this gateway only.
pub(super) async fn page() -> Result<impl IntoResponse, Problem> {
    let mut bits = [0; 16];
    SysRng.try_fill_bytes(&mut bits).map_err(|error| Problem::internal(&error))?;
    let nonce = format!("{:032x}", u128::from_ne_bytes(bits));
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
        (REFERRER_POLICY, "no-referrer".to_owned()),
    ];
    Ok((headers, DASHBOARD_HTML.replace("{{nonce}}", &nonce)))
}
