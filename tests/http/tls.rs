//! HTTPS, and the administration's own listener: with curl, mqtt.js and paho, which nobody here wrote, and by a client that
//! sees the certificate it is shown.

use std::ffi::CString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};

use crate::common::tls::{Identity, TlsClient};
use crate::common::{Gateway, Setup, Source, http, http_agent, node, python, scratch, signal, wait_for};

/// A gateway with a certificate for HTTP and MQTT, its issuer, and a datasource.
struct Scene {
    dir: tempfile::TempDir,
    issuer: Identity,
    identity: Identity,
    gateway: Gateway,
    source: Source,
}

impl Scene {
    fn new(more: impl FnOnce(Setup) -> Setup) -> Self {
        let dir = scratch();
        let issuer = Identity::issuer(dir.path(), "issuer");
        let identity = issuer.issue(dir.path(), "gateway");
        let setup = ["http", "mqtt"].iter().fold(Setup::on(&dir.path().join("data")), |setup, front| {
            setup
                .set(&format!("{front}.tls.certificate"), identity.certificate.display())
                .set(&format!("{front}.tls.key"), identity.key.display())
        });
        let gateway = more(setup).start();
        let source = gateway.create("press-4");
        Self { dir, issuer, identity, gateway, source }
    }

    fn addr(&self) -> SocketAddr {
        self.gateway.https.expect("it says where it serves HTTPS")
    }

    fn ca(&self) -> &str {
        self.issuer.certificate.to_str().expect("UTF-8")
    }

    fn curl(&self, addr: SocketAddr, path: &str, arguments: &[&str]) -> Output {
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "20", "--cacert", self.ca(), "-w", "\n%{http_code} %{http_version}"])
            .args(arguments)
            .arg(format!("https://{addr}{path}"))
            .output();
        output.expect("curl is installed")
    }

    /// The certificates that new connections to both listeners are shown.
    fn shown(&self) -> [Vec<u8>; 2] {
        [self.addr(), self.gateway.mqtts.expect("it says where it serves MQTT over TLS")]
            .map(|addr| TlsClient::connect(addr, &self.issuer, None).expect("a handshake").shown().to_vec())
    }
}

fn as_is(setup: Setup) -> Setup {
    setup
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
fn curl_posts_over_each_version_of_http_and_tls() {
    let scene = Scene::new(as_is);
    let key = format!("Authorization: Bearer {}", scene.source.key);
    for (way, version) in [
        (["--http1.1", "--tlsv1.2"], "1.1"),
        (["--http2", "--tlsv1.2"], "2"),
        (["--http2", "--tlsv1.3"], "2"),
        (["--http2-prior-knowledge", "--tlsv1.3"], "2"),
    ] {
        let output =
            scene.curl(scene.addr(), "/v1/ingest/press-4/t", &[&way[..], &["-H", &key, "-d", "{}"]].concat());
        assert!(text(&output).ends_with(&format!("200 {version}")), "{way:?}: {}", text(&output));
    }
    assert_eq!(scene.gateway.stored("press-4", 4).len(), 4);
    for (offered, chosen) in
        [(&[&b"h2"[..], b"http/1.1"][..], Some(&b"h2"[..])), (&[b"http/1.1"], Some(b"http/1.1")), (&[], None)]
    {
        let client = TlsClient::offering(scene.addr(), &scene.issuer, offered).expect("a handshake");
        assert_eq!(client.protocol(), chosen);
    }
    // Plain HTTP is no TLS, and says so to the operator.
    let addr = scene.addr().to_string();
    let output = Command::new("curl").args(["-sS", &format!("http://{addr}/livez")]).output().expect("curl");
    assert!(!output.status.success());
    let metric = "headgate_refused_total{transport=\"http\",cause=\"tls_handshake\"}";
    wait_for("the refusal", || (scene.gateway.metric(metric) == 1.0).then_some(()));
    let refusals = scene.gateway.get("/v1/refusals?cause=tls_handshake", &scene.gateway.admin_key()).text();
    assert!(refusals.contains("plain HTTP is served at http.listen"), "{refusals}");
}

#[test]
fn mqtt_js_and_paho_publish_over_a_websocket_over_tls() {
    const NODE: &str = r#"
const mqtt = require("mqtt"), fs = require("fs");
const [url, key, ca] = process.argv.slice(1);
const client = mqtt.connect(url, { username: key, ca: fs.readFileSync(ca), protocolVersion: 5, reconnectPeriod: 0 });
client.on("error", (error) => { console.error(error); process.exit(1); });
client.on("connect", async () => {
  for (let n = 0; n < 20; n++) await client.publishAsync("js", "x".repeat(20000), { qos: 1 });
  await client.endAsync();
});
"#;
    const PYTHON: &str = r#"
import sys, paho.mqtt.client as mqtt
host, port, ca, key = sys.argv[1:]
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport="websockets")
client.tls_set(ca_certs=ca)
client.ws_set_options(path="/mqtt")
client.username_pw_set(key)
client.connect(host, int(port))
client.loop_start()
sent = [client.publish("paho", str(n) * 5000, qos=1) for n in range(20)]
for message in sent:
    message.wait_for_publish(15)
    assert message.is_published()
client.disconnect()
client.loop_stop()
"#;
    let scene = Scene::new(as_is);
    let (port, ca) = (scene.addr().port().to_string(), scene.ca());
    let output = node(NODE, &[&format!("wss://127.0.0.1:{port}/mqtt"), &scene.source.key, ca]);
    assert!(output.status.success(), "{}", text(&output));
    let output = python(PYTHON, &["127.0.0.1", &port, ca, &scene.source.key]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(scene.gateway.stored("press-4", 40).len(), 40);
}

/// The FIFO stopped the reloading for good, and the process could not end.
#[test]
fn a_certificate_is_replaced_whatever_stood_in_its_place_meanwhile() {
    let scene = Scene::new(as_is);
    let first = scene.identity.der().to_vec();
    assert_eq!(scene.shown(), [first.clone(), first.clone()]);
    let second = scene.issuer.issue(scene.dir.path(), "second");
    let count = |what: &str| {
        let output = scene.gateway.output();
        output
            .lines()
            .filter(|line| line.contains("WARN") && line.contains("TLS files") && line.contains(what))
            .count()
    };
    // The key of another certificate: the old pair stays, and it is said once for each listener.
    std::fs::copy(&second.key, &scene.identity.key).expect("copied");
    wait_for("the reports", || (count("not the key of") == 2).then_some(()));
    assert!(count("http.tls.key") == 1 && count("mqtt.tls.key") == 1, "{}", scene.gateway.output());
    assert_eq!(scene.shown(), [first.clone(), first.clone()]);
    // A FIFO, a directory, a socket, a device.
    let place = &scene.identity.certificate;
    let irregular = |make: &dyn Fn(&Path)| {
        let before = count("no regular file");
        let _ = std::fs::remove_file(place);
        make(place);
        wait_for("the reports", || (count("no regular file") >= before + 2).then_some(()));
        assert_eq!(scene.shown(), [first.clone(), first.clone()]);
        let before = count("No such file");
        let _ = std::fs::remove_file(place).or_else(|_| std::fs::remove_dir(place));
        wait_for("the reports", || (count("No such file") >= before + 2).then_some(()));
    };
    irregular(&|place| {
        let name = CString::new(place.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: mkfifo(3) takes a string that ends in NUL and lives across the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    });
    irregular(&|place| std::fs::create_dir(place).expect("made"));
    irregular(&|place| drop(std::os::unix::net::UnixListener::bind(place).expect("bound")));
    irregular(&|place| std::os::unix::fs::symlink("/dev/zero", place).expect("linked"));
    second.replace(&scene.identity);
    let expected = second.der().to_vec();
    wait_for("the second certificate", || {
        (scene.shown() == [expected.clone(), expected.clone()]).then_some(())
    });
    // A gateway that is asked to read them says again what is wrong.
    std::fs::copy(&scene.issuer.key, &scene.identity.key).expect("copied");
    wait_for("the reports", || (count("not the key of") == 4).then_some(()));
    signal(scene.gateway.pid(), libc::SIGHUP);
    wait_for("the reports", || (count("not the key of") == 6).then_some(()));
    assert_eq!(scene.shown(), [expected.clone(), expected]);
    scene.gateway.stop();
}

#[test]
fn a_certificate_that_cannot_be_used_stops_the_start_and_names_the_setting() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let (good, other) = (issuer.issue(dir.path(), "gateway"), issuer.issue(dir.path(), "other"));
    let fifo = dir.path().join("fifo");
    let name = CString::new(fifo.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: mkfifo(3) takes a string that ends in NUL and lives across the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    for (key, words) in [(&other.key, "not the key of"), (&fifo, "no regular file")] {
        let setup =
            Setup::on(&dir.path().join("data")).set("http.tls.certificate", good.certificate.display());
        let said = setup.set("http.tls.key", key.display()).refused().output;
        assert!(said.contains("http.tls.key") && said.contains(words), "{said}");
    }
}

#[test]
fn a_proxys_header_comes_before_the_handshake() {
    const HEADER: &[u8] = b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 8443\r\n";
    let ask = |scene: &Scene, header: &[u8]| -> std::io::Result<String> {
        let mut tcp = TcpStream::connect(scene.addr())?;
        tcp.write_all(header)?;
        let mut client = TlsClient::over(tcp, &scene.issuer, None)?;
        let key = &scene.source.key;
        let head = format!("POST /v1/ingest/press-4 HTTP/1.1\r\nHost: gw\r\nAuthorization: {key}\r\n");
        client.write_all(format!("{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}").as_bytes())?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let scene = Scene::new(|setup| setup.set("trusted_proxies", "[\"127.0.0.1\"]"));
    for (header, address) in [(HEADER, "203.0.113.9"), (b"", "127.0.0.1")] {
        let answer = ask(&scene, header).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let keys = scene.gateway.get("/v1/datasources/press-4/keys", &scene.gateway.admin_key()).json();
        assert_eq!(keys["keys"][0]["last_used"]["address"], address, "{keys}");
    }
    let scene = Scene::new(as_is);
    assert!(ask(&scene, HEADER).is_err());
    let metric = "headgate_refused_total{transport=\"http\",cause=\"untrusted_proxy\"}";
    wait_for("the refusal", || (scene.gateway.metric(metric) == 1.0).then_some(()));
}

#[test]
fn a_slow_handshake_is_not_waited_for() {
    let scene = Scene::new(|setup| setup.set("http.header_ms_max", 500));
    let mut silent = crate::wire::Wire::open(scene.addr());
    let mut half = crate::wire::Wire::open(scene.addr());
    half.send(b"\x16\x03\x01\x00\xff\x01");
    silent.end();
    half.end();
}

/// A path with the status that it has on the devices' listeners and on the administration's.
#[test]
fn the_administration_has_a_listener_of_its_own() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.admin.listen", "127.0.0.1:0").start();
    let source = gateway.create("press-4");
    let (admin_addr, admin_key) = (gateway.admin.expect("it says where"), gateway.admin_key());
    let agent = http_agent();
    let ask = |addr: SocketAddr, method: &str, path: &str, key: &str| {
        let body: &[u8] = if method == "PUT" { b"{\"schemas\":[]}" } else { b"{}" };
        http(&agent, addr, method, path, key, &[], body).expect("an answer").status
    };
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/v1/datasources"),
        ("GET", "/v1/datasources/press-4"),
        ("GET", "/v1/datasources/press-4/keys"),
        ("GET", "/v1/datasources/press-4/quarantine"),
        ("GET", "/v1/refusals"),
        ("GET", "/v1/audit"),
        ("PUT", "/v1/datasources/press-4/schema"),
    ] {
        assert_eq!(ask(gateway.http, method, path, &admin_key), 404, "{method} {path}");
        assert_eq!(ask(admin_addr, method, path, &admin_key), 200, "{method} {path}");
    }
    for (method, path) in [
        ("POST", "/v1/datasources"),
        ("DELETE", "/v1/datasources/press-4"),
        ("PATCH", "/v1/datasources/press-4"),
        ("POST", "/v1/datasources/press-4/keys"),
        ("POST", "/v1/datasources/press-4/quarantine/redrive"),
    ] {
        assert_eq!(ask(gateway.http, method, path, &admin_key), 404, "{method} {path}");
    }
    for (method, path) in [
        ("POST", "/v1/ingest/press-4"),
        ("POST", "/v1/ingest/press-4/"),
        ("POST", "/v1/ingest/press-4/t"),
        ("GET", "/v1/connect"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/openapi.json"),
    ] {
        assert_eq!(ask(gateway.http, method, path, &source.key), 200, "{method} {path}");
    }
    for path in ["records", "latest", "schema"] {
        assert_eq!(
            ask(gateway.http, "GET", &format!("/v1/datasources/press-4/{path}"), &admin_key),
            200,
            "{path}"
        );
    }
    // Devices are told of their own listener.
    let body = br#"{"id":"saw","name":"saw"}"#;
    let created =
        http(&agent, admin_addr, "POST", "/v1/datasources", &admin_key, &[], body).expect("an answer");
    let curl = created.json()["connect"]["curl"].as_str().expect("a line").to_owned();
    assert!(curl.contains(&format!("http://{}/v1/ingest/saw/", gateway.http)), "{curl}");
    // The commands work there.
    let output = Command::new(env!("CARGO_BIN_EXE_headgate"))
        .args(["datasource", "list"])
        .env("HEADGATE_URL", format!("http://{admin_addr}"))
        .env("HEADGATE_API_KEY", &admin_key)
        .output()
        .expect("headgate runs");
    assert!(output.status.success() && text(&output).contains("press-4"), "{}", text(&output));
}

#[test]
fn a_crowd_of_devices_keeps_no_administrator_out_and_its_listener_has_the_same_tls() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let identity = issuer.issue(dir.path(), "gateway");
    let data = dir.path().join("data");
    let gateway = Gateway::start(&data);
    gateway.create("press-4");
    gateway.stop();
    let gateway = Setup::on(&data)
        .set("http.connections_max", 2)
        .set("http.tls.certificate", identity.certificate.display())
        .set("http.tls.key", identity.key.display())
        .set("http.admin.listen", "127.0.0.1:0")
        .start();
    let admin = gateway.admin.expect("it says where");
    gateway.says("admin https://");
    // Requests that are under way hold all places of the devices' listeners.
    let key = std::fs::read_to_string(data.join("admin.key")).expect("readable");
    let busy = [0; 2].map(|_| {
        let mut wire = crate::wire::Wire::open(gateway.http);
        let key = crate::wire::with_key(key.trim());
        wire.head("POST", "/v1/ingest/press-4", &[&key, "Content-Length: 4000", "Expect: 100-continue"]);
        assert!(wire.answer().starts_with("HTTP/1.1 100 "));
        wire
    });
    let ca = issuer.certificate.to_str().expect("UTF-8");
    for path in ["/metrics", "/", "/v1/refusals"] {
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "20", "--cacert", ca, "-o", "/dev/null", "-w", "%{http_code}"])
            .args(["-H", &format!("Authorization: {}", key.trim()), &format!("https://{admin}{path}")])
            .output()
            .expect("curl is installed");
        assert_eq!(text(&output), "200", "{path}");
    }
    drop(busy);
}
