//! Connections over TCP, TLS and from proxies, and MQTT on them.

use std::time::Duration;

use super::names::PAYLOAD_BYTES_MAX;

/// Default: one MQTT packet.
pub const MQTT_PACKET_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + (64 << 10);
/// An MQTT packet of a client that has not presented a key yet: room for a CONNECT with the longest
/// user name and password, so small that strangers cannot fill memory.
pub const MQTT_CONNECT_BYTES_MAX: usize = 192 << 10;
/// Bytes that one read of an MQTT socket takes at most.
pub const MQTT_READ_BYTES: usize = 64 << 10;
/// Reads of one MQTT connection whose messages are on their way into the log at once.
pub const MQTT_READS_IN_FLIGHT_MAX: usize = 16;
/// How many bytes are read behind a packet that cannot be taken in yet, to see what the client says meanwhile.
pub const MQTT_AHEAD_BYTES_MAX: usize = 64 << 10;
/// The longest times of a TCP connection that the kernel takes, in seconds.
pub const TCP_SECONDS_MAX: u32 = 32_767;
/// How often the kernel asks for a peer that does not answer.
pub const TCP_PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it asks in vain.
pub const TCP_PROBES_MAX: u32 = 6;
/// How many takeovers of one client identifier in a row are told: fewer are a client that connects again.
pub const TAKEOVERS_TOLD_MIN: u32 = 5;
/// How many client identifiers are watched for that at once.
pub const TAKEOVER_TALLIES_MAX: usize = 4096;
/// How long a connection that somebody else ends takes in what its client had sent.
pub const MQTT_EXIT_WAIT_MAX: Duration = Duration::from_secs(2);
/// How much of it is read: more than a socket's buffer holds by default (`net.ipv4.tcp_rmem`).
pub const MQTT_EXIT_BYTES_MAX: usize = 16 << 20;
/// How long an MQTT packet may take to arrive, ...
pub const MQTT_PACKET_GRACE: Duration = Duration::from_secs(30);
/// ... and a second more for so many bytes of it.
pub const MQTT_PACKET_BYTES_PER_S_MIN: u64 = 256;
/// What a TLS handshake is charged for.
pub const TLS_HANDSHAKE_BYTES: usize = 32 << 10;
/// A file with certificates or a key.
pub const TLS_FILE_BYTES_MAX: u64 = 1 << 20;
/// A PROXY protocol header of version 1, with its line end (the specification's section 2.1).
pub const PROXY_V1_BYTES_MAX: usize = 107;
/// A PROXY protocol header of version 2, with what a proxy adds to the addresses.
pub const PROXY_V2_BYTES_MAX: usize = 4 << 10;
/// Addresses of `X-Forwarded-For` that are looked at, from the right.
pub const FORWARDED_ADDRESSES_MAX: usize = 64;
/// What the beginning of a CONNECT may take before it is charged for.
pub const MQTT_CONNECT_UNCHARGED_BYTES: usize = 4 << 10;
/// Unsent bytes to an MQTT client above which the gateway stops reading from it.
pub const MQTT_UNSENT_BYTES_MAX: usize = 256 << 10;
/// Default: QoS 1 messages that an MQTT 5 client may have unacknowledged.
pub const MQTT_RECEIVE_MAXIMUM: u16 = 1024;
/// Topic aliases that an MQTT 5 client may set.
pub const MQTT_TOPIC_ALIAS_MAXIMUM: u16 = 32;
/// Payload of one WebSocket frame that we send; its length then fits in two bytes.
pub const WEBSOCKET_FRAME_BYTES_MAX: usize = u16::MAX as usize;
/// Topic aliases that the gateway sets for an MQTT 5 client at most.
pub const MQTT_TOPIC_ALIASES_SENT_MAX: u16 = 64;
/// Messages in flight to one subscriber: at QoS 1 until the PUBACK, at QoS 2 until the PUBCOMP.
pub const MQTT_FLIGHTS_MAX: usize = 4096;
/// Default: subscriptions of one session.
pub const MQTT_SUBSCRIPTIONS_MAX: usize = 1024;
/// The largest number of subscriptions of one session that an operator may set: each filter of a SUBSCRIBE is looked
/// for among all of them.
pub const MQTT_SUBSCRIPTIONS_LIMIT: usize = 10_000;
/// The topic filters of one session in a cluster, in bytes: they fit in one NATS message, which holds 1 MiB
/// by default.
pub const CLUSTER_FILTERS_BYTES_MAX: usize = 512 << 10;
/// Connections that the kernel queues until a front accepts them.
pub const LISTEN_BACKLOG: u32 = 4096;
/// MQTT connections that wait at once for a place, at `mqtt.connections_max`.
pub const MQTT_PLACE_WAITERS_MAX: usize = 32;
