//! CONNECT (section 3.1): the client's identifier and key, and its wishes for the connection.

use super::properties::{
    AUTHENTICATION_DATA, AUTHENTICATION_METHOD, AllowedProperties, MAXIMUM_PACKET_SIZE, Properties,
    RECEIVE_MAXIMUM, REQUEST_PROBLEM_INFORMATION, SESSION_EXPIRY, TOPIC_ALIAS_MAXIMUM,
};
use super::{MqttVersion, PacketReader, ReasonCode, Violation};

/// A CONNECT.
#[derive(Debug)]
pub struct ConnectPacket<'a> {
    /// The protocol version.
    pub version: MqttVersion,
    /// The client is the bridge of another broker.
    pub is_bridge: bool,
    /// Clean session, or clean start.
    pub clean: bool,
    /// The keep-alive in seconds; 0 means none.
    pub keep_alive_s: u16,
    /// The client identifier as given; may be empty.
    pub client_id: &'a str,
    /// The message to publish when the connection is lost.
    pub will: Option<ConnectWill<'a>>,
    /// The user name, if given.
    pub username: Option<&'a str>,
    /// The password, if given.
    pub password: Option<&'a [u8]>,
    /// MQTT 5.
    pub properties: Properties<'a>,
}

/// A CONNECT's will.
#[derive(Debug)]
pub struct ConnectWill<'a> {
    /// The topic to publish to.
    pub topic: &'a str,
    /// The message.
    pub payload: &'a [u8],
    /// 0 to 2.
    pub qos: u8,
    /// The retain flag.
    pub retain: bool,
    /// MQTT 5.
    pub properties: Properties<'a>,
}

impl<'a> ConnectPacket<'a> {
    /// Decodes a CONNECT's body. An error comes with the packet's version, if it is known by then.
    pub fn decode(body: &'a [u8]) -> Result<Self, (Option<MqttVersion>, Violation)> {
        let mut reader = PacketReader::new(body);
        let (version, is_bridge, flags) = read_version(&mut reader)?;
        let decoded = Self::decode_after_version(reader, version, flags);
        let connect = decoded.map_err(|violation| (Some(version), violation))?;
        Ok(Self { is_bridge, ..connect })
    }

    fn decode_after_version(
        mut reader: PacketReader<'a>,
        version: MqttVersion,
        flags: u8,
    ) -> Result<Self, Violation> {
        let v5 = version == MqttVersion::V5;
        let (has_username, has_password) = (flags & 0x80 != 0, flags & 0x40 != 0);
        let (will_retain, will_qos, has_will) = (flags & 0x20 != 0, flags >> 3 & 3, flags & 0x04 != 0);
        // MQTT 3.1 says nothing about the reserved bit.
        if flags & 0x01 != 0 && version != MqttVersion::V31 {
            return Err(Violation::malformed("the reserved connect flag is set"));
        }
        if will_qos == 3 {
            return Err(Violation::malformed("QoS 3 does not exist"));
        }
        if !has_will && (will_qos != 0 || will_retain) {
            return Err(Violation::malformed("will flags are set without a will"));
        }
        if has_password && !has_username && !v5 {
            return Err(Violation::malformed("a password without a user name"));
        }
        let keep_alive_s = reader.u16()?;
        let properties = if v5 {
            Properties::read(&mut reader, AllowedProperties::CONNECT)?
        } else {
            Properties::default()
        };
        let has = |wanted| properties.iter().any(|(id, _, _)| id == wanted);
        if has(AUTHENTICATION_DATA) && !has(AUTHENTICATION_METHOD) {
            return Err(Violation::protocol("authentication data without an authentication method"));
        }
        let client_id = reader.text()?;
        let will = has_will.then(|| read_will(&mut reader, v5, will_qos, will_retain)).transpose()?;
        // In MQTT 3.1 the length has precedence over the flags: an announced field may be missing.
        let is_there = |reader: &PacketReader<'_>| version != MqttVersion::V31 || !reader.is_empty();
        let username = (has_username && is_there(&reader)).then(|| reader.text()).transpose()?;
        let password = (has_password && is_there(&reader)).then(|| reader.binary()).transpose()?;
        reader.expect_end()?;
        let clean = flags & 0x02 != 0;
        let is_bridge = false;
        Ok(Self { version, is_bridge, clean, keep_alive_s, client_id, will, username, password, properties })
    }

    /// The session expiry in seconds; 0 ends the session with the connection, `u32::MAX` never.
    pub fn session_expiry_s(&self) -> u32 {
        match self.version {
            MqttVersion::V5 => self.properties.u32(SESSION_EXPIRY).unwrap_or(0),
            _ if self.clean => 0,
            _ => u32::MAX,
        }
    }

    /// How many unacknowledged QoS 1 and 2 messages the client accepts.
    pub fn receive_maximum(&self) -> u16 {
        self.properties.u16(RECEIVE_MAXIMUM).unwrap_or(u16::MAX)
    }

    /// How many topic aliases the client accepts.
    pub fn topic_alias_maximum(&self) -> u16 {
        self.properties.u16(TOPIC_ALIAS_MAXIMUM).unwrap_or(0)
    }

    /// The largest packet that the client accepts, in bytes.
    pub fn packet_bytes_max(&self) -> u32 {
        self.properties.u32(MAXIMUM_PACKET_SIZE).unwrap_or(u32::MAX)
    }

    /// Whether the client wants reason strings.
    pub fn wants_reasons(&self) -> bool {
        self.properties.u32(REQUEST_PROBLEM_INFORMATION) != Some(0)
    }

    /// Whether the client wants extended authentication.
    pub fn wants_authentication(&self) -> bool {
        self.properties.iter().any(|(id, _, _)| id == AUTHENTICATION_METHOD)
    }
}

/// The bit of the protocol level by which Mosquitto's bridges (`try_private`) and others say what they are.
const BRIDGE_LEVEL_BIT: u8 = 0x80;

/// Reads the protocol name, the level and the connect flags. Also returns whether the client is a bridge.
fn read_version(
    reader: &mut PacketReader<'_>,
) -> Result<(MqttVersion, bool, u8), (Option<MqttVersion>, Violation)> {
    let unknown = |violation| (None, violation);
    let unsupported = |text| Violation { reason: ReasonCode::UnsupportedProtocolVersion, text };
    let name = reader.text().map_err(unknown)?;
    let level = reader.u8().map_err(unknown)?;
    let is_bridge = level & BRIDGE_LEVEL_BIT != 0;
    let version = match (name, level & !BRIDGE_LEVEL_BIT) {
        ("MQIsdp", 3) => MqttVersion::V31,
        ("MQTT", 4) => MqttVersion::V311,
        ("MQTT", 5) => MqttVersion::V5,
        ("MQTT", level) => {
            return Err((
                Some(refusal_form(reader, level)),
                unsupported("MQTT 3.1, 3.1.1 and 5 are spoken here"),
            ));
        }
        ("MQIsdp", _) => {
            return Err((Some(MqttVersion::V311), unsupported("MQTT 3.1, 3.1.1 and 5 are spoken here")));
        }
        _ => return Err((None, unsupported("the protocol's name is neither MQTT nor MQIsdp"))),
    };
    let flags = reader.u8().map_err(|violation| (Some(version), violation))?;
    Ok((version, is_bridge, flags))
}

/// The version in whose form a CONNECT of an unknown level is refused: that which the rest of the packet has, if it has
/// one, otherwise that of the nearest level, ignoring the bridge bit.
fn refusal_form(reader: &PacketReader<'_>, level: u8) -> MqttVersion {
    let nearest = if level & 0x7f > 4 { MqttVersion::V5 } else { MqttVersion::V311 };
    let has_form = |version: &MqttVersion| {
        let mut rest = reader.clone();
        rest.u8().is_ok_and(|flags| ConnectPacket::decode_after_version(rest, *version, flags).is_ok())
    };
    [MqttVersion::V311, MqttVersion::V5].into_iter().find(has_form).unwrap_or(nearest)
}

fn read_will<'a>(
    reader: &mut PacketReader<'a>,
    v5: bool,
    qos: u8,
    retain: bool,
) -> Result<ConnectWill<'a>, Violation> {
    let properties =
        if v5 { Properties::read(reader, AllowedProperties::WILL)? } else { Properties::default() };
    let topic = reader.text()?;
    if topic.is_empty() || topic.contains(['+', '#']) {
        return Err(Violation::malformed("the topic of a will has at least one character, and no wildcards"));
    }
    let payload = reader.binary()?;
    Ok(ConnectWill { topic, payload, qos, retain, properties })
}
