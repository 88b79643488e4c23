//! No key is an argument of a program in anything that is to be copied: every user of a machine can read the arguments of
//! all its processes.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::common::{Gateway, scratch};

/// What a shell puts into an argument: the name of a variable or place that holds a key.
const KEY_NAMES: [&str; 6] = ["KEY", "TOKEN", "hgk_", "hgt_", "SECRET", "PASSWORD"];
/// Options of programs, behind which a key would be one of their arguments.
const KEY_OPTIONS: [&str; 12] = [
    "-u ",
    "-P ",
    "-pw ",
    "--username",
    "--pw ",
    "--password",
    "--user ",
    "--pass",
    "--token",
    "--api-key",
    "-H \"Authorization",
    "-H \"X-API-Key",
];

/// The option of a line that gives a key as an argument. What a builtin of the shell writes into a file or a pipe is none.
fn key_argument(line: &str) -> Option<&'static str> {
    let line = match line.split_once("printf '%s\\n' \"") {
        Some((before, rest)) => format!("{before}{}", rest.split_once('"').map_or("", |(_, after)| after)),
        None => line.to_owned(),
    };
    let is_key = |text: &str| {
        let word = text.trim_start_matches(['=', ' ', '"', '\'', ':']).trim_start_matches("Bearer ");
        let word: &str = word.split(['"', '\'', ' ', ',', ')']).next().unwrap_or_default();
        KEY_NAMES.iter().any(|name| word.contains(name))
    };
    KEY_OPTIONS.into_iter().find(|option| {
        line.match_indices(option).any(|(at, _)| {
            // An option stands alone: `--scope-u x` is another one.
            line[..at].chars().next_back().is_none_or(char::is_whitespace)
                && is_key(&line[at + option.len()..])
        })
    })
}

fn files_below(path: &Path, found: &mut Vec<PathBuf>) {
    if !path.is_dir() {
        return found.push(path.to_owned());
    }
    for entry in std::fs::read_dir(path).expect("readable") {
        files_below(&entry.expect("an entry").path(), found);
    }
}

#[test]
fn an_argument_is_told_from_what_is_none() {
    for bad in [
        "mosquitto_sub -u \"$SUBSCRIBE_KEY\" -t '#'",
        "mosquitto_pub -P $HEADGATE_API_KEY",
        "curl -H \"Authorization: Bearer $KEY\" http://x",
        "curl -H \"X-API-Key: hgk_abc\"",
        "nats pub --password=$HEADGATE_API_KEY x",
        "nats --token hgt_abc pub",
    ] {
        assert!(key_argument(bad).is_some(), "{bad}");
    }
    for good in [
        "printf '%s\\n' \"-u $HEADGATE_API_KEY\" > ~/.config/mosquitto_pub",
        "printf '%s\\n' \"Authorization: Bearer $KEY\" | curl -H @- http://x",
        "NATS_USER=device NATS_PASSWORD=$HEADGATE_API_KEY nats req x",
        "headgate key rotate press-4 KEY_ID --grace 24h",
        "mosquitto_sub -u reader -t '#'",
        "--data-dir DIR",
    ] {
        assert_eq!(key_argument(good), None, "{good}");
    }
}

#[test]
fn nothing_that_is_to_be_copied_has_a_key_as_an_argument() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for place in ["README.md", "docs", "config", "examples", "src/cli", "src/front/http"] {
        files_below(&root.join(place), &mut files);
    }
    assert!(files.len() > 100, "{files:?}");
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        for (number, line) in text.lines().enumerate() {
            if let Some(option) = key_argument(line) {
                found.push(format!("{}:{}: {option}: {line}", file.display(), number + 1));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_line_to_connect_has_a_key_as_an_argument() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let wanted = json!({ "name": "Press 4", "scopes": ["ingest", "subscribe"] });
    let made = gateway.post("/v1/datasources", &gateway.admin_key(), &wanted).json();
    let secret = made["key"]["secret"].as_str().expect("a secret").to_owned();
    let lines = made["connect"].as_object().expect("lines to connect");
    assert!(lines.len() >= 3, "{made}");
    for (name, line) in lines {
        let Value::String(line) = line else { continue };
        assert!(!line.contains(&secret), "{name}");
        for line in line.lines() {
            assert_eq!(key_argument(line), None, "{name}: {line}");
        }
    }
}
