//! One MQTT connection of a client, in either version of the protocol, as rumqttc speaks it: it
//! publishes at QoS 1 and tells which message was acknowledged.

use std::net::SocketAddr;
use std::time::Duration;

use rumqttc::{Outgoing, v5};

use super::client::Secret;

/// How many messages may be unacknowledged at once.
pub(super) const WINDOW: u16 = 100;

/// Seconds of silence after which the server may drop the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Which version of MQTT, and how the key is presented in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// MQTT 3.1.1, the key as user name.
    V311,
    /// MQTT 5, the key as user property `authorization` of CONNECT.
    V5,
}

/// A connection, opened at the first [`Session::step`].
pub(super) struct Session {
    publisher: Publisher,
    events: Events,
}

/// The end of a session that takes messages.
#[derive(Clone)]
pub(super) enum Publisher {
    V311(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

enum Events {
    V311(Box<rumqttc::EventLoop>),
    V5(Box<v5::EventLoop>),
}

/// What happened on a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The key was accepted.
    Connected,
    /// The oldest message that was not sent yet has gone out under this packet id.
    Sent(u16),
    /// The gateway has this message on disk.
    Acked(u16),
    /// The gateway has said no to this message.
    Refused(u16, String),
    /// Our DISCONNECT has gone out.
    Disconnected,
    /// Nothing that concerns a message.
    Other,
}

/// Why a connection ended, or was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// The gateway said no, in the protocol's words.
    #[error("refused: {0}")]
    Refused(String),
    /// Anything else.
    #[error("MQTT: {0}")]
    Broken(String),
}

impl Session {
    /// A session with the gateway at `addr`, with this key or none.
    pub(super) fn new(dialect: Dialect, addr: SocketAddr, client_id: &str, key: Option<&Secret>) -> Self {
        let (host, port) = (addr.ip().to_string(), addr.port());
        match dialect {
            Dialect::V311 => {
                let mut options = rumqttc::MqttOptions::new(client_id, host, port);
                options.set_keep_alive(KEEP_ALIVE).set_inflight(WINDOW);
                if let Some(key) = key {
                    options.set_credentials(key.expose(), "");
                }
                let (client, events) = rumqttc::AsyncClient::new(options, WINDOW.into());
                Self { publisher: Publisher::V311(client), events: Events::V311(Box::new(events)) }
            }
            Dialect::V5 => {
                let mut options = v5::MqttOptions::new(client_id, host, port);
                options.set_keep_alive(KEEP_ALIVE).set_outgoing_inflight_upper_limit(WINDOW);
                if let Some(key) = key {
                    options.set_user_properties(vec![("authorization".to_owned(), key.expose().to_owned())]);
                }
                let (client, events) = v5::AsyncClient::new(options, WINDOW.into());
                Self { publisher: Publisher::V5(client), events: Events::V5(Box::new(events)) }
            }
        }
    }

    /// What messages are handed to.
    pub(super) fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Connects, sends and receives until something has happened. After an error the session is
    /// over: rumqttc would connect anew, with a clean session, and forget what was not acknowledged.
    ///
    /// Not to be cancelled while a message is on its way out, it would be lost.
    pub(super) async fn step(&mut self) -> Result<Step, SessionError> {
        match &mut self.events {
            Events::V311(events) => v311_step(events.poll().await),
            Events::V5(events) => v5_step(events.poll().await),
        }
    }
}

impl Publisher {
    /// Queues a message at QoS 1. There is room for [`WINDOW`] that are not sent yet.
    pub(super) fn publish(&self, topic: &str, payload: Vec<u8>) -> Result<(), SessionError> {
        match self {
            Self::V311(client) => client
                .try_publish(topic, rumqttc::QoS::AtLeastOnce, false, payload)
                .map_err(|error| SessionError::Broken(error.to_string())),
            Self::V5(client) => client
                .try_publish(topic, v5::mqttbytes::QoS::AtLeastOnce, false, payload)
                .map_err(|error| SessionError::Broken(error.to_string())),
        }
    }

    /// Queues a DISCONNECT behind what is queued already.
    pub(super) fn disconnect(&self) -> Result<(), SessionError> {
        match self {
            Self::V311(client) => {
                client.try_disconnect().map_err(|error| SessionError::Broken(error.to_string()))
            }
            Self::V5(client) => {
                client.try_disconnect().map_err(|error| SessionError::Broken(error.to_string()))
            }
        }
    }
}

fn v311_step(polled: Result<rumqttc::Event, rumqttc::ConnectionError>) -> Result<Step, SessionError> {
    use rumqttc::{ConnectionError, Event, Packet};
    match polled {
        Ok(Event::Incoming(Packet::ConnAck(_))) => Ok(Step::Connected),
        Ok(Event::Incoming(Packet::PubAck(ack))) => Ok(Step::Acked(ack.pkid)),
        Ok(Event::Outgoing(Outgoing::Publish(packet_id))) => Ok(Step::Sent(packet_id)),
        Ok(Event::Outgoing(Outgoing::Disconnect)) => Ok(Step::Disconnected),
        Ok(_) => Ok(Step::Other),
        Err(ConnectionError::ConnectionRefused(code)) => Err(SessionError::Refused(format!("{code:?}"))),
        Err(error) => Err(SessionError::Broken(error.to_string())),
    }
}

fn v5_step(polled: Result<v5::Event, v5::ConnectionError>) -> Result<Step, SessionError> {
    use v5::mqttbytes::v5::{Packet, PubAckReason};
    use v5::{ConnectionError, Event, StateError};
    match polled {
        Ok(Event::Incoming(Packet::ConnAck(_))) => Ok(Step::Connected),
        Ok(Event::Incoming(Packet::PubAck(ack))) => match ack.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Ok(Step::Acked(ack.pkid)),
            reason => {
                let said = ack.properties.and_then(|properties| properties.reason_string);
                let text = said.map_or_else(|| format!("{reason:?}"), |said| format!("{reason:?}: {said}"));
                Ok(Step::Refused(ack.pkid, text))
            }
        },
        Ok(Event::Outgoing(Outgoing::Publish(packet_id))) => Ok(Step::Sent(packet_id)),
        Ok(Event::Outgoing(Outgoing::Disconnect)) => Ok(Step::Disconnected),
        Ok(_) => Ok(Step::Other),
        Err(ConnectionError::ConnectionRefused(code)) => Err(SessionError::Refused(format!("{code:?}"))),
        Err(ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string })) => {
            let text = reason_string
                .map_or_else(|| format!("{reason_code:?}"), |said| format!("{reason_code:?}: {said}"));
            Err(SessionError::Refused(text))
        }
        Err(error) => Err(SessionError::Broken(error.to_string())),
    }
}
