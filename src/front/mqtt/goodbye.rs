//! A goodbye: the reason why a connection ends, and the last packet that the client is sent.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::codec::write;
use super::codec::{MqttFrame, ReasonCode};
use super::inbound::{Inbound, InboundEnd};
use super::outbound::OutboundError;
use super::reason::refusal_reason_code;
use super::stream::ClientStream;
use crate::auth::GrantDenial;
use crate::auth::connections::CloseReason;
use crate::intake::Refusal;
use crate::message::Transport;
use crate::observe::cause::Cause;
use crate::observe::refusals::{RefusalNote, Refusals};

/// How long a client may take to read its last packets.
const MQTT_GOODBYE_WAIT_MAX: Duration = Duration::from_secs(2);

/// The reason why the gateway stops serving a connection.
pub(super) enum StopReason {
    /// The client ended the connection, or broke a rule.
    End(InboundEnd),
    /// The key died, another connection took over, or the gateway shuts down.
    Close(CloseReason),
    /// The log could not take the client's messages, or a limit held them back, for too long.
    Transient(Refusal),
    /// The client was silent for longer than its keep-alive allows.
    Silent,
    /// The client does not read what it is sent.
    Stuck,
    /// The records for the client's subscriptions cannot be read.
    OutboundFailed(OutboundError),
    /// The network failed.
    NetworkFailed,
}

impl StopReason {
    /// The last bytes for the client: the rest of what it is `owed`, then the reason. `sent` is what went
    /// out before. Also reports the refusal, if this is one.
    pub(super) fn last_words(
        &self,
        sent: &[u8],
        owed: Vec<u8>,
        inbound: &Inbound,
        refusals: &Refusals,
    ) -> Vec<u8> {
        let mut out = match self {
            StopReason::Close(CloseReason::KeyDead) => without_messages(sent, &owed),
            _ => owed,
        };
        let mut say = |reason, words: &str| write::disconnect(&mut out, inbound.form, reason, words);
        match self {
            StopReason::End(InboundEnd::Lost | InboundEnd::Goodbye(_))
            | StopReason::Stuck
            | StopReason::NetworkFailed => {}
            StopReason::OutboundFailed(trouble) => {
                say(ReasonCode::ImplementationSpecificError, &trouble.to_string())
            }
            StopReason::End(InboundEnd::Violation(violation)) => {
                refusals.note(inbound.note(RefusalNote::new(Transport::Mqtt, Cause::Protocol, violation)));
                say(violation.reason, violation.text);
            }
            StopReason::End(InboundEnd::Refused(Refusal::Denied(GrantDenial::Revoked))) => {
                say(ReasonCode::AdministrativeAction, "the API key is no longer valid")
            }
            StopReason::End(InboundEnd::Refused(refusal)) => {
                say(refusal_reason_code(refusal), &refusal.to_string())
            }
            StopReason::Transient(refusal) => {
                refusals.note(inbound.note(refusal.note(Transport::Mqtt)));
                say(refusal_reason_code(refusal), &refusal.to_string());
            }
            StopReason::Close(CloseReason::KeyDead) => {
                say(ReasonCode::AdministrativeAction, "the API key is no longer valid")
            }
            StopReason::Close(CloseReason::TakenOver) => {
                say(ReasonCode::SessionTakenOver, "the client connected again")
            }
            StopReason::Close(CloseReason::Drain) => {
                say(ReasonCode::ServerShuttingDown, "the gateway is shutting down")
            }
            StopReason::Close(CloseReason::Kicked) => {
                say(ReasonCode::AdministrativeAction, "an administrator has closed the connection")
            }
            StopReason::Silent => {
                say(ReasonCode::KeepAliveTimeout, "nothing was heard for one and a half keep-alives")
            }
        }
        out
    }
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StopReason::End(InboundEnd::Lost) => f.write_str("the client is gone"),
            StopReason::End(InboundEnd::Goodbye(_)) => f.write_str("the client left"),
            StopReason::OutboundFailed(trouble) => write!(f, "{trouble}"),
            StopReason::End(InboundEnd::Violation(violation)) => write!(f, "{violation}"),
            StopReason::End(InboundEnd::Refused(refusal)) | StopReason::Transient(refusal) => {
                write!(f, "{refusal}")
            }
            StopReason::Close(why) => write!(f, "{why:?}"),
            StopReason::Silent => f.write_str("keep-alive"),
            StopReason::Stuck => f.write_str("the client does not read"),
            StopReason::NetworkFailed => f.write_str("the network"),
        }
    }
}

/// Filters `owed` for a client whose key is dead. The rest of a packet that began in `sent` stays, and so
/// do the answers to the client's packets. Messages, which the client may no longer see, are left out.
fn without_messages(sent: &[u8], owed: &[u8]) -> Vec<u8> {
    const PUBLISH: u8 = 3;
    let all = [sent, owed].concat();
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(bytes) = MqttFrame::packet_bytes(&all[at..]) {
        let end = (at + bytes).min(all.len());
        let begun = at < sent.len() && end > sent.len();
        if begun || (at >= sent.len() && all[at] >> 4 != PUBLISH) {
            out.extend_from_slice(&all[at.max(sent.len())..end]);
        }
        at = end;
    }
    out
}

/// Writes the last packets and reads until the client closes, for a limited time. A close with
/// unread input would reset the connection, and the packets might never arrive.
pub(super) async fn say_goodbye(stream: &mut ClientStream, words: &[u8]) {
    let said = async {
        if stream.write_all(words).await.is_err() || stream.shutdown().await.is_err() {
            return;
        }
        let mut rest = [0; 512];
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(MQTT_GOODBYE_WAIT_MAX, said).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_whose_key_is_dead_gets_its_answers_and_no_message_that_it_has_nothing_of() {
        let message = |payload: &[u8]| {
            let mut packet = Vec::new();
            write::publish(&mut packet, 0x30, &["a"], None, None, payload);
            packet
        };
        let (first, second, ack) = (message(b"begun"), message(b"not begun"), [0x40, 2, 0, 7]);
        let all = [&first[..], &ack, &second, &ack].concat();
        for cut in 0..all.len() {
            let left = without_messages(&all[..cut], &all[cut..]);
            let mut expected = Vec::new();
            let mut at = 0;
            for (packet, is_message) in [(&first[..], true), (&ack, false), (&second, true), (&ack, false)] {
                let end = at + packet.len();
                if cut < end && (!is_message || cut > at) {
                    expected.extend_from_slice(&all[at.max(cut)..end]);
                }
                at = end;
            }
            assert_eq!(left, expected, "cut at {cut}");
        }
    }
}
