//! What a server sends to a client, as NATS' protocol has it: a line that ends with CR LF, and for a message its headers
//! and payload. Publishers decide most of a message's bytes; whatever they are, they cost nobody the connection.

use bytes::{Buf, BytesMut};

use crate::inlet::Parcel;

/// The longest line of a server. INFO names every server of a cluster.
const SERVER_LINE_BYTES_MAX: usize = 1 << 20;
/// The largest message: nats-server allows no more.
const SERVER_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The server does not speak NATS, or the connection is out of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent {0}")]
pub(super) struct WireError(&'static str);

/// One operation of a server.
pub(super) enum ServerOperation {
    /// What it says about itself, as JSON.
    Info(Vec<u8>),
    /// A message of a subscription.
    Message(Parcel),
    /// It asks whether the client is there.
    Ping,
    /// It answers the client's question.
    Pong,
    /// It complains, and may close the connection.
    Complaint(String),
    /// Anything that needs no action.
    Other,
}

/// Takes the next operation from the front of `buffer`; `None` if it is not all there yet.
///
/// # Errors
/// Bytes that are no operation.
pub(super) fn take_operation(buffer: &mut BytesMut) -> Result<Option<ServerOperation>, WireError> {
    let Some(end) = memchr::memchr(b'\n', buffer) else {
        return if buffer.len() > SERVER_LINE_BYTES_MAX {
            Err(WireError("an endless line"))
        } else {
            Ok(None)
        };
    };
    let line = buffer[..end].strip_suffix(b"\r").ok_or(WireError("a line without its end"))?;
    let (name, rest) = match line.iter().position(|byte| *byte == b' ' || *byte == b'\t') {
        Some(at) => (&line[..at], &line[at + 1..]),
        None => (line, &[][..]),
    };
    let operation = match name {
        b"MSG" => return take_message(buffer, end, false),
        b"HMSG" => return take_message(buffer, end, true),
        b"PING" => ServerOperation::Ping,
        b"PONG" => ServerOperation::Pong,
        b"INFO" => ServerOperation::Info(rest.to_vec()),
        b"-ERR" => {
            let words = String::from_utf8_lossy(rest);
            ServerOperation::Complaint(words.trim().trim_matches('\'').to_owned())
        }
        b"+OK" => ServerOperation::Other,
        _ => return Err(WireError("an operation that is not known")),
    };
    buffer.advance(end + 1);
    Ok(Some(operation))
}

/// Takes a message: `MSG subject sid [reply] bytes` or `HMSG subject sid [reply] header-bytes all-bytes`.
fn take_message(
    buffer: &mut BytesMut,
    end: usize,
    has_head: bool,
) -> Result<Option<ServerOperation>, WireError> {
    let line = &buffer[..end - 1];
    // Spaces and tabs alone, as nats-server does: a subject may hold any other character.
    let mut words = line.split(|byte| *byte == b' ' || *byte == b'\t').filter(|word| !word.is_empty());
    let mut found: [&[u8]; 6] = [&[]; 6];
    let mut count = 0;
    for word in words.by_ref().take(found.len()) {
        found[count] = word;
        count += 1;
    }
    let sizes = if has_head { 2 } else { 1 };
    let reply = match count.checked_sub(3 + sizes) {
        Some(0) => None,
        Some(1) => Some(found[3]),
        _ => return Err(WireError("a message with too few or too many arguments")),
    };
    if words.next().is_some() {
        return Err(WireError("a message with too many arguments"));
    }
    let size = |word: &[u8]| -> Result<usize, WireError> {
        let number = std::str::from_utf8(word).ok().and_then(|text| text.parse().ok());
        number.filter(|size| *size <= SERVER_MESSAGE_BYTES_MAX).ok_or(WireError("a size that is none"))
    };
    let all = size(found[count - 1])?;
    let head = if has_head { size(found[count - 2])? } else { 0 };
    if head > all {
        return Err(WireError("headers that are longer than their message"));
    }
    let body = end + 1;
    if buffer.len() < body + all + 2 {
        let missing = body + all + 2 - buffer.len();
        buffer.reserve(missing);
        return Ok(None);
    }
    let (head, payload) = buffer[body..body + all].split_at(head);
    let parcel = Parcel::new(found[1], reply, head, payload);
    buffer.advance(body + all + 2);
    Ok(Some(ServerOperation::Message(parcel)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(bytes: &[u8]) -> Result<Vec<String>, WireError> {
        let mut buffer = BytesMut::from(bytes);
        let mut seen = Vec::new();
        while let Some(operation) = take_operation(&mut buffer)? {
            seen.push(match operation {
                ServerOperation::Message(parcel) => format!(
                    "{} {:?} {:?} {}",
                    parcel.subject(),
                    parcel.reply_subject(),
                    parcel.headers().collect::<Vec<_>>(),
                    String::from_utf8_lossy(parcel.payload())
                ),
                ServerOperation::Info(json) => String::from_utf8(json).expect("text"),
                ServerOperation::Complaint(words) => words,
                ServerOperation::Ping => "PING".to_owned(),
                ServerOperation::Pong => "PONG".to_owned(),
                ServerOperation::Other => "OK".to_owned(),
            });
        }
        Ok(seen)
    }

    #[test]
    fn operations_are_taken_one_by_one_wherever_the_bytes_are_cut() {
        let bytes = b"INFO {}\r\nMSG a.b 1 2\r\nhi\r\nPING\r\nHMSG a 1 _INBOX.x 18 20\r\nNATS/1.0\r\nA: b\r\n\r\nhi\r\nPONG\r\n\
                      +OK\r\n-ERR 'no'\r\nMSG a 1 0\r\n\r\n";
        let seen = take_all(bytes).expect("NATS");
        let message = "a Some(\"_INBOX.x\") [(\"A\", \"b\")] hi";
        assert_eq!(seen, ["{}", "a.b None [] hi", "PING", message, "PONG", "OK", "no", "a None [] "]);
        let mut buffer = BytesMut::new();
        let mut count = 0;
        for byte in bytes {
            buffer.extend_from_slice(&[*byte]);
            count += usize::from(take_operation(&mut buffer).expect("NATS").is_some());
        }
        assert_eq!((count, buffer.len()), (seen.len(), 0));
    }

    #[test]
    fn what_a_publisher_may_write_is_never_an_error() {
        for head in [
            &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"\xff\xff",
            b"NATS/1.0",
            b"\r\n",
        ] {
            let mut bytes =
                format!("HMSG a\u{a0}b.\u{3000} 1 _INBOX.1 {} {}\r\n", head.len(), head.len() + 1)
                    .into_bytes();
            bytes.extend_from_slice(head);
            bytes.extend_from_slice(b"x\r\n");
            assert_eq!(take_all(&bytes).expect("a message").len(), 1);
        }
        assert_eq!(take_all(b"MSG \xff.\xfe 1 1\r\nx\r\n").expect("a message").len(), 1);
    }

    #[test]
    fn what_no_server_sends_is_an_error_and_never_a_panic() {
        for bytes in [
            &b"HELLO\r\n"[..],
            b"\r\n",
            b"\n",
            b"MSG\r\n",
            b"MSG a 1\r\n",
            b"MSG a 1 b c 2\r\n",
            b"MSG a 1 x\r\n",
            b"MSG a 1 99999999999\r\n",
            b"MSG a 1 -1\r\n",
            b"HMSG a 1 2\r\n",
            b"HMSG a 1 3 2\r\n",
            b"HMSG a 1 r 1 2 3 4\r\n",
        ] {
            assert!(take_all(bytes).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        assert!(take_all(&vec![b'x'; SERVER_LINE_BYTES_MAX + 1]).is_err());
    }
}
