//! What comes from around a gateway: environment variables, signals, names of addresses; and the commands where HTTP
//! and MQTT are over TLS.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::common::tls::{Identity, TlsClient};
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

/// Kubernetes sets them in every container when a service is named `headgate`; the gateway did not start.
#[test]
fn variables_that_are_no_settings_are_passed_over_and_told() {
    let dir = scratch();
    let gateway = Setup::on(dir.path())
        .set("service_host", "10.0.0.1")
        .set("service_port_mqtt", "1883")
        .set("port", "tcp://10.0.0.1:8080")
        .set("port_1883_tcp_addr", "10.0.0.1")
        .set("mqtt_port", "tcp://10.0.0.1:1883")
        .set("nats.password", "")
        .set("intake.memory_bytes_max", "")
        .set("config", "")
        .start();
    gateway.says("HEADGATE_MQTT_PORT, HEADGATE_PORT, HEADGATE_PORT_1883_TCP_ADDR, HEADGATE_SERVICE_HOST");
    let refused = Setup::on(dir.path()).set("mqtt.lissen", "127.0.0.1:1").refused();
    assert!(refused.output.contains("did you mean HEADGATE_MQTT__LISTEN"), "{}", refused.output);
}

/// It was printed in the error that it is a number.
#[test]
fn a_password_of_digits_is_a_password_and_no_error_shows_one() {
    let dir = scratch();
    drop(Setup::on(dir.path()).set("nats.password", "5309271").start());
    for (name, value) in [
        ("nats.ingest", "5309271"),
        ("nats.callout.expiry_s", "p5309271"),
        ("nats_password", "5309271"),
        ("nats.pasword", "5309271"),
        ("nats.servers", "nats://u:5309271@host:port"),
    ] {
        let refused = Setup::on(dir.path()).set(name, value).refused();
        assert!(!refused.output.contains("5309271"), "{}", refused.output);
    }
}

#[test]
fn units_lists_and_a_name_to_listen_at_are_read_from_the_environment() {
    let dir = scratch();
    let gateway = Setup::on(dir.path())
        .set("intake.memory_bytes_max", "512MiB")
        .set("log.retention_s", "24h")
        .set("drain_ms_max", "5s")
        .set("auth.failures_exempt", "127.0.0.0/8, ::1")
        .set("mqtt.listen", "localhost:0")
        .start();
    for addr in std::net::ToSocketAddrs::to_socket_addrs(&("localhost", gateway.mqtt.port())).expect("known")
    {
        TcpStream::connect(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
    }
    let refused = Setup::on(dir.path()).set("intake.memory_bytes_max", "512M").refused();
    assert!(refused.output.contains("MiB"), "{}", refused.output);
}

/// A service manager's "reload" right after its "start" killed the gateway.
#[test]
fn sighup_never_ends_a_gateway_that_is_not_there_yet() {
    let dir = scratch();
    for _ in 0..3 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_headgate"))
            .arg("serve")
            .arg("--data-dir")
            .arg(dir.path())
            .env("HEADGATE_MQTT__LISTEN", "127.0.0.1:0")
            .env("HEADGATE_HTTP__LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("headgate runs");
        // The first instruction that it can be asked at is its own: before that the program is not there.
        let exe = format!("/proc/{}/exe", child.id());
        wait_for("the program", || {
            let name = std::fs::read_link(&exe).ok()?;
            name.ends_with("headgate").then_some(())
        });
        let status = format!("/proc/{}/status", child.id());
        // SIGHUP is bit 0 of the caught signals.
        wait_for("its first line", || {
            let text = std::fs::read_to_string(&status).ok()?;
            let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
            (u64::from_str_radix(caught.trim(), 16).ok()? & 1 == 1).then_some(())
        });
        for _ in 0..50 {
            signal(child.id(), libc::SIGHUP);
            std::thread::yield_now();
        }
        let mut log = std::io::BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains("was read again") {
            let read = std::io::BufRead::read_line(&mut log, &mut said).expect("readable");
            assert!(read > 0, "it ended: {said}");
        }
        signal(child.id(), libc::SIGTERM);
        let status = wait_for("the drain", || child.try_wait().expect("our child"));
        assert!(status.success(), "{status}");
    }
}

#[test]
fn sighup_takes_over_what_it_can_names_what_it_cannot_and_keeps_all_of_what_is_bad() {
    let dir = scratch();
    let file = dir.path().join("headgate.toml");
    let issuer = Identity::issuer(dir.path(), "issuer");
    let (first, second) = (issuer.issue(dir.path(), "first"), issuer.issue(dir.path(), "second"));
    let write = |more: &str| {
        let tls = format!("[mqtt.tls]\ncertificate = {:?}\nkey = {:?}\n", first.certificate, first.key);
        std::fs::write(&file, format!("{tls}{more}")).expect("written");
    };
    write("");
    let gateway = Setup::on(&dir.path().join("data")).set("config", file.display()).start();
    let count = |words: &str| gateway.output().matches(words).count();
    let reload = |told: &str| {
        let before = count("was read again");
        signal(gateway.pid(), libc::SIGHUP);
        wait_for("the reload", || (count("was read again") > before).then_some(()));
        gateway.says(told);
    };
    reload("the configuration was read again");
    assert_eq!(count("hold after a restart"), 0, "nothing differs");
    write("[trace]\nfilter = \"debug\"\n[mqtt]\nreceive_maximum = 7\n[nats]\npassword = \"s3cret\"\n");
    reload("mqtt.receive_maximum, nats.password");
    gateway.says("trace.filter");
    assert_eq!(count("s3cret"), 0);
    gateway.get("/v1/ingest/x", "no key");
    wait_for("a line of debug", || (count(" DEBUG ") > 0).then_some(()));
    // What is bad changes nothing, also not what is good in it.
    for bad in [
        "[trace]\nfilter = \"headgate=loud\"\n",
        "[trace\n",
        "[auth]\nfailures_burst = 0\n",
        "[mqtt]\nx = 1\n",
    ] {
        write(bad);
        reload("cannot be used: all stays as it was");
    }
    // Certificates are read at once.
    let mqtts = gateway.mqtts.expect("it is served");
    second.replace(&first);
    write("");
    reload("a new TLS certificate is in service");
    let shown = TlsClient::connect(mqtts, &issuer, None).expect("connected").shown();
    assert_eq!(shown, second.der());
    assert_eq!(gateway.get("/livez", "").status, 200);
}

/// Passes connections on from TLS to a plain address, as a proxy in front of HTTP does.
fn tls_proxy(identity: &Identity, to: SocketAddr) -> SocketAddr {
    let key = PrivateKeyDer::from_pem_file(&identity.key).expect("a key");
    let chain = vec![CertificateDer::from_pem_file(&identity.certificate).expect("a certificate")];
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a pair");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for tcp in listener.incoming().map_while(Result::ok) {
            let config = config.clone();
            std::thread::spawn(move || {
                let connection = ServerConnection::new(config).expect("a connection");
                let mut client = StreamOwned::new(connection, tcp);
                let mut head = Vec::new();
                // One request without a body a connection: the proxy asks for its end.
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if !client.read(&mut byte).is_ok_and(|read| read > 0) {
                        return;
                    }
                    head.push(byte[0]);
                }
                let head =
                    String::from_utf8(head).expect("text").replacen("\r\n", "\r\nconnection: close\r\n", 1);
                let mut server = TcpStream::connect(to).expect("the gateway");
                server.write_all(head.as_bytes()).expect("sent");
                let mut answer = Vec::new();
                server.read_to_end(&mut answer).expect("an answer");
                let _ = client.write_all(&answer).and_then(|()| client.flush());
                client.conn.send_close_notify();
                let _ = client.flush();
                let _ = client.sock.shutdown(Shutdown::Write);
            });
        }
    });
    addr
}

fn headgate(gateway: &Gateway, url: &str, args: &[&str], ca: Option<&Path>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
        command.env_remove(name);
    }
    command.env("HEADGATE_URL", url).env("HEADGATE_DATA_DIR", gateway.dir()).env("HEADGATE_API_KEY", "");
    if let Some(ca) = ca {
        command.env("HEADGATE_CACERT", ca);
    }
    command.args(args).stdin(Stdio::null()).output().expect("headgate runs")
}

/// Only `http://` was taken; and `publish` sent the admin key to whatever was at port 1883.
#[test]
fn commands_speak_https_and_publish_goes_where_the_gateway_says() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let own = issuer.issue(dir.path(), "gateway");
    let gateway = Setup::on(&dir.path().join("data"))
        .set("mqtt.tls.certificate", own.certificate.display())
        .set("mqtt.tls.key", own.key.display())
        .start();
    gateway.create("press-4");
    let url = format!("https://{}", tls_proxy(&own, gateway.http));
    let said = |output: &Output| {
        String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
    };
    let untrusted = headgate(&gateway, &url, &["datasource", "list"], None);
    assert!(!untrusted.status.success() && said(&untrusted).contains("--cacert"), "{}", said(&untrusted));
    let ca = Some(issuer.certificate.as_path());
    let listed = headgate(&gateway, &url, &["datasource", "list"], ca);
    assert!(listed.status.success() && said(&listed).contains("press-4"), "{}", said(&listed));
    let by_argument = headgate(
        &gateway,
        &url,
        &["--cacert", issuer.certificate.to_str().expect("text"), "datasource", "list"],
        None,
    );
    assert!(by_argument.status.success(), "{}", said(&by_argument));
    for (url, port) in
        [(url.as_str(), gateway.mqtts), (&format!("http://{}", gateway.http), Some(gateway.mqtt))]
    {
        let published = headgate(&gateway, url, &["publish", "press-4", "t", "1"], ca);
        assert!(published.status.success(), "{url} {port:?}: {}", said(&published));
    }
    let mqtts = format!("mqtts://{}", gateway.mqtts.expect("it is served"));
    let over_tls = headgate(&gateway, &url, &["publish", "--addr", &mqtts, "press-4", "t", "2"], ca);
    assert!(over_tls.status.success(), "{}", said(&over_tls));
    assert_eq!(gateway.stored("press-4", 3).len(), 3);
    // A datasource's own key is told by what the gateway says of it, and not by a refusal.
    let other = gateway.create("press-5");
    for datasource in ["press-5", "press-4"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
        command.env("HEADGATE_URL", format!("http://{}", gateway.http)).env("HEADGATE_API_KEY", &other.key);
        let output =
            command.args(["publish", datasource, "t", "1"]).stdin(Stdio::null()).output().expect("it runs");
        assert_eq!(output.status.success(), datasource == "press-5", "{}", said(&output));
    }
    let refusals = gateway.get("/v1/refusals", &gateway.admin_key()).json();
    assert_eq!(refusals["refusals"].as_array().map(Vec::len), Some(0), "{refusals}");
}
