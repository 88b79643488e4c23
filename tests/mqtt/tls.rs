//! MQTT over TLS: with Mosquitto's client and paho, which nobody here wrote, and by a client that
//! sees the certificate it is shown and how the connection ends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::common::tls::{Identity, TlsClient};
use crate::common::wire::{CONNACK, Connect, Next, PINGREQ, PINGRESP, VERSIONS, Version, Wire};
use crate::common::{Gateway, Setup, Source, python, scratch, wait_for};

/// A gateway with a certificate, its issuer, and a datasource.
struct Scene {
    dir: tempfile::TempDir,
    issuer: Identity,
    identity: Identity,
    gateway: Gateway,
    source: Source,
}

impl Scene {
    fn new(more: impl FnOnce(Setup, &Path) -> Setup) -> Self {
        let dir = scratch();
        let issuer = Identity::issuer(dir.path(), "issuer");
        let identity = issuer.issue(dir.path(), "gateway");
        let gateway = more(setup(dir.path(), &identity), dir.path()).start();
        let source = gateway.create("press-4");
        Self { dir, issuer, identity, gateway, source }
    }

    fn addr(&self) -> SocketAddr {
        self.gateway.mqtts.expect("it says where it serves TLS")
    }

    /// A TLS connection that has been let in.
    fn login(&self, version: Version) -> Wire {
        let client = TlsClient::connect(self.addr(), &self.issuer, None).expect("a handshake");
        let mut wire = Wire::over(client);
        wire.let_in(&Connect::with_key(version, &self.source.key));
        wire
    }

    /// The certificate that a new connection is shown.
    fn shown(&self) -> Vec<u8> {
        let client = TlsClient::connect(self.addr(), &self.issuer, None).expect("a handshake");
        client.shown().to_vec()
    }

    fn mosquitto_pub(&self, arguments: &[&str], payload: &str) -> Output {
        let output = Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &self.addr().port().to_string()])
            .args(["-u", &self.source.key, "-q", "1", "-t", "tls", "-m", payload])
            .args(arguments)
            .output();
        output.expect("mosquitto_pub is installed (tests/run does it)")
    }

    /// How many connections were refused for a cause.
    fn refused(&self, cause: &str) -> f64 {
        let name = format!("headgate_refused_total{{transport=\"mqtt\",cause=\"{cause}\"}}");
        self.gateway.metric(&name)
    }
}

fn setup(dir: &Path, identity: &Identity) -> Setup {
    Setup::on(&dir.join("data"))
        .set("mqtt.tls.certificate", identity.certificate.display())
        .set("mqtt.tls.key", identity.key.display())
}

fn as_is(setup: Setup, _: &Path) -> Setup {
    setup
}

/// A path, as a command takes it.
fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn mosquitto_pub_publishes_over_each_version_of_tls() {
    let scene = Scene::new(as_is);
    let ca = text(&scene.issuer.certificate);
    let ways: [&[&str]; 4] = [
        &["--cafile", ca, "-V", "mqttv311", "--tls-version", "tlsv1.2"],
        &["--cafile", ca, "-V", "mqttv5", "--tls-version", "tlsv1.3"],
        &["--cafile", ca, "-V", "mqttv5", "--tls-alpn", "mqtt"],
        &["--cafile", ca, "-V", "mqttv31"],
    ];
    for (n, way) in ways.iter().enumerate() {
        let output = scene.mosquitto_pub(way, &n.to_string());
        assert!(output.status.success(), "{way:?}: {output:?}");
    }
    let stored = scene.gateway.stored("press-4", ways.len());
    let payloads: Vec<_> = stored.iter().map(|record| record["payload"].to_string()).collect();
    assert_eq!(payloads, ["0", "1", "2", "3"]);

    let stranger = Identity::issuer(scene.dir.path(), "stranger");
    let output = scene.mosquitto_pub(&["--cafile", text(&stranger.certificate)], "no");
    assert!(!output.status.success(), "the gateway's issuer is not known: {output:?}");
    wait_for("the refusal to be counted", || (scene.refused("tls_handshake") == 1.0).then_some(()));
    wait_for("the reason in the log", || {
        scene.gateway.output().contains("the client refuses ours").then_some(())
    });
}

#[test]
fn mosquitto_sub_reads_the_log_over_tls() {
    let scene = Scene::new(as_is);
    let ca = text(&scene.issuer.certificate);
    let body = serde_json::json!({ "scopes": ["subscribe"] });
    let created =
        scene.gateway.post("/v1/datasources/press-4/keys", &scene.gateway.admin_key(), &body).json();
    let reader = created["key"]["secret"].as_str().expect("a key");
    let mut wire = scene.login(Version::V311);
    let payload = |n: u16| format!("{n}-{}", "x".repeat(20_000));
    for n in 1..=50 {
        assert_eq!(wire.publish(Version::V311, n, "t", payload(n).as_bytes()), 0);
    }
    let output = Command::new("mosquitto_sub")
        .args(["-h", "127.0.0.1", "-p", &scene.addr().port().to_string(), "--cafile", ca])
        .args(["-V", "mqttv5", "-u", reader, "-q", "1", "-t", "#", "-C", "50", "-W", "20"])
        .args(["-D", "subscribe", "user-property", "from-offset", "0"])
        .output()
        .expect("mosquitto_sub is installed (tests/run does it)");
    let received = String::from_utf8(output.stdout).expect("text");
    let expected: Vec<String> = (1..=50).map(payload).collect();
    assert!(output.status.success() && received.lines().eq(expected), "{:?}", output.stderr);
}

#[test]
fn paho_publishes_over_tls() {
    const PROGRAM: &str = r#"
import os, sys, paho.mqtt.client as mqtt
host, port, ca, key = sys.argv[1:]
for version in (mqtt.MQTTv311, mqtt.MQTTv5):
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=version)
    client.tls_set(ca_certs=ca)
    client.username_pw_set(key)
    client.connect(host, int(port))
    client.loop_start()
    sent = [client.publish("paho", str(n) * 5000, qos=1) for n in range(10)]
    for message in sent:
        message.wait_for_publish(15)
        assert message.is_published()
    client.disconnect()
    client.loop_stop()
"#;
    let scene = Scene::new(as_is);
    let (port, ca) = (scene.addr().port().to_string(), text(&scene.issuer.certificate));
    let output = python(PROGRAM, &["127.0.0.1", &port, ca, &scene.source.key]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scene.gateway.stored("press-4", 20).len(), 20);
}

#[test]
fn a_client_needs_a_certificate_of_the_issuer_that_is_named_and_its_key_as_well() {
    let with_ca = |setup: Setup, dir: &Path| {
        let clients = Identity::issuer(dir, "clients");
        clients.issue(dir, "device");
        Identity::issuer(dir, "others").issue(dir, "stranger");
        setup.set("mqtt.tls.client_ca", clients.certificate.display())
    };
    let scene = Scene::new(with_ca);
    let path = |name: &str| text(&scene.dir.path().join(name)).to_owned();
    let ca = ["--cafile", text(&scene.issuer.certificate)];
    let (device, device_key) = (path("device.pem"), path("device.key"));
    let (stranger, stranger_key) = (path("stranger.pem"), path("stranger.key"));
    let own = ["--cert", &device, "--key", &device_key];
    let strange = ["--cert", &stranger, "--key", &stranger_key];
    for version in ["tlsv1.2", "tlsv1.3"] {
        let run = |own: &[&str]| {
            scene.mosquitto_pub(&[&ca[..], own, &["--tls-version", version]].concat(), "1").status.success()
        };
        assert!(run(&own) && !run(&[]) && !run(&strange), "{version}");
    }
    assert_eq!(scene.gateway.stored("press-4", 2).len(), 2);
    wait_for("the refusals to be counted", || (scene.refused("tls_handshake") == 4.0).then_some(()));
    scene.gateway.says("presents no certificate");

    let device = Identity { certificate: device.into(), key: device_key.into() };
    let client = TlsClient::connect(scene.addr(), &scene.issuer, Some(&device)).expect("a handshake");
    let mut wire = Wire::over(client);
    wire.send(&Connect::new(Version::V5).packet());
    assert_eq!(wire.packet(CONNACK).reason(), 0x87, "a certificate is no key");
    wire.closed();

    let optional = |setup, dir: &Path| with_ca(setup, dir).set("mqtt.tls.client_certificates", "optional");
    let scene = Scene::new(optional);
    let run = |own: &[&str]| {
        let ca = ["--cafile", text(&scene.issuer.certificate)];
        scene.mosquitto_pub(&[&ca[..], own].concat(), "1").status.success()
    };
    let path = |name: &str| text(&scene.dir.path().join(name)).to_owned();
    assert!(run(&[]) && run(&["--cert", &path("device.pem"), "--key", &path("device.key")]));
    assert!(!run(&["--cert", &path("stranger.pem"), "--key", &path("stranger.key")]));
}

#[test]
fn a_replaced_certificate_is_shown_to_new_connections_and_the_old_ones_live_on() {
    let scene = Scene::new(as_is);
    let mut early = scene.login(Version::V5);
    assert_eq!(scene.shown(), scene.identity.der().to_vec());

    // Written over in place.
    let second = scene.issuer.issue(scene.dir.path(), "second");
    second.replace(&scene.identity);
    wait_for("the second certificate", || (scene.shown() == second.der().to_vec()).then_some(()));

    // Renamed into place.
    let third = scene.issuer.issue(scene.dir.path(), "third");
    let expected = third.der().to_vec();
    std::fs::rename(&third.certificate, &scene.identity.certificate).expect("renamed");
    std::fs::rename(&third.key, &scene.identity.key).expect("renamed");
    wait_for("the third certificate", || (scene.shown() == expected).then_some(()));

    assert_eq!(early.publish(Version::V5, 1, "t", b"1"), 0);
    assert_eq!(scene.gateway.stored("press-4", 1).len(), 1);
}

#[test]
fn a_certificate_behind_a_symlink_is_replaced_when_the_link_is_turned_round() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    // As Kubernetes does it: the files are links through a directory that is a link.
    for version in ["one", "two"] {
        let versioned = dir.path().join(version);
        std::fs::create_dir(&versioned).expect("made");
        issuer.issue(&versioned, "tls");
    }
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).expect("linked");
    link("one", "current");
    link("current/tls.pem", "tls.pem");
    link("current/tls.key", "tls.key");
    let identity = Identity { certificate: dir.path().join("tls.pem"), key: dir.path().join("tls.key") };
    let first = identity.der();
    let gateway = setup(dir.path(), &identity).start();
    let shown = || {
        let addr = gateway.mqtts.expect("it says where it serves TLS");
        TlsClient::connect(addr, &issuer, None).expect("a handshake").shown()
    };
    assert_eq!(shown(), first);
    link("two", "next");
    std::fs::rename(dir.path().join("next"), dir.path().join("current")).expect("renamed");
    let second = identity.der();
    assert_ne!(first, second);
    wait_for("the other certificate", || (shown() == second).then_some(()));
}

#[test]
fn a_half_written_certificate_is_reported_once_and_does_not_end_service() {
    let scene = Scene::new(as_is);
    let old = scene.identity.der().to_vec();
    let second = scene.issuer.issue(scene.dir.path(), "second");
    let whole = std::fs::read(&second.certificate).expect("read");
    std::fs::write(&scene.identity.certificate, &whole[..whole.len() / 2]).expect("written");
    let reports = |what: &str| {
        let output = scene.gateway.output();
        let about = |line: &&str| line.contains("WARN") && line.contains("TLS files") && line.contains(what);
        output.lines().filter(about).count()
    };
    wait_for("the report", || (reports("gateway.pem") == 1).then_some(()));
    assert_eq!(scene.shown(), old);

    // The certificate is whole and its key is still the old one's: reported by the other name.
    std::fs::write(&scene.identity.certificate, &whole).expect("written");
    wait_for("the report", || (reports("gateway.key") == 1).then_some(()));
    assert_eq!(scene.shown(), old);

    // Gone for a moment.
    std::fs::remove_file(&scene.identity.key).expect("removed");
    wait_for("the report", || (reports("No such file") == 1).then_some(()));
    assert_eq!(scene.shown(), old);
    assert_eq!(reports(""), 3, "once each: {}", scene.gateway.output());

    std::fs::copy(&second.key, &scene.identity.key).expect("copied");
    wait_for("the second certificate", || (scene.shown() == second.der().to_vec()).then_some(()));
    assert_eq!(reports(""), 3, "{}", scene.gateway.output());
}

#[test]
fn a_certificate_that_cannot_be_used_is_an_error_at_the_start_that_names_the_file() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let good = issuer.issue(dir.path(), "gateway");
    let other = issuer.issue(dir.path(), "other");
    let garbage = dir.path().join("garbage.pem");
    std::fs::write(&garbage, "what is this").expect("written");
    let broken = dir.path().join("broken.pem");
    let pem = "-----BEGIN CERTIFICATE-----\nMAAwAA==\n-----END CERTIFICATE-----\n";
    std::fs::write(&broken, pem).expect("written");
    let absent = dir.path().join("absent.pem");
    for (certificate, key, setting, named, reason) in [
        (&absent, &good.key, "mqtt.tls.certificate", "absent.pem", "No such file"),
        (&garbage, &good.key, "mqtt.tls.certificate", "garbage.pem", "no certificate in it"),
        (&broken, &good.key, "mqtt.tls.certificate", "broken.pem", "certificate"),
        (&good.certificate, &garbage, "mqtt.tls.key", "garbage.pem", "no private key in it"),
        (&good.certificate, &other.key, "mqtt.tls.key", "other.key", "not the key of"),
    ] {
        let identity = Identity { certificate: certificate.clone(), key: key.clone() };
        let exit = setup(dir.path(), &identity).refused();
        let said = exit.output;
        assert!(!exit.status.success());
        assert!(said.contains(setting) && said.contains(named) && said.contains(reason), "{said}");
    }
    let no_ca = setup(dir.path(), &good).set("mqtt.tls.client_ca", garbage.display()).refused();
    assert!(no_ca.output.contains("mqtt.tls.client_ca"), "{}", no_ca.output);
}

#[test]
fn check_config_looks_into_the_certificate() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let (good, other) = (issuer.issue(dir.path(), "gateway"), issuer.issue(dir.path(), "other"));
    let file = dir.path().join("headgate.toml");
    let check = |key: &Path| {
        let text = format!("[mqtt.tls]\ncertificate = {:?}\nkey = {key:?}\n", good.certificate);
        std::fs::write(&file, text).expect("written");
        let output = Command::new(env!("CARGO_BIN_EXE_headgate")).arg("check-config").arg(&file).output();
        let output = output.expect("headgate runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).expect("text"))
    };
    let (ok, said) = check(&good.key);
    assert!(ok && said.contains("127.0.0.1:8883"), "{said}");
    let (ok, said) = check(&other.key);
    assert!(!ok && said.contains("other.key"), "{said}");
}

#[test]
fn a_revoked_key_loses_its_tls_connection_and_tls_is_closed_in_order() {
    let scene = Scene::new(as_is);
    let mut new = scene.login(Version::V5);
    let mut old = scene.login(Version::V311);
    scene.gateway.delete("press-4");
    new.disconnected(0x98);
    old.closed();
}

#[test]
fn a_drain_finishes_and_closes_tls_connections() {
    let scene = Scene::new(as_is);
    let mut new = scene.login(Version::V5);
    let mut old = scene.login(Version::V311);
    // Still in its handshake: it keeps nobody waiting.
    let silent = TcpStream::connect(scene.addr()).expect("connected");
    assert_eq!(new.publish(Version::V5, 1, "t", b"1"), 0);
    scene.gateway.terminate();
    new.disconnected(0x8B);
    old.closed();
    let exit = scene.gateway.wait();
    assert!(exit.status.success(), "{}", exit.output);
    assert!(!exit.output.contains("still open at the drain's deadline"), "{}", exit.output);
    drop(silent);
}

#[test]
fn a_keep_alive_and_a_takeover_work_over_tls() {
    let scene = Scene::new(as_is);
    for version in VERSIONS {
        let open = |keep_alive| {
            let client = TlsClient::connect(scene.addr(), &scene.issuer, None).expect("a handshake");
            let mut wire = Wire::over(client);
            let client_id = "press".to_owned();
            wire.let_in(&Connect { client_id, keep_alive, ..Connect::with_key(version, &scene.source.key) });
            wire
        };
        let mut first = open(0);
        first.send(&PINGREQ);
        first.packet(PINGRESP);
        let mut second = open(1);
        for (wire, reason) in [(&mut first, 0x8E), (&mut second, 0x8D)] {
            match version {
                Version::V5 => drop(wire.disconnected(reason)),
                Version::V311 => wire.closed(),
            }
        }
    }
}

#[test]
fn a_client_that_reads_late_gets_everything_although_tls_held_some_of_it() {
    let scene = Scene::new(as_is);
    let TlsClient(mut stream) = TlsClient::connect(scene.addr(), &scene.issuer, None).expect("a handshake");
    stream.write_all(&Connect::with_key(Version::V311, &scene.source.key).packet()).expect("sent");
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).expect("in time");
    assert_eq!(connack, [CONNACK << 4, 2, 0, 0]);

    // Until nothing goes any more, as the gateway does not read from who does not read from it.
    stream.sock.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket option");
    let pings = PINGREQ.repeat(16 << 10);
    let mut unanswered = 0;
    let mut stalled = false;
    while !stalled {
        stream.conn.writer().write_all(&pings).expect("there is room in TLS");
        unanswered += pings.len();
        while stream.conn.wants_write() && !stalled {
            stalled = stream.conn.write_tls(&mut stream.sock).is_err();
        }
        assert!(unanswered < 1 << 30, "the gateway holds everything that a client does not read");
    }
    stream.sock.set_write_timeout(Some(Duration::from_millis(1))).expect("a socket option");
    let mut answers = vec![0; pings.len()];
    while unanswered > 0 {
        if stream.conn.wants_write() {
            let _ = stream.conn.write_tls(&mut stream.sock);
        }
        let read = stream.conn.read_tls(&mut stream.sock).expect("more of the answers, in time");
        assert_ne!(read, 0, "{unanswered} bytes of answers are missing at the end");
        stream.conn.process_new_packets().expect("TLS");
        while let Ok(n @ 1..) = stream.conn.reader().read(&mut answers) {
            assert!(answers[..n].iter().all(|&byte| byte == PINGRESP << 4 || byte == 0));
            unanswered -= n;
        }
    }
}

#[test]
fn a_client_that_speaks_the_other_protocol_is_closed_counted_and_told_of() {
    let scene = Scene::new(as_is);
    for bytes in [
        Connect::with_key(Version::V5, &scene.source.key).packet(),
        b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n".to_vec(),
        vec![0xFF; 100_000],
    ] {
        let before = scene.refused("tls_handshake");
        let mut wire = Wire::open(scene.addr());
        wire.send(&bytes);
        closed_with_at_most_an_alert(&mut wire);
        wait_for("it to be counted", || (scene.refused("tls_handshake") == before + 1.0).then_some(()));
    }
    scene.gateway.says("it is not TLS that the client speaks");

    // A record of handshake that announces more than any has: 16 MiB of a ClientHello.
    let mut wire = Wire::open(scene.addr());
    for _ in 0..64 {
        wire.send(&[0x16, 3, 1, 0x40, 0, 1, 0xFF, 0xFF, 0xFF]);
        wire.send(&[0; 0x4000 - 4]);
    }
    closed_with_at_most_an_alert(&mut wire);
    wait_for("it to be counted", || (scene.refused("tls_handshake") == 4.0).then_some(()));

    let before = scene.refused("malformed_connect");
    let refused = TlsClient::connect(scene.gateway.mqtt, &scene.issuer, None);
    assert!(refused.is_err(), "plain MQTT is served there");
    wait_for("it to be counted", || (scene.refused("malformed_connect") == before + 1.0).then_some(()));
    scene.gateway.says("this is TLS");
    assert!(!scene.gateway.output().contains(&scene.source.key));
}

/// An alert of TLS, which is not MQTT, may come before the end.
fn closed_with_at_most_an_alert(wire: &mut Wire) {
    while let Next::Packet(frame) = wire.next() {
        assert_eq!(frame.first, 0x15, "{frame:?}");
    }
    assert_eq!(wire.next(), Next::Closed);
}

#[test]
fn the_tls_handshake_and_the_connect_share_one_deadline() {
    const CONNECT_MAX: Duration = Duration::from_secs(3);
    let scene = Scene::new(|setup, _| setup.set("mqtt.connect_ms_max", CONNECT_MAX.as_millis()));
    // One that says nothing, and one that shakes hands late and says nothing then.
    let mut silent = Wire::open(scene.addr());
    let started = Instant::now();
    let tcp = TcpStream::connect(scene.addr()).expect("connected");
    std::thread::sleep(CONNECT_MAX / 2);
    let mut late = Wire::over(TlsClient::over(tcp, &scene.issuer, None).expect("a handshake"));
    late.closed();
    let took = started.elapsed();
    assert!(took >= CONNECT_MAX && took < CONNECT_MAX * 3 / 2, "{took:?}");
    silent.closed();
    assert_eq!(scene.refused("connect_timeout"), 2.0);
}

#[test]
fn a_tls_handshake_takes_the_place_of_a_connection() {
    let scene = Scene::new(|setup, _| setup.set("mqtt.connections_max", 1));
    let mut shaking = Wire::open(scene.addr());
    // Whichever of the two listeners it comes to, one more is refused.
    wait_for("the place to be taken", || {
        let mut more = Wire::open(scene.gateway.mqtt);
        more.send(&Connect::with_key(Version::V5, &scene.source.key).packet());
        matches!(more.next(), Next::Closed).then_some(())
    });
    Wire::open(scene.addr()).closed();
    assert!(scene.refused("connections_max") >= 2.0);
    shaking.send(b"no TLS");
    closed_with_at_most_an_alert(&mut shaking);
    wait_for("the place to be free", || {
        let client = TlsClient::connect(scene.addr(), &scene.issuer, None).ok()?;
        let mut wire = Wire::over(client);
        wire.send(&Connect::with_key(Version::V5, &scene.source.key).packet());
        matches!(wire.next(), Next::Packet(frame) if frame.reason() == 0).then_some(())
    });
}
