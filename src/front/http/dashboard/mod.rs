//! The dashboard: a page that does what the commands do, for a person with an admin key, and shows what is read to one
//! with a key that may subscribe. It is an ordinary client of the API that signs in with its key once
//! ([`session`]) and then has a cookie. Its files are in the binary, as they were written by hand; they hold no data.
//!
//! All files but the page itself are under a path that has their digest, so that a browser keeps them for ever and never
//! mixes those of two versions.

pub(super) mod browser_sessions;
mod page_origin;
pub(super) mod session;

use std::sync::LazyLock;

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::PathParameters;
use crate::front::problem::Problem;
use crate::observe::cause::Cause;

pub(super) use page_origin::page_grant;

/// The page; `{{version}}` in it stands for [`VERSION`].
const PAGE: &str = include_str!("pages/index.html");

/// A file of the dashboard: its name, media type and bytes.
type PageFile = (&'static str, &'static str, &'static [u8]);

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

/// uPlot as a module; its file, as its authors made it, has no exports.
const UPLOT: &str = concat!(include_str!("pages/uplot/uPlot.iife.min.js"), "\nexport default uPlot;\n");

macro_rules! page_files {
    ($($name:literal: $media_type:expr),* $(,)?) => {
        &[
            ("uplot.js", SCRIPT, UPLOT.as_bytes()),
            ("uplot.css", STYLE, include_bytes!("pages/uplot/uPlot.min.css")),
            ("uplot-license.txt", "text/plain; charset=utf-8", include_bytes!("pages/uplot/LICENSE")),
            $(($name, $media_type, include_bytes!(concat!("pages/", $name)))),*
        ]
    };
}

const FILES: &[PageFile] = page_files![
    "styles.css": STYLE,
    "icon.svg": "image/svg+xml",
    "app.js": SCRIPT,
    "api.js": SCRIPT,
    "audit.js": SCRIPT,
    "chart.js": SCRIPT,
    "clients.js": SCRIPT,
    "datasource.js": SCRIPT,
    "datasources.js": SCRIPT,
    "dialogs.js": SCRIPT,
    "dom.js": SCRIPT,
    "format.js": SCRIPT,
    "health.js": SCRIPT,
    "keys.js": SCRIPT,
    "limits.js": SCRIPT,
    "live.js": SCRIPT,
    "pages.js": SCRIPT,
    "quarantine.js": SCRIPT,
    "refusals.js": SCRIPT,
    "schema.js": SCRIPT,
    "session.js": SCRIPT,
    "shared-stream.js": SCRIPT,
    "sinks.js": SCRIPT,
    "sparkline.js": SCRIPT,
    "tail.js": SCRIPT,
    "values.js": SCRIPT,
];

/// What tells the files from those of any other version: a digest of them all.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let mut hash = blake3::Hasher::new();
    hash.update(PAGE.as_bytes());
    for (name, _, bytes) in FILES {
        hash.update(name.as_bytes()).update(&bytes.len().to_le_bytes()).update(bytes);
    }
    hash.finalize().to_hex()[..16].to_owned()
});

/// The part of the files' path that tells their version.
pub(super) fn version() -> &'static str {
    &VERSION
}

/// A page may load and connect to what this gateway serves, and nothing else; no text of it is ever run, and none
/// becomes markup.
const DASHBOARD_POLICY: &str = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// `GET /`
pub(super) async fn page(headers: HeaderMap) -> Response {
    let tag = format!("\"{}\"", *VERSION);
    let policies = [
        (CONTENT_SECURITY_POLICY, HeaderValue::from_static(DASHBOARD_POLICY)),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
        (HeaderName::from_static("x-frame-options"), HeaderValue::from_static("DENY")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ETAG, HeaderValue::from_str(&tag).expect("a digest in quotes")),
    ];
    if headers.get_all(IF_NONE_MATCH).iter().any(|known| known.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, policies).into_response();
    }
    let page = PAGE.replace("{{version}}", &VERSION);
    (policies, [(CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response()
}

/// `GET /dashboard/{version}/{file}`
pub(super) async fn file(
    PathParameters((version, name)): PathParameters<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let found = FILES.iter().find(|(of, ..)| *of == name && version == *VERSION);
    let Some((_, media_type, bytes)) = found else {
        return Err(Problem::new(
            Cause::NotFound,
            "This gateway's dashboard has no such file: load / again.",
        ));
    };
    let tag = format!("\"{}\"", *VERSION);
    let kept = [
        (CACHE_CONTROL, HeaderValue::from_static("public, max-age=31536000, immutable")),
        (ETAG, HeaderValue::from_str(&tag).expect("a digest in quotes")),
    ];
    if headers.get_all(IF_NONE_MATCH).iter().any(|known| known.as_bytes() == tag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, kept).into_response());
    }
    Ok((kept, [(CONTENT_TYPE, *media_type)], *bytes).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> impl Iterator<Item = (&'static str, &'static str)> {
        let own = FILES.iter().filter(|(name, ..)| !name.starts_with("uplot"));
        own.map(|(name, _, bytes)| (*name, std::str::from_utf8(bytes).expect("text")))
    }

    #[test]
    fn the_page_and_its_scripts_name_files_that_there_are_and_each_file_is_named() {
        let all: String = texts().map(|(_, text)| text).chain([PAGE]).collect();
        for (name, ..) in FILES.iter().filter(|(name, ..)| *name != "uplot-license.txt") {
            let is_named = all.contains(&format!("\"./{name}\"")) || PAGE.contains(&format!("/{name}\""));
            assert!(is_named, "nothing uses {name}");
        }
        for (name, text) in texts() {
            let imports = text.split("from \"./").skip(1).chain(text.split("import(\"./").skip(1));
            for import in imports.filter_map(|rest| rest.split('"').next()) {
                assert!(FILES.iter().any(|(of, ..)| *of == import), "{name} imports {import}");
            }
        }
    }

    #[test]
    fn no_script_makes_markup_of_text_and_the_page_has_no_script_or_style_of_its_own() {
        for (name, text) in texts() {
            for unsafe_ in
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"]
            {
                assert!(!text.contains(unsafe_), "{name} has {unsafe_}");
            }
        }
        assert!(!PAGE.contains("<style") && !PAGE.contains(" style=") && !PAGE.contains(" on"), "{PAGE}");
        assert!(PAGE.split("<script").skip(1).all(|script| script.contains("src=\"/dashboard/{{version}}/")));
    }
}
