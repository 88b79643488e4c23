//! The configurations in `config/proxy`, in real proxies: nginx and Caddy as Debian has them. Clients come from 127.0.0.2, the
//! proxy is at 127.0.0.1, and whom the gateway names is the client.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::common::tls::Identity;
use crate::common::{Gateway, Setup, python, scratch, wait_for};
use crate::{installed, text};

const CLIENT: &str = "127.0.0.2";

/// A proxy in front of a gateway.
struct Proxy {
    process: Child,
    dir: tempfile::TempDir,
    ca: PathBuf,
    https: SocketAddr,
    mqtts: SocketAddr,
    gateway: Gateway,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // SIGTERM, for its workers.
        let pid = libc::pid_t::try_from(self.process.id()).expect("a process id");
        // SAFETY: kill(2) takes two integers; the child has not been waited for, so the id is its.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let _ = self.process.wait();
    }
}

/// A port that nobody has. Another process may take it before it is used.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}

/// `text` with every one of these replaced; each has to be there.
fn replaced(text: &str, with: &[(&str, String)]) -> String {
    with.iter().fold(text.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "{old:?} is not in the configuration");
        text.replace(old, new)
    })
}

impl Proxy {
    /// Starts a proxy on a configuration that `write` makes, until one stays: its ports may have been taken meanwhile.
    fn start(write: impl Fn(&Proxy, &Identity) -> Command) -> Self {
        let dir = scratch();
        let issuer = Identity::issuer(dir.path(), "issuer");
        let own = issuer.issue(dir.path(), "proxy");
        let gateway = Setup::on(&dir.path().join("data")).set("trusted_proxies", "127.0.0.1").start();
        let nobody = Command::new("true").spawn().expect("true");
        let mut proxy =
            Self { process: nobody, dir, ca: issuer.certificate, https: free(), mqtts: free(), gateway };
        for _ in 0..5 {
            (proxy.https, proxy.mqtts) = (free(), free());
            let log = std::fs::File::create(proxy.dir.path().join("proxy.log")).expect("made");
            let _ = proxy.process.wait();
            let mut command = write(&proxy, &own);
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
            proxy.process = command.spawn().expect("there is the proxy (tests/run fetches it)");
            let is_up = wait_for("the proxy to serve or to end", || {
                if proxy.process.try_wait().expect("our child").is_some() {
                    return Some(false);
                }
                TcpStream::connect(proxy.https).is_ok().then_some(true)
            });
            if is_up {
                return proxy;
            }
        }
        panic!("{}", proxy.log());
    }

    fn nginx() -> Self {
        Self::start(|proxy, own| {
            let dir = proxy.dir.path();
            let modules = installed("proxies/usr/lib/nginx/modules");
            let config = replaced(
                &text("config/proxy/nginx.conf"),
                &[
                    ("modules/ngx_stream_module.so", format!("{}/ngx_stream_module.so", modules.display())),
                    ("user www-data;\n", String::new()),
                    // A test may have fewer.
                    ("worker_rlimit_nofile 131072;\n", String::new()),
                    ("worker_connections 65536", "worker_connections 256".to_owned()),
                    ("worker_processes auto", "worker_processes 1".to_owned()),
                    ("/run/nginx.pid", format!("{}/nginx.pid", dir.display())),
                    ("/var/log/nginx/error.log", format!("{}/proxy.log", dir.display())),
                    ("/var/log/nginx/access.log", format!("{}/access.log", dir.display())),
                    (
                        "/etc/letsencrypt/live/iot.example.com/fullchain.pem",
                        own.certificate.display().to_string(),
                    ),
                    ("/etc/letsencrypt/live/iot.example.com/privkey.pem", own.key.display().to_string()),
                    ("listen 8883 ssl", format!("listen {} ssl", proxy.mqtts)),
                    ("listen 443 ssl", format!("listen {} ssl", proxy.https)),
                    ("127.0.0.1:1883", proxy.gateway.mqtt.to_string()),
                    ("127.0.0.1:8080", proxy.gateway.http.to_string()),
                    ("server_name iot.example.com", "server_name localhost".to_owned()),
                ],
            );
            let places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|of| format!("    {of}_temp_path {}/{of};\n", dir.display()));
            let config = config.replace("http {\n", &format!("http {{\n{}", places.concat()));
            std::fs::write(dir.join("nginx.conf"), config).expect("written");
            let mut nginx = Command::new(installed("proxies/usr/sbin/nginx"));
            nginx.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).args(["-g", "daemon off;"]);
            nginx
        })
    }

    fn caddy() -> Self {
        Self::start(|proxy, own| {
            let dir = proxy.dir.path();
            let (certificate, key) = (own.certificate.display(), own.key.display());
            let config = replaced(
                &text("config/proxy/Caddyfile"),
                &[
                    (
                        "{\n\tservers {",
                        "{\n\tadmin off\n\tauto_https disable_redirects\n\tservers {".to_owned(),
                    ),
                    (
                        "\niot.example.com {",
                        format!("\nhttps://localhost:{} {{\n\ttls {certificate} {key}", proxy.https.port()),
                    ),
                    ("127.0.0.1:8080", proxy.gateway.http.to_string()),
                ],
            );
            std::fs::write(dir.join("Caddyfile"), config).expect("written");
            let mut caddy = Command::new(installed("proxies/usr/bin/caddy"));
            caddy.args(["run", "--adapter", "caddyfile", "--config"]).arg(dir.join("Caddyfile"));
            caddy.env("HOME", dir).env("XDG_DATA_HOME", dir).env("XDG_CONFIG_HOME", dir);
            caddy
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("proxy.log")).unwrap_or_default()
    }

    /// curl, from the client's address.
    fn curl(&self, path: &str) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "20", "--http2", "--interface", CLIENT])
            .arg("--cacert");
        curl.arg(&self.ca).arg(format!("https://localhost:{}{path}", self.https.port()));
        curl
    }

    fn answer(&self, path: &str, arguments: &[&str]) -> (u16, Vec<u8>) {
        let mut curl = self.curl(path);
        let output =
            curl.args(["--write-out", "\n%{http_code}"]).args(arguments).output().expect("curl runs");
        let end =
            output.stdout.iter().rposition(|byte| *byte == b'\n').unwrap_or_else(|| panic!("{output:?}"));
        let status = String::from_utf8_lossy(&output.stdout[end + 1..]).parse().expect("a status");
        (status, output.stdout[..end].to_vec())
    }

    fn post(&self, path: &str, key: &str, more: &[&str], payload: &str) -> u16 {
        let key = format!("Authorization: {key}");
        let mut arguments = vec!["-H", key.as_str(), "--data-binary", payload];
        arguments.extend(more);
        self.answer(path, &arguments).0
    }

    /// The address of every refusal for a cause.
    fn refused(&self, cause: &str) -> Vec<String> {
        let answer =
            self.gateway.get(&format!("/v1/refusals?cause={cause}"), &self.gateway.admin_key()).json();
        let refusals = answer["refusals"].as_array().expect("a list").clone();
        refusals.iter().map(|refusal| refusal["address"].as_str().expect("an address").to_owned()).collect()
    }

    fn key(&self, key_id: &str) -> Value {
        let keys = self.gateway.get("/v1/datasources/press-4/keys", &self.gateway.admin_key()).json();
        let keys = keys["keys"].as_array().expect("keys").clone();
        keys.into_iter().find(|key| key["id"] == key_id).expect("the key")
    }

    /// paho's client, connected from the client's address: it publishes, says so, and waits for the end of the connection.
    fn paho(&self, port: u16, transport: &str, key: &str) -> Output {
        python(
            r#"
import sys, threading
from paho.mqtt import client as mqtt
port, transport, ca, key, address = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
ended = threading.Event()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport=transport)
client.reconnect_delay_set(60)
client.username_pw_set(key)
client.tls_set(ca)
client.ws_set_options(path="/mqtt")
client.on_disconnect = lambda *_: ended.set()
client.connect("localhost", port, bind_address=address)
client.loop_start()
client.publish("spindle/temp", '{"value": 1}', qos=1).wait_for_publish(15)
assert client.is_connected(), "connected"
print("acknowledged", flush=True)
assert ended.wait(15), "the connection ends with its key"
"#,
            &[&port.to_string(), transport, self.ca.to_str().expect("UTF-8"), key, CLIENT],
        )
    }
}

fn everything_over_http(proxy: &Proxy) {
    let gateway = &proxy.gateway;
    let source = gateway.create_open("press-4");
    let forged = [
        "-H",
        "X-Forwarded-For: 198.51.100.1",
        "-H",
        "X-Forwarded-Proto: gopher",
        "-H",
        "Forwarded: for=198.51.100.2",
    ];
    assert_eq!(proxy.post("/v1/ingest/press-4", &source.key, &forged, "1"), 200, "{}", proxy.log());
    assert_eq!(proxy.key(&source.key_id)["last_used"]["address"], CLIENT);
    assert_eq!(proxy.post("/v1/ingest/press-4", "nonsense", &forged, "1"), 401);
    wait_for("the refusal", || (proxy.refused("malformed_key") == [CLIENT]).then_some(()));

    // The path is the client's: a topic may have empty levels, and what is escaped stays so.
    assert_eq!(proxy.post("/v1/ingest/press-4/a//b/c%20d", &source.key, &[], "2"), 200);
    let records = gateway.stored("press-4", 2);
    assert_eq!(records[1]["topic"], "a//b/c d");

    // What is larger is refused before it is sent.
    let large = proxy.dir.path().join("large");
    std::fs::write(&large, vec![b'x'; (16 << 20) + 1]).expect("written");
    let large = format!("@{}", large.display());
    assert_eq!(proxy.post("/v1/ingest/press-4", &source.key, &[], &large), 413);
    assert_eq!(proxy.answer("/metrics", &[]).0, 404);
    assert_eq!(proxy.answer("/readyz", &[]).0, 200);
    assert_eq!(proxy.answer("/", &[]).0, 200, "the dashboard");

    streams_are_passed_on_at_once(proxy, &source.key);

    let revoked = gateway.request(
        "DELETE",
        &format!("/v1/datasources/press-4/keys/{}", source.key_id),
        &gateway.admin_key(),
        &[],
        &[],
    );
    assert_eq!(revoked.status, 204);
    assert_eq!(proxy.post("/v1/ingest/press-4", &source.key, &[], "3"), 401);
    wait_for("the refusal", || proxy.refused("revoked_key").contains(&CLIENT.to_owned()).then_some(()));
}

/// A proxy that buffers gives nothing until it has some kilobytes, or until the stream ends.
fn streams_are_passed_on_at_once(proxy: &Proxy, key: &str) {
    for (accept, wanted) in [("text/event-stream", "data:"), ("application/x-ndjson", "{")] {
        let mut curl = proxy.curl("/v1/datasources/press-4/stream?from_offset=0");
        let headers = [format!("Authorization: {key}"), format!("Accept: {accept}")];
        curl.args(["--no-buffer", "-H", &headers[0], "-H", &headers[1]]).stdout(Stdio::piped());
        let mut curl = curl.spawn().expect("curl runs");
        let mut lines = BufReader::new(curl.stdout.take().expect("piped")).lines();
        let mut seen = 0;
        while seen < 2 {
            let line = lines.next().expect("the stream goes on").expect("UTF-8");
            seen += usize::from(line.starts_with(wanted) && line.contains("offset"));
        }
        // It is open, and a record that comes now is there at once.
        assert_eq!(proxy.post("/v1/ingest/press-4", key, &[], "\"now\""), 200);
        while !lines.next().expect("the stream goes on").expect("UTF-8").contains("now") {}
        curl.kill().expect("our child");
        curl.wait().expect("our child");
    }
}

/// MQTT through the proxy, until the key is revoked.
fn mqtt_ends_with_its_key(proxy: &Proxy, id: &str, port: u16, transport: &str) {
    let gateway = &proxy.gateway;
    let source = gateway.create_open(id);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| proxy.paho(port, transport, &source.key));
        let keys = format!("/v1/datasources/{id}/keys");
        wait_for("the client's publish", || {
            let key = gateway.get(&keys, &gateway.admin_key()).json()["keys"][0].clone();
            (key["last_used"]["address"] == CLIENT && key["accepted"] == 1).then_some(())
        });
        let path = format!("{keys}/{}", source.key_id);
        assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
        let output = client.join().expect("paho");
        assert!(output.status.success(), "{transport}: {}", String::from_utf8_lossy(&output.stderr));
    });
}

#[test]
fn nginx_passes_on_http_websockets_and_mqtt_with_the_address_of_the_client() {
    let proxy = Proxy::nginx();
    everything_over_http(&proxy);
    mqtt_ends_with_its_key(&proxy, "by-websocket", proxy.https.port(), "websockets");
    mqtt_ends_with_its_key(&proxy, "by-tcp", proxy.mqtts.port(), "tcp");
}

#[test]
fn caddy_passes_on_http_and_websockets_with_the_address_of_the_client() {
    let proxy = Proxy::caddy();
    everything_over_http(&proxy);
    mqtt_ends_with_its_key(&proxy, "by-websocket", proxy.https.port(), "websockets");
}

/// What the configurations tell people to set is what there is.
#[test]
fn the_settings_that_the_configurations_name_exist() {
    let dir = scratch();
    for file in ["config/proxy/nginx.conf", "config/proxy/Caddyfile"] {
        let lines: Vec<String> = text(file)
            .lines()
            .filter_map(|line| line.strip_prefix("#   "))
            .filter(|line| line.contains(" = "))
            .map(str::to_owned)
            .collect();
        assert!(lines.len() >= 2, "{file}");
        let config = dir.path().join("headgate.toml");
        std::fs::write(&config, lines.join("\n")).expect("written");
        let checked = Setup::on(Path::new("unused")).run(&["check-config", config.to_str().expect("UTF-8")]);
        assert!(checked.status.success(), "{file}: {}", String::from_utf8_lossy(&checked.stderr));
    }
}
