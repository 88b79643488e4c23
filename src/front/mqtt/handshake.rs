//! The handshake: from a connection's first byte to a connection with a grant, or to a refusal with its
//! reason.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rand::TryRng;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;
use tracing::{debug, info};

use super::bridge_notice::is_bridge_notice;
use super::client_identity::ClientIdentity;
use super::codec::write::{self, ConnackLimits, PacketForm};
use super::codec::{ConnectPacket, MqttFrame, MqttVersion, ReasonCode, Violation};
use super::credentials;
use super::inbound::Inbound;
use super::reason::refusal_reason_code;
use super::session::MqttSession;
use super::sessions::{ClientGuard, EnterError, EnteredClient};
use super::wills::MqttWill;
use super::{MqttFront, heard_by, report_proxy_header};
use crate::auth::connections::{CloseReason, ConnectionControl};
use crate::auth::registry::token_ends::GrantConnectionGuard;
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, GrantDenial, RejectedKey};
use crate::front::proxied::{ProxyHeaderError, is_proxy_header};
use crate::intake::Refusal;
use crate::limits::{
    CLIENT_ID_BYTES_MAX, MQTT_CONNECT_BYTES_MAX, MQTT_CONNECT_UNCHARGED_BYTES, MQTT_TOPIC_ALIAS_MAXIMUM,
};
use crate::memory::{MemoryAccount, MemoryCharge};
use crate::message::{DatasourceId, Transport, holds_key, now_micros};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;

/// The first byte of a TLS client. Its upper half is that of a CONNECT.
const TLS_HANDSHAKE_FIRST_BYTE: u8 = 0x16;
/// What is read of a CONNECT first; most are shorter.
const CONNECT_READ_BYTES: usize = 512;

/// What the names of clients begin with that have presented an access token. Names like this are reserved.
const TOKEN_CLIENT_PREFIX: &str = "headgate-token:";

/// A connection whose key was accepted.
pub(super) struct OpenedConnection {
    pub(super) inbound: Inbound,
    /// The connection's registration with its key.
    pub(super) entered: GrantConnectionGuard,
    /// The client's entry among the sessions.
    pub(super) present: ClientGuard,
    pub(super) session: MqttSession,
    pub(super) will: Option<Box<MqttWill>>,
    /// How many topic aliases the client accepts.
    pub(super) topic_alias_maximum: u16,
    /// How many unacknowledged messages the client accepts.
    pub(super) receive_maximum: u16,
    /// How long the client may be silent; `None` means without limit.
    pub(super) silence_max: Option<Duration>,
    /// Bytes that were read together with the CONNECT.
    pub(super) early: Vec<u8>,
    /// The CONNACK.
    pub(super) answer: Vec<u8>,
    /// What has to be on the disk before the CONNACK. Awaited where the connection can no longer be evicted as a
    /// stranger's, which would lose the session.
    pub(super) kept: Option<KeptWill>,
}

/// The copy of a will on its way to the disk.
pub(super) struct KeptWill {
    /// About how large it is.
    pub(super) bytes: usize,
    pub(super) written: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Reads the CONNECT, which has to arrive by `connect_by`, and decides on it. `Err` holds the bytes to
/// send, possibly none, before the connection is closed.
pub(super) async fn shake_hands(
    front: &Arc<MqttFront>,
    stream: &mut (impl AsyncRead + Unpin),
    peer: SocketAddr,
    connect_by: Instant,
) -> Result<Box<OpenedConnection>, Vec<u8>> {
    let account = front.intake.memory().account_of_stranger(peer.ip());
    let reading = heard_by(connect_by, read_connect(stream, &account));
    let (buffer, bytes, _memory) = tokio::select! {
        () = front.drain.cancelled() => return Err(Vec::new()),
        read = reading => match read {
            Ok(Ok(read)) => read,
            Ok(Err(None)) => return Err(Vec::new()),
            Ok(Err(Some(FirstPacketFault::Malformed(violation)))) => {
                report_refused_connection(front, peer, RefusalNote::new(Transport::Mqtt, Cause::MalformedConnect, &violation));
                return Err(Vec::new());
            }
            Ok(Err(Some(FirstPacketFault::ProxyHeader))) => {
                report_proxy_header(front, peer, &ProxyHeaderError::Untrusted);
                return Err(Vec::new());
            }
            Err(_) => {
                let words = "no CONNECT within mqtt.connect_ms_max";
                report_refused_connection(front, peer, RefusalNote::new(Transport::Mqtt, Cause::ConnectTimeout, &words));
                return Err(Vec::new());
            }
        }
    };
    let frame = MqttFrame::split(&buffer, MQTT_CONNECT_BYTES_MAX, None);
    let frame = frame.ok().flatten().expect("a whole frame was read");
    let connect = frame.connect().map_err(|(version, violation)| {
        report_refused_connection(
            front,
            peer,
            RefusalNote::new(Transport::Mqtt, Cause::MalformedConnect, &violation),
        );
        refusal_connack(version, u32::MAX, violation.reason, violation.text)
    })?;
    let handshake = Handshake { front, peer, connect: &connect };
    let mut opened = handshake.open().await.map_err(|(reason, words)| {
        refusal_connack(Some(connect.version), connect.packet_bytes_max(), reason, &words)
    })?;
    opened.early = buffer[bytes..].to_vec();
    Ok(opened)
}

/// Why what a client sends first is no CONNECT.
enum FirstPacketFault {
    Malformed(Violation),
    /// It is a PROXY protocol header, and the client is no trusted proxy.
    ProxyHeader,
}

impl From<Violation> for FirstPacketFault {
    fn from(violation: Violation) -> Self {
        Self::Malformed(violation)
    }
}

/// Reads until the first packet is complete. A large one is charged to strangers, and its rest is read when there is
/// room. `Err(None)` means that the connection ended before that.
async fn read_connect(
    stream: &mut (impl AsyncRead + Unpin),
    account: &Arc<MemoryAccount>,
) -> Result<(Vec<u8>, usize, Option<MemoryCharge>), Option<FirstPacketFault>> {
    let mut buffer: Vec<u8> = Vec::new();
    let mut memory: Option<MemoryCharge> = None;
    loop {
        if buffer.len() == buffer.capacity() {
            let capacity = (2 * buffer.capacity()).clamp(CONNECT_READ_BYTES, 2 * MQTT_CONNECT_BYTES_MAX);
            if capacity > MQTT_CONNECT_UNCHARGED_BYTES && memory.is_none() {
                // As much as a CONNECT may ever take: nobody waits while holding a part of it.
                memory = Some(account.wait_for(2 * MQTT_CONNECT_BYTES_MAX).await);
            }
            buffer.reserve_exact(capacity - buffer.len());
        }
        match stream.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return Err(None),
            Ok(_) => {}
        }
        if buffer[0] == TLS_HANDSHAKE_FIRST_BYTE {
            return Err(Some(Violation::protocol("this is TLS, and plain MQTT is served here").into()));
        }
        if buffer[0] >> 4 != 1 {
            return Err(Some(match is_proxy_header(&buffer) {
                true => FirstPacketFault::ProxyHeader,
                false => Violation::protocol("the first packet has to be a CONNECT").into(),
            }));
        }
        let split = MqttFrame::split(&buffer, MQTT_CONNECT_BYTES_MAX, None);
        if let Some(frame) = split.map_err(|violation| Some(violation.into()))? {
            let bytes = frame.bytes;
            return Ok((buffer, bytes, memory));
        }
    }
}

/// What a refused client is told.
type ConnectRefusal = (ReasonCode, String);

/// A CONNECT that is decided on, stage by stage: its key, its client identifier, its will, its session.
struct Handshake<'a> {
    front: &'a Arc<MqttFront>,
    peer: SocketAddr,
    connect: &'a ConnectPacket<'a>,
}

impl Handshake<'_> {
    /// Decides on the CONNECT, and enters the client among the sessions if it is let in.
    async fn open(&self) -> Result<Box<OpenedConnection>, ConnectRefusal> {
        let (connect, config) = (self.connect, &self.front.config);
        let grant = self.authorize()?;
        self.check_token_use(&grant)?;
        let given_id = self.choose_client_id()?;
        let client_id = self.name_of_client(&grant, &given_id)?;
        let publisher = publisher_hash(grant.datasource(), &client_id);
        let user = Arc::new(KeyClient::new(Transport::Mqtt, Some(self.peer.ip()), Some(&client_id)));
        let who = Arc::new(ClientIdentity {
            address: self.peer.ip(),
            client: client_id.as_str().into(),
            user,
            is_bridge: connect.is_bridge,
        });
        let mut will = self.check_will(&grant, &who, publisher)?;
        // What a token has opened ends with the connection.
        let expiry_s_max = if grant.is_of_token() { 0 } else { config.session_expiry_s_max };
        let expiry_s = connect.session_expiry_s().min(expiry_s_max);
        let keep_alive_s = self.choose_keep_alive_s();
        let limits = ConnackLimits {
            receive_maximum: config.receive_maximum,
            packet_bytes_max: u32::try_from(config.packet_bytes_max).unwrap_or(u32::MAX),
            topic_alias_maximum: MQTT_TOPIC_ALIAS_MAXIMUM,
            keep_alive_s: (keep_alive_s != connect.keep_alive_s).then_some(keep_alive_s),
            client_id: connect.client_id.is_empty().then_some(given_id),
            session_expiry_s: (connect.session_expiry_s() != expiry_s).then_some(expiry_s),
        };
        // Before the session, which ends an earlier connection.
        self.write_connack(false, &limits)?;
        let (entered, EnteredClient { present, session, resumed, earlier_will }) =
            self.enter(&grant, &who, expiry_s).await?;
        // The client is back before it was due.
        drop(earlier_will);
        self.front.intake.authorizer().registry().note_use(grant.key(), Some(&who.user), now_micros(), None);
        let kept = will.as_mut().map(|will| {
            // A client that was let in with a will has one, whatever becomes of the gateway.
            let session = session.is_durable().then_some(session.uid);
            let bytes = will.stored_bytes();
            KeptWill { bytes, written: Box::pin(will.keep(&self.front.subscribers.store, session)) }
        });
        let answer = self.write_connack(resumed, &limits)?;
        debug!(
            peer = %self.peer, key_id = %grant.key_id(), datasource = %grant.datasource(),
            version = ?connect.version, resumed, "connected"
        );
        let form = PacketForm {
            version: connect.version,
            reasons: connect.wants_reasons(),
            packet_bytes_max: connect.packet_bytes_max(),
        };
        let (bytes_max, receive_maximum) = (config.packet_bytes_max, config.receive_maximum);
        let account = self.front.intake.memory_account(&grant);
        Ok(Box::new(OpenedConnection {
            inbound: Inbound::new(grant, who, form, bytes_max, receive_maximum, publisher, &session, account),
            entered,
            present,
            session,
            will: will.map(Box::new),
            topic_alias_maximum: connect.topic_alias_maximum(),
            receive_maximum: connect.receive_maximum(),
            // Section 3.1.2.10: one and a half times the keep-alive.
            silence_max: (keep_alive_s > 0).then(|| Duration::from_millis(1500 * u64::from(keep_alive_s))),
            early: Vec::new(),
            answer,
            kept,
        }))
    }

    /// The CONNACK, if the client takes packets of its size.
    fn write_connack(&self, present: bool, limits: &ConnackLimits) -> Result<Vec<u8>, ConnectRefusal> {
        let (version, packet_bytes_max) = (self.connect.version, self.connect.packet_bytes_max());
        let mut answer = Vec::with_capacity(64);
        if write::connack(&mut answer, version, packet_bytes_max, present, limits) {
            return Ok(answer);
        }
        let words =
            format!("a Maximum Packet Size of {packet_bytes_max} has no room for what a CONNACK says");
        Err(self.refuse(Cause::Protocol, ReasonCode::PacketTooLarge, &words))
    }

    /// What a client is told of a refusal after its key was accepted. MQTT 3.1.1 has one code for a server that is
    /// unavailable, with which a client comes again and again: it is for what time helps against.
    fn told(&self, refusal: &Refusal) -> ReasonCode {
        let is_permanent = refusal.retry_after().is_none();
        match refusal_reason_code(refusal) {
            _ if is_permanent && self.connect.version != MqttVersion::V5 => ReasonCode::NotAuthorized,
            reason => reason,
        }
    }

    /// What the presented key allows.
    fn authorize(&self) -> Result<Grant, ConnectRefusal> {
        if self.connect.wants_authentication() {
            let words = "present an API key: there is no extended authentication";
            return Err(self.refuse(Cause::AuthenticationMethod, ReasonCode::BadAuthenticationMethod, words));
        }
        let authorizer = self.front.intake.authorizer();
        credentials::grant_of_connect(self.connect, authorizer, self.peer.ip()).map_err(|rejected| {
            let RejectedKey { denied, key_id, shape: key_shape } = rejected;
            let note = RefusalNote::new(Transport::Mqtt, denied.cause(), &denied);
            self.report(RefusalNote { key_id, key_shape, ..note });
            match denied {
                GrantDenial::TooManyFailures { .. } => {
                    (ReasonCode::ConnectionRateExceeded, denied.to_string())
                }
                // All other denials get the same answer, which tells a stranger nothing.
                _ => (
                    ReasonCode::NotAuthorized,
                    "no valid API key as user name, password or user property".to_owned(),
                ),
            }
        })
    }

    /// Refuses what an access token cannot be used for: what outlives its connection would outlive the token.
    fn check_token_use(&self, grant: &Grant) -> Result<(), ConnectRefusal> {
        let connect = self.connect;
        let what = match (connect.version, &connect.will) {
            (_, Some(_)) => "leave a will, which may be published when it has ended",
            (MqttVersion::V311 | MqttVersion::V31, None) if !connect.clean => {
                "have a session that outlives its connection: connect with clean session"
            }
            _ => return Ok(()),
        };
        grant.require_key(what).map_err(|denied| {
            self.report_of_key(grant, RefusalNote::new(Transport::Mqtt, denied.cause(), &denied));
            (ReasonCode::NotAuthorized, denied.to_string())
        })
    }

    /// The name that a client has among the sessions of its datasource: the identifier that it gives. Who has presented a
    /// token is named apart, so that it pushes out no device and takes up no session of one.
    fn name_of_client(&self, grant: &Grant, given: &str) -> Result<String, ConnectRefusal> {
        match grant.is_of_token() {
            true => Ok(format!("{TOKEN_CLIENT_PREFIX}{given}")),
            false if given.starts_with(TOKEN_CLIENT_PREFIX) => {
                let words = format!(
                    "client identifiers that begin with {TOKEN_CLIENT_PREFIX} are those of access tokens"
                );
                Err(self.refuse(Cause::ClientId, ReasonCode::ClientIdentifierNotValid, &words))
            }
            false => Ok(given.to_owned()),
        }
    }

    /// The client identifier: the client's own, or one that is made for it.
    fn choose_client_id(&self) -> Result<String, ConnectRefusal> {
        let (connect, v5) = (self.connect, self.connect.version == MqttVersion::V5);
        let words = match connect.client_id {
            "" if connect.version == MqttVersion::V31 || !v5 && !connect.clean => {
                "an empty client identifier needs clean session".to_owned()
            }
            "" => return Ok(assigned_client_id()),
            given if given.len() > CLIENT_ID_BYTES_MAX => {
                format!("a client identifier has at most {CLIENT_ID_BYTES_MAX} bytes")
            }
            given if holds_key(given) => {
                "a client identifier is no place for an API key: present it as user name or password"
                    .to_owned()
            }
            given => return Ok(given.to_owned()),
        };
        Err(self.refuse(Cause::ClientId, ReasonCode::ClientIdentifierNotValid, &words))
    }

    /// Checks the will now, so that the client hears of a bad one while it can still be told.
    fn check_will(
        &self,
        grant: &Grant,
        who: &Arc<ClientIdentity>,
        publisher: u64,
    ) -> Result<Option<MqttWill>, ConnectRefusal> {
        let Some(will) = &self.connect.will else { return Ok(None) };
        if is_bridge_notice(will.topic) {
            self.front.intake.metrics().bridge_notices.increment(1);
            return Ok(None);
        }
        let Some(scope) = self.front.intake.authorizer().registry().scope_of(grant.key()) else {
            let (reason, words) = close_reason(CloseReason::KeyDead);
            return Err((reason, words.to_owned()));
        };
        let made = MqttWill::new(will, (grant, &scope), who, publisher, &self.front.intake);
        made.map(Some).map_err(|refusal| {
            self.report_of_key(grant, RefusalNote { cause: Cause::Will, ..refusal.note(Transport::Mqtt) });
            (self.told(&refusal), format!("the will cannot be taken: {refusal}"))
        })
    }

    /// Enters the connection with its key, and the client among the sessions, which ends an earlier
    /// connection of it.
    async fn enter(
        &self,
        grant: &Grant,
        who: &ClientIdentity,
        expiry_s: u32,
    ) -> Result<(GrantConnectionGuard, EnteredClient), ConnectRefusal> {
        let (front, connect) = (self.front, self.connect);
        let control = Arc::new(ConnectionControl::default());
        // Before the session: a key that dies while the session is fetched has to close this connection too.
        let entered = front.intake.authorizer().registry().enter_connection(grant, &control);
        let is_new = connect.client_id.is_empty();
        // A token takes up no session: whoever had it may have subscribed to more.
        let clean = connect.clean || grant.is_of_token();
        let client = who.client.clone();
        let Some(scope) = front.intake.authorizer().registry().scope_of(grant.key()) else {
            let (reason, words) = close_reason(CloseReason::KeyDead);
            return Err((reason, words.to_owned()));
        };
        let may_enter = || front.intake.check_connections(grant);
        let entering = front.sessions.enter(&scope, client, control, clean, is_new, expiry_s, may_enter);
        let client = entering.await.map_err(|not_entered| match not_entered {
            EnterError::Closed(why) => {
                let (reason, words) = close_reason(why);
                (reason, words.to_owned())
            }
            EnterError::Refused(refusal) => {
                self.report_of_key(grant, refusal.note(Transport::Mqtt));
                (self.told(&refusal), refusal.to_string())
            }
            EnterError::TooMany(exceeded) => {
                let refusal = front.intake.share_refusal(grant.datasource(), exceeded);
                self.report_of_key(grant, refusal.note(Transport::Mqtt));
                (self.told(&refusal), refusal.to_string())
            }
            EnterError::Unavailable(error) => {
                let words = format!("the client's session cannot be looked up now: {error}");
                self.report_of_key(grant, RefusalNote::new(Transport::Mqtt, Cause::Unavailable, &words));
                (ReasonCode::ServerUnavailable, words)
            }
        })?;
        Ok((entered, client))
    }

    /// The keep-alive: the client's, or the longest that is configured.
    fn choose_keep_alive_s(&self) -> u16 {
        let (asked, longest) = (self.connect.keep_alive_s, self.front.config.keep_alive_s_max);
        // Earlier versions of MQTT cannot tell a client another one.
        let v5 = self.connect.version == MqttVersion::V5;
        if v5 && (asked == 0 || asked > longest) { longest } else { asked }
    }

    /// Reports a refusal, and returns what the client is told.
    fn refuse(&self, cause: Cause, reason: ReasonCode, words: &str) -> ConnectRefusal {
        self.report(RefusalNote::new(Transport::Mqtt, cause, &words));
        (reason, words.to_owned())
    }

    fn report(&self, note: RefusalNote<'_>) {
        report_refused_connection(
            self.front,
            self.peer,
            RefusalNote { client: self.connect.client_id, ..note },
        );
    }

    /// Reports a refusal after the key was accepted.
    fn report_of_key(&self, grant: &Grant, note: RefusalNote<'_>) {
        let datasource = grant.datasource().as_str();
        self.report(RefusalNote { key_id: Some(grant.key_id()), datasource, ..note });
    }
}

/// The answer to a client whose connection has to close before it is let in.
fn close_reason(why: CloseReason) -> (ReasonCode, &'static str) {
    match why {
        CloseReason::KeyDead => (ReasonCode::NotAuthorized, "the API key is no longer valid"),
        CloseReason::TakenOver => (ReasonCode::ServerBusy, "the client connected again"),
        CloseReason::Drain => (ReasonCode::ServerUnavailable, "the gateway is shutting down"),
        CloseReason::Kicked => (ReasonCode::ServerBusy, "an administrator has closed the connection"),
    }
}

/// The hash by which records identify the client that published them; never 0.
fn publisher_hash(datasource: &DatasourceId, client_id: &str) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(datasource.as_str().as_bytes()).update(&[0]).update(client_id.as_bytes());
    let mut bytes = [0; 8];
    hash.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes).max(1)
}

/// Reports a refused connection. The client identifier does not go into the process's log, because it
/// may be anything, even a key.
pub(super) fn report_refused_connection(front: &MqttFront, peer: SocketAddr, note: RefusalNote<'_>) {
    let RefusalNote { cause, words, key_id, .. } = note;
    front.intake.refusals().note(RefusalNote { address: Some(peer.ip()), ..note });
    // A flood of attempts must not flood the log.
    if cause == Cause::TooManyFailures {
        debug!(%peer, cause = cause.name(), "refused a connection");
    } else {
        info!(%peer, cause = cause.name(), key_id = key_id.map(display), why = %words, "refused a connection");
    }
}

/// The CONNACK of a refusal; empty if the client's protocol version is unknown.
fn refusal_connack(
    version: Option<MqttVersion>,
    packet_bytes_max: u32,
    reason: ReasonCode,
    words: &str,
) -> Vec<u8> {
    let mut answer = Vec::new();
    match version {
        // MQTT 3.1.1 has no return code for these: the connection just closes (section 3.1.4).
        Some(MqttVersion::V311 | MqttVersion::V31)
            if matches!(reason, ReasonCode::MalformedPacket | ReasonCode::ProtocolError) => {}
        Some(version) => write::connack_refused(&mut answer, version, packet_bytes_max, reason, words),
        None => {}
    }
    answer
}

/// Makes an identifier for a client that gave none.
fn assigned_client_id() -> String {
    let mut random = [0; 12];
    // Not a secret: if the generator fails, the clock keeps two clients apart.
    if rand::rngs::SysRng.try_fill_bytes(&mut random).is_err() {
        random[..8].copy_from_slice(&crate::message::now_micros().to_le_bytes());
    }
    random.iter().fold("auto-".to_owned(), |id, byte| format!("{id}{byte:02x}"))
}
