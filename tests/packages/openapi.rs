//! `openapi.json` as others read it: Redocly's linter, with its recommended rules.

use std::process::Command;

use crate::{installed, project};

#[test]
fn redocly_finds_nothing_wrong_in_the_description_of_the_api() {
    let output = Command::new("node")
        .arg(installed("node/node_modules/@redocly/cli/bin/cli.js"))
        .args(["lint", "--config"])
        .arg(project("tests/packages/redocly.yaml"))
        .arg(project("src/front/http/openapi.json"))
        .envs([("REDOCLY_TELEMETRY", "off"), ("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true"), ("CI", "true")])
        .output()
        .expect("there is Redocly's command line (tests/run installs it)");
    let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{words}");
}
