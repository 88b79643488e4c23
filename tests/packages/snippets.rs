//! The snippets of docs/devices.md and docs/backends.md, as they stand there, against a gateway. A block that is marked `sh`,
//! `python`, `js` or `c` is run; an unmarked one, or one of another language, is not. The default addresses in it are
//! replaced by those of the gateway under test, and nothing else.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{Gateway, Source, scratch};
use crate::{installed, text};

/// A marked block: its language, where it stands, what it is.
struct Snippet {
    language: String,
    line: usize,
    code: String,
}

fn snippets(page: &str) -> Vec<Snippet> {
    let mut found = Vec::new();
    let mut open: Option<Snippet> = None;
    for (n, line) in text(page).lines().enumerate() {
        match (line.strip_prefix("```"), open.as_mut()) {
            (Some(language), None) => {
                open =
                    Some(Snippet { language: language.trim().to_owned(), line: n + 1, code: String::new() });
            }
            (Some(_), Some(_)) => found.extend(open.take()),
            (None, Some(snippet)) => {
                snippet.code.push_str(line);
                snippet.code.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{page}: a block is not closed");
    found.retain(|snippet| ["sh", "python", "js", "c"].contains(&snippet.language.as_str()));
    found
}

/// What the blocks find: a home of their own, the commands, the keys, and the gateway where they look for one.
struct Stage {
    dir: tempfile::TempDir,
    gateway: Gateway,
    device: Source,
    backend: Source,
}

impl Stage {
    fn new() -> Self {
        let dir = scratch();
        let gateway = Gateway::start(&dir.path().join("headgate-data"));
        let device = gateway.create("press-4");
        let body = serde_json::json!({ "scopes": ["subscribe"] });
        let answer = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        let backend = Source {
            id: "press-4".to_owned(),
            key_id: String::new(),
            key: answer.json()["key"]["secret"].as_str().expect("a key").to_owned(),
        };
        for (name, port) in [("mosquitto_pub", gateway.mqtt.port()), ("mosquitto_sub", gateway.mqtt.port())] {
            // The default port is not free for a test.
            let path = dir.path().join("bin").join(name);
            std::fs::create_dir_all(dir.path().join("bin")).expect("made");
            let real = format!("/usr/bin/{name}");
            std::fs::write(&path, format!("#!/bin/sh\nexec {real} -h 127.0.0.1 -p {port} \"$@\"\n"))
                .expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        }
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_headgate"), dir.path().join("bin/headgate"))
            .expect("linked");
        Self { dir, gateway, device, backend }
    }

    fn run(&self, snippet: &Snippet, key: &str) -> Output {
        let code = snippet
            .code
            .replace("127.0.0.1:1883", &self.gateway.mqtt.to_string())
            .replace("127.0.0.1:8080", &self.gateway.http.to_string())
            .replace("127.0.0.1\", 1883", &format!("127.0.0.1\", {}", self.gateway.mqtt.port()));
        let path = self.dir.path().join(format!("snippet-{}.{}", snippet.line, snippet.language));
        std::fs::write(&path, code).expect("written");
        let mut command = match snippet.language.as_str() {
            "sh" => {
                let mut bash = Command::new("bash");
                bash.args(["-euo", "pipefail"]).arg(&path);
                bash
            }
            "python" => {
                let mut python = Command::new(installed("venv/bin/python3"));
                python.arg(&path);
                python
            }
            "js" => {
                let mut node = Command::new("node");
                node.args(["--input-type=module", "-e"])
                    .arg(std::fs::read_to_string(&path).expect("written"));
                node
            }
            _ => {
                let program = path.with_extension("out");
                let mut cc = Command::new("cc");
                let built = cc
                    .arg("-Wall")
                    .arg("-Werror")
                    .arg(&path)
                    .arg("-lmosquitto")
                    .arg("-o")
                    .arg(&program)
                    .output();
                let built = built.expect("there is a C compiler");
                assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
                Command::new(program)
            }
        };
        // ES modules are looked for from the directory on.
        let modules = self.dir.path().join("node_modules");
        if !modules.exists() {
            std::os::unix::fs::symlink(
                std::fs::canonicalize(installed("node/node_modules")).expect("there"),
                &modules,
            )
            .expect("linked");
        }
        let bin = self.dir.path().join("bin");
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
            command.env_remove(name);
        }
        command
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path())
            .env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").expect("a path")))
            .env("HEADGATE_URL", format!("http://{}", self.gateway.http))
            .env("HEADGATE_API_KEY", key)
            .env("SUBSCRIBE_KEY", &self.backend.key)
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", snippet.language))
    }
}

fn expect_success(page: &str, snippet: &Snippet, output: &Output) {
    assert!(
        output.status.success(),
        "{page}, line {}: {}\n{}{}",
        snippet.line,
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Whether a block needs what only `tests/run` on Debian installs.
fn is_left_out(snippet: &Snippet) -> bool {
    snippet.language == "c" && !Path::new("/usr/include/mosquitto.h").exists()
}

#[test]
fn every_way_to_publish_of_the_page_for_devices_publishes() {
    let page = "docs/devices.md";
    let stage = Stage::new();
    let mut kept = 0.0;
    let snippets = snippets(page);
    for language in ["sh", "python", "js", "c"] {
        assert!(snippets.iter().any(|snippet| snippet.language == language), "{language}");
    }
    for snippet in snippets.iter().filter(|snippet| !is_left_out(snippet)) {
        let output = stage.run(snippet, &stage.device.key);
        expect_success(page, snippet, &output);
        let now = stage.gateway.records_in_log();
        assert!(now > kept, "{page}, line {}: it has published nothing", snippet.line);
        kept = now;
    }
    #[allow(clippy::cast_possible_truncation)]
    let records = stage.gateway.stored("press-4", kept as usize);
    let is_reading = |record: &serde_json::Value| {
        let payload = &record["payload"];
        payload["value"].is_number()
            || payload.as_str().is_some_and(|line| line.starts_with("spindle,hall=b temp=21.5"))
    };
    assert!(records.iter().all(is_reading), "{records:?}");
}

#[test]
fn every_way_to_read_of_the_page_for_backends_reads() {
    let page = "docs/backends.md";
    let stage = Stage::new();
    for n in 0..20 {
        let payload = serde_json::json!({ "value": 20.0 + f64::from(n) / 10.0 });
        let answer = stage.gateway.post("/v1/ingest/press-4/spindle/temp", &stage.device.key, &payload);
        assert_eq!(answer.status, 200);
    }
    stage.gateway.stored("press-4", 20);
    let snippets = snippets(page);
    for language in ["sh", "python", "js"] {
        assert!(snippets.iter().any(|snippet| snippet.language == language), "{language}");
    }
    for snippet in snippets {
        let output = stage.run(&snippet, &stage.backend.key);
        expect_success(page, &snippet, &output);
        let read = String::from_utf8_lossy(&output.stdout);
        assert!(
            read.contains("20") || read.contains("21"),
            "{page}, line {}: it shows no reading: {read}",
            snippet.line
        );
    }
}
