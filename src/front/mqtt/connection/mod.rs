//! A served connection: one task with one loop that reads, hands messages to intake, answers, and
//! watches for the reasons to stop.
//!
//! An idle connection holds a few hundred bytes: sockets are read into a buffer that each thread owns,
//! and every queue is freed when it is empty.

mod exit;
mod turns;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::exit::PendingExit;
use super::acks::{AckWaits, PendingAcks, ReadAcks, SessionStoreWait};
use super::codec::write::{self, AckKind};
use super::codec::{MqttVersion, ReasonCode, Violation};
use super::delivery::PublishWriter;
use super::flights::FlightAck;
use super::goodbye::{StopReason, say_goodbye};
use super::handshake::{self, KeptWill, OpenedConnection};
use super::inbound::{Inbound, InboundEnd};
use super::outbound::Outbound;
use super::output::ClientOutput;
use super::session::MqttSession;
use super::sessions::ClientGuard;
use super::stream::ClientStream;
use super::subscribe::{self, SubscribeServices, SubscriptionRequest};
use super::wills::MqttWill;
use super::{MqttFront, unless_evicted};
use crate::auth::Scope;
use crate::auth::registry::token_ends::GrantConnectionGuard;
use crate::config::MetadataPolicy;
use crate::front::connection_table::TableEntry;
use crate::intake::{AdmittedDraft, Draft, Refusal};
use crate::memory::MemoryCharge;
use crate::message::Transport;
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::processor::TaskPayer;

/// How much of a client identifier goes into the process's log.
const LOGGED_CLIENT_ID_CHARS_MAX: usize = 64;

/// Serves one connection from its first byte to its last. The CONNECT has to arrive by `connect_by`. Its key's tenant
/// pays for it from then on.
pub(super) async fn run(
    front: &Arc<MqttFront>,
    mut stream: ClientStream,
    stranger: Box<TableEntry>,
    peer: SocketAddr,
    connect_by: Instant,
    payer: &TaskPayer,
) {
    // Short phases are boxed, so that they take no room in an idle connection's task.
    let handshake = Box::pin(async {
        let shaking = handshake::shake_hands(front, &mut stream, peer, connect_by);
        unless_evicted(&stranger, shaking).await.unwrap_or_else(|| Err(Vec::new()))
    });
    let handshake = handshake.await;
    drop(stranger);
    match handshake {
        Err(answer) => Box::pin(say_goodbye(&mut stream, &answer)).await,
        Ok(mut opened) => {
            payer.set(front.intake.processor().of_grant(&opened.inbound.grant));
            payer.change_lane().await;
            if let Some(KeptWill { bytes, written }) = opened.kept.take() {
                front.intake.processor().pace_disk(opened.inbound.grant.key(), bytes, written).await;
            }
            front.intake.metrics().mqtt_connections.increment(1);
            let ConnectionEnd { goodbye, will, discarded } = serve(front, &mut stream, peer, opened).await;
            front.intake.metrics().mqtt_connections.decrement(1);
            if let Some(will) = discarded {
                // A client that sees the end of its connection after a goodbye has no will, whatever becomes of the
                // gateway.
                Box::pin(will.discard()).await;
            }
            let publishing = async {
                if let Some(will) = will {
                    front.sessions.publish_will(will).await;
                }
            };
            let last = async { tokio::join!(say_goodbye(&mut stream, &goodbye), publishing) };
            Box::pin(last).await;
        }
    }
}

/// A session, with or without a sending half.
enum SessionSending {
    /// The session has no subscriptions, or its key may not subscribe.
    Nothing(Box<MqttSession>),
    Subscribed(Box<Outbound>),
}

/// Resolves when it is the held message's turn, to whether it is already counted against its rates.
type TurnWait = Pin<Box<dyn Future<Output = Result<bool, Refusal>> + Send>>;
type PendingRequest = Pin<Box<dyn Future<Output = (Box<Outbound>, Vec<u8>)> + Send>>;

/// What is left to do for a connection that has ended.
struct ConnectionEnd {
    /// The last bytes to send.
    goodbye: Vec<u8>,
    /// The will, if it is to be published now.
    will: Option<Box<MqttWill>>,
    /// The will that the client has taken back.
    discarded: Option<Box<MqttWill>>,
}

/// Serves an opened connection.
async fn serve(
    front: &Arc<MqttFront>,
    stream: &mut ClientStream,
    peer: SocketAddr,
    opened: Box<OpenedConnection>,
) -> ConnectionEnd {
    let mut connection = MqttConnection::begin(front, stream, opened);
    let stop = {
        let clock = tokio::time::sleep(connection.clock_step());
        tokio::pin!(clock);
        std::future::poll_fn(|cx| connection.poll(clock.as_mut(), cx)).await
    };
    let client_id_bytes = connection.present.client_id().len();
    debug!(%peer, client_id_bytes, %stop, "disconnected");
    Box::pin(connection.end(stop)).await
}

struct MqttConnection<'a> {
    front: &'a Arc<MqttFront>,
    stream: &'a mut ClientStream,
    /// The connection's registration with its key; dropped before the goodbye.
    entered: GrantConnectionGuard,
    present: ClientGuard,
    will: Option<Box<MqttWill>>,
    inbound: Inbound,
    pending_acks: PendingAcks,
    sending: SessionSending,
    /// How many topic aliases and unacknowledged messages the client accepts.
    topic_alias_maximum: u16,
    receive_maximum: u16,
    /// Whether an exchange already waits for the session to be on disk.
    session_is_stored: bool,
    /// The SUBSCRIBE or UNSUBSCRIBE in progress, which has the sending half; nothing is read or sent for
    /// the session meanwhile.
    requesting: Option<PendingRequest>,
    /// The next request: it waits until the log has what the client has published before it.
    waiting_request: Option<Box<SubscriptionRequest>>,
    /// Ends what is searched for that request.
    cancel_request: CancellationToken,
    /// A draft for which intake has no room yet; nothing is read meanwhile.
    blocked: Option<Box<BlockedDraft>>,
    /// The next message is over a rate of its key or datasource; nothing is read until it may go on.
    held: Option<TurnWait>,
    /// How many packets the latest read had.
    packets_read: usize,
    /// Set when nothing more is read; work in progress is finished first.
    ended: Option<InboundEnd>,
    /// Set when somebody else ends the connection: what the client had sent is taken in first.
    exit: Option<Box<PendingExit>>,
    /// Nothing more comes from the client than what was read ahead.
    is_input_over: bool,
    /// Another connection has taken over, and the client was still there.
    pushed_out: bool,
    output: ClientOutput,
    /// What is charged for the output and the pages behind it, while the client does not take them.
    output_memory: Option<MemoryCharge>,
    /// The key's share of the memory is used up: nothing more is read until there is room.
    starved: Option<Box<StarvedConnection>>,
    /// Half of it is: nothing more is prepared to be sent. Resolves when there is room.
    stuffed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    silence_max: Option<Duration>,
    heard_at: Instant,
}

/// What a connection waits for whose key has used up its share of the memory.
struct StarvedConnection {
    since: Instant,
    /// Resolves when there is room; to the charge for the packet that has begun, if it needs one.
    room: Pin<Box<dyn Future<Output = Option<MemoryCharge>> + Send>>,
}

// Tens of thousands of connections are idle at a time.
const _: () = assert!(size_of::<MqttConnection<'_>>() <= 768);

struct BlockedDraft {
    admitting: Pin<Box<dyn Future<Output = Result<AdmittedDraft, Refusal>> + Send>>,
    /// What else the answers wait for.
    waits: AckWaits,
    acks: ReadAcks,
}

impl<'a> MqttConnection<'a> {
    /// Boxed, so that the task is small during the handshake and the goodbye.
    fn begin(
        front: &'a Arc<MqttFront>,
        stream: &'a mut ClientStream,
        opened: Box<OpenedConnection>,
    ) -> Box<Self> {
        let OpenedConnection { session, early, .. } = *opened;
        let mut connection = Box::new(Self {
            front,
            stream,
            entered: opened.entered,
            present: opened.present,
            will: opened.will,
            inbound: opened.inbound,
            pending_acks: PendingAcks::default(),
            blocked: None,
            held: None,
            sending: SessionSending::Nothing(Box::new(MqttSession::new(0, 0))),
            topic_alias_maximum: opened.topic_alias_maximum,
            receive_maximum: opened.receive_maximum,
            session_is_stored: false,
            requesting: None,
            waiting_request: None,
            cancel_request: CancellationToken::new(),
            packets_read: 0,
            ended: None,
            exit: None,
            is_input_over: false,
            pushed_out: false,
            output: ClientOutput::new(opened.answer),
            output_memory: None,
            starved: None,
            stuffed: None,
            silence_max: opened.silence_max,
            heard_at: Instant::now(),
        });
        let may_subscribe = connection.inbound.grant.allows_scope(Scope::Subscribe).is_ok();
        if may_subscribe && (session.subscription_count() > 0 || !session.flights.is_empty()) {
            let outbound = connection.new_outbound(session);
            connection.watch(&outbound);
            connection.sending = SessionSending::Subscribed(outbound);
        } else {
            connection.sending = SessionSending::Nothing(Box::new(session));
        }
        if !early.is_empty() {
            connection.receive(&early);
        }
        connection
    }

    /// Hands back the session.
    async fn end(mut self: Box<Self>, stop: StopReason) -> ConnectionEnd {
        let found = self.find_goodbye(&stop);
        if self.pushed_out {
            self.report_takeover();
        }
        let owed = self.output.split_off_unsent();
        let goodbye = stop.last_words(&self.output.bytes, owed, &self.inbound, self.front.intake.refusals());
        self.cancel_request.cancel();
        let MqttConnection { front, entered, present, inbound, sending, requesting, mut will, .. } = *self;
        // Before the goodbye: whoever waits for the key's connections to end must not wait for a client
        // that does not read.
        drop(entered);
        let abandoned = inbound.abandoned_exchanges();
        if !abandoned.is_empty() {
            // Not awaited: an exchange that is not released expires by itself.
            drop(front.intake.release(&abandoned));
        }
        let mut session = match (requesting, sending) {
            // A request in progress is finished first.
            (Some(requesting), _) => requesting.await.0.into_session(),
            (None, SessionSending::Subscribed(outbound)) => outbound.into_session(),
            (None, SessionSending::Nothing(session)) => *session,
        };
        let said =
            if let StopReason::End(InboundEnd::Goodbye(said)) = &stop { Some(said) } else { found.as_ref() };
        let mut discarded = None;
        if let Some(disconnect) = said {
            // Sections 3.14.2.1 and 3.14.2.2.2.
            if inbound.form.version != MqttVersion::V5 || disconnect.reason == 0 {
                discarded = will.take();
            }
            if let Some(expiry_s) = disconnect.session_expiry_s.filter(|_| !inbound.grant.is_of_token()) {
                let before = session.expiry_s;
                session.expiry_s = expiry_s.min(front.config.session_expiry_s_max);
                if session.expiry_s > before {
                    present.extend_stay(&session);
                }
            }
        }
        ConnectionEnd { goodbye, will: present.leave(session, will), discarded }
    }

    /// Reports that devices share a client identifier, if they push each other out on and on.
    fn report_takeover(&self) {
        let who = &self.inbound.who;
        let Some(shared) = self.present.note_takeover(who.address) else { return };
        let note = RefusalNote::new(Transport::Mqtt, Cause::SharedClientId, &shared.words);
        self.front.intake.refusals().note(self.inbound.note(note));
        if shared.is_new {
            let client: String = who.client.chars().take(LOGGED_CLIENT_ID_CHARS_MAX).collect();
            let datasource = self.inbound.grant.datasource();
            warn!(?client, %datasource, "{}: {}", shared.words, Cause::SharedClientId.advice());
        }
    }

    /// The sending half for a session.
    fn new_outbound(&self, session: MqttSession) -> Box<Outbound> {
        let Inbound { grant, form, publisher, .. } = &self.inbound;
        let names_datasource = grant.datasource().is_all();
        let always_metadata = self.front.config.metadata == MetadataPolicy::Always;
        let aliases_max = self.topic_alias_maximum;
        Box::new(Outbound::new(
            self.front.subscribers.clone(),
            self.front.intake.metrics().clone(),
            self.present.scope().clone(),
            session,
            PublishWriter::new(*form, *publisher, names_datasource, always_metadata, aliases_max),
            self.receive_maximum,
        ))
    }

    /// Makes known how far the session is, to be looked at and, of a durable one, to be written regularly.
    fn watch(&self, outbound: &Outbound) {
        self.present.watch(&outbound.session, outbound.mailbox());
    }

    /// Decodes bytes that were read, and hands their messages to intake.
    fn receive(&mut self, bytes: &[u8]) {
        let intake = &self.front.intake;
        let batch = self.inbound.receive(bytes, intake, self.pending_acks.unacknowledged());
        self.packets_read = batch.packets;
        if batch.packets > 0 {
            self.heard_at = Instant::now();
        }
        // Releases go first: a message may reuse the packet identifier of a released exchange.
        let released = (!batch.releases.is_empty()).then(|| intake.release(&batch.releases));
        let stored = if batch.has_opened_exchanges { self.session_store_wait() } else { None };
        let intake = &self.front.intake;
        let draft = batch.draft.filter(|draft| !draft.is_empty());
        // One read is bounded by itself; what it takes decides whether there is a next one.
        let memory = draft.as_ref().map_or(0, Draft::memory_bytes) + batch.acks.memory_bytes();
        let memory = (memory > 0).then(|| self.inbound.account.charge_held(memory));
        let needed = self.inbound.charge_held();
        if !bytes.is_empty() && self.inbound.holds_packet() {
            // Who sends a large packet over a slow link is not silent. How long it may take is another deadline.
            self.heard_at = Instant::now();
        }
        let admitted = draft.map(|draft| intake.try_admit(draft));
        match admitted {
            Some(Ok(admitted)) => {
                self.pending_acks.push(AckWaits::new(Some(admitted), released, stored, memory), batch.acks);
            }
            Some(Err(draft)) => {
                let waits = AckWaits::new(None, released, stored, memory);
                let admitting = self.admit(*draft);
                self.blocked = Some(Box::new(BlockedDraft { admitting, waits, acks: batch.acks }));
            }
            None if !batch.acks.is_empty() => {
                self.pending_acks.push(AckWaits::new(None, released, stored, memory), batch.acks);
            }
            None => {}
        }
        if let Some(bytes) = needed {
            self.starve(Some(bytes));
        }
        let acknowledged = self.acknowledge(&batch.acknowledged);
        self.waiting_request = batch.request.map(Box::new);
        if let Some(limited) = batch.held {
            let intake = self.front.intake.clone();
            self.held = Some(Box::pin(async move { intake.wait_turn(limited).await }));
        }
        self.ended = acknowledged.err().map(InboundEnd::Violation).or(batch.end);
    }

    /// Takes in what the client says of messages that it was sent.
    fn acknowledge(&mut self, acknowledged: &[(u16, FlightAck)]) -> Result<(), Violation> {
        for &(packet_id, ack) in acknowledged {
            let is_known = match &mut self.sending {
                SessionSending::Subscribed(outbound) => outbound.acknowledge(packet_id, ack)?,
                SessionSending::Nothing(_) => false,
            };
            if !is_known && ack == (FlightAck::Pubrec { is_refusal: false }) {
                // It ends an exchange that the client began with another server (section 4.3.3).
                let (form, reason) = (self.inbound.form, ReasonCode::PacketIdentifierNotFound);
                write::message_ack(&mut self.output.bytes, form, AckKind::Pubrel, packet_id, reason, None);
            }
        }
        Ok(())
    }

    /// Waits for room in the key's share of the memory: for `packet_bytes`, or for anything.
    fn starve(&mut self, packet_bytes: Option<usize>) {
        let account = self.inbound.account.clone();
        let room: Pin<Box<dyn Future<Output = _> + Send>> = match packet_bytes {
            Some(bytes) => Box::pin(async move { Some(account.wait_for(bytes).await) }),
            None => Box::pin(async move {
                account.wait_room().await;
                None
            }),
        };
        self.front.intake.metrics().held_back.increment(1);
        self.starved = Some(Box::new(StarvedConnection { since: Instant::now(), room }));
    }

    /// Makes the first exchange of a durable session wait until the session is on disk: after a restart a
    /// repeated message is recognized by the session's number.
    fn session_store_wait(&mut self) -> Option<SessionStoreWait> {
        if self.session_is_stored || self.inbound.is_ephemeral() {
            return None;
        }
        self.session_is_stored = true;
        // The store writes in order: an empty write resolves after the session is written.
        Some(Box::pin(self.front.subscribers.store.write(Vec::new())))
    }

    /// Begins to serve a SUBSCRIBE or UNSUBSCRIBE. The log has what the client has published before.
    fn begin_request(&mut self, request: SubscriptionRequest) {
        let nothing = SessionSending::Nothing(Box::new(MqttSession::new(0, 0)));
        let mut outbound = match std::mem::replace(&mut self.sending, nothing) {
            SessionSending::Subscribed(outbound) => outbound,
            SessionSending::Nothing(session) => self.new_outbound(*session),
        };
        // It is not asked for anything until the request is served.
        outbound.suspend(self.output.unsent_bytes());
        let services = SubscribeServices {
            sessions: self.front.sessions.clone(),
            subscribers: self.front.subscribers.clone(),
            intake: self.front.intake.clone(),
            grant: self.inbound.grant.clone(),
            form: self.inbound.form,
            who: self.inbound.who.clone(),
            subscriptions_max: self.front.config.subscriptions_per_session_max,
            cancel: self.cancel_request.clone(),
            published: self.pending_acks.published_offset(),
        };
        self.requesting = Some(Box::pin(subscribe::serve_request(services, request, outbound)));
    }

    fn admit(&self, draft: Draft) -> Pin<Box<dyn Future<Output = Result<AdmittedDraft, Refusal>> + Send>> {
        let intake = self.front.intake.clone();
        Box::pin(async move { intake.admit(draft).await })
    }
}
