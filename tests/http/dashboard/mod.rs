//! The dashboard: its files, its session, what it is told live; and the whole of it as a person has it, in a headless
//! Chromium with an MQTT client on the other side.

mod live;
mod session;

use crate::common::tls::Identity;
use crate::common::{Gateway, Setup, node, scratch};

/// Runs a program in a browser on a gateway.
fn in_browser(gateway: &Gateway, program: &str) {
    let program = format!("{}\n{program}", include_str!("browser.js"));
    let (base, mqtt) = (format!("http://{}", gateway.http), format!("mqtt://{}", gateway.mqtt));
    let output = node(&program, &[&base, &gateway.admin_key(), &mqtt]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn in_a_browser_a_datasource_lives_from_its_first_key_to_its_end() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    in_browser(&gateway, include_str!("life.js"));
}

#[test]
fn in_a_browser_a_key_that_may_only_read_looks_and_is_out_when_it_is_revoked() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    in_browser(&gateway, include_str!("reader.js"));
}

#[test]
fn in_a_browser_a_page_reads_a_stream_with_a_token_in_its_url() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.cors_origins", "[\"*\"]").start();
    in_browser(&gateway, include_str!("token.js"));
}

#[test]
fn in_a_browser_eight_windows_share_its_six_connections() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    in_browser(&gateway, include_str!("windows.js"));
}

#[test]
fn in_a_browser_limits_are_set_and_taken_away() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    in_browser(&gateway, include_str!("limits.js"));
}

#[test]
fn in_a_browser_over_https_the_cookie_is_for_this_host_alone() {
    let dir = scratch();
    let identity = Identity::issuer(dir.path(), "issuer").issue(dir.path(), "gateway");
    let gateway = Setup::on(dir.path())
        .set("http.tls.certificate", identity.certificate.display())
        .set("http.tls.key", identity.key.display())
        .start();
    let base = format!("https://127.0.0.1:{}", gateway.https.expect("TLS").port());
    let program = format!("{}\n{}", include_str!("browser.js"), include_str!("https.js"));
    let output = node(&program, &[&base, &gateway.admin_key()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_browser_keeps_the_files_for_ever_and_asks_for_the_page() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let page = gateway.get("/", "");
    assert_eq!((page.status, page.headers["cache-control"].as_str()), (200, "no-cache"));
    let policy = &page.headers["content-security-policy"];
    assert!(policy.starts_with("default-src 'self'; object-src 'none'; base-uri 'none'"), "{policy}");
    assert!(policy.contains("require-trusted-types-for 'script'") && !policy.contains("unsafe"), "{policy}");
    assert_eq!(page.headers["x-frame-options"], "DENY");
    let known =
        |path: &str, tag: &str| gateway.request("GET", path, "", &[("if-none-match", tag)], &[]).status;
    assert_eq!(known("/", &page.headers["etag"]), 304);
    assert_eq!(known("/", "\"another\""), 200);
    let text = page.text();
    assert!(!text.contains("http:") && !text.contains("https:") && !text.contains("{{version}}"), "{text}");
    let files: Vec<&str> = text.split('"').filter(|part| part.starts_with("/dashboard/")).collect();
    assert_eq!(files.len(), 4, "{files:?}");
    for path in &files {
        let file = gateway.get(path, "");
        assert_eq!(file.status, 200, "{path}");
        assert_eq!(file.headers["cache-control"], "public, max-age=31536000, immutable");
        assert_eq!(file.headers["x-content-type-options"], "nosniff");
        assert_eq!(known(path, &file.headers["etag"]), 304);
    }
    let version = files[0].split('/').nth(2).expect("a version");
    for path in ["app.js", "uplot-license.txt"] {
        assert_eq!(gateway.get(&format!("/dashboard/{version}/{path}"), "").status, 200, "{path}");
    }
    for path in [format!("/dashboard/{version}/none.js"), "/dashboard/0000000000000000/app.js".to_owned()] {
        assert_eq!(gateway.get(&path, "").status, 404, "{path}");
    }
}

#[test]
fn the_type_of_a_problem_is_a_page_that_says_what_to_do() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let kind = gateway.get("/v1/datasources", "").json()["type"].as_str().expect("a type").to_owned();
    let page = gateway.get(&kind, "");
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, "text/html; charset=utf-8"));
    assert!(page.headers["content-security-policy"].starts_with("default-src 'none'"));
    let text = page.text();
    for words in ["A valid API key is needed", "HTTP 401", "revoked_key", "unknown_key"] {
        assert!(text.contains(words), "{words}");
    }
    for none in ["/problems/none", "/problems/%3Cscript%3E"] {
        let answer = gateway.get(none, "");
        assert_eq!(answer.status, 404);
        assert!(answer.text().contains("unauthorized"), "it names those that there are");
    }
}

#[test]
fn where_the_administration_is_apart_devices_have_no_dashboard() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.admin.listen", "127.0.0.1:0").start();
    let page = gateway.get("/", "");
    assert_eq!(page.status, 404);
    for (method, path) in [("POST", "/v1/session"), ("GET", "/v1/session")] {
        assert_eq!(gateway.request(method, path, "any", &[], &[]).status, 404, "{method} {path}");
        assert_ne!(
            gateway.request(method, path, &gateway.admin_key(), &[], &[]).status,
            404,
            "{method} {path}"
        );
    }
}
