//! The loop of a connection: turns that read, hand over, answer, and watch for the reasons to stop.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::super::goodbye::StopReason;
use super::super::inbound::InboundEnd;
use super::{MqttConnection, SessionSending};
use crate::auth::connections::CloseReason;
use crate::auth::{GrantDenial, Scope};
use crate::limits::{
    MQTT_PACKETS_PER_TURN_MAX, MQTT_READ_BYTES, MQTT_READS_IN_FLIGHT_MAX, MQTT_UNSENT_BYTES_MAX,
};

/// The shortest and the longest time between two checks of the clock.
const CLOCK_STEP_MIN: Duration = Duration::from_millis(10);
const CLOCK_STEP_MAX: Duration = Duration::from_secs(3600);

thread_local! {
    /// What a connection of the thread reads into.
    pub(super) static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; MQTT_READ_BYTES].into());
}

impl MqttConnection<'_> {
    /// Ready when the connection is to end.
    pub(super) fn poll(&mut self, clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<StopReason> {
        self.output.borrow_spare();
        let polled = self.poll_turns(clock, cx);
        self.output.return_spare();
        polled
    }

    /// Takes turns as long as something moves, and watches the clock.
    fn poll_turns(&mut self, mut clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<StopReason> {
        loop {
            match self.take_turn(clock.as_mut(), cx) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(stop) => return Poll::Ready(stop),
            }
            if self.inbound.holds_packet() || self.starved.is_some() || self.exit.is_some() {
                let due = Instant::now() + self.clock_step();
                if clock.deadline() > due {
                    clock.as_mut().reset(due);
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

    /// One turn: the answers that are due, then writing, then reading. Returns whether to take another one.
    #[inline]
    fn take_turn(&mut self, clock: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Result<bool, StopReason> {
        self.poll_closed(cx)?;
        self.poll_blocked(cx)?;
        self.poll_held(cx)?;
        self.poll_starved(cx);
        let form = self.inbound.form;
        let closer = self.inbound.exchange_closer(&self.front.intake);
        let (exchanges, output) = (&mut self.inbound.exchanges, &mut self.output.bytes);
        let answered = self.pending_acks.poll_write(form, &closer, exchanges, output, cx)?;
        self.poll_request(cx);
        if self.begin_waiting_request() {
            return Ok(true);
        }
        if self.inbound.is_paused() && self.ended.is_none() && self.may_read() {
            self.receive(&[]);
            return Ok(self.goes_on(cx));
        }
        let written = self.poll_send(cx)?;
        if written.is_pending() && self.output.begin_wait(self.stream) {
            clock.reset(Instant::now() + self.clock_step());
        }
        if self.ended.is_some() {
            // On the way out nobody waits for a client that does not read.
            let is_written = written.is_ready() || self.exit.is_some();
            let is_idle = self.blocked.is_none() && self.requesting.is_none();
            return if answered.is_ready() && is_written && is_idle { Err(self.finish()) } else { Ok(false) };
        }
        if self.inbound.is_paused() && self.may_read() {
            // There is room now that the output is sent.
            return Ok(true);
        }
        if self.may_read() && (self.inbound.is_packet_charged() || !self.is_starved(cx)) {
            if !self.is_exit_full() && self.poll_read(cx).is_ready() {
                return Ok(self.goes_on(cx));
            }
            return Ok(self.end_input_of_exit());
        }
        Ok(self.poll_ahead(cx))
    }

    /// Whether to take another turn at once. After a read of very many packets other connections come first.
    #[inline]
    fn goes_on(&self, cx: &Context<'_>) -> bool {
        let is_long = self.packets_read >= MQTT_PACKETS_PER_TURN_MAX;
        if is_long {
            cx.waker().wake_by_ref();
        }
        !is_long
    }

    /// Looks whether somebody has closed the connection.
    #[inline]
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Result<(), StopReason> {
        match self.present.control().poll_closed(cx) {
            Poll::Ready(CloseReason::KeyDead) => return Err(StopReason::Close(CloseReason::KeyDead)),
            Poll::Ready(why) => self.begin_exit(StopReason::Close(why)),
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Hands the blocked draft to the log, if intake has room for it now.
    #[inline]
    fn poll_blocked(&mut self, cx: &mut Context<'_>) -> Result<(), StopReason> {
        if let Some(blocked) = &mut self.blocked
            && let Poll::Ready(admitted) = blocked.admitting.as_mut().poll(cx)
        {
            let (mut waits, acks) = (std::mem::take(&mut blocked.waits), std::mem::take(&mut blocked.acks));
            self.blocked = None;
            waits.admitted = Some(admitted.map_err(StopReason::Transient)?);
            self.pending_acks.push(waits, acks);
        }
        Ok(())
    }

    /// Lets the message that is over a rate go on, if it is its turn now.
    #[inline]
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Result<(), StopReason> {
        if let Some(held) = &mut self.held
            && let Poll::Ready(turn) = held.as_mut().poll(cx)
        {
            self.held = None;
            self.inbound.resume(turn.map_err(StopReason::Transient)?);
        }
        Ok(())
    }

    /// Goes on if there is room in the key's share of the memory now.
    #[inline]
    fn poll_starved(&mut self, cx: &mut Context<'_>) {
        if let Some(starved) = &mut self.starved
            && let Poll::Ready(charge) = starved.room.as_mut().poll(cx)
        {
            self.starved = None;
            if let Some(charge) = charge {
                self.inbound.set_packet_charge(charge);
            }
            // What was held back is not the client's silence.
            self.heard_at = Instant::now();
        }
    }

    /// Answers the SUBSCRIBE or UNSUBSCRIBE in progress, if it is served.
    #[inline]
    fn poll_request(&mut self, cx: &mut Context<'_>) {
        let Some(requesting) = &mut self.requesting else { return };
        let served = requesting.as_mut().poll(cx);
        if served.is_pending() && self.stream.is_hung_up() {
            // Nobody waits for the answer any more.
            self.cancel_request.cancel();
        }
        if let Poll::Ready((outbound, answer)) = served {
            self.requesting = None;
            self.output.bytes.extend_from_slice(&answer);
            self.watch(&outbound);
            self.sending = SessionSending::Subscribed(outbound);
        }
    }

    /// Begins to serve the next SUBSCRIBE or UNSUBSCRIBE, once the log has what was published before it: that is not
    /// sent to the new subscription.
    #[inline]
    fn begin_waiting_request(&mut self) -> bool {
        if self.waiting_request.is_none() || !self.pending_acks.is_empty() || self.blocked.is_some() {
            return false;
        }
        if let Some(request) = self.waiting_request.take() {
            self.begin_request(*request);
        }
        true
    }

    /// Writes the output, and messages for the session's subscriptions, as long as the client takes them.
    /// Ready when everything is written.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, StopReason> {
        if let SessionSending::Subscribed(outbound) = &mut self.sending {
            outbound.poll_asked(cx);
        }
        loop {
            let is_stuffed = self.is_stuffed(cx);
            if (is_stuffed || self.ended.is_some())
                && let SessionSending::Subscribed(outbound) = &mut self.sending
            {
                outbound.suspend(self.output.unsent_bytes());
            }
            if let (SessionSending::Subscribed(outbound), None, None, None) =
                (&mut self.sending, &self.requesting, &self.ended, &self.exit)
            {
                let may = self.inbound.grant.allows_scope(Scope::Subscribe);
                if matches!(may, Err(GrantDenial::Revoked | GrantDenial::Expired | GrantDenial::ExpiredToken))
                {
                    return Err(StopReason::Close(CloseReason::KeyDead));
                }
                if may.is_ok() && is_stuffed {
                    // It is in memory already, and counted: to send it makes room.
                    let _ = outbound.poll_held(&mut self.output.bytes, cx);
                } else if may.is_ok()
                    && let Poll::Ready(trouble) =
                        outbound.poll_fill(self.output.unsent_bytes(), &mut self.output.bytes, cx)
                {
                    return Err(StopReason::OutboundFailed(trouble));
                }
            }
            // A complete flush makes room, so the sending half is asked again.
            let something = !self.output.bytes.is_empty();
            match self.output.poll_flush(self.stream, cx) {
                Poll::Ready(Ok(())) if something => {}
                Poll::Ready(Ok(())) => {
                    self.charge_output();
                    return Ok(Poll::Ready(()));
                }
                Poll::Ready(Err(_)) => {
                    // The client takes nothing more. What it had sent before counts.
                    self.output.discard();
                    self.begin_exit(StopReason::NetworkFailed);
                    return Ok(Poll::Ready(()));
                }
                Poll::Pending => {
                    self.charge_output();
                    return Ok(Poll::Pending);
                }
            }
        }
    }

    /// Charges for what the client has not taken: the output, and what is prepared for it.
    fn charge_output(&mut self) {
        let prepared = match &self.sending {
            SessionSending::Subscribed(outbound) => outbound.held_bytes(),
            SessionSending::Nothing(_) => 0,
        };
        let output = if self.output.bytes.is_empty() { 0 } else { self.output.bytes.capacity() };
        match (output + prepared, &mut self.output_memory) {
            (0, None) => {}
            (0, charged) => *charged = None,
            (bytes, Some(charged)) if charged.bytes() == bytes => {}
            (bytes, Some(charged)) => charged.set_held(bytes),
            (bytes, none) => *none = Some(self.inbound.account.charge_held(bytes)),
        }
    }

    /// Whether what is to be sent under the key takes as much of its share of the memory as it may. Waits for room then.
    #[inline]
    fn is_stuffed(&mut self, cx: &mut Context<'_>) -> bool {
        if self.stuffed.is_none() {
            if matches!(self.sending, SessionSending::Nothing(_)) || !self.inbound.account.is_over_to_send() {
                return false;
            }
            let account = self.inbound.account.clone();
            self.stuffed = Some(Box::pin(async move { account.wait_room_to_send().await }));
        }
        if let Some(stuffed) = &mut self.stuffed
            && stuffed.as_mut().poll(cx).is_ready()
        {
            self.stuffed = None;
        }
        self.stuffed.is_some()
    }

    /// Whether the key's share of the memory is used up, so that nothing more may be read. Begins to wait for room then.
    #[inline]
    fn is_starved(&mut self, cx: &mut Context<'_>) -> bool {
        if self.starved.is_none() && self.inbound.account.is_over() {
            self.starve(None);
            self.poll_starved(cx);
        }
        self.starved.is_some()
    }

    /// Whether another read may be taken in. While it may not, TCP's flow control holds the client back.
    fn may_read(&self) -> bool {
        self.blocked.is_none()
            && self.held.is_none()
            && self.requesting.is_none()
            && self.waiting_request.is_none()
            && (self.starved.is_none() || self.inbound.is_packet_charged())
            && (self.pending_acks.is_empty() || !self.inbound.waits_for_answers())
            && self.pending_acks.len() < MQTT_READS_IN_FLIGHT_MAX
            && (self.output.unsent_bytes() < MQTT_UNSENT_BYTES_MAX || self.exit.is_some())
    }

    /// Takes in what one read of the socket gives. An error is the end of it: what came before counts.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_input_over {
            self.ended = Some(InboundEnd::Lost);
            return Poll::Ready(());
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            match ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut read)) {
                Ok(()) if !read.filled().is_empty() => {
                    self.count_exit_bytes(read.filled().len());
                    self.receive(read.filled());
                }
                Ok(()) => self.ended = Some(InboundEnd::Lost),
                Err(_) => {
                    self.ended = Some(InboundEnd::Lost);
                    self.begin_exit(StopReason::NetworkFailed);
                }
            }
            Poll::Ready(())
        })
    }

    /// Reads on while the next packet waits for its turn, and answers PINGREQs: the client is held back, and not left
    /// alone. Returns whether there was any.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> bool {
        let may = self.held.is_some() && !self.is_input_over && self.inbound.may_look_ahead();
        if !may || self.output.unsent_bytes() >= MQTT_UNSENT_BYTES_MAX {
            return false;
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            let Poll::Ready(is_read) = Pin::new(&mut *self.stream).poll_read(cx, &mut read) else {
                return false;
            };
            if is_read.is_err() || read.filled().is_empty() {
                self.is_input_over = true;
                return false;
            }
            self.count_exit_bytes(read.filled().len());
            let pings = self.inbound.look_ahead(read.filled(), &mut self.output.bytes);
            self.inbound.charge_held();
            if pings > 0 {
                self.heard_at = Instant::now();
            }
            true
        })
    }

    /// The time until the clock has to be checked again.
    pub(super) fn clock_step(&self) -> Duration {
        let silence =
            self.silence_max.map_or(Duration::MAX, |max| max.saturating_sub(self.heard_at.elapsed()));
        let now = Instant::now();
        let packet =
            self.inbound.packet_due().map_or(Duration::MAX, |due| due.saturating_duration_since(now));
        let patience = self.starved.as_ref().filter(|_| self.inbound.holds_memory());
        let patience = patience
            .map_or(Duration::MAX, |starved| self.hold_back_max().saturating_sub(starved.since.elapsed()));
        let least = silence.min(packet).min(patience).min(self.output.wait_left()).min(self.exit_left());
        least.clamp(CLOCK_STEP_MIN, CLOCK_STEP_MAX)
    }

    /// How long a client is held back for a transient cause.
    fn hold_back_max(&self) -> Duration {
        Duration::from_millis(self.front.intake.limits().hold_back_ms_max)
    }

    fn check_deadlines(&mut self) -> Option<StopReason> {
        if let Some(stop) = self.check_exit() {
            return Some(stop);
        }
        // While reading is held back, silence is not the client's fault. Nor is it if the gateway was stopped, and has
        // not read what lies there.
        let is_judged = self.may_read() && !self.stream.has_unread();
        let silent = is_judged && self.silence_max.is_some_and(|max| self.heard_at.elapsed() >= max);
        if let Some(starved) = &self.starved
            && self.inbound.holds_memory()
            && !self.inbound.is_packet_charged()
            && starved.since.elapsed() >= self.hold_back_max()
        {
            // It holds what others may wait for. Nothing of the packet was acknowledged.
            return Some(StopReason::Transient(self.front.intake.busy_refusal()));
        }
        if is_judged && self.inbound.packet_due().is_some_and(|due| Instant::now() >= due) {
            return Some(StopReason::Silent);
        }
        if silent { Some(StopReason::Silent) } else { self.is_stuck().then_some(StopReason::Stuck) }
    }

    /// Whether the client reads nothing of what it is sent: for long, or while others wait for the memory that it takes.
    fn is_stuck(&mut self) -> bool {
        let Self { output, stream, sending, inbound, .. } = self;
        let SessionSending::Subscribed(outbound) = sending else { return output.is_stuck(stream, || false) };
        output.is_stuck(stream, || outbound.share().is_output_wanted() || inbound.account.is_waited_for())
    }
}
