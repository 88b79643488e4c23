//! The exit of a connection that somebody else ends: another connection of the client takes over, the gateway shuts
//! down, or the client is gone. What the client had sent before counts: it is read to its end, in its order, and is in
//! the log before whoever waits for the connection goes on. Time and bytes bound that.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Instant;

use super::super::codec::DisconnectPacket;
use super::super::goodbye::StopReason;
use super::super::inbound::InboundEnd;
use super::turns::READ_BUFFER;
use super::{MqttConnection, SessionSending};
use crate::auth::connections::CloseReason;
use crate::limits::{MQTT_EXIT_BYTES_MAX, MQTT_EXIT_WAIT_MAX};

/// How often a drain looks whether what it waits for is there, beside being told.
const DRAIN_STEP: Duration = Duration::from_secs(1);

/// A connection on its way out.
pub(super) struct PendingExit {
    why: StopReason,
    /// What has not been taken by then is not waited for.
    until: Instant,
    /// How much more is read.
    bytes_left: usize,
    /// The client was still there when everything was read.
    is_client_there: bool,
}

impl MqttConnection<'_> {
    /// Takes what the client has sent, and ends the connection after that. The first reason is kept.
    pub(super) fn begin_exit(&mut self, why: StopReason) {
        if self.exit.is_some() {
            return;
        }
        if let SessionSending::Subscribed(outbound) = &mut self.sending {
            outbound.suspend(self.output.unsent_bytes());
        }
        self.exit = Some(Box::new(PendingExit {
            why,
            until: Instant::now() + MQTT_EXIT_WAIT_MAX,
            bytes_left: MQTT_EXIT_BYTES_MAX,
            is_client_there: false,
        }));
    }

    /// How long the exit may still take.
    pub(super) fn exit_left(&self) -> Duration {
        let left = self.exit.as_ref().map(|exit| exit.until.saturating_duration_since(Instant::now()));
        left.unwrap_or(Duration::MAX)
    }

    /// Counts bytes that were read on the way out.
    pub(super) fn count_exit_bytes(&mut self, bytes: usize) {
        if let Some(exit) = &mut self.exit {
            exit.bytes_left = exit.bytes_left.saturating_sub(bytes);
        }
    }

    /// Ends the input of a connection on its way out, if everything that had arrived was taken in.
    pub(super) fn end_input_of_exit(&mut self) -> bool {
        let is_paused = self.inbound.is_paused() || self.waiting_request.is_some();
        let Some(exit) = &mut self.exit else { return false };
        if is_paused || exit.bytes_left > 0 && self.stream.has_unread() {
            return false;
        }
        exit.is_client_there = true;
        self.ended = Some(InboundEnd::Lost);
        true
    }

    /// Why the connection ends, now that nothing more is read and all answers are written.
    pub(super) fn finish(&mut self) -> StopReason {
        let end = self.ended.take().unwrap_or(InboundEnd::Lost);
        match (end, self.exit.take()) {
            (InboundEnd::Lost, Some(exit)) => {
                self.pushed_out = exit.is_client_there && exit.is_takeover();
                exit.why
            }
            (end, _) => StopReason::End(end),
        }
    }

    /// Ends an exit that has taken too long. A drain still waits for what is on its way into the log.
    pub(super) fn check_exit(&mut self) -> Option<StopReason> {
        let exit = self.exit.as_mut().filter(|exit| exit.until <= Instant::now())?;
        if matches!(exit.why, StopReason::Close(CloseReason::Drain)) {
            exit.until += DRAIN_STEP;
            if self.ended.is_none() {
                self.ended = Some(InboundEnd::Lost);
                (self.held, self.waiting_request) = (None, None);
            }
            self.cancel_request.cancel();
            return None;
        }
        match self.ended.take() {
            Some(InboundEnd::Goodbye(goodbye)) => Some(StopReason::End(InboundEnd::Goodbye(goodbye))),
            _ => self.exit.take().map(|exit| exit.why),
        }
    }

    /// The DISCONNECT that the client has sent, although the connection ends for another reason: it was read when that came
    /// up, or lies behind what was not taken in.
    pub(super) fn find_goodbye(&mut self, stop: &StopReason) -> Option<DisconnectPacket> {
        if matches!(stop, StopReason::Close(CloseReason::KeyDead)) {
            // The will is dead with the key.
            return None;
        }
        let read = self.ended.take();
        let stopped_by = if let StopReason::End(end) = stop { Some(end) } else { None };
        for end in stopped_by.into_iter().chain(&read) {
            match end {
                InboundEnd::Goodbye(goodbye) => return Some(*goodbye),
                // What breaks a rule, or may never be taken, is in front of the goodbye.
                InboundEnd::Violation(_) => return None,
                InboundEnd::Refused(refusal) if !refusal.is_transient() => return None,
                InboundEnd::Refused(_) | InboundEnd::Lost => {}
            }
        }
        let mut bytes_left = MQTT_EXIT_BYTES_MAX;
        let Self { stream, inbound, .. } = self;
        READ_BUFFER.with_borrow_mut(|buffer| {
            inbound.find_goodbye(|to| {
                let most = buffer.len().min(bytes_left);
                let mut read = ReadBuf::new(&mut buffer[..most]);
                let mut cx = Context::from_waker(Waker::noop());
                if !matches!(Pin::new(&mut **stream).poll_read(&mut cx, &mut read), Poll::Ready(Ok(()))) {
                    return 0;
                }
                let bytes = read.filled();
                to.extend_from_slice(bytes);
                bytes_left -= bytes.len();
                bytes.len()
            })
        })
    }

    /// Whether as much was read on the way out as may be.
    pub(super) fn is_exit_full(&self) -> bool {
        self.exit.as_ref().is_some_and(|exit| exit.bytes_left == 0)
    }
}

impl PendingExit {
    fn is_takeover(&self) -> bool {
        matches!(self.why, StopReason::Close(CloseReason::TakenOver))
    }
}
