//! The configuration of a nats-server in which API keys are users. Its four accounts keep each party to its
//! own permissions (`src/front/nats/callout.rs` gives the reason for each).

use std::fmt;
use std::net::SocketAddr;

/// Where the server listens.
#[derive(Debug, clap::Args)]
pub(super) struct NatsServerListeners {
    /// Where nats-server listens
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4222")]
    pub(super) listen: SocketAddr,
    /// Where it listens for NATS over WebSocket, without TLS [default: it does not]
    #[arg(long, value_name = "ADDRESS")]
    pub(super) websocket: Option<SocketAddr>,
    /// Where it listens for MQTT 3.1.1 [default: it does not; Headgate's own MQTT says more and loses nothing]
    #[arg(long, value_name = "ADDRESS")]
    pub(super) mqtt: Option<SocketAddr>,
}

/// A nats-server configuration. `Display` writes all of it, including the passwords.
pub(super) struct NatsServerConfig<'a> {
    /// The directory of the configuration and of JetStream's files.
    pub(super) dir: &'a str,
    pub(super) listeners: &'a NatsServerListeners,
    /// The public key of the account that signs the answers of auth callout.
    pub(super) issuer: &'a str,
    /// The public curve key to which requests are encrypted.
    pub(super) curve: &'a str,
    /// The password of user `headgate`.
    pub(super) gateway: &'a str,
    /// The password of user `callout`.
    pub(super) callout: &'a str,
    /// The password of user `system`.
    pub(super) system: &'a str,
}

impl fmt::Display for NatsServerConfig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dir, listeners, issuer, curve, gateway, callout, system } = self;
        let NatsServerListeners { listen, websocket, mqtt } = listeners;
        write!(
            f,
            r#"# nats-server for Headgate, written by "headgate nats setup". It holds passwords.
#
#   nats-server --config {dir}/nats-server.conf
#
# Clients connect with their API key. In a cluster every server has the same accounts, a server_name of its own, and a
# "cluster" part, which is not here.

server_name: "n1"
listen: "{listen}"

jetstream {{
  store_dir: "{dir}/jetstream"
  # How often what was written is synced to disk. A single server that loses its power loses what came after; in a
  # cluster the other replicas have it. "always" syncs each message, and is slow.
  # sync_interval: "2m"
}}

# Over a network, clients need TLS, or their keys can be read on the way:
# tls {{ cert_file: "…", key_file: "…" }}

"#
        )?;
        // A listener that is off is written too, commented out, so that an operator can turn it on later.
        let comment = |is_on: bool| if is_on { "" } else { "# " };
        let (on, at) = (comment(websocket.is_some()), or_loopback(websocket, 8088));
        writeln!(f, "# Clients that speak NATS over WebSocket.")?;
        writeln!(f, "{on}websocket {{ listen: \"{at}\", no_tls: true }}\n")?;
        let (on, at) = (comment(mqtt.is_some()), or_loopback(mqtt, 1884));
        write!(
            f,
            r#"# Clients that speak MQTT 3.1.1. nats-server acknowledges what they publish once it has it, before the gateway does,
# and also what they may not publish: point devices at Headgate's own MQTT instead wherever you can.
{on}mqtt {{ listen: "{at}" }}

accounts {{
  # The gateways, and what they keep: the stream "headgate" with the validated stream. Backends that read it with
  # JetStream are users here; each also has to be among the auth_users below.
  HEADGATE {{
    jetstream: enabled
    users: [
      {{ user: "headgate", password: "{gateway}" }}
      # A backend that may take from one consumer, which the user above has made for it, and acknowledge. That has two
      # forms: nats-server 2.15 writes the second one with the feature flag js_ack_fc_v2, and later by itself.
      # {{ user: "line-4", password: "…", permissions: {{
      #   publish: [ "$JS.API.CONSUMER.INFO.headgate.line-4", "$JS.API.CONSUMER.MSG.NEXT.headgate.line-4",
      #     "$JS.API.STREAM.INFO.headgate", "$JS.ACK.headgate.line-4.>", "$JS.ACK.*.*.headgate.line-4.>" ]
      #   subscribe: [ "_INBOX.>" ] }} }}
    ]
    exports: [ {{ stream: "stream.>", accounts: [ APP ] }} ]
  }}

  # The gateways again, and nobody else, ever: the API keys of clients that connect come here.
  AUTH {{
    users: [ {{ user: "callout", password: "{callout}" }} ]
    exports: [ {{ service: "ingest.>", accounts: [ APP ] }} ]
  }}

  # Clients with an API key: each may do what its key allows, and is put here for it.
  APP {{
    # MQTT keeps its sessions in it.
    jetstream: enabled
    imports: [
      # "share" has the server tell the gateway which key a message came under.
      {{ service: {{ account: AUTH, subject: "ingest.>" }}, share: true }}
      {{ stream: {{ account: HEADGATE, subject: "stream.>" }} }}
    ]
    # Nobody here makes a message of the validated stream, not even by naming it as the place for an answer.
    mappings: {{ "stream.>": "denied.>" }}
  }}

  # Whoever ends connections.
  SYS {{ users: [ {{ user: "system", password: "{system}" }} ] }}
}}
system_account: SYS

authorization {{
  # How long a client waits for a gateway to say whether its key is good, in seconds.
  timeout: 2
  auth_callout {{
    issuer: {issuer}
    account: AUTH
    # Those who connect with the password above. Everybody else presents an API key.
    auth_users: [ "headgate", "callout", "system" ]
    xkey: {curve}
  }}
}}
"#
        )
    }
}

fn or_loopback(address: &Option<SocketAddr>, port: u16) -> SocketAddr {
    address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], port)))
}
