//! What the tests of this binary stand on: a nats-server and a gateway with the configuration that
//! `headgate nats setup` has written for them, and clients that nobody here wrote.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event};
use headgate::testing::message::now_micros;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::common::nats::NatsServer;
use crate::common::{Gateway, PATIENCE, Setup, Source, scratch, wait_for};

/// How long a client waits for what is not to come.
pub(crate) const SILENCE: Duration = Duration::from_millis(400);

/// A nats-server and a gateway that know each other.
pub(crate) struct Stage {
    pub(crate) nats: NatsServer,
    /// More servers of its cluster.
    pub(crate) others: Vec<NatsServer>,
    pub(crate) gateway: Gateway,
    pub(crate) setup: Setup,
    pub(crate) websocket: u16,
    pub(crate) mqtt: u16,
    pub(crate) dir: TempDir,
}

/// A connected client, and what it is told about itself.
pub(crate) struct Connected {
    pub(crate) client: Client,
    events: mpsc::UnboundedReceiver<Event>,
}

impl Stage {
    /// At what setup has written.
    pub(crate) fn set() -> Self {
        Self::with(|setup| setup)
    }

    /// The same, with settings of the gateway changed.
    pub(crate) fn with(change: impl FnOnce(Setup) -> Setup) -> Self {
        let dir = scratch();
        let [port, websocket, mqtt] = free_ports();
        let set = set_up(dir.path(), &[port, websocket, mqtt], &[]);
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        let nats = NatsServer::of_file(&dir.path().join("set/nats-server.conf"), port);
        Self::before(dir, nats, Vec::new(), [websocket, mqtt], change)
    }

    /// The same, with the server's configuration changed.
    pub(crate) fn with_server(change: impl FnOnce(String) -> String) -> Self {
        Self::with_files(change, |text| text)
    }

    fn with_files(
        change_server: impl FnOnce(String) -> String,
        change_gateway: impl FnOnce(String) -> String,
    ) -> Self {
        let dir = scratch();
        let [port, websocket, mqtt] = free_ports();
        let set = set_up(dir.path(), &[port, websocket, mqtt], &[]);
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        let gateway_file = dir.path().join("set/headgate.toml");
        let text = std::fs::read_to_string(&gateway_file).expect("written");
        std::fs::write(&gateway_file, change_gateway(text)).expect("written");
        let file = dir.path().join("set/nats-server.conf");
        let text = std::fs::read_to_string(&file).expect("written");
        std::fs::write(&file, change_server(text)).expect("written");
        let nats = NatsServer::of_file(&file, port);
        // A stream of the usual size does not fit on every disk.
        let small = |setup: Setup| setup.set("log.retention_bytes", "512MiB");
        Self::before(dir, nats, Vec::new(), [websocket, mqtt], small)
    }

    /// The same, with a setting of the gateway's left out of what setup has written.
    pub(crate) fn without(setting: &str) -> Self {
        Self::with_files(
            |text| text,
            |text| {
                let lines = text.lines().filter(|line| !line.starts_with(setting));
                lines.map(|line| format!("{line}\n")).collect()
            },
        )
    }

    /// Three servers that are one NATS; the gateway knows of one.
    pub(crate) fn cluster() -> Self {
        let dir = scratch();
        // In one go, so that they are six.
        let [ports @ .., a, b, c]: [u16; 6] = free_ports();
        let routes = [a, b, c];
        let set = set_up(dir.path(), &ports, &[]);
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        let text = std::fs::read_to_string(dir.path().join("set/nats-server.conf")).expect("written");
        let listed = routes.map(|port| format!("nats://127.0.0.1:{port}")).join(", ");
        let mut servers: Vec<NatsServer> = (0..3)
            .map(|n| {
                let other = |line: &&str| !line.starts_with("websocket") && !line.starts_with("mqtt");
                let text: String = text.lines().filter(other).map(|line| format!("{line}\n")).collect();
                let text =
                    text.replace("\"n1\"", &format!("\"n{n}\"")).replace("/jetstream", &format!("/js{n}"));
                let (own, file) = (routes[n], dir.path().join(format!("set/n{n}.conf")));
                let cluster =
                    format!("cluster {{ name: c, listen: \"127.0.0.1:{own}\", routes: [ {listed} ] }}\n");
                std::fs::write(&file, text + &cluster).expect("written");
                NatsServer::of_file(&file, ports[n])
            })
            .collect();
        let nats = servers.remove(0);
        Self::before(dir, nats, servers, [0, 0], |setup| setup)
    }

    fn before(
        dir: TempDir,
        nats: NatsServer,
        others: Vec<NatsServer>,
        [websocket, mqtt]: [u16; 2],
        change: impl FnOnce(Setup) -> Setup,
    ) -> Self {
        let setup = Setup::on(&dir.path().join("data"));
        let setup = change(setup.set("config", dir.path().join("set/headgate.toml").display()));
        let gateway = setup.start();
        wait_for("the gateway to be at NATS", || {
            // Over the two connections for messages, and over that of the callout.
            let output = gateway.output();
            let has_callout = output.contains("headgate_bridge_nats::connection: connected to NATS");
            (has_callout && output.matches("connected to NATS").count() >= 3).then_some(())
        });
        Self { nats, others, gateway, setup, websocket, mqtt, dir }
    }

    /// A datasource whose key has these scopes.
    pub(crate) fn create(&self, id: &str, scopes: &[&str]) -> Source {
        let body = json!({ "id": id, "name": id, "scopes": scopes });
        let answer = self.gateway.post("/v1/datasources", &self.gateway.admin_key(), &body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        let made = answer.json();
        let text = |pointer: &str| made.pointer(pointer).and_then(Value::as_str).expect("there").to_owned();
        Source { id: id.to_owned(), key_id: text("/key/id"), key: text("/key/secret") }
    }

    /// One more key: its id and its secret.
    pub(crate) fn create_key(&self, datasource: &str, body: &Value) -> (String, String) {
        let path = format!("/v1/datasources/{datasource}/keys");
        let made = self.gateway.post(&path, &self.gateway.admin_key(), body);
        assert_eq!(made.status, 201, "{}", made.text());
        let made = made.json();
        let text = |pointer: &str| made.pointer(pointer).and_then(Value::as_str).expect("there").to_owned();
        (text("/key/id"), text("/key/secret"))
    }

    pub(crate) fn revoke(&self, datasource: &str, key_id: &str) {
        let path = format!("/v1/datasources/{datasource}/keys/{key_id}");
        let answer = self.gateway.request("DELETE", &path, &self.gateway.admin_key(), &[], &[]);
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    /// A client with a key as its password. The gateway may be on its way to NATS yet.
    pub(crate) async fn connect(&self, key: &str) -> Connected {
        self.connect_as(ConnectOptions::with_user_and_password("device".to_owned(), key.to_owned())).await
    }

    pub(crate) async fn connect_as(&self, options: ConnectOptions) -> Connected {
        self.connect_to(&self.nats.url(), options).await
    }

    /// A client of this server.
    pub(crate) async fn connect_to(&self, url: &str, options: ConnectOptions) -> Connected {
        let by = tokio::time::Instant::now() + PATIENCE;
        let (told, events) = mpsc::unbounded_channel();
        let options = options.max_reconnects(1).event_callback(move |event| {
            let _ = told.send(event);
            async {}
        });
        loop {
            match options.clone().connect(url).await {
                Ok(client) => return Connected { client, events },
                Err(error) if tokio::time::Instant::now() < by => drop(error),
                Err(error) => panic!("not let in: {error}"),
            }
        }
    }

    /// Whether these are refused, at once and for good. The gateway has to be at NATS already.
    pub(crate) async fn refuses(&self, options: ConnectOptions) -> bool {
        const REFUSED: &str = "authorization violation";
        let (told, mut events) = mpsc::unbounded_channel();
        let options = options.connection_timeout(PATIENCE).event_callback(move |event| {
            let _ = told.send(event.to_string());
            async {}
        });
        // The server sends its first PING after two seconds, which is also how long it waits for an answer of the
        // gateway. The client takes a PING for a yes, and is refused only then.
        let _connected = match options.connect(self.nats.url()).await {
            Err(error) => return error.to_string().contains(REFUSED),
            Ok(client) => client,
        };
        let refused = async { while events.recv().await.is_some_and(|event| !event.contains(REFUSED)) {} };
        tokio::time::timeout(PATIENCE, refused).await.is_ok()
    }

    /// A user of the server's configuration, as setup has written it.
    pub(crate) async fn user(&self, user: &str, password_file: &str) -> Client {
        let password = std::fs::read_to_string(self.dir.path().join("set").join(password_file));
        let password = password.expect("a password").trim().to_owned();
        let options = ConnectOptions::with_user_and_password(user.to_owned(), password);
        options.connect(self.nats.url()).await.expect("a user of the configuration")
    }

    /// The backend side: the account in which the validated stream is.
    pub(crate) async fn headgate(&self) -> Client {
        self.user("headgate", "gateway.password").await
    }

    /// That no key stands where anybody could read it.
    pub(crate) fn assert_no_log_has(&self, keys: &[&str]) {
        for key in keys {
            assert!(!self.gateway.output().contains(key), "the gateway's log has a key");
            assert!(!self.nats.log().contains(key), "nats-server's log has a key");
        }
    }
}

/// Returns when the server has done all that this client has asked of it.
pub(crate) async fn reached(client: &Client) {
    let nobody = client.request("nobody.is.here", "".into());
    let answer = tokio::time::timeout(PATIENCE, nobody).await.expect("an answer");
    assert!(answer.is_err(), "there is nobody");
}

impl Connected {
    /// Returns when the server has done all that this client has asked of it: then it says that what was
    /// asked last is not allowed.
    pub(crate) async fn reached(&mut self) {
        let last = self.client.new_inbox().replace("_INBOX", "not.allowed");
        let _denied = self.client.subscribe(last.clone()).await.expect("asked");
        while !format!("{:?}", self.event().await).to_lowercase().contains(&last.to_lowercase()) {}
    }

    /// What the client is told next, other than that it is connected.
    pub(crate) async fn event(&mut self) -> Event {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event");
            match event.expect("the client lives") {
                Event::Connected => {}
                event => return event,
            }
        }
    }

    /// Publishes as JetStream's clients do; the offset.
    pub(crate) async fn publish(&self, subject: &str, payload: &str) -> u64 {
        let js = async_nats::jetstream::new(self.client.clone());
        let ack = js.publish(subject.to_owned(), payload.to_owned().into()).await.expect("sent");
        ack.await.expect("an ack").sequence
    }

    /// The code of a refusal, or `None` for no answer.
    pub(crate) async fn refusal(&self, subject: &str) -> Option<String> {
        let asked = self.client.request(subject.to_owned(), "1".into());
        let answer = tokio::time::timeout(SILENCE, asked).await.ok()?.ok()?;
        let headers = answer.headers?;
        headers.get("Nats-Service-Error-Code").map(|code| code.as_str().to_owned())
    }
}

/// `headgate nats setup` into `dir/set`.
pub(crate) fn set_up(dir: &Path, ports: &[u16; 3], more: &[&str]) -> Output {
    let address = |port: &u16| format!("127.0.0.1:{port}");
    let [port, websocket, mqtt] = ports;
    let to: PathBuf = dir.join("set");
    Command::new(env!("CARGO_BIN_EXE_headgate"))
        .args(["nats", "setup", "--dir"])
        .arg(to)
        .args(["--listen", &address(port), "--websocket", &address(websocket), "--mqtt", &address(mqtt)])
        .args(more)
        .output()
        .expect("headgate runs")
}

/// Ports that nobody has now.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("bound").port())
}

/// A time from now, as the API reads it.
pub(crate) fn in_seconds(seconds: i64) -> String {
    headgate::testing::Rfc3339(now_micros() + seconds * 1_000_000).to_string()
}
