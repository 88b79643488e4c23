//! A goodbye: the reason why a connection ends, and the last packet that the client is sent.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::codec::write;
use super::codec::{Frame, Reason};
use super::inbound::{End, Inbound, reason_of};
use super::outbound::Trouble;
use super::stream::Stream;
use crate::auth::Denied;
use crate::auth::connections::Close;
use crate::intake::Refusal;
use crate::message::Transport;
use crate::observe::refusals::{Note, Refusals};

/// How long a client may take to read its last packets.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// The reason why the gateway stops serving a connection.
pub(super) enum Stop {
    /// The client ended the connection, or broke a rule.
    End(End),
    /// The key died, another connection took over, or the gateway shuts down.
    Close(Close),
    /// The log could not take the client's messages, or a limit held them back, for too long.
    Transient(Refusal),
    /// The client was silent for longer than its keep-alive allows.
    Silent,
    /// The client does not read what it is sent.
    Stuck,
    /// The records for the client's subscriptions cannot be read.
    Trouble(Trouble),
    /// The network failed.
    Io,
}

impl Stop {
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
            Stop::Close(Close::KeyDead) => without_messages(sent, &owed),
            _ => owed,
        };
        let mut say = |reason, words: &str| write::disconnect(&mut out, inbound.form, reason, words);
        match self {
            Stop::End(End::Lost | End::Goodbye(_)) | Stop::Stuck | Stop::Io => {}
            Stop::Trouble(trouble) => say(Reason::ImplementationSpecificError, &trouble.to_string()),
            Stop::End(End::Violation(violation)) => {
                refusals.note(inbound.note(Note::new(Transport::Mqtt, "protocol", violation)));
                say(violation.reason, violation.text);
            }
            Stop::End(End::Refused(Refusal::Denied(Denied::Revoked))) => {
                say(Reason::AdministrativeAction, "the API key is no longer valid")
            }
            Stop::End(End::Refused(refusal)) => say(reason_of(refusal), &refusal.to_string()),
            Stop::Transient(refusal) => {
                refusals.note(inbound.note(refusal.note(Transport::Mqtt)));
                say(reason_of(refusal), &refusal.to_string());
            }
            Stop::Close(Close::KeyDead) => {
                say(Reason::AdministrativeAction, "the API key is no longer valid")
            }
            Stop::Close(Close::TakenOver) => say(Reason::SessionTakenOver, "the client connected again"),
            Stop::Close(Close::Drain) => say(Reason::ServerShuttingDown, "the gateway is shutting down"),
            Stop::Silent => say(Reason::KeepAliveTimeout, "nothing was heard for one and a half keep-alives"),
        }
        out
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::End(End::Lost) => f.write_str("the client is gone"),
            Stop::End(End::Goodbye(_)) => f.write_str("the client left"),
            Stop::Trouble(trouble) => write!(f, "{trouble}"),
            Stop::End(End::Violation(violation)) => write!(f, "{violation}"),
            Stop::End(End::Refused(refusal)) | Stop::Transient(refusal) => write!(f, "{refusal}"),
            Stop::Close(why) => write!(f, "{why:?}"),
            Stop::Silent => f.write_str("keep-alive"),
            Stop::Stuck => f.write_str("the client does not read"),
            Stop::Io => f.write_str("the network"),
        }
    }
}

/// Filters `owed` for a client whose key is dead. The rest of a packet that began in `sent` stays, and so
/// do the answers to the client's packets. Messages, which the client may no longer see, are left out.
fn without_messages(sent: &[u8], owed: &[u8]) -> Vec<u8> {
    const PUBLISH: u8 = 3;
    let all = [sent, owed].concat();
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(bytes) = Frame::bytes_at(&all[at..]) {
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
pub(super) async fn say_goodbye(stream: &mut Stream, words: &[u8]) {
    let said = async {
        if stream.write_all(words).await.is_err() || stream.shutdown().await.is_err() {
            return;
        }
        let mut rest = [0; 512];
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(GOODBYE_MAX, said).await;
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
