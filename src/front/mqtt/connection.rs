//! A served connection: one task with one loop that reads, hands messages to intake, answers, and
//! watches for the reasons to stop.
//!
//! An idle connection holds a few hundred bytes: sockets are read into a buffer that each thread owns,
//! and every queue is freed when it is empty.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tracing::debug;

use super::MqttFront;
use super::acks::{AckWaits, PendingAcks, ReadAcks, SessionStoreWait};
use super::codec::MqttVersion;
use super::delivery::PublishWriter;
use super::goodbye::{StopReason, say_goodbye};
use super::handshake::{self, OpenedConnection};
use super::inbound::{Inbound, InboundEnd};
use super::outbound::Outbound;
use super::session::MqttSession;
use super::sessions::ClientGuard;
use super::stream::ClientStream;
use super::subscribe::{self, SubscribeServices, SubscriptionRequest};
use super::wills::MqttWill;
use crate::auth::connections::{CloseReason, KeyConnectionGuard};
use crate::auth::{GrantDenial, Scope};
use crate::intake::{AdmittedDraft, Draft, Refusal};
use crate::limits::{MQTT_READ_BYTES, MQTT_READS_IN_FLIGHT_MAX, MQTT_UNSENT_BYTES_MAX};

/// How long a client may read nothing of what it is sent before it counts as gone.
const MQTT_STUCK_MAX: Duration = Duration::from_secs(30);
/// The shortest and the longest time between two checks of the clock.
const CLOCK_STEP_MIN: Duration = Duration::from_millis(10);
const CLOCK_STEP_MAX: Duration = Duration::from_secs(3600);

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; MQTT_READ_BYTES].into());
    /// The output buffer that the thread's connections use in turn.
    static SPARE_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Serves one connection from its first byte to its last. The CONNECT has to arrive by `connect_by`.
pub(super) async fn run(
    front: &Arc<MqttFront>,
    mut stream: ClientStream,
    peer: SocketAddr,
    connect_by: Instant,
) {
    // Short phases are boxed, so that they take no room in an idle connection's task.
    match Box::pin(handshake::shake_hands(front, &mut stream, peer, connect_by)).await {
        Err(answer) => Box::pin(say_goodbye(&mut stream, &answer)).await,
        Ok(opened) => {
            front.intake.metrics().mqtt_connections.increment(1);
            let (goodbye, will) = serve(front, &mut stream, peer, opened).await;
            front.intake.metrics().mqtt_connections.decrement(1);
            let publishing = async {
                if let Some(will) = will {
                    will.publish(&front.intake).await;
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

/// Serves an opened connection. Returns the last bytes to send, and the will if it is to be published
/// now.
async fn serve(
    front: &Arc<MqttFront>,
    stream: &mut ClientStream,
    peer: SocketAddr,
    opened: Box<OpenedConnection>,
) -> (Vec<u8>, Option<Box<MqttWill>>) {
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
    entered: KeyConnectionGuard,
    present: ClientGuard,
    will: Option<Box<MqttWill>>,
    inbound: Inbound,
    trains: PendingAcks,
    sending: SessionSending,
    /// How many topic aliases and unacknowledged messages the client accepts.
    topic_alias_maximum: u16,
    receive_maximum: u16,
    /// Whether an exchange already waits for the session to be on disk.
    session_is_stored: bool,
    /// The SUBSCRIBE or UNSUBSCRIBE in progress, which has the sending half; nothing is read or sent for
    /// the session meanwhile.
    requesting: Option<PendingRequest>,
    /// A draft for which intake has no room yet; nothing is read meanwhile.
    blocked: Option<Box<BlockedDraft>>,
    /// The next message is over a rate of its key or datasource; nothing is read until it may go on.
    held: Option<TurnWait>,
    /// Set when nothing more is read; work in progress is finished first.
    ended: Option<InboundEnd>,
    /// The output, and how many of its bytes were sent.
    out: Vec<u8>,
    sent: usize,
    /// Since when the client has taken none of the output.
    stuck_since: Option<Instant>,
    silence_max: Option<Duration>,
    heard_at: Instant,
}

// Tens of thousands of connections are idle at a time.
const _: () = assert!(size_of::<MqttConnection<'_>>() <= 768);

struct BlockedDraft {
    admitting: Pin<Box<dyn Future<Output = Result<AdmittedDraft, Refusal>> + Send>>,
    /// What else the answers wait for.
    waits: AckWaits,
    train: ReadAcks,
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
            trains: PendingAcks::default(),
            blocked: None,
            held: None,
            sending: SessionSending::Nothing(Box::new(MqttSession::new(0, 0))),
            topic_alias_maximum: opened.topic_alias_maximum,
            receive_maximum: opened.receive_maximum,
            session_is_stored: false,
            requesting: None,
            ended: None,
            out: opened.answer,
            sent: 0,
            stuck_since: None,
            silence_max: opened.silence_max,
            heard_at: Instant::now(),
        });
        let may_subscribe = connection.inbound.grant.allows_scope(Scope::Subscribe).is_ok();
        if may_subscribe && (session.subscription_count() > 0 || !session.flights.is_empty()) {
            let outbound = connection.new_outbound(session);
            connection.watch_cursor(&outbound);
            connection.sending = SessionSending::Subscribed(outbound);
        } else {
            connection.sending = SessionSending::Nothing(Box::new(session));
        }
        if !early.is_empty() {
            connection.receive(&early);
        }
        connection
    }

    /// Hands back the session. Returns the last bytes, and the will if it is to be published now.
    async fn end(mut self: Box<Self>, stop: StopReason) -> (Vec<u8>, Option<Box<MqttWill>>) {
        let owed = self.out.split_off(self.sent.min(self.out.len()));
        let goodbye = stop.last_words(&self.out, owed, &self.inbound, self.front.intake.refusals());
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
        if let StopReason::End(InboundEnd::Goodbye(disconnect)) = &stop {
            // Sections 3.14.2.1 and 3.14.2.2.2.
            will = will.filter(|_| inbound.form.version == MqttVersion::V5 && disconnect.reason != 0);
            if let Some(expiry_s) = disconnect.session_expiry_s {
                let before = session.expiry_s;
                session.expiry_s = expiry_s.min(front.config.session_expiry_s_max);
                if session.expiry_s > before {
                    present.extend_stay(&session);
                }
            }
        }
        (goodbye, present.leave(session, will))
    }

    /// The sending half for a session.
    fn new_outbound(&self, session: MqttSession) -> Box<Outbound> {
        let Inbound { grant, form, publisher, .. } = &self.inbound;
        let names_datasource = grant.datasource().is_all();
        Box::new(Outbound::new(
            self.front.subscribers.clone(),
            self.front.intake.metrics().clone(),
            grant.datasource().clone(),
            session,
            PublishWriter::new(*form, *publisher, names_datasource, self.topic_alias_maximum),
            self.receive_maximum,
        ))
    }

    /// Has a durable session's cursor written regularly.
    fn watch_cursor(&self, outbound: &Outbound) {
        if outbound.session.is_durable() {
            self.present.watch_cursor(outbound.session.uid, outbound.mailbox().clone());
        }
    }

    fn poll(&mut self, clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<StopReason> {
        if self.out.capacity() == 0 {
            self.out = SPARE_BUFFER.take();
        }
        let polled = self.poll_turns(clock, cx);
        if self.out.is_empty() && self.out.capacity() <= 2 * MQTT_UNSENT_BYTES_MAX {
            // An idle connection holds no buffer; a larger one than usual is freed.
            SPARE_BUFFER.set(std::mem::take(&mut self.out));
        }
        polled
    }

    /// Loops over: answers that are due, then writing, then reading.
    fn poll_turns(&mut self, mut clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<StopReason> {
        loop {
            match self.present.control().poll_closed(cx) {
                // Drafts handed over before the shutdown are finished and acknowledged.
                Poll::Ready(CloseReason::Drain) => {
                    self.ended.get_or_insert(InboundEnd::Lost);
                    if self.trains.is_empty() && self.blocked.is_none() && self.sent == self.out.len() {
                        return Poll::Ready(StopReason::Close(CloseReason::Drain));
                    }
                }
                Poll::Ready(why) => return Poll::Ready(StopReason::Close(why)),
                Poll::Pending => {}
            }
            if let Some(blocked) = &mut self.blocked
                && let Poll::Ready(admitted) = blocked.admitting.as_mut().poll(cx)
            {
                let (mut waits, train) =
                    (std::mem::take(&mut blocked.waits), std::mem::take(&mut blocked.train));
                self.blocked = None;
                match admitted {
                    Ok(admitted) => {
                        waits.admitted = Some(admitted);
                        self.trains.push(waits, train);
                    }
                    Err(refusal) => return Poll::Ready(StopReason::Transient(refusal)),
                }
            }
            if let Some(held) = &mut self.held
                && let Poll::Ready(turn) = held.as_mut().poll(cx)
            {
                self.held = None;
                match turn {
                    Ok(paid) => self.inbound.resume(paid),
                    Err(refusal) => return Poll::Ready(StopReason::Transient(refusal)),
                }
            }
            let waiting = self.trains.poll_write(self.inbound.form, &mut self.out, cx);
            if let Poll::Ready(Err(refusal)) = waiting {
                return Poll::Ready(StopReason::Transient(refusal));
            }
            if let Some(requesting) = &mut self.requesting
                && let Poll::Ready((outbound, answer)) = requesting.as_mut().poll(cx)
            {
                self.requesting = None;
                self.out.extend_from_slice(&answer);
                self.watch_cursor(&outbound);
                self.sending = SessionSending::Subscribed(outbound);
            }
            if self.inbound.is_paused() && self.ended.is_none() && self.may_read() {
                self.receive(&[]);
                continue;
            }
            let written = match self.poll_send(cx) {
                Ok(written) => written,
                Err(stop) => return Poll::Ready(stop),
            };
            if written.is_pending() && self.stuck_since.is_none() {
                self.stuck_since = Some(Instant::now());
                clock.as_mut().reset(Instant::now() + self.clock_step());
            }
            let finished = waiting.is_ready() && written.is_ready() && self.blocked.is_none();
            if self.ended.is_some() {
                if finished && let Some(end) = self.ended.take() {
                    return Poll::Ready(if self.present.control().closed() == Some(CloseReason::Drain) {
                        StopReason::Close(CloseReason::Drain)
                    } else {
                        StopReason::End(end)
                    });
                }
            } else if self.may_read() {
                match self.poll_read(cx) {
                    Poll::Ready(Ok(())) => continue,
                    Poll::Ready(Err(_)) => return Poll::Ready(StopReason::NetworkFailed),
                    Poll::Pending => {}
                }
            }
            ready!(clock.as_mut().poll(cx));
            if let Some(stop) = self.check_deadlines() {
                return Poll::Ready(stop);
            }
            let next = Instant::now() + self.clock_step();
            clock.as_mut().reset(next);
        }
    }

    /// Writes the output, and messages for the session's subscriptions, as long as the client takes them.
    /// Ready when everything is written.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, StopReason> {
        loop {
            let before = self.out.len();
            if let (SessionSending::Subscribed(outbound), None, None) =
                (&mut self.sending, &self.requesting, &self.ended)
            {
                let may = self.inbound.grant.allows_scope(Scope::Subscribe);
                if matches!(may, Err(GrantDenial::Revoked | GrantDenial::Expired)) {
                    return Err(StopReason::Close(CloseReason::KeyDead));
                }
                if may.is_ok()
                    && let Poll::Ready(trouble) = outbound.poll_fill(before - self.sent, &mut self.out, cx)
                {
                    return Err(StopReason::OutboundFailed(trouble));
                }
            }
            // A complete flush makes room, so the sending half is asked again.
            let something = !self.out.is_empty();
            match self.poll_flush(cx) {
                Poll::Ready(Ok(())) if something => {}
                Poll::Ready(Ok(())) => return Ok(Poll::Ready(())),
                Poll::Ready(Err(_)) => return Err(StopReason::NetworkFailed),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
    }

    /// Whether another read may be taken in. While it may not, TCP's flow control holds the client back.
    fn may_read(&self) -> bool {
        self.blocked.is_none()
            && self.held.is_none()
            && self.requesting.is_none()
            && self.trains.len() < MQTT_READS_IN_FLIGHT_MAX
            && self.out.len() - self.sent < MQTT_UNSENT_BYTES_MAX
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                self.ended = Some(InboundEnd::Lost);
            } else {
                self.receive(read.filled());
            }
            Poll::Ready(Ok(()))
        })
    }

    /// Decodes bytes that were read, and hands their messages to intake.
    fn receive(&mut self, bytes: &[u8]) {
        let intake = &self.front.intake;
        let batch = self.inbound.receive(bytes, intake, self.trains.unacknowledged(), &mut self.out);
        if batch.packets > 0 {
            self.heard_at = Instant::now();
        }
        // Releases go first: a message may reuse the packet identifier of a released exchange.
        let released = (!batch.releases.is_empty()).then(|| intake.release(&batch.releases));
        let stored = if batch.has_opened_exchanges() { self.session_store_wait() } else { None };
        let intake = &self.front.intake;
        let draft = batch.draft.filter(|draft| !draft.is_empty());
        let admitted = draft.map(|draft| intake.try_admit(draft));
        match admitted {
            Some(Ok(admitted)) => {
                self.trains.push(AckWaits::new(Some(admitted), released, stored), batch.train);
            }
            Some(Err(draft)) => {
                let waits = AckWaits::new(None, released, stored);
                let admitting = self.admit(*draft);
                self.blocked = Some(Box::new(BlockedDraft { admitting, waits, train: batch.train }));
            }
            None if !batch.train.is_empty() => {
                self.trains.push(AckWaits::new(None, released, stored), batch.train);
            }
            None => {}
        }
        if let SessionSending::Subscribed(outbound) = &mut self.sending {
            batch.acknowledged.into_iter().for_each(|packet_id| outbound.acknowledge(packet_id));
        }
        if let Some(request) = batch.request {
            self.begin_request(request);
        }
        if let Some(limited) = batch.held {
            let intake = self.front.intake.clone();
            self.held = Some(Box::pin(async move { intake.wait_turn(limited).await }));
        }
        self.ended = batch.end;
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

    /// Begins to serve a SUBSCRIBE or UNSUBSCRIBE.
    fn begin_request(&mut self, request: SubscriptionRequest) {
        let nothing = SessionSending::Nothing(Box::new(MqttSession::new(0, 0)));
        let outbound = match std::mem::replace(&mut self.sending, nothing) {
            SessionSending::Subscribed(outbound) => outbound,
            SessionSending::Nothing(session) => self.new_outbound(*session),
        };
        let services = SubscribeServices {
            sessions: self.front.sessions.clone(),
            subscribers: self.front.subscribers.clone(),
            refusals: self.front.intake.refusals().clone(),
            grant: self.inbound.grant.clone(),
            form: self.inbound.form,
            who: self.inbound.who.clone(),
        };
        self.requesting = Some(Box::pin(subscribe::serve_request(services, request, outbound)));
    }

    fn admit(&self, draft: Draft) -> Pin<Box<dyn Future<Output = Result<AdmittedDraft, Refusal>> + Send>> {
        let intake = self.front.intake.clone();
        Box::pin(async move { intake.admit(draft).await })
    }

    /// Ready when everything is written.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let n = ready!(Pin::new(&mut *self.stream).poll_write(cx, &self.out[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
            self.stuck_since = None;
        }
        if !self.out.is_empty() {
            // The bytes may still wait in a TLS record or a WebSocket frame.
            ready!(Pin::new(&mut *self.stream).poll_flush(cx))?;
            self.stuck_since = None;
            self.sent = 0;
            self.out.clear();
        }
        Poll::Ready(Ok(()))
    }

    /// The time until the clock has to be checked again.
    fn clock_step(&self) -> Duration {
        let silence =
            self.silence_max.map_or(Duration::MAX, |max| max.saturating_sub(self.heard_at.elapsed()));
        let stuck =
            self.stuck_since.map_or(Duration::MAX, |since| MQTT_STUCK_MAX.saturating_sub(since.elapsed()));
        silence.min(stuck).clamp(CLOCK_STEP_MIN, CLOCK_STEP_MAX)
    }

    fn check_deadlines(&self) -> Option<StopReason> {
        // While reading is held back, silence is not the client's fault.
        let silent = self.may_read() && self.silence_max.is_some_and(|max| self.heard_at.elapsed() >= max);
        let stuck = self.stuck_since.is_some_and(|since| since.elapsed() >= MQTT_STUCK_MAX);
        if silent { Some(StopReason::Silent) } else { stuck.then_some(StopReason::Stuck) }
    }
}
