//! The handshake: from a stranger's first byte to a connection with a grant, or a refusal that says
//! why.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::TryRng;
use tokio::io::{AsyncRead, AsyncReadExt};
use tracing::{debug, info};

use super::Front;
use super::codec::write::{self, Form, Limits};
use super::codec::{Connect, Frame, Reason, Version, Violation};
use super::credentials;
use super::inbound::Inbound;
use super::sessions::Present;
use crate::auth::connections::{Control, Entered};
use crate::limits::{CLIENT_ID_BYTES_MAX, MQTT_CONNECT_BYTES_MAX, MQTT_TOPIC_ALIAS_MAXIMUM};
use crate::message::Transport;

/// A connection whose key was accepted.
pub(super) struct Opened {
    pub(super) inbound: Inbound,
    /// The connection's place among its key's.
    pub(super) entered: Entered,
    /// The client's place among those that are connected.
    pub(super) present: Present,
    /// How long the client may be silent; `None` is for ever.
    pub(super) silence_max: Option<Duration>,
    /// What came in the same breath as the CONNECT.
    pub(super) early: Vec<u8>,
    /// The CONNACK.
    pub(super) answer: Vec<u8>,
}

/// Reads the CONNECT. `Err` is what the client is to be told, possibly nothing, before its
/// connection is closed.
pub(super) async fn shake(
    front: &Arc<Front>,
    stream: &mut (impl AsyncRead + Unpin),
    peer: SocketAddr,
) -> Result<Opened, Vec<u8>> {
    let patience = Duration::from_millis(front.config.connect_ms_max);
    let reading = tokio::time::timeout(patience, read_connect(stream));
    let (buffer, bytes) = tokio::select! {
        () = front.drain.cancelled() => return Err(Vec::new()),
        read = reading => match read {
            Ok(Ok(read)) => read,
            Ok(Err(None)) => return Err(Vec::new()),
            Ok(Err(Some(violation))) => {
                refuse(front, peer, "malformed_connect", &violation);
                return Err(Vec::new());
            }
            Err(_) => {
                refuse(front, peer, "connect_timeout", &"no CONNECT within mqtt.connect_ms_max");
                return Err(Vec::new());
            }
        }
    };
    let frame = Frame::split(&buffer, MQTT_CONNECT_BYTES_MAX, None);
    let frame = frame.ok().flatten().expect("a whole frame was read");
    let connect = frame.connect().map_err(|(version, violation)| {
        refuse(front, peer, "malformed_connect", &violation);
        answer(version, violation.reason, violation.text)
    })?;
    let mut opened = open(front, peer, &connect)
        .map_err(|(reason, words)| answer(Some(connect.version), reason, &words))?;
    opened.early = buffer[bytes..].to_vec();
    Ok(opened)
}

/// Reads until there is a whole first packet. `Err(None)` is a connection that ended before.
async fn read_connect(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Vec<u8>, usize), Option<Violation>> {
    let mut buffer = Vec::new();
    loop {
        match stream.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return Err(None),
            Ok(_) => {}
        }
        if buffer[0] >> 4 != 1 {
            return Err(Some(Violation::protocol("the first packet has to be a CONNECT")));
        }
        if let Some(frame) = Frame::split(&buffer, MQTT_CONNECT_BYTES_MAX, None).map_err(Some)? {
            let bytes = frame.bytes;
            return Ok((buffer, bytes));
        }
    }
}

/// Decides on a CONNECT, and enters the client if it is let in.
fn open(front: &Arc<Front>, peer: SocketAddr, connect: &Connect<'_>) -> Result<Opened, (Reason, String)> {
    let config = &front.config;
    let no = |cause: &'static str, reason: Reason, words: String| {
        refuse(front, peer, cause, &words);
        (reason, words)
    };
    if connect.wants_authentication() {
        let words = "present an API key: there is no extended authentication".to_owned();
        return Err(no("authentication_method", Reason::BadAuthenticationMethod, words));
    }
    let grant = credentials::of_connect(connect, front.intake.authorizer()).map_err(|denied| {
        refuse(front, peer, denied.cause(), &denied);
        // One answer for all: it tells a stranger nothing.
        (Reason::NotAuthorized, "no valid API key as user name, password or user property".to_owned())
    })?;
    if connect.will.is_some() {
        let words = "will messages are not served yet".to_owned();
        return Err(no("will", Reason::ImplementationSpecificError, words));
    }
    let v5 = connect.version == Version::V5;
    let client_id = match connect.client_id {
        "" if connect.version == Version::V31 || !v5 && !connect.clean => {
            let words = "an empty client identifier needs clean session".to_owned();
            return Err(no("client_id", Reason::ClientIdentifierNotValid, words));
        }
        "" => assigned_client_id(),
        given if given.len() > CLIENT_ID_BYTES_MAX => {
            let words = format!("a client identifier has at most {CLIENT_ID_BYTES_MAX} bytes");
            return Err(no("client_id", Reason::ClientIdentifierNotValid, words));
        }
        given => given.to_owned(),
    };
    let keep_alive_s = match connect.keep_alive_s {
        asked if v5 && (asked == 0 || asked > config.keep_alive_s_max) => config.keep_alive_s_max,
        asked => asked,
    };
    let form = Form {
        version: connect.version,
        reasons: connect.wants_reasons(),
        packet_bytes_max: connect.packet_bytes_max(),
    };
    let mut answer = Vec::with_capacity(64);
    let limits = Limits {
        receive_maximum: config.receive_maximum,
        packet_bytes_max: u32::try_from(config.packet_bytes_max).unwrap_or(u32::MAX),
        topic_alias_maximum: MQTT_TOPIC_ALIAS_MAXIMUM,
        keep_alive_s: (keep_alive_s != connect.keep_alive_s).then_some(keep_alive_s),
        client_id: connect.client_id.is_empty().then(|| client_id.clone()),
        session_expiry_s: (connect.session_expiry_s() > 0).then_some(0),
    };
    write::connack(&mut answer, connect.version, &limits);

    let control = Arc::new(Control::default());
    let entered = grant.key().connections.enter(control.clone());
    let present = front.sessions.enter(grant.datasource().clone(), client_id.into(), control);
    debug!(%peer, key_id = %grant.key_id(), datasource = %grant.datasource(), version = ?connect.version, "connected");
    Ok(Opened {
        inbound: Inbound::new(grant, form, config.packet_bytes_max, config.receive_maximum),
        entered,
        present,
        // Section 3.1.2.10: one and a half times the keep-alive.
        silence_max: (keep_alive_s > 0).then(|| Duration::from_millis(1500 * u64::from(keep_alive_s))),
        early: Vec::new(),
        answer,
    })
}

/// Counts and tells of a refused connection. What a client calls itself is not told: it may be
/// anything, even a key.
fn refuse(front: &Front, peer: SocketAddr, cause: &'static str, why: &dyn std::fmt::Display) {
    front.intake.metrics().refused(Transport::Mqtt, cause);
    info!(%peer, cause, %why, "refused a connection");
}

/// The CONNACK of a refusal; a client whose protocol is not even known is told nothing.
fn answer(version: Option<Version>, reason: Reason, words: &str) -> Vec<u8> {
    let mut answer = Vec::new();
    match version {
        // MQTT 3.1.1 has return codes for these; anything else just closes (section 3.1.4).
        Some(Version::V311 | Version::V31)
            if matches!(reason, Reason::MalformedPacket | Reason::ProtocolError) => {}
        Some(version) => write::connack_refused(&mut answer, version, reason, words),
        None => {}
    }
    answer
}

/// An identifier for a client that has none.
fn assigned_client_id() -> String {
    let mut random = [0; 12];
    // Not a secret: if the generator is not to be had, the clock keeps two clients apart.
    if rand::rngs::SysRng.try_fill_bytes(&mut random).is_err() {
        random[..8].copy_from_slice(&crate::message::now_micros().to_le_bytes());
    }
    random.iter().fold("auto-".to_owned(), |id, byte| format!("{id}{byte:02x}"))
}
