//! One MQTT connection of a client, in either version of the protocol, over rumqttc. It publishes at
//! QoS 1 and reports which message was acknowledged.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rumqttc::{Outgoing, v5};

use super::client::KeySecret;

/// How many messages may be unacknowledged at once.
pub(super) const UNACKED_MESSAGES_MAX: u16 = 100;

/// The silence after which the server may drop the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Which version of MQTT, and how the key is presented in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// MQTT 3.1.1, the key as user name.
    V311,
    /// MQTT 5, the key as user property `authorization` of CONNECT.
    V5,
}

/// How a session reaches the gateway.
#[derive(Debug, Clone)]
pub(super) enum MqttTransport {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Through a socket in the file system, whose other end is over TLS.
    Unix(PathBuf),
}

impl From<SocketAddr> for MqttTransport {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl MqttTransport {
    /// As rumqttc takes it: an address or a path, and a port.
    fn broker(&self) -> (String, u16, rumqttc::Transport) {
        match self {
            Self::Tcp(addr) => (addr.ip().to_string(), addr.port(), rumqttc::Transport::tcp()),
            Self::Unix(path) => (path.display().to_string(), 0, rumqttc::Transport::unix()),
        }
    }
}

/// A connection, opened at the first [`MqttClientSession::step`].
pub(super) struct MqttClientSession {
    publisher: MqttClientPublisher,
    events: MqttClientEvents,
}

/// The sending end of a session.
#[derive(Clone)]
pub(super) enum MqttClientPublisher {
    V311(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

enum MqttClientEvents {
    V311(Box<rumqttc::EventLoop>),
    V5(Box<v5::EventLoop>),
}

/// What happened on a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MqttClientStep {
    /// The key was accepted.
    Connected,
    /// The oldest unsent message was sent, with this packet id.
    Sent(u16),
    /// The gateway has this message on disk.
    Acked(u16),
    /// The gateway refused this message, for this reason.
    Refused(u16, String),
    /// Our DISCONNECT has gone out.
    Disconnected,
    /// An event that concerns no message.
    Other,
}

/// Why a connection ended, or was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum MqttClientError {
    /// The gateway refused; the text is the protocol's reason.
    #[error("refused: {0}")]
    Refused(String),
    /// Anything else.
    #[error("MQTT: {0}")]
    Broken(String),
}

impl MqttClientSession {
    /// A session with the gateway that `through` reaches, with this key or none.
    pub(super) fn new(
        dialect: Dialect,
        through: impl Into<MqttTransport>,
        client_id: &str,
        key: Option<&KeySecret>,
    ) -> Self {
        let (host, port, transport) = through.into().broker();
        match dialect {
            Dialect::V311 => {
                let mut options = rumqttc::MqttOptions::new(client_id, host, port);
                options.set_transport(transport);
                options.set_keep_alive(KEEP_ALIVE).set_inflight(UNACKED_MESSAGES_MAX);
                if let Some(key) = key {
                    options.set_credentials(key.expose(), "");
                }
                let (client, events) = rumqttc::AsyncClient::new(options, UNACKED_MESSAGES_MAX.into());
                Self {
                    publisher: MqttClientPublisher::V311(client),
                    events: MqttClientEvents::V311(Box::new(events)),
                }
            }
            Dialect::V5 => {
                let mut options = v5::MqttOptions::new(client_id, host, port);
                options.set_transport(transport);
                options.set_keep_alive(KEEP_ALIVE).set_outgoing_inflight_upper_limit(UNACKED_MESSAGES_MAX);
                if let Some(key) = key {
                    options.set_user_properties(vec![("authorization".to_owned(), key.expose().to_owned())]);
                }
                let (client, events) = v5::AsyncClient::new(options, UNACKED_MESSAGES_MAX.into());
                Self {
                    publisher: MqttClientPublisher::V5(client),
                    events: MqttClientEvents::V5(Box::new(events)),
                }
            }
        }
    }

    /// The sending end, to publish messages with.
    pub(super) fn publisher(&self) -> MqttClientPublisher {
        self.publisher.clone()
    }

    /// Connects, sends and receives until something has happened. After an error the session is over:
    /// rumqttc would reconnect with a clean session and forget unacknowledged messages.
    ///
    /// Do not cancel this while a message is being sent: the message would be lost.
    pub(super) async fn step(&mut self) -> Result<MqttClientStep, MqttClientError> {
        match &mut self.events {
            MqttClientEvents::V311(events) => v311_step(events.poll().await),
            MqttClientEvents::V5(events) => v5_step(events.poll().await),
        }
    }
}

impl MqttClientPublisher {
    /// Queues a message at QoS 1. The queue holds up to [`UNACKED_MESSAGES_MAX`] unsent messages.
    pub(super) fn publish(&self, topic: &str, payload: Vec<u8>) -> Result<(), MqttClientError> {
        match self {
            Self::V311(client) => client
                .try_publish(topic, rumqttc::QoS::AtLeastOnce, false, payload)
                .map_err(|error| MqttClientError::Broken(error.to_string())),
            Self::V5(client) => client
                .try_publish(topic, v5::mqttbytes::QoS::AtLeastOnce, false, payload)
                .map_err(|error| MqttClientError::Broken(error.to_string())),
        }
    }

    /// Queues a DISCONNECT behind the messages already queued.
    pub(super) fn disconnect(&self) -> Result<(), MqttClientError> {
        match self {
            Self::V311(client) => {
                client.try_disconnect().map_err(|error| MqttClientError::Broken(error.to_string()))
            }
            Self::V5(client) => {
                client.try_disconnect().map_err(|error| MqttClientError::Broken(error.to_string()))
            }
        }
    }
}

fn v311_step(
    polled: Result<rumqttc::Event, rumqttc::ConnectionError>,
) -> Result<MqttClientStep, MqttClientError> {
    use rumqttc::{ConnectionError, Event, Packet};
    match polled {
        Ok(Event::Incoming(Packet::ConnAck(_))) => Ok(MqttClientStep::Connected),
        Ok(Event::Incoming(Packet::PubAck(ack))) => Ok(MqttClientStep::Acked(ack.pkid)),
        Ok(Event::Outgoing(Outgoing::Publish(packet_id))) => Ok(MqttClientStep::Sent(packet_id)),
        Ok(Event::Outgoing(Outgoing::Disconnect)) => Ok(MqttClientStep::Disconnected),
        Ok(_) => Ok(MqttClientStep::Other),
        Err(ConnectionError::ConnectionRefused(code)) => Err(MqttClientError::Refused(format!("{code:?}"))),
        Err(error) => Err(MqttClientError::Broken(error.to_string())),
    }
}

fn v5_step(polled: Result<v5::Event, v5::ConnectionError>) -> Result<MqttClientStep, MqttClientError> {
    use v5::mqttbytes::v5::{Packet, PubAckReason};
    use v5::{ConnectionError, Event, StateError};
    match polled {
        Ok(Event::Incoming(Packet::ConnAck(_))) => Ok(MqttClientStep::Connected),
        Ok(Event::Incoming(Packet::PubAck(ack))) => match ack.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                Ok(MqttClientStep::Acked(ack.pkid))
            }
            reason => {
                let said = ack.properties.and_then(|properties| properties.reason_string);
                let text = said.map_or_else(|| format!("{reason:?}"), |said| format!("{reason:?}: {said}"));
                Ok(MqttClientStep::Refused(ack.pkid, text))
            }
        },
        Ok(Event::Outgoing(Outgoing::Publish(packet_id))) => Ok(MqttClientStep::Sent(packet_id)),
        Ok(Event::Outgoing(Outgoing::Disconnect)) => Ok(MqttClientStep::Disconnected),
        Ok(_) => Ok(MqttClientStep::Other),
        Err(ConnectionError::ConnectionRefused(code)) => Err(MqttClientError::Refused(format!("{code:?}"))),
        Err(ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string })) => {
            let text = reason_string
                .map_or_else(|| format!("{reason_code:?}"), |said| format!("{reason_code:?}: {said}"));
            Err(MqttClientError::Refused(text))
        }
        Err(error) => Err(MqttClientError::Broken(error.to_string())),
    }
}
