//! The dashboard: one page that shows, to a person with an admin key, each datasource's newest
//! values and how far log and storage are. It is a client of the API as any other: served to
//! everyone, it holds nothing, and its key goes into a header.

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::response::IntoResponse;
use rand::TryRng;
use rand::rngs::SysRng;

use super::problem::Problem;

/// The page; `{{nonce}}` stands where the one answer's nonce goes.
const PAGE: &str = include_str!("dashboard.html");

/// `GET /`
///
/// The policy lets the page run the one script and use the one style that are in it, marked by a
/// nonce that nobody could know beforehand, and talk to this gateway alone.
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
    Ok((headers, PAGE.replace("{{nonce}}", &nonce)))
}
