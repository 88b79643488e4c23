//! A script tells a failure by its exit code, and a person by words that speak of the command and of the key that was used.

use std::net::TcpListener;

use serde_json::json;

use crate::cli::{fails_with, headgate, prints, to};
use crate::common::{Gateway, scratch};

#[test]
fn each_kind_of_failure_has_its_exit_code() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let with = |key: &str, args: &[&str]| {
        let mut command = to(&gateway, args);
        command.env("HEADGATE_API_KEY", key);
        command
    };
    let key_id = source.key_id.as_str();
    for args in [
        &["datasource", "show", "Press 4"][..],
        &["records", "a/b"],
        &["key", "revoke", "press-4", "nonsense"],
        &["publish", "press-4", "a/#", "1"],
        &["datasource", "create", "x", "--id", "X"],
        &["datasource", "limit", "press-4", "--set", "topics=1", "--unset", "topics"],
    ] {
        fails_with(&mut to(&gateway, args), &[2]);
    }
    for args in [
        &["key", "create", "press-4", "--scope", "read"][..],
        &["key", "token", "press-4", key_id, "--scope", "admin"],
        &["datasource", "create", "x", "--scope", "Ingest"],
    ] {
        let output = to(&gateway, args).output().expect("headgate runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(2) && said.contains("possible values: ingest, subscribe"),
            "{said}"
        );
    }
    for (key, args) in [
        (source.key.as_str(), &["datasource", "list"][..]),
        ("hgk_none", &["datasource", "list"]),
        (&source.key, &["records", "press-4"]),
        (&source.key, &["publish", "press-5", "t", "1"]),
        (&source.key, &["publish", "press-4", "t", "1", "--addr", &gateway.mqtt.to_string()]),
    ] {
        let mut command = with(key, args);
        match args.last() {
            Some(addr) if *addr == gateway.mqtt.to_string() => drop(prints(&mut command)),
            _ => drop(fails_with(&mut command, &[3])),
        }
    }
    let taken = ["datasource", "create", "again", "--id", "press-4"];
    fails_with(&mut to(&gateway, &taken), &[3]);
    for args in [
        &["datasource", "show", "press-9"][..],
        &["records", "press-9"],
        &["tail", "press-9"],
        &["key", "revoke", "press-4", "0123456789ab"],
        &["key", "rotate", "press-9", key_id],
        &["key", "limit", "press-4", "0123456789ab"],
    ] {
        let said = fails_with(&mut to(&gateway, args), &[4]);
        assert!(said.starts_with("headgate: not found: "), "{said}");
    }
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let mut away = to(&gateway, &["datasource", "list"]);
    let said = fails_with(away.env("HEADGATE_URL", format!("http://{nobody}")), &[5]);
    assert!(said.contains("no gateway answers at http://"), "{said}");
    let nobody = nobody.to_string();
    fails_with(&mut with(&source.key, &["publish", "press-4", "t", "1", "--addr", &nobody]), &[5]);
    let dir = scratch();
    let missing = dir.path().join("missing.toml");
    fails_with(headgate(&["check-config"]).arg(missing), &[1]);
    let help = prints(&mut headgate(&["--help"]));
    for line in [
        "Exit codes:",
        "  3  the gateway or the cluster refused it",
        "  4  not found",
        "  5  no gateway answers",
    ] {
        assert!(help.contains(line), "{line}: {help}");
    }
}

#[test]
fn ping_needs_no_key_and_tells_a_gateway_from_whatever_else_answers() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let ping = |url: &str, args: &[&str]| {
        let mut command = headgate(&[&["ping"], args].concat());
        command.env("HEADGATE_URL", url);
        command
    };
    let url = format!("http://{}", gateway.http);
    assert_eq!(prints(&mut ping(&url, &[])), format!("alive at {url}\n"));
    assert_eq!(prints(&mut ping(&format!("{url}/"), &["--ready"])), format!("ready at {url}\n"));
    assert!(prints(&mut ping(&url, &["--json"])).contains("\"alive\": true"));
    assert!(prints(&mut ping(&url, &["--ready", "--json"])).contains("\"status\": \"ready\""));
    // A page of the gateway that is none of the two, as whatever else would answer.
    for args in [&[][..], &["--ready"]] {
        let said = fails_with(&mut ping(&format!("{url}/v1"), args), &[1]);
        assert!(said.contains("no gateway"), "{said}");
    }
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let said = fails_with(&mut ping(&format!("http://{nobody}"), &[]), &[5]);
    assert!(said.contains("no gateway answers at"), "{said}");
}

/// What was said of a refused key was which headers HTTP takes, and not which key it was.
#[test]
fn a_refused_key_is_named_with_its_place_and_never_shown() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let file = dir.path().join("device.key");
    std::fs::write(&file, format!("{}\n", source.key)).expect("written");
    let secret = &source.key[4..12];
    let told = |said: &str, place: &str| {
        assert!(said.contains(&source.key_id) && said.contains(place), "{said}");
        assert!(!said.contains(secret) && !said.contains("header") && !said.contains("HTTP"), "{said}");
    };
    let mut command = to(&gateway, &["datasource", "list"]);
    told(&fails_with(command.env("HEADGATE_API_KEY", &source.key), &[3]), "HEADGATE_API_KEY");
    let mut command = to(&gateway, &["datasource", "show", "press-5"]);
    let said = fails_with(command.env("HEADGATE_API_KEY_FILE", &file), &[3]);
    told(&said, file.to_str().expect("text"));
    let mut cut = to(&gateway, &["datasource", "list"]);
    let said = fails_with(cut.env("HEADGATE_API_KEY", &source.key[..40]), &[3]);
    assert!(said.contains("cut short") && !said.contains(secret), "{said}");
    // Another gateway's admin.key beside this one's URL.
    let other = scratch();
    let elsewhere = Gateway::start(other.path());
    let mut command = to(&gateway, &["datasource", "list"]);
    let said = fails_with(command.env("HEADGATE_DATA_DIR", other.path()), &[3]);
    let place = elsewhere.dir().join("admin.key");
    assert!(said.contains(place.to_str().expect("text")), "{said}");
    // A key in the place of its id goes nowhere.
    for args in [
        &["records", "press-4", "--key", &source.key][..],
        &["records", "press-4", "--key-id", &source.key],
        &["key", "revoke", "press-4", &source.key],
        &["key", "rotate", "press-4", &source.key],
        &["key", "quarantine", "press-4", &source.key, "--since", "1h"],
        &["key", "limit", "press-4", &source.key],
    ] {
        let mut command = headgate(args);
        command.env("HEADGATE_URL", "http://127.0.0.1:1").env("HEADGATE_API_KEY", gateway.admin_key());
        let said = fails_with(&mut command, &[2]);
        assert!(said.contains(&source.key_id) && said.contains("sent nowhere"), "{said}");
        assert!(!said.contains(secret), "{said}");
    }
    assert_eq!(gateway.post("/v1/ingest/press-4", &source.key, &json!(1)).status, 200);
}
